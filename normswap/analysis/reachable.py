"""Every tensor that code of a model can come by, wherever it stands, and numbers that stand in for some."""

import gc
import types
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_ENDS = (type, types.ModuleType, types.CodeType, types.FrameType, types.BuiltinFunctionType, str, bytes, int, float)
_CONTAINERS = (dict, list, tuple, set)


def reachable_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `model` and of whatever its modules hold, each once, with the path of the attribute to it.

    Among them are those in lists, dicts and objects of any class, in closures, default arguments and partial functions,
    and in modules that are hidden in one of these. What is global or belongs to a class is not.
    """
    return ((name, value) for name, value in reachable_values(model) if isinstance(value, Tensor))


def reachable_values(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What `reachable_tensors` gives, with arrays of numpy, and for each list what numbers it has, as a tuple."""
    seen: set[int] = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if value is None or isinstance(value, _ENDS) or (isinstance(value, _CONTAINERS) and not value):
                continue
            named = value.items() if attribute in ("_parameters", "_buffers") else ((attribute, value),)
            for name, held in named:
                place = f"{path}.{name}" if path else name
                yield from ((place, value) for value in _values_within(held, seen))


def memory_beside(module: nn.Module, content: Any) -> set[int]:
    """The memory, by address, of the tensors in `content` that can be come by without `module`."""
    values = _values_within(content, {id(module)})
    return {memory for value in values if isinstance(value, Tensor) and (memory := memory_of_tensor(value))}


def memory_of_tensor(tensor: Tensor) -> int:
    """The address of what a tensor views; 0 where it views nothing."""
    plain = tensor.layout is torch.strided and not is_lazy(tensor) and not tensor.is_meta
    return tensor.untyped_storage().data_ptr() if plain else 0


def _values_within(value: Any, seen: set[int]) -> Iterator[Any]:
    """What `value` leads to, itself included, without what is in `seen`, which grows."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, _ENDS):
            continue
        seen.add(id(found))
        if type(found) is list and (numbers := tuple(n for n in found if type(n) in (int, float))):
            yield numbers
        if isinstance(found, Tensor | numpy.ndarray):
            yield found
        elif isinstance(found, types.FunctionType):  # without its globals
            waiting += [found.__closure__, found.__defaults__, found.__kwdefaults__, vars(found)]
        else:
            waiting += reversed(gc.get_referents(found))
