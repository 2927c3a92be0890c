"""Files of tensors as calibration data: the arrays in them, without running what they say."""

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from normswap.calibration.pictures import UnusableData
from normswap.checkpoints import pickle_files, safetensors_files
from normswap.checkpoints.pickle_claims import MOST_SHARED
from normswap.errors import UnsafeFileError, first_line

_MOST_PACKED = 100  # times its size that an archive may claim
NUMBERS = "biufc"  # kinds of numpy dtypes
_SPLITS = ("train", "training", "", "val", "valid", "validation", "test")  # the best to calibrate with first
_SPLIT = re.compile(
    r"(?:(?P<before>{0})_)?(?P<name>.+?)(?:_(?P<after>{0}))?".format("|".join(filter(None, _SPLITS))), re.IGNORECASE
)
INPUTS = {"x", "image", "images", "img", "imgs", "input", "inputs", "data", "features", "samples"}
_LABELS = {"y", "label", "labels", "target", "targets", "class", "classes"}
Array = Tensor | numpy.ndarray[Any, Any]


class Arguments(tuple[Any, ...]):
    """Positional arguments, each an array with all samples; a plain tuple may be one of batches."""


def _read_torch(path: Path) -> Any:
    try:
        found = pickle_files.read_pickle(path)
    except UnsafeFileError:
        raise UnusableData("holds more than plain data; save tensors, or lists, tuples or dicts of them") from None
    left = MOST_SHARED * path.stat().st_size
    for tensor in arrays_in(found):
        if isinstance(tensor, Tensor):
            if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
                raise UnusableData("holds a sparse, quantized or empty tensor; save dense ones")
            left -= tensor.numel() * tensor.itemsize
            if left < 0:
                raise UnusableData(f"a tensor of shape {tuple(tensor.shape)} claims more than the file holds")
    return _picked(found) if isinstance(found, Mapping) else found


def _read_numpy(path: Path) -> Any:
    """An array, mapped from its file, or the arrays of an archive."""
    try:
        if zipfile.is_zipfile(path):
            return _picked(_unpacked(path))
        return numpy.load(path, mmap_mode="r", allow_pickle=False)
    except (UnusableData, OSError):
        raise
    except Exception as error:  # whatever a broken header or archive raises
        raise UnusableData(f"is damaged, or holds other than plain numbers ({first_line(error)})") from None


def _unpacked(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        claimed, size = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
    if claimed > max(_MOST_PACKED * size, 1 << 28):
        raise UnusableData(f"unpacks to {claimed:,} bytes from {size:,}; save it unpacked, with numpy.savez")
    found: dict[str, Any] = {}
    with numpy.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            try:
                found[name] = arrays[name]
            except ValueError as error:
                if "allow_pickle" not in str(error):
                    raise
                found[name] = None  # Python objects, perhaps beside numbers: not even looked at
    return found


def _read_safetensors(path: Path) -> Any:
    return _picked(safetensors_files.read_safetensors(path)[0])


READERS: dict[str, Callable[[Path], Any]] = {
    ".pt": _read_torch, ".pth": _read_torch, ".npy": _read_numpy, ".npz": _read_numpy,
    ".safetensors": _read_safetensors,
}  # fmt: skip


def arrays_in(found: Any, depth: int = 0) -> Iterator[Array]:
    if isinstance(found, Tensor | numpy.ndarray):
        yield found
    elif isinstance(found, Mapping | list | tuple) and depth < 4:
        for part in found.values() if isinstance(found, Mapping) else found:
            yield from arrays_in(part, depth + 1)


def _picked(named: Mapping[Any, Any]) -> Any:
    """The inputs among the named arrays of a file: one, a tuple of positional ones, or a dict of keyword ones."""
    arrays = {str(k): v for k, v in named.items() if _is_numbers(v)}
    if not arrays:
        listed = ", ".join(map(str, named)) or "nothing"
        raise UnusableData(f"holds no tensor of numbers at its top level, but {listed[:200]}")
    arrays = _of_one_split(arrays)
    arrays = {name: value for name, value in arrays.items() if name.lower() not in _LABELS} or arrays
    if len({value.shape[:1] for value in arrays.values()}) > 1:
        inputs = [name for name in arrays if name.lower() in INPUTS]
        if len(inputs) != 1:
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in arrays.items())
            raise UnusableData(
                f"holds tensors of different first dimensions, where samples would be: {shapes[:300]}; "
                "save the inputs alone, or name them x"
            )
        return arrays[inputs[0]]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    if all(re.fullmatch(r"arr_\d+", name) for name in arrays):
        return Arguments(arrays[name] for name in sorted(arrays, key=lambda name: int(name[4:])))
    if not all(map(str.isidentifier, arrays)):
        raise UnusableData(f"holds tensors under names that no model takes: {', '.join(arrays)[:200]}; save its inputs")
    return arrays


def _of_one_split(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """`x` and `y` of `x_train, y_train, x_test, y_test`, or of `train_x` and so on."""
    splits: dict[str, dict[str, Array]] = {}
    for name, value in arrays.items():
        match = _SPLIT.fullmatch(name)
        split, plain = (match["before"] or match["after"] or "", match["name"]) if match else ("", name)
        splits.setdefault(split.lower(), {})[plain] = value
    return splits[min(splits, key=_SPLITS.index)]


def _is_numbers(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, numpy.ndarray) and value.dtype.kind in NUMBERS)


def is_integer(value: Array) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return value.dtype.kind in "iu"
