"""Memory of tensors that are mapped from files: taken, counted, and given back while a file still holds the values.

So a checkpoint larger than the memory can be converted. Giving back works on Linux alone; elsewhere nothing happens.
"""

import ctypes
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from torch import Tensor, nn

from normswap.errors import FileError

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

_RELEASED_FROM = 1 << 16  # bytes; smaller blocks are not worth a system call
_MADV_DONTNEED = 4
_POSIX = os.name == "posix"
_libc = ctypes.CDLL(None, use_errno=True) if _POSIX else None


def peak_memory() -> int | None:
    """The most bytes of memory that this process has held at any time; None where the system does not tell."""
    if resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def release(tensor: Tensor) -> None:
    """Give back the memory of a tensor whose values a file holds; the next read brings them back from there.

    Nothing is ever lost: memory that no file holds, or that was written to since it was mapped, is kept.
    """
    if tensor.device.type == "cpu" and tensor.numel():
        storage = tensor.untyped_storage()
        release_block(storage.data_ptr(), storage.nbytes())


def hold(model: nn.Module) -> None:
    """Copy the tensors of a model into memory of the process's own: what becomes of their file then does not matter.

    Tensors that share memory go on sharing it.
    """
    copies: dict[int, torch.UntypedStorage] = {}
    attributes = (value for module in model.modules() for value in vars(module).values())
    tensors = [*model.parameters(), *model.buffers(), *(value for value in attributes if isinstance(value, Tensor))]
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        if (
            tensor.layout is torch.strided
            and tensor.device.type == "cpu"
            and not tensor.is_quantized
            and tensor.numel()
        ):
            old = tensor.untyped_storage()
            if old.data_ptr() not in copies:
                copies[old.data_ptr()] = old.clone()  # type: ignore[no-untyped-call]
            plain = torch.empty(0, dtype=tensor.dtype)
            new = copies[old.data_ptr()]
            held = plain.set_(new, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]
            bits: Any = torch._utils  # of a tensor that is kept as its conjugate, or its negative
            bits.set_tensor_metadata(held, bits.get_tensor_metadata(tensor))
            tensor.data = held


def release_block(address: int, size: int) -> None:
    """`release` for `size` bytes from `address`: the whole pages among them."""
    page = os.sysconf("SC_PAGE_SIZE") if _POSIX else 1
    first, end = -(-address // page), (address + size) // page
    length, madvise = (end - first) * page, getattr(_libc, "madvise", None)
    if length >= _RELEASED_FROM and madvise is not None and _held_by_files(first, end):
        madvise(ctypes.c_void_p(first * page), ctypes.c_size_t(length), _MADV_DONTNEED)


def _held_by_files(first: int, end: int) -> bool:
    """Whether every page from `first` to before `end` that is in memory is a file's, as the kernel's page map tells.

    A page of a private mapping that was written to is not. See the kernel's documentation of pagemap: of the 64 bits of
    a page, 63 says that it is present, 62 swapped, 61 a file's.
    """
    # Nothing simpler is both safe and as good. Torch does not know for sure what was written to: `.data` and numpy pass
    # by its counter of versions. MADV_PAGEOUT needs no look at the pages, but drops them from the system's cache too:
    # a 1 GB file summed twice took 1.5 s instead of 0.3 s. Without any release its peak was 994 MB instead of 14 MB.
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pages:
            pages.seek(first * 8)
            bits = numpy.frombuffer(pages.read((end - first) * 8), numpy.uint64) >> numpy.uint64(61)
    except OSError:
        return False
    return len(bits) == end - first and bool(((bits == 0) | (bits == 0b101) | (bits == 1)).all())


class Releasing:
    """A file for `torch.save` to write to, which releases the memory of each large tensor after it is written."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def write(self, block: Any) -> int:
        written = self._file.write(block)
        if isinstance(block, memoryview) and block.nbytes >= _RELEASED_FROM:
            release_block(numpy.frombuffer(block, numpy.uint8).ctypes.data, block.nbytes)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def scratch_tensor(shape: Sequence[int], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """An uninitialized tensor whose memory is a nameless file in `folder`, so that it can be larger than the memory.

    A small one, or any without a folder, is in memory. The file is gone with the tensor.

    Raises `FileError` where there is no room.
    """
    size = math.prod(shape) * dtype.itemsize
    if folder is None or size < _RELEASED_FROM or not os.path.isdir("/proc/self/fd"):
        return torch.empty(shape, dtype=dtype)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # without a name from the start, where the system can
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and no signal later
            storage = torch.UntypedStorage.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, nbytes=size)
    except OSError as error:
        raise FileError(
            f"{folder}: cannot be written, and holds what is read: {error.strerror}; free some space, "
            "or have the output written elsewhere"
        ) from None
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))  # type: ignore[call-overload, no-any-return]
