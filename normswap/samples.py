"""Calibration data: folders of pictures, files of tensors and any iterable, as a short list of input batches.

A batch is what `probe.call` takes: a tensor (n, ...), a tuple of positional arguments or a dict of keyword arguments.
Samples are spread evenly over what is there and dealt out like cards, so that data sorted by class gives mixed batches.
"""

from __future__ import annotations

import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset, IterableDataset, default_collate

from normswap import pickles, pictures, tensorfiles
from normswap.errors import FileError, OptionError, UnsafeFileError, first_line
from normswap.pictures import Unfit

_MOST_SHARED = 64  # times its size that a file's tensors may claim: some repeat their elements
_MOST_PACKED = 100  # times its size that an archive may claim
_NUMBERS = "biufc"  # kinds of numpy dtypes
_SPLITS = ("train", "training", "", "val", "valid", "validation", "test")  # the best to calibrate with first
_SPLIT = re.compile(
    r"(?:(?P<before>{0})_)?(?P<name>.+?)(?:_(?P<after>{0}))?".format("|".join(filter(None, _SPLITS))), re.IGNORECASE
)
_INPUTS = {"x", "image", "images", "img", "imgs", "input", "inputs", "data", "features", "samples"}
_LABELS = {"y", "label", "labels", "target", "targets", "class", "classes"}
_Array = Tensor | numpy.ndarray[Any, Any]


class _Arguments(tuple[Any, ...]):
    """Positional arguments, each an array with all samples; a plain tuple may be one of batches."""


def read_samples(
    path: str | os.PathLike[str],
    *,
    spec: str | None = None,
    weights: str | None = None,
    input_size: int | Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    limit: int = 512,
    batch: int = 32,
) -> list[Any]:
    """Input batches from a folder of pictures or a file of tensors, the same ones each time, floats as float32.

    A folder: every picture below it, in RGB, prepared as torchvision or timm prepares them for the model that `spec`
    names (`weights` picks which of torchvision's or timm's recipes); `input_size`, `mean` and `std` win over the
    recipe. Without one, pictures are resized to cover `input_size`/0.875 and cropped, and ImageNet's mean and std are
    the defaults. Nothing is downloaded.

    A `.pt`, `.npy`, `.npz` or `.safetensors` file:
    - one array (N, ...): N samples;
    - several by name: labels (`y`, `labels`, `targets`, ...) are ignored, of `x_train` and `x_test` the first is taken.
      What remains is the input if it is one array, else keyword inputs with a common first dimension; `arr_0, arr_1` of
      `numpy.savez` are positional ones. Where the first dimensions differ, the only one called `x`, `images`, `inputs`,
      `data` or the like is taken;
    - a list in a `.pt` file: each item is a batch as the model takes it, unless it is a pair (inputs, labels).
    Floats are taken as they stand. uint8 arrays (N, C, H, W), (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels are
    pictures: they become (N, C, H, W), are scaled to 0..1 and normalized as above, and resized where `input_size` is given.

    Args:
        path: the folder or the file.
        spec: `torchvision:NAME` or `timm:NAME`; other specs have no recipe.
        weights: the name of published weights, where they are not the default ones.
        input_size: side, or (height, width).
        mean, std: one number or one a channel, for values from 0 to 1; both or none.
        limit: most samples that are read.
        batch: most samples in a batch; not of a list in a `.pt` file.

    Raises:
        FileError: nothing there, nothing in it, or something broken.
        OptionError: another kind of file, or an option that does not fit.
    """
    path = Path(path)
    _check_counts(limit, batch)
    look = pictures.asked(input_size, mean, std)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: {getattr(error, 'strerror', None) or error}; check the name and the folder") from None
    if stat.S_ISDIR(mode):
        preparation, found = pictures.preparation(spec, weights, look), pictures.below(path)
        dealt = _deal(len(found), limit, batch)
        return [inputs for indices in dealt for inputs in pictures.read([found[i] for i in indices], preparation)]
    if path.suffix.lower() not in _READERS:
        kinds = ", ".join(_READERS)
        raise OptionError(f"{path}: calibration data are a folder of pictures, or tensors in one of {kinds}")
    if not stat.S_ISREG(mode):
        raise FileError(f"{path}: is not a regular file")
    try:
        content = _READERS[path.suffix.lower()](path)
        uint8 = pictures.Uint8(spec, weights, look)
        read = _batches_in(content, limit, batch, uint8)
        if look and not uint8.met:
            raise OptionError(
                f"{path}: holds no uint8 pictures, so its values are taken as they stand; "
                "leave --input-size, --mean and --std (input_size, mean, std) out"
            )
        _check_finite(read)
    except Unfit as error:
        raise FileError(f"{path}: {error}") from None
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or first_line(error)}") from None
    return read


def batches(data: Any, *, limit: int = 512, batch: int = 32) -> list[Any]:
    """Input batches of at most `limit` samples in all, from whatever holds inputs.

    A tensor, a numpy array (floats become float32), a dict of them (keyword inputs) and a map-style `Dataset`, whose
    items are single samples: spread evenly, `batch` at a time. A pair (inputs, labels) of tensors: the same.
    Anything else that can be iterated, such as a `DataLoader`, a list or a generator: its items as given, each a batch; the
    last one is cut where it holds too many, and then no more are asked for. Labels stay: see `first_inputs`.

    Raises `OptionError` for data that is empty, or no data.
    """
    _check_counts(limit, batch)
    if data is None or isinstance(data, str | bytes | os.PathLike):
        raise OptionError(f"calibrate: {data!r} holds no inputs; give a tensor, or batches of inputs")
    try:
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            return _collated(data, limit, batch)
        return _batches_in(data, limit, batch)
    except Unfit as error:
        raise OptionError(f"calibrate: {error}") from None


def first_inputs(model: nn.Module, item: Any) -> Any:
    """What to pass to `model` of an item that may hold labels too, in the form that `probe.call` takes.

    A tuple or list keeps all its parts where the forward requires two arguments or more. Else its first alone counts where
    the forward takes no second, or where the second looks like labels: one number a sample, or integers beside
    floats. A dict loses what the forward does not accept, if what is left suffices.
    """
    parameters = _parameters(model)
    positional = [p for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is Parameter.empty]
    if isinstance(item, Mapping):
        return _accepted(item, parameters, required)
    if not isinstance(item, tuple | list) or isinstance(item, PackedSequence) or len(item) < 2 or len(required) > 1:
        return item
    only_one = len(positional) == 1 and not any(p.kind is Parameter.VAR_POSITIONAL for p in parameters)
    if only_one or (len(item) == 2 and _are_labels(item[1], item[0])):
        return _alone(item[0], parameters)
    return item


# ---- options ----


def _check_counts(limit: int, batch: int) -> None:
    for name, value in (("limit", limit), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name}: {value!r} is no number of samples; give a whole number from 1")


# ---- files of tensors ----


def _read_torch(path: Path) -> Any:
    try:
        found = pickles.read(path)
    except UnsafeFileError:
        raise Unfit("holds more than plain data; save tensors, or lists, tuples or dicts of them") from None
    left = _MOST_SHARED * path.stat().st_size
    for tensor in _arrays_in(found):
        if isinstance(tensor, Tensor):
            if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
                raise Unfit("holds a sparse, quantized or empty tensor; save dense ones")
            left -= tensor.numel() * tensor.itemsize
            if left < 0:
                raise Unfit(f"a tensor of shape {tuple(tensor.shape)} claims more than the file holds")
    return _picked(found) if isinstance(found, Mapping) else found


def _read_numpy(path: Path) -> Any:
    """An array, mapped from its file, or the arrays of an archive."""
    try:
        if zipfile.is_zipfile(path):
            return _picked(_unpacked(path))
        return numpy.load(path, mmap_mode="r", allow_pickle=False)
    except (Unfit, OSError):
        raise
    except Exception as error:  # whatever a broken header or archive raises
        raise Unfit(f"is damaged, or holds other than plain numbers ({first_line(error)})") from None


def _unpacked(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        claimed, size = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
    if claimed > max(_MOST_PACKED * size, 1 << 28):
        raise Unfit(f"unpacks to {claimed:,} bytes from {size:,}; save it unpacked, with numpy.savez")
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
    return _picked(tensorfiles.read(path)[0])


_READERS: dict[str, Callable[[Path], Any]] = {
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".safetensors": _read_safetensors,
}


def _arrays_in(found: Any, depth: int = 0) -> Iterator[_Array]:
    if isinstance(found, Tensor | numpy.ndarray):
        yield found
    elif isinstance(found, Mapping | list | tuple) and depth < 4:
        for part in found.values() if isinstance(found, Mapping) else found:
            yield from _arrays_in(part, depth + 1)


def _picked(named: Mapping[Any, Any]) -> Any:
    """The inputs among the named arrays of a file: one, a tuple of positional ones, or a dict of keyword ones."""
    arrays = {str(k): v for k, v in named.items() if _is_numbers(v)}
    if not arrays:
        listed = ", ".join(map(str, named)) or "nothing"
        raise Unfit(f"holds no tensor of numbers at its top level, but {listed[:200]}")
    if len(arrays) > 1:
        arrays = _of_one_split(arrays)
        arrays = {name: value for name, value in arrays.items() if name.lower() not in _LABELS} or arrays
    if len(arrays) > 1 and len({value.shape[:1] for value in arrays.values()}) > 1:
        inputs = [name for name in arrays if name.lower() in _INPUTS]
        if len(inputs) != 1:
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in arrays.items())
            raise Unfit(
                f"holds tensors of different first dimensions, where samples would be: {shapes[:300]}; "
                "save the inputs alone, or name them x"
            )
        return arrays[inputs[0]]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    if all(re.fullmatch(r"arr_\d+", name) for name in arrays):
        return _Arguments(arrays[name] for name in sorted(arrays, key=lambda name: int(name[4:])))
    if not all(map(str.isidentifier, arrays)):
        raise Unfit(f"holds tensors under names that no model takes: {', '.join(arrays)[:200]}; save its inputs")
    return arrays


def _of_one_split(arrays: Mapping[str, _Array]) -> dict[str, _Array]:
    """`x` and `y` of `x_train, y_train, x_test, y_test`, or of `train_x` and so on."""
    splits: dict[str, dict[str, _Array]] = {}
    for name, value in arrays.items():
        match = _SPLIT.fullmatch(name)
        split, plain = (match["before"] or match["after"] or "", match["name"]) if match else ("", name)
        splits.setdefault(split.lower(), {})[plain] = value
    return splits[min(splits, key=_SPLITS.index)]


def _is_numbers(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, numpy.ndarray) and value.dtype.kind in _NUMBERS)


# ---- any data, in batches ----


def _batches_in(data: Any, limit: int, batch: int, uint8: Callable[[Tensor], Tensor] | None = None) -> list[Any]:
    """`data` in batches; `uint8` makes inputs of such pictures and is there where the numbers come from a file."""
    if _is_labelled(data) and uint8 is not None:
        data = data[0]
    if isinstance(data, PackedSequence):
        return [data]
    if isinstance(data, Tensor | numpy.ndarray | Mapping | _Arguments) or _is_labelled(data):
        size = _size_of(data)
        return [_part(data, indices, uint8) for indices in _deal(size, limit, batch)]
    if isinstance(data, list | tuple) and uint8 is not None:
        return _taken((_converted(item, uint8) for item in _spread(data, limit)), limit)
    if isinstance(data, nn.Module) or not isinstance(data, Iterable):
        raise Unfit(f"a {type(data).__name__} holds no inputs; give a tensor, or batches of inputs")
    return _taken((_converted(item, None) for item in data), limit)


def _is_labelled(data: Any) -> bool:
    """Whether `data` is a pair of tensors, inputs and one integer a sample."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    x, y = data
    arrays = isinstance(x, Tensor | numpy.ndarray) and isinstance(y, Tensor | numpy.ndarray)
    return arrays and y.ndim == 1 and x.ndim > 1 and len(x) == len(y) and _is_integer(y)


def _is_integer(value: _Array) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return value.dtype.kind in "iu"


def _size_of(data: Any) -> int:
    """The common first dimension of an array, or of those in a tuple or a dict."""
    parts = data.items() if isinstance(data, Mapping) else enumerate(data if isinstance(data, tuple | list) else [data])
    sizes = {}
    for name, value in parts:
        if not isinstance(value, Tensor | numpy.ndarray):
            raise Unfit(f"{name} is a {type(value).__name__}, not a tensor")
        if value.ndim == 0:
            raise Unfit("is a single number; the first dimension is that of the samples")
        if 0 in value.shape:
            raise Unfit(f"holds no samples: a tensor of shape {tuple(value.shape)}")
        sizes[name] = int(value.shape[0])
    if len(set(sizes.values())) != 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "nothing"
        raise Unfit(f"inputs need one common first dimension, that of the samples; here: {listed}")
    return next(iter(sizes.values()))


def _deal(size: int, limit: int, batch: int) -> list[list[int]]:
    """At most `limit` of `size` indices, evenly spread, in batches that each span them all; batch sizes differ by 1 at most."""
    count = min(size, limit)
    chosen = [i * size // count for i in range(count)]
    number = -(-count // batch)
    return [chosen[start::number] for start in range(number)]


def _part(data: Any, indices: list[int], uint8: Callable[[Tensor], Tensor] | None, depth: int = 0) -> Any:
    if isinstance(data, Mapping):
        return {name: _part(value, indices, uint8, 1) for name, value in data.items()}
    if isinstance(data, tuple | list):
        return tuple(_part(value, indices, uint8, 1) for value in data)
    if isinstance(data, Tensor):  # torch 2.6 can index neither float8 nor wide unsigned integers
        data = data.float() if data.is_floating_point() and data.itemsize == 1 else data
        data = data.to(torch.int64) if data.dtype in (torch.uint16, torch.uint32, torch.uint64) else data
    rows = data[indices] if isinstance(data, numpy.ndarray) else data[torch.tensor(indices, device=data.device)]
    return _converted(rows, uint8, depth)


def _converted(item: Any, uint8: Callable[[Tensor], Tensor] | None, depth: int = 0) -> Any:
    """`item` with arrays as tensors. A file's floats become float32, its uint8 pictures, and its odd integers int64."""
    if isinstance(item, numpy.ndarray):
        item = _tensor(item)
    if isinstance(item, Tensor):
        item = item.detach()
        if uint8 is None:
            return item
        if item.dtype == torch.uint8 and (item.dim() > 2 or not depth):
            return uint8(item)
        if item.is_floating_point():
            return item.float()
        odd = item.dtype not in (torch.int64, torch.int32, torch.bool) and not item.is_complex()
        return item.to(torch.int64) if odd else item
    if isinstance(item, Mapping):
        return {name: _converted(value, uint8, depth + 1) for name, value in item.items()}
    if type(item) in (tuple, list) and depth < 4:
        return type(item)(_converted(value, uint8, depth + 1) for value in item)
    return item


def _tensor(array: numpy.ndarray[Any, Any]) -> Tensor:
    """A copy of an array of numbers; float64 becomes float32."""
    if array.dtype.kind not in _NUMBERS:
        raise Unfit(f"holds {array.dtype}, not numbers; save floats or integers")
    if array.dtype.kind == "f" and array.dtype.itemsize > 4:
        return torch.from_numpy(array.astype(numpy.float32))
    return torch.from_numpy(numpy.array(array, dtype=array.dtype.newbyteorder("=")))


def _collated(data: Dataset[Any], limit: int, batch: int) -> list[Any]:
    """Samples of a map-style dataset, stacked."""
    try:
        size = len(data)  # type: ignore[arg-type]
    except TypeError:
        raise Unfit(f"a {type(data).__name__} without a length; give a DataLoader") from None
    if not size:
        raise Unfit("the dataset is empty")
    try:
        return [default_collate([data[i] for i in indices]) for indices in _deal(size, limit, batch)]
    except Exception as error:  # the dataset is anybody's code
        raise Unfit(
            f"the samples of {type(data).__name__} cannot be stacked ({first_line(error)}); give a DataLoader"
        ) from error


def _spread(items: Sequence[Any], limit: int) -> list[Any]:
    """Evenly spread items of a list, as many as hold `limit` samples or a little more."""
    total = sum(_count(item, i) for i, item in enumerate(items))
    keep = min(len(items), -(-limit * len(items) // max(total, 1)))
    return [items[i * len(items) // keep] for i in range(keep)]


def _taken(items: Iterator[Any], limit: int) -> list[Any]:
    """Items until they hold `limit` samples, and none after that: a loader may have no end."""
    found: list[Any] = []
    left = limit
    while left > 0:
        try:
            item = next(items)
        except StopIteration:
            break
        except Unfit:
            raise
        except Exception as error:  # a loader is anybody's code
            raise Unfit(f"item {len(found)} cannot be had: {first_line(error)}") from error
        count = _count(item, len(found))
        found.append(_cut(item, left) if count > left else item)
        left -= count
    if not found:
        raise Unfit("holds no samples: it ended before its first item")
    return found


def _count(item: Any, index: int) -> int:
    """How many samples a batch has: the first dimension of its first tensor, or the length of its list of pictures."""
    first = item
    if isinstance(item, PackedSequence):
        return int(item.batch_sizes[0])
    if isinstance(item, Mapping):
        first = next(iter(item.values()), None)
    elif isinstance(item, tuple | list):
        first = item[0] if item else None
    if isinstance(first, Mapping):
        return _count(first, index)
    if isinstance(first, Tensor | numpy.ndarray):
        count = int(first.shape[0]) if first.ndim else 0
    elif isinstance(first, list | tuple):
        count = len(first)
    else:
        raise Unfit(
            f"item {index} is a {type(item).__name__} without a tensor in front; an item is a tensor, a tuple or a dict of them"
        )
    if count == 0:
        raise Unfit(f"item {index} holds no samples")
    return count


def _cut(item: Any, count: int) -> Any:
    """The first `count` samples of a batch, where all its parts have as many as its first."""
    size = _count(item, 0)
    if isinstance(item, PackedSequence):
        return item
    parts = list(item.values()) if isinstance(item, Mapping) else item if isinstance(item, tuple | list) else [item]
    if not all(isinstance(part, Tensor | list | tuple) and _length(part) == size for part in parts):
        return item
    if isinstance(item, Mapping):
        return {name: value[:count] for name, value in item.items()}
    return [value[:count] for value in item] if isinstance(item, tuple | list) else item[:count]


def _length(part: Any) -> int:
    return (
        int(part.shape[0]) if isinstance(part, Tensor) and part.dim() else -1 if isinstance(part, Tensor) else len(part)
    )


def _check_finite(read: list[Any]) -> None:
    for array in _arrays_in(read):
        if isinstance(array, Tensor) and not array.isfinite().all():
            raise Unfit("holds values that are not finite (NaN or infinity); calibration would spread them")


# ---- what a model takes ----


def _parameters(model: nn.Module) -> list[Parameter]:
    try:
        return list(signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # compiled code that shows no signature
        return [Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)]


def _are_labels(second: Any, first: Any) -> bool:
    if isinstance(second, numpy.ndarray | Tensor) and second.ndim > 1:
        floats = isinstance(first, numpy.ndarray | Tensor) and not _is_integer(first)
        return floats and _is_integer(second)
    if isinstance(second, list | tuple):
        return all(isinstance(label, int | float | str | Mapping) for label in second)
    return isinstance(second, int | numpy.ndarray | Tensor)


def _accepted(item: Mapping[Any, Any], parameters: list[Parameter], required: list[Parameter]) -> Any:
    """The part of a dict that a forward accepts; its only input where a forward of one argument calls it otherwise."""
    names = {p.name for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        return dict(item)
    kept = {name: value for name, value in item.items() if name in names}
    if kept and {p.name for p in required} <= set(kept):
        return kept
    inputs = [name for name in item if str(name).lower() in _INPUTS] or list(item)
    return _alone(item[inputs[0]], parameters) if len(required) == len(inputs) == 1 and not kept else dict(item)


def _alone(value: Any, parameters: list[Parameter]) -> Any:
    """One argument in the form that `probe.call` passes as one; a dict as keywords where these are the forward's."""
    if isinstance(value, Mapping) and set(value) <= {p.name for p in parameters}:
        return dict(value)
    return (value,) if isinstance(value, Mapping | list | tuple) else value
