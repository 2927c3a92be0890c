"""Many module paths as a few patterns, and a module tree with alike branches folded."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

ROOT = "(root)"
_MOST_PATTERNS = 3
Key = TypeVar("Key", bound=Hashable)


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


def places(paths: Sequence[str], most: int = _MOST_PATTERNS) -> str:
    """Where some layers are, in at most so many patterns, and how many layers they are: `bn1, layer[1-4].*.bn[1-3] ×49`."""
    patterns = fold_paths(paths)
    where = ", ".join(pattern for pattern, _ in patterns[:most])
    more = f" and {len(patterns) - most} more" if len(patterns) > most else ""
    return f"{where}{more}{f' ×{len(paths)}' if len(paths) > 1 else ''}"


def grouped(pairs: Iterable[tuple[Key, str]]) -> Iterator[tuple[Key, str, int]]:
    """(key, pattern, count) for paths that are folded apart for each key, keys in order of appearance."""
    paths: dict[Key, list[str]] = defaultdict(list)
    for key, path in pairs:
        paths[key].append(path)
    for key, members in paths.items():
        for pattern, count in fold_paths(members):
            yield key, pattern, count


@dataclass
class Branch:
    """A place in a module tree, or `count` places that are alike: what stands at it, and what below, by name.

    A name is a stem and the number it ends in, or those of all places that are alike.
    """

    stem: str
    numbers: set[int] = field(default_factory=set)
    items: list[tuple[str, Any]] = field(default_factory=list)
    below: dict[str, Branch] = field(default_factory=dict)
    count: int = 1

    @property
    def name(self) -> str:
        if len(self.numbers) < 2:
            return f"{self.stem}{''.join(map(str, self.numbers))}"
        return f"{self.stem}[{ranges(self.numbers)}]"

    @property
    def lines(self) -> int:
        """How many lines it takes to show it."""
        return 1 + sum(branch.lines for branch in self.below.values())


def fold_tree(items: Iterable[tuple[str, str, Any]]) -> list[Branch]:
    """A tree of (path, kind, item) in which places that are alike stand as one: `layer[2-4]`, `bn[1-2]`."""
    root = Branch("")
    for path, kind, item in items:
        branch = root
        for part in path.split(".") if path else [ROOT]:
            branch = branch.below.setdefault(part, _named(part))
        branch.items.append((kind, item))
    _fold(root)
    return list(root.below.values())


def _named(part: str) -> Branch:
    """A branch of that name; one that ends in a number as people write it (not in 007) may be folded with others."""
    found = re.fullmatch(r"(.*?)(0|[1-9]\d*)", part)
    return Branch(part) if found is None else Branch(found[1], {int(found[2])})


def _fold(branch: Branch) -> Hashable:
    """Fold what is alike below a branch, from the leaves up; returns what the branch has in common with those alike: kinds and
    names, not numbers.
    """
    alike: dict[Hashable, Branch] = {}
    for child in branch.below.values():
        shape = _fold(child)
        if child.numbers and shape in alike:
            _merge(alike[shape], child)
        else:
            alike[shape if child.numbers else (child.name, shape)] = child
    branch.below = {child.name: child for child in alike.values()}
    kinds = tuple(dict.fromkeys(kind for kind, _ in branch.items))
    return branch.stem, bool(branch.numbers), kinds, tuple(alike)


def _merge(into: Branch, other: Branch) -> None:
    into.count += other.count
    into.items += other.items
    into.numbers |= other.numbers
    for mine, others in zip(into.below.values(), other.below.values(), strict=True):
        _merge(mine, others)
