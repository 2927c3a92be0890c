"""A module tree from paths, and the same tree with branches that are alike folded into one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from normswap.report.path_patterns import DEEPEST, ROOT, ranges, stem_and_number

Item = TypeVar("Item")


@dataclass
class Branch(Generic[Item]):
    """A place in a module tree, or several places that are alike.

    Its name is a stem and a number: `layer` and 1 in `layer1`.
    """

    stem: str
    numbers: set[int] = field(default_factory=set)
    """The number that the name ends in, or those of all places that are alike; none for a name without a number."""
    items: list[Item] = field(default_factory=list)
    """What stands here."""
    below: dict[str, Branch[Item]] = field(default_factory=dict)
    """The branches below, by name."""
    count: int = 1
    """How many places it stands for."""

    @property
    def name(self) -> str:
        if len(self.numbers) < 2:
            return f"{self.stem}{''.join(map(str, self.numbers))}"
        return f"{self.stem}[{ranges(self.numbers)}]"

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Branch[Item]]]:
        """(depth, branch) of all branches below, from the top down; those right below have depth 0."""
        for branch in self.below.values():
            yield depth, branch
            yield from branch.walk(depth + 1)


def build_tree(items: Iterable[tuple[str, Item]]) -> Branch[Item]:
    """The root of the tree in which each item stands at its path; the path "" is the root itself."""
    root = Branch[Item]("")
    for path, item in items:
        branch = root
        for part in path.split(".", DEEPEST) if path else ():
            branch = branch.below.setdefault(part, _branch_named(part))
        branch.items.append(item)
    return root


def fold_tree(items: Iterable[tuple[str, Item]], kind: Callable[[Item], str]) -> Branch[Item]:
    """The tree of (path, item), in which places that are alike stand as one: `layer[2-4]`, `bn[1-2]`.

    Places are alike where their names differ in numbers alone, their items are of the same kinds, and what is
    below is alike. What stands at the path "" is shown below the root, as a place named `(root)`.
    """
    root = build_tree((path or ROOT, item) for path, item in items)
    _fold(root, kind)
    return root


def _branch_named(part: str) -> Branch[Item]:
    """A branch of that name; one that ends in a number may be folded with others."""
    stem, number = stem_and_number(part)
    return Branch(stem, set() if number is None else {number})


def _fold(branch: Branch[Item], kind: Callable[[Item], str]) -> Hashable:
    """Fold what is alike below a branch, from the leaves up; return what all branches alike have in common."""
    alike: dict[Hashable, Branch[Item]] = {}
    for child in branch.below.values():
        shape = _fold(child, kind)
        if child.numbers and shape in alike:
            _merge(alike[shape], child)
        else:
            alike[shape if child.numbers else (child.name, shape)] = child
    branch.below = {child.name: child for child in alike.values()}
    kinds = tuple(dict.fromkeys(map(kind, branch.items)))
    return branch.stem, bool(branch.numbers), kinds, tuple(alike)


def _merge(into: Branch[Item], other: Branch[Item]) -> None:
    into.count += other.count
    into.items += other.items
    into.numbers |= other.numbers
    for mine, others in zip(into.below.values(), other.below.values(), strict=True):
        _merge(mine, others)
