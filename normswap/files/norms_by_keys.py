"""Tensors without their model: keys and shapes show which are norms, convolutions and parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normswap.training.parameter_numbers import Parameter

DEFAULT_EPS = 1e-5
"""Assumed of a norm, since no state dict holds it: torch's default."""
_AFFINE = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var")
_BUFFERS = (*_STATISTICS, "num_batches_tracked")


class BatchNorm(nn.SyncBatchNorm):
    """A batch norm of which only the tensors are known: it may be of any dimension."""


def norm_prefixes(state: Mapping[str, Any]) -> list[str]:
    """What stands before `running_mean` and `running_var` in the keys of `state`, the dot included, in order."""
    prefixes = [name.removesuffix("running_mean") for name in state if name.endswith("running_mean")]
    return [p for p in prefixes if (not p or p.endswith(".")) and _is_norm(state, p)]


def _is_norm(state: Mapping[str, Any], prefix: str) -> bool:
    """Whether mean and variance are there, and they and what there is of gain and bias are vectors of one length."""
    found = [state.get(prefix + name) for name in (*_STATISTICS, *_AFFINE)]
    counted = state.get(f"{prefix}num_batches_tracked")
    if counted is not None and not isinstance(counted, Tensor):
        return False
    vectors = [v for v in found if isinstance(v, Tensor) and v.dim() == 1 and _is_plain(v)]
    present = [v for v in found if v is not None]
    complete = all(isinstance(v, Tensor) for v in found[:2])
    return complete and len(vectors) == len(present) and len({len(v) for v in vectors}) == 1 and len(vectors[0]) > 0


def _is_plain(tensor: Tensor) -> bool:
    """Whether arithmetic goes: not of whole numbers or quantized, not sparse, and with memory."""
    known = tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return known and tensor.layout is torch.strided and not tensor.is_meta


def norm_keys(state: Mapping[str, Any]) -> list[str]:
    """The keys of all norms in `state`, in its order."""
    wanted = {prefix + name for prefix in norm_prefixes(state) for name in (*_AFFINE, *_BUFFERS)}
    return [key for key in state if key in wanted]


def module_of_norms(state: Mapping[str, Any], eps: float) -> nn.Module:
    """A module whose children are the norms in `state`, each with its full path as its name, on the tensors of `state`.

    A lone norm at the root of `state` is returned itself.
    """
    root = nn.Module()
    held: set[int] = set()
    for prefix in norm_prefixes(state):
        norm = BatchNorm(len(state[f"{prefix}running_mean"]), eps=eps, affine=False, device="meta")
        for name in _AFFINE:
            tensor = state.get(prefix + name)
            if tensor is not None:
                # Two norms may share a gain. Each gets its own new one, so what they share cannot be written into.
                shared = tensor.data_ptr() in held and not tensor.is_meta
                held.add(tensor.data_ptr())
                tensor = nn.Parameter(tensor.detach().clone() if shared else tensor.detach())
            norm.register_parameter(name, tensor)
        norm.affine = norm.weight is not None
        for name in _BUFFERS:
            norm.register_buffer(name, state.get(prefix + name))
        if not prefix:
            return norm
        root._modules[prefix[:-1]] = norm  # a path is no name that `add_module` takes, but one that state dicts keep
    return root


def convolution_paths(state: Mapping[str, Any]) -> list[str]:
    """The paths of modules whose weight has the dimensions of a convolution's."""
    return [
        name.removesuffix(".weight")
        for name, value in state.items()
        if name.endswith(".weight") and isinstance(value, Tensor) and value.dim() in (3, 4, 5)
    ]


def _is_buffer(name: str) -> bool:
    return name.rpartition(".")[2] in _BUFFERS


def count_elements_by_keys(state: Mapping[str, Any]) -> tuple[int, int]:
    """Elements of all parameters and of all buffers, which are those of batch norms."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    buffers = sum(value.numel() for name, value in tensors.items() if _is_buffer(name))
    return sum(value.numel() for value in tensors.values()) - buffers, buffers


def parameters_by_keys(state: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """The parameters of a state dict, as far as keys tell: all but statistics and whole numbers; tied ones once."""
    seen: set[Any] = set()
    found = []
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not _is_buffer(name):
            memory = (value.data_ptr(), tuple(value.shape), value.stride())
            if memory not in seen or not value.numel():
                found.append(Parameter(name, tuple(value.shape)))
            seen.add(memory)
    return tuple(found)


def under_the_norms_prefix(state: Mapping[str, Any], parameters: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    """Those of `parameters` under the name that the keys of all norms of `state` begin with, if it is one name.

    In the state of a training script's own module, the model stands under one name; what stands under others, such as a
    loss with weights, may not have been given to the optimizer.
    """
    tops = {p.partition(".")[0] for p in norm_prefixes(state)}
    return tuple(p for p in parameters if p.name.partition(".")[0] in tops) if len(tops) == 1 else parameters
