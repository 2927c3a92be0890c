"""Files that must stay as they are while they are read: one that another program changes is an error.

Files are mapped. The system ends a process that reads what a mapped file no longer holds, with SIGBUS; here, on Linux,
it reads zeros instead, and the error comes before anything is done with them.
"""

import ctypes
import mmap
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from normswap.errors import FileError

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_SA_SIGINFO, _MAP_FIXED = 4, 0x10
_ADDRESS_IN_SIGINFO = 16  # bytes, where pointers have 8; see sigaction(2)
_KNOWN = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
_libc = ctypes.CDLL(None, use_errno=True) if _KNOWN else None
_put: list[tuple[int, int]] = []  # addresses where zeros were put; of the whole process, as signals are


class _Action(ctypes.Structure):
    """`struct sigaction` of Linux's C libraries."""

    _fields_ = (
        ("handler", _HANDLER),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


@contextmanager
def steady_files(*paths: object) -> Iterator[Callable[[], None]]:
    """Give a function that raises `FileError` where a file has changed since; an error in the block has it called too.

    Args:
        paths: files, and folders whose files count; what is no path, or not there, does not.
    """
    before = {Path(path): _states(Path(path)) for path in paths if isinstance(path, str | os.PathLike)}

    def check() -> None:
        for path, states in before.items():
            now = _states(path)  # a file with another inode has taken the old one's name, and not its content
            if any(now.get(file, state) != state for file, state in states.items()):
                raise FileError(f"{path}: was changed by another program while it was read; run again when it is whole")

    with ExitStack() as held, _zeros_for_lost_pages():
        for path in before:  # open, a file keeps its inode: none that takes its name gets that
            with suppress(OSError, ValueError):
                held.enter_context(path.open("rb") if path.is_file() else nullcontext())
        try:
            yield check
        except (Exception, SystemExit):
            check()  # whatever came of it
            raise


def _states(path: Path) -> dict[tuple[int, int], tuple[int, int]]:
    """Size and time of the last change of a file, or of each in a folder, by device and inode."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    with suppress(OSError, ValueError):
        for file in path.iterdir() if path.is_dir() else [path]:
            with suppress(OSError):
                about = file.stat()
                found[about.st_dev, about.st_ino] = (about.st_size, about.st_mtime_ns)
    return found


@contextmanager
def _zeros_for_lost_pages() -> Iterator[None]:
    """Meanwhile SIGBUS on a page that a mapped file has lost puts zeros there, and the reading goes on."""
    if _libc is None:
        yield
        return
    new, old = _Action(handler=_put_zeros, flags=_SA_SIGINFO), _Action()
    _libc.sigaction(signal.SIGBUS, ctypes.byref(new), ctypes.byref(old))
    try:
        yield
    finally:
        _libc.sigaction(signal.SIGBUS, ctypes.byref(old), None)
        _put.clear()


# Python in a signal handler is safe here as nowhere else: the signal comes at the very instruction that reads the page,
# which is a loop over numbers in torch or numpy and never the interpreter's own work or a memory allocator's.
def _on_lost_page(number: int, info: Any, context: Any) -> None:
    assert _libc is not None
    try:
        address = ctypes.c_size_t.from_address(info + _ADDRESS_IN_SIGINFO).value
        first = address - address % mmap.PAGESIZE
        if any(start <= address < end for start, end in _put):
            return  # by another thread, meanwhile
        length = _end_of_data(address) - first
        protection, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        where = ctypes.c_void_p(first), ctypes.c_size_t(length)
        if length > 0 and _libc.mmap(*where, protection, kind, -1, ctypes.c_long(0)) != -1:
            _put.append((first, first + length))
            return
    except BaseException:  # a handler has no caller
        pass
    _libc.signal(number, None)  # of another kind: the instruction runs again, and the process ends as ever


_put_zeros = _HANDLER(_on_lost_page)


def _end_of_data(address: int) -> int:
    """Where the mapping of a file of data ends that has this address; 0: it is none."""
    with open("/proc/self/maps", "rb") as lines:
        for line in lines:
            area, rights, _, _, inode, *_ = line.split()
            start, end = (int(part, 16) for part in area.split(b"-"))
            if start <= address < end:
                return end if inode != b"0" and b"x" not in rights else 0
    return 0
