"""A run of a model that nobody has asked for may not take all memory, or all day: each operation is sized up first.

It costs about 20 µs an operation.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

MEMORY = 1 << 29
"""Bytes that all values of a run on made-up inputs may take at one time."""
SECONDS = 10.0
"""How long such a run may take."""
_SMALL = 1 << 20  # bytes of a result that nobody needs to count
_aten = torch.ops.aten
_NO_LARGER = frozenset(
    getattr(_aten, name) for name in (
        "native_batch_norm", "native_layer_norm", "native_group_norm", "relu", "sigmoid", "silu", "gelu", "tanh", "elu",
        "leaky_relu", "hardsigmoid", "hardswish", "hardtanh", "mish", "softplus", "exp", "neg", "sqrt", "rsqrt",
        "_softmax", "_log_softmax", "mean", "sum", "amax", "clone", "_to_copy",
    )
)  # fmt: skip
"""Operations whose result has no more elements than their first argument.

They are frequent, and their form on `meta` is slow.
"""
_BROADCASTING = frozenset((_aten.add, _aten.sub, _aten.mul, _aten.div))
_WIDEST = 8  # bytes of an element, as good as always


class OverBudget(RuntimeError):
    """Says what a run would take too much of."""


class Budget(TorchDispatchMode):
    """Within it, an operation of torch's raises `OverBudget` instead of making what is too large, or going on too long.

    How large a result will be is seen by running the operation on tensors without memory (the device `meta`). One that
    cannot run so has a result that is counted when it is there.
    """

    def __init__(self, memory: int = MEMORY, seconds: float = SECONDS):
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory, self.deadline = memory, time.monotonic() + seconds
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}  # large results by where they lie
        self.total = 0  # bytes of these, of which some may be gone

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import all of its compiler to keep it away from here

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if time.monotonic() > self.deadline:
            raise OverBudget("time")
        self._make_room(_size_of_result(func, args, kwargs))
        result = func(*args, **kwargs)
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and (size := _size(tensor)) > _SMALL:
                self._hold(tensor, size)
        return result

    def _hold(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held:
            self.total += size
            self.held[key] = StorageWeakRef(storage), size  # type: ignore[no-untyped-call]
            self._make_room(0)

    def _make_room(self, size: int) -> None:
        """Raise `OverBudget` where `size` bytes more are too many, after a look at what is gone by now."""
        if self.total + size > self.memory:
            self.held = {key: entry for key, entry in self.held.items() if not entry[0].expired()}  # type: ignore[no-untyped-call]
            self.total = sum(held for _, held in self.held.values())
            if self.total + size > self.memory:
                raise OverBudget("memory")


def _size(tensor: Tensor) -> int:
    """The bytes that the memory of a tensor has; 0 where it is not laid out in one block."""
    return tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else 0


def _size_of_result(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The bytes of what an operation will make; 0 where that is not new, or cannot be told."""
    if func.is_view or func._schema.is_mutable:
        return 0
    packet = func.overloadpacket
    try:
        if packet in _NO_LARGER:
            return int(args[0].numel()) * _WIDEST
        if packet in _BROADCASTING:
            shapes = [value.shape for value in args[:2] if isinstance(value, Tensor)]
            return int(torch.Size(torch.broadcast_shapes(*shapes)).numel()) * _WIDEST  # type: ignore[no-untyped-call]
        if func is _aten.empty.memory_format:
            return int(math.prod(args[0])) * _WIDEST
        if packet is _aten.convolution and not args[6]:
            return _size_of_convolution(*args[:6])
        args, kwargs = pytree.tree_map_only(Tensor, _without_memory, (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        made = pytree.tree_leaves(func(*args, **kwargs))
    except Exception:  # it has no such form, or fails, as it will again
        return 0
    return sum(_size(tensor) for tensor in made if isinstance(tensor, Tensor))


def _size_of_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> int:
    """The bytes that a convolution gives, one that is not transposed, for the form on `meta` is slow."""
    dims = weight.dim() - 2
    each = [one * dims if len(one) == 1 else one for one in (stride, padding, dilation)]
    sizes = zip(x.shape[-dims:], weight.shape[2:], *each, strict=True)
    out = [max(0, (size + 2 * p - d * (kernel - 1) - 1) // s + 1) for size, kernel, s, p, d in sizes]
    return math.prod((x.shape[0] if x.dim() > dims + 1 else 1, len(weight), *out)) * x.itemsize


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
