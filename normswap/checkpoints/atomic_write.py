"""Files and folders that appear whole or not at all."""

import ctypes
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from normswap.errors import FileError, first_line

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_POSIX = os.name == "posix"
_libc = ctypes.CDLL(None, use_errno=True) if _POSIX else None


def check_writable(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """`path` as something that can be written now; raises `FileError` where it exists or its folder does not serve."""
    path = Path(path)
    if os.path.lexists(path) and not overwrite:
        kind = "is a folder that exists" if path.is_dir() else "exists"
        raise FileError(f"{path}: {kind} already; give another name, or --overwrite (overwrite=True)")
    folder = _resolve(path).parent
    if not folder.is_dir():
        raise FileError(f"{path}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FileError(f"{path}: the folder {folder} cannot be written")
    return path


def _resolve(path: Path) -> Path:
    try:
        return path.resolve()  # what is written is what a link leads to; the link stays one
    except (OSError, RuntimeError) as error:
        raise FileError(f"{path}: {first_line(error)}") from None


def write_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object], *, overwrite: bool = False) -> Path:
    """Have `write` fill a temporary file beside `path`, sync it, and rename it to `path`.

    A failed or killed run leaves an old file as it was; what a killed run leaves beside it is removed by the next.
    Without `overwrite` a file that has appeared meanwhile stays. Raises `FileError`.
    """
    path = check_writable(path, overwrite)
    if path.is_dir():
        raise FileError(f"{path}: is a folder; give the name of a file")
    target = _resolve(path)
    with _reported(path), _temporary(target) as temporary:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, target)
        else:
            _rename_new(temporary, target)
        _sync(target.parent)
    return path


def write_folder(path: str | os.PathLike[str], write: Callable[[Path], object], *, overwrite: bool = False) -> Path:
    """`write_file` for a folder: `write` fills a temporary one, which then takes the place of `path` as a whole."""
    path = check_writable(path, overwrite)
    if path.exists() and not path.is_dir():
        raise FileError(f"{path}: is a file; give the name of a folder")
    target = _resolve(path)
    with _reported(path), _temporary(target, folder=True) as temporary:
        write(temporary)
        for place, _, names in os.walk(temporary):
            for name in (*names, "."):
                _sync(Path(place, name))
        while True:
            try:
                if overwrite and target.exists():
                    _exchange(temporary, target)
                else:
                    os.rename(temporary, target)  # fails on a folder that holds something
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if not overwrite:
                    raise FileExistsError(target) from None
        _sync(target.parent)
    return path


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise FileError(f"{path}: appeared while it was being written; give another name, or --overwrite") from None
    except (OSError, RuntimeError, ValueError) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch hides a full disk
        raise FileError(f"{path}: cannot be written: {first_line(cause)}") from error


@contextmanager
def _temporary(target: Path, folder: bool = False) -> Iterator[Path]:
    """A new file or folder beside `target`, gone afterwards; while it is locked, its run lives."""
    _clean(target)
    while True:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        if folder:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        with suppress(FileNotFoundError):
            held = _lock(temporary)
            if temporary.exists():
                break
            _unlock(held)  # another run took it for a dead one's before it was locked
    try:
        yield temporary
    finally:
        _remove(temporary)
        _unlock(held)


def _clean(target: Path) -> None:
    """Remove what killed runs left beside `target`: whatever no living run holds locked."""
    for temporary in target.parent.glob(f".{glob.escape(target.name)}.????????.tmp"):
        with suppress(OSError):  # locked, gone, or somebody else's
            held = _lock(temporary, wait=False)
            _remove(temporary)
            _unlock(held)


def _lock(path: Path, wait: bool = True) -> int | None:
    if fcntl is None:
        if not wait:
            raise OSError("no locks here: nobody knows whether its run lives")
        return None
    held = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(held)
        if not wait:
            raise
        return None  # a file system without locks
    return held


def _unlock(held: int | None) -> None:
    if held is not None:
        os.close(held)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _rename_new(source: Path, target: Path) -> None:
    """Rename where `target` is still absent: a link fails where a rename would replace."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError(target) from None
        os.rename(source, target)


def _exchange(source: Path, target: Path) -> None:
    """Swap two folders in one step, where the system can; the old one is then at `source`."""
    old, new = os.fsencode(source), os.fsencode(target)
    exchange = getattr(_libc, "renameat2", None)
    if exchange is not None and exchange(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_EXCHANGE) == 0:
        return
    aside = source.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    os.rename(target, aside)
    os.rename(source, target)
    os.rename(aside, source)


def _sync(path: Path) -> None:
    if not _POSIX and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
