"""safetensors files: tensors by name, mapped from the file, and written one after the other.

The format is one header of JSON and the tensors' bytes: https://huggingface.co/docs/safetensors. The library reads and
checks the header; the bytes are mapped and written here, so that a file need not fit into memory.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from normswap.checkpoints.mapped_memory import release
from normswap.checkpoints.module_graph import MOST_TENSORS
from normswap.checkpoints.native_path import native_path
from normswap.errors import FileError, first_line

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_LARGEST_HEADER = 100_000_000  # bytes, as in the library
_LEAST_ENTRY = 48  # bytes that the header has for a tensor, at least


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins with `head` is one of safetensors: the length of the header, then JSON."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER


def can_be_named(name: Any) -> bool:
    """Whether a tensor can have the name: the header is valid Unicode, and has one key for itself."""
    return isinstance(name, str) and name != _METADATA and name == name.encode(errors="ignore").decode()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, mapped from it, and its metadata. Raises `FileError` for a broken file."""
    # `safe_open` maps tensors as well, in the same memory and twice the time (1.5 s, not 0.8 s, for 20,000 small ones).
    # It is not used for them: it gives names in alphabetical order and not in the file's, tensors that are not aligned,
    # and shapes beyond all bounds where one number is 0.
    size = path.stat().st_size
    _check_count(path)
    try:
        with (
            native_path(path) as name,
            safe_open(name, framework="pt") as checked,
        ):  # the library checks offsets, shapes and sizes
            metadata = dict(checked.metadata() or {})
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise FileError(f"{path}: is a broken safetensors file ({first_line(error)})") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop(_METADATA, None)
    with native_path(path) as name:
        mapped = torch.UntypedStorage.from_file(name, shared=False, nbytes=size)
    tensors = {}
    for name, entry in header.items():
        kind, (start, end) = entry["dtype"], entry["data_offsets"]
        if kind not in _DTYPES:
            raise FileError(f"{path}: {name} has the dtype {kind}, which torch {torch.__version__} cannot hold")
        dtype = _DTYPES[kind]
        block = mapped[8 + length + start : 8 + length + end]
        if block.data_ptr() % dtype.itemsize:
            block = block.clone()
        try:
            tensors[name] = torch.empty(0, dtype=dtype).set_(block, 0, entry["shape"])  # type: ignore[call-overload]
        except (RuntimeError, TypeError) as error:  # a shape of which one number is 0 and another beyond all bounds
            raise FileError(f"{path}: {name} has an impossible shape ({first_line(error)})") from None
    return tensors, metadata


def _check_count(path: Path) -> None:
    """Raise `FileError` for too many tensors, before the library or anybody makes an object of each."""
    entries = 0

    def count(pairs: object) -> None:
        nonlocal entries
        entries += 1
        if entries > MOST_TENSORS + 2:  # and the header itself, and its metadata
            raise OverflowError

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length <= MOST_TENSORS * _LEAST_ENTRY:
            return
        header = file.read(length)
    try:
        json.loads(header, object_pairs_hook=count)
    except OverflowError:
        raise FileError(f"{path}: holds more than {MOST_TENSORS:,} tensors, the most that is read") from None
    except (ValueError, RecursionError):
        return  # the library says better what is wrong


def write_safetensors(tensors: Mapping[str, Tensor], file: BinaryIO, metadata: Mapping[str, str], mapped: bool) -> None:
    """Write tensors by name, largest dtype first as the library does; with `mapped`, each is released after it.

    Tensors that share memory are written apart, since the format knows no sharing.
    """
    header: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in order:
        tensor = tensors[name]
        dtype, layout = tensor.dtype, tensor.layout
        if dtype not in _NAMES or layout is not torch.strided:
            raise FileError(f"{name} is {dtype}, {layout}, which safetensors cannot hold; write a .pt file")
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        plain = tensors[name].detach().cpu().contiguous()
        file.write(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
        if mapped:
            release(plain)
