"""Convolutions of libraries that standardize their weight by themselves, such as timm's and Big Transfer's."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from normswap.analysis.copies import skeleton
from normswap.analysis.operations import CONVOLUTION_ARGUMENTS, arguments_by_name, function_of
from normswap.analysis.tracing import trace
from normswap.analysis.trials import own_forward
from normswap.layers.reparametrized import CONVOLUTIONS

_TOLERANCE = 1e-3  # what a small eps in a library's formula may make of a weight that is scaled


def class_without_standardization(layer: nn.Module) -> type[nn.Module] | None:
    """The class that gives what `layer` does, on the weight that it computes; None where that cannot be shown.

    torch's own convolution, or timm's that pads as TensorFlow does. Its forward is one call of torch's function on its
    input, a weight that is made of its parameters alone, its bias and its settings, and it standardizes each filter.
    """
    base = next((cls for cls in CONVOLUTIONS if isinstance(layer, cls)), None)
    cls: Any = type(layer)
    if base is None or cls is base or own_forward(cls) != "forward" or "forward" in vars(layer):
        return None
    library: Any = sys.modules.get("timm.layers")
    same = library is not None and cls.__module__ == "timm.layers.std_conv" and getattr(layer, "same_pad", False)
    if not same and not _is_one_call(layer):
        return None
    found: Any = library.Conv2dSame if same else base
    return found if _standardizes(layer) else None


def computed_weight(layer: nn.Module) -> Tensor:
    """The weight that a convolution runs with, of the shape of its parameter."""
    return _weight_of_call(layer, {name: p.detach() for name, p in layer.named_parameters()})


def _weight_of_call(layer: Any, parameters: dict[str, Tensor]) -> Tensor:
    sizes = [(size - 1) * step + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    mode = _Recording(function_of(layer))
    with torch.no_grad(), mode:
        torch.func.functional_call(layer, parameters, layer.weight.new_zeros(1, layer.in_channels, *sizes))
    return mode.weights[0]


class _Recording(TorchFunctionMode):
    """Keeps the weights that a function of torch's is called with."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.weights = function, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.function:
            self.weights.append(arguments_by_name(args, kwargs or {})["weight"])
        return func(*args, **(kwargs or {}))


def _standardizes(layer: nn.Module) -> bool:
    """Whether the weight that runs does not depend on each filter's mean and scale."""
    if layer.weight.is_meta:  # type: ignore[union-attr]
        layer = skeleton(layer).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(p.shape, generator=generator).to(p) for name, p in layer.named_parameters()}
    moved = {**given, "weight": 4 * given["weight"] + 1}
    try:
        one, other = (_weight_of_call(layer, parameters).double() for parameters in (given, moved))
    except Exception:  # the forward is anybody's code
        return False
    return bool(one.isfinite().all() and (one - other).norm() <= _TOLERANCE * one.norm())


def _is_one_call(layer: nn.Module) -> bool:
    """Whether a forward is one call of torch's function on its input, what it makes of parameters, and its settings."""
    traced = trace(skeleton(layer), lambda module: False)
    return traced.complete and all(_calls_once(run.graph, layer) for run in traced.graphs)


def _calls_once(graph: fx.Graph, layer: nn.Module) -> bool:
    calls = [node for node in graph.nodes if node.target is function_of(layer)]
    output = next(node for node in graph.nodes if node.op == "output")
    if len(calls) != 1 or output.args[0] is not calls[0]:
        return False
    named = arguments_by_name(calls[0].args, calls[0].kwargs)
    held = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1} | named
    settings = (
        all(held[name] == getattr(layer, name) for name in CONVOLUTION_ARGUMENTS[3:]) and layer.padding_mode == "zeros"
    )
    bias = named.get("bias")
    own_bias = bias is None if layer.bias is None else isinstance(bias, fx.Node) and bias.target == "bias"
    others = [node for node in graph.nodes if node not in (calls[0], output) and node.op != "get_attr"]
    made = [node for node in others if node.op != "placeholder"]
    alone = all(node.op != "call_module" and all(s.op != "placeholder" for s in node.all_input_nodes) for node in made)
    return settings and own_bias and alone and named["input"].op == "placeholder"
