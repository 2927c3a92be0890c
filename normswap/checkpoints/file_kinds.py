"""What kind a file is by its first bytes, or by its table of contents, and what to do with one of another kind."""

import os
import struct
import zipfile
from pathlib import Path

from normswap.errors import FileError

HEAD = 512
"""Bytes at the beginning that tell the kind of a file."""
_SHOWN = 40  # characters in a message
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def check_kind(path: Path) -> list[zipfile.ZipInfo] | None:
    """The entries of a zip archive of `torch.save`; None for torch's older kind. Raises `FileError` for every other."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    entries, problem = None, ""
    if not head:
        problem = "is empty; copy or save it again"
    elif head.startswith(b"PK\x03\x04"):
        entries, problem = _archive(path)
    elif path.suffix == ".onnx":
        problem = "is an ONNX file, whose layers are compiled; convert the torch model that it was exported from"
    elif not head.startswith(_PICKLES):
        problem = text_problem(head) or "is of another kind, not one that torch.save wrote"
    if problem:
        raise FileError(f"{path}: {problem}")
    return entries


def text_problem(head: bytes) -> str:
    """What a text file that begins with `head` is instead of a model, and what to do; "" where it is no text."""
    try:
        text = head.decode() if len(head) < HEAD else head[:-4].decode()
    except UnicodeDecodeError:
        return ""
    if "\x00" in text:
        return ""
    start = text.lstrip("\ufeff \t\r\n").lower()
    if start.startswith("version https://git-lfs."):
        return "is a pointer of git-lfs, which stands for the file: fetch that with git lfs pull, or download it again"
    if start.startswith(("<!doctype html", "<html", "<?xml", "<error")):
        return "is a web page or a server's answer, not the model: open its address in a browser, and download it again"
    if start.startswith(("{", "[")):
        return "is a text file of JSON, such as a configuration; give the file with the weights"
    return f"is a text file that begins with {text.strip()[:_SHOWN]!r}; give the file with the weights"


def _archive(path: Path) -> tuple[list[zipfile.ZipInfo], str]:
    """The entries of a zip archive, and why it is none that can be read; empty where all is well.

    torch.save packs nothing and writes each name once: an archive that does otherwise is made to mislead.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries, table = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, UnicodeDecodeError, OverflowError):
        return [], "is truncated or damaged: its table of contents cannot be read; copy or save it again"
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
    return entries, problem


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
