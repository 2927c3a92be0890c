"""What is given to be converted or inspected: a checkpoint on disk, or a model that a library makes."""

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from normswap import libraries
from normswap.checkpoints import reading
from normswap.checkpoints.checkpoint import Checkpoint
from normswap.errors import FileError, ModelError, OptionError
from normswap.files import model_specs

_NEAR = 0.75  # how alike the names of files have to be, from 0 to 1, for one to be suggested


def read_input(
    path: str | os.PathLike[str],
    *,
    model: model_specs.ModelSource | None,
    key: str | None,
    weights: str | None,
    model_args: Mapping[str, Any],
    trust: bool,
    allow: Iterable[str | type],
    scratch: Path | None = None,
) -> Checkpoint:
    """The checkpoint at `path`; a model that a library makes comes as a checkpoint that holds it whole.

    The tensors of a distributed checkpoint are kept in files under `scratch`. Raises `OptionError` for options that do
    not go with what is given.
    """
    if model_specs.is_spec(str(path)):
        if model is not None or key is not None:
            raise OptionError(f"--model and --key are for files; {path} is a model itself")
        return Checkpoint(Path(str(path)), "pt", model_specs.build(str(path), weights, model_args))
    if weights is not None:
        raise OptionError(f"--weights {weights} is for a model of a library; {path} has its own")
    return reading.read_checkpoint(path, trust=trust, allow=allow, scratch=scratch)


def check_is_there(path: str | os.PathLike[str]) -> None:
    """Raise `FileError` where `path` is neither a model of a library nor on disk; it names what may have been meant."""
    text = os.fspath(path)
    if model_specs.is_spec(text) or os.path.lexists(path):
        return
    if model_specs.file_of(text) != text:
        raise FileError(f"{text}: no such file; if it makes the model, give a checkpoint, and --model {text}")
    folder, name = os.path.split(text)
    near = None if folder or ("." in name and ":" not in name) else libraries.nearest_spec(text)
    if near is None:
        with suppress(OSError, ValueError):
            found = difflib.get_close_matches(name, os.listdir(folder or "."), 1, _NEAR)
            near = os.path.join(folder, found[0]) if found else None
    hint = f"did you mean {near}?" if near else "check the name and the folder"
    raise FileError(f"{text}: no such file or folder; {hint}")


@contextmanager
def errors_name(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors about the content of a file name the file."""
    try:
        yield
    except (ModelError, FileError) as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
