"""Weights that torch itself normalizes, by `weight_norm` and `spectral_norm`, as hooks and as parametrizations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook
from torch.nn.utils.weight_norm import WeightNorm

from normswap.layers.reparametrized import weight_names

_TENSORS = {WeightNorm: ("g", "v"), SpectralNorm: ("orig", "u", "v")}
"""What a hook keeps in the layer instead of a weight, behind its name and `_`."""
_DIRECTIONS = {WeightNorm: "v", SpectralNorm: "orig"}
"""Which of these has the weight's shape, and is its successor."""
_PARAMETRIZATIONS = (parametrizations._WeightNorm, parametrizations._SpectralNorm)
_HOOKS = (*_TENSORS, SpectralNormStateDictHook, SpectralNormLoadStateDictPreHook)
_HOOK_SETS = ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


def normalized_by_torch(layer: nn.Module) -> dict[str, Any]:
    """The weights of a convolution, linear or recurrent layer that torch normalizes, with the hook or parametrization.

    None where something else computes tensors of the layer, too.
    """
    if not layer._forward_pre_hooks and not layer._modules:
        return {}
    hooks: Iterable[Any] = layer._forward_pre_hooks.values()
    found: dict[str, Any] = {hook.name: hook for hook in hooks if type(hook) in _TENSORS}
    if parametrize.is_parametrized(layer):
        lists: Any = layer.parametrizations
        steps = [step for steps in lists.values() for step in steps]
        if isinstance(layer, nn.RNNBase) or any(type(step) not in _PARAMETRIZATIONS for step in steps):
            return {}
        found |= lists.items()
    return found if found.keys() <= set(weight_names(layer)) else {}


def kind_of_normalization(layer: nn.Module) -> str:
    """`weight_norm` or `spectral_norm` for a layer that torch normalizes; "" for any other."""
    found = normalized_by_torch(layer).values()
    names = {type(step).__name__ for by in found for step in ([by] if type(by) in _TENSORS else by)}
    return " and ".join(sorted({"spectral_norm" if "Spectral" in name else "weight_norm" for name in names}))


def computed_by_torch(layer: nn.Module, name: str) -> Tensor:
    """The weight called `name` that the layer runs with in eval mode."""
    by = normalized_by_torch(layer)[name]
    if isinstance(by, SpectralNorm):
        return by.compute_weight(layer, do_power_iteration=False).detach()
    if isinstance(by, WeightNorm):
        return by.compute_weight(layer).detach()  # type: ignore[no-any-return]
    computed: Tensor = _in_eval_mode(by)()
    return computed.detach()


def _in_eval_mode(module: nn.Module) -> Any:
    """`module` on the same tensors, in eval mode; the one that is given stays in its own, for others who run it."""
    view: Any = object.__new__(type(module))
    inner = {name: child and _in_eval_mode(child) for name, child in module._modules.items()}
    view.__dict__ = {**vars(module), "training": False, "_modules": inner}
    return view


def without_normalization(layer: nn.Module) -> nn.Module:
    """`layer` as torch had it before: of its plain class, with a weight and no hooks, on the same tensors.

    Where the weight was is what has its shape, `weight_v` or the like; its value is `computed_by_torch`.
    """
    normalized = normalized_by_torch(layer)
    parametrized = parametrize.is_parametrized(layer)
    gone = {f"{name}_{end}" for name, by in normalized.items() for end in _TENSORS.get(type(by), ())}
    held = {name: _direction(layer, name, by) for name, by in normalized.items()}
    plain: Any = object.__new__(type(layer).__mro__[1] if parametrized else type(layer))
    plain.__dict__ = {
        **{name: value for name, value in vars(layer).items() if name not in normalized},
        "_parameters": held | {name: p for name, p in layer._parameters.items() if name not in gone},
        "_buffers": {name: b for name, b in layer._buffers.items() if name not in gone},
        "_modules": {name: m for name, m in layer._modules.items() if not parametrized or name != "parametrizations"},
        **{name: _not_torchs(getattr(layer, name)) for name in _HOOK_SETS},
    }
    return plain  # type: ignore[no-any-return]


def _direction(layer: nn.Module, name: str, by: Any) -> nn.Parameter:
    if type(by) in _DIRECTIONS:
        tensor = getattr(layer, f"{name}_{_DIRECTIONS[type(by)]}")
    else:
        tensor = by.original if by.is_tensor else by.original1
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def _not_torchs(hooks: dict[int, Any]) -> OrderedDict[int, Any]:
    """Those of a module's hooks that have nothing to do with torch's normalization."""
    return OrderedDict((key, hook) for key, hook in hooks.items() if not is_torchs_hook(hook))


def is_torchs_hook(hook: Any) -> bool:
    """Whether a hook of a module is part of torch's normalization of its weights."""
    inner = getattr(hook, "hook", hook)
    renames = getattr(inner, "__qualname__", "").startswith("weight_norm.<locals>")
    return type(inner) in _HOOKS or (renames and inner.__module__ == parametrizations.__name__)
