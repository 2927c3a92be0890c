"""The API: convert a model, and fold a converted one back into plain torch layers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from normswap.analysis.selection import Pattern
from normswap.calibration import processes
from normswap.calibration.batches import MOST_SAMPLES, Batches, few_examples, input_batches
from normswap.checkpoints import stored_recipes
from normswap.conversion.device import parse_device
from normswap.conversion.pipeline import Conversion, run
from normswap.conversion.request import Request
from normswap.errors import OptionError
from normswap.report.report import Report
from normswap.targets.options import Options, Purpose, Transfer, WeightScope, WeightStart
from normswap.targets.target import FOLD, check_options, parse_target


def convert(
    model: nn.Module,
    to: str | type[nn.Module] | None = None,
    *,
    groups: str | int = "auto",
    purpose: Purpose = "training",
    transfer: Transfer = "match",
    ws: WeightStart = "preserve",
    ws_scope: WeightScope = "normed",
    layers: Sequence[str] = ("conv",),
    recurrent: str | None = None,
    include: Pattern = None,
    exclude: Pattern = None,
    example_inputs: Any = None,
    examples: Any = None,
    calibrate: Any = None,
    calibrate_seconds: float = 60.0,
    device: str | int | torch.device | None = None,
    inplace: bool = False,
) -> Conversion:
    """Swap the normalization of `model`, and standardize its convolutions, keeping what it has learnt.

    Args:
        model: any module; it is left untouched unless `inplace`.
        to: of `normswap.TARGETS`: a norm (`gn`), a weight form (`ws`), or a pair (`gn-ws`); none: `recurrent` alone.
        groups: for targets with groups (`gn`): `auto` (at most 8 groups, at least 4 channels in each; on data fewer
            where these keep more), a number of groups (`32`), or channels a group (`"16c"`).
        purpose: of `auto`: the numbers that fine-tune best (`training`), or that keep most (`use`). For use, and
            on data, `auto` takes an eps that moves each sample's variance towards the data's; the recipe has it.
        transfer: `match` moves the statistics into gain and bias, `copy` keeps these, `reset` makes them 1 and 0.
        ws: `preserve` starts from each filter's own std and mean, exactly; `strict` is the paper's form, not exact.
        ws_scope: `normed` standardizes layers that a norm follows, `all` every one; recurrent ones are always taken.
        layers: whose weights `ws` and `wn` change: some of `conv`, `linear`, `rnn`.
        recurrent: `ln` puts layer normalization into LSTMs, GRUs and their cells (Ba et al. 2016).
        include, exclude: glob patterns on module paths, or a function `(path, module) -> bool`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. Group counts then regard the
            sizes of maps, and the report tells the drift of the output.
        examples: a few inputs in place of `example_inputs`, as `calibrate` takes them; nothing is fitted.
        calibrate: unlabelled data, a few hundred samples: a tensor, a `Dataset`, or any iterable of batches, each as
            the model takes it. Norms without running statistics take the data's, `auto` chooses groups by them, and the
            new norms are fitted to the original's outputs. With torch.distributed, each process gives its share.
        calibrate_seconds: the most time that this takes; 0: no fit. Ctrl-C ends the fit: the best is kept.
        device: where the model is run and fitted, such as `cuda`; the result is where the model was.
        inplace: change `model` itself; nothing changes unless all of it can.

    Returns:
        The converted model, whose state dicts hold the recipe (in `_metadata`) for `normswap.load`; and the report.

    Raises:
        OptionError: an unknown target or option, one that is of no use for the target, a pattern that matches no layer.
        ModelError: nothing to convert, a lazy module without weights, a distributed wrapper.
    """
    batches = None if calibrate is None else _batches_of_all_processes(calibrate)
    rules = groups, purpose, transfer, ws, ws_scope
    options = Options(*rules, layers, recurrent, include, exclude, batches, calibrate_seconds)
    check_options(target := parse_target(to, recurrent), options)
    inputs = _inputs(example_inputs, examples)
    request = Request(target, options, **inputs, inplace=inplace, device=parse_device(device), on_all_processes=True)
    previous = stored_recipes.stored_recipe(model)
    return _with_recipe(*run(model, request), previous)


def _inputs(example_inputs: Any, examples: Any) -> dict[str, Any]:
    """What a `Request` has of inputs."""
    if examples is None:
        return {"example_inputs": example_inputs}
    if example_inputs is not None:
        raise OptionError("examples stand in place of example_inputs; give one of them")
    few, name = few_examples(examples)
    return {"examples": few, "inputs_name": name}


def _with_recipe(model: nn.Module, report: Report, previous: Any) -> Conversion:
    """The conversion of `model`, which holds its recipe from now on; `previous` is that of a conversion before."""
    report = _with_previous(report, previous)
    stored_recipes.keep_recipe(model, report.recipe)
    return Conversion(model, report)


def _with_previous(report: Report, previous: Any) -> Report:
    """`report` whose recipe has that of a conversion before, if there was one."""
    return replace(report, recipe=report.recipe | ({} if previous is None else {"previous": previous}))


def _batches_of_all_processes(data: Any) -> Any:
    share = math.ceil(MOST_SAMPLES / processes.world_size())  # at least one sample of each process
    own = input_batches(data, limit=share)
    return Batches(processes.gather_batches(own), own.further)


def fold(model: nn.Module, *, inplace: bool = False) -> Conversion:
    """The same function in plain torch layers, for deployment: what `normswap fold` and the target `fold` do.

    Norms by running statistics go into the layers around them where that is exact. Standardized and normalized weights
    are baked in, torch's own `weight_norm` and `spectral_norm` too, and a `FrozenBatchNorm` that no layer can take in
    becomes a torch batch norm in eval mode.

    Args:
        model: converted or not; one with nothing to fold comes back as it is.
        inplace: change `model` itself, not a copy.

    Returns:
        A model that does without normswap, and the report.
    """
    previous = stored_recipes.stored_recipe(model)
    plain, report = run(model, Request(FOLD, may_be_idle=True, inplace=inplace))
    stored_recipes.drop_recipes(plain)  # and the hook that puts them into state dicts: plain torch does without
    if report.changes:
        report = _with_previous(report, previous)
    recipe = report.recipe if report.changes else previous
    if recipe is not None:
        stored_recipes.store_recipe(plain, recipe)
    return Conversion(plain, report)
