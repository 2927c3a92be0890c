"""State dicts without their model: norms are told by their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normswap.training.optimizer_states import Parameter

_STATISTICS = ("running_mean", "running_var")
_AFFINE = ("weight", "bias")


class BatchNorm(nn.SyncBatchNorm):
    """A batch norm of which only the tensors are known: it may be of any dimension."""


def norm_prefixes(state: Mapping[str, Any]) -> list[str]:
    """What stands before `running_mean` and `running_var` in the keys of `state`, the dot included, in order."""
    prefixes = [name.removesuffix("running_mean") for name in state if name.endswith("running_mean")]
    return [p for p in prefixes if (not p or p.endswith(".")) and _is_norm(state, p)]


def _is_norm(state: Mapping[str, Any], prefix: str) -> bool:
    found = [state.get(prefix + name) for name in (*_STATISTICS, *_AFFINE)]
    counted = state.get(f"{prefix}num_batches_tracked")
    if counted is not None and not isinstance(counted, Tensor):
        return False
    vectors = [v for v in found if isinstance(v, Tensor) and v.dim() == 1 and _is_plain(v)]
    present = [v for v in found if v is not None]
    complete = all(isinstance(v, Tensor) for v in found[:2])
    return complete and len(vectors) == len(present) and len({len(v) for v in vectors}) == 1 and len(vectors[0]) > 0


def _is_plain(tensor: Tensor) -> bool:
    known = tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return known and tensor.layout is torch.strided and not tensor.is_meta


def norms_of(state: Mapping[str, Any], eps: float) -> nn.Module:
    """A module whose children are the norms in `state`, each under its full path as its name, on the tensors of `state`.

    A lone norm at the root of `state` is returned itself. `eps` is assumed, since no state dict holds it.
    """
    root = nn.Module()
    held: set[int] = set()
    for prefix in norm_prefixes(state):
        channels = len(state[f"{prefix}running_mean"])
        norm = BatchNorm(channels, eps=eps, affine=False, device="meta")
        for name in _AFFINE:
            tensor = state.get(prefix + name)
            if tensor is not None:
                taken = tensor.data_ptr() in held and not tensor.is_meta
                held.add(tensor.data_ptr())
                tensor = nn.Parameter(tensor.detach().clone() if taken else tensor.detach())  # tied values part
            norm.register_parameter(name, tensor)
        norm.affine = norm.weight is not None
        for name in (*_STATISTICS, "num_batches_tracked"):
            norm.register_buffer(name, state.get(prefix + name))
        if not prefix:
            return norm
        root._modules[prefix[:-1]] = norm  # a path is no name that `add_module` takes, but one that state dicts keep
    return root


def convolution_keys(state: Mapping[str, Any]) -> list[str]:
    """The modules whose weight has the dimensions of a convolution's, by path."""
    return [
        name.removesuffix(".weight")
        for name, value in state.items()
        if name.endswith(".weight") and isinstance(value, Tensor) and value.dim() in (3, 4, 5)
    ]


def is_statistic(name: str) -> bool:
    """Whether a key is one of a batch norm's buffers."""
    return name.rpartition(".")[2] in (*_STATISTICS, "num_batches_tracked")


def parameters(state: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """What of a state dict are parameters, as far as keys tell: all but statistics and whole numbers; tied ones once."""
    seen: set[Any] = set()
    found = []
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not is_statistic(name):
            place = (value.data_ptr(), tuple(value.shape), value.stride())
            if place not in seen or not value.numel():
                found.append(Parameter(name, tuple(value.shape)))
            seen.add(place)
    return tuple(found)


def within_norms_prefix(state: Mapping[str, Any], found: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    """Those of `found` under the name that all norms of `state` begin with, if there is one: others are no part of the model."""
    tops = {p.partition(".")[0] for p in norm_prefixes(state)}
    return tuple(p for p in found if p.name.partition(".")[0] in tops) if len(tops) == 1 else found
