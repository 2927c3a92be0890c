"""Conditions on the shapes of symbolic values: which of them must be answered alike in one run of a forward."""

import operator
from collections.abc import Hashable
from typing import Any

from torch import fx

_OPPOSITES: dict[Any, Any] = {operator.le: operator.gt, operator.ge: operator.lt, operator.ne: operator.eq}
_ON_NUMBERS = {
    operator.gt, operator.lt, operator.eq, operator.add, operator.iadd, operator.sub, operator.mul, operator.floordiv,
    operator.mod, operator.getitem, operator.neg, operator.and_, operator.or_, operator.not_,
}  # fmt: skip
_SHAPE_READS = {name: name for name in ("size", "dim", "numel", "dtype", "device", "is_cuda", "is_floating_point")}
_SHAPE_READS |= {"shape": "size", "ndim": "dim"}


def condition_of(node: fx.Node) -> tuple[Hashable, bool] | None:
    """What is asked of which values, and whether the opposite is; None where the answer is not by shapes alone.

    A forward that asks `if x.shape[1] > 3` in two places gets one answer, since a tensor's shape stays.
    """
    opposite = node.op == "call_function" and node.target in _OPPOSITES
    asked = _expression(node, _OPPOSITES[node.target] if opposite else node.target)
    return None if asked is None else (asked, opposite)


def _expression(value: Any, target: Any = None) -> Hashable | None:
    """A number, or arithmetic on numbers and shapes, in a form that can be compared; None for anything else."""
    if isinstance(value, int | float | str | bool | slice | None.__class__):
        return repr(value)
    if isinstance(value, list | tuple):
        parts = [_expression(item) for item in value]
        return None if None in parts else tuple(parts)
    if not isinstance(value, fx.Node):
        return repr(value) if type(value).__module__ == "torch" else None  # a dtype, a device
    target = value.target if target is None else target
    read = str(target if value.op == "call_method" else value.args[1] if target is getattr else "")
    if read in _SHAPE_READS and not value.kwargs and _keeps_shape(value.args[0]):
        whole = (_SHAPE_READS[read], id(value.args[0]))
        return whole if len(value.args) == 1 or target is getattr else (operator.getitem, whole, repr(value.args[1]))
    if value.op != "call_function" or target not in _ON_NUMBERS or value.kwargs:
        return None
    parts = [_expression(item) for item in value.args]
    return None if None in parts else (target, *parts)


def _keeps_shape(value: Any) -> bool:
    """Whether nothing is done to a tensor in place: some operations give it another shape."""
    users = value.users if isinstance(value, fx.Node) else ()
    return isinstance(value, fx.Node) and not any(u.op == "call_method" and str(u.target).endswith("_") for u in users)
