"""Where a converted model goes and in which format, and that no output is in the way of another path."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path

from normswap.checkpoints import reading
from normswap.checkpoints.checkpoint import INDEX_ENDING
from normswap.errors import FileError, OptionError, path_error
from normswap.files import model_specs


def default_output(path: str | os.PathLike[str], suffix: str, format: str | None = None) -> Path:
    """`model.gn-ws.pt` beside `model.pt`; for a folder, or an index in one, `folder.gn-ws` beside that.

    For a model of a library, `resnet50.gn-ws.pt` in the folder where the command runs. The ending is that of `format`,
    or the input's.
    """
    endings = {"pt": ".pt", "safetensors": ".safetensors"}
    path = Path(f"{model_specs.short_name(str(path))}.pt" if model_specs.is_spec(str(path)) else path)
    if path.name.endswith(INDEX_ENDING) or os.path.isdir(path):
        folder = path.parent if path.name.endswith(INDEX_ENDING) else path
        if folder.name in ("", ".", ".."):
            folder = folder.resolve()
        if not folder.name:
            raise FileError(f"{path}: is the root of all folders; give the folder or the file of the checkpoint")
        return folder.with_name(f"{folder.name}.{suffix}{endings.get(format or '', '')}")
    own = path.suffix or ".pt"
    as_pt = ".pt" if own == ".safetensors" else own  # `.bin` and `.pth` are files of torch.save too, and stay
    endings |= {"pt": as_pt, "dcp": ""}
    return path.with_name(f"{path.stem}.{suffix}{endings.get(format or '', own)}")


def output_and_format(
    out: str | os.PathLike[str] | None, source: str | os.PathLike[str], suffix: str, format: str | None
) -> tuple[Path, str | None]:
    """Where a converted model goes, and in which format: that of the input where it is None and no ending tells."""
    place = output_of(out, source, suffix, format)
    return place, format or format_by_ending(place)


def output_of(
    out: str | os.PathLike[str] | None, source: str | os.PathLike[str], suffix: str, format: str | None = None
) -> Path:
    """Where a converted model goes: `out`; by default, and where `out` is a folder to write into, `default_output`.

    A folder is written into where its name ends in a slash, or where it exists and the output is one file; it is not
    where it holds a distributed checkpoint, which may only be replaced as a whole.
    """
    default = default_output(source, suffix, format)
    if out is None:
        return default
    text, folder_is_read = os.fspath(out), os.path.isdir(source) or str(source).endswith(INDEX_ENDING)
    is_one_file = not folder_is_read if format is None else format != "dcp"
    into = text.endswith(("/", os.sep)) or (is_one_file and os.path.isdir(text))
    return Path(text, default.name) if into and not reading.is_distributed(Path(text)) else Path(text)


@contextmanager
def folder_made(out: str | os.PathLike[str] | None) -> Iterator[None]:
    """The folder that `out` names with a slash at its end is made where it is missing, and goes if it stays empty."""
    missing = out is not None and os.fspath(out).endswith(("/", os.sep)) and not os.path.lexists(out)
    if missing:
        try:
            os.mkdir(out)  # type: ignore[arg-type]
        except (OSError, ValueError) as error:
            raise path_error(out, error) from None  # type: ignore[arg-type]
    try:
        yield
    finally:
        if missing:
            with suppress(OSError):
                os.rmdir(out)  # type: ignore[arg-type]


def format_by_ending(out: Path) -> str | None:
    """The format that the name of the output tells; None where that of the input stays."""
    return "safetensors" if out.suffix == ".safetensors" else None


def check_apart(out: Path | None, reports: Sequence[Path], inputs: Iterable[object]) -> None:
    """Raise `OptionError` where two outputs are one file or one lies in the other, or an output is a file that is read.

    Links and other spellings of a path do not matter. The model alone may take the place of the first input.

    Args:
        out: where the model goes; None: nowhere.
        reports: where reports go.
        inputs: the checkpoint first, then what else is read; what is no path does not count.
    """
    outputs = [*([] if out is None else [out]), *reports]
    for a, b in combinations(outputs, 2):
        if _is_same(a, b) or _is_in(a, b) or _is_in(b, a):
            raise OptionError(
                f"{a} and {b}: two outputs cannot be the same file, nor one in the other; give other names"
            )
    for number, source in enumerate(inputs):
        if not isinstance(source, str | os.PathLike) or model_specs.is_spec(str(source)):
            continue
        path = Path(model_specs.file_of(str(source)))
        for output in outputs if number else reports:
            if _is_same(output, path) or (os.path.lexists(output) and _is_in(output, path)):
                raise OptionError(f"{output}: is read too, as {source}; give another name for what is written")


def _is_same(a: Path, b: Path) -> bool:
    with suppress(OSError, ValueError):  # one of them is not there yet
        return a.samefile(b)
    return _real(a) == _real(b)


def _is_in(a: Path, b: Path) -> bool:
    return _real(b) in _real(a).parents


def _real(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):  # it cannot be opened either, which says more
        return path.absolute()
