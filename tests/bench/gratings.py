"""A made task with larger pictures: which grating lies in a patch of a noisy picture, at different contrasts."""

from __future__ import annotations

import math

import torch
from digits import Data
from torch import Tensor

SIDE = 96
CLASSES = 8  # four directions, fine or coarse
TRAINED, HELD_OUT = 1200, 400


def gratings() -> Data:
    """Training images and labels, held-out images and labels; images (N, 3, 96, 96), normalized."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(TRAINED + HELD_OUT) % CLASSES
    images = torch.cat([_draw(part, generator) for part in labels.split(200)])
    images = (images - images.mean()) / images.std()
    return images[:TRAINED], labels[:TRAINED], images[TRAINED:], labels[TRAINED:]


def _draw(labels: Tensor, generator: torch.Generator) -> Tensor:
    """One picture a label, (N, 3, 96, 96): place and size of the patch, phase, colours and contrast vary freely."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(labels), *shape, generator=generator)

    axis = torch.linspace(-1, 1, SIDE)
    y, x = axis[None, :, None], axis[None, None, :]
    angle = (labels % 4)[:, None, None] * math.pi / 4 + uniform(-0.15, 0.15, 1, 1)
    waves = torch.where((labels < 4)[:, None, None], uniform(10, 12, 1, 1), uniform(5, 7, 1, 1))  # a picture's width
    wave = torch.sin(math.pi * waves * (x * angle.cos() + y * angle.sin()) + uniform(0, 2 * math.pi, 1, 1))
    distance = ((x - uniform(-0.4, 0.4, 1, 1)) ** 2 + (y - uniform(-0.4, 0.4, 1, 1)) ** 2).sqrt()
    patch = (distance < uniform(0.4, 0.7, 1, 1)) * wave
    noise = torch.randn(len(labels), 3, SIDE, SIDE, generator=generator)
    contrast = 5 ** uniform(-0.5, 0.5, 1, 1, 1)
    return contrast * (patch[:, None] * uniform(0.5, 1, 3, 1, 1) + 0.5 * noise) + uniform(-0.5, 0.5, 3, 1, 1)
