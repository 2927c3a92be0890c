"""Many module paths as a few patterns."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
ROOT = "(root)"
DEEPEST = 100  # levels of a tree: a name in a file can have any number of dots
NUMBER = r"(?<![0-9])(?:0|[1-9][0-9]{0,8})(?![0-9])"
"""A number as people write it: neither 007 nor one of a thousand digits."""
MOST_PATTERNS = 3  # that a summary names


def fold_paths(paths: Iterable[str]) -> list[tuple[str, int]]:
    """Module paths as patterns, each with the number of paths it stands for.

    Paths that differ in numbers alone fall together: `layer1.0.bn1` to `layer4.2.bn3` are
    `layer[1-4].*.bn[1-3]`. A pattern sums up; it may cover paths that were not given.
    """
    return [(pattern, len(members)) for pattern, members in fold_items(paths, lambda path: path)]


def fold_items(items: Iterable[Item], path_of: Callable[[Item], str]) -> list[tuple[str, list[Item]]]:
    """Items by the patterns of their paths; see `fold_paths`."""
    shapes: dict[tuple[tuple[str, bool], ...], list[tuple[list[int | None], Item]]] = defaultdict(list)
    for item in items:
        parts = [stem_and_number(part) for part in path_of(item).split(".")]
        shape = tuple((stem, number is not None) for stem, number in parts)
        shapes[shape].append(([number for _, number in parts], item))
    folded = []
    for stems, rows in shapes.items():
        columns = zip(*(numbers for numbers, _ in rows), strict=True)
        written = (_segment(stem, column) for (stem, _), column in zip(stems, columns, strict=True))
        folded.append((".".join(written) or ROOT, [item for _, item in rows]))
    return folded


def stem_and_number(name: str) -> tuple[str, int | None]:
    """A name, and the number that it ends in as people write them: `layer` and 1 of `layer1`; 007 is none."""
    found = re.search(rf"{NUMBER}\Z", name)
    return (name, None) if found is None else (name[: found.start()], int(found[0]))


def _segment(stem: str, numbers: Iterable[int | None]) -> str:
    found = sorted({number for number in numbers if number is not None})
    if len(found) < 2:
        return f"{stem}{''.join(map(str, found))}"
    return f"{stem}[{ranges(found)}]" if stem else "*"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in short: `1-4` where they follow one another, else `1,3,7`."""
    found = sorted(set(numbers))
    if len(found) > 1 and found[-1] - found[0] == len(found) - 1:
        return f"{found[0]}-{found[-1]}"
    return ",".join(map(str, found))


def span(numbers: Iterable[int]) -> str:
    """The least and the greatest of some numbers: `64`, or `64-512`."""
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def summarize_paths(paths: Sequence[str], most: int = MOST_PATTERNS) -> str:
    """Where some layers are, and how many they are: `bn1, layer[1-4].*.bn[1-3] ×49`.

    Args:
        paths: of the layers.
        most: patterns at most.
    """
    patterns = fold_paths(paths)
    where = ", ".join(pattern for pattern, _ in patterns[:most])
    more = f" and {len(patterns) - most} more" if len(patterns) > most else ""
    return f"{where}{more}{f' ×{len(paths)}' if len(paths) > 1 else ''}"
