"""The story for files: read, convert, write."""

from __future__ import annotations

import math
import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normswap import bare, checkpoint, disk, entries, optimizer, probe, recipe, samples, sources
from normswap.checkpoint import RECIPE, Checkpoint
from normswap.convert import Options, Progress, run
from normswap.entries import Binding, Entry
from normswap.errors import FileError, ModelError, NormswapError, OptionError, first_line
from normswap.fitting import fill, parameters_of, source_of, with_others
from normswap.inspect import examine
from normswap.inspection import Inspection, Layer
from normswap.optimizer import Parameter
from normswap.report import Change, Cost, Left, Node, Report
from normswap.sources import Source
from normswap.targets import PLAIN_TARGET, Target, parse_target

EPS = 1e-5
"""Assumed of a norm in a file without its model: torch's default."""
BARE_NORMS = ("gn", "ln", "in", "est", "bcn", "frozen")
_LARGE = 200_000_000  # parameters: a larger model is not run on noise without being asked to


def convert_file(
    path: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str] | None = None,
    *,
    model: Source | None = None,
    model_args: Mapping[str, Any] | None = None,
    weights: str | None = None,
    key: str | None = None,
    eps: float | None = None,
    input_shape: Sequence[int] | None = None,
    example_inputs: Any = None,
    calibrate: Any = None,
    input_size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fold: bool = False,
    format: str | None = None,
    allow: Iterable[str] = (),
    trust: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda phase: None,
    **options: Any,
) -> Report:
    """Convert the model in a file or a folder, or a model of a library, and write it in the same kind; what the CLI calls.

    Args:
        path: a file (whole module, state dict, training checkpoint, safetensors), a folder (distributed checkpoint, weight files
            with an index), or `torchvision:NAME`, `timm:NAME`.
        to: the target, as for `normswap.convert`.
        out: where to write; by default `model.gn-ws.pt` beside the input (`resnet50.gn-ws.pt` here).
        model: what the tensors belong to, where the file holds no module: a spec (`torchvision:NAME`, `timm:NAME`,
            `package.module:factory`, `file.py:factory`), a factory, or a module. `gn`, `ln`, `in` and `frozen` do without.
        model_args: keyword arguments of a model that is built.
        weights: the published weights of a library's model, by name.
        key: which entry of a training checkpoint is the model, where it has none of the usual names.
        eps: of the norms in a file without its model; 1e-5 is assumed.
        input_shape: the shape of an input batch; group counts then regard the sizes of feature maps.
        example_inputs: the same with inputs of your own.
        calibrate: data as for `normswap.convert`, or the path of a folder of pictures or of a file of tensors (`.pt`, `.npy`, `.npz`,
            `.safetensors`); pictures are prepared as the library's model has it.
        input_size, mean, std: how pictures are prepared else: side or (height, width), and a number a channel for values from 0 to 1.
        fold: bake standardized weights in and leave plain torch layers.
        format: write `pt`, `safetensors` or `dcp` instead; of a training checkpoint, the model alone.
        allow, trust: which classes a file may hold; see `normswap.load`.
        overwrite: replace an existing output.
        dry_run: write nothing.
        progress: called with the name of each phase.
        options: those of `normswap.convert`.

    Raises:
        NormswapError: with nothing written.
    """
    started = time.monotonic()
    asked, target = Options(**options), parse_target(to)
    if not sources.is_spec(str(path)):
        checkpoint.check_input(Path(path))
    out = default_out(path, to, format) if out is None else Path(out)
    form = _form(out, format)
    if not dry_run:
        checkpoint.check_format(out, form, overwrite)
    if isinstance(calibrate, str | os.PathLike):
        progress(f"reading {calibrate}")
        known = next((str(s) for s in (path, model) if isinstance(s, str) and sources.is_spec(s)), None)
        calibrate = samples.read_samples(
            calibrate, spec=known, weights=weights, input_size=input_size, mean=mean, std=std
        )  # fmt: skip
    elif calibrate is not None:
        calibrate = samples.batches(calibrate)
    elif input_size or mean or std:
        raise OptionError("--input-size, --mean and --std are for the pictures of --calibrate")
    asked = replace(asked, calibrate=calibrate)
    job = _Job(target, asked, model, model_args or {}, eps, input_shape, example_inputs, fold, progress)
    progress(f"reading {path}")
    if sources.is_spec(str(path)):
        if model is not None or key is not None:
            raise OptionError(f"--model and --key are for files; {path} is a model itself")
        found = Checkpoint(Path(str(path)), "pt", sources.build(str(path), weights, job.arguments))
    else:
        if weights is not None:
            raise OptionError(f"--weights {weights} is for a model of a library; {path} has its own")
        found = checkpoint.read(path, trust=trust, allow=allow, scratch=None if dry_run else out.resolve().parent)
    with _naming(path):
        found, report = _convert(found, key, job)
    if not dry_run:
        progress(f"writing {out}")
        _write(found, out, form, key, overwrite)
    return _with_cost(report, started)


def _with_cost(report: Report, started: float) -> Report:
    return replace(report, cost=Cost(time.monotonic() - started, disk.peak_memory()))


def inspect_file(
    path: str | os.PathLike[str],
    *,
    model: Source | None = None,
    model_args: Mapping[str, Any] | None = None,
    weights: str | None = None,
    key: str | None = None,
    input_shape: Sequence[int] | None = None,
    allow: Iterable[str] = (),
    trust: bool = False,
    progress: Progress = lambda phase: None,
) -> Inspection:
    """`normswap.inspect` on the model in a file or a folder, or on a model of a library; the arguments are those of `convert_file`.

    A file of tensors without their model is inspected as far as its keys tell: the batch norms, and what has the shape of a convolution.
    """
    progress(f"reading {path}")
    path = Path(path)
    if sources.is_spec(str(path)):
        made = sources.build(str(path), weights, model_args or {})
        return _examined(made, input_shape, progress)
    found = checkpoint.read(path, trust=trust, allow=allow)
    entry = entries.find_entries(found.content, key, path)[0]
    with _naming(path):
        if isinstance(entry.value, nn.Module):
            return _examined(entry.value, input_shape, progress)
        if model is None and checkpoint.recipe_of(entry.value) is None:
            seen = examine(bare.norms_of(entry.value, EPS), progress=progress)
            extra = [
                Layer((p,), "weight", "convolution", "", None, None, None, None, "", "")
                for p in bare.convolution_keys(entry.value)
            ]
            return replace(seen, model="tensors without their model", layers=(*seen.layers, *extra))
        source, arguments = source_of(entry.value, model, model_args or {}, path)
        return _examined(fill(entry.value, source, arguments, path)[0][1], input_shape, progress)


def _examined(model: nn.Module, shape: Sequence[int] | None, progress: Progress) -> Inspection:
    large = sum(p.numel() for p in model.parameters()) > _LARGE and shape is None
    inputs, name = (None, "") if large else probe.guess_inputs(model, tuple(shape) if shape else None) or (None, "")
    return examine(model, inputs, name, probe_only=shape is None, progress=progress)


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors about the content of a file name the file."""
    try:
        yield
    except (ModelError, FileError) as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


@dataclass(frozen=True)
class _Job:
    """What to do to each model in a file."""

    target: Target
    options: Options
    model: Source | None
    arguments: Mapping[str, Any]
    eps: float | None = None
    input_shape: Sequence[int] | None = None
    example_inputs: Any = None
    fold: bool = False
    progress: Progress = lambda phase: None


@dataclass(frozen=True)
class _Done:
    """A converted entry: its new value, the report, and what an optimizer may have had as parameters, and will have."""

    value: Any
    report: Report
    ways: tuple[tuple[tuple[Parameter, ...], tuple[Parameter, ...]], ...]


def _convert(found: Checkpoint, key: str | None, job: _Job) -> tuple[Checkpoint, Report]:
    """Every copy of the model in `found`, and what optimizers hold of its parameters."""
    content = found.content
    dones: list[_Done] = []
    copies: list[Change] = []
    made: dict[int, _Done] = {}  # one module may stand under two names
    models = entries.find_entries(content, key, found.path)
    for entry in models:
        place = id(entry.value)
        done = made[place] = made.get(place) or _convert_entry(entry, found.path, job)
        content = entries.put(content, entry, done.value)
        copied = (entry.name,), "copy", "copy of the model", "converted", "converted like the model", done.report.exact
        copies += [Change(*copied)] if dones else []
        dones.append(done)
    first, report = dones[0], dones[0].report
    content, changes, notices = _mend(content, first, flat=found.kind == "dcp")
    held, more, further = _mend(dict(found.optimizers), first)
    if others := entries.other_models(found.content, models):
        further.append(f"not converted, though it looks like a model: {', '.join(others)}; convert it with --key")
    report = replace(
        report, changes=(*report.changes, *copies, *changes, *more), warnings=(*report.warnings, *notices, *further)
    )
    return replace(found, content=content, optimizers=held), report


def _convert_entry(entry: Entry, where: Path, job: _Job) -> _Done:
    if isinstance(entry.value, nn.Module):
        return _convert_whole(entry.value, where, job)
    if job.target is PLAIN_TARGET:
        return _convert_tensors(entry, *source_of(entry.value, job.model, job.arguments, where), where, job)
    if job.model is None:
        return _convert_bare(entry, where, job)
    if job.eps is not None:
        raise OptionError("--eps is for files without their model; the one that --model makes has its own")
    return _convert_tensors(entry, job.model, job.arguments, where, job)


def _convert_whole(model: nn.Module, where: Path, job: _Job) -> _Done:
    """A module."""
    if job.model is not None or (job.arguments and not sources.is_spec(str(where))):
        raise OptionError(f"--model is for files without their model; {where} holds a {type(model).__name__}")
    if job.eps is not None:
        raise OptionError(f"--eps is for files without their model; {where} has the eps of each norm")
    before, folded = parameters_of(model), _folded(model)
    try:
        converted, report = _convert_module(model, job)
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, NormswapError) or sources.is_spec(str(where)):
            raise
        raise FileError(f"{where}: its module is damaged, or of another version ({first_line(error)})") from error
    checkpoint.set_recipe(converted, folded if job.target is PLAIN_TARGET else report.recipe)
    return _Done(converted, report, ((before, parameters_of(converted)),))


def _convert_tensors(entry: Entry, model: Source, arguments: Mapping[str, Any], where: Path, job: _Job) -> _Done:
    """A state dict whose model is known."""
    named = f"{where}: {entry.name}" if entry.keys else where
    filled = fill(entry.value, model, arguments, named)
    before = parameters_of(filled[0][1])
    converted = [(binding, *_convert_module(made, job)) for binding, made in filled]
    binding, made, report = converted[0]
    states = [made.state_dict() for _, made, _ in converted]
    value = entries.rebuild(entry.value, [binding for binding, _, _ in converted], states)
    previous = checkpoint.recipe_of(entry.value)
    told = (
        _folded(entry.value) if job.target is PLAIN_TARGET else _with_source(report.recipe, model, arguments, previous)
    )
    checkpoint.set_recipe(value, told)
    bound = {name for binding, _, _ in converted for name in binding.names.values()}
    beside = [name for name in entry.value if name not in bound]
    listed = ", ".join(beside[:3]) + ("" if len(beside) <= 3 else f" and {len(beside) - 3} more")
    notices = (f"beside the model, kept as it was: {listed}",) if beside else ()
    report = replace(report, recipe=told or report.recipe, warnings=(*report.warnings, *notices))
    after = parameters_of(made)
    with_beside = with_others(entry.value, binding, made, before), with_others(value, binding, made, after)
    return _Done(value, report, ((before, after), with_beside))


def _convert_module(model: nn.Module, job: _Job) -> tuple[nn.Module, Report]:
    """`run` in place, on noise if there are no inputs, and folded if asked."""
    if job.target is PLAIN_TARGET:
        return run(model, PLAIN_TARGET, Options(), may_be_idle=True, inplace=True, release=disk.release)
    inputs, name = job.example_inputs, "example inputs"
    probe_only = inputs is None and job.input_shape is None and job.options.calibrate is None
    large = sum(p.numel() for p in model.parameters()) > _LARGE
    if inputs is None and job.options.calibrate is None and not (large and probe_only):
        shape = None if job.input_shape is None else tuple(job.input_shape)
        inputs, name = probe.guess_inputs(model, shape) or (None, "")
    previous = vars(model).get(RECIPE)
    model, report = run(
        model, job.target, job.options, inputs, name, probe_only=probe_only, inplace=True, progress=job.progress,
        release=disk.release,
    )  # fmt: skip
    if large and probe_only and report.drift is None:
        report = replace(
            report, warnings=(*report.warnings, "drift was not measured on so large a model: give --input-shape")
        )
    made = report.recipe | ({"folded": True} if job.fold else {}) | ({"previous": previous} if previous else {})
    if job.fold:
        job.progress("folding")
        model, baked = run(model, PLAIN_TARGET, Options(), may_be_idle=True, inplace=True)
        report = _with_baked(report, baked)
    return model, replace(report, recipe=made)


def _with_baked(report: Report, baked: Report) -> Report:
    """The report of a conversion whose result was folded at once: layers are what the second step made of them."""
    became = {change.paths: change for change in baked.changes}
    changes = tuple(
        replace(c, after=became[c.paths].after, how=f"{c.how}; {became[c.paths].how}") if c.paths in became else c
        for c in report.changes
    )
    sizes = {name: getattr(baked.totals, name) for name in ("parameters_after", "buffers_after")}
    then = {node.path: node.after for node in baked.modules}
    before = {node.path: node.before for node in report.modules}
    modules = tuple(Node(path, before.get(path, ""), then.get(path, "")) for path in {**before, **then})
    return replace(report, changes=changes, totals=replace(report.totals, **sizes), modules=modules)


def _convert_bare(entry: Entry, where: Path, job: _Job) -> _Done:
    """A state dict on its tensors alone."""
    norm, weight = job.target.norm, job.target.weight or job.options.recurrent
    if weight is not None or norm is None or norm.name not in BARE_NORMS:
        needs = "--recurrent" if job.options.recurrent else job.target.name
        raise OptionError(
            f"{where}: holds tensors without their model, which {needs} needs: give it with --model "
            f"(torchvision:NAME, timm:NAME or file.py:factory). {', '.join(BARE_NORMS)} work without"
        )
    eps = EPS if job.eps is None else job.eps
    if not (math.isfinite(eps) and eps >= 0):
        raise OptionError(f"--eps {eps}: must be 0 or more, and finite")
    previous = checkpoint.recipe_of(entry.value)
    if previous is not None:
        recipe.check(previous, where)
    norms = bare.norms_of(entry.value, eps)
    converted, report = run(norms, job.target, job.options, inplace=True, progress=job.progress)
    names = {
        p + n
        for p in bare.norm_prefixes(entry.value)
        for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        if p + n in entry.value
    }
    value = entries.rebuild(
        entry.value,
        [Binding({name: name for name in [n for n in entry.value if n in names]})],
        [converted.state_dict()],
    )
    reason = f"{job.target.name} changes no weights of this kind"
    left = [Left(path, "weight", "convolution", reason) for path in bare.convolution_keys(entry.value)]
    notices = (f"eps is not in the file: {eps:g} is assumed (--eps); nor are the sizes of maps, and what follows what",)
    made = _with_source(report.recipe, None, {}, previous)
    checkpoint.set_recipe(value, made)
    totals = replace(report.totals, left=report.totals.left + len(left), **_counts(entry.value, value))
    report = replace(
        report, left=(*report.left, *left), warnings=(*report.warnings, *notices), totals=totals, recipe=made
    )
    every = bare.parameters(entry.value), bare.parameters(value)
    inner = bare.within_norms_prefix(entry.value, every[0]), bare.within_norms_prefix(entry.value, every[1])
    return _Done(value, report, (every, inner))


def _counts(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, int]:
    counts = {}
    for when, state in (("before", before), ("after", after)):
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        buffers = sum(value.numel() for name, value in tensors.items() if bare.is_statistic(name))
        counts[f"parameters_{when}"] = sum(value.numel() for value in tensors.values()) - buffers
        counts[f"buffers_{when}"] = buffers
    return counts


def _with_source(
    made: Mapping[str, Any], model: Source | None, arguments: Mapping[str, Any], previous: Any
) -> dict[str, Any]:
    """A recipe with the spec of its model, where that is a library's, and the conversion before it."""
    spec = model if isinstance(model, str) and sources.is_spec(model) else None
    source = {"model": spec, "model_args": dict(arguments)} if spec else {}
    return {**made, **source} | ({"previous": previous} if previous else {})


# ---- optimizers ----


def _mend(content: Any, done: _Done, flat: bool = False) -> tuple[Any, list[Change], list[str]]:
    """`content` with its optimizers' states carried over, a change for each parameter, and what could not be done."""
    mended, carried, lost = (optimizer.mend_flat if flat else optimizer.mend)(content, done.ways)
    changes = [
        Change((parameter,), "optimizer", "state", after, f"{name}: state of parameters that {why}", True)
        for name, state in carried.items()
        for names, after, why in (
            (state.kept, "carried over", "still exist"),
            (state.dropped, "dropped", "no longer exist"),
        )
        for parameter in names
    ]
    reason = "dropped, since nothing tells which parameter each of its states belongs to; start it anew"
    return mended, changes, [f"{name}: {reason}" for name in lost]


# ---- writing, loading, folding ----


def _write(found: Checkpoint, out: Path, form: str | None, key: str | None, overwrite: bool) -> None:
    if form is not None and form != found.kind:
        alone = entries.find_entries(found.content, key, found.path)[0].value
        if form == "pt" and not isinstance(alone, nn.Module):
            tensors = OrderedDict((k, v) for k, v in alone.items() if isinstance(v, Tensor))
            checkpoint.set_recipe(tensors, checkpoint.recipe_of(alone))
            alone = tensors
        elif isinstance(alone, nn.Module):
            alone = _state_of(alone)
        found = replace(found, kind=form, content=alone)
    checkpoint.write(found, out, form, overwrite=overwrite, mapped=not sources.is_spec(str(found.path)))


def _state_of(model: nn.Module) -> Any:
    state = model.state_dict()
    checkpoint.set_recipe(state, checkpoint.recipe_of(model))
    return state


def _form(out: Path, form: str | None) -> str | None:
    """The format that was asked for, or that the name of the output tells."""
    return form or ("safetensors" if out.suffix == ".safetensors" else None)


def default_out(path: str | os.PathLike[str], suffix: str, form: str | None = None) -> Path:
    """`model.gn-ws.pt` beside `model.pt`; `resnet50.gn-ws.pt` in this folder for `torchvision:resnet50`."""
    if sources.is_spec(str(path)):
        return checkpoint.default_out(f"{sources.short_name(str(path))}.pt", suffix, form)
    return checkpoint.default_out(path, suffix, form)


def fold_file(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    model: Source | None = None,
    model_args: Mapping[str, Any] | None = None,
    key: str | None = None,
    allow: Iterable[str] = (),
    trust: bool = False,
    overwrite: bool = False,
) -> Report:
    """Fold the converted model in a file into plain torch layers and save it; `model.fold.pt` by default."""
    if sources.is_spec(str(path)):
        raise OptionError(f"{path} is a model, not a converted file; convert it first: --to fold, or --to gn-ws --fold")
    started = time.monotonic()
    out = default_out(path, "fold") if out is None else Path(out)
    checkpoint.check_format(out, None, overwrite)
    found = checkpoint.read(path, trust=trust, allow=allow, scratch=out.resolve().parent)
    with _naming(path):
        found, report = _convert(found, key, _Job(PLAIN_TARGET, Options(), model, model_args or {}))
    checkpoint.write(found, out, overwrite=overwrite)
    return _with_cost(report, started)


def _folded(value: Any) -> Any:
    made = checkpoint.recipe_of(value)
    return {**made, "folded": True} if isinstance(made, Mapping) else None


def load(
    path: str | os.PathLike[str],
    *,
    model: Source | None = None,
    model_args: Mapping[str, Any] | None = None,
    key: str | None = None,
    trust: bool = False,
    allow: Iterable[str] = (),
) -> nn.Module:
    """The model in a file or folder, converted or not, on the CPU.

    A file of tensors needs `model`, the one before conversion: a factory, a spec (see `convert_file`) or a module, which is
    copied; the recipe in the file converts it before the tensors go in, strictly. A library's model needs none.
    Files are read without running code: classes must be modules of torch, torchvision, timm or
    normswap, or stand in `allow` by full name (`package.module.Class`). `trust` lifts that, and runs whatever
    the file says.

    Raises:
        FileError: no such file, a broken one, or one whose tensors or recipe do not fit the model.
        UnsafeFileError: a class that is not allowed, by name.
    """
    path = Path(path)
    found = checkpoint.read(path, trust=trust, allow=allow)
    entry = entries.find_entries(found.content, key, path)[0]
    if isinstance(entry.value, nn.Module):
        return entry.value
    source, arguments = source_of(entry.value, model, model_args, path)
    try:
        with _naming(path):
            return fill(entry.value, source, arguments, path)[0][1]
    except OptionError as error:
        if model is not None:
            raise
        raise FileError(f"{path}: its recipe names a model that cannot be made: {error}") from None


def save(
    model: nn.Module, path: str | os.PathLike[str], *, report: Report | None = None, overwrite: bool = False
) -> Path:
    """Save `model` whole, with the recipe of `report` as its attribute `normswap_recipe`; `.safetensors`: its state dict.

    Raises `FileError`, with nothing written: the file exists and `overwrite` is not set, its folder cannot be written,
    or the model holds something that cannot be pickled.
    """
    path = Path(path)
    form = _form(path, None)
    checkpoint.check_format(path, form, overwrite)
    had = vars(model).get(RECIPE)
    try:
        if report is not None:
            setattr(model, RECIPE, report.recipe)
        content = _state_of(model) if form == "safetensors" else model
        return checkpoint.write(Checkpoint(path, form or "pt", content), path, overwrite=overwrite)
    finally:
        if report is not None and had is None:
            delattr(model, RECIPE)
        elif report is not None:
            setattr(model, RECIPE, had)
