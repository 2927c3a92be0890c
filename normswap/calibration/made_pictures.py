"""Made pictures, on which numbers of groups are compared where there are no data.

Opaque shapes of all sizes, one before the other ("dead leaves": Lee, Mumford & Huang 2001), have edges and contrasts as
photographs have them, and networks learn to see on them nearly as well (Baradad et al. 2021). Which number of groups
keeps most is told by them as by photographs. Nothing may be fitted on them: that ruins a network.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normswap.analysis.noise import guess_inputs
from normswap.analysis.running import SEED, as_arguments, inputs_like, run_model
from normswap.analysis.sites import Site
from normswap.calibration.likeness import unlikeness
from normswap.calibration.measuring import measure_norms
from normswap.errors import ModelError

_FEWEST, _MOST_PICTURES = 4, 64
_PIXELS, _AT_ONCE = 16 * 224 * 224, 4 * 224 * 224  # of all pictures, and of those that a run takes
_LEAVES = 64  # in a picture
_SMALLEST, _LARGEST = 0.03, 0.5  # their radius, as a share of the picture's side
_FAINT, _STRONG = 0.3, 1.2  # contrast of a picture, in standard deviations of normalized ones
_BRIGHTNESS = 0.5  # how much the means of pictures vary, in the same unit
_GREY = 0.7  # of a colour's variance, what its channels have in common
_SMALL = (32, 28)  # sides of pictures that networks with few strides are trained on
_FURTHEST = 1.0  # from what norms have learnt, as `likeness` has it: CIFAR's ResNets .34, EfficientNet-Lite0 .6
_LEAST_MAP = 4  # side that the last maps of such a network have on them


def errors_on_made_pictures(model: nn.Module, sites: Sequence[Site], inputs: Any) -> Mapping[str, Mapping[int, float]]:
    """By the path of a norm and the number of groups: the square error of the group norm that is matched to the norm.

    Args:
        model: is run in eval mode, within a budget.
        sites: its norms.
        inputs: what the model takes, whose size the pictures then have; None where it is not known.

    Returns:
        Empty where the model takes no pictures, not any of the sizes that are tried, or values of another range.
    """
    for channels, height, width in _sizes(model, sites, inputs):
        pixels = max(1, height * width)
        number = max(_FEWEST, min(_MOST_PICTURES, _PIXELS // pixels))
        pictures = inputs_like(model, dead_leaves(number, channels, height, width))
        try:
            found = measure_norms(model, pictures.split(max(1, _AT_ONCE // pixels)), sites, unasked=True)
        except ModelError:
            continue
        unlike = unlikeness(sites, found, number)
        if unlike is not None and unlike.median > _FURTHEST:
            return {}
        return {path: measured.errors for path, measured in found.items() if measured.errors}
    return {}


def _sizes(model: nn.Module, sites: Sequence[Site], inputs: Any) -> Iterator[tuple[int, int, int]]:
    """Channels, height and width of pictures that a model may take, likeliest first."""
    known = inputs is not None
    given = as_arguments(inputs)[0] if known else (guess_inputs(model) or ((),))[0]
    if len(given) != 1 or not isinstance(given[0], Tensor) or given[0].dim() != 4 or given[0].shape[1] not in (1, 3):
        return
    channels, height, width = given[0].shape[1:]
    if known:
        yield channels, height, width
        return
    small = {side: least for side in _SMALL if (least := _least_map(model, sites, channels, side))}
    yield from ((channels, side, side) for side, least in small.items() if least >= _LEAST_MAP)
    yield channels, height, width
    yield from ((channels, side, side) for side in small)


def _least_map(model: nn.Module, sites: Sequence[Site], channels: int, side: int) -> int:
    """The least side of the maps that norms see in a picture; 0 where the model does not run on it."""
    try:
        picture = inputs_like(model, torch.zeros(1, channels, side, side))
        seen = run_model(model, picture, sites, unasked=True).seen.values()
    except ModelError:
        return 0
    return min((min(norm.spatial, default=1) for norm in seen), default=0)


def dead_leaves(number: int, channels: int, height: int, width: int) -> Tensor:
    """Pictures of overlapping opaque ellipses and boxes, in the range of normalized ones: the same in every call.

    Radii r are spread as 1/r³, which makes the pictures look the same at every scale. Contrast and brightness vary.

    Returns:
        Of shape (number, channels, height, width).
    """
    generator = torch.Generator().manual_seed(SEED)

    def uniform(least: float, most: float) -> Tensor:
        return least + (most - least) * torch.rand(number, 1, 1, generator=generator)

    def colour() -> Tensor:
        common, own = (torch.randn(number, n, 1, 1, generator=generator) for n in (1, channels))
        return math.sqrt(_GREY) * common + math.sqrt(1 - _GREY) * own

    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    pictures = colour().expand(number, channels, height, width)
    for _ in range(_LEAVES):
        radius = uniform(_LARGEST**-2, _SMALLEST**-2).rsqrt()
        stretch, angle = uniform(-0.5, 0.5).exp(), uniform(0, math.pi)
        down, right = y - uniform(0, 1), x - uniform(0, 1)
        along = (right * angle.cos() + down * angle.sin()).abs() / (radius * stretch)
        across = (down * angle.cos() - right * angle.sin()).abs() / (radius / stretch)
        is_box = uniform(0, 1) < 0.5
        inside = torch.where(is_box, torch.maximum(along, across), torch.hypot(along, across)) < 1
        pictures = torch.where(inside[:, None], colour(), pictures)
    contrast = uniform(math.log(_FAINT), math.log(_STRONG)).exp()
    brightness = _BRIGHTNESS * torch.randn(number, 1, 1, 1, generator=generator)
    return contrast[:, None] * pictures + brightness
