"""Paths for libraries whose own code opens them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def native_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """A name of a file that is UTF-8, as C++ and Rust want it: where its own is not, the one of an open descriptor."""
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        with open(name, "rb") as file:
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        yield name
