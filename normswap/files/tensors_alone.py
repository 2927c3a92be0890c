"""A state dict without its model: its norms are converted on their tensors alone."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from normswap.checkpoints import state_keys, stored_recipes
from normswap.conversion.accounting import why_nothing_to_convert
from normswap.conversion.pipeline import run
from normswap.conversion.request import Request
from normswap.errors import ModelError, OptionError
from normswap.files import norms_by_keys
from normswap.files.file_request import ConvertedEntry, FileRequest
from normswap.files.recipe import parse_recipe, with_origin
from normswap.report.report import Left, Report, Totals
from normswap.target_table import NORM_FORMS


def convert_tensors_alone(state: Mapping[str, Any], where: Path, request: FileRequest) -> ConvertedEntry:
    """The norms of `state`, a model in the file `where`, converted; all else stays.

    Raises `OptionError` for a target that needs the model.
    """
    check_without_model(request, where)
    eps = norms_by_keys.DEFAULT_EPS if request.eps is None else request.eps
    if not (math.isfinite(eps) and eps >= 0):
        raise OptionError(f"--eps {eps}: must be 0 or more, and finite")
    previous = stored_recipes.stored_recipe(state)
    if previous is not None:
        parse_recipe(previous, where)  # it goes on into the new file, where it has to be sound
    statistics = norms_by_keys.statistics_that_are_no_norm(state)
    left = [Left(path, "norm", "statistics", why) for path, why in statistics.items()]
    if not norms_by_keys.norm_prefixes(state):
        raise ModelError(f"{where}: {why_nothing_to_convert(request.target, left, request.options)}")
    norms = norms_by_keys.module_of_norms(state, eps)
    options = request.options
    if options.shrinks:  # into one group, and by their own eps: a network that somebody writes for the file has that
        options = replace(options, groups=1)
    converted, report = run(norms, Request(request.target, options, inplace=True, progress=request.progress))
    own_keys = state_keys.Binding({key: key for key in norms_by_keys.norm_keys(state)})
    value = state_keys.rebuild(state, [own_keys], [converted.state_dict()])
    recipe = with_origin(report.recipe, None, {}, previous)
    stored_recipes.store_recipe(value, recipe)
    report = replace(_of_whole_state(report, state, value, left, eps), recipe=recipe, recognized=request.recognized)
    # An optimizer was made for all parameters, or for those of the model and not for what a script has beside it.
    by_keys, under = norms_by_keys.parameters_by_keys, norms_by_keys.under_the_norms_prefix
    pairs = [(by_keys(state, both), by_keys(value, both)) for both in (False, True)]
    pairs.insert(1, (under(state, pairs[0][0]), under(state, pairs[0][1])))
    return ConvertedEntry(value, report, tuple(pairs))


def check_without_model(request: FileRequest, where: Path) -> None:
    """Raise `OptionError` for a target or an option that needs the model of the tensors in the file `where`."""
    norm, options = request.target.norm, request.options
    needs = {
        request.target.name: norm is None or not norm.on_tensors_alone or request.target.weight is not None,
        "--recurrent": options.recurrent is not None,
        "--calibrate": options.calibrate is not None,
        "--examples": request.examples is not None,
        "--input-shape": request.input_shape is not None or request.example_inputs is not None,
        "--device": request.device is not None,
        "--fold": request.fold,
        "--model-arg": bool(request.model_args),
    }
    needing = next((name for name, needed in needs.items() if needed), None)
    if needing is not None:
        able = ", ".join(form.name for form in NORM_FORMS.values() if form.on_tensors_alone)
        line = f"normswap convert {shlex.quote(str(where))} --to {request.target.name} --model"
        remedy = (
            f"the file {request.recognized}"
            if request.recognized
            else f"give it: {line} net.py:make_model, a function in net.py that makes it, or torchvision:NAME, or "
            f"timm:NAME. Without it: --to {able}"
        )
        raise OptionError(f"{where}: holds tensors without their model, which {needing} needs; {remedy}")


def _of_whole_state(
    report: Report, before: Mapping[str, Any], after: Mapping[str, Any], left: Sequence[Left], eps: float
) -> Report:
    """The report of what `run` saw, which is norms alone, as one of the whole state dict, of which `left` stays."""
    old, new = map(norms_by_keys.count_elements_by_keys, (before, after))
    known = report.totals
    totals = Totals(known.norms_changed, known.weights_changed, known.left + len(left), old[0], new[0], old[1], new[1])
    notice = f"the file holds no model: eps {eps:g} is assumed (--eps); with --model, groups also fit the size of maps"
    return replace(report, left=(*report.left, *left), totals=totals, warnings=(*report.warnings, notice))
