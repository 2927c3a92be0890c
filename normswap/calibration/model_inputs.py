"""Which parts of a batch a model takes as inputs: labels are left out."""

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import numpy
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from normswap.calibration.tensor_files import INPUTS, is_integer


def first_inputs(model: nn.Module, item: Any) -> Any:
    """What to pass to `model` of an item that may hold labels too, in the form that `running.call_model` takes.

    A tuple or list keeps all its parts where the forward requires two arguments or more. Else its first alone counts
    where the forward takes no second, or where the second looks like labels: one number a sample, or integers beside
    floats. A dict loses what the forward does not accept, if what is left is enough.
    """
    parameters = _parameters(model)
    positional = [p for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is Parameter.empty]
    if isinstance(item, Mapping):
        return _accepted_entries(item, parameters, required)
    if not isinstance(item, tuple | list) or isinstance(item, PackedSequence) or len(item) < 2 or len(required) > 1:
        return item
    only_one = len(positional) == 1 and not any(p.kind is Parameter.VAR_POSITIONAL for p in parameters)
    if only_one or (len(item) == 2 and _are_labels(item[1], item[0])):
        return _as_only_argument(item[0], parameters)
    return item


def _parameters(model: nn.Module) -> list[Parameter]:
    try:
        return list(signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # compiled code that shows no signature
        return [Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)]


def _are_labels(second: Any, first: Any) -> bool:
    if isinstance(second, numpy.ndarray | Tensor) and second.ndim > 1:
        floats = isinstance(first, numpy.ndarray | Tensor) and not is_integer(first)
        return floats and is_integer(second)
    if isinstance(second, list | tuple):
        return all(isinstance(label, int | float | str | Mapping) for label in second)
    return isinstance(second, int | numpy.ndarray | Tensor)


def _accepted_entries(item: Mapping[Any, Any], parameters: list[Parameter], required: list[Parameter]) -> Any:
    """The part of a dict that a forward accepts; its only input where a forward of one argument calls it otherwise."""
    names = {p.name for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        return dict(item)
    kept = {name: value for name, value in item.items() if name in names}
    if kept and {p.name for p in required} <= set(kept):
        return kept
    inputs = [name for name in item if str(name).lower() in INPUTS] or list(item)
    return (
        _as_only_argument(item[inputs[0]], parameters) if len(required) == len(inputs) == 1 and not kept else dict(item)
    )


def _as_only_argument(value: Any, parameters: list[Parameter]) -> Any:
    """One argument as `running.call_model` takes it; a dict as keywords where these are the forward's."""
    if isinstance(value, Mapping) and set(value) <= {p.name for p in parameters}:
        return dict(value)
    return (value,) if isinstance(value, Mapping | list | tuple) else value
