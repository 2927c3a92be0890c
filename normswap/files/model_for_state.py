"""The model of a state dict: built, converted as the recipe in the file says, and given the tensors of the file."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.analysis.copies import clone
from normswap.checkpoints import checkpoint, state_keys
from normswap.errors import FileError, ModelError, OptionError
from normswap.files import model_specs
from normswap.files.recipe import parse_recipe, replay
from normswap.training.parameter_numbers import Parameter

_LEADS_SOMEWHERE = re.compile("path|file|url|dir|pretrained|checkpoint|cfg|cache|weights|hub", re.IGNORECASE)
_MOST_ARGUMENT = 1_000_000


def find_source(
    state: Any, model: model_specs.ModelSource | None, arguments: Mapping[str, Any] | None, where: Path
) -> tuple[model_specs.ModelSource, Mapping[str, Any]]:
    """What makes the model of a state dict, with arguments: what was given, or what its recipe names in a library.

    Raises `FileError` where there is neither; `where` is the file.
    """
    if model is not None:
        return model, arguments or {}
    stored = checkpoint.stored_recipe(state)
    spec = stored.get("model") if isinstance(stored, Mapping) else None
    if isinstance(spec, str) and model_specs.is_spec(spec):
        return spec, _harmless_arguments(stored.get("model_args"), where)
    raise FileError(
        f"{where}: holds a state dict: tensors without their model; give it: load(path, model=factory), or --model SPEC"
    )


def _harmless_arguments(stored: Any, where: object) -> dict[str, Any]:
    """A model's arguments that a file tells, if they are numbers and words that lead nowhere. Raises `FileError`.

    Whoever wrote the file chose them: a path or an address could have the library read any file, or fetch one.
    """
    arguments = dict(stored) if isinstance(stored, Mapping) else {}
    for name, value in arguments.items():
        huge = isinstance(value, int) and abs(value) > _MOST_ARGUMENT
        plain = isinstance(value, bool | int | float | str) and not huge
        if not isinstance(name, str) or not plain or _LEADS_SOMEWHERE.search(name):
            raise FileError(
                f"{where}: its recipe makes the model with {name!r}, which is not taken from a file; give the model: "
                "load(path, model=factory), or --model SPEC"
            )
    return arguments


def models_on_tensors(
    state: Mapping[str, Any], source: model_specs.ModelSource, arguments: Mapping[str, Any], where: object
) -> list[tuple[state_keys.Binding, nn.Module]]:
    """The model on the tensors of `state`, with where they stand there; several where `state` holds copies of it.

    A converted state dict gets a converted model. Raises `FileError` where the tensors do not fit.
    """
    stored = checkpoint.stored_recipe(state)
    recipe = None if stored is None else parse_recipe(stored, where)

    def build() -> nn.Module:
        fresh = clone(source) if isinstance(source, nn.Module) else model_specs.make_model(source, arguments)
        return fresh if recipe is None else replay(fresh, recipe, where)

    # First without memory for the weights, which the file brings. Some models cannot be made so: they compute with
    # their weights as they are made, or hold tensors that no file has. Those are made a second time, with memory.
    for context in (nullcontext(),) if isinstance(source, nn.Module) else (torch.device("meta"), nullcontext()):
        try:
            with context:
                model = build()
        except Exception as error:
            if isinstance(error, OptionError | FileError) or not isinstance(context, torch.device):
                raise
            continue
        filled: list[tuple[state_keys.Binding, nn.Module]] = []
        for binding in state_keys.bind(state, model.state_dict(), where):
            if filled:
                with context:
                    model = build()
            _load_tensors(model, state, binding, where)
            filled.append((binding, model))
        if not any(_lacks_memory(model) for _, model in filled):
            return filled
    raise ModelError(f"{where}: the model that was given has tensors on meta that the file does not hold")


def _lacks_memory(model: nn.Module) -> bool:
    """Whether some tensor of `model`, also one in a plain attribute, still has no memory."""
    held = (part for module in model.modules() for part in (module._parameters, module._buffers, vars(module)))
    return any(isinstance(value, Tensor) and value.is_meta for part in held for value in part.values())


def _load_tensors(model: nn.Module, state: Mapping[str, Any], binding: state_keys.Binding, where: object) -> None:
    """Put the tensors of `state` themselves into `model`, without copies; parameters that it ties stay tied."""
    tied: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                tied.setdefault(id(parameter), []).append((module, name))
    part = OrderedDict((name, state[outer]) for name, outer in binding.names.items())
    # Modules read in `_metadata` of which version their tensors are: it goes along, under the model's own paths.
    known = getattr(state, "_metadata", None)
    known = known if isinstance(known, Mapping) else {}
    outer = {name: binding.saved_module(name) for name, _ in model.named_modules()}
    part._metadata = {name: known[path] for name, path in outer.items() if path in known}  # type: ignore[attr-defined]
    try:
        missing, unexpected = model.load_state_dict(part, strict=False, assign=True)
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:  # hooks of the model's own, or odd tensors
        last = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise FileError(f"{where}: does not fit the model: {last}") from None
    odd = [name for name in missing if not name.endswith("num_batches_tracked")] + list(unexpected)
    if odd:
        raise FileError(f"{where}: does not fit the model: {', '.join(odd[:3])}")
    for places in tied.values():  # `assign` gave each place a parameter of its own
        module, name = places[0]
        for other, other_name in places[1:]:
            other._parameters[other_name] = module._parameters[name]


def parameters_of_model(model: nn.Module) -> tuple[Parameter, ...]:
    """The parameters of a model as an optimizer sees them."""
    return tuple(Parameter(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters())


def parameters_of_state(
    state: Mapping[str, Any], binding: state_keys.Binding, model: nn.Module, parameters: tuple[Parameter, ...]
) -> tuple[Parameter, ...]:
    """What an optimizer of all of `state` sees, in its order: the model's `parameters`, and others by their keys.

    A training script's own module holds the model under a prefix, and may have parameters beside it, such as a loss
    with weights.
    """
    own = {binding.saved_key(p.name): p for p in parameters}
    bound = {*binding.names.values(), *(binding.saved_key(name) for name in model.state_dict())}
    found = []
    for name, value in state.items():
        if name in own:
            found.append(Parameter(name, own[name].shape, own[name].trained))
        elif name not in bound and isinstance(value, Tensor) and value.is_floating_point():
            found.append(Parameter(name, tuple(value.shape)))
    return tuple(found)
