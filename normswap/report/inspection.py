"""What a model has, what it could become, what is wrong with it and what to pick, as frozen plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

SCHEMA = 1
"""The version of the data that inspections are written as."""


@dataclass(frozen=True)
class Layer:
    """One normalization or weight layer, with every path that leads to it.

    `kind` is "norm" or "weight", `module` its class, `size` what it takes and gives in words (`3 → 64, 7×7`; "" for a norm), `channels` how many
    it normalizes or puts out, `groups` those of a group norm or of a grouped convolution, `spatial` the size of the maps it reads
    (None: not known), `trained` whether its parameters take gradients (None: it has none), `statistics` the state of running statistics
    ("healthy", what is wrong, or "" for a layer without) and `obstacle` why no target may touch it.
    """

    paths: tuple[str, ...]
    kind: str
    module: str
    size: str
    channels: int | None
    groups: int | None
    spatial: tuple[int, ...] | None
    trained: bool | None
    statistics: str
    obstacle: str


@dataclass(frozen=True)
class Outcome:
    """What one target would do with every option at its default: how many norms and weights it changes, whether exactly (None:
    nothing would change), and how many paths of its own kind it leaves for which reasons. `problem` says why it is refused altogether.
    """

    target: str
    norms: int
    weights: int
    exact: bool | None
    left: int
    reasons: tuple[tuple[str, int], ...]
    problem: str = ""


@dataclass(frozen=True)
class Finding:
    """Something wrong, or suspicious: at which layers, and what follows from it."""

    problem: str
    paths: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class Advice:
    """In a situation, what to pick, and why."""

    situation: str
    choose: str
    why: str


@dataclass(frozen=True)
class Inspection:
    """All that `normswap.inspect` found out. `probe` names what was run to see the sizes of maps; "" where nothing was."""

    model: str
    parameters: int
    buffers: int
    layers: tuple[Layer, ...]
    outcomes: tuple[Outcome, ...]
    findings: tuple[Finding, ...]
    advice: tuple[Advice, ...]
    probe: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data: what `normswap inspect --json` prints."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        norms = sum(layer.kind == "norm" for layer in self.layers)
        counts = {"norm": norms, "weight layer": len(self.layers) - norms, "finding": len(self.findings)}
        told = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items())
        return f"{self.model}: {told}"
