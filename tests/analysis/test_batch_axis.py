"""Norms that see several samples in their channels are left by norms within a sample, and named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.nets import Forward, randomize
from helpers.torch_versions import skip_where_torch_cannot
from torch import Tensor, nn

import normswap

Use = Callable[[nn.Module, Tensor], Tensor]


def by_shape(self: nn.Module, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return self.norm(x.view(n // 2, c * 2, h, w)).view(n, c, h, w)


def by_size(self: nn.Module, x: Tensor) -> Tensor:
    return self.norm(x.contiguous().reshape(x.size(0) // 2, -1, *x.shape[2:])).reshape(x.shape)


def by_width(self: nn.Module, x: Tensor) -> Tensor:
    return self.norm(x.view(-1, 8, x.shape[2], x.shape[3])).view(x.shape)


def whole_batch(self: nn.Module, x: Tensor) -> Tensor:
    return self.norm(x.reshape(1, -1, x.shape[2], x.shape[3])).reshape(x.shape)


def by_chunks(self: nn.Module, x: Tensor) -> Tensor:
    return torch.cat(self.norm(torch.cat(x.chunk(2), 1)).chunk(2, 1))


def by_halves(self: nn.Module, x: Tensor) -> Tensor:
    one, two = torch.split(x, x.shape[0] // 2)
    return self.norm(torch.cat([one, two], dim=1))


def halves_of_channels(self: nn.Module, x: Tensor) -> Tensor:
    one, two = torch.split(x, 2, 1)
    return self.norm(torch.cat([two, one], dim=1))


def untraced(self: nn.Module, x: Tensor) -> Tensor:
    assert str(x.shape[0]).isdigit()
    return by_shape(self, x)


def of_tokens(self: nn.Module, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return self.norm(x.view(n, c * h, w)).view(n, c, h, w)


def of_rows(self: nn.Module, x: Tensor) -> Tensor:
    return self.norm(x.permute(0, 2, 3, 1).reshape(-1, 4))


def in_the_batch(self: nn.Module, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return self.norm(x.reshape(n * 2, c // 2, h, w)).reshape(x.shape)


MIXING: dict[str, tuple[Use, nn.Module]] = {
    "by its shape": (by_shape, nn.BatchNorm2d(8)),
    "by its size": (by_size, nn.BatchNorm2d(8)),
    "by the width of the norm": (by_width, nn.BatchNorm2d(8)),
    "by chunks": (by_chunks, nn.BatchNorm2d(8)),
    "by halves": (by_halves, nn.BatchNorm2d(8)),
    "the whole batch": (whole_batch, nn.BatchNorm2d(16)),
}
APART: dict[str, tuple[Use, nn.Module]] = {
    "rows of a map": (of_tokens, nn.BatchNorm1d(24)),
    "points": (of_rows, nn.BatchNorm1d(4)),
    "parts of channels": (halves_of_channels, nn.BatchNorm2d(4)),
    "parts of samples": (in_the_batch, nn.BatchNorm2d(2)),
}


def net(use: Use, norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Forward(use, norm=norm))
    return randomize(model).eval()


@pytest.mark.parametrize("target", ["gn", "ln", "in", "pn", "bcn"])
@pytest.mark.parametrize("name", MIXING)
def test_samples_in_channels_are_named(name: str, target: str) -> None:
    skip_where_torch_cannot(name)
    converted, report = normswap.convert(net(*MIXING[name]), target)
    (left,) = [left for left in report.left if left.kind == "norm"]
    assert left.path == "2.norm" and "several samples" in left.reason
    assert type(converted[2].norm) is nn.BatchNorm2d


@pytest.mark.parametrize("name", APART)
def test_views_within_samples_are_none(name: str) -> None:
    assert normswap.convert(net(*APART[name]), "gn").report.totals.norms_changed == 2


def test_a_split_in_training_alone_is_found() -> None:
    def split(self: nn.Module, x: Tensor) -> Tensor:
        return by_shape(self, x) if self.training else x

    converted, report = normswap.convert(net(split, nn.BatchNorm2d(8)), "gn")
    assert type(converted[1]) is nn.GroupNorm
    assert any(left.path == "2.norm" and "split batch" in left.reason for left in report.left)


def test_what_no_trace_shows_a_run_does() -> None:
    model = net(untraced, nn.BatchNorm2d(8))
    report = normswap.convert(model, "gn", example_inputs=torch.randn(4, 3, 6, 6)).report
    assert [left.path for left in report.left if "several samples" in left.reason] == ["2.norm"]


@pytest.mark.parametrize("target", ["frozen", "est"])
def test_norms_by_statistics_take_such_channels(target: str) -> None:
    model, x = net(by_shape, nn.BatchNorm2d(8)), torch.randn(4, 3, 6, 6)
    report = normswap.convert(model, target, example_inputs=x).report
    assert report.totals.norms_changed == 2 and report.exact
