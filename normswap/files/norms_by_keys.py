"""Tensors without their model: keys and shapes show which are norms, convolutions and parameters."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normswap.checkpoints.state_keys import memory_of
from normswap.training.parameter_numbers import Parameter

DEFAULT_EPS = 1e-5
"""Assumed of a norm, since no state dict holds it: torch's default."""
_AFFINE = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var")
_BUFFERS = (*_STATISTICS, "num_batches_tracked")
_OTHER_STATISTICS = (("mean", "var", "std"), ("_mean", "_var", "_std"))
"""What normalizers of observations, rewards and data call their mean, and their variance or standard deviation."""
_COUNTS = ("count", "_count", "running_std")  # what they keep beside these


class BatchNorm(nn.SyncBatchNorm):
    """A batch norm of which only the tensors are known: it may be of any dimension."""


def norm_prefixes(state: Mapping[str, Any]) -> list[str]:
    """What stands before the keys of each batch norm in `state`, the dot included, in order."""
    names = _names_by_prefix(state)
    return [prefix for prefix in _prefixes_of(state, "running_mean") if not _why_no_norm(state, prefix, names)]


def statistics_that_are_no_norm(state: Mapping[str, Any]) -> dict[str, str]:
    """Why a mean and a variance in `state` are not taken for those of a batch norm, by the path of what holds them.

    Policies keep statistics of what they observe, datasets those of their features, under the same or similar names.
    """
    names = _names_by_prefix(state)
    found = {prefix: _why_no_norm(state, prefix, names) for prefix in _prefixes_of(state, "running_mean")}
    for mean, *spreads in _OTHER_STATISTICS:
        for prefix in _prefixes_of(state, mean):
            if any(isinstance(state.get(prefix + spread), Tensor) for spread in spreads):
                found[prefix] = _why_no_norm(state, prefix, names)
    return {prefix.removesuffix("."): reason for prefix, reason in found.items() if reason}


def _prefixes_of(state: Mapping[str, Any], leaf: str) -> list[str]:
    prefixes = [name.removesuffix(leaf) for name in state if name.endswith(leaf)]
    return [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]


def _names_by_prefix(state: Mapping[str, Any]) -> dict[str, list[str]]:
    """The last parts of all keys by what stands before them, the dot included."""
    names: dict[str, list[str]] = defaultdict(list)
    for key in state:
        owner, dot, name = key.rpartition(".")
        names[owner + dot].append(name)
    return names


def _why_no_norm(state: Mapping[str, Any], prefix: str, names: Mapping[str, list[str]]) -> str:
    """Why what stands under `prefix` is no batch norm, if only by its tensors; "" where it is one.

    A batch norm has mean, variance, gain and bias, vectors of one length, and nothing else but the number of batches,
    which files of older versions lack.
    """
    found = {name: state[prefix + name] for name in (*_STATISTICS, *_AFFINE) if prefix + name in state}
    vectors = [v for v in found.values() if isinstance(v, Tensor) and v.dim() == 1 and _is_plain(v)]
    lacking = [name for name in (*_STATISTICS, *_AFFINE) if name not in found]
    if lacking:
        return (
            f"lacks {', '.join(lacking)} that a batch norm has, so it may be statistics of data; "
            "if it is a norm, give its model (--model)"
        )
    if len(vectors) < len(found) or len({len(v) for v in vectors}) > 1 or not len(vectors[0]):
        return "mean, variance, gain and bias are not vectors of one length, of floating point"
    if others := [name for name in names[prefix] if name not in (*_AFFINE, *_BUFFERS)]:
        return f"has {others[0]} beside them, which no batch norm has; if it is a norm, give its model (--model)"
    counted = state.get(f"{prefix}num_batches_tracked")
    return "" if counted is None or isinstance(counted, Tensor) else "its num_batches_tracked is not a tensor"


def _is_plain(tensor: Tensor) -> bool:
    """Whether arithmetic goes: not of whole numbers or quantized, not sparse, and with memory."""
    known = tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return known and tensor.layout is torch.strided and not tensor.is_meta


def norm_keys(state: Mapping[str, Any]) -> list[str]:
    """The keys of all norms in `state`, in its order."""
    wanted = {prefix + name for prefix in norm_prefixes(state) for name in (*_AFFINE, *_BUFFERS)}
    return [key for key in state if key in wanted]


def module_of_norms(state: Mapping[str, Any], eps: float) -> nn.Module:
    """A module whose children are the norms in `state`, each with its full path as its name, on its statistics.

    A lone norm at the root of `state` is returned itself.
    """
    root, flat = nn.Module(), _behind_linear_layers(state)
    shared: dict[Any, nn.Module] = {}
    for prefix in norm_prefixes(state):
        memory = tuple(memory_of(state.get(prefix + name)) for name in (*_AFFINE, *_BUFFERS))
        if memory in shared:  # one norm under two names
            root._modules[prefix[:-1]] = shared[memory]
            continue
        kind = nn.BatchNorm1d if prefix in flat else BatchNorm
        norm = kind(len(state[f"{prefix}running_mean"]), eps=eps, affine=False, device="meta")
        for name in _AFFINE:
            tensor = state.get(prefix + name)
            if tensor is not None:
                # Two norms, or two models of one file, may share a gain: it cannot be written into.
                tensor = nn.Parameter(tensor.detach().clone())
            norm.register_parameter(name, tensor)
        norm.affine = norm.weight is not None
        for name in _BUFFERS:
            norm.register_buffer(name, state.get(prefix + name))
        if not prefix:
            return norm
        if None not in memory[len(_AFFINE) : -1]:
            shared[memory] = norm
        root._modules[prefix[:-1]] = norm  # a path is no name that `add_module` takes, but one that state dicts keep
    return root


def _behind_linear_layers(state: Mapping[str, Any]) -> set[str]:
    """What stands before the keys of norms whose input has one element a channel, as far as the order of keys tells: a
    matrix stands before them, with as many outputs as they have channels.
    """
    found, weight = set(), None
    for key, value in state.items():
        owner, dot, name = key.rpartition(".")
        if name == "running_mean" and weight is not None and weight.dim() == 2 and len(weight) == len(value):
            found.add(owner + dot)
        elif name.startswith("weight") and isinstance(value, Tensor) and value.dim() > 1:
            weight = value
    return found


def convolution_paths(state: Mapping[str, Any]) -> list[str]:
    """The paths of modules whose weight has the dimensions of a convolution's."""
    return [
        name.removesuffix(".weight")
        for name, value in state.items()
        if name.endswith(".weight") and isinstance(value, Tensor) and value.dim() in (3, 4, 5)
    ]


def _buffer_keys(state: Mapping[str, Any], of_norms: bool = False) -> set[str]:
    """The keys of statistics, `of_norms` alone or of whatever else too."""
    of_any_norm = {key for key in state if key.rpartition(".")[2] in _BUFFERS}
    if of_norms:
        return of_any_norm
    others = [f"{path}." if path else "" for path in statistics_that_are_no_norm(state)]
    names = {name for names in (*_OTHER_STATISTICS, _COUNTS) for name in names}
    return of_any_norm | {prefix + name for prefix in others for name in names}


def count_elements_by_keys(state: Mapping[str, Any]) -> tuple[int, int]:
    """Elements of parameters and of buffers: statistics, whole numbers, gain and shift of standardized weights."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    statistics = _buffer_keys(state)

    def is_buffer(name: str) -> bool:
        fixed = any(name.endswith(end) and name.removesuffix(end) in tensors for end in ("_gain", "_shift"))
        value = tensors[name]
        return fixed or name in statistics or not (value.is_floating_point() or value.is_complex())

    buffers = sum(tensors[name].numel() for name in tensors if is_buffer(name))
    return sum(value.numel() for value in tensors.values()) - buffers, buffers


def parameters_by_keys(state: Mapping[str, Any], with_statistics: bool = False) -> tuple[Parameter, ...]:
    """The parameters of a state dict, as far as keys tell: all but statistics and whole numbers; tied ones once.

    `with_statistics`: those that are no norm's count as parameters, which some normalizers keep them as.
    """
    seen: set[Any] = set()
    found, buffers = [], _buffer_keys(state, of_norms=with_statistics)
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and name not in buffers:
            memory = memory_of(value)
            if memory is None or memory not in seen:
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
