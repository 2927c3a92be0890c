"""Pictures as inputs: what a library does to them before its model, or the options say; folders and uint8 arrays of them."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from normswap.errors import FileError, OptionError, first_line

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, on the scale 0 to 1
_CROP = 0.875  # the part of a resized picture that is taken, as 224 of 256
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
_DECODERS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no others: that of EPS runs a program
_MOST_PIXELS = 1 << 27
_NARROWEST = 100  # times its width: the shorter side is resized, so a thread would become a sheet
_LARGEST_SIDE = 1 << 14
_CHANNELS = (1, 3, 4)


class UnusableData(Exception):
    """What is wrong with data; whoever knows where it came from makes the whole message of it."""


@dataclass(frozen=True)
class PictureOptions:
    """Options for pictures, checked: `size` (height, width), `mean` and `std` on the scale 0 to 1; None where not given."""

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __bool__(self) -> bool:
        return self.size is not None or self.mean is not None


@dataclass(frozen=True)
class Preparation:
    """`transform` makes a PIL picture an input (3, height, width). `mean` and `std` are what it normalizes with, if at all.

    `listed`: the model takes a list of pictures, not a batch.
    """

    transform: Callable[[Any], Tensor]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    listed: bool = False


def picture_options(input_size: Any, mean: Any, std: Any) -> PictureOptions:
    """The options, checked. Raises `OptionError`."""
    size = None
    if input_size is not None:
        size = tuple(input_size) if isinstance(input_size, Sequence) else (input_size, input_size)
        if len(size) != 2 or not all(type(side) is int and 0 < side <= _LARGEST_SIDE for side in size):
            raise OptionError(
                f"--input-size: {input_size!r} is no size of a picture; write 224, or 224,320 for height and width"
            )
    if (mean is None) != (std is None):
        raise OptionError("--mean and --std belong together; give both")
    return PictureOptions(size, _numbers("--mean", mean), _numbers("--std", std))


def _numbers(option: str, value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        numbers = tuple(map(float, value if isinstance(value, Iterable) and not isinstance(value, str) else [value]))
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or not all(math.isfinite(number) and abs(number) <= 1 for number in numbers):
        raise OptionError(
            f"{option}: {value!r} does not fit pictures of values from 0 to 1; give one number or one a channel, such as "
            "0.485,0.456,0.406 (divide by 255 where the values go to 255)"
        )
    if option == "--std" and min(numbers) <= 0:
        raise OptionError(f"--std: {value!r} is not positive")
    return numbers


def _each(numbers: tuple[float, ...] | None, channels: int) -> tuple[float, ...] | None:
    return numbers * channels if numbers is not None and len(numbers) == 1 else numbers


# ---- what a picture goes through ----


def preparation(spec: str | None, weights: str | None, look: PictureOptions) -> Preparation:
    """The recipe of the model that `spec` names, changed as `look` says, or a plain one. Raises `OptionError`."""
    for option, numbers in (("--mean", look.mean), ("--std", look.std)):
        if numbers is not None and len(numbers) not in (1, 3):
            raise OptionError(f"{option}: has {len(numbers)} numbers; pictures are read in RGB, so give 1 or 3")
    look = PictureOptions(look.size, _each(look.mean, 3), _each(look.std, 3))
    known = _known(spec, weights, look)
    if known is not None:
        return known
    if look.size is None:
        of = f"of {spec}" if spec else "of this model"
        raise OptionError(f"the size of picture {of} is not known; give --input-size 224 (input_size=224)")
    size, mean, std = look.size, look.mean or _MEAN, look.std or _STD
    return Preparation(lambda picture: _normalized(_scaled(_fitted(picture, size, _CROP)), mean, std), mean, std)


def _known(spec: str | None, weights: str | None, look: PictureOptions) -> Preparation | None:
    """The recipe of a library's model, changed as asked; None where there is none."""
    library, _, name = (spec or "").partition(":")
    makers = {"torchvision": _of_torchvision, "timm": _of_timm}
    return makers[library](name, weights, look) if library in makers else None


def _of_torchvision(name: str, weights: str | None, look: PictureOptions) -> Preparation | None:
    from torchvision import models

    if name not in models.list_models():
        raise OptionError(f"torchvision has no model {name!r}; torchvision.models.list_models() lists them")
    choices = models.get_model_weights(name)
    if weights is not None and weights not in choices.__members__:
        has = ", ".join(choices.__members__) or "none"
        raise OptionError(f"torchvision:{name} has no weights {weights!r}; it has {has}")
    if not len(choices):
        return None
    preset = choices[weights or "DEFAULT"].transforms()
    kind = type(preset).__name__
    if kind in ("VideoClassification", "OpticalFlow"):
        raise OptionError(
            f"torchvision:{name} takes more than one picture at a time; give its inputs as tensors, in a .npy or .pt file"
        )
    listed = kind == "ObjectDetection"
    if look.mean is not None and look.std is not None and not listed:
        preset.mean, preset.std = list(look.mean), list(look.std)
    transform: Callable[[Any], Tensor] = preset
    if look.size is not None:
        size = look.size
        crop = preset.crop_size[0] / preset.resize_size[0] if hasattr(preset, "crop_size") else 1.0
        mode = getattr(preset, "interpolation", None)
        preset.resize_size = preset.crop_size = list(size)  # nothing left to do for the preset: it is fitted before

        def transform(picture: Any) -> Tensor:
            return preset(_fitted(picture, size, crop, mode))  # type: ignore[no-any-return]

    if (
        listed and look.mean is not None and look.std is not None
    ):  # the model normalizes by itself, and once more if asked
        mean, std, plain = look.mean, look.std, transform
        return Preparation(lambda picture: _normalized(plain(picture), mean, std), mean, std, listed)
    if listed:
        return Preparation(transform, None, None, listed)
    return Preparation(transform, tuple(preset.mean), tuple(preset.std))


def _of_timm(name: str, weights: str | None, look: PictureOptions) -> Preparation | None:
    try:
        import timm
    except ImportError:
        raise OptionError(f"timm:{name} needs timm, which is not installed: pip install timm") from None
    plain = name.partition(".")[0]
    if not timm.is_model(plain):
        raise OptionError(f"timm has no model {name!r}; timm.list_models() lists them")
    try:
        described = timm.models.get_pretrained_cfg(f"{plain}.{weights}" if weights is not None else name)
    except RuntimeError as error:
        raise OptionError(f"timm:{name}: {error}") from None
    if described is None:
        return None
    asked = {"input_size": look.size and (3, *look.size), "mean": look.mean, "std": look.std}
    data: Any = timm.data
    config = data.resolve_data_config(asked, pretrained_cfg=vars(described))
    if config["input_size"][0] != 3:
        raise OptionError(f"timm:{name} takes no RGB pictures; give its inputs as tensors, in a .npy or .pt file")
    return Preparation(data.create_transform(**config), tuple(config["mean"]), tuple(config["std"]))


def _fitted(picture: Any, size: tuple[int, int], crop: float, mode: Any = None) -> Any:
    """A picture or a tensor (..., h, w), resized to cover `size`/`crop` with its shape kept; the middle of `size`."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    _, h, w = F.get_dimensions(picture)
    scale = max(size[0] / h, size[1] / w) / crop
    covering = [max(size[0], round(h * scale)), max(size[1], round(w * scale))]
    resized = F.resize(picture, covering, interpolation=mode or InterpolationMode.BILINEAR, antialias=True)
    return F.center_crop(resized, list(size))


def _scaled(picture: Any) -> Tensor:
    from torchvision.transforms import functional as F

    return F.to_tensor(picture)  # type: ignore[no-any-return]


def _normalized(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., C, H, W) with its channels' mean and std taken out."""
    return (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


# ---- folders of pictures ----


def below(folder: Path) -> list[Path]:
    """Every picture in a folder and below it, sorted. Raises `FileError` where there is none."""
    try:
        paths = sorted(_below(folder), key=lambda path: path.relative_to(folder).parts)
    except OSError as error:
        raise FileError(f"{error.filename or folder}: {error.strerror or error}") from None
    if not paths:
        raise FileError(f"{folder}: no pictures in it or below it; they are looked for as {', '.join(_PICTURES)}")
    return paths


def read(paths: Sequence[Path], preparation: Preparation) -> list[Any]:
    """The pictures as one input batch, or as one for each shape that they have.

    Raises `FileError` for one that cannot be decoded.
    """
    inputs = [_prepared(path, preparation) for path in paths]
    if preparation.listed:
        return [(inputs,)]
    shapes: dict[torch.Size, list[Tensor]] = {}  # without a crop, pictures keep their shapes
    for x in inputs:
        shapes.setdefault(x.shape, []).append(x)
    return [torch.stack(alike) for alike in shapes.values()]


def _below(folder: Path) -> Iterator[Path]:
    """Picture files, through links too; nothing hidden, and none of macOS's second copies."""
    seen = set()
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()  # a link that leads back
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        for name in names:
            path = Path(place, name)
            if not name.startswith(".") and path.suffix.lower() in _PICTURES and path.is_file():
                yield path


def _raise(error: OSError) -> None:
    raise error


def _prepared(path: Path, preparation: Preparation) -> Tensor:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of size, which is checked below
            Image.init()
            with Image.open(path, formats=[name for name in _DECODERS if name in Image.OPEN]) as picture:
                short, long = sorted(picture.size)
                if short * long > _MOST_PIXELS or long > _NARROWEST * short:
                    raise FileError(f"{path}: is a picture of {picture.size}, which is too large or too narrow to use")
                return preparation.transform(_rgb(picture)).float()
    except FileError:
        raise
    except Exception as error:  # a decoder meets anything
        raise FileError(f"{path}: cannot be read as a picture ({first_line(error)}); mend or remove it") from None


def _rgb(picture: Any) -> Any:
    from PIL import Image

    if picture.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        values = numpy.asarray(picture).astype(numpy.int64) >> 8
        picture = Image.fromarray(values.clip(0, 255).astype(numpy.uint8))
    return picture.convert("RGB")


# ---- arrays of pictures ----


class Uint8:
    """Makes inputs of uint8 pictures; `met` says whether there were any."""

    def __init__(self, spec: str | None, weights: str | None, look: PictureOptions):
        self.spec, self.weights, self.look, self.met = spec, weights, look, False

    def __call__(self, x: Tensor) -> Tensor:
        """uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) -> float32 (N, C, H, W)."""
        self.met = True
        x = _channels_first(x)
        channels, look = x.shape[1], self.look
        if look.size is not None:
            x = _fitted(x, look.size, 1.0)  # arrays are framed already
        x = x.float() / 255
        mean, std = _each(look.mean, channels), _each(look.std, channels)
        if mean is None or std is None:
            known = _known(self.spec, self.weights, PictureOptions())
            if known is not None and known.listed:
                return x
            mean, std = (known.mean, known.std) if known is not None else (_MEAN, _STD)
        assert mean is not None and std is not None  # for the type checker: only lists go without
        if len(mean) != channels or len(std) != channels:
            raise OptionError(
                f"pictures of {channels} channels, but a mean and std of {len(mean)} and {len(std)}; "
                f"give --mean and --std of 1 or {channels} numbers (mean, std), or save other channels"
            )
        return _normalized(x, mean, std)


def _channels_first(x: Tensor) -> Tensor:
    """uint8 (N, H, W) -> (N, 1, H, W), and (N, H, W, C) -> (N, C, H, W)."""
    shape = tuple(x.shape)
    if x.dim() == 4 and shape[3] in _CHANNELS and shape[1] not in _CHANNELS:
        return x.permute(0, 3, 1, 2).contiguous()
    if x.dim() == 4:
        return x
    if x.dim() == 3 and shape[2] not in _CHANNELS:
        return x.unsqueeze(1)
    raise UnusableData(
        f"uint8 of shape {shape} are no pictures (N, H, W, C), (N, C, H, W) or (N, H, W); "
        "save inputs as float32, tokens as int64"
    )
