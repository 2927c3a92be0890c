"""Convolutions that standardize their weight by themselves: baked by `fold` where that is all that they do."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import distance
from torch import Tensor, nn
from torch.nn import functional as F

import normswap

X = torch.randn(2, 4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def standardized(weight: Tensor) -> Tensor:
    var, mean = torch.var_mean(weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
    return (weight - mean) / torch.sqrt(var + 1e-10)


class StdConv2d(nn.Conv2d):
    """As Big Transfer's code has it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = standardized(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Gained(nn.Conv2d):
    """By the paper's other name: with a gain of its own, and the function's arguments by name."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = standardized(self.weight) * self.gain
        settings = {"stride": self.stride, "padding": self.padding, "groups": self.groups}
        return F.conv2d(input=x, weight=weight, bias=self.bias, **settings)


class Doubled(StdConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Shifted(StdConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1)


class OtherPadding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, standardized(self.weight), self.bias, self.stride, 0)


class ByInput(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, standardized(self.weight) * x.mean(), self.bias, self.stride, self.padding)


class Adapted(nn.Conv2d):
    """No standardization: who wants that merged has a method of its own for it."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.delta = nn.Parameter(torch.randn_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + self.delta, self.bias, self.stride, self.padding)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("cls", [StdConv2d, Gained])
@pytest.mark.parametrize("options", [{"padding": 1, "bias": False}, {"stride": 2, "groups": 2}])
def test_baked(cls: type[nn.Conv2d], options: dict[str, object], inplace: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(cls(4, 6, 3, **options), nn.BatchNorm2d(6)).double().eval()
    before = model(X)
    plain, report = normswap.fold(model)
    assert type(plain[0]) is nn.Conv2d and set(plain[0].state_dict()) <= {"weight", "bias"}
    assert report.exact and distance(before, plain(X)) < 1e-12
    by_target, report = normswap.convert(model, "fold", inplace=inplace)  # the norm after it goes into the baked weight
    for folded in (plain, by_target):
        assert [type(layer) for layer in folded] == [nn.Conv2d, nn.Identity]
        assert report.exact and distance(before, folded(X)) < 1e-12


def test_one_weight_in_two_layers() -> None:
    model = nn.Sequential(StdConv2d(4, 4, 3, padding=1), StdConv2d(4, 4, 3)).double()
    model[1].weight = model[0].weight
    assert distance(model(X), normswap.fold(model).model(X)) < 1e-12


@pytest.mark.parametrize("cls", [Doubled, Shifted, OtherPadding, ByInput, Adapted])
def test_what_does_more_stays(cls: type[nn.Conv2d]) -> None:
    model = nn.Sequential(cls(4, 6, 3, padding=1)).double()
    plain, report = normswap.fold(model)
    assert type(plain[0]) is cls and not report.changes
    assert torch.equal(model(X), plain(X))
