"""Values of options from their text; `OptionError` says which option is wrong and what to write."""

import sys
from collections.abc import Callable
from typing import TypeVar

from normswap.errors import OptionError

Number = TypeVar("Number", int, float)


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """The shape that `--input-shape` names: `1,3,224,224` or `1x3x224x224`."""
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise OptionError(
            f"--input-shape: {text!r} is not a shape; write whole numbers with commas, such as 1,3,224,224"
        )
    return shape


def parse_numbers(option: str, text: str | None, kind: Callable[[str], Number]) -> list[Number] | None:
    """Numbers with commas between them, as `--mean` takes them."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(
            f"{option}: {text!r} is not possible; write numbers with commas, such as 0.5,0.5,0.5"
        ) from None


def parse_size(text: str | None) -> int | list[int] | None:
    """The size that `--input-size` names: one number, or height and width."""
    size = parse_numbers("--input-size", text, int)
    return size[0] if size is not None and len(size) == 1 else size


def allowed_classes(names: list[str] | None, trust: bool) -> list[str]:
    """The classes of `--allow`; they, and those of `--trust`, may stand in the folder where the command runs.

    So that is made importable.
    """
    if (names or trust) and "" not in sys.path:
        sys.path.insert(0, "")
    return names or []
