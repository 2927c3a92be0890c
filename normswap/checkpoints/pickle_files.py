"""Files that `torch.save` wrote, read without running their code."""

import os
import pickle
import re
import struct
import threading
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import _weights_only_unpickler, nn

from normswap.checkpoints.allowed_classes import all_number_types, class_behind, find_allowed, parse_allowance, refusal
from normswap.errors import FileError, UnsafeFileError, first_line

_REFUSED = re.compile(r"GLOBAL (\S+) (?:was not an allowed global|whose module \S+ is blocked)")
_CHECKS = ("_check_set_item_target", "_check_append_target")  # torch's own, of what a pickle fills
_HEAD, _SHOWN = 512, 40  # bytes at the beginning that tell the kind of a file; characters in a message
_ONE_AT_A_TIME = threading.Lock()  # what is allowed is so for all threads
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def read_pickle(path: Path, *, trust: bool = False, allow: Iterable[str | type] = ()) -> Any:
    """The object in a file that `torch.save` wrote, its tensors on the CPU and mapped from the file.

    Only classes of torch, torchvision, timm and normswap are loaded, plain data, and what `allow` names, see
    `allowed_classes`; `trust` runs whatever code the pickle names. See torch's notes on `weights_only`.

    Raises:
        FileError: no such file, another kind of file, or a broken one.
        UnsafeFileError: a class that is not allowed; the message says how to allow it.
    """
    zipped = check_kind(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols and typed storages: nothing that a user can mend
        return _load(path, weights_only=False, mmap=zipped) if trust else _read_safely(path, zipped, allow)


def _read_safely(path: Path, zipped: bool, allow: Iterable[str | type]) -> Any:
    allowance = parse_allowance(allow, path)
    unsafe: list[str] = []  # what the pickle names and torch does not allow by itself; the pickle is read, not run
    if zipped:
        with suppress(Exception):  # whatever is wrong with the file, reading it says better
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    found = {name: find_allowed(name, allowance, path) for name in unsafe}
    refused = {class_behind(name) for name, value in found.items() if value is None}
    if refused:
        raise refusal(sorted(refused), allowance, path)
    allowed = {**allowance.classes, **found}
    if "numpy.dtype" in allowed:
        allowed |= all_number_types()
    while True:  # one class more a round: what the first look did not find, and torch's older format
        try:
            safe = torch.serialization.safe_globals([(f, name) for name, f in allowed.items()])
            with _ONE_AT_A_TIME, _no_constructors(), _collections_filled(list(allowed.values())), safe:
                return _load(path, weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            match = _REFUSED.search(str(error))
            if match is None and "Only persistent_load of storage" in str(error):
                raise FileError(
                    f"{path}: is a whole module as torch saved it before 1.6, with source code inside; "
                    "load and save it again where you trust it, or --trust (trust=True)"
                ) from None
            if match is None:
                reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
                raise FileError(f"{path}: is damaged, or cannot be read safely ({reason[:200]})") from None
            name = match[1] if "." in match[1] else f"builtins.{match[1]}"  # torch leaves that package's name out
            if name in allowed:
                raise UnsafeFileError(f"{path}: holds {name}, which torch loads only with --trust") from None
            allowed[name] = find_allowed(name, allowance, path)
            if allowed[name] is None:
                raise refusal([class_behind(name)], allowance, path) from None


@contextmanager
def _no_constructors() -> Iterator[None]:
    """No module is made anew meanwhile: a pickle of one restores its parts, while a constructor may take memory, or a
    file from anywhere. Other threads make modules as ever.
    """
    real, loading = nn.Module.__init__, threading.get_ident()

    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() == loading:
            raise UnsafeFileError(f"it calls {type(self).__name__}(...), where a module is only restored")
        real(self, *args, **kwargs)

    nn.Module.__init__ = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__init__ = real  # type: ignore[method-assign]


@contextmanager
def _collections_filled(allowed: Sequence[Any]) -> Iterator[None]:
    """A pickle may put items into what is like a dict or a list and of an `allowed` class meanwhile.

    Newer versions of torch fill their own kinds of dicts and lists alone, so that an allowed one comes out as damaged.
    """
    reader = _weights_only_unpickler.Unpickler
    checks = {name: vars(reader)[name] for name in _CHECKS if name in vars(reader)}

    def check_or_fill(check: Callable[..., None]) -> Callable[..., None]:
        def replaced(self: Any, *args: Any) -> None:
            target = self.stack[-1]
            if not isinstance(target, dict | list | deque) or type(target) not in allowed:
                check(self, *args)

        return replaced

    for name, check in checks.items():
        setattr(reader, name, check_or_fill(check))
    try:
        yield
    finally:
        for name, check in checks.items():
            setattr(reader, name, check)


def _load(path: Path, *, weights_only: bool, mmap: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mmap or None)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path}: is not what torch.save makes of a model: {error}") from None
    except pickle.UnpicklingError as error:
        if weights_only:
            raise
        raise FileError(f"{path}: is damaged ({first_line(error)})") from None
    except (AttributeError, ImportError) as error:
        if weights_only:
            raise FileError(f"{path}: is damaged ({first_line(error)})") from None
        raise FileError(
            f"{path}: needs code that is not here ({first_line(error)}); make that module importable, "
            "or save the model from a module instead of a script"
        ) from None
    except Exception as error:  # whatever a broken archive raises inside torch
        raise FileError(f"{path}: is damaged or incomplete ({first_line(error)})") from None


def check_kind(path: Path) -> bool:
    """Whether the file is a zip archive of `torch.save`; raises for every other kind but torch's older one."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    zipped, problem = head.startswith(b"PK\x03\x04"), ""
    if not head:
        problem = "is empty"
    elif zipped:
        problem = _archive_problem(path)
    elif path.suffix == ".onnx":
        problem = "is an ONNX file, whose layers are compiled; convert the torch model that it was exported from"
    elif not head.startswith(_PICKLES):
        problem = text_problem(head) or "is of another kind, not one that torch.save wrote"
    if problem:
        raise FileError(f"{path}: {problem}")
    return zipped


def text_problem(head: bytes) -> str:
    """What a text file that begins with `head` is instead of a model, and what to do; "" where it is no text."""
    try:
        text = head.decode() if len(head) < _HEAD else head[:-4].decode()
    except UnicodeDecodeError:
        return ""
    if "\x00" in text:
        return ""
    start = text.lstrip("\ufeff \t\r\n").lower()
    if start.startswith("version https://git-lfs."):
        return "is a pointer of git-lfs, which stands for the file: fetch that with git lfs pull, or download it anew"
    if start.startswith(("<!doctype html", "<html", "<?xml", "<error")):
        return "is a web page or a server's answer, not the model: open its address in a browser, and download it anew"
    if start.startswith(("{", "[")):
        return "is a text file of JSON, such as a configuration; give the file with the weights"
    return f"is a text file, not one that torch.save wrote; it begins with {text.strip()[:_SHOWN]!r}"


def _archive_problem(path: Path) -> str:
    """Why a zip archive is none that can be read; empty where all is well.

    torch.save packs nothing and writes each name once: an archive that does otherwise is made to mislead.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries, table = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, UnicodeDecodeError, OverflowError):
        return "is truncated or damaged: its table of contents cannot be read; copy or save it again"
    names = {entry.filename.partition("/")[2] for entry in entries}
    marks = ("serialized_exported_program.json", "models/model.json")
    exported = any(entry.filename.endswith(marks) for entry in entries)
    problem = ""
    if "constants.pkl" in names:
        problem = "is a TorchScript archive, whose code is compiled; convert the model that it was made from"
    elif exported or ("archive_format" in names and "data.pkl" not in names):
        problem = "is an exported program; convert the model that it was exported from"
    elif "data.pkl" not in names:
        problem = "is a zip archive, but not one that torch.save wrote"
    elif len({entry.filename for entry in entries}) < len(entries):
        problem = "is a zip archive that holds two entries of one name"
    elif any(".." in entry.filename.split("/") or entry.filename.startswith("/") for entry in entries):
        problem = "is a zip archive that names a file outside itself"
    elif any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        problem = "is a zip archive that is compressed, which torch.save never does; unpack it and save it again"
    elif sum(entry.file_size for entry in entries) > path.stat().st_size:
        problem = "is a zip archive that claims more than it holds"
    elif table != _table_of_contents(path):
        problem = "is a zip archive with two tables of contents, or with something before or after it"
    return problem


def _table_of_contents(path: Path) -> int:
    """Where a zip archive without a comment says that its table of contents begins; torch reads it there.

    See PKWARE's APPNOTE.TXT, 4.3.14 to 4.3.16. Archives of 4 GB and more say so in a record of their own.
    """
    with path.open("rb") as file:
        file.seek(-min(98, path.stat().st_size), os.SEEK_END)
        end = file.read()
    signature, *_, offset, comment = struct.unpack("<4s4H2LH", end[-22:])
    if signature != b"PK\x05\x06" or comment:
        return -1
    if offset == 0xFFFFFFFF and end[-98:-94] == b"PK\x06\x06":
        return int(struct.unpack("<Q", end[-50:-42])[0])
    return int(offset)
