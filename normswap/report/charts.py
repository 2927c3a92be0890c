"""The charts of a report as data: how far each layer moved, and how many layers have how many groups."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from normswap.report.path_patterns import DEEPEST, ROOT, fold_paths, ranges, stem_and_number
from normswap.report.report import Change, Drift

_MOST_BARS = 12
_WHOLE = 1.0  # relative L2 of a full bar: the output moved as far as it is long, and has little in common with the old
_SMALL, _MEDIUM = 0.1, 0.5  # up to where a drift has that severity

Severity = Literal["small", "medium", "large"]


@dataclass(frozen=True)
class Bar:
    """How far one layer moved, or the furthest of several."""

    path: str
    value: float
    """The relative L2 distance of the outputs."""
    count: int
    """Of how many layers this is the furthest."""

    @property
    def share(self) -> float:
        """How much of a full bar it fills, from 0 to 1; the scale is the same in every report."""
        return min(1.0, self.value / _WHOLE)

    @property
    def severity(self) -> Severity:
        return "small" if self.value < _SMALL else "medium" if self.value < _MEDIUM else "large"

    @property
    def shown(self) -> str:
        """The share of the output that moved: `25%`."""
        return percent(self.value)

    @property
    def several(self) -> str:
        """What to say beside a bar that stands for several layers."""
        return f"furthest of {self.count}" if self.count > 1 else ""


def percent(moved: float) -> str:
    """A relative L2 distance as the share of the output that moved."""
    return f"{moved:.0%}" if moved >= _SMALL else f"{moved:.1%}"


def drift_bars(drift: Drift | None, full: bool = False) -> list[Bar]:
    """How far the changed layers moved, in the order in which they ran.

    Where there are many layers, a bar stands for a part of the model; with `full`, for one layer always.
    """
    if drift is None:
        return []
    layers = [(layer.path, layer.relative_l2) for layer in drift.layers]
    if full or len(layers) <= _MOST_BARS:
        return [Bar(path or ROOT, value, 1) for path, value in layers]
    parts: list[tuple[list[str], list[tuple[str, float]]]] = [([""], layers)]
    for depth in range(1, 2 + min(DEEPEST, max(path.count(".") for path, _ in layers))):
        finer: dict[str, list[tuple[str, float]]] = defaultdict(list)
        for path, value in layers:
            finer[".".join(path.split(".")[:depth])].append((path, value))
        names = list(finer)
        if len(names) > _MOST_BARS:
            if len(parts) < _MOST_BARS // 2:  # so few would hide where it bends: neighbours together
                size = -(-len(names) // _MOST_BARS)
                near = [names[at : at + size] for at in range(0, len(names), size)]
                parts = [(some, [layer for name in some for layer in finer[name]]) for some in near]
            break
        parts = [([name], held) for name, held in finer.items()]
    return [
        Bar(_part(names, [path for path, _ in held]), max(value for _, value in held), len(held))
        for names, held in parts
    ]


def _part(names: Sequence[str], paths: Sequence[str]) -> str:
    """A name for the layers at `paths`, which stand in the parts of the model that `names` says."""
    patterns = fold_paths(paths)
    if len(patterns) == 1 and len(names) == 1:
        return patterns[0][0]
    parents = {name.rpartition(".")[0] for name in names}
    ends = [stem_and_number(name.rpartition(".")[2]) for name in names]
    numbers = [number for stem, number in ends if number is not None and not stem]
    if len(names) == 1:
        return f"{names[0]}.*".lstrip(".")
    if len(parents) == 1 and len(numbers) == len(names):
        return f"{parents.pop()}.[{ranges(numbers)}].*".lstrip(".")
    return f"{names[0]} to {names[-1]}"


def layers_by_groups(changes: Iterable[Change]) -> list[tuple[int, int]]:
    """(groups, layers that have so many), of the new norms."""
    return sorted(Counter(change.groups for change in changes if change.groups is not None).items())
