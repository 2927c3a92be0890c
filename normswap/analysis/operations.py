"""What the functions and methods that a traced graph calls do to a value, as far as dataflow asks."""

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from normswap.analysis.known_norms import WEIGHT_LAYERS
from normswap.layers.reparametrized import normalize_weight, standardize_weight

WEIGHTED_MODULES = (*WEIGHT_LAYERS, nn.Bilinear, nn.MultiheadAttention, nn.Embedding)
"""Layers with weights, also those that no conversion changes: what lies behind one is no longer the value before it."""
WEIGHTED_FUNCTIONS: set[Any] = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear,
    torch.conv1d, torch.conv2d, torch.conv3d, torch.matmul, torch.bmm, torch.einsum,
}  # fmt: skip
_FUNCTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d, nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d, nn.ConvTranspose3d: F.conv_transpose3d, nn.Linear: F.linear,
}  # fmt: skip
CONVOLUTION_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
REPARAMETRIZATIONS = {standardize_weight, normalize_weight}
FUNCTIONAL_NORMS = {F.batch_norm, F.group_norm, F.layer_norm, F.instance_norm, torch.batch_norm, torch.group_norm}
NON_LINEAR: set[Any] = {
    torch.relu, torch.relu_, torch.tanh, torch.sigmoid, F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.silu,
    F.gelu, F.mish, F.softplus, F.hardswish, F.tanh, F.sigmoid, "relu", "relu_", "tanh", "sigmoid",
}  # fmt: skip
DROPOUTS: set[Any] = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout}
POINTWISE: set[Any] = {
    *NON_LINEAR, *DROPOUTS, operator.add, operator.iadd, operator.sub, operator.mul, torch.add, torch.mul, "add", "mul",
}  # fmt: skip
ADAPTIVE_POOLS: set[Any] = {
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
}  # fmt: skip
RESHAPES: set[Any] = {
    "view", "reshape", "permute", "transpose", "unsqueeze", "expand", "repeat", "size",
    torch.reshape, torch.permute, torch.transpose, torch.unsqueeze, F.interpolate,
}  # fmt: skip
FLATTENINGS: set[Any] = {torch.flatten, "flatten"}
_DIMS_IN_NAME = re.compile(r"(?:conv|transpose|pool)([123])d$", re.IGNORECASE)
_WITH_SPATIAL_DIMS = ("torch.nn.modules.conv", "torch.nn.modules.pooling")
CONCATENATIONS: set[Any] = {torch.cat, torch.concat, torch.concatenate}
_SPATIAL_MEANS = ([2, 3], (2, 3), [-2, -1], (-2, -1), [-1, -2], (-1, -2))
_SHAPE_READS = {"shape", "dtype", "device", "ndim", "size", "dim", "is_cuda"}


def function_of(layer: nn.Module) -> Any:
    """The function that a convolution or a linear layer runs on its input, weight and bias; None for other layers."""
    return next((run for cls, run in _FUNCTIONS.items() if isinstance(layer, cls)), None)


def arguments_by_name(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `function_of` a layer. Transposed convolutions have others behind the bias."""
    return {**dict(zip(CONVOLUTION_ARGUMENTS, args, strict=False)), **kwargs}


def name_of(node: fx.Node) -> str:
    """The name of the function or the method that a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def input_of(node: fx.Node) -> fx.Node | None:
    """The node whose value is the first argument of a call."""
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, fx.Node) else None


def concatenated(node: fx.Node) -> Any:
    """What a concatenation puts together: a list, or the node of a value that is one."""
    return node.args[0] if node.args else node.kwargs.get("tensors")


def reads_shape_only(node: fx.Node) -> bool:
    """Whether a node asks for the shape of a value or the like: no reader of what it holds."""
    if node.op == "call_method":
        return node.target in _SHAPE_READS
    return node.op == "call_function" and node.target is getattr and node.args[1] in _SHAPE_READS


def concatenates_channels(node: fx.Node) -> bool:
    """Whether a node lays values behind each other along their second dimension."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return node.op == "call_function" and node.target in CONCATENATIONS and bool(dim == 1)


def flattens_samples(node: fx.Node) -> bool:
    """Whether a node makes two dimensions of a value's, the first of which stays."""
    if node.target in FLATTENINGS:
        return node.args[1:] in ((1,), (1, -1)) and not node.kwargs
    sizes = node.args[1:] if len(node.args) != 2 else node.args[1]
    if (
        node.op != "call_method"
        or node.target not in ("view", "reshape")
        or node.kwargs
        or not isinstance(sizes, tuple | list)
    ):
        return False
    return len(sizes) == 2 and bool(sizes[1] == -1) and _is_batch_size(sizes[0], input_of(node))


def _is_batch_size(value: Any, of: fx.Node | None) -> bool:
    """Whether a value is the first size of `of`: `x.size(0)`, `x.shape[0]`."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_method":
        return value.target == "size" and bool(value.args == (of, 0))
    shape = value.args[0] if value.target is operator.getitem and value.args[1] == 0 else None
    return isinstance(shape, fx.Node) and reads_shape_only(shape) and input_of(shape) is of and len(shape.args) <= 2


def is_idle_dropout(node: fx.Node, by_mode: bool) -> bool:
    """Whether a node is a call of a dropout that drops nothing in eval mode.

    `by_mode` says that this is a run in train mode, and that there is one in eval mode to tell what is dropped there.
    """
    if node.op != "call_function" or node.target not in DROPOUTS:
        return False
    chance = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    on = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train", True))
    return bool(chance == 0 or on is False or (on is True and by_mode))


def shaping(node: fx.Node, module: nn.Module | None) -> str:
    """The name of a non-linearity or of a dropout that drops something; "" for any other node.

    `module` is the one that the node calls, if any.
    """
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return type(module).__name__ if module.p > 0 else ""
    if module is not None:
        inside = type(module).__module__ == "torch.nn.modules.activation"
        return type(module).__name__ if inside and not isinstance(module, nn.MultiheadAttention) else ""
    if node.target in DROPOUTS:
        chance = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
        return "" if chance == 0 else name_of(node)
    return name_of(node) if node.target in NON_LINEAR else ""


def spatial_dims_of_layer(node: fx.Node | None, module: nn.Module | None) -> int | None:
    """The spatial dimensions that a convolution or a pooling of torch's works on; None for any other node."""
    names = [cls.__name__ for cls in type(module).__mro__ if cls.__module__ in _WITH_SPATIAL_DIMS]
    names += [name_of(node)] if node is not None and node.op == "call_function" else []
    found = [match for name in names if (match := _DIMS_IN_NAME.search(name))]
    return int(found[0][1]) if found else None


def pools_to_one(node: fx.Node, module: nn.Module | None) -> bool | None:
    """Whether a pooling leaves one element a sample and channel; None for any other node."""
    if isinstance(module, nn.modules.pooling._AdaptiveAvgPoolNd | nn.modules.pooling._AdaptiveMaxPoolNd):
        return all_ones(module.output_size)
    if node.target in ADAPTIVE_POOLS and len(node.args) > 1:
        return all_ones(node.args[1])
    return None


def all_ones(size: Any) -> bool:
    return all(length == 1 for length in (size if isinstance(size, tuple | list) else (size,)))


def is_spatial_mean(node: fx.Node) -> bool | None:
    """Whether a mean is one over height and width; None for a node that is no mean."""
    if node.target not in ("mean", torch.mean):
        return None
    return (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")) in _SPATIAL_MEANS
