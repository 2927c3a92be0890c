"""Calibration data: folders of pictures, files of tensors and any iterable, as input batches.

A few hundred samples are in memory and are measured; those beyond are read while a fit goes on, a batch at a time.

A batch is what `running.call_model` takes: a tensor (n, ...), a tuple of positional arguments or a dict of keyword
arguments. Samples are spread over what is there and shuffled, the same way each time: data that are sorted by class,
or that have the classes in turns, give mixed batches.

A file of tensors, `.pt`, `.npy`, `.npz` or `.safetensors`, may hold:
- one array (N, ...): N samples;
- several by name: labels (`y`, `labels`, `targets`, ...) are ignored, of `x_train` and `x_test` the first is taken.
  What remains is the input if it is one array, else keyword inputs with a common first dimension; `arr_0, arr_1` of
  `numpy.savez` are positional ones. Where the first dimensions differ, the only one called `x`, `images`, `inputs`,
  `data` or the like is taken;
- a list in a `.pt` file: each item is a batch as the model takes it, unless it is a pair (inputs, labels).
Floats are taken as they stand. uint8 arrays (N, C, H, W), (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels are
pictures: they become (N, C, H, W), are scaled to 0..1 and normalized as pictures from a folder are, and resized where
`input_size` is given.
"""

from __future__ import annotations

import itertools
import os
import random
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset, default_collate

from normswap.calibration.library_transforms import picture_options, preparation
from normswap.calibration.pictures import PICTURES, Uint8Pictures, UnusableData, find_pictures, read_pictures
from normswap.calibration.tensor_files import NUMBERS, READERS, Arguments, arrays_in, is_integer
from normswap.errors import FileError, OptionError, first_line, path_error

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SEED = 0
MOST_EXAMPLES = 64
"""Most samples that an output's drift is measured on: enough to tell a top-1 of 98% from one of 90%."""
MOST_SAMPLES = 512
"""Most samples in memory: all of them are run to be measured, in time that a fit of large inputs lacks."""


class Batches(list[Any]):
    """Batches that are in memory; those after them are read as they are asked for."""

    def __init__(self, batches: Iterable[Any], further: Iterator[Any]):
        super().__init__(batches)
        self.further = further
        """Batches of other samples, once; whatever cannot be read raises what reading the first ones does."""


def further_batches(data: Any) -> Iterator[Any]:
    """Those that are read as they are asked for; of a plain list, none."""
    return data.further if isinstance(data, Batches) else iter(())


class AsPictures(TypedDict, total=False):
    """How pictures become inputs."""

    spec: str | None
    """`torchvision:NAME` or `timm:NAME`; other specs have no recipe."""
    weights: str | None
    """The name of published weights, where they are not the default ones."""
    input_size: int | Sequence[int] | None
    """Side, or (height, width)."""
    mean: float | Sequence[float] | None
    """One number or one a channel, for values from 0 to 1; given with `std` or not at all."""
    std: float | Sequence[float] | None
    channels: Literal[1, 3]
    """Of the model's input: 1 has pictures of a folder read as grey ones."""


def read_samples(
    path: str | os.PathLike[str], *, limit: int = MOST_SAMPLES, batch: int = 32, **pictures: Unpack[AsPictures]
) -> Batches:
    """Input batches from pictures or a file of tensors, the same ones each time, floats as float32.

    A picture, or a folder: every picture below it, prepared as torchvision or timm prepares them for the
    model that `spec` names (`weights` picks which of their recipes); `input_size`, `mean` and `std` win over the
    recipe. Without one, pictures are resized to cover `input_size`/0.875 and cropped, and ImageNet's mean and std are
    the defaults. Nothing is downloaded.

    What a file of tensors may hold: see the top of this module.

    Args:
        path: the folder or the file.
        limit: most samples that are read at once.
        batch: most samples in a batch; not of a list in a `.pt` file.
        pictures: see `AsPictures`.

    Raises:
        FileError: nothing there, nothing in it, or something broken.
        OptionError: another kind of file, or an option that does not fit.
    """
    path = Path(path)
    _check_counts(limit, batch)
    spec, weights = pictures.get("spec"), pictures.get("weights")
    options = picture_options(*(pictures.get(name) for name in ("input_size", "mean", "std")))
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise path_error(path, error) from None
    if stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and path.suffix.lower() in PICTURES):
        prepared, found = preparation(spec, weights, options, pictures.get("channels", 3)), find_pictures(path)
        return _indexed(len(found), limit, batch, lambda some: read_pictures([found[i] for i in some], prepared))
    if path.suffix.lower() not in READERS:
        kinds = ", ".join(READERS)
        raise OptionError(f"{path}: inputs are a picture, a folder of them, or tensors in one of {kinds}")
    if not stat.S_ISREG(mode):
        raise FileError(f"{path}: is not a regular file")
    try:
        read = _read_tensors(path, limit, batch, Uint8Pictures(spec, weights, options))
        return Batches(read, _errors_told(read.further, lambda error: FileError(f"{path}: {error}")))
    except UnusableData as error:
        raise FileError(f"{path}: {error}") from None
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or first_line(error)}") from None


def _read_tensors(path: Path, limit: int, batch: int, uint8: Uint8Pictures) -> Batches:
    """Batches of what a file of tensors holds."""
    read = _batches_in(READERS[path.suffix.lower()](path), limit, batch, uint8)
    if uint8.options and not uint8.met:
        raise OptionError(
            f"{path}: holds no uint8 pictures, so its values are taken as they stand; "
            "leave --input-size, --mean and --std (input_size, mean, std) out"
        )
    return Batches(map(_finite, read), map(_finite, read.further))


def _finite(batch: Any) -> Any:
    for array in arrays_in(batch):
        if isinstance(array, Tensor) and not array.isfinite().all():
            raise UnusableData("holds values that are not finite (NaN or infinity); calibration would spread them")
    return batch


def input_batches(data: Any, *, limit: int = MOST_SAMPLES, batch: int = 32, name: str = "calibrate") -> Batches:
    """Input batches of at most `limit` samples in all, and further ones, from whatever holds inputs.

    A tensor, a numpy array (floats become float32), a dict of them (keyword inputs) and a map-style `Dataset`, whose
    items are single samples: spread evenly, `batch` at a time. A pair (inputs, labels) of tensors: the same.
    Anything else that can be iterated, such as a `DataLoader`, a list or a generator: its items as given, each a
    batch; the last one is cut where it holds too many, and more are asked for as they are needed, which may be never.
    Labels stay: see `first_inputs`.

    Raises `OptionError` for data that is empty, or no data; `name` is the option.
    """
    _check_counts(limit, batch)
    if data is None or isinstance(data, str | bytes | os.PathLike):
        raise OptionError(f"{name}: {data!r} holds no inputs; give a tensor, or batches of inputs")
    is_indexed = isinstance(data, Dataset) and not isinstance(data, IterableDataset)
    try:
        read = _dataset_batches(data, limit, batch) if is_indexed else _batches_in(data, limit, batch)
        return Batches(read, _errors_told(read.further, lambda error: OptionError(f"{name}: {error}")))
    except UnusableData as error:
        raise OptionError(f"{name}: {error}") from None


def few_examples(data: Any) -> tuple[Any, str]:
    """A few inputs as one batch, which may hold labels, and what they are called. `data`: as `input_batches` has it."""
    batches = input_batches(data, limit=MOST_EXAMPLES, batch=MOST_EXAMPLES, name="examples")
    return as_one_batch(batches)


def as_one_batch(batches: Sequence[Any]) -> tuple[Any, str]:
    """Batches of tensors that fit together as one, else the first of them; with a name for it."""
    leaves, specs = zip(
        *(pytree.tree_flatten(batch, lambda x: isinstance(x, PackedSequence)) for batch in batches), strict=True
    )
    shapes = [[leaf.shape[1:] if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in some] for some in leaves]
    fit = all(spec == specs[0] for spec in specs) and all(some == shapes[0] for some in shapes)
    one = batches[0]
    if fit and None not in shapes[0]:
        one = pytree.tree_unflatten([torch.cat(parts) for parts in zip(*leaves, strict=True)], specs[0])
    count = _sample_count(one, 0)
    return one, f"{count} example{'s' * (count != 1)}"


# ---- options ----


def _check_counts(limit: int, batch: int) -> None:
    for name, value in (("limit", limit), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name}: {value!r} is not a number of samples; give a whole number, 1 or more")


# ---- any data, in batches ----


def _errors_told(further: Iterator[Any], told: Callable[[UnusableData], Exception]) -> Iterator[Any]:
    """`further`, with errors of which whoever has the data makes the whole message."""
    try:
        yield from further
    except UnusableData as error:
        raise told(error) from None


def _batches_in(data: Any, limit: int, batch: int, uint8: Callable[[Tensor], Tensor] | None = None) -> Batches:
    """`data` in batches; `uint8` makes inputs of such pictures and is there where the numbers come from a file."""
    if _is_labelled(data) and uint8 is not None:
        data = data[0]
    if isinstance(data, PackedSequence):
        return Batches([data], iter(()))
    if isinstance(data, Tensor | numpy.ndarray | Mapping | Arguments) or _is_labelled(data):
        return _indexed(_size_of(data), limit, batch, lambda some: [_rows_of(data, some, uint8)])
    if isinstance(data, list | tuple) and uint8 is not None:
        return _first_items((_to_tensors(item, uint8) for item in _spread_items(data, limit)), limit)
    if isinstance(data, nn.Module) or not isinstance(data, Iterable):
        raise UnusableData(f"a {type(data).__name__} holds no inputs; give a tensor, or batches of inputs")
    return _first_items((_to_tensors(item, None) for item in data), limit)


def _indexed(size: int, limit: int, batch: int, read: Callable[[list[int]], Sequence[Any]]) -> Batches:
    """What `read` makes of at most `limit` of `size` indices, `batch` at a time, and of the others once asked for."""
    first = _shuffled_indices(size, limit, batch)
    further = (item for indices in _other_indices(size, first, batch) for item in read(indices))
    return Batches((item for indices in first for item in read(indices)), further)


def _is_labelled(data: Any) -> bool:
    """Whether `data` is a pair of tensors, inputs and one integer a sample."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    x, y = data
    arrays = isinstance(x, Tensor | numpy.ndarray) and isinstance(y, Tensor | numpy.ndarray)
    return arrays and y.ndim == 1 and x.ndim > 1 and len(x) == len(y) and is_integer(y)


def _size_of(data: Any) -> int:
    """The common first dimension of an array, or of those in a tuple or a dict."""
    parts = data.items() if isinstance(data, Mapping) else enumerate(data if isinstance(data, tuple | list) else [data])
    sizes = {}
    for name, value in parts:
        if not isinstance(value, Tensor | numpy.ndarray):
            raise UnusableData(f"{name} is a {type(value).__name__}, not a tensor")
        if value.ndim == 0:
            raise UnusableData("is a single number; the first dimension is that of the samples")
        if 0 in value.shape:
            raise UnusableData(f"holds no samples: a tensor of shape {tuple(value.shape)}")
        sizes[name] = int(value.shape[0])
    if len(set(sizes.values())) != 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "nothing"
        raise UnusableData(f"inputs need one common first dimension, that of the samples; here: {listed}")
    return next(iter(sizes.values()))


def _shuffled_indices(size: int, limit: int, batch: int) -> list[list[int]]:
    """At most `limit` of `size` indices, spread over all, shuffled into batches whose sizes differ by 1 at most."""
    count = min(size, limit)
    number = max(1, -(-count // batch))
    chosen = _spread_indices(size, count)
    if number > 1:
        random.Random(_SEED).shuffle(chosen)
    return [chosen[start::number] for start in range(number)]


def _other_indices(size: int, first: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    """The indices that are not among the first, each once, shuffled, `batch` at a time."""
    if sum(map(len, first)) == size:
        return
    taken = numpy.isin(shuffled := numpy.random.default_rng(_SEED).permutation(size), numpy.concatenate(first))
    others = shuffled[~taken]
    for start in range(0, len(others), batch):
        yield others[start : start + batch].tolist()


def _spread_indices(size: int, count: int) -> list[int]:
    """`count` of `size` indices in order, one at random from each of so many equal parts.

    So samples of one class alone come neither of sorted data nor of data that have the classes in turns.
    """
    drawn = random.Random(_SEED)
    ends = [i * size // max(count, 1) for i in range(count + 1)]
    return [drawn.randrange(start, end) for start, end in itertools.pairwise(ends)]


def _rows_of(data: Any, indices: list[int], uint8: Callable[[Tensor], Tensor] | None, depth: int = 0) -> Any:
    if isinstance(data, Mapping):
        return {name: _rows_of(value, indices, uint8, 1) for name, value in data.items()}
    if isinstance(data, tuple | list):
        return tuple(_rows_of(value, indices, uint8, 1) for value in data)
    if isinstance(data, Tensor):  # torch 2.6 can index neither float8 nor wide unsigned integers
        data = data.float() if data.is_floating_point() and data.itemsize == 1 else data
        data = data.to(torch.int64) if data.dtype in (torch.uint16, torch.uint32, torch.uint64) else data
    rows = data[indices] if isinstance(data, numpy.ndarray) else data[torch.tensor(indices, device=data.device)]
    return _to_tensors(rows, uint8, depth)


def _to_tensors(item: Any, uint8: Callable[[Tensor], Tensor] | None, depth: int = 0) -> Any:
    """`item` with arrays as tensors. A file's floats become float32, its uint8 pictures, and its odd integers int64."""
    if isinstance(item, numpy.ndarray):
        item = _array_to_tensor(item)
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
        return {name: _to_tensors(value, uint8, depth + 1) for name, value in item.items()}
    if type(item) in (tuple, list) and depth < 4:
        return type(item)(_to_tensors(value, uint8, depth + 1) for value in item)
    return item


def _array_to_tensor(array: numpy.ndarray[Any, Any]) -> Tensor:
    """A copy of an array of numbers; float64 becomes float32."""
    if array.dtype.kind not in NUMBERS:
        raise UnusableData(f"holds {array.dtype}, not numbers; save floats or integers")
    if array.dtype.kind == "f" and array.dtype.itemsize > 4:
        return torch.from_numpy(array.astype(numpy.float32))
    return torch.from_numpy(numpy.array(array, dtype=array.dtype.newbyteorder("=")))


def _dataset_batches(data: Dataset[Any], limit: int, batch: int) -> Batches:
    """Samples of a map-style dataset, stacked."""
    try:
        size = len(data)  # type: ignore[arg-type]
    except TypeError:
        raise UnusableData(f"a {type(data).__name__} without a length; give a DataLoader") from None
    if not size:
        raise UnusableData("the dataset is empty")

    def stacked(indices: list[int]) -> list[Any]:
        try:
            return [default_collate([data[i] for i in indices])]
        except Exception as error:  # the dataset is anybody's code
            raise UnusableData(
                f"the samples of {type(data).__name__} cannot be stacked ({first_line(error)}); give a DataLoader"
            ) from error

    return _indexed(size, limit, batch, stacked)


def _spread_items(items: Sequence[Any], limit: int) -> Iterator[Any]:
    """Evenly spread items of a list, as many as hold `limit` samples or a little more, and then the others."""
    total = sum(_sample_count(item, i) for i, item in enumerate(items))
    keep = min(len(items), -(-limit * len(items) // max(total, 1)))
    first = _spread_indices(len(items), keep)
    others = (i for indices in _other_indices(len(items), [first], 1) for i in indices)
    return (items[i] for i in itertools.chain(first, others))


def _first_items(items: Iterator[Any], limit: int) -> Batches:
    """Items until they hold `limit` samples, and what follows: a loader may have no end."""
    found: list[Any] = []
    left = limit
    while left > 0:
        try:
            item = next(items)
        except StopIteration:
            break
        except UnusableData:
            raise
        except Exception as error:  # a loader is anybody's code
            raise UnusableData(f"item {len(found)} cannot be had: {first_line(error)}") from error
        count = _sample_count(item, len(found))
        found.append(_first_samples(item, left) if count > left else item)
        left -= count
    if not found:
        raise UnusableData("holds no samples: it ended before its first item")
    return Batches(found, items)


def _sample_count(item: Any, index: int) -> int:
    """How many samples a batch has: the first dimension of its first tensor, or the length of its list of pictures."""
    if isinstance(item, PackedSequence):
        return int(item.batch_sizes[0])
    first = next(iter(_parts_of(item)), None)
    if isinstance(first, Mapping):
        return _sample_count(first, index)
    if not isinstance(first, Tensor | numpy.ndarray | list | tuple):
        raise UnusableData(
            f"item {index} is a {type(item).__name__} without a tensor in front; "
            "an item is a tensor, a tuple or a dict of them"
        )
    count = _first_dimension(first)
    if count < 1:
        raise UnusableData(f"item {index} holds no samples")
    return count


def _first_samples(item: Any, count: int) -> Any:
    """The first `count` samples of a batch, where all its parts have as many as its first."""
    size = _sample_count(item, 0)
    if isinstance(item, PackedSequence):
        return item
    if not all(isinstance(part, Tensor | list | tuple) and _first_dimension(part) == size for part in _parts_of(item)):
        return item
    if isinstance(item, Mapping):
        return {name: value[:count] for name, value in item.items()}
    return [value[:count] for value in item] if isinstance(item, tuple | list) else item[:count]


def _parts_of(item: Any) -> Iterable[Any]:
    return item.values() if isinstance(item, Mapping) else item if isinstance(item, tuple | list) else [item]


def _first_dimension(part: Any) -> int:
    """The number of samples in a tensor, an array or a list; -1 for a single number."""
    return len(part) if getattr(part, "ndim", 1) else -1
