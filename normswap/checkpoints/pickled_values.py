"""Makes the objects that a pickle asks for, each out of what the file holds and bounded by its size.

Each maker gets the `Claims` of the file first, then the arguments in the pickle. None trusts their kinds or numbers.
"""

import datetime
import functools
import math
import re
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from normswap.errors import FileError, UnsafeFileError

_MOST_TAKEN = 10  # times its size that what is made out of a pickle may take
_SMALLEST = 1 << 12  # bytes that a pickle may always claim
_MOST_SHARED = 64  # times its size that the tensors of a file may claim together: some share memory
_LARGEST_KEY, _MOST_ALIKE = 1000, 100  # parts of the key of a dict; keys of one hash
_ITEM = 8  # bytes of an entry in a list
NUMBERS = {f"{kind}{size}" for kind, sizes in {"i": "1248", "u": "1248", "f": "248", "c": "8", "b": "1"}.items()
           for size in sizes} | {"c16"}  # fmt: skip
"""The plain dtypes of numpy by name; beside them, texts of a length: `U5`, `S3`."""
_TEXT = re.compile(r"[SU][1-9]\d{0,8}")
_FACTORIES = (None, list, dict, set, tuple, int, float, bool, str, OrderedDict, Counter, deque)
_PLAIN = (int, float, bool, str, bytes, type(None), datetime.timedelta, datetime.timezone)
_LONGEST_NUMBER = 1000  # characters of a Decimal


class Claims:
    """What the objects of one file may take together, and what is to be checked when all of it has been read.

    Args:
        file_size: bytes of the file, which bound its tensors.
        pickle_size: bytes of the pickle, which bound all else.
    """

    def __init__(self, file_size: int, pickle_size: int):
        self.file_size = file_size
        self.checks: list[Callable[[], object]] = []
        self.kinds_of_tensor: list[Any] = [Tensor, nn.Parameter]
        self._left = max(_MOST_TAKEN * pickle_size, _SMALLEST)
        self._left_for_tensors = _MOST_SHARED * file_size
        self._left_for_copies = 2 * file_size
        self._alike: Counter[tuple[int, int]] = Counter()

    def take(self, size: int) -> None:
        """Count `size` bytes of memory. Raises `FileError` where a pickle of this size has no use for so much."""
        self._left -= size
        if self._left < 0:
            raise FileError("its pickle makes far more than it holds")

    def take_tensor(self, size: int) -> None:
        """Count a tensor of `size` bytes: a view can repeat one element without end, to fill memory."""
        self._left_for_tensors -= size
        if size > self.file_size or self._left_for_tensors < 0:
            raise FileError(f"a tensor claims more than the file holds: {size:,} bytes")

    def take_copy(self, size: int) -> None:
        """Count `size` bytes of tensors that are no view of the file: read from it, or converted once."""
        self._left_for_copies -= size
        if self._left_for_copies < 0:
            raise FileError("its tensors claim more than the file holds")

    def check_key(self, target: object, key: Any) -> None:
        """Refuse a key whose hash takes forever, and many of one hash in one `target`: each is compared with all."""
        if type(key) is str or (type(key) is int and abs(key) < 1 << 60):
            return
        parts, seen = [key], 0
        while parts:
            part = parts.pop()
            seen += 1
            if isinstance(part, tuple):
                parts.extend(part)
            if seen + len(parts) > _LARGEST_KEY:
                raise FileError("it has a key of a dict with too many parts")
        place = id(target), hash(key)
        self._alike[place] += 1
        if self._alike[place] > _MOST_ALIKE:
            raise FileError("it has too many keys of one hash")


def refuse(what: str) -> UnsafeFileError:
    """The error for a pickle that does what those of torch never do."""
    return UnsafeFileError(f"is not what torch.save makes of a model: it {what}")


def shown(value: Any) -> str:
    """A value for a message: a text, and of all else its class, since what holds itself often is text without end."""
    return repr(value)[:40] if type(value) is str else f"a {type(value).__name__}"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > 64 or not all(map(_is_count, value)):
        raise FileError("it has a shape that is none")
    return tuple(value)


# ---- tensors ----


def _checked_view(claims: Claims, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any) -> tuple[Any, ...]:
    """The arguments of a tensor that lies within its storage, and claims no more than the file holds."""
    if not isinstance(storage, torch.storage.TypedStorage) or not isinstance(dtype, torch.dtype):
        raise FileError("it has a tensor without a storage, or without a dtype")
    shape, strides = _shape(size), _shape(stride)
    if len(shape) != len(strides) or not _is_count(offset):
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
            torch.sparse_coo_tensor, indices, values, _shape(size), is_coalesced=coalesced[0] if coalesced else None
        )
    elif layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        outer, inner, values, size = parts
        held = [outer, inner, values]
        make = functools.partial(torch.sparse_compressed_tensor, outer, inner, values, _shape(size), layout=layout)
    else:
        raise FileError(f"it has a sparse tensor of the layout {shown(layout)}")
    if not all(type(part) is Tensor for part in held):
        raise FileError("it has a sparse tensor that is made of no tensors")
    claims.checks.append(functools.partial(make, check_invariants=True))
    return make(check_invariants=False)


def meta_tensor(claims: Claims, dtype: Any, size: Any, stride: Any, gradient: Any) -> Tensor:
    """As `torch._utils._rebuild_meta_tensor_no_storage`: a shape without memory."""
    shape, strides = _shape(size), _shape(stride)
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


# ---- numpy ----


def number_dtype(claims: Claims, name: Any, align: Any = False, copy: Any = True) -> "numpy.dtype[Any]":
    """A plain dtype; for a text its length is bounded by the bytes that it is used on."""
    if type(name) is not str or (name not in NUMBERS and not _TEXT.fullmatch(name)):
        raise refuse(f"asks for the dtype {shown(name)} of numpy, which is not of plain numbers or text")
    return numpy.dtype(name, False, True)  # one of its own, since its order of bytes is set afterwards


def order_dtype(claims: Claims, dtype: Any, state: Any) -> None:
    """Set the order of bytes, which is all that the state of a plain dtype has to say."""
    sizes = (dtype.itemsize, 4 if dtype.kind == "U" else 1) if dtype.kind in "US" else (-1, -1)
    plain = type(state) is tuple and len(state) == 8 and type(state[0]) is int and type(state[1]) is str
    if not plain or state[0] != 3 or state[1] not in "<>|=" or state[2:5] != (None, None, None):
        raise refuse("builds a dtype of numpy that is not plain")
    if [type(part) for part in state[5:]] != [int, int, int] or state[5:7] != sizes or state[7] & ~8:
        raise refuse("builds a dtype of numpy that is not plain")
    if state[1] == ">":
        dtype.__setstate__(state)


def _is_plain(dtype: Any) -> bool:
    return isinstance(dtype, numpy.dtype) and dtype.kind in "biufcSU" and dtype.subdtype is None and not dtype.names


def numpy_scalar(claims: Claims, dtype: Any, data: Any) -> Any:
    """As `numpy._core.multiarray.scalar`."""
    if not _is_plain(dtype) or type(data) is not bytes or len(data) != dtype.itemsize:
        raise refuse("makes a number of numpy out of other than its bytes")
    return numpy.frombuffer(data, dtype)[0]


def empty_array(claims: Claims, kind: Any, shape: Any, code: Any) -> "numpy.ndarray[Any, Any]":
    """As `numpy._core.multiarray._reconstruct`: an array of nothing, for `fill_array` to fill."""
    if kind is not numpy.ndarray or shape != (0,):
        raise refuse("makes an array of numpy that is not plain")
    return numpy.empty(0, numpy.int8)


def fill_array(claims: Claims, array: Any, state: Any) -> None:
    """Fill an array with bytes; there are as many as its shape says."""
    if type(state) is not tuple or len(state) != 5 or type(state[0]) is not int or state[0] != 1:
        raise refuse("builds an array of numpy that is not plain")
    _, shape, dtype, by_columns, data = state
    if not _is_plain(dtype) or type(data) is not bytes or array.size:
        raise refuse("builds an array of numpy that is not of plain numbers or text")
    if math.prod(_shape(shape)) * dtype.itemsize != len(data):
        raise FileError("it has an array of numpy with other bytes than its shape says")
    claims.take(len(data))
    array.__setstate__((1, _shape(shape), dtype, bool(by_columns), data))


# ---- Python's own ----


def bytes_of_text(claims: Claims, text: Any, encoding: Any) -> bytes:
    """As `codecs.encode`, by which pickle keeps bytes; other encodings than this one may take forever."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise refuse("encodes other than text as latin1")
    claims.take(len(text))
    return text.encode("latin1")


def no_bytes(claims: Claims) -> bytes:
    """As `bytes()`, by which pickle keeps those without any."""
    return b""


def byte_array(claims: Claims, *content: Any) -> bytearray:
    """As `bytearray`, of bytes or of text in latin1; never of a number, which would be its size."""
    if content and type(content[0]) is str:
        return bytearray(bytes_of_text(claims, *content))
    if content and (len(content) > 1 or type(content[0]) is not bytes):
        raise refuse("makes a bytearray of other than bytes")
    claims.take(len(content[0]) if content else 0)
    return bytearray(*content)


def _items(claims: Claims, content: tuple[Any, ...]) -> Iterable[Any]:
    """The elements in the one argument of a collection, which may be left out."""
    if not content:
        return ()
    if len(content) > 1 or type(content[0]) not in (list, tuple):
        raise refuse("makes a collection of no list")
    claims.take(_ITEM * len(content[0]))
    items: Iterable[Any] = content[0]
    return items


def made_set(claims: Claims, *content: Any) -> set[Any]:
    """As `set`."""
    made: set[Any] = set()
    for item in _items(claims, content):
        claims.check_key(made, item)
        made.add(item)
    return made


def frozen_set(claims: Claims, *content: Any) -> frozenset[Any]:
    """As `frozenset`."""
    return frozenset(made_set(claims, *content))


def made_deque(claims: Claims, content: Any = (), longest: Any = None) -> deque[Any]:
    """As `collections.deque`."""
    if longest is not None and not _is_count(longest):
        raise refuse("makes a deque of no length")
    return deque(_items(claims, (content,)), longest)


def ordered_dict(claims: Claims, *content: Any) -> OrderedDict[Any, Any]:
    """As `collections.OrderedDict`, to which Python 2 gave lists of two."""
    made: OrderedDict[Any, Any] = OrderedDict()
    for pair in _items(claims, content):
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise refuse("makes an OrderedDict of other than pairs")
        set_item(claims, made, *pair)
    return made


def counter(claims: Claims, content: Any = None) -> Counter[Any]:
    """As `collections.Counter`, of a dict."""
    if type(content) not in (dict, type(None)):
        raise refuse("makes a Counter of no dict")
    claims.take(_ITEM * len(content or ()))
    made: Counter[Any] = Counter()
    dict.update(made, content or {})
    return made


def default_dict(claims: Claims, factory: Any = None) -> defaultdict[Any, Any]:
    """As `collections.defaultdict`, whose factory is a class of Python's own that makes an empty object."""
    if not any(factory is known for known in _FACTORIES):
        raise refuse("makes a defaultdict that calls other than a class of Python's own")
    return defaultdict(factory)


def set_item(claims: Claims, target: Any, key: Any, value: Any) -> None:
    """Put an entry into a dict."""
    claims.check_key(target, key)
    target[key] = value


def complex_number(claims: Claims, real: Any, imaginary: Any) -> complex:
    """As `complex`, of numbers alone."""
    return complex(float(_plain(real)), float(_plain(imaginary)))


def _plain(value: Any) -> Any:
    if type(value) not in (int, float, bool):
        raise refuse("makes a number of none")
    return value


def decimal_number(kind: Any, claims: Claims, text: Any) -> Any:
    """As `decimal.Decimal`, of text."""
    if type(text) is not str or len(text) > _LONGEST_NUMBER:
        raise refuse("makes a Decimal of other than a short text")
    return kind(text)


def of_texts(kind: Any, claims: Claims, *texts: Any) -> Any:
    """A path of its parts."""
    if not all(type(text) is str for text in texts):
        raise refuse(f"makes a {kind.__name__} of other than text")
    claims.take(sum(map(len, texts)))
    return kind(*texts)


def of_plain(kind: Any, claims: Claims, *arguments: Any) -> Any:
    """An object of a class of Python's or torch's own that is made of few numbers, bytes, texts and the like.

    Of nothing else: to hash or to compare a tuple that holds itself many times over takes forever.
    """
    if not all(type(part) in _PLAIN for part in arguments):
        raise refuse(f"makes a {kind.__name__} of other than numbers and texts")
    claims.take(sum(len(part) if isinstance(part, str | bytes) else 1 for part in arguments))
    return kind(*arguments)


def struct_time(claims: Claims, numbers: Any, others: Any = None) -> time.struct_time:
    """As `time.struct_time`, of its nine numbers, and of those that have only names."""
    held = (
        [*numbers, *(others or {}).values()] if type(numbers) is tuple and type(others) in (dict, type(None)) else [()]
    )
    if len(held) > 20 or not all(type(part) in _PLAIN for part in held):
        raise refuse("makes a struct_time of other than numbers")
    return time.struct_time(numbers, others or {})


def torch_version(claims: Claims, text: Any) -> Any:
    """As `torch.torch_version.TorchVersion`, of text alone: as text, a list that holds itself often fills memory."""
    if type(text) is not str:
        raise refuse("has a version of torch that is no text")
    claims.take(len(text))
    return TorchVersion(text)


def size_of(claims: Claims, sizes: Any = ()) -> torch.Size:
    """As `torch.Size`."""
    claims.take(_ITEM * len(_shape(sizes)))
    return torch.Size(_shape(sizes))


def partial(claims: Claims, function: Any, *arguments: Any) -> Any:
    """As `functools.partial`, which calls nothing yet."""
    return functools.partial(function, *arguments)


# ---- what fills an object that was made without its constructor ----


def blank(kind: Any, claims: Claims, *arguments: Any) -> Any:
    """An object without content of a class that has no constructor of its own in C or in `__new__`."""
    if arguments or kind.__new__ is not object.__new__:
        raise refuse(f"makes a {kind.__name__} anew, where it is only restored")
    return object.__new__(kind)


def restore(claims: Claims, made: Any, state: Any) -> None:
    """Give an object its attributes, by no code of its class."""
    if type(state) is not dict or not all(type(name) is str for name in state):
        raise FileError(f"it has a {type(made).__name__} whose attributes are none")
    claims.take(_ITEM * len(state))
    vars(made).update(state)


def restore_uuid(claims: Claims, made: Any, state: Any) -> None:
    """Give a UUID its number."""
    number = state.get("int") if type(state) is dict else None
    if type(number) is not int or not 0 <= number < 1 << 128:
        raise FileError("it has a UUID without a number")
    made.__setstate__({"int": number})


def restore_partial(claims: Claims, made: Any, state: Any) -> None:
    """Give a `functools.partial` what it will call."""
    made.__setstate__(state)


_MODULES_WITH_STATES = ("torch.nn.modules.", "timm.layers.", "torch._dynamo.")
"""Whose `__setstate__` fill in what older versions lack; once a compiler is imported, all of torch's go through its."""
_MOST_LAYERS = 10_000  # of a recurrent network


def restore_library_module(claims: Claims, made: Any, state: Any) -> None:
    """Give a module of a library its parts; those of compiled layers are code of their own in C, and refused."""
    restoring: Any = type(made).__setstate__
    if not restoring.__module__.startswith(_MODULES_WITH_STATES):
        raise refuse(f"restores a {type(made).__name__}, whose class runs code for that")
    if type(state) is not dict or not all(type(name) is str for name in state):
        raise FileError(f"it has a {type(made).__name__} whose parts are none")
    restore_module(claims, made, state)


def restore_module(claims: Claims, made: Any, state: Any) -> None:
    """Give a module its parts by its `__setstate__`, most often torch's."""
    layers = state.get("num_layers", 0) if isinstance(state, dict) and isinstance(made, nn.RNNBase) else 0
    names = state.get("_flat_weights_names", []) if isinstance(state, dict) and isinstance(made, nn.RNNBase) else []
    if not 0 <= _plain(layers) <= _MOST_LAYERS or type(names) is not list:
        raise FileError(f"it has a {type(made).__name__} of {layers:,} layers")
    claims.take(_ITEM * len(state) if isinstance(state, dict) else 0)
    made.__setstate__(state)


# ---- what the user allows ----


def restore_as_pickle(claims: Claims, made: Any, state: Any) -> None:
    """Give an object its state as pickle does: by its `__setstate__`, or as attributes and slots."""
    if hasattr(made, "__setstate__"):
        made.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    if attributes:
        vars(made).update(attributes)
    for name, value in (slots or {}).items():
        setattr(made, name, value)


def of_plain_base(kind: Any, claims: Claims, *arguments: Any) -> Any:
    """An object of a class without code that is a kind of text, number, tuple, list or dict."""
    if issubclass(kind, str | int | float) and not all(type(part) in (str, int, float, bool) for part in arguments):
        raise refuse(f"makes a {kind.__name__} of other than texts and numbers")
    claims.take(_ITEM * sum(len(part) for part in arguments if isinstance(part, str | list | tuple | dict)))
    return kind.__new__(kind, *arguments)


def called_plain(kind: Any, claims: Claims, *arguments: Any) -> Any:
    """A member of an enumeration, or a set, of a class without code."""
    for key in arguments[0] if issubclass(kind, set) and arguments else arguments:
        claims.check_key(kind, key)
    claims.take(_ITEM * sum(len(part) for part in arguments if isinstance(part, str | list | tuple)))
    return kind(*arguments)
