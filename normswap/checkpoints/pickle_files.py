"""Files that `torch.save` wrote, read without running their code."""

import io
import os
import pickle
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from normswap.checkpoints.allowed_calls import Row, row_of
from normswap.checkpoints.allowed_classes import class_behind, find_row, parse_allowance, refusal
from normswap.checkpoints.file_kinds import check_kind
from normswap.checkpoints.native_path import native_path
from normswap.checkpoints.pickle_claims import Claims
from normswap.checkpoints.unpickler import UnknownName, Unpickler, names_in
from normswap.errors import FileError, UnsafeFileError, first_line

_Untyped: Any = torch.UntypedStorage


def read_pickle(path: Path, *, trust: bool = False, allow: Iterable[str | type] = ()) -> Any:
    """The object in a file that `torch.save` wrote, its tensors on the CPU and mapped from the file.

    Only classes of torch, torchvision, timm and normswap are loaded, plain data, and what `allow` names, see
    `allowed_classes`; `trust` runs whatever code the pickle names.

    Raises:
        FileError: no such file, another kind of file, or a broken one.
        UnsafeFileError: a class that is not allowed; the message says how to allow it.
    """
    entries = check_kind(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols and typed storages: nothing that a user can mend
        return _trusted(path, entries is not None) if trust else _read_safely(path, entries, allow)


def _trusted(path: Path, zipped: bool) -> Any:
    try:
        with native_path(path) as name:
            return torch.load(name, map_location="cpu", weights_only=False, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        raise FileError(f"{path}: is damaged ({first_line(error)})") from None
    except (AttributeError, ImportError) as error:
        raise FileError(
            f"{path}: needs code that is not here ({first_line(error)}); make that module importable, "
            "or save the model from a module instead of a script"
        ) from None
    except Exception as error:  # whatever a broken archive raises inside torch
        raise FileError(f"{path}: is damaged or incomplete ({first_line(error)})") from None


def _read_safely(path: Path, entries: Sequence[zipfile.ZipInfo] | None, allow: Iterable[str | type]) -> Any:
    allowance = parse_allowance(allow, path)
    rows = partial(find_row, allowance=allowance, path=path)
    try:
        return _read_old_file(path, rows) if entries is None else _read_archive(path, entries, rows)
    except UnknownName as error:
        unknown = {class_behind(str(error))}
        unknown |= set() if entries is None else _unknown_names(path, entries, rows)
        raise refusal(sorted(unknown), allowance, path) from None
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path}: {error}") from None
    except FileError as error:
        told = str(error)
        raise error if told.startswith(f"{path}: ") else FileError(f"{path}: is damaged, or misleads: {told}") from None
    except Exception as error:  # whatever a broken pickle or archive raises
        raise FileError(f"{path}: is damaged, or cannot be read safely ({first_line(error)})") from None


def _unknown_names(path: Path, entries: Sequence[zipfile.ZipInfo], rows: Callable[[str], Row | None]) -> set[str]:
    """What a pickle names and no row has, so that a message names all at once."""
    with path.open("rb") as file:
        names = names_in(_content(_places_of(entries, file), "data.pkl", file))
    found = set()
    for name in names:
        with suppress(FileError):  # what cannot be imported is told when the others are allowed
            found |= {class_behind(name)} if rows(name) is None else set()
    return found


def _read_archive(path: Path, entries: Sequence[zipfile.ZipInfo], rows: Callable[[str], Row | None]) -> Any:
    """The object in a zip archive; its storages are mapped from there."""
    size = path.stat().st_size
    with path.open("rb") as file:
        places = _places_of(entries, file)
        data = _content(places, "data.pkl", file)
        swapped = _content(places, "byteorder", file) == (b"big" if sys.byteorder == "little" else b"little")
    with native_path(path) as name:
        mapped = torch.UntypedStorage.from_file(name, shared=False, nbytes=size)
    storages: dict[str, Any] = {}

    def load_storage(pid: Any) -> Any:
        dtype, key, number = _parsed_storage(pid)
        if key not in storages:
            if f"data/{key}" not in places:
                raise FileError(f"its storage {key} is missing")
            start, length = places[f"data/{key}"]
            if number * dtype.itemsize > length:
                raise FileError(f"its storage {key} claims {number:,} numbers, more than the file holds")
            block = mapped[start : start + length]
            if block.data_ptr() % dtype.itemsize:
                block = block.clone()
            if swapped:
                block.byteswap(dtype)
            storages[key] = _typed(block, dtype)
        return storages[key]

    claims = Claims(size, len(data))
    content = Unpickler(io.BytesIO(data), claims, rows, load_storage).load()
    for check in claims.checks:
        check()
    return content


def read_saved_bytes(data: bytes) -> Any:
    """The object in bytes that `torch.save` wrote, where it is plain data. Whatever is wrong with it is raised."""
    file = io.BytesIO(data)
    with zipfile.ZipFile(file) as archive:
        pickled = _content(_places_of(archive.infolist(), file), "data.pkl", file)
    return Unpickler(io.BytesIO(pickled), Claims(len(data), len(pickled)), row_of).load()


def _places_of(entries: Iterable[zipfile.ZipInfo], file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Where each entry of a zip archive begins, and how many bytes it has, by its name within the archive's folder."""
    size = file.seek(0, os.SEEK_END)
    return {entry.filename.partition("/")[2]: _place_of(entry, file, size) for entry in entries}


def _place_of(entry: zipfile.ZipInfo, file: BinaryIO, size: int) -> tuple[int, int]:
    """Where an entry begins in a file of `size`, and how many bytes it has. See PKWARE's APPNOTE.TXT, 4.3.7."""
    file.seek(entry.header_offset)
    head = file.read(30)
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))
    if head[:4] != b"PK\x03\x04" or start + entry.file_size > size:
        raise FileError(f"its entry {entry.filename} is not where its table of contents says")
    return start, entry.file_size


def _content(places: Mapping[str, tuple[int, int]], name: str, file: BinaryIO) -> bytes:
    start, length = places.get(name, (0, 0))
    file.seek(start)
    return file.read(length)


def _parsed_storage(pid: Any) -> tuple[torch.dtype, str, int]:
    """The dtype, key and number of elements of a storage in its persistent id."""
    if not isinstance(pid, tuple) or not 5 <= len(pid) <= 6 or pid[0] not in ("storage", b"storage"):
        raise FileError("it has a part that is no storage")
    kind, key, number = pid[1], pid[2], pid[4]
    dtype = torch.uint8 if kind is torch.UntypedStorage else getattr(kind, "dtype", None)
    if not isinstance(dtype, torch.dtype) or type(key) not in (str, int) or type(number) is not int or number < 0:
        raise FileError("it has a part that is no storage")
    return dtype, str(key), number


def _read_old_file(path: Path, rows: Callable[[str], Row | None]) -> Any:
    """The object in a file as torch wrote them before 1.6: pickles one after the other, then the storages."""
    size = path.stat().st_size
    storages: dict[str, Any] = {}
    views: dict[Any, Any] = {}

    def load_storage(pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[:1] == ("module",):
            raise FileError(
                f"{path}: is a whole module as torch saved it before 1.6, with source code inside; "
                "load and save it again where you trust it, or --trust (trust=True)"
            )
        dtype, key, number = _parsed_storage(pid)
        if key not in storages:
            claims.take_copy(number * dtype.itemsize)
            storages[key] = _typed(_Untyped(number * dtype.itemsize), dtype)
        view = pid[5] if len(pid) == 6 else None
        return storages[key] if view is None else _view_of(storages[key], view, views)

    with path.open("rb") as file:
        stream, claims = _Clipped(file, size), Claims(size, size)
        head = [Unpickler(stream, claims, rows).load() for _ in range(3)]
        if head[:2] != [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION]:
            raise FileError("it does not begin as files of torch.save do")
        content = Unpickler(stream, claims, rows, load_storage).load()
        keys = Unpickler(stream, claims, rows).load()
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
            raise FileError("its list of storages is not that of its tensors")
        for key in keys:
            _fill(storages[str(key)], stream)
    for check in claims.checks:
        check()
    return content


def _typed(block: torch.UntypedStorage, dtype: torch.dtype) -> Any:
    typed: Any = torch.storage.TypedStorage
    return typed(wrap_storage=block, dtype=dtype, _internal=True)


def _view_of(whole: Any, view: Any, views: dict[Any, Any]) -> Any:
    """A part of a storage that shares its memory, as torch before 0.4 knew them: its key, offset and length."""
    key, offset, length = view
    if type(key) not in (str, int) or not all(type(n) is int and n >= 0 for n in (offset, length)):
        raise FileError("it has a part of a storage that is none")
    size = whole.dtype.itemsize
    if (offset + length) * size > whole.nbytes():
        raise FileError("it has a part of a storage that reaches beyond it")
    if key not in views:
        block = whole._untyped_storage[offset * size : (offset + length) * size]
        views[key] = _typed(block, whole.dtype)
    return views[key]


def _fill(storage: Any, stream: "_Clipped") -> None:
    number = int.from_bytes(stream.read(8), "little")
    block = torch.empty(0, dtype=torch.uint8).set_(storage._untyped_storage)  # type: ignore[call-overload]
    if number * storage.dtype.itemsize != storage.nbytes() or stream.file.readinto(block.numpy()) != storage.nbytes():
        raise FileError("it is cut short, or a storage is not as large as its tensors say")


class _Clipped:
    """A file that reads no more than there is: asked for more, Python takes that much memory first."""

    def __init__(self, file: Any, size: int):
        self.file, self._size = file, size

    def read(self, size: int) -> bytes:
        return cast(bytes, self.file.read(min(size, self._size - self.file.tell())))

    def readline(self) -> bytes:
        return cast(bytes, self.file.readline())

    def seek(self, offset: int, whence: int) -> int:
        return cast(int, self.file.seek(offset, whence))
