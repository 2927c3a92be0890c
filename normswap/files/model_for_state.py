"""Models to state dicts: a model made for the tensors of a file, and put on them."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normswap.analysis.copies import clone
from normswap.checkpoints import checkpoint, state_keys
from normswap.checkpoints.state_keys import Binding
from normswap.errors import FileError, ModelError, OptionError
from normswap.files import model_specs, recipe
from normswap.files.model_specs import Source
from normswap.training.optimizer_states import Parameter


def source_of(
    state: Any, model: Source | None, arguments: Mapping[str, Any] | None, where: Path
) -> tuple[Source, Mapping[str, Any]]:
    """What makes the model of a state dict: what was given, or the library's model that its recipe names."""
    if model is not None:
        return model, arguments or {}
    made = checkpoint.stored_recipe(state)
    spec = made.get("model") if isinstance(made, Mapping) else None
    if isinstance(spec, str) and model_specs.is_spec(spec):
        return spec, _harmless(made.get("model_args"), where)
    raise FileError(
        f"{where}: holds a state dict: tensors without their model; give it: load(path, model=factory), or --model SPEC"
    )


_DANGEROUS = re.compile("path|file|url|dir|pretrained|checkpoint|cfg|cache|weights|hub", re.IGNORECASE)
_MOST_ARGUMENT = 1_000_000


def _harmless(arguments: Any, where: object) -> dict[str, Any]:
    """A model's arguments that a file tells, if they are numbers and words that lead nowhere. Raises `FileError`."""
    told = dict(arguments) if isinstance(arguments, Mapping) else {}
    for name, value in told.items():
        plain = isinstance(value, bool | int | float | str) and not (
            isinstance(value, int) and abs(value) > _MOST_ARGUMENT
        )
        if not isinstance(name, str) or not plain or _DANGEROUS.search(name):
            raise FileError(
                f"{where}: its recipe makes the model with {name!r}, which is not taken from a file; give the model: "
                "load(path, model=factory), or --model SPEC"
            )
    return told


def fill(
    state: Mapping[str, Any], model: Source, arguments: Mapping[str, Any], where: object
) -> list[tuple[Binding, nn.Module]]:
    """The model, on the tensors of `state`: once for each copy of it there. A converted state dict gets a converted model.

    It is made without memory for its weights where that can be. Raises `FileError` where they do not fit.
    """
    made = checkpoint.stored_recipe(state)

    def build() -> nn.Module:
        built = clone(model) if isinstance(model, nn.Module) else model_specs.make(model, arguments)
        return built if made is None else recipe.replay(built, made, where)

    for context in (nullcontext,) if isinstance(model, nn.Module) else (model_specs.weightless, nullcontext):
        try:
            with context():
                first = build()
        except (OptionError, FileError):
            raise
        except Exception:
            if context is model_specs.weightless:
                continue  # it reads its own weights as it is made
            raise
        bindings = state_keys.bind(state, first.state_dict(), where)
        filled = []
        for index, binding in enumerate(bindings):
            with context():
                fresh = first if index == 0 else build()
            _assign(fresh, state, binding, where)
            filled.append((binding, fresh))
        if not any(model_specs.is_weightless(m) for _, m in filled):
            return filled
    raise ModelError(f"{where}: the model that was given has tensors on meta that the file does not hold")


def _assign(model: nn.Module, state: Mapping[str, Any], binding: Binding, where: object) -> None:
    """Put the tensors of `state` into `model` as they are, parameters that it ties staying tied."""
    tied: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                tied.setdefault(id(parameter), []).append((module, name))
    part = OrderedDict((name, state[outer]) for name, outer in binding.names.items())
    known = getattr(state, "_metadata", None)
    known = known if isinstance(known, Mapping) else {}
    outer = {name: binding.outer(f"{name}.x" if name else "x")[:-1].rstrip(".") for name, _ in model.named_modules()}
    part._metadata = {name: known[place] for name, place in outer.items() if place in known}  # type: ignore[attr-defined]
    try:
        missing, unexpected = model.load_state_dict(part, strict=False, assign=True)
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:  # hooks of the model's own, or odd tensors
        last = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise FileError(f"{where}: does not fit the model: {last}") from None
    odd = [name for name in missing if not name.endswith("num_batches_tracked")] + list(unexpected)
    if odd:
        raise FileError(f"{where}: does not fit the model: {', '.join(odd[:3])}")
    for places in tied.values():
        module, name = places[0]
        for other, other_name in places[1:]:
            other._parameters[other_name] = module._parameters[name]


def parameters_of(model: nn.Module) -> tuple[Parameter, ...]:
    """The parameters of a model as an optimizer sees them."""
    return tuple(Parameter(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters())


def with_others(
    state: Mapping[str, Any], binding: Binding, model: nn.Module, parameters: tuple[Parameter, ...]
) -> tuple[Parameter, ...]:
    """`parameters` of a model under their names in `state`, and with them, in the order of `state`, what may be parameters beside it."""
    own = {binding.outer(p.name): p for p in parameters}
    bound = {*binding.names.values(), *(binding.outer(name) for name in model.state_dict())}
    found = []
    for name, value in state.items():
        if name in own:
            found.append(Parameter(name, own[name].shape, own[name].trained))
        elif name not in bound and isinstance(value, Tensor) and value.is_floating_point():
            found.append(Parameter(name, tuple(value.shape)))
    return tuple(found)
