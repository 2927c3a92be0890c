"""Makes the tensors that a pickle asks for, each a view of a storage that the file has, within its bounds.

Each maker gets the `Claims` of the file first, then the arguments in the pickle. None trusts their kinds or numbers.
"""

import functools
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from normswap.checkpoints.pickle_claims import Claims, is_count, refuse, shape_of, shown
from normswap.errors import FileError


def _checked_view(claims: Claims, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any) -> tuple[Any, ...]:
    """The arguments of a tensor that lies within its storage, and claims no more than the file holds."""
    if not isinstance(storage, torch.storage.TypedStorage) or not isinstance(dtype, torch.dtype):
        raise FileError("it has a tensor without a storage, or without a dtype")
    shape, strides = shape_of(size), shape_of(stride)
    if len(shape) != len(strides) or not is_count(offset):
        raise FileError("it has a tensor whose shape is none")
    number = math.prod(shape)
    claims.take_tensor(number * dtype.itemsize)
    last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1 if number else 0
    untyped = storage._untyped_storage
    if (offset + last) * dtype.itemsize > untyped.nbytes():
        raise FileError("it has a tensor that reaches beyond its storage")
    return untyped, offset, shape, strides


def tensor(claims: Claims, storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    """As `torch._utils._rebuild_tensor`."""
    dtype = getattr(storage, "dtype", None)
    view = _checked_view(claims, storage, offset, size, stride, dtype)
    made: Tensor = torch.empty(0, dtype=dtype).set_(*view)
    return made


def tensor_v2(claims: Claims, storage: Any, offset: Any, size: Any, stride: Any, *others: Any) -> Tensor:
    """As `torch._utils._rebuild_tensor_v2`, whose further arguments are requires_grad, hooks and bits."""
    gradient, hooks, *bits = others
    return _finished(tensor(claims, storage, offset, size, stride), gradient, hooks, *bits)


def tensor_v3(claims: Claims, storage: Any, offset: Any, size: Any, stride: Any, *others: Any) -> Tensor:
    """As `torch._utils._rebuild_tensor_v3`, for dtypes that have no storage of their own."""
    gradient, hooks, dtype, *bits = others
    view = _checked_view(claims, storage, offset, size, stride, dtype)
    return _finished(torch.empty(0, dtype=dtype).set_(*view), gradient, hooks, *bits)


def _finished(made: Tensor, gradient: Any, hooks: Any, bits: Any = None) -> Tensor:
    if hooks:
        raise refuse("gives hooks to a tensor")
    made.requires_grad = bool(gradient)
    if isinstance(bits, dict) and bits:
        set_bits: Callable[[Tensor, dict[str, bool]], None] = torch._utils.set_tensor_metadata
        set_bits(made, {str(name): bool(bit) for name, bit in bits.items()})
    return made


def quantized_tensor(claims: Claims, storage: Any, offset: Any, size: Any, stride: Any, *others: Any) -> Tensor:
    """As `torch._utils._rebuild_qtensor`, with the parameters of the quantizer, requires_grad and hooks."""
    quantizer, gradient, hooks = others
    _checked_view(claims, storage, offset, size, stride, getattr(storage, "dtype", None))
    if hooks:
        raise refuse("gives hooks to a tensor")
    if type(quantizer) is not tuple or not all(type(part) in (Tensor, torch.qscheme, int, float) for part in quantizer):
        raise FileError("it has a quantized tensor without the numbers that it is quantized with")
    rebuild: Callable[..., Tensor] = torch._utils._rebuild_qtensor
    return rebuild(storage, offset, size, stride, quantizer, bool(gradient), OrderedDict())


def sparse_tensor(claims: Claims, layout: Any, parts: Any) -> Tensor:
    """As `torch._utils._rebuild_sparse_tensor`; its indices are checked when all values have been read."""
    if type(parts) is not tuple:
        raise FileError("it has a sparse tensor that is made of no tensors")
    if layout is torch.sparse_coo:
        indices, values, size, *coalesced = parts
        held = [indices, values]
        make = functools.partial(
            torch.sparse_coo_tensor, indices, values, shape_of(size), is_coalesced=coalesced[0] if coalesced else None
        )
    elif layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        outer, inner, values, size = parts
        held = [outer, inner, values]
        make = functools.partial(torch.sparse_compressed_tensor, outer, inner, values, shape_of(size), layout=layout)
    else:
        raise FileError(f"it has a sparse tensor of the layout {shown(layout)}")
    if not all(type(part) is Tensor for part in held):
        raise FileError("it has a sparse tensor that is made of no tensors")
    claims.checks.append(functools.partial(make, check_invariants=True))
    return make(check_invariants=False)


def meta_tensor(claims: Claims, dtype: Any, size: Any, stride: Any, gradient: Any) -> Tensor:
    """As `torch._utils._rebuild_meta_tensor_no_storage`: a shape without memory."""
    shape, strides = shape_of(size), shape_of(stride)
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta", requires_grad=bool(gradient))


def tensor_of_array(claims: Claims, array: Any, dtype: Any, device: Any, gradient: Any) -> Tensor:
    """As `torch._utils._rebuild_device_tensor_from_numpy`: what other devices hold, here on the CPU."""
    if type(array) is not numpy.ndarray or not isinstance(dtype, torch.dtype):
        raise FileError("it has a tensor that is made of no array")
    claims.take_copy(array.size * dtype.itemsize)
    return torch.from_numpy(array).to(dtype).requires_grad_(bool(gradient))


def tensor_of_tensor(claims: Claims, data: Any, dtype: Any, device: Any, gradient: Any) -> Tensor:
    """As `torch._utils._rebuild_device_tensor_from_cpu_tensor`: what other devices hold, here on the CPU."""
    if type(data) is not Tensor or not isinstance(dtype, torch.dtype):
        raise FileError("it has a tensor that is made of none")
    if data.dtype != dtype:
        claims.take_copy(data.numel() * dtype.itemsize)
    return data.to(dtype).requires_grad_(bool(gradient))


def parameter(claims: Claims, data: Any, gradient: Any = True, hooks: Any = (), state: Any = None) -> Any:
    """As `torch._utils._rebuild_parameter` and `_rebuild_parameter_with_state`."""
    if type(data) is not Tensor or hooks:
        raise refuse("makes a parameter of no tensor, or gives it hooks")
    return with_attributes(nn.Parameter(data, bool(gradient)), state)


def tensor_of_class(claims: Claims, rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """As `torch._tensor._rebuild_from_type_v2`, for tensors that have attributes: another maker's tensor with these."""
    maker = next((make for name, make in TENSOR_MAKERS.items() if getattr(torch._utils, name, None) is rebuild), None)
    known = type(arguments) is tuple and any(kind is known for known in claims.kinds_of_tensor)
    if maker is None or not known:
        raise refuse("calls what makes no tensor for one")
    made = maker(claims, *arguments)
    return with_attributes(made if type(made) is kind else made.as_subclass(kind), state)


TENSOR_MAKERS: dict[str, Callable[..., Tensor]] = {
    "_rebuild_tensor": tensor,
    "_rebuild_tensor_v2": tensor_v2,
    "_rebuild_tensor_v3": tensor_v3,
    "_rebuild_qtensor": quantized_tensor,
    "_rebuild_sparse_tensor": sparse_tensor,
    "_rebuild_meta_tensor_no_storage": meta_tensor,
    "_rebuild_device_tensor_from_numpy": tensor_of_array,
    "_rebuild_device_tensor_from_cpu_tensor": tensor_of_tensor,
    "_rebuild_parameter": parameter,
    "_rebuild_parameter_with_state": parameter,
}
"""By the name in `torch._utils` of the function that each stands in for."""


def with_attributes(made: Any, state: Any) -> Any:
    """A tensor with attributes from a pickle; none of them hides one that every tensor has."""
    state, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    if slots or not isinstance(state, dict | None):
        raise FileError("it has a tensor whose attributes are none")
    for name, value in (state or {}).items():
        if type(name) is not str or hasattr(type(made), name):
            raise refuse(f"changes {shown(name)} of a tensor")
        setattr(made, name, value)
    return made
