"""What a model has, what it could become, what is wrong with it and what to pick, as frozen plain data."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from normswap.printable import printable
from normswap.report.python_views import as_text, in_frame, views

INSPECTION_SCHEMA = 1
"""The version of the data that inspections are written as."""


@dataclass(frozen=True)
class Layer:
    """One normalization or weight layer."""

    paths: tuple[str, ...]
    """Every name that it stands under."""
    kind: Literal["norm", "weight"]
    module: str
    """Its class."""
    size: str
    """What a weight layer takes and gives in words: `3 → 64, 7×7`; "" for a norm."""
    channels: int | None
    """How many it normalizes or puts out."""
    groups: int | None
    """Those of a group norm or of a grouped convolution."""
    spatial: tuple[int, ...] | None
    """The size of the maps it reads; None where it is not known."""
    trained: bool | None
    """Whether its parameters take gradients; None where it has none."""
    statistics: str
    """The state of running statistics: "healthy", or what is wrong; "" for a layer without."""
    obstacle: str
    """Why no target may touch it; "" where one may."""
    auto_groups: Mapping[str, int] = field(default_factory=dict)
    """The groups that `gn` gives it without data, by purpose: `training` and `use`; empty where it stays."""


@dataclass(frozen=True)
class Outcome:
    """What one target would do with every option at its default."""

    target: str
    norms: int
    """How many it changes."""
    weights: int
    """How many it changes."""
    exact: bool | None
    """Whether all changes are exact; None where nothing would change."""
    left: int
    """How many paths of its own kind it leaves."""
    reasons: tuple[tuple[str, int], ...]
    """Why, and how many for that reason; the most frequent first."""
    problem: str = ""
    """Why the target is refused altogether."""


@dataclass(frozen=True)
class Finding:
    """Something wrong, or suspicious."""

    problem: str
    paths: tuple[str, ...]
    """At which layers."""
    note: str
    """What follows from it."""


@dataclass(frozen=True)
class Advice:
    """In a situation, what to pick, and why."""

    situation: str
    choose: str
    why: str


@dataclass(frozen=True, repr=False)
class Inspection:
    """All that `normswap.inspect` found out."""

    model: str
    """Its class."""
    parameters: int
    """Elements of all parameters."""
    buffers: int
    """Elements of all buffers."""
    layers: tuple[Layer, ...]
    outcomes: tuple[Outcome, ...]
    findings: tuple[Finding, ...]
    advice: tuple[Advice, ...]
    probe: str = ""
    """What was run to see the sizes of maps; "" where nothing was."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data: what `normswap inspect --json` prints."""
        return {"schema": INSPECTION_SCHEMA, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        """The tables of the terminal."""
        return as_text(self.__rich__())

    def __rich__(self) -> Any:
        return views("terminal_inspection").InspectionView(self, "model")

    def __repr__(self) -> str:
        """One short line: notebooks and debuggers show it within other values."""
        norms = sum(layer.kind == "norm" for layer in self.layers)
        counts = {"norm": norms, "weight layer": len(self.layers) - norms, "finding": len(self.findings)}
        counted = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items())
        return f"<Inspection {printable(self.model)}: {counted}>"

    def _repr_html_(self) -> str:
        return in_frame(self)
