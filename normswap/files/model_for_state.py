"""The model of a state dict: built, converted as the recipe in the file says, and given the tensors of the file."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.analysis.reachable import reachable_tensors
from normswap.analysis.selection import check_model, copy_of
from normswap.checkpoints import state_keys, stored_recipes
from normswap.errors import FileError, ModelError, OptionError
from normswap.files import model_specs
from normswap.files.filling import bind_by_loading, fill, with_what_loading_makes
from normswap.files.random_numbers import check_nothing_is_drawn
from normswap.files.recipe import parse_recipe, replay
from normswap.files.recognized import recognized
from normswap.training.parameter_numbers import Parameter

_LEADS_SOMEWHERE = re.compile("path|file|url|dir|pretrained|checkpoint|cfg|cache|weights|hub", re.IGNORECASE)
_MOST_ARGUMENT = 1_000_000
_MOST_OF_FILE = 2  # times the numbers in a file that a model may have which the file itself names


def find_source(
    state: Any, model: model_specs.ModelSource | None, arguments: Mapping[str, Any] | None, where: Path
) -> tuple[model_specs.ModelSource, Mapping[str, Any]]:
    """What makes the model of a state dict, with arguments: what was given, or a library's model.

    That is the one that the recipe in it names, or that its keys and shapes tell. Raises `FileError` where there is
    none of them, `OptionError` for arguments alone; `where` is the file.
    """
    if model is not None:
        return model, arguments or {}
    if arguments:
        raise OptionError(f"{where}: --model-arg (model_args) needs the model that takes it: give --model (model=) too")
    spec = spec_of_recipe(state)
    if spec is not None:
        arguments = _harmless_arguments(stored_recipes.stored_recipe(state).get("model_args"), where)
        _check_size(state, spec, arguments, where)
        return spec, arguments
    found = recognized(state)
    if found.network is not None:
        return found.network.spec, found.network.arguments
    hint = f". It {found.said}" if found.said else ""
    raise FileError(f"{where}: holds tensors without their model; give the model: load(path, model=make_model){hint}")


def spec_of_recipe(state: Any) -> str | None:
    """The library's model that the recipe in a state dict names; None where it names none."""
    stored = stored_recipes.stored_recipe(state)
    spec = stored.get("model") if isinstance(stored, Mapping) else None
    return spec if isinstance(spec, str) and model_specs.is_spec(spec) else None


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


def _check_size(state: Mapping[str, Any], spec: str, arguments: Mapping[str, Any], where: object) -> None:
    """Raise `FileError` where the model that a file names is far larger than what the file holds."""
    try:
        with torch.device("meta"):  # takes no memory
            model = model_specs.make_model(spec, arguments)
    except (ModelError, OptionError):
        return  # it cannot be made so, or not at all, which is said when it is made
    claimed = sum(parameter.numel() for parameter in model.parameters())
    held = sum(value.numel() for value in state.values() if isinstance(value, Tensor))
    if claimed > _MOST_OF_FILE * held:
        raise FileError(
            f"{where}: its recipe makes a model of {claimed:,} parameters, and the file holds {held:,}; give the "
            "model: load(path, model=factory), or --model SPEC"
        )


def models_on_tensors(
    state: Mapping[str, Any],
    source: model_specs.ModelSource,
    arguments: Mapping[str, Any],
    where: object,
    *,
    to_run: bool = False,
) -> list[tuple[state_keys.Binding, nn.Module]]:
    """The model on the tensors of `state`, with where they stand there; several where `state` holds copies of it.

    A converted state dict gets a converted model, which holds its recipe.

    Raises:
        FileError: the tensors do not fit.
        ModelError: the model is lazy or wrapped; `to_run`, and it holds random numbers that no file has.
    """

    def build() -> nn.Module:
        fresh = _copy(source) if isinstance(source, nn.Module) else model_specs.make_model(source, arguments)
        check_model(fresh)
        paths = [path for path, _ in fresh.named_modules(remove_duplicate=False)]
        stored = stored_recipes.recipe_under(state, state_keys.likely_prefix(state, fresh.state_dict()), paths)
        if stored is None:
            return fresh
        converted = replay(fresh, parse_recipe(stored, where), where)
        stored_recipes.keep_recipe(converted, stored)
        return converted

    model = build()
    try:
        bindings = state_keys.bind(state, model.state_dict(), where)
    except FileError as misfit:
        found = None
        with suppress(FileError):  # what the keys show tells more than where loading stops
            found = bind_by_loading(model, state, where)
        if found is None:
            raise misfit from None
        bindings = [found]
    models = [model, *(build() for _ in bindings[1:])]
    beside = [state_keys.keys_beside(state, bindings, binding.prefix) for binding in bindings]
    bindings = [
        with_what_loading_makes(model, state, binding, keys, where)
        for binding, model, keys in zip(bindings, models, beside, strict=True)
    ]
    for binding, model in zip(bindings, models, strict=True):
        fill(model, state, binding, where)
    if to_run:
        check_nothing_is_drawn(models[0], lambda: _filled(build(), state, bindings[0], where), where)
    return list(zip(bindings, models, strict=True))


def _copy(model: nn.Module) -> nn.Module:
    """A copy of `model` that can be filled. Raises `ModelError` where it would read the original's tensors."""
    copied = copy_of(model)
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    shared = [name for name, tensor in reachable_tensors(copied) if id(tensor) in own]
    if shared:
        raise ModelError(
            f"a copy of the model that was given would read the tensors of the original in {shared[0]}, a function "
            "that holds them; give a factory that makes the model"
        )
    return copied


def _filled(model: nn.Module, state: Mapping[str, Any], binding: state_keys.Binding, where: object) -> nn.Module:
    fill(model, state, binding, where)
    return model


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
