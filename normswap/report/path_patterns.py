"""Many module paths as a few patterns."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

ROOT = "(root)"
MOST_PATTERNS = 3  # that a summary names


def fold_paths(paths: Iterable[str]) -> list[tuple[str, int]]:
    """Module paths as patterns, each with the number of paths it stands for.

    Paths that differ in numbers alone fall together: `layer1.0.bn1` to `layer4.2.bn3` are
    `layer[1-4].*.bn[1-3]`. A pattern sums up; it may cover paths that were not given.
    """
    shapes: dict[tuple[str, ...], list[list[int | None]]] = defaultdict(list)
    for path in paths:
        parts = [re.fullmatch(r"(.*?)(\d*)", part) for part in path.split(".")]
        stems = tuple(f"{part[1]}#" if part[2] else part[1] for part in parts if part)
        shapes[stems].append([int(part[2]) if part[2] else None for part in parts if part])
    folded = []
    for stems, rows in shapes.items():
        columns = zip(*rows, strict=True)
        written = (_segment(stem, set(column)) for stem, column in zip(stems, columns, strict=True))
        folded.append((".".join(written) or ROOT, len(rows)))
    return folded


def _segment(stem: str, numbers: set[int | None]) -> str:
    if not stem.endswith("#"):
        return stem
    found = sorted(number for number in numbers if number is not None)
    if len(found) == 1:
        return f"{stem[:-1]}{found[0]}"
    return "*" if stem == "#" else f"{stem[:-1]}[{ranges(found)}]"


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
