"""All that a pickle may name without anybody's leave, with what it may do with it, and why that is harmless.

The reader runs by this table: what is in no row is refused, and what a row has no function for cannot be done.
"""

import argparse
import collections
import datetime
import decimal
import functools
import pathlib
import time
import types
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial as bound
from importlib import import_module
from typing import Any

import numpy
import torch
from torch import nn

from normswap.checkpoints import pickled_arrays as arrays
from normswap.checkpoints import pickled_objects as objects
from normswap.checkpoints import pickled_tensors as tensors
from normswap.checkpoints import pickled_values as values

_MISSING = object()


@dataclass(frozen=True)
class Row:
    """What a pickle may do with an object that it names."""

    why: str
    """Why that is harmless."""
    value: Any = None
    """The object, a class, a function or a constant."""
    call: Callable[..., Any] | None = None
    """What its call (`REDUCE`) runs, with the `Claims` and the arguments in the pickle; None: it is never called."""
    new: Callable[..., Any] | None = None
    """What makes an object of it without its constructor (`NEWOBJ`), in the same way."""
    build: Callable[..., None] | None = None
    """What gives an object of exactly this class its state (`BUILD`), with the `Claims`, the object and the state."""
    filled: bool = False
    """Whether entries may be put into an object of this class: it is a dict, a list or a deque, with their methods."""


_NUMBERS = "is a class of plain numbers or containers: named as what a defaultdict makes, never called"
_FUNCTION = "is a function that modules hold: named, never called"
_STORAGE = "says of what dtype a storage is; the storage itself is a part of the file, within its bounds"
_TENSOR = "makes a view of a storage, whose bounds are checked, and the size against the file's"
_DATA = "has no code: its attributes are put into its `__dict__`"
_SHORT = "makes an immutable value of some numbers, texts and bytes, no larger than these"
_COPY = "makes a container of the entries of a list, which count towards what the file may take"
_ARRAY = "is made by us, of bytes: as many as its shape and its plain dtype say"
_CONSTANT = "is a constant"
_HELPER = "is a helper of torchvision's detectors; " + _DATA


def _of_torch() -> Iterator[tuple[str, Row]]:
    constants = (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)
    yield from ((f"torch.{name}", Row(_CONSTANT, v)) for name, v in vars(torch).items() if isinstance(v, constants))
    storage_type: Callable[[str], Any] = torch.serialization.StorageType
    for storage in torch._storage_classes:
        untyped = storage in (torch.storage.TypedStorage, torch.storage.UntypedStorage)
        value = storage if untyped else storage_type(storage.__name__)
        yield f"{storage.__module__}.{storage.__name__}", Row(_STORAGE, value)
    for kind in torch._tensor_classes:
        yield f"{kind.__module__}.{kind.__name__}", Row("is a class of tensors: named, never called", kind)
    yield "torch.Tensor", Row("is what a tensor with attributes is; named, never called", torch.Tensor)
    for name, maker in tensors.TENSOR_MAKERS.items():
        if hasattr(torch._utils, name):
            yield f"torch._utils.{name}", Row(_TENSOR, getattr(torch._utils, name), call=maker)
    functions = (
        "relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "mish", "leaky_relu", "elu",
        "celu", "selu", "softplus",
    )  # fmt: skip
    yield from ((f"torch.nn.functional.{f}", Row(_FUNCTION, getattr(nn.functional, f))) for f in functions)
    yield from ((f"torch.{f}", Row(_FUNCTION, getattr(torch, f))) for f in ("sigmoid", "tanh", "relu"))


_TORCH: dict[str, Row] = {
    **dict(_of_torch()),
    "torch.nn.parameter.Parameter": Row(
        "takes a tensor that is there already", nn.Parameter, call=tensors.parameter, new=tensors.parameter
    ),
    "torch._tensor._rebuild_from_type_v2": Row(
        "calls another row that makes a tensor, and gives it attributes that no tensor has",
        torch._tensor._rebuild_from_type_v2,
        call=tensors.tensor_of_class,
    ),
    "torch.serialization._get_layout": Row(
        "looks a name up among the layouts", torch.serialization._get_layout,
        call=bound(values.of_plain, torch.serialization._get_layout),
    ),
    "torch.Size": Row("holds whole numbers, as many as the file has", torch.Size, call=values.size_of),
    "torch.device": Row("names a device, and uses none", torch.device, call=bound(values.of_plain, torch.device)),
    "torch.torch_version.TorchVersion": Row(
        "is a text", torch.torch_version.TorchVersion, call=values.torch_version, new=values.torch_version
    ),
}  # fmt: skip


def _plain(kind: Any) -> Row:
    return Row(_SHORT, kind, call=bound(values.of_plain, kind))


def _restored(kind: Any, why: str = _DATA) -> Row:
    return Row(why, kind, new=bound(objects.blank, kind), build=objects.restore)


_PYTHON: dict[str, Row] = {
    **{f"builtins.{kind.__name__}": Row(_NUMBERS, kind) for kind in (list, dict, tuple, int, float, bool, str)},
    "builtins.set": Row(_COPY, set, call=values.made_set),
    "builtins.frozenset": Row(_COPY, frozenset, call=values.frozen_set),
    "builtins.bytes": Row("makes no bytes, the empty ones", bytes, call=values.no_bytes),
    "builtins.bytearray": Row("copies bytes, which count", bytearray, call=values.byte_array),
    "builtins.complex": Row(_SHORT, complex, call=values.complex_number),
    "builtins.slice": _plain(slice),
    "builtins.Ellipsis": Row(_CONSTANT, ...),
    "_codecs.encode": Row(
        "makes bytes of as many characters, in latin1 alone", values.bytes_of_text, call=values.bytes_of_text
    ),
    "collections.OrderedDict": Row(
        _COPY, collections.OrderedDict, call=values.ordered_dict, build=objects.restore, filled=True
    ),
    "collections.Counter": Row(_COPY, collections.Counter, call=values.counter, filled=True),
    "collections.defaultdict": Row(
        "calls nothing but Python's own containers and numbers",
        collections.defaultdict, call=values.default_dict, filled=True,
    ),
    "collections.deque": Row(_COPY, collections.deque, call=values.made_deque, filled=True),
    "functools.partial": Row(
        "calls nothing when it is made; when it is run, it is a part of its module's forward",
        functools.partial, call=values.partial, build=objects.restore_partial,
    ),
    "argparse.Namespace": _restored(argparse.Namespace),
    "types.SimpleNamespace": Row(
        _DATA, types.SimpleNamespace, call=bound(values.of_plain, types.SimpleNamespace), build=objects.restore
    ),
    **{f"datetime.{kind.__name__}": _plain(kind)
       for kind in (datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone)},
    "time.struct_time": Row(_SHORT, time.struct_time, call=values.struct_time),
    "decimal.Decimal": Row(_SHORT, decimal.Decimal, call=bound(values.decimal_number, decimal.Decimal)),
    "uuid.UUID": Row(_SHORT, uuid.UUID, new=bound(objects.blank, uuid.UUID), build=objects.restore_uuid),
    **{f"{place}.{name}": Row("is text: it opens nothing", kind, call=bound(values.of_texts, kind))
       for place in ("pathlib", "pathlib._local")
       for name, kind in {
           "PosixPath": pathlib.PosixPath, "PurePosixPath": pathlib.PurePosixPath,
           "PureWindowsPath": pathlib.PureWindowsPath,
           "WindowsPath": pathlib.PureWindowsPath,  # the other cannot be made elsewhere
       }.items()},
}  # fmt: skip

_NUMPY: dict[str, Row] = {
    "numpy.ndarray": Row(_ARRAY, numpy.ndarray, build=arrays.fill_array),
    "numpy.dtype": Row("is of a closed list of names", numpy.dtype, call=arrays.number_dtype),
    **{f"numpy.{core}.multiarray.scalar": Row(_ARRAY, arrays.numpy_scalar, call=arrays.numpy_scalar)
       for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": Row(_ARRAY, arrays.empty_array, call=arrays.empty_array)
       for core in ("core", "_core")},
}  # fmt: skip

_RAFT = "torchvision.models.optical_flow.raft._pass_through_h"
_TIMM = (
    "swish",
    "mish",
    "sigmoid",
    "tanh",
    "hard_swish",
    "hard_sigmoid",
    "hard_mish",
    "gelu",
    "gelu_tanh",
    "quick_gelu",
)
_DETECTION = ("BoxCoder", "BoxLinearCoder", "Matcher", "SSDMatcher", "BalancedPositiveNegativeSampler")
_LATER: Mapping[str, tuple[str, bool]] = {
    **{f"torchvision.models.detection._utils.{name}": (_HELPER, True) for name in _DETECTION},
    "torch.nn.utils.weight_norm.WeightNorm": ("is a hook that computes a weight of its module; " + _DATA, True),
    _RAFT: (_FUNCTION, False),
    **{f"timm.layers.activations.{name}": (_FUNCTION, False) for name in _TIMM},
    "torchvision.ops.boxes.box_iou": (_FUNCTION, False),
    "normswap.checkpoints.stored_recipes.recipe_into_metadata": (
        "is our own hook of `state_dict`, which adds a recipe: named, never called", False,
    ),
}  # fmt: skip
"""Rows of what is imported when a file names it: why it is harmless, and whether it is a class to restore."""

TABLE: Mapping[str, Row | tuple[str, bool]] = {**_TORCH, **_PYTHON, **_NUMPY, **_LATER}
"""By full name, after the names of Python 2 have become those of Python 3."""
FAMILIES = (
    "torch.nn.", "torch.ao.", "torchvision.models.", "torchvision.ops.", "timm.models.", "timm.layers.", "normswap.",
)  # fmt: skip
"""Beginnings of the names of modules (`nn.Module`), each of which is as `module_row` says, and of enumerations without
code of their own, of which a member is looked up."""
DTYPE_ROW = Row("is of a closed list; its order of bytes is set", numpy.dtype, build=arrays.order_dtype)
"""Of the classes of plain dtypes, which no pickle names: `numpy.dtype` makes their objects."""


def module_row(kind: Any) -> Row:
    """The row of a class of modules in a known library."""
    return Row(
        "is a module of a library that the user has: restored by torch's code, never made anew, and not run",
        kind,
        new=bound(objects.blank, kind),
        build=objects.restore_library_module,
    )


def row_of(name: str) -> Row | None:
    """The row of what has the full name `name`; None where there is none, or where its library is not installed."""
    found = TABLE.get(name)
    if not isinstance(found, tuple):
        return found
    why, is_class = found
    try:
        value = getattr(import_module(name.rpartition(".")[0]), name.rpartition(".")[2], _MISSING)
    except ImportError:
        return None
    if value is _MISSING:
        return None
    return _restored(value, why) if is_class else Row(why, value)
