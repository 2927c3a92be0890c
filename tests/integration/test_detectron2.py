"""detectron2's idiom, rebuilt since no registry has it: convolutions that hold their norms, frozen ones among them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from helpers.checks import distance
from helpers.nets import randomize
from torch import Tensor, nn
from torch.nn import functional as F

import normswap

X = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Conv2d(nn.Conv2d):
    """`detectron2.layers.Conv2d`."""

    def __init__(self, *args: int, norm: nn.Module | None = None, activation: object = None, **options: object):
        super().__init__(*args, **options)
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            with warnings.catch_warnings(record=True):
                if x.numel() == 0 and self.training:
                    assert not isinstance(self.norm, nn.SyncBatchNorm), "SyncBatchNorm does not support empty inputs!"
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class FrozenBatchNorm2d(nn.Module):
    """`detectron2.layers.FrozenBatchNorm2d`, whose four tensors are buffers."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0 - eps)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + shift.reshape(1, -1, 1, 1).to(x.dtype)
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)


class Bottleneck(nn.Module):
    """`BottleneckBlock` of its ResNet."""

    def __init__(self, inner: int, outer: int, stride: int, norm: type[nn.Module]):
        super().__init__()
        middle = outer // 4
        self.shortcut = None
        if inner != outer:
            self.shortcut = Conv2d(inner, outer, 1, stride=stride, bias=False, norm=norm(outer))
        self.conv1 = Conv2d(inner, middle, 1, stride=stride, bias=False, norm=norm(middle))
        self.conv2 = Conv2d(middle, middle, 3, padding=1, bias=False, norm=norm(middle))
        self.conv3 = Conv2d(middle, outer, 1, bias=False, norm=norm(outer))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = self.conv3(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class Backbone(nn.Module):
    """A stem, two stages, and the laterals of a feature pyramid."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d):
        super().__init__()
        self.stem = Conv2d(3, 16, 7, stride=2, padding=3, bias=False, norm=norm(16), activation=F.relu)
        self.res2 = nn.Sequential(Bottleneck(16, 32, 1, norm), Bottleneck(32, 32, 1, norm))
        self.res3 = nn.Sequential(Bottleneck(32, 64, 2, norm), Bottleneck(64, 64, 1, norm))
        self.lateral2, self.lateral3 = (Conv2d(width, 16, 1, bias=False, norm=norm(16)) for width in (32, 64))
        self.output2, self.output3 = (Conv2d(16, 16, 3, padding=1, bias=False, norm=norm(16)) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        two = self.res2(F.max_pool2d(self.stem(x), 3, 2, 1))
        three = self.res3(two)
        top = self.lateral3(three)
        low = self.lateral2(two) + F.interpolate(top, scale_factor=2.0)
        return [self.output2(low), self.output3(top)]


def backbone(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Backbone(norm)).double().eval()


def moved(model: nn.Module, converted: nn.Module) -> float:
    return max(distance(a, b) for a, b in zip(model(X), converted.eval()(X), strict=True))


NORMS = 1 + 2 * 4 + 2 * 3 + 4


@pytest.mark.parametrize(
    ("norm", "target"),
    [(nn.BatchNorm2d, target) for target in ("gn-ws", "est", "bcn", "frozen-wn", "fold-ws")]
    + [(nn.SyncBatchNorm, target) for target in ("bn", "fold")]
    + [(FrozenBatchNorm2d, target) for target in ("gn", "bn", "frozen-wn", "fold")],
)
def test_every_norm_and_every_convolution(target: str, norm: type[nn.Module]) -> None:
    model = backbone(norm)
    converted, report = normswap.convert(model, target)
    changed = [change for change in report.changes if change.kind == "norm"]
    kept = NORMS if (target, norm) == ("frozen-wn", FrozenBatchNorm2d) else 0
    assert len(changed) == NORMS - kept
    assert not [left for left in report.left if left.kind == "norm"][kept:]
    if "-" in target or target == "fold":
        assert len({path for c in report.changes if c.kind == "weight" for path in c.paths}) == NORMS
    assert report.exact == (target not in ("gn", "gn-ws", "bcn"))
    assert not report.exact or moved(model, converted) < 1e-12
    if target != "bn":
        plain = normswap.fold(converted).model
        assert moved(converted, plain) < 1e-12
        assert not [m for m in plain.modules() if type(m).__module__.startswith("normswap")]


def test_a_file_of_its_backbone(tmp_path: Path) -> None:
    """Keys stay as detectron2 names them, `res2.0.conv1.norm.weight`, and the file loads into its model."""
    model = backbone().float()
    torch.save({"model": model.state_dict()}, tmp_path / "backbone.pth")
    normswap.convert_file(tmp_path / "backbone.pth", "frozen", model=Backbone)
    held = torch.load(tmp_path / "backbone.frozen.pth")["model"]
    assert {key for key in held if not key.startswith("normswap")} == set(model.state_dict())
    loaded = normswap.load(tmp_path / "backbone.frozen.pth", model=Backbone).eval()
    x = X.float()
    assert all(distance(a, b) < 1e-6 for a, b in zip(model(x), loaded(x), strict=True))


def test_no_proposals_in_a_step() -> None:
    """A box head on regions of which there may be none: training goes on, and statistics stay what they were."""
    head = nn.Sequential(Conv2d(16, 8, 3, bias=False, norm=nn.BatchNorm2d(8), activation=F.relu), nn.Flatten())
    model = normswap.convert(randomize(head), "bcn-ws").model.train()
    before = [buffer.clone() for buffer in model.buffers()]
    model(torch.zeros(0, 16, 7, 7)).sum().backward()
    assert all(torch.equal(old, new) for old, new in zip(before, model.buffers(), strict=True))
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
