"""What is given to be converted or inspected: a checkpoint on disk, or a model that a library makes."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from normswap.checkpoints import reading
from normswap.checkpoints.checkpoint import Checkpoint
from normswap.errors import FileError, ModelError, OptionError
from normswap.files import model_specs


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


@contextmanager
def errors_name(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors about the content of a file name the file."""
    try:
        yield
    except (ModelError, FileError) as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
