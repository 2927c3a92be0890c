"""What changed, as frozen plain data: the terminal, `--json` and every other view read this."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1
"""The version of the data that reports are written as; a reader of one version can read all that is added to it later."""


@dataclass(frozen=True)
class Change:
    """What happened at one place of the model.

    A module that stands under several names has them all in `paths`. `kind` is "norm" or
    "weight", `before` and `after` are layers as they are written (`GroupNorm(8)`), `how` says what
    became of the learnt values, `exact` whether the function in eval mode is the same up to
    rounding, `note` whatever differs from what was asked, `groups` the number of groups where the new layer has
    some, `partner` the other layer where a norm was folded into one, and `amount` the relative L2 distance
    of a tensor that differs in value. Other kinds: "optimizer" and "copy" in training checkpoints, "module" and "tensor" in
    what `normswap.diff` returns.
    """

    paths: tuple[str, ...]
    kind: str
    before: str
    after: str
    how: str
    exact: bool
    note: str = ""
    groups: int | None = None
    partner: str | None = None
    amount: float | None = None


@dataclass(frozen=True)
class Left:
    """One path of a normalization or a weight layer that stayed as it was, and why."""

    path: str
    kind: str
    module: str
    reason: str


@dataclass(frozen=True)
class Totals:
    """Counts: of modules changed, of paths left, and of elements in parameters and buffers."""

    norms_changed: int
    weights_changed: int
    left: int
    parameters_before: int
    parameters_after: int
    buffers_before: int
    buffers_after: int


@dataclass(frozen=True)
class Node:
    """A module of the model by its first path: its class, or the layer as it is written, before and after; "" where it is not."""

    path: str
    before: str
    after: str


@dataclass(frozen=True)
class LayerDrift:
    """How far the output of one changed layer moved on the probe: ‖after − before‖ / ‖before‖, on at most 16384 of its elements."""

    path: str
    relative_l2: float


@dataclass(frozen=True)
class Cost:
    """What a run took: seconds, and the most memory that the process held at once (bytes; None where that is not told)."""

    seconds: float
    peak_memory: int | None = None


@dataclass(frozen=True)
class Drift:
    """How far the output moved on a probe input, in eval mode.

    `relative_l2` is ‖after − before‖ / ‖before‖ over all floating-point outputs, `cosine` the
    cosine between them, `top1_agreement` the share of argmaxes over dimension 1 that agree. A value
    is None where it has no meaning, and `note` says why. `probe` names the input: noise says
    little about accuracy. `layers` are the changed layers in the order in which they ran.
    """

    probe: str
    relative_l2: float | None = None
    cosine: float | None = None
    top1_agreement: float | None = None
    note: str = ""
    layers: tuple[LayerDrift, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """What fitting the norms to the original's outputs on unlabelled data has brought, measured on held-out samples of it.

    `kept` is "calibrated", or "matched" where that is no worse. An error is the relative L2 distance from the original, at
    `measure`: "output", or "norms" where outputs cannot be compared; `top1` is the share of argmaxes over dimension 1 that
    agree with the original's. What was not measured is None, and `note` says why.
    """

    samples: int
    held_out: int
    kept: str
    measure: str = "output"
    matched_error: float | None = None
    calibrated_error: float | None = None
    matched_top1: float | None = None
    calibrated_top1: float | None = None
    steps: int = 0
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All that a conversion did and did not do.

    `recipe` is what a converted checkpoint carries: target, options, versions, and what
    each changed layer became. `calibration` is None where there was no data or nothing to calibrate, `cost` where no file was
    converted; `modules` is the whole tree, empty in a `diff` of tensors.
    """

    target: str
    changes: tuple[Change, ...]
    left: tuple[Left, ...]
    totals: Totals
    drift: Drift | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    calibration: Calibration | None = None
    modules: tuple[Node, ...] = ()
    cost: Cost | None = None

    @property
    def exact(self) -> bool:
        """Whether the converted model is the same function in eval mode, up to rounding."""
        return all(change.exact for change in self.changes)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data, what `--json` prints; `report.schema.json`, beside this file, describes it."""
        return {"schema": SCHEMA, **dataclasses.asdict(self), "exact": self.exact}

    def __str__(self) -> str:
        totals = self.totals
        return (
            f"{self.target}: {totals.norms_changed} norms and {totals.weights_changed} weights changed"
            f" ({'exact' if self.exact else 'approximate'}), {totals.left} left"
        )
