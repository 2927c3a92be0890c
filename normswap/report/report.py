"""What changed, as frozen plain data: the terminal, `--json` and every other view read this."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from normswap.errors import OptionError
from normswap.report.python_views import as_text, in_frame, views

REPORT_SCHEMA = 1
"""The version of the data that reports are written as. A reader of one version can read all that is added later."""

ChangeKind = Literal["norm", "weight", "optimizer", "copy", "module", "tensor"]
"""What was changed.

"norm" and "weight": a layer of a model; "optimizer" and "copy": in a training checkpoint, an optimizer's state or
another copy of the model; "module" and "tensor": in what `normswap.diff` returns.
"""


CARRIED_OVER = "carried over"
"""What becomes of the state that an optimizer has of a parameter which still exists."""


@dataclass(frozen=True)
class Change:
    """What happened at one place of the model."""

    paths: tuple[str, ...]
    """Every name that the module stands under."""
    kind: ChangeKind
    before: str
    """The layer as it is written: `BatchNorm2d`."""
    after: str
    """What it became: `GroupNorm(8)`."""
    how: str
    """What became of the learnt values."""
    exact: bool
    """Whether the function in eval mode is the same up to rounding."""
    note: str = ""
    """Whatever differs from what was asked, or was chosen by what the conversion is for."""
    groups: int | None = None
    """The number of groups, where the new layer has some."""
    eps: float | None = None
    """The new norm's, where it is another than the old one's."""
    partner: str | None = None
    """The path of the other layer, where a norm was folded into one."""
    amount: float | None = None
    """The relative L2 distance of a tensor that differs in value."""


@dataclass(frozen=True)
class Left:
    """One path of a normalization or a weight layer that stayed as it was; in a `diff`, a tensor that is the same."""

    path: str
    kind: Literal["norm", "weight", "tensor"]
    module: str
    """Its class; the dtype of a tensor."""
    reason: str


class LeftLayers(tuple[Left, ...]):
    """What stayed, which prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def __rich__(self) -> Any:
        return views("terminal").left_table(self)


@dataclass(frozen=True)
class Totals:
    """Counts of a report."""

    norms_changed: int
    weights_changed: int
    left: int
    """Paths that stayed as they were."""
    parameters_before: int
    """Elements of all parameters."""
    parameters_after: int
    buffers_before: int
    """Elements of all buffers."""
    buffers_after: int


@dataclass(frozen=True)
class Node:
    """A module of the model by its first path: its class, or the layer as it is written; "" where it is not."""

    path: str
    before: str
    after: str


@dataclass(frozen=True)
class LayerDrift:
    """How far the output of one changed layer moved on the probe."""

    path: str
    relative_l2: float
    """‖after − before‖ / ‖before‖, on at most 16384 elements of the output."""


@dataclass(frozen=True)
class Cost:
    """What a run took."""

    seconds: float
    peak_memory: int | None = None
    """The most memory that the process held at once, in bytes; None where the system does not say."""


@dataclass(frozen=True)
class Written:
    """What made an output, and how it is read; a text is "" where there is none."""

    command: str = ""
    """As it was typed; "" for a call in Python."""
    path: str = ""
    """The file or the folder that was written."""
    load: str = ""
    """The line of Python that gives the model in it."""


@dataclass(frozen=True)
class Drift:
    """How far the output moved on a probe input, in eval mode.

    A value is None where it has no meaning; `note` says why.
    """

    probe: str
    """What the input was; noise says little about accuracy."""
    relative_l2: float | None = None
    """‖after − before‖ / ‖before‖ over all floating-point outputs."""
    cosine: float | None = None
    """The cosine between them."""
    top1_agreement: float | None = None
    """The share of argmaxes over dimension 1 that agree."""
    note: str = ""
    layers: tuple[LayerDrift, ...] = ()
    """The changed layers, in the order in which they ran."""


@dataclass(frozen=True)
class Accuracy:
    """How often the network of the demo is right, between 0 and 1, in eval mode."""

    data: str
    """What it was measured on, with how many there are."""
    before: float
    after: float
    reset: float | None = None
    """What a conversion leaves that makes gain and bias 1 and 0; None where that is no question."""
    copied: float | None = None
    """What one leaves that keeps gain and bias as they stand."""


@dataclass(frozen=True)
class Calibration:
    """What fitting the norms to the original's outputs on unlabelled data has brought.

    It was measured on samples that were held out of the fit. An error is the relative L2 distance from
    the original, at what `measure` says. What was not measured is None.
    """

    samples: int
    held_out: int
    """How many of the samples the fit did not see."""
    kept: str
    """ "calibrated", or "matched" where that is no worse."""
    measure: str = "output"
    """ "output", or "norms" where outputs cannot be compared."""
    matched_error: float | None = None
    calibrated_error: float | None = None
    matched_top1: float | None = None
    """The share of argmaxes over dimension 1 that agree with the original's."""
    calibrated_top1: float | None = None
    steps: int = 0
    """Steps of the optimizer."""
    seconds: float = 0.0
    note: str = ""
    """Why something was not measured."""
    unlikeness: float | None = None
    """How far the data are from what the model's norms have learnt, in standard deviations of a channel."""


@dataclass(frozen=True, repr=False)
class Report:
    """All that a conversion did and did not do."""

    target: str
    """What was converted to; `diff` for a comparison, `plain torch` for a fold."""
    changes: tuple[Change, ...]
    left: tuple[Left, ...]
    totals: Totals
    drift: Drift | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    """What a converted checkpoint carries: target, options, versions, and what each changed layer became."""
    warnings: tuple[str, ...] = ()
    calibration: Calibration | None = None
    """None where there was no data, or nothing to calibrate."""
    modules: tuple[Node, ...] = ()
    """The whole tree; empty in a `diff` of tensors."""
    cost: Cost | None = None
    """None where no file was converted."""
    written: Written | None = None
    """Likewise."""
    accuracy: Accuracy | None = None
    """None of all models but the demo's."""
    notes: tuple[str, ...] = ()
    """What is good to know, and no reason to worry."""
    recognized: str = ""
    """What keys and shapes told of the network of a file without its model."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "left", LeftLayers(self.left))

    @property
    def exact(self) -> bool:
        """Whether the converted model is the same function in eval mode, up to rounding."""
        return all(change.exact for change in self.changes)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data, what `--json` prints; `report.schema.json`, beside this file, describes it."""
        return {"schema": REPORT_SCHEMA, **dataclasses.asdict(self), "exact": self.exact}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report to a file, whose ending says as what: .html, .md, .json or .svg; gives its path.

        Raises OptionError for another ending.
        """
        path, formats = Path(path), views("formats").REPORT_FORMATS
        if path.suffix.lower() not in formats:
            raise OptionError(f"{path}: give a name that ends in one of {', '.join(formats)}")
        path.write_text(formats[path.suffix.lower()](self, "model"), encoding="utf-8")
        return path

    def __str__(self) -> str:
        """The table of the terminal."""
        return as_text(self.__rich__())

    def __rich__(self) -> Any:
        return views("terminal").ReportView(self, "model")

    def __repr__(self) -> str:
        """One short line: notebooks and debuggers show it within other values."""
        return f"<Report {self.target}: {views('wording').short_counts(self)}>"

    def _repr_html_(self) -> str:
        return in_frame(self)
