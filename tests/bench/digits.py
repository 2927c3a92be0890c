"""Scikit-learn's digits as a task for networks of pictures, and how well a network does at it."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 36  # pixels a side: five halvings leave maps of 2×2
HELD_OUT = 397
Data = tuple[Tensor, Tensor, Tensor, Tensor]
"""Training images and labels, held-out images and labels; images (N, 3, side, side), normalized."""


def digits() -> Data:
    """The digits at 36×36: 1400 to train on, 397 held out."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=SIZE, mode="bilinear", align_corners=False).repeat(1, 3, 1, 1)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT]


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in eval mode, between 0 and 1."""
    return (outputs(net, images).argmax(1) == labels).double().mean().item()


def outputs(net: nn.Module, images: Tensor) -> Tensor:
    """What the net says of `images` in eval mode, shape (N, classes)."""
    net.eval()
    with torch.no_grad():
        return torch.cat([net(part) for part in images.split(100)])


def shifted(images: Tensor, seed: int = 0) -> Tensor:
    """The images as another camera might see them: turned by 20 to 50 degrees, contrast down to a third, noise."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.deg2rad(20 + 30 * torch.rand(len(images), generator=generator))
    turn = torch.zeros(len(images), 2, 3)
    turn[:, 0, 0], turn[:, 0, 1], turn[:, 1, 0], turn[:, 1, 1] = angle.cos(), -angle.sin(), angle.sin(), angle.cos()
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    turned = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast = 3 ** -torch.rand(len(images), 1, 1, 1, generator=generator)
    return contrast * turned + 0.3 * torch.randn(images.shape, generator=generator)
