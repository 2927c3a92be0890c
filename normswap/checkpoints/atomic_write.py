"""Files and folders that appear whole or not at all."""

import ctypes
import errno
import glob
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from normswap.errors import FileError, first_line, path_error
from normswap.signals import before_end, uninterrupted

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_POSIX = os.name == "posix"
_libc = ctypes.CDLL(None, use_errno=True) if _POSIX else None
_LONGEST_NAME = 255 - len("..12345678.tmp")  # bytes of a name that leave room for what a temporary one has beside it
_NO_ROOM = {
    errno.ENOSPC: "; free some space, or write to another disk",
    errno.EFBIG: "; the system limits the size of files here (ulimit -f), or the disk's format does",
    getattr(errno, "EDQUOT", -1): "; your share of the disk is used up: free some space, or write to another disk",
}
_in_progress: set[Path] = set()  # of the whole process, as signals are: what to remove if one of them ends it


# ---- what may be written ----


def check_writable(path: str | os.PathLike[str], overwrite: bool, *, folder: bool | None = None) -> Path:
    """`path` as something that can be written now.

    Args:
        path: where a file or a folder will be.
        overwrite: whether one that is there may be replaced.
        folder: whether a folder or a file will be written; None: either.

    Raises:
        FileError: `path` exists, is neither a regular file nor a folder or is of the other kind, or cannot be written.
    """
    path = Path(path)
    try:
        kind = _kind_of(path)
        if kind not in (None, stat.S_IFREG, stat.S_IFDIR):
            said = "is a pipe, a device or a socket, which is never replaced"
            raise FileError(f"{path}: {said}; give the name of a file")
        if os.path.lexists(path) and not overwrite:
            said = "is a folder that exists" if kind == stat.S_IFDIR else "exists"
            raise FileError(f"{path}: {said} already; give another name, or --overwrite (overwrite=True)")
        _check_kind(path, kind, folder)
        _check_place(path, path.resolve())  # what is written is what a link leads to; the link stays one
    except (OSError, RuntimeError, ValueError) as error:  # too long, a NUL in it, links in a circle
        raise path_error(path, error) from None
    return path


def _kind_of(path: Path) -> int | None:
    """Of what `path` leads to, as in `stat.S_IFREG`; None where nothing is there."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _check_kind(path: Path, kind: int | None, folder: bool | None) -> None:
    if folder is False and kind == stat.S_IFDIR:
        raise FileError(f"{path}: is a folder; give the name of a file")
    if folder is True and kind == stat.S_IFREG:
        raise FileError(f"{path}: is a file; give the name of a folder")
    if kind == stat.S_IFREG:
        for printed in (1, 2):
            with suppress(OSError):  # closed
                if os.path.samestat(path.stat(), os.fstat(printed)):
                    raise FileError(f"{path}: is what this command prints to; give the name of another file")


def _check_place(path: Path, target: Path) -> None:
    if not target.name:
        raise FileError(f"{path}: is the root of all folders; give a name in it")
    if not target.parent.is_dir():
        raise FileError(f"{path}: the folder {target.parent} does not exist; make it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise FileError(f"{path}: the folder {target.parent} cannot be written")


# ---- writing ----


@dataclass(frozen=True)
class Staged:
    """An output that is written in full and synced under a temporary name, beside the place where it will be."""

    path: Path
    """As the user gave it."""
    target: Path
    """What the path leads to."""
    temporary: Path
    overwrite: bool


@contextmanager
def stage_file(
    path: str | os.PathLike[str], write: Callable[[BinaryIO], object], *, overwrite: bool = False
) -> Iterator[Staged]:
    """Have `write` fill a temporary file beside `path`, which `give_names` renames; else it is gone at the end.

    What a killed run has left beside `path` is removed. Raises `FileError`.
    """
    path = check_writable(path, overwrite, folder=False)
    target = path.resolve()
    with _temporary(path, target) as temporary:
        with _reported(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield Staged(path, target, temporary, overwrite)


@contextmanager
def stage_folder(
    path: str | os.PathLike[str], write: Callable[[Path], object], *, overwrite: bool = False
) -> Iterator[Staged]:
    """`stage_file` for a folder: `write` fills a temporary one, which then takes the place of `path` as a whole."""
    path = check_writable(path, overwrite, folder=True)
    target = path.resolve()
    with _temporary(path, target, folder=True) as temporary:
        with _reported(path):
            write(temporary)
            for place, _, names in os.walk(temporary):
                for name in (*names, "."):
                    _sync(Path(place, name))
        yield Staged(path, target, temporary, overwrite)


def give_names(outputs: Sequence[Staged]) -> None:
    """Rename every output to what it will be called: all of them, or none.

    An old file or folder goes as the new one comes. Without `overwrite`, one that has appeared meanwhile stays. Raises
    `FileError`.
    """
    with uninterrupted(), ExitStack() as undo:
        for output in outputs:
            with _reported(output.path):
                undo.callback(_give_name(output))
        for output in outputs:
            with _reported(output.path):
                _sync(output.target.parent)
        undo.pop_all()


def _give_name(output: Staged) -> Callable[[], object]:
    """Rename one output, and give what takes that back."""
    source, target = output.temporary, output.target
    while True:
        try:
            if output.overwrite and target.exists():
                check_writable(output.path, True, folder=source.is_dir())  # it may have come just now
                _exchange(source, target)
                return partial(_exchange, source, target)
            if source.is_dir():
                os.rename(source, target)  # fails on a folder that holds something
                return partial(os.rename, target, source)
            _rename_new(source, target)
            return partial(os.unlink, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not output.overwrite:
                raise FileExistsError(target) from None


def write_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object], *, overwrite: bool = False) -> Path:
    """Have `write` fill a file that appears at `path` whole or not at all. Raises `FileError`."""
    with stage_file(path, write, overwrite=overwrite) as staged:
        give_names([staged])
    return staged.path


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise FileError(f"{path}: appeared while it was being written; give another name, or --overwrite") from None
    except (OSError, RuntimeError, ValueError) as error:
        cause = next((e for e in _causes(error) if isinstance(e, OSError)), error)  # torch hides a full disk
        said = getattr(cause, "strerror", None) or first_line(cause)
        raise FileError(f"{path}: cannot be written: {said}{_NO_ROOM.get(getattr(cause, 'errno', 0), '')}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it, as far as Python knows."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


# ---- temporary files ----


def _remove_temporaries() -> None:
    """Remove all that this process is writing: for a process that ends at once."""
    for temporary in list(_in_progress):
        _remove(temporary)


before_end(_remove_temporaries)


@contextmanager
def _temporary(path: Path, target: Path, folder: bool = False) -> Iterator[Path]:
    """A new file or folder beside `target`, gone afterwards; while it is locked, its run lives."""
    with _reported(path), uninterrupted():
        _clean(target)
        temporary, held = _new_temporary(target, folder)
    try:
        yield temporary
    finally:
        with uninterrupted():
            _remove(temporary)
            _in_progress.discard(temporary)
            _unlock(held)


def _new_temporary(target: Path, folder: bool) -> tuple[Path, int | None]:
    while True:
        temporary = target.with_name(_temporary_name(target))
        _in_progress.add(temporary)
        try:
            if folder:
                temporary.mkdir()
            else:
                temporary.touch(exist_ok=False)
            with suppress(FileNotFoundError):
                held = _lock(temporary)
                if temporary.exists():
                    return temporary, held
                _unlock(held)  # another run took it for a dead one's before it was locked
        except BaseException:
            _in_progress.discard(temporary)
            raise
        _in_progress.discard(temporary)


def _temporary_name(target: Path) -> str:
    return f".{_short_name(target)}.{secrets.token_hex(4)}.tmp"


def _short_name(target: Path) -> str:
    """The name, without its end where a temporary one would be too long."""
    name = target.name
    while len(os.fsencode(name)) > _LONGEST_NAME:
        name = name[:-1]
    return name


def _clean(target: Path) -> None:
    """Remove what killed runs left beside `target`: whatever no living run holds locked."""
    for temporary in target.parent.glob(f".{glob.escape(_short_name(target))}.????????.tmp"):
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
        if path.is_dir() and not path.is_symlink():
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
    """Swap two files or two folders in one step, where the system can; the old one is then at `source`."""
    old, new = os.fsencode(source), os.fsencode(target)
    exchange = getattr(_libc, "renameat2", None)
    if exchange is not None and exchange(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_EXCHANGE) == 0:
        return
    aside = source.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        os.link(target, aside)  # so a file is there at any time
    except OSError:  # a folder, or a file system without hard links
        os.rename(target, aside)
    os.replace(source, target)
    os.replace(aside, source)


def _sync(path: Path) -> None:
    if not _POSIX and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
