"""The story of a conversion: find, decide, build all, swap once, prove."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.analysis.copies import clone
from normswap.analysis.dataflow import find_flow
from normswap.analysis.noise import PATIENCE
from normswap.analysis.running import Seen, Sketches, batch_size, inputs_like, run_model
from normswap.analysis.selection import Pattern, check_model, copy_of, hidden_layers, select, shared_tensors
from normswap.analysis.sites import find_sites
from normswap.analysis.statistics import is_untrained
from normswap.calibration import processes
from normswap.calibration.batches import MOST_SAMPLES, input_batches
from normswap.calibration.distillation import FitSettings, distill
from normswap.calibration.measuring import Measured, measure_norms, measure_recurrent
from normswap.calibration.model_inputs import first_inputs
from normswap.conversion.accounting import (
    changes_of,
    count_elements,
    drift_of,
    left_unasked,
    modules_of,
    names_of,
    nothing_to_convert,
    prove,
    recipe_of,
    totals_of,
)  # fmt: skip
from normswap.conversion.planning import check_groups, decide
from normswap.conversion.surgery import apply
from normswap.errors import ModelError, OptionError
from normswap.layers.recurrent import LAYER_NORMALIZED
from normswap.layers.reparametrized import LAYERS
from normswap.report.report import Calibration, Drift, Report
from normswap.target_table import RECURRENT
from normswap.targets.context import Context, parse_groups
from normswap.targets.target import PLAIN_TARGET, Target, parse_target
from normswap.training.opacus import register_if_imported

Progress = Callable[[str], None]

TRANSFERS = ("match", "copy", "reset")
WS = ("preserve", "strict")
WS_SCOPES = ("normed", "all")


class Conversion(NamedTuple):
    """The converted model, and the report of what changed."""

    model: nn.Module
    report: Report


@dataclass(frozen=True)
class Options:
    """The options of `convert`, checked on their own; see there."""

    groups: str | int = "auto"
    transfer: str = "match"
    ws: str = "preserve"
    ws_scope: str = "normed"
    layers: Sequence[str] = ("conv",)
    recurrent: str | None = None
    include: Pattern = None
    exclude: Pattern = None
    calibrate: Any = None
    calibrate_seconds: float = 60.0

    def __post_init__(self) -> None:
        parse_groups(self.groups)
        for name, known in (("transfer", TRANSFERS), ("ws", WS), ("ws_scope", WS_SCOPES)):
            if getattr(self, name) not in known:
                raise OptionError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.recurrent is not None and self.recurrent not in RECURRENT:
            raise OptionError(f"recurrent: {self.recurrent!r} is not one of {', '.join(RECURRENT)}")
        if isinstance(self.layers, str) or not self.layers or not set(self.layers) <= set(LAYERS):
            raise OptionError(
                f'layers: {self.layers!r} is not possible; give some of {", ".join(LAYERS)}: ("conv", "rnn")'
            )
        seconds = self.calibrate_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
            raise OptionError(f"calibrate_seconds: {seconds!r} is no time; give seconds, 0 for matching alone")


def convert(
    model: nn.Module,
    to: str,
    *,
    groups: str | int = "auto",
    transfer: str = "match",
    ws: str = "preserve",
    ws_scope: str = "normed",
    layers: Sequence[str] = ("conv",),
    recurrent: str | None = None,
    include: Pattern = None,
    exclude: Pattern = None,
    example_inputs: Any = None,
    calibrate: Any = None,
    calibrate_seconds: float = 60.0,
    inplace: bool = False,
) -> Conversion:
    """Swap the normalization of `model`, and standardize its convolutions, keeping what it has learnt.

    Args:
        model: any module; it is left untouched unless `inplace`.
        to: a name in `normswap.TARGETS`: a norm (`gn`, `ln`, `in`, `est`, `bcn`, `bn`, `frozen`, `fold`), a weight form (`ws`, `wn`), or
            a pair (`gn-ws`).
        groups: for `gn` and `bcn`: `auto` (at most 8 groups, at least 4 channels in each; on data fewer where these keep more), a number of
            groups (`32`), or channels a group (`"16c"`).
        transfer: `match` moves the running statistics into gain and bias, `copy` keeps gain and
            bias as they stand, `reset` makes them 1 and 0.
        ws: `preserve` starts from each filter's own std and mean, which is exact; `strict` takes the
            paper's form, which is not.
        ws_scope: `normed` standardizes layers that a norm follows, `all` every one; recurrent ones are always taken.
        layers: whose weights `ws` and `wn` change: some of `conv`, `linear`, `rnn`.
        recurrent: `ln` puts layer normalization into LSTMs, GRUs and their cells (Ba et al. 2016).
        include, exclude: glob patterns on module paths, or a function `(path, module) -> bool`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. With it, group
            counts regard the sizes of feature maps, and the report tells the drift of the output.
        calibrate: unlabelled data, a few hundred samples: a tensor, a `Dataset`, or any iterable of batches, each as the model
            takes it. Norms without running statistics take those of the data (`bn` needs it for them), `auto` chooses groups
            by it, and the new norms' gains and biases are fitted to the original's outputs, if that is nearer on held-out samples.
            Where torch.distributed runs, every process calls this with its share of the data, and all get the same values.
        calibrate_seconds: the most time that this fitting takes; 0: none.
        inplace: change `model` itself; nothing changes unless all of it can.

    Returns:
        The converted model and the report. Every norm and every convolution is in the report, as a change
        or with the reason why it was left.

    Raises:
        OptionError: an unknown target or option, or a pattern that matches no layer.
        ModelError: nothing to convert, a lazy module without weights, a distributed wrapper.
    """
    batches = None
    if calibrate is not None:
        share = math.ceil(MOST_SAMPLES / processes.world_size())  # at least one sample of each process
        batches = processes.gather_batches(input_batches(calibrate, limit=share))
    options = Options(groups, transfer, ws, ws_scope, layers, recurrent, include, exclude, batches, calibrate_seconds)
    return run(model, parse_target(to), options, example_inputs, inplace=inplace, together=True)


def fold(model: nn.Module) -> Conversion:
    """The same function in plain torch layers, for deployment: a copy of `model` that does without normswap.

    Standardized weights are baked in. A `FrozenBatchNorm` goes into the layer before it, or becomes a
    torch batch norm in eval mode where there is none. A model without either comes back as it is.
    """
    return run(model, PLAIN_TARGET, Options(), may_be_idle=True)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection meanwhile: it would look at each of the many small objects again and again. And no inference mode
    of the caller's: tensors that are made in it could never be trained.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            yield
    finally:
        if was:
            gc.enable()


@_undisturbed()
def run(
    model: nn.Module,
    target: Target,
    options: Options,
    example_inputs: Any = None,
    probe_name: str = "example inputs",
    *,
    probe_only: bool = False,
    may_be_idle: bool = False,
    inplace: bool = False,
    together: bool = False,
    progress: Progress = lambda phase: None,
    release: Callable[[Tensor], None] = lambda tensor: None,
    given: Mapping[str, int] | None = None,
    measured: Mapping[str, Measured] | None = None,
    seen: Mapping[str, Seen] | None = None,
) -> Conversion:
    """`convert` with its options in one value, and word of each phase to `progress`.

    With `probe_only` the inputs serve the drift alone, and a model that does not run on them is no error;
    with `may_be_idle` nothing to convert is none either. With `together` every process of torch.distributed
    runs this on the same data, and the first one's fit is everybody's. `release`, `given`, `measured` and `seen` are those of `Context`.
    """
    check_model(model)
    progress("copying the model")
    work = model if inplace else copy_of(model)
    progress("finding norms and convolutions")
    sites = find_sites(work)
    chosen, excluded = select(sites, options.include, options.exclude)
    progress("tracing what feeds what")
    flow = find_flow(work, sites)
    names, before = names_of(work), None
    sketches: Sketches = {}
    sizes, measured = dict(seen or {}), dict(measured or {})
    problem = ""
    batches = [inputs_like(work, first_inputs(work, batch)) for batch in options.calibrate or ()]
    if batches and example_inputs is None:
        example_inputs, probe_name = batches[0], f"the calibration data's first batch of {batch_size(batches[0])}"
    if example_inputs is not None:
        progress("running the model before")
        try:
            watched = [site for site in sites if probe_only or site.kind == "norm"]
            tapped = [site.path for site in sites if site.kind == ("norm" if target.norm else "weight")]
            before, found, sketches = run_model(
                work, example_inputs, watched, PATIENCE if probe_only else None, taps=tapped
            )
            sizes |= {} if probe_only else found
        except ModelError as error:
            if not probe_only:
                raise
            problem = str(error)
    vectors: dict[str, Any] = {}
    if options.calibrate is not None:
        progress("measuring on the calibration data")
        norms = [site for site in sites if site.kind == "norm" and site.form and not site.obstacle]
        grouped = options.groups == "auto" and target.norm is not None and target.norm.name in ("gn", "in", "bcn")
        measured |= measure_norms(work, batches, norms, grouped)
        if options.recurrent:
            inner = [site for site in chosen if site.base in LAYER_NORMALIZED and not site.obstacle]
            vectors = measure_recurrent(work, batches, inner)
        sizes = {path: m.seen for path, m in measured.items()} | sizes
    context = Context(
        groups=options.groups, transfer=options.transfer, ws=options.ws, ws_scope=options.ws_scope,
        layers=tuple(options.layers), recurrent=options.recurrent, flow=flow,
        sites={site.path: site for site in sites}, seen=sizes, measured=measured, vectors=vectors, shared=shared_tensors(work), excluded=frozenset(excluded),
        given=given or {}, release=release,
    )  # fmt: skip

    progress("working out the new layers")
    swaps, left = decide(sites, chosen, target, context)
    hidden, notices = hidden_layers(work)
    for notice in notices:
        warnings.warn(notice, stacklevel=4)
    if not swaps and not may_be_idle:
        raise ModelError(
            nothing_to_convert(target, left + hidden) + left_unasked(sites, options.layers, options.recurrent)
        )
    check_groups(target, swaps, options.groups)
    if target.norm and swaps and not any(swap.site.kind == "norm" for swap in swaps):
        notices.append(
            f"no norm was changed: the model has none that {target.norm.name} can replace; see what was left"
        )
    batch_norms = [site.module for site in sites if site in chosen and site.is_batch_norm]
    if batch_norms and all(is_untrained(norm) for norm in batch_norms):
        notices.append("the running statistics were never trained: there is no function to keep")
    if target.weight and target is not PLAIN_TARGET and swaps and not any(s.site.kind == "weight" for s in swaps):
        notices.append(
            f"no weight was changed{left_unasked(sites, options.layers, options.recurrent)}; see what was left"
        )
    counts = count_elements(work)
    changes = changes_of(swaps)
    inexact = [
        swap.site for swap in swaps if not swap.exact and (swap.site.kind == "norm" or swap.site.layer_kind == "rnn")
    ]
    fitted = [site.path for site in inexact]
    fits = options.calibrate is not None and options.transfer == "match" and options.calibrate_seconds > 0 and fitted
    original = model
    if fits and inplace:
        try:
            original = clone(work)
        except Exception as error:  # an attribute of the model that cannot be copied
            fits = False
            notices.append(
                f"not calibrated: that needs a copy of the model, which fails ({type(error).__name__}: {error})"
            )

    progress("swapping")
    apply(swaps, release)
    prove(work, changes, left, (*options.layers, "rnn") if options.recurrent else options.layers)
    calibration: Calibration | None = None
    if fits:
        progress("calibrating")

        def fit() -> Calibration:
            return distill(
                original, work, batches, fitted, FitSettings(options.calibrate_seconds),
                progress=lambda share: progress(f"calibrating: {share:.0%}"),
            )  # fmt: skip

        calibration = processes.fit_in_first(fit, work, fitted) if together else fit()

    moved = None
    if example_inputs is not None:
        progress("running the model after")
        exact = all(swap.exact for swap in swaps)
        moved = Drift(probe_name, note=problem)
        if not problem:
            changed = {swap.site.path for swap in swaps}
            moved = drift_of(work, before, example_inputs, probe_name, exact, sketches, changed)
    register_if_imported()
    left = sorted(left + hidden, key=lambda entry: entry.path)
    report = Report(
        target.name, tuple(changes), tuple(left), totals_of(changes, left, counts, count_elements(work)), moved,
        recipe_of(target, options, changes), tuple(notices), calibration, modules_of(names, work, changes),
    )  # fmt: skip
    return Conversion(work, report)
