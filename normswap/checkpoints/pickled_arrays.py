"""Makes the arrays and numbers of numpy that a pickle asks for, each of as many bytes as the file has for it.

As in `pickled_tensors`, each maker gets the `Claims` of the file first, then the arguments in the pickle.
"""

import math
import re
from typing import Any

import numpy

from normswap.checkpoints.pickle_claims import Claims, refuse, shape_of, shown
from normswap.errors import FileError

_NUMBERS = {f"{kind}{size}" for kind, sizes in {"i": "1248", "u": "1248", "f": "248", "c": "8", "b": "1"}.items()
           for size in sizes} | {"c16"}  # fmt: skip
"""The plain dtypes of numpy by name; beside them, texts of a length: `U5`, `S3`."""
_TEXT = re.compile(r"[SU][1-9]\d{0,8}")


def number_dtype(claims: Claims, name: Any, align: Any = False, copy: Any = True) -> "numpy.dtype[Any]":
    """A plain dtype; for a text its length is bounded by the bytes that it is used on."""
    if type(name) is not str or (name not in _NUMBERS and not _TEXT.fullmatch(name)):
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
    if math.prod(shape_of(shape)) * dtype.itemsize != len(data):
        raise FileError("it has an array of numpy with other bytes than its shape says")
    claims.take(len(data))
    array.__setstate__((1, shape_of(shape), dtype, bool(by_columns), data))
