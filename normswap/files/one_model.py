"""One model within a file: converted as a module, as tensors whose model is known, or as tensors alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from normswap.analysis.noise import guess_inputs
from normswap.checkpoints import checkpoint, mapped_memory, state_keys
from normswap.checkpoints.checkpoint import RECIPE
from normswap.checkpoints.contents import Entry
from normswap.checkpoints.state_keys import Binding
from normswap.conversion.pipeline import run
from normswap.conversion.request import Request
from normswap.errors import FileError, NormswapError, OptionError, first_line
from normswap.files import model_specs, norms_by_keys, recipe
from normswap.files.file_request import ConvertedEntry, FileRequest
from normswap.files.model_for_state import find_source, models_on_tensors, parameters_of_model, parameters_of_state
from normswap.files.model_specs import ModelSource
from normswap.report.report import Left, Node, Report
from normswap.target_table import NORM_FORMS
from normswap.targets.target import PLAIN_TARGET

BARE_NORMS = tuple(form.name for form in NORM_FORMS.values() if form.on_tensors_alone)
_LARGE = 200_000_000  # parameters: a larger model is not run on noise without being asked to


def convert_entry(entry: Entry, where: Path, request: FileRequest) -> ConvertedEntry:
    if isinstance(entry.value, nn.Module):
        return _convert_whole(entry.value, where, request)
    if request.target is PLAIN_TARGET:
        return _convert_tensors(
            entry, *find_source(entry.value, request.model, request.model_args, where), where, request
        )
    if request.model is None:
        return _convert_bare(entry, where, request)
    if request.eps is not None:
        raise OptionError("--eps is for files without their model; the one that --model makes has its own")
    return _convert_tensors(entry, request.model, request.model_args, where, request)


def _convert_whole(model: nn.Module, where: Path, request: FileRequest) -> ConvertedEntry:
    """A module."""
    if request.model is not None or (request.model_args and not model_specs.is_spec(str(where))):
        raise OptionError(f"--model is for files without their model; {where} holds a {type(model).__name__}")
    if request.eps is not None:
        raise OptionError(f"--eps is for files without their model; {where} has the eps of each norm")
    before, folded = parameters_of_model(model), _folded(model)
    try:
        converted, report = _convert_module(model, request)
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, NormswapError) or model_specs.is_spec(str(where)):
            raise
        raise FileError(f"{where}: its module is damaged, or of another version ({first_line(error)})") from error
    checkpoint.store_recipe(converted, folded if request.target is PLAIN_TARGET else report.recipe)
    return ConvertedEntry(converted, report, ((before, parameters_of_model(converted)),))


def _convert_tensors(
    entry: Entry, model: ModelSource, arguments: Mapping[str, Any], where: Path, request: FileRequest
) -> ConvertedEntry:
    """A state dict whose model is known."""
    named = f"{where}: {entry.name}" if entry.keys else where
    filled = models_on_tensors(entry.value, model, arguments, named)
    before = parameters_of_model(filled[0][1])
    converted = [(binding, *_convert_module(made, request)) for binding, made in filled]
    binding, made, report = converted[0]
    states = [made.state_dict() for _, made, _ in converted]
    value = state_keys.rebuild(entry.value, [binding for binding, _, _ in converted], states)
    previous = checkpoint.stored_recipe(entry.value)
    told = (
        _folded(entry.value)
        if request.target is PLAIN_TARGET
        else _with_source(report.recipe, model, arguments, previous)
    )
    checkpoint.store_recipe(value, told)
    bound = {name for binding, _, _ in converted for name in binding.names.values()}
    beside = [name for name in entry.value if name not in bound]
    listed = ", ".join(beside[:3]) + ("" if len(beside) <= 3 else f" and {len(beside) - 3} more")
    notices = (f"beside the model, kept as it was: {listed}",) if beside else ()
    report = replace(report, recipe=told or report.recipe, warnings=(*report.warnings, *notices))
    after = parameters_of_model(made)
    with_beside = (
        parameters_of_state(entry.value, binding, made, before),
        parameters_of_state(value, binding, made, after),
    )
    return ConvertedEntry(value, report, ((before, after), with_beside))


def _convert_module(model: nn.Module, job: FileRequest) -> tuple[nn.Module, Report]:
    """`run` in place, on noise if there are no inputs, and folded if asked."""
    if job.target is PLAIN_TARGET:
        return run(model, Request(PLAIN_TARGET, may_be_idle=True, inplace=True, release=mapped_memory.release))
    inputs, name = job.example_inputs, "example inputs"
    probe_only = inputs is None and job.input_shape is None and job.options.calibrate is None
    if inputs is None and job.options.calibrate is None:
        inputs, name = noise_for(model, job.input_shape)
    previous = vars(model).get(RECIPE)
    request = Request(
        job.target,
        job.options,
        example_inputs=inputs,
        inputs_name=name,
        drift_only=probe_only,
        inplace=True,
        progress=job.progress,
        release=mapped_memory.release,
    )
    model, report = run(model, request)
    if probe_only and is_large(model) and report.drift is None:
        report = replace(
            report, warnings=(*report.warnings, "drift was not measured on so large a model: give --input-shape")
        )
    made = report.recipe | ({"folded": True} if job.fold else {}) | ({"previous": previous} if previous else {})
    if job.fold:
        job.progress("folding")
        model, baked = run(model, Request(PLAIN_TARGET, may_be_idle=True, inplace=True))
        report = _with_baked(report, baked)
    return model, replace(report, recipe=made)


def is_large(model: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) > _LARGE


def noise_for(model: nn.Module, shape: Sequence[int] | None) -> tuple[Any, str]:
    """Noise that the model may take, and its name; (None, "") where none can be made up, or a large model is not asked to run."""
    if shape is None and is_large(model):
        return None, ""
    return guess_inputs(model, None if shape is None else tuple(shape)) or (None, "")


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


def _convert_bare(entry: Entry, where: Path, job: FileRequest) -> ConvertedEntry:
    """A state dict on its tensors alone."""
    norm, weight = job.target.norm, job.target.weight or job.options.recurrent
    if weight is not None or norm is None or norm.name not in BARE_NORMS:
        needs = "--recurrent" if job.options.recurrent else job.target.name
        raise OptionError(
            f"{where}: holds tensors without their model, which {needs} needs: give it with --model "
            f"(torchvision:NAME, timm:NAME or file.py:factory). {', '.join(BARE_NORMS)} work without"
        )
    eps = norms_by_keys.DEFAULT_EPS if job.eps is None else job.eps
    if not (math.isfinite(eps) and eps >= 0):
        raise OptionError(f"--eps {eps}: must be 0 or more, and finite")
    previous = checkpoint.stored_recipe(entry.value)
    if previous is not None:
        recipe.check(previous, where)
    norms = norms_by_keys.module_of_norms(entry.value, eps)
    converted, report = run(norms, Request(job.target, job.options, inplace=True, progress=job.progress))
    own_keys = Binding({key: key for key in norms_by_keys.norm_keys(entry.value)})
    value = state_keys.rebuild(entry.value, [own_keys], [converted.state_dict()])
    reason = f"{job.target.name} changes no weights of this kind"
    left = [Left(path, "weight", "convolution", reason) for path in norms_by_keys.convolution_paths(entry.value)]
    notices = (f"eps is not in the file: {eps:g} is assumed (--eps); nor are the sizes of maps, and what follows what",)
    made = _with_source(report.recipe, None, {}, previous)
    checkpoint.store_recipe(value, made)
    (parameters_before, buffers_before), (parameters_after, buffers_after) = map(
        norms_by_keys.count_elements_by_keys, (entry.value, value)
    )
    totals = replace(
        report.totals,
        left=report.totals.left + len(left),
        parameters_before=parameters_before,
        parameters_after=parameters_after,
        buffers_before=buffers_before,
        buffers_after=buffers_after,
    )
    report = replace(
        report, left=(*report.left, *left), warnings=(*report.warnings, *notices), totals=totals, recipe=made
    )
    every = norms_by_keys.parameters_by_keys(entry.value), norms_by_keys.parameters_by_keys(value)
    inner = (
        norms_by_keys.under_the_norms_prefix(entry.value, every[0]),
        norms_by_keys.under_the_norms_prefix(entry.value, every[1]),
    )
    return ConvertedEntry(value, report, (every, inner))


def _with_source(
    made: Mapping[str, Any], model: ModelSource | None, arguments: Mapping[str, Any], previous: Any
) -> dict[str, Any]:
    """A recipe with the spec of its model, where that is a library's, and the conversion before it."""
    spec = model if isinstance(model, str) and model_specs.is_spec(model) else None
    source = {"model": spec, "model_args": dict(arguments)} if spec else {}
    return {**made, **source} | ({"previous": previous} if previous else {})


def _folded(value: Any) -> Any:
    made = checkpoint.stored_recipe(value)
    return {**made, "folded": True} if isinstance(made, Mapping) else None
