"""How many dimensions the values of a traced graph have, by elimination.

Most layers of torch take values without a batch dimension too, linear layers take any number of dimensions, and
BatchNorm1d takes (N, C) as well as (N, C, L). So no class alone tells where the channels of its input are. A number of
dimensions is possible as long as each layer on the way takes such a value: on (N, C, L), linear layers of different
widths cannot each have a norm of their own width behind them, since they leave C as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from normswap.analysis import operations
from normswap.analysis.known_norms import INSTANCE_NORM_BY_DIMS
from normswap.analysis.sites import Site
from normswap.layers.reparametrized import LAYERS, TRANSPOSED

ANY_RANK = frozenset(range(1, 7))
"""The numbers of dimensions that a value may have of which nothing is known."""

_Size = int | None  # of one dimension; None: any
_POOLS = "torch.nn.modules.pooling"
_KEEPING_MODULES = tuple(
    f"torch.nn.modules.{name}" for name in ("activation", "dropout", "padding", "pooling", "upsampling")
)
_KEEPING: set[Any] = {
    *operations.POINTWISE, operator.truediv, operator.neg, torch.exp, torch.abs, torch.sqrt, torch.div, torch.sub,
    "contiguous", "clone", "detach", "float", "double", "half", "to", "sub", "div", "abs", "exp", "sqrt",
}  # fmt: skip
_TURNING: set[Any] = {"transpose", "permute", torch.transpose, torch.permute}
_REDUCING = {"mean", "sum", "amax", "amin", torch.mean, torch.sum, torch.amax, torch.amin}
_READING = {*_REDUCING, "max", "min", "size", "softmax", "unbind", torch.max, torch.min, torch.softmax, F.softmax}


class _Impossible(Exception):
    """A value cannot have the number of dimensions that is tried."""


class Layer(NamedTuple):
    """What a node calls: a module without hooks, and its site if it is one."""

    module: nn.Module | None
    site: Site | None


def possible_ranks(nodes: Sequence[fx.Node], layer_of: Callable[[fx.Node], Layer]) -> dict[fx.Node, frozenset[int]]:
    """For the value of each node, in the order in which they run, the numbers of dimensions that it may have."""
    ranks: dict[fx.Node, frozenset[int]] = {}
    for group in _alike(nodes, layer_of):
        first = group[0]
        made = frozenset(_made(first, layer_of(first), ranks))
        fitting = frozenset(rank for rank in made if _fits(group, rank, layer_of))
        ranks |= dict.fromkeys(group, fitting or ANY_RANK)  # none fits what is not understood
    return ranks


def _alike(nodes: Sequence[fx.Node], layer_of: Callable[[fx.Node], Layer]) -> list[list[fx.Node]]:
    """The nodes in groups whose values have equally many dimensions, as far as their functions tell."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    order = {node: index for index, node in enumerate(nodes)}
    for node in nodes:
        sources = _sources_alike(node, layer_of(node))
        around = {id(groups[source]): groups[source] for source in sources}
        if len(around) > 1 and node.target in operations.CONCATENATIONS:  # which takes values of one rank alone
            merged = sorted((n for group in around.values() for n in group), key=order.__getitem__)
            groups |= dict.fromkeys(merged, merged)
        elif len(around) != 1:  # numbers of dimensions that differ are broadcast
            groups[node] = [node]
            continue
        groups[node] = groups[sources[0]]
        groups[node].append(node)
    found = {id(group): group for group in groups.values()}
    return sorted(found.values(), key=lambda group: order[group[0]])


def _sources_alike(node: fx.Node, layer: Layer) -> list[fx.Node]:
    """The values that have as many dimensions as that of a node, or are broadcast to it; none: it is made anew."""
    if layer.module is not None:
        kind = type(layer.module).__module__
        keeps = kind in _KEEPING_MODULES and not isinstance(layer.module, nn.MultiheadAttention)
        pooled = kind == _POOLS and getattr(layer.module, "return_indices", False)
        site = layer.site
        known = site is not None and site.base is not None and not site.obstacle
        known = known and bool(site.form if site.kind == "norm" else site.layer_kind != "rnn")  # type: ignore[union-attr]
        keeps = keeps or known or type(layer.module) is nn.Identity
        return list(node.all_input_nodes) if keeps and not pooled and len(node.all_input_nodes) == 1 else []
    if node.op not in ("call_function", "call_method"):
        return []
    turned = node.target in _TURNING or node.target in (F.pad, F.interpolate) or _pooled_dims(node) is not None
    sliced = node.target is operator.getitem and _is_sliced(node.args[1])
    if node.target in _KEEPING or node.target in operations.CONCATENATIONS or turned or sliced:
        return list(node.all_input_nodes)
    return []


def _is_sliced(index: Any) -> bool:
    """Whether an index keeps all dimensions: `x[:, :, 1:]`."""
    return isinstance(index, tuple) and all(isinstance(part, slice) for part in index)


def _pooled_dims(node: fx.Node) -> int | None:
    """The spatial dimensions of a pooling that is called as a function."""
    is_pool = node.op == "call_function" and "pool" in operations.name_of(node)
    return operations.spatial_dims_of_layer(node, None) if is_pool else None


# ---- a value that is made anew ----


def _made(node: fx.Node, layer: Layer, ranks: dict[fx.Node, frozenset[int]]) -> Iterable[int]:
    """The numbers of dimensions that the first value of a group may have by the function that gives it."""
    known = [ranks[source] for source in node.all_input_nodes if source in ranks]
    before = known[0] if known else ANY_RANK
    if isinstance(layer.module, nn.Flatten) or node.target in operations.FLATTENINGS:
        default = 1 if layer.module is not None else 0
        start = _argument(node, layer, 1, "start_dim", default)
        end = _argument(node, layer, 2, "end_dim", -1)
        return {start + 1} if end == -1 and isinstance(start, int) and start >= 0 else ANY_RANK
    if node.target in ("view", "reshape", torch.reshape):
        sizes: Any = node.args[1:]
        sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
        return ANY_RANK if len(sizes) == 1 and isinstance(sizes[0], fx.Node) else {len(sizes)}
    if node.target in ("unsqueeze", torch.unsqueeze):
        return {rank + 1 for rank in before} & ANY_RANK
    if node.target in _REDUCING:
        return _reduced(node, before)
    if node.target in _KEEPING and len(known) > 1:  # broadcast
        return {max(left, right) for left in known[0] for right in known[1]}
    if layer.module is None and (dims := operations.spatial_dims_of_layer(node, None)) is not None:
        return {dims + 1, dims + 2}  # a convolution that is called as a function
    return ANY_RANK


def _argument(node: fx.Node, layer: Layer, place: int, name: str, default: Any) -> Any:
    if layer.module is not None:
        return getattr(layer.module, name, default)
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _reduced(node: fx.Node, before: Iterable[int]) -> Iterable[int]:
    dims = _dims_read(node)
    if dims is None or node.kwargs.get("keepdim") or len(node.args) > 2:
        return before if dims is not None and node.kwargs.get("keepdim") is True else ANY_RANK
    return {rank - len(dims) for rank in before if rank > max(dims)} & ANY_RANK or ANY_RANK


def _dims_read(node: fx.Node) -> tuple[int, ...] | None:
    """The dimensions that a function is told to work on; None where it is told none, or a value."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = tuple(dim) if isinstance(dim, tuple | list) else (dim,)
    return dims if all(type(d) is int for d in dims) else None


# ---- a trial ----


def _fits(group: Sequence[fx.Node], rank: int, layer_of: Callable[[fx.Node], Layer]) -> bool:
    """Whether the values of a group can have `rank` dimensions by the sizes that its layers take and give."""
    shapes: dict[fx.Node, list[_Size]] = {}
    try:
        for node in group:
            given = [shapes[source] for source in node.all_input_nodes if source in shapes]
            shapes[node] = _shape(node, layer_of(node), given) if given else [None] * rank
            for user in node.users:
                _check_reader(user, node, rank)
    except _Impossible:
        return False
    return True


def _check_reader(user: fx.Node, node: fx.Node, rank: int) -> None:
    """Raise where a reader asks for a dimension that a value of `rank` dimensions does not have."""
    if operations.input_of(user) is not node:
        return
    needed = 0
    if user.target in ("permute", torch.permute):
        if rank != len(list(_dims_of_reader(user))):
            raise _Impossible
    elif user.target in _READING or user.target in _TURNING:
        needed = max((d + 1 if d >= 0 else -d for d in _dims_of_reader(user)), default=0)
    elif user.target in ("flatten", torch.flatten) and len(user.args) > 1 and type(user.args[1]) is int:
        needed = user.args[1] + 1
    elif user.target is getattr and user.args[1] == "shape":
        asked = [u.args[1] for u in user.users if u.target is operator.getitem]
        needed = max((i + 1 for i in asked if type(i) is int), default=0)
    elif user.target is operator.getitem and isinstance(user.args[1], tuple):
        needed = sum(1 for part in user.args[1] if part is not None and part is not Ellipsis)
    if rank < needed:
        raise _Impossible


def _dims_of_reader(node: fx.Node) -> Iterator[int]:
    for argument in (*node.args[1:], node.kwargs.get("dim")):
        for part in argument if isinstance(argument, tuple | list) else (argument,):
            if type(part) is int:
                yield part


def _shape(node: fx.Node, layer: Layer, given: list[list[_Size]]) -> list[_Size]:
    """The sizes of a node's value from those of what it reads; raises `_Impossible` where it cannot read these."""
    shape = list(given[0])
    if layer.module is not None:
        return _behind_layer(layer, shape)
    if node.target in _TURNING:
        dims = list(_dims_of_reader(node))
        if not all(-len(shape) <= d < len(shape) for d in dims):
            raise _Impossible
        if node.target in ("permute", torch.permute):
            return [shape[d] for d in dims] if len(dims) == len(shape) else [None] * len(shape)
        if len(dims) == 2:
            shape[dims[0]], shape[dims[1]] = shape[dims[1]], shape[dims[0]]
        return shape
    if node.target in operations.CONCATENATIONS:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        common = _together(given, aside=dim if type(dim) is int and -len(shape) <= dim < len(shape) else None)
        return common if type(dim) is int else [None] * len(shape)
    if node.target in _KEEPING:
        return _together(given)
    if (dims_pooled := _pooled_dims(node)) is not None:
        return _spread(shape, dims_pooled, lambda size, i: None)
    if node.target is operator.getitem and _is_sliced(node.args[1]):
        parts: Any = node.args[1]
        return [size if i >= len(parts) or parts[i] == slice(None) else None for i, size in enumerate(shape)]
    return [None] * len(shape)  # padded or resampled


def _together(given: Sequence[Sequence[_Size]], aside: int | None = None) -> list[_Size]:
    """The common sizes of values that are put together: those of 1 are broadcast, the dimension `aside` is free."""
    common: list[_Size] = []
    for sizes in zip(*given, strict=True):
        known = {size for size in sizes if size not in (None, 1)}
        free = aside is not None and len(common) == aside % len(given[0])
        if len(known) > 1 and not free:
            raise _Impossible
        common.append(None if free or not known else known.pop())
    return common


# ---- behind a layer ----


def _behind_layer(layer: Layer, shape: list[_Size]) -> list[_Size]:
    module: Any = layer.module
    site = layer.site
    if isinstance(layer.module, LAYERS["conv"]):
        dims, transposed = len(module.kernel_size), isinstance(layer.module, TRANSPOSED)
        own = site is not None and type(module) is not site.base  # it may pad by itself
        shape = _spread(shape, dims, lambda size, i: None if own else _length_behind(module, size, i, transposed))
        _fit(shape, -dims - 1, module.in_channels)
        shape[-dims - 1] = module.out_channels
    elif isinstance(layer.module, nn.Linear):
        _fit(shape, -1, module.in_features)
        shape[-1] = module.out_features
    elif site is not None and site.kind == "norm":
        _fit_norm(site, shape)
    elif type(module).__module__ == _POOLS:
        dims_pooled = operations.spatial_dims_of_layer(None, module) or 0
        shape = _spread(shape, dims_pooled, lambda size, i: _length_pooled(module, size, i))
    elif type(module).__module__ in ("torch.nn.modules.padding", "torch.nn.modules.upsampling"):
        return [None] * len(shape)
    return shape


def _fit(shape: list[_Size], axis: int, size: int) -> None:
    if not -len(shape) <= axis < len(shape) or shape[axis] not in (None, size):
        raise _Impossible
    shape[axis] = size


def _fit_norm(site: Site, shape: list[_Size]) -> None:
    """Put a norm's channels where it takes them; raise where it does not take a value of so many dimensions."""
    dims, rank = site.spatial_dims, len(shape)
    if site.base is nn.LayerNorm:
        _fit(shape, -1, site.channels)
    elif dims is not None and site.base is INSTANCE_NORM_BY_DIMS.get(dims):
        if rank not in (dims + 1, dims + 2):
            raise _Impossible
        _fit(shape, -dims - 1, site.channels)
    elif dims is not None and rank != dims + 2 and (dims, rank) != (1, 2):
        raise _Impossible
    else:
        _fit(shape, 1, site.channels)


def _spread(shape: list[_Size], dims: int, length: Callable[[_Size, int], _Size]) -> list[_Size]:
    """`shape` behind a layer over its last `dims` dimensions, with a batch dimension before the channels or without."""
    if len(shape) not in (dims + 1, dims + 2):
        raise _Impossible
    sizes = [length(size, i) for i, size in enumerate(shape[-dims:])]
    if any(size is not None and size < 1 for size in sizes):
        raise _Impossible
    return [*shape[:-dims], *sizes]


def _length_behind(conv: Any, size: _Size, i: int, transposed: bool) -> _Size:
    if size is None or (isinstance(conv.padding, str) and conv.padding != "valid"):
        return size
    padding = 0 if isinstance(conv.padding, str) else conv.padding[i]
    reach = conv.dilation[i] * (conv.kernel_size[i] - 1)
    if transposed:
        return int((size - 1) * conv.stride[i] - 2 * padding + reach + conv.output_padding[i] + 1)
    return int((size + 2 * padding - reach - 1) // conv.stride[i] + 1)


def _length_pooled(pool: Any, size: _Size, i: int) -> _Size:
    def setting(name: str, default: Any = None) -> Any:
        value = getattr(pool, name, default)
        return value[i] if isinstance(value, tuple | list) else value

    if hasattr(pool, "output_size"):
        wanted = setting("output_size")
        return wanted if isinstance(wanted, int) else size if wanted is None else None
    plain = isinstance(pool, nn.modules.pooling._MaxPoolNd | nn.modules.pooling._AvgPoolNd)
    if size is None or not plain or getattr(pool, "ceil_mode", False):
        return None
    reach = (setting("dilation", 1) or 1) * (setting("kernel_size") - 1)
    return int((size + 2 * setting("padding", 0) - reach - 1) // setting("stride") + 1)
