"""The story of a conversion: find, decide, build all, swap once, prove."""

from __future__ import annotations

import fnmatch
import gc
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normswap import probe, samples
from normswap.calibrate import Measured, measure, measure_vectors
from normswap.distill import distill
from normswap.errors import ModelError, NormswapError, OptionError
from normswap.graph import find_flow
from normswap.plan import Context, Swap, parse_groups
from normswap.probe import Seen
from normswap.recurrent import LAYER_NORMALIZED
from normswap.report import Calibration, Change, Drift, Left, Report, Totals
from normswap.sites import Site, find_sites, hidden_modules
from normswap.swap import apply
from normswap.targets import PLAIN_TARGET, Target, parse_target, plan_norm, plan_weight
from normswap.trace import clone
from normswap.weight_forms import RECURRENT, strict_rescaling
from normswap.weights import LAYERS

Pattern = str | Iterable[str] | Callable[[str, nn.Module], bool] | None
Progress = Callable[[str], None]

TRANSFERS = ("match", "copy", "reset")
WS = ("preserve", "strict")
WS_SCOPES = ("normed", "all")
_EXACT = 1e5  # times the rounding of the coarsest parameter: more than any chain of layers adds up to
_PATIENCE = 10.0  # seconds that a run on noise may take which nobody asked for


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
        to: a name in `normswap.TARGETS`: a norm (`gn`, `ln`, `in`, `est`, `bcn`, `frozen`, `fold`), a weight form (`ws`, `wn`), or
            a pair (`gn-ws`).
        groups: for `gn` and `bcn`: `auto` (at most 8 groups, at least 4 channels in each), a number of
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
            takes it. Norms without running statistics take those of the data; `bn` needs it for them.
        calibrate_seconds: the most time that is spent on fitting the new norms to the original's outputs on the data; 0: matching alone.
        inplace: change `model` itself; nothing changes unless all of it can.

    Returns:
        The converted model and the report. Every norm and every convolution is in the report, as a change
        or with the reason why it was left.

    Raises:
        OptionError: an unknown target or option, or a pattern that matches no layer.
        ModelError: nothing to convert, a lazy module without weights, a distributed wrapper.
    """
    batches = None if calibrate is None else samples.batches(calibrate)
    options = Options(groups, transfer, ws, ws_scope, layers, recurrent, include, exclude, batches, calibrate_seconds)
    return run(model, parse_target(to), options, example_inputs, inplace=inplace)


def fold(model: nn.Module) -> Conversion:
    """The same function in plain torch layers, for deployment: a copy of `model` that does without normswap.

    Standardized weights are baked in. A `FrozenBatchNorm` goes into the layer before it, or becomes a
    torch batch norm in eval mode where there is none. A model without either comes back as it is.
    """
    return run(model, PLAIN_TARGET, Options(), may_be_idle=True)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: it would look at each of the many small objects again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@_uncollected()
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
    progress: Progress = lambda phase: None,
    release: Callable[[Tensor], None] = lambda tensor: None,
    given: Mapping[str, int] | None = None,
    measured: Mapping[str, Measured] | None = None,
    seen: Mapping[str, Seen] | None = None,
) -> Conversion:
    """`convert` with its options in one value, and word of each phase to `progress`.

    With `probe_only` the inputs serve the drift alone, and a model that does not run on them is no error;
    with `may_be_idle` nothing to convert is none either. `release`, `given`, `measured` and `seen` are those of `Context`.
    """
    _check_model(model)
    progress("copying the model")
    work = model if inplace else _copy(model)
    progress("finding norms and convolutions")
    sites = find_sites(work)
    chosen, excluded = _select(sites, options)
    progress("tracing what feeds what")
    flow = find_flow(work, sites)
    before: Any = None
    sizes, measured = dict(seen or {}), dict(measured or {})
    problem = ""
    batches = [probe.fitted(work, samples.first_inputs(work, batch)) for batch in options.calibrate or ()]
    if batches and example_inputs is None:
        example_inputs, probe_name = batches[0], f"the calibration data's first batch of {probe.count(batches[0])}"
    if example_inputs is not None:
        progress("running the model before")
        try:
            watched = [site for site in sites if probe_only or site.kind == "norm"]
            before, found = probe.run(work, example_inputs, watched, _PATIENCE if probe_only else None)
            sizes |= {} if probe_only else found
        except ModelError as error:
            if not probe_only:
                raise
            problem = str(error)
    vectors: dict[str, Any] = {}
    if options.calibrate is not None:
        progress("measuring on the calibration data")
        norms = [site for site in sites if site.kind == "norm" and site.form and not site.obstacle]
        measured |= measure(work, batches, norms)
        if options.recurrent:
            inner = [site for site in chosen if site.base in LAYER_NORMALIZED and not site.obstacle]
            vectors = measure_vectors(work, batches, inner)
        sizes = {path: m.seen for path, m in measured.items()} | sizes
    context = Context(
        groups=options.groups, transfer=options.transfer, ws=options.ws, ws_scope=options.ws_scope,
        layers=tuple(options.layers), recurrent=options.recurrent, flow=flow,
        sites={site.path: site for site in sites}, seen=sizes, measured=measured, vectors=vectors, shared=_shared(work), excluded=frozenset(excluded),
        given=given or {}, release=release,
    )  # fmt: skip

    progress("working out the new layers")
    swaps, left = _decide(sites, chosen, target, context)
    left += [
        Left(where, "norm", name, "is a function call that no module holds") for where, name in flow.functional.items()
    ]
    hidden, notices = _hidden(work)
    for notice in notices:
        warnings.warn(notice, stacklevel=4)
    if not swaps and not may_be_idle:
        raise ModelError(_nothing(target, left + hidden) + _unasked(sites, options))
    _check_groups(target, swaps, options)
    if target.norm and swaps and not any(swap.site.kind == "norm" for swap in swaps):
        notices.append(
            f"no norm was changed: the model has none that {target.norm.name} can replace; see what was left"
        )
    batch_norms = [site.module for site in sites if site in chosen and site.is_batch_norm]
    if batch_norms and all(_untrained(norm) for norm in batch_norms):
        notices.append("the running statistics were never trained: there is no function to keep")
    if target.weight and target is not PLAIN_TARGET and swaps and not any(s.site.kind == "weight" for s in swaps):
        notices.append(f"no weight was changed{_unasked(sites, options)}; see what was left")
    counts = _count(work)
    changes = _changes(swaps)
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
    _prove(work, changes, left, (*options.layers, "rnn") if options.recurrent else options.layers)
    calibration: Calibration | None = None
    if fits:
        progress("calibrating")
        calibration = distill(
            original, work, batches, fitted, seconds=options.calibrate_seconds,
            progress=lambda share: progress(f"calibrating: {share:.0%}"),
        )  # fmt: skip

    moved = None
    if example_inputs is not None:
        progress("running the model after")
        exact = all(swap.exact for swap in swaps)
        moved = Drift(probe_name, note=problem) if problem else _drift(work, before, example_inputs, probe_name, exact)
    left = sorted(left + hidden, key=lambda entry: entry.path)
    report = Report(
        target.name, tuple(changes), tuple(left), _totals(changes, left, counts, _count(work)), moved,
        _recipe(target, options, changes), tuple(notices), calibration,
    )  # fmt: skip
    return Conversion(work, report)


# ---- find ----


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"expected a torch.nn.Module, not {type(model).__name__}; for a file, use normswap.convert_file"
        )
    for path, module in model.named_modules():
        where, name = path or "the model", type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{where} is TorchScript, whose layers cannot be exchanged; convert the model that it was made from"
            )
        if name in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise ModelError(f"{where} is wrapped in {name}; convert first, then wrap: convert(model.module, ...)")
        for tensor_name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and is_lazy(tensor):
                raise ModelError(
                    f"{where} ({name}) is lazy and its {tensor_name} has no shape yet; run the model once on an input, then convert"
                )


def _copy(model: nn.Module) -> nn.Module:
    try:
        copied = clone(model)
        if {id(module) for module in copied.modules()} & {id(module) for module in model.modules()}:
            raise TypeError("a module's own copy is itself")
        return copied
    except Exception as error:  # an attribute of the model that cannot be copied
        raise ModelError(
            f"the model cannot be copied ({type(error).__name__}: {error}); convert with inplace=True"
        ) from error


def _select(sites: Sequence[Site], options: Options) -> tuple[set[Site], set[Site]]:
    """The sites to convert, and those that the user excluded."""
    included = set(sites) if options.include is None else _matching(sites, options.include, "include")
    excluded = set() if options.exclude is None else _matching(sites, options.exclude, "exclude")
    return included - excluded, excluded


def _matching(sites: Sequence[Site], pattern: Pattern, option: str) -> set[Site]:
    if callable(pattern):
        return {site for site in sites if any(pattern(path, site.module) for path in site.paths)}
    found: set[Site] = set()
    globs: list[Any] = (
        [pattern] if isinstance(pattern, str) else list(pattern) if isinstance(pattern, Iterable) else [pattern]
    )
    if not all(isinstance(glob, str) for glob in globs):
        raise OptionError(f"{option}: {pattern!r} is neither a glob, a list of globs nor a function")
    for glob in globs:
        matched = {site for site in sites if any(fnmatch.fnmatchcase(path, glob) for path in site.paths)}
        if not matched:
            inside = any(path.startswith(f"{glob}.") for site in sites for path in site.paths)
            hint = (
                f"; it holds some: write '{glob}.*'"
                if inside
                else "; patterns are globs on module paths, such as 'layer1.*'"
            )
            raise OptionError(f"{option}: {glob!r} matches no norm and no convolution{hint}")
        found |= matched
    return found


def _shared(model: nn.Module) -> frozenset[int]:
    """The ids of tensors that stand in more than one place, or share their memory with one that does."""
    places: dict[int, list[int]] = defaultdict(list)
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                places[
                    tensor.data_ptr() if tensor.layout is torch.strided and _has_memory(tensor) else id(tensor)
                ].append(id(tensor))
    return frozenset(key for keys in places.values() if len(keys) > 1 for key in keys)


def _has_memory(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.numel() > 0 and type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def _hidden(model: nn.Module) -> tuple[list[Left], list[str]]:
    left, notices = [], []
    for where, module in hidden_modules(model):
        reason = "is not registered (a plain list or attribute): its parameters are neither saved nor trained"
        inside = find_sites(module)
        left += [
            Left(f"{where}.{path}".rstrip("."), site.kind, site.name, reason) for site in inside for path in site.paths
        ]
        if inside:
            notices.append(f"{where} {reason}; use nn.ModuleList or nn.ModuleDict")
    return left, notices


# ---- decide and build ----


def _decide(
    sites: Sequence[Site], chosen: set[Site], target: Target, context: Context
) -> tuple[list[Swap], list[Left]]:
    """A swap, built, or a reason for every site; norms first, since what they fold into changes the weights."""
    norms = [site for site in sites if site.kind == "norm"]
    weights = [site for site in sites if site.kind == "weight"]
    if target.weight is not None and target.weight.name == "ws" and context.ws == "strict":
        for site in norms:
            into = context.sites.get(context.flow.feeder(site.path)[0] or "")
            if into in chosen and site in chosen and isinstance(plan_weight(into, target, context), Swap):
                context.rescaled[site.path] = strict_rescaling(into)
    plans: dict[Site, Swap | str] = dict.fromkeys(sites, "not selected")
    for site in norms:
        if site in chosen:
            swap = plans[site] = plan_norm(site, target, context)
            if isinstance(swap, Swap) and swap.absorb:
                context.absorbed[swap.absorb.site.path] = swap.absorb.affine.scale
    for site in weights:
        if site in chosen:
            plans[site] = plan_weight(site, target, context)
    swaps = [plan for plan in plans.values() if isinstance(plan, Swap)]
    layers = (*context.layers, "rnn") if context.recurrent else context.layers
    left = [
        Left(path, site.kind, site.name, plan)
        for site, plan in plans.items()
        if isinstance(plan, str) and site.path not in context.absorbed and _reported(site, layers)
        for path in site.paths
    ]
    return swaps, left


def _reported(site: Site, layers: Sequence[str]) -> bool:
    """Norms and convolutions always are; other layers if their weights may be changed, or have norms inside."""
    return site.kind == "norm" or site.layer_kind in ("conv", *layers) or site.base in LAYER_NORMALIZED.values()


def _untrained(norm: nn.Module) -> bool:
    seen, mean = (norm._buffers.get(name) for name in ("num_batches_tracked", "running_mean"))
    return seen is not None and mean is not None and not seen.is_meta and not seen.any() and not mean.any()


def _nothing(target: Target, left: Sequence[Left]) -> str:
    if not left:
        return "the model has no normalization and no convolution: there is nothing to convert"
    reasons = Counter((entry.module, entry.reason) for entry in left)
    listed = "; ".join(f"{count} {module}: {reason}" for (module, reason), count in reasons.most_common(4))
    return f"nothing to convert to {target.name}: {listed}"


def _unasked(sites: Sequence[Site], options: Options) -> str:
    """What the options leave out though the model has it."""
    has = Counter(site.layer_kind for site in sites if site.kind == "weight")
    there = [kind for kind in LAYERS if has[kind] and kind not in options.layers]
    hints = (
        [f"weights of other layers change with layers=({', '.join(repr(kind) for kind in there)},)"] if there else []
    )
    if has["rnn"] and not options.recurrent:
        hints.append('recurrent="ln" puts layer norms into LSTM and GRU')
    return "".join(f"; {hint}" for hint in hints)


def _check_groups(target: Target, swaps: Sequence[Swap], options: Options) -> None:
    _, number = parse_groups(options.groups)
    widths = [swap.site.channels for swap in swaps if swap.site.kind == "norm"]
    if target.norm and target.norm.name in ("gn", "bcn") and widths and number > max(widths):
        raise OptionError(f"groups: {options.groups} is more than the {max(widths)} channels of the widest layer")


# ---- prove and report ----


def _prove(model: nn.Module, changes: Sequence[Change], left: Sequence[Left], layers: Sequence[str]) -> None:
    """A second walk: each norm and convolution that the model has now is one the report names."""
    named = {path for change in changes for path in change.paths} | {entry.path for entry in left}
    missed = [
        path
        for site in find_sites(model)
        if _reported(site, layers)
        for path in site.paths
        if path not in named and path.rpartition(".")[0] not in named  # a norm may become two
    ]
    if missed:
        raise NormswapError(f"{missed[0]}: neither changed nor left; this is a bug in normswap, please report it")


def _changes(swaps: Sequence[Swap]) -> list[Change]:
    taken_in = {swap.absorb.site: swap.site.path for swap in swaps if swap.absorb}
    changes = []
    for swap in swaps:
        site, partner = swap.site, swap.absorb.site.path if swap.absorb else taken_in.pop(swap.site, None)
        how = swap.how if partner is None or swap.absorb else f"{swap.how}; took in the norm after it"
        changes.append(
            Change(site.paths, site.kind, site.name, swap.after, how, swap.exact, swap.note, swap.groups, partner)
        )
    for swap in swaps:
        if swap.absorb and swap.absorb.site in taken_in:
            into, how = swap.absorb.site, "took in the norm after it"
            taken_in.pop(into)
            changes.append(Change(into.paths, "weight", into.name, into.name, how, swap.exact, partner=swap.site.path))
    return changes


def _count(model: nn.Module) -> tuple[int, int]:
    return sum(p.numel() for p in model.parameters()), sum(b.numel() for b in model.buffers())


def _totals(changes: Sequence[Change], left: Sequence[Left], before: tuple[int, int], after: tuple[int, int]) -> Totals:
    kinds = Counter(change.kind for change in changes)
    return Totals(kinds["norm"], kinds["weight"], len(left), before[0], after[0], before[1], after[1])


def _drift(model: nn.Module, before: Any, inputs: Any, name: str, exact: bool) -> Drift:
    """The measured drift; raises `ModelError` where a model does not run any more, or moved though it should not have."""
    try:
        moved = probe.drift(before, probe.run(model, inputs)[0], name)
    except ModelError as error:
        raise ModelError(f"after conversion {error}; leave what it needs with exclude=") from error
    precision = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    if exact and moved.relative_l2 is not None and moved.relative_l2 > _EXACT * precision:
        raise ModelError(
            f"this conversion should be exact, but on {name} the output moved by {moved.relative_l2:.2g} (relative L2): the "
            "forward does something that could not be seen; leave the layers concerned with exclude=, and please report it"
        )
    return moved


def _recipe(target: Target, options: Options, changes: Sequence[Change]) -> dict[str, Any]:
    choices = {name: "a function" if callable(value) else value for name, value in vars(options).items()}
    data, seconds, recurrent = (choices.pop(name) for name in ("calibrate", "calibrate_seconds", "recurrent"))
    choices = {k: list(v) if isinstance(v, Iterable) and not isinstance(v, str) else v for k, v in choices.items()}
    choices |= {} if data is None else {"calibrate": True, "calibrate_seconds": seconds}
    choices |= {} if recurrent is None else {"recurrent": recurrent}
    layers = {c.paths[0]: {"from": c.before, "to": c.after, "groups": c.groups} for c in changes}
    versions = {"normswap": version("normswap"), "torch": torch.__version__.split("+")[0]}
    return {"format": 1, "target": target.name, "options": choices, "versions": versions, "layers": layers}
