"""Why a layer of a known class must not be converted."""

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from normswap.analysis.holders import held_norms, why_not_one_call
from normswap.analysis.known_norms import known_forwards
from normswap.analysis.trials import own_forward, why_not_linear
from normswap.layers.reparametrized import PLAIN
from normswap.layers.subclasses import WITH_FORMS, as_plain, is_form
from normswap.layers.torch_normalization import normalized_by_torch


def obstacle_of(module: nn.Module, base: type[nn.Module]) -> str:
    """Why a module that behaves as `base`, a known class, must not be converted; "": it may be."""
    own = _own_method(module, base)
    if own and (base not in WITH_FORMS or own != own_forward(type(module)) or own in vars(module)):
        return f"has a {own} of its own, so it may do more than {base.__name__}"
    if (problem := obstacle_in_state(module, base)) or not own:
        return problem
    problem = why_not_like_base(as_plain(module), with_bias=module.bias is not None)
    return problem and f"has a {own} of its own, which {problem}"


def why_not_like_base(layer: nn.Module, with_bias: bool) -> str:
    """Why a layer's weight and bias may not work as those of the base class; "": they do.

    `with_bias` is whether to give it a bias, also where it has none.
    """
    return (why_not_one_call if held_norms(layer) else why_not_linear)(layer, with_bias)


def _own_method(module: nn.Module, base: type[nn.Module]) -> str:
    """The first method by which a module may run otherwise than its base; "": it has none."""
    cls = type(module)
    for method in ("__call__", "_call_impl", "forward", "_conv_forward"):
        if method in vars(module):
            return method
        own = getattr(cls, method, None) is not getattr(base, method, None)
        if own and not (method == "forward" and (cls in known_forwards() or is_form(cls))):
            return method
    return ""


def obstacle_in_state(module: nn.Module, base: Any) -> str:
    """The obstacles beside methods that run."""
    kind: Any = type(module)
    if problem := _obstacle_in_class(kind, base):
        return problem
    named = (*module._parameters.items(), *module._buffers.items())
    for name, tensor in ((name, tensor) for name, tensor in named if tensor is not None):
        if tensor.layout is not torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            return f"has a {name} that is no plain tensor ({kind})"
        if tensor.is_inference():
            return "was made in inference mode, so its tensors cannot be changed"
        if torch._debug_has_internal_overlap(tensor) == 1:
            return "has a tensor whose elements share memory (expand)"
    by_torch = normalized_by_torch(module)
    if parametrize.is_parametrized(module) and not by_torch:
        return "has a parametrization on it"
    if base in PLAIN:
        return ""
    for name in {"weight", "bias"} - by_torch.keys():
        held = name in module._parameters or name in module._buffers
        if not held and isinstance(getattr(module, name, None), torch.Tensor):
            return f"has a {name} that is computed (a pruning mask or the like)"
    return ""


@functools.lru_cache(maxsize=1024)
def _obstacle_in_class(cls: Any, base: Any) -> str:
    """The obstacle that every module of the class `cls` has, which behaves as `base`."""
    if issubclass(cls, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "belongs to an attention layer, which reads its weight directly"
    plain = PLAIN.get(base, base)
    if plain not in WITH_FORMS and (extra := sorted(_own_names(cls, base))):
        return f"has methods of its own ({', '.join(extra[:3])}) beyond {base.__name__}"
    if base in WITH_FORMS and hasattr(cls.__init_subclass__, "__func__"):
        return "has an __init_subclass__ of its own, so no class can be made of it"
    if any("__slots__" in vars(part) and vars(part)["__slots__"] for part in cls.__mro__):
        return "has __slots__, so its class cannot be exchanged"
    return ""


def _own_names(cls: type[nn.Module], base: type[nn.Module]) -> set[str]:
    """Public methods that a subclass adds to a known class, and that an exchanged class would lose."""
    added = [item for c in cls.__mro__[: cls.__mro__.index(base)] for item in vars(c).items()]
    return {name for name, value in added if callable(value) and name[0] != "_" and not hasattr(base, name)}
