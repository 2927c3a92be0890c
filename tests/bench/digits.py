"""Small networks of torchvision trained on scikit-learn's digits: what the benchmarks of accuracy convert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

SIZE = 48  # pixels a side: five halvings leave maps of 2×2
HELD_OUT = 397


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, held-out images and labels; images (N, 3, 48, 48), normalized."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=SIZE, mode="bilinear", align_corners=False).repeat(1, 3, 1, 1)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT]


def vgg() -> nn.Module:
    net = models.vgg11_bn(num_classes=10)
    net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    return net


def densenet() -> nn.Module:
    return models.DenseNet(growth_rate=16, block_config=(4, 6, 6, 4), num_init_features=32, num_classes=10)


NETS: dict[str, tuple[Callable[[], nn.Module], float, int]] = {
    "ResNet-18": (lambda: models.resnet18(num_classes=10), 2e-3, 8),
    "VGG-11-bn": (vgg, 1e-3, 8),
    "DenseNet": (densenet, 3e-3, 12),
    "MobileNetV2": (lambda: models.mobilenet_v2(num_classes=10), 4e-3, 16),
}
"""By name: how to make it, its peak learning rate, and the epochs that it is trained for."""


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in eval mode, between 0 and 1."""
    net.eval()
    with torch.no_grad():
        guesses = torch.cat([net(part).argmax(1) for part in images.split(100)])
    return (guesses == labels).double().mean().item()


def train(net: nn.Module, images: Tensor, labels: Tensor, rate: float, epochs: int, batch: int = 50) -> nn.Module:
    """Train `net` with AdamW and a one-cycle rate, on images that are moved by up to four pixels."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * (len(labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for part in order[: len(labels) // batch * batch].split(batch):
            dy, dx = torch.randint(-4, 5, (2,), generator=generator).tolist()
            loss = F.cross_entropy(net(images[part].roll((dy, dx), (2, 3))), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net


def trained(name: str, cache: Path | None = None) -> nn.Module:
    """The net called `name`, trained; its weights are kept in the folder `cache`, if one is given."""
    make, rate, epochs = NETS[name]
    torch.manual_seed(0)
    net = make()
    file = cache / f"{name}.pt" if cache else None
    if file is not None and file.exists():
        net.load_state_dict(torch.load(file))
        return net.eval()
    images, labels, _, _ = digits()
    train(net, images, labels, rate, epochs)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), file)
    return net.eval()
