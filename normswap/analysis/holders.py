"""Layers that hold a norm and run it behind themselves, such as detectron2's `Conv2d(norm=..., activation=...)`.

Their forward is anybody's code. So it is traced along all of its branches, once as it is, and again with other modules
in the norm's place.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from normswap.analysis.copies import skeleton
from normswap.analysis.known_norms import SAMPLE_NORMS, batch_norms
from normswap.analysis.operations import WEIGHTED_MODULES, arguments_by_name, function_of
from normswap.analysis.tracing import Traced, in_words, trace
from normswap.analysis.trials import Unlike, settings_of
from normswap.layers.subclasses import as_plain

_OWN = ("weight", "bias")


class _Bare(nn.Module):
    """A module with nothing to look at."""


_INSTEAD: tuple[nn.Module, ...] = (
    _Bare(), nn.Identity(), nn.GroupNorm(1, 1), nn.InstanceNorm2d(1), nn.BatchNorm2d(1),
)  # fmt: skip
"""What stands in a norm's place by turns: nothing like it, and what of torch's it may become."""
_COUNTS = {"in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels"}


@dataclass(frozen=True)
class _Holder:
    """A layer without the values of its tensors. Two are equal that differ in how many channels they have, at most."""

    kind: Any
    layer: nn.Module = field(compare=False)
    norms: tuple[str, ...] = field(compare=False)


def held_norms(layer: nn.Module) -> list[str]:
    """The paths of the norms that a layer holds, also of those that were folded away."""
    return [path for path, module in as_plain(layer).named_modules() if path and _is_norm(module)]


def _is_norm(module: nn.Module) -> bool:
    if type(module).__module__.startswith("torch.nn.utils."):  # the formula of a parametrization
        return False
    named = not module._modules and re.search("norm", type(module).__name__, re.IGNORECASE)
    return bool(named) or isinstance(module, (*batch_norms(), *SAMPLE_NORMS, nn.Identity))


def only_called(layer: nn.Module) -> frozenset[str]:
    """Which of `held_norms` a layer's forward only calls, whatever stands there: these can be exchanged.

    Not those that it reads something of, nor those whose class decides what it does.
    """
    norms = held_norms(layer)
    try:
        return _only_called(_without_values(layer, norms)) if norms else frozenset()
    except Unlike:
        return frozenset()


@functools.lru_cache(maxsize=1024)
def _only_called(holder: _Holder) -> frozenset[str]:
    traced = _trace(holder.layer, holder.norms)
    nodes = [node for run in traced.graphs for node in run.graph.nodes]
    called = {node.target for node in nodes if node.op == "call_module"} if traced.complete else set()
    wanted = in_words(traced)
    return frozenset(path for path in called.intersection(holder.norms) if _takes_any(holder, path, wanted))


def _takes_any(holder: _Holder, path: str, wanted: frozenset[str]) -> bool:
    """Whether the forward does what it does, `wanted`, with any module in the place of the norm at `path`."""
    parent = holder.layer.get_submodule(path.rpartition(".")[0])
    name, norm = path.rpartition(".")[2], holder.layer.get_submodule(path)
    try:
        for instead in _INSTEAD:
            parent._modules[name] = instead  # a trace leaves another dict there
            if in_words(_trace(holder.layer, holder.norms)) != wanted:
                return False
    finally:
        parent._modules[name] = norm
    return True


def why_not_one_call(layer: nn.Module, with_bias: bool) -> str:
    """Why a layer that holds norms may use its weight and bias for anything but one convolution or linear map.

    "": it does not. What stands behind that map, the norm and its activation, is none of the weight's business.

    Args:
        layer: a convolution, a transposed one or a linear layer, of a subclass.
        with_bias: whether to give it a bias, also where it has none.
    """
    layer = as_plain(layer)
    if any(isinstance(module, WEIGHTED_MODULES) for path, module in layer.named_modules() if path):
        return "holds further layers"
    if more := {*layer._parameters, *layer._buffers}.difference(_OWN):
        return f"may depend on more than its weight and bias ({', '.join(sorted(more)[:3])})"
    try:
        bare = _without_values(layer, held_norms(layer))
    except Unlike as problem:
        return str(problem)
    if with_bias and layer.bias is None:
        bare.layer._parameters["bias"] = nn.Parameter(torch.empty(1, device="meta"))
        bare = _Holder((bare.kind, "with a bias"), bare.layer, bare.norms)
    return _why_not_one_call(bare)


@functools.lru_cache(maxsize=1024)
def _why_not_one_call(holder: _Holder) -> str:
    traced = _trace(holder.layer, holder.norms)
    if not traced.complete:
        return f"could not be traced ({traced.problem[:100]})"
    run = function_of(holder.layer)
    held = {name for name in _OWN if holder.layer._parameters[name] is not None}
    for graph, *_ in traced.graphs:
        calls = {user for node in graph.nodes if node.op == "get_attr" for user in node.users}
        if len(calls) != 1 or any(call.target is not run for call in calls):
            return "uses its weight or bias elsewhere"
        (call,) = calls
        named = arguments_by_name(call.args, call.kwargs)
        read = {name for name in _OWN if isinstance(node := named.get(name), fx.Node) and node.target == name}
        if read != held or (isinstance(named["input"], fx.Node) and named["input"].op == "get_attr"):
            return "uses its weight or bias elsewhere"
    return ""


def _without_values(layer: Any, norms: Sequence[str]) -> _Holder:
    """The layer to trace, with nothing in its tensors."""
    copied = skeleton(layer)
    tensors: Any
    for module in copied.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    empty = torch.empty_like(tensor, device="meta")
                    tensors[name] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    inner, outer, groups = (getattr(layer, name, 1) for name in ("in_channels", "out_channels", "groups"))
    counts = inner == outer, groups == 1, groups == inner, layer.bias is None
    return _Holder((_without_counts(settings_of(copied)), counts), copied, tuple(norms))


def _without_counts(settings: Any) -> Any:
    cls, attributes, children = settings
    kept = tuple((name, value) for name, value in attributes if name not in _COUNTS)
    return cls, kept, tuple((name, child and _without_counts(child)) for name, child in children)


def _trace(layer: nn.Module, norms: Sequence[str]) -> Traced:
    leaves = {id(layer.get_submodule(path)) for path in norms}
    return trace(layer, lambda module: id(module) in leaves)
