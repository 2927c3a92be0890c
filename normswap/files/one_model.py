"""One model in a file: converted as a module, as tensors whose model is known, or as tensors alone."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from normswap.analysis.noise import guess_inputs
from normswap.checkpoints import contents, mapped_memory, state_keys, stored_recipes
from normswap.conversion.accounting import count_elements
from normswap.conversion.pipeline import Conversion, run
from normswap.conversion.request import Request
from normswap.errors import FileError, NormswapError, OptionError, first_line
from normswap.files import model_specs, norms_by_keys
from normswap.files.file_request import ConvertedEntry, FileRequest
from normswap.files.model_for_state import (
    find_source,
    models_on_tensors,
    parameters_of_model,
    parameters_of_state,
    spec_of_recipe,
)
from normswap.files.recipe import check_plain_data, with_origin
from normswap.files.recognized import recognized
from normswap.files.tensors_alone import check_without_model, convert_tensors_alone
from normswap.report.report import Left, Node, Report
from normswap.targets.target import FOLD, PLAIN_TARGET

_LARGE = 200_000_000  # parameters: a larger model is not run on noise without being asked to


def convert_entry(entry: contents.Entry, where: Path, request: FileRequest) -> ConvertedEntry:
    """The model at `entry` of the file `where`, converted in the way that what is there allows."""
    if isinstance(entry.value, nn.Module):
        return _convert_whole_module(entry.value, where, request)
    if _goes_alone(entry, request):
        return convert_tensors_alone(entry.value, where, request)
    if request.eps is not None:
        raise OptionError("--eps is for files without their model; the one that --model makes has its own")
    return _convert_state_dict(entry, where, request)


def completed_request(entries: Sequence[contents.Entry], where: Path, request: FileRequest) -> FileRequest:
    """`request` with the model that keys and shapes of the first entry tell, where nothing else says which it is.

    Raises `OptionError`, before any data is read, where tensors are without the model that `request` needs.
    """
    request = _with_recognized_model(entries, request)
    if any(_goes_alone(entry, request) for entry in entries):
        if request.target is FOLD:
            raise OptionError(
                f"{where}: holds tensors without their model, which fold needs; {_to_give(request, where)}"
            )
        check_without_model(request, where)
    return request


def _to_give(request: FileRequest, where: Path) -> str:
    """Where the model of a file comes from that is to be folded."""
    if request.recognized:
        return f"the file {request.recognized}"
    command = f"normswap fold {shlex.quote(str(where))} --model net.py:make_model"
    return f"give it: {command}, a function in net.py that makes it, or torchvision:NAME, or timm:NAME"


def _with_recognized_model(entries: Sequence[contents.Entry], request: FileRequest) -> FileRequest:
    given = request.model is not None or request.model_args or request.eps is not None
    if given or any(isinstance(entry.value, nn.Module) for entry in entries):
        return request
    found = recognized(entries[0].value)
    request = replace(request, recognized=found.said)
    if found.network is None:
        return request
    return replace(request, model=found.network.spec, model_args=found.network.arguments)


def _goes_alone(entry: contents.Entry, request: FileRequest) -> bool:
    """Whether an entry is converted on its tensors alone."""
    if isinstance(entry.value, nn.Module) or request.model is not None:
        return False
    return request.eps is not None or spec_of_recipe(entry.value) is None


def _convert_whole_module(model: nn.Module, where: Path, request: FileRequest) -> ConvertedEntry:
    if request.model is not None or (request.model_args and not model_specs.is_spec(str(where))):
        raise OptionError(f"--model is for files without their model; {where} holds a {type(model).__name__}")
    if request.eps is not None:
        raise OptionError(f"--eps is for files without their model; {where} has the eps of each norm")
    before, previous = parameters_of_model(model), stored_recipes.stored_recipe(model)
    check_plain_data(previous, where)
    try:
        converted, report = _convert_in_place(model, request)
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
        # A module out of a file may lack any attribute that its class has today; one that a library made does not.
        if isinstance(error, NormswapError) or model_specs.is_spec(str(where)):
            raise
        raise FileError(f"{where}: its module is damaged, or of another version ({first_line(error)})") from error
    if model_specs.is_spec(str(where)):  # the file may become one of tensors alone
        report = replace(report, recipe=with_origin(report.recipe, str(where), request.model_args, None))
    stored_recipes.store_recipe(converted, report.recipe)
    return ConvertedEntry(converted, report, ((before, parameters_of_model(converted)),))


def _convert_state_dict(entry: contents.Entry, where: Path, request: FileRequest) -> ConvertedEntry:
    """A state dict by way of its model, once for each copy of the model in it."""
    state = entry.value
    source, arguments = find_source(state, request.model, request.model_args, where)
    try:
        models = models_on_tensors(state, source, arguments, f"{where}: {entry.name}" if entry.keys else where)
    except OptionError as error:
        if request.model is not None:
            raise
        raise FileError(f"{where}: its recipe names a model that cannot be made: {error}") from None
    before = parameters_of_model(models[0][1])
    converted = [(binding, *_convert_in_place(model, request)) for binding, model in models]
    bindings = [binding for binding, _, _ in converted]
    value = state_keys.rebuild(state, bindings, [model.state_dict() for _, model, _ in converted])
    binding, model, report = converted[0]
    recipe = with_origin(report.recipe, source, arguments, stored_recipes.stored_recipe(models[0][1]))
    stored_recipes.store_recipe(value, recipe)
    report = _with_what_stays_beside(report, state, state_keys.keys_beside(state, bindings))
    report = replace(report, recipe=recipe, recognized=request.recognized)
    # An optimizer was made for the model's parameters, or for those of a script's own module that holds the model.
    after = parameters_of_model(model)
    of_script = [parameters_of_state(which, binding, model, own) for which, own in ((state, before), (value, after))]
    return ConvertedEntry(value, report, ((before, after), (of_script[0], of_script[1])))


def _with_what_stays_beside(report: Report, state: Mapping[str, Any], keys: Sequence[str]) -> Report:
    """`report` with what it does not know of: the `keys` of `state` that belong to no copy of the model."""
    if not keys:
        return report
    notice = f"beside the model, kept as it was: {state_keys.first_names(keys)}"
    norms = norms_by_keys.norm_prefixes({key: state[key] for key in keys})
    reason = "the model does not have it"
    left = [Left(prefix.removesuffix("."), "norm", "batch norm", reason) for prefix in norms]
    totals = replace(report.totals, left=report.totals.left + len(left))
    return replace(report, left=(*report.left, *left), totals=totals, warnings=(*report.warnings, notice))


# ---- a module ----


def _convert_in_place(model: nn.Module, request: FileRequest) -> Conversion:
    """`model` itself converted, and folded if asked; run on noise where there are no inputs."""
    previous = stored_recipes.stored_recipe(model)
    asked = Request(
        request.target, request.options, **_inputs_for(model, request),
        device=request.device, inplace=True, progress=request.progress, release=mapped_memory.release
    )  # fmt: skip
    model, report = run(model, asked)
    recipe = with_origin(report.recipe | ({"folded": True} if request.fold else {}), None, {}, previous)
    if request.fold:
        request.progress("folding")
        model, folding = run(model, Request(PLAIN_TARGET, may_be_idle=True, inplace=True))
        report = _with_folding(report, folding)
    return Conversion(model, replace(report, recipe=recipe))


def _inputs_for(model: nn.Module, request: FileRequest) -> dict[str, Any]:
    """What a `Request` has of inputs: those that were given, calibration data, or else noise."""
    if request.examples is not None:
        examples, name = request.examples
        return {"examples": examples, "inputs_name": name}
    if request.example_inputs is not None or request.options.calibrate is not None:
        return {"example_inputs": request.example_inputs}
    noise, name = noise_for(model, request.input_shape)
    how = "guessed" if request.input_shape is None else "asked"
    return {"example_inputs": noise, "inputs_name": name, "noise": how}


def _with_folding(report: Report, folding: Report) -> Report:
    """The report of a conversion whose result was folded at once: layers are what the second step made of them."""
    second = {change.paths: change for change in folding.changes}
    changes = [
        replace(c, after=second[c.paths].after, how=f"{c.how}; {second[c.paths].how}") if c.paths in second else c
        for c in report.changes
    ]
    sizes = {name: getattr(folding.totals, name) for name in ("parameters_after", "buffers_after")}
    before = {node.path: node.before for node in report.modules}
    after = {node.path: node.after for node in folding.modules}
    modules = [Node(path, before.get(path, ""), after.get(path, "")) for path in {**before, **after}]
    idle = () if folding.changes else ("--fold had nothing to do: the result consists of torch's own layers already",)
    return replace(
        report, changes=tuple(changes), totals=replace(report.totals, **sizes), modules=tuple(modules),
        notes=(*report.notes, *idle),
    )  # fmt: skip


def noise_for(model: nn.Module, shape: Sequence[int] | None) -> tuple[Any, str]:
    """Noise that the model may take, of the shape of a batch, and its name.

    (None, "") where none can be made up, and for a large model that is not asked to run by giving a shape.
    """
    if shape is None and _is_large(model):
        return None, ""
    return guess_inputs(model, None if shape is None else tuple(shape)) or (None, "")


def _is_large(model: nn.Module) -> bool:
    return count_elements(model)[0] > _LARGE
