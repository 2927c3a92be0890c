"""Pictures as inputs: those in a folder, and arrays of them."""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from normswap.calibration import library_transforms
from normswap.calibration.library_transforms import IMAGENET_MEAN, IMAGENET_STD, PictureOptions, Preparation
from normswap.errors import FileError, OptionError, first_line

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
_DECODERS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no others: that of EPS runs a program
_MOST_PIXELS = 1 << 27
_NARROWEST = 100  # times its width: the shorter side is resized, so a thread would become a sheet
_CHANNELS = (1, 3, 4)


class UnusableData(Exception):
    """What is wrong with data; whoever knows where it came from makes the whole message of it."""


# ---- folders of pictures ----


def find_pictures(folder: Path) -> list[Path]:
    """Every picture in a folder and below it, sorted; of one picture, that. Raises `FileError` where there is none."""
    if folder.is_file():
        return [folder]
    try:
        paths = sorted(_picture_files(folder), key=lambda path: path.relative_to(folder).parts)
    except OSError as error:
        raise FileError(f"{error.filename or folder}: {error.strerror or error}") from None
    if not paths:
        raise FileError(f"{folder}: no pictures in it or below it; they are looked for as {', '.join(PICTURES)}")
    return paths


def read_pictures(paths: Sequence[Path], preparation: Preparation) -> list[Any]:
    """The pictures as one input batch, or as one for each shape that they have.

    Raises `FileError` for one that cannot be decoded.
    """
    inputs = [_read_picture(path, preparation) for path in paths]
    if preparation.listed:
        return [(inputs,)]
    shapes: dict[torch.Size, list[Tensor]] = {}  # without a crop, pictures keep their shapes
    for x in inputs:
        shapes.setdefault(x.shape, []).append(x)
    return [torch.stack(alike) for alike in shapes.values()]


def _picture_files(folder: Path) -> Iterator[Path]:
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
            if not name.startswith(".") and path.suffix.lower() in PICTURES and path.is_file():
                yield path


def _raise(error: OSError) -> None:
    raise error


def _read_picture(path: Path, preparation: Preparation) -> Tensor:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of size, which is checked below
            Image.init()
            with Image.open(path, formats=[name for name in _DECODERS if name in Image.OPEN]) as picture:
                short, long = sorted(picture.size)
                if short * long > _MOST_PIXELS or long > _NARROWEST * short:
                    raise FileError(f"{path}: is a picture of {picture.size}, which is too large or too narrow to use")
                return preparation.transform(_in_mode(picture, preparation.mode)).float()
    except FileError:
        raise
    except Exception as error:  # a decoder meets anything
        raise FileError(f"{path}: cannot be read as a picture ({first_line(error)}); mend or remove it") from None


def _in_mode(picture: Any, mode: str) -> Any:
    from PIL import Image

    if picture.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        values = numpy.asarray(picture).astype(numpy.int64) >> 8
        picture = Image.fromarray(values.clip(0, 255).astype(numpy.uint8))
    return picture.convert(mode)


# ---- arrays of pictures ----


class Uint8Pictures:
    """Makes inputs of uint8 pictures as the options say, or else as the library of the model does."""

    def __init__(self, spec: str | None, weights: str | None, options: PictureOptions):
        self.spec, self.weights, self.options = spec, weights, options
        self.met = False
        """Whether there were any, so that the options served a purpose."""

    def __call__(self, x: Tensor) -> Tensor:
        """uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) -> float32 (N, C, H, W). Raises `OptionError`."""
        self.met = True
        x = _channels_first(x)
        channels = x.shape[1]
        options = self.options.for_channels(channels)
        if options.size is not None:
            x = library_transforms.resize_and_crop(x, options.size, 1.0)  # arrays are framed already
        x = x.float() / 255
        mean, std = options.mean, options.std
        if mean is None:
            known = library_transforms.library_preparation(self.spec, self.weights, PictureOptions())
            mean, std = (known.mean, known.std) if known is not None else (IMAGENET_MEAN, IMAGENET_STD)
        if mean is None or std is None:  # the model normalizes by itself
            return x
        if len(mean) != channels or len(std) != channels:
            raise OptionError(
                f"pictures of {channels} channels, but a mean and std of {len(mean)} and {len(std)}; "
                f"give --mean and --std of 1 or {channels} numbers (mean, std), or save other channels"
            )
        return library_transforms.normalize(x, mean, std)


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
