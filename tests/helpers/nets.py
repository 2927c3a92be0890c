"""Small networks that many tests use, and values as training leaves them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models import resnet18


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill statistics, gains, biases and convolutions as a trained model has them."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None and not tensor.is_meta:
            with torch.no_grad():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        if hasattr(module, "running_var"):
            uniform(module.running_mean, -0.5, 0.5)
            uniform(module.running_var, 0.5, 2)
            uniform(module.weight, 0.5, 1.5)
            uniform(module.bias, -0.3, 0.3)
        elif isinstance(module, nn.modules.conv._ConvNd) and module.bias is not None:
            uniform(module.bias, -0.3, 0.3)
    return model


def touched(model: nn.Module, change: Callable[[nn.Module], object]) -> nn.Module:
    change(model)
    return model


def conv_norm(
    channels: int = 8, conv: Callable[[], nn.Module] | None = None, norm: nn.Module | None = None
) -> nn.Sequential:
    first = conv() if conv else nn.Conv2d(3, channels, 3)
    return nn.Sequential(OrderedDict(conv=first, norm=norm or nn.BatchNorm2d(channels), act=nn.ReLU()))


def chain(*channels: int) -> nn.Sequential:
    blocks = [
        nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o))
        for i, o in zip((3, *channels), channels, strict=False)
    ]
    return nn.Sequential(*blocks)


def mlp(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, channels), nn.BatchNorm1d(channels), nn.ReLU(), nn.Linear(channels, 5))


class Forward(nn.Module):
    """A model from named layers and a function of (self, x)."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class MixedNet(nn.Module):
    """Convolutions, grouped and transposed ones among them, and linear layers, each before a norm; (N, 3, 9, 9) in.

    Its activations are smooth: at the kink of ReLU rounding moves a gradient by more than it measures.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU(),
            nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8), nn.SiLU(),
            nn.ConvTranspose2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.SiLU(),
        )  # fmt: skip
        self.line = nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.SiLU())
        self.head = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.SiLU(), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.line(self.maps(x).flatten(2)).mean(2))
        return y


def resnet() -> nn.Module:
    """torchvision's ResNet-18 by class and paths, at an eighth of its width, for 10 classes."""
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d):
            inner, outer = max(layer.in_channels // 8, 3), layer.out_channels // 8
            model.set_submodule(
                path, nn.Conv2d(inner, outer, layer.kernel_size, layer.stride, layer.padding, bias=False)
            )
        elif isinstance(layer, nn.BatchNorm2d):
            model.set_submodule(path, nn.BatchNorm2d(layer.num_features // 8))
        elif isinstance(layer, nn.Linear):
            model.set_submodule(path, nn.Linear(layer.in_features // 8, layer.out_features))
    return randomize(model).eval()


X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
"""Two pictures for `resnet`."""
