"""What a picture goes through before it is a model's input: as torchvision or timm do it, or as the options say.

Numbers called `mean` and `std` are for values from 0 to 1, one a channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from normswap import libraries
from normswap.errors import OptionError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DEFAULTS = {3: (IMAGENET_MEAN, IMAGENET_STD), 1: ((0.449,), (0.226,))}  # of grey, the means of the three
_CROP = 0.875  # the part of a resized picture that is taken, as 224 of 256
_LARGEST_SIDE = 1 << 14


@dataclass(frozen=True)
class PictureOptions:
    """What a user asks for of pictures, checked; None where nothing is asked."""

    size: tuple[int, int] | None = None
    """Height and width."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __bool__(self) -> bool:
        return self.size is not None or self.mean is not None

    def for_channels(self, channels: int) -> PictureOptions:
        """The same, with a single number repeated for each channel."""
        mean, std = (v * channels if v is not None and len(v) == 1 else v for v in (self.mean, self.std))
        return PictureOptions(self.size, mean, std)


@dataclass(frozen=True)
class Preparation:
    """How the pictures of a model are prepared."""

    transform: Callable[[Any], Tensor]
    """From a picture of PIL to an input (channels, height, width)."""
    mean: tuple[float, ...] | None
    """What `transform` subtracts; None where the model normalizes by itself."""
    std: tuple[float, ...] | None
    """What `transform` divides by."""
    listed: bool = False
    """The model takes a list of pictures, not a batch."""
    mode: str = "RGB"
    """What `transform` takes a picture in, in PIL's terms; "L" is grey."""


# ---- options ----


def picture_options(input_size: Any, mean: Any, std: Any) -> PictureOptions:
    """The options, checked. Raises `OptionError`."""
    size = None
    if input_size is not None:
        size = tuple(input_size) if isinstance(input_size, Sequence) else (input_size, input_size)
        if len(size) != 2 or not all(type(side) is int and 0 < side <= _LARGEST_SIDE for side in size):
            raise OptionError(
                f"--input-size: {input_size!r} is not a picture size; write 224, or 224,320 for height and width"
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
            f"{option}: {value!r} does not fit pictures of values from 0 to 1; give one number or one a channel, "
            "such as 0.485,0.456,0.406 (divide by 255 where the values go to 255)"
        )
    if option == "--std" and min(numbers) <= 0:
        raise OptionError(f"--std: {value!r} is not positive")
    return numbers


# ---- what a picture goes through ----


def preparation(
    spec: str | None, weights: str | None, options: PictureOptions, channels: Literal[1, 3] = 3
) -> Preparation:
    """That of the model that `spec` names, changed as `options` say; a plain one where there is none, and for grey.

    Raises `OptionError`.
    """
    from torchvision.transforms import functional as F

    for option, numbers in (("--mean", options.mean), ("--std", options.std)):
        if numbers is not None and len(numbers) not in (1, channels):
            are = "in RGB, so give 1 or 3" if channels == 3 else "as grey ones, so give 1"
            raise OptionError(f"{option}: has {len(numbers)} numbers; pictures are read {are}")
    options = options.for_channels(channels)
    known = library_preparation(spec, weights, options) if channels == 3 else None
    if known is not None:
        return known
    if options.size is None:
        of = f"of {spec}" if spec else "of this model"
        raise OptionError(f"the size of picture {of} is not known; give --input-size 224 (input_size=224)")
    usual_mean, usual_std = _DEFAULTS[channels]
    size, mean, std = options.size, options.mean or usual_mean, options.std or usual_std
    transform = lambda x: normalize(F.to_tensor(resize_and_crop(x, size, _CROP)), mean, std)  # noqa: E731
    return Preparation(transform, mean, std, mode="RGB" if channels == 3 else "L")


def library_preparation(spec: str | None, weights: str | None, options: PictureOptions) -> Preparation | None:
    """That of a library's model, changed as `options` say; None where there is none. Raises `OptionError`."""
    library, _, name = (spec or "").partition(":")
    if library == "torchvision":
        return _of_torchvision(name, weights, options)
    return _of_timm(name, weights, options) if library == "timm" else None


def _of_torchvision(name: str, weights: str | None, options: PictureOptions) -> Preparation | None:
    libraries.check_torchvision_model(name)
    published = libraries.torchvision_weights(name, weights)
    if not len(published):
        return None
    preset = published[weights or "DEFAULT"].transforms()
    kind = type(preset).__name__
    if kind in ("VideoClassification", "OpticalFlow"):
        raise OptionError(
            f"torchvision:{name} takes more than one picture at a time; "
            "give its inputs as tensors, in a .npy or .pt file"
        )
    transform = preset if options.size is None else _at_size(preset, options.size)
    mean, std = options.mean, options.std
    if kind != "ObjectDetection":
        preset.mean, preset.std = list(mean or preset.mean), list(std or preset.std)
        return Preparation(transform, tuple(preset.mean), tuple(preset.std))
    if mean is not None and std is not None:  # beside what the model does by itself
        return Preparation(lambda picture: normalize(transform(picture), mean, std), mean, std, listed=True)
    return Preparation(transform, None, None, listed=True)


def _at_size(preset: Any, size: tuple[int, int]) -> Callable[[Any], Tensor]:
    """A preset of torchvision's, for inputs of another size than its own; as much is cropped, in proportion."""
    crop = preset.crop_size[0] / preset.resize_size[0] if hasattr(preset, "crop_size") else 1.0
    mode = getattr(preset, "interpolation", None)
    preset.resize_size = preset.crop_size = list(size)  # nothing is left to do for the preset itself
    return lambda picture: preset(resize_and_crop(picture, size, crop, mode))


def _of_timm(name: str, weights: str | None, options: PictureOptions) -> Preparation | None:
    timm, full = libraries.timm_model(name, weights)
    try:
        described = timm.models.get_pretrained_cfg(full)
    except RuntimeError as error:
        raise OptionError(f"timm:{name}: {error}") from None
    if described is None:
        return None
    asked = {"input_size": options.size and (3, *options.size), "mean": options.mean, "std": options.std}
    config = timm.data.resolve_data_config(asked, pretrained_cfg=vars(described))
    if config["input_size"][0] != 3:
        raise OptionError(f"timm:{name} takes no RGB pictures; give its inputs as tensors, in a .npy or .pt file")
    return Preparation(timm.data.create_transform(**config), tuple(config["mean"]), tuple(config["std"]))


# ---- steps ----


def resize_and_crop(picture: Any, size: tuple[int, int], crop: float, mode: Any = None) -> Any:
    """A picture or a tensor (..., h, w), resized to cover `size`/`crop` with its shape kept; the middle of `size`."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    _, h, w = F.get_dimensions(picture)
    scale = max(size[0] / h, size[1] / w) / crop
    covering = [max(size[0], round(h * scale)), max(size[1], round(w * scale))]
    resized = F.resize(picture, covering, interpolation=mode or InterpolationMode.BILINEAR, antialias=True)
    return F.center_crop(resized, list(size))


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., C, H, W) with its channels' mean and std taken out."""
    return (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
