"""Which norms of a traced graph see several samples in their channels: `split(x.view(n // s, c * s, h, w))`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from normswap.analysis import operations

_VIEWS = ("view", "reshape", torch.reshape)
_DIVISIONS = (operator.floordiv, operator.truediv, torch.div, "div", "__floordiv__", "__truediv__")
_PARTINGS = ("chunk", "split", "tensor_split", torch.chunk, torch.split, torch.tensor_split)
_PRODUCTS = (operator.mul, torch.mul, "mul")


def holds_samples_in_channels(
    node: fx.Node | None, channels: int, channels_before: Callable[[fx.Node], int | None]
) -> bool:
    """Whether the value of a node, which a norm of so many channels reads, is a view with samples in the channels.

    `channels_before` tells of a node how many channels the layer before it gives, None where that is not known.
    """
    while node is not None and node.target in ("contiguous", "clone"):
        node = operations.input_of(node)
    if node is not None and node.target in operations.CONCATENATIONS:
        return _joins_parts_of_batch(node)
    if node is None or node.target not in _VIEWS:
        return False
    sizes: Any = node.args[1:]
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
    if len(sizes) < 2:
        return False
    batch, inner = sizes[:2]
    if _grows_with_batch(inner) or (_grows_with_batch(batch) and _is_divided(batch)):
        return True
    if type(batch) is int and batch > 0:
        return bool(inner == -1)
    before = channels_before(node)
    more = before is not None and channels > before and channels % before == 0
    return batch == -1 and len(sizes) > 2 and more


def _joins_parts_of_batch(node: fx.Node) -> bool:
    """Whether parts of the batch are put together as channels: `torch.cat(x.chunk(2), 1)`."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    parts = operations.concatenated(node)
    first = parts[0] if isinstance(parts, tuple | list) and parts else parts
    if isinstance(first, fx.Node) and first.target is operator.getitem:
        first = first.args[0]
    if dim != 1 or not isinstance(first, fx.Node) or first.target not in _PARTINGS:
        return False
    return bool((first.args[2] if len(first.args) > 2 else first.kwargs.get("dim", 0)) == 0)


def _grows_with_batch(size: Any) -> bool:
    """Whether a size has the number of samples as a factor."""
    if not isinstance(size, fx.Node):
        return False
    if size.target == "size":
        return bool(size.args[1:] == (0,))
    if size.target is operator.getitem:
        source = size.args[0]
        of_shape = isinstance(source, fx.Node) and (source.target is getattr or source.target == "size")
        return of_shape and bool(size.args[1] == 0)
    factors = size.args if size.target in _PRODUCTS else size.args[:1] if size.target in (*_DIVISIONS, int) else ()
    return any(_grows_with_batch(factor) for factor in factors)


def _is_divided(size: Any) -> bool:
    """Whether there is a division in an expression."""
    if not isinstance(size, fx.Node) or size.target is operator.getitem:
        return False
    return size.target in _DIVISIONS or any(_is_divided(argument) for argument in size.args)
