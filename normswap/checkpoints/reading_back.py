"""What was written, opened again before it replaces anything: whole, and under the names that were to be in it."""

import json
import pickle
import pickletools
import zipfile
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import safe_open
from torch import nn

from normswap.checkpoints.native_path import native_path
from normswap.errors import FileError, first_line

_MODULE_PARTS = ("_parameters", "_buffers", "_modules")


class _Inert:
    """Stands for everything in a pickle but dicts and texts: it takes whatever it is given, and runs no code."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> "_Inert":
        return self

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update((name, value) for name, value in state.items() if name in _MODULE_PARTS)

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _Inert

    def persistent_load(self, pid: Any) -> Any:
        return _Inert()


@contextmanager
def readable_again(out: Path) -> Iterator[None]:
    """Whatever the checks below raise as a `FileError` about `out`, which then stays as it was."""
    try:
        yield
    except Exception as error:  # of the libraries and of Python, about whatever was not to be expected
        raise FileError(
            f"{out}: what was written cannot be read again ({first_line(error)}), so nothing was replaced; "
            "write another format, with --format, and report this"
        ) from error


def check_pickle(path: Path, content: Any) -> None:
    """Raise unless a file of `torch.save` is whole and has the names of `content` in its dicts and modules."""
    with zipfile.ZipFile(path) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith("/data.pkl"))
        with archive.open(name) as stream:
            found = _names_in(stream)
    _compare(content, found)


def _names_in(stream: IO[bytes]) -> Any:
    """Dicts, texts and stand-ins as a pickle has them; nothing where an object's class is itself made by a call."""
    try:
        return _InertUnpickler(stream).load()
    except pickle.UnpicklingError:
        stream.seek(0)
        deque(pickletools.genops(stream), maxlen=0)  # raises unless it is whole
        return None


def _compare(content: Any, found: Any) -> None:
    """Compare the names in what was to be written with those in what was read, at every depth, each object once."""
    pending, done = [(content, found)], set()
    while pending:
        wanted, there = pending.pop()
        if id(wanted) in done:
            continue
        done.add(id(wanted))
        if isinstance(wanted, nn.Module) and isinstance(there, _Inert):
            # A class may pickle itself in its own way: then there are none.
            parts = [name for name in _MODULE_PARTS if name in vars(there) and name in vars(wanted)]
            pending += [(vars(wanted)[name], vars(there)[name]) for name in parts]
        elif isinstance(wanted, Mapping) and isinstance(there, Mapping):
            check_names(_texts(wanted), _texts(there))
            pending += [(value, there[name]) for name, value in wanted.items() if isinstance(name, str)]


def _texts(names: Iterable[Any]) -> list[str]:
    return [name for name in names if isinstance(name, str)]


def check_safetensors(path: Path, names: Iterable[str], metadata: Mapping[str, str]) -> None:
    """Raise unless the library that others use opens the file, and finds the tensors and the metadata."""
    with native_path(path) as name, safe_open(name, framework="pt") as opened:
        check_names(names, opened.keys())
        check_names(metadata, opened.metadata() or {})


def check_index(path: Path, weight_map: Iterable[str]) -> None:
    """Raise unless an index of weight files names all keys: two halves of a character become one in JSON."""
    check_names(weight_map, json.loads(path.read_text())["weight_map"])


def check_names(wanted: Iterable[str], there: Iterable[str]) -> None:
    """Raise `KeyError` for a name that is on one side alone."""
    if differ := set(wanted) ^ set(there):
        raise KeyError(min(differ))
