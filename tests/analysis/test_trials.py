"""Subclasses of convolutions and linear layers: which are known by what they compute, and which are left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.checks import fingerprint, same
from helpers.nets import conv_norm
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.analysis.trials import why_not_linear


def of(
    base: type[nn.Module], run: Callable[[nn.Module, Tensor], object], *arguments: object, **held: object
) -> nn.Module:
    """A layer of a subclass of `base` whose forward is `run`, with some more attributes."""
    layer: nn.Module = type("Own", (base,), {"forward": lambda self, x: run(self, x)})(*(arguments or (3, 4, 3)))
    for name, value in held.items():
        setattr(layer, name, value)
    return layer


def plain(self: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = self._conv_forward(x, self.weight, self.bias)
    return y


def remember(self: nn.Module, x: Tensor) -> Tensor:
    self.last = x.shape
    return plain(self, x)


class Counting(nn.Conv2d):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counting.calls += 1
        return super().forward(x) * Counting.calls


class WithCache(nn.Conv1d):
    def forward(self, x: Tensor, cache: Tensor | None = None) -> Tensor:
        return super().forward(x if cache is None else torch.cat([cache, x], -1))


class Swapping(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(x, (1, 1)), weight, bias)


LINEAR: dict[str, Callable[[], nn.Module]] = {
    "pads": lambda: of(nn.Conv2d, lambda s, x: plain(s, F.pad(x, (1, 0, 2, 0)))),
    "pads by a child": lambda: of(nn.Conv2d, lambda s, x: plain(s, s.pad(x)), pad=nn.ZeroPad2d(1)),
    "causal": lambda: of(nn.Conv1d, lambda s, x: nn.Conv1d.forward(s, F.pad(x, (2, 0)))),
    "causal by cutting": lambda: of(nn.Conv1d, lambda s, x: plain(s, x)[..., :-6], 3, 4, 3, 1, 6, 3),
    "in groups": lambda: of(nn.Conv2d, plain, 4, 6, 3, 2, 1, 1, 2),
    "transposed": lambda: of(
        nn.ConvTranspose1d, lambda s, x: nn.ConvTranspose1d.forward(s, x)[..., 1:], 4, 6, 5, 2, 0, 0, 2
    ),
    "casts": lambda: of(nn.Linear, lambda s, x: F.linear(x, s.weight.to(x.dtype), s.bias), 3, 4),
    "activates its input": lambda: of(nn.Conv2d, lambda s, x: plain(s, x.relu())),
    "the learning rate made equal": lambda: of(nn.Conv2d, lambda s, x: F.conv2d(x, s.weight * 0.2, s.bias)),
    "another method": lambda: Swapping(3, 4, 3),
    "no bias": lambda: of(nn.Conv2d, lambda s, x: F.conv2d(x, s.weight), 3, 4, 3, 1, 0, 1, 1, False),
}

LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "low-rank update": (
        lambda: of(nn.Linear, lambda s, x: x @ (s.weight + s.a).T, 3, 4, a=nn.Parameter(torch.zeros(4, 3))),
        "more than its weight and bias",
    ),
    "mask": (
        lambda: of(nn.Conv2d, lambda s, x: F.conv2d(x, s.weight * s.mask), mask=torch.ones(3, 3)),
        "more than its weight and bias",
    ),
    "quantized": (lambda: of(nn.Conv2d, lambda s, x: F.conv2d(x, (s.weight * 9).round())), "not linear"),
    "spectral": (lambda: of(nn.Conv2d, lambda s, x: F.conv2d(x, s.weight / s.weight.norm())), "not linear"),
    "centred over channels": (lambda: of(nn.Conv2d, lambda s, x: F.conv2d(x, s.weight - s.weight.mean(0))), "linear"),
    "order of channels": (lambda: of(nn.Conv2d, lambda s, x: plain(s, x).flip(1)), "not linear"),
    "clipped": (lambda: of(nn.Conv2d, lambda s, x: plain(s, x).clamp(-60, 60)), "not linear"),
    "not a number": (lambda: of(nn.Conv2d, lambda s, x: plain(s, x) * float("nan")), "second time"),
    "residual": (lambda: of(nn.Conv2d, lambda s, x: plain(s, F.pad(x, (1,) * 4)) + x, 3, 3, 3), "not linear"),
    "scaled with its bias": (lambda: of(nn.Conv2d, lambda s, x: plain(s, x) * 2), "add its bias"),
    "stochastic": (lambda: of(nn.Conv2d, lambda s, x: plain(s, x) + torch.rand(())), "second time"),
    "stochastic in training": (lambda: of(nn.Conv2d, lambda s, x: F.dropout(plain(s, x), 0.5, s.training)), "second"),
    "keeps state": (lambda: of(nn.Conv2d, remember), "leaves something behind"),
    "counts": (lambda: Counting(3, 4, 3), "second time"),
    "tuple": (lambda: of(nn.Conv2d, lambda s, x: (plain(s, x), None)), "something else than a tensor"),
    "channels last": (lambda: of(nn.Conv2d, lambda s, x: plain(s, x).permute(0, 2, 3, 1)), "not linear"),
    "a second input": (lambda: WithCache(3, 4, 3), "takes more than an input (cache)"),
    "past the attribute": (lambda: of(nn.Conv2d, lambda s, x: F.conv2d(x, s._parameters["weight"])), "be tried"),
}  # fmt: skip


@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_what_is_linear_in_its_filters_is_known(make: Callable[[], nn.Module]) -> None:
    layer = make()
    before, state = fingerprint(layer), torch.get_rng_state()
    assert not why_not_linear(layer, with_bias=layer.bias is not None)
    assert same(before, fingerprint(layer)) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=LEFT)
def test_what_is_not_is_left_with_its_reason(make: Callable[[], nn.Module], reason: str) -> None:
    layer = make()
    state = torch.get_rng_state()
    assert reason in why_not_linear(layer, with_bias=True)
    assert torch.equal(state, torch.get_rng_state())


def test_each_setting_is_tried() -> None:
    """A verdict holds for layers that differ in their numbers of channels alone."""

    def run(self: nn.Module, x: Tensor) -> Tensor:
        return plain(self, x) if self.stride == (1, 1) else plain(self, x).relu()

    Own = type("Own", (nn.Conv2d,), {"forward": run})
    verdicts = [why_not_linear(Own(3, 4, 3, stride), with_bias=True) for stride in (1, 2, 1, 2)]
    assert [bool(verdict) for verdict in verdicts] == [False, True, False, True]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_verdict_does_not_depend_on_the_tensors(device: str) -> None:
    layer = LINEAR["pads by a child"]().to(device)
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not why_not_linear(layer, with_bias=True)


def test_a_norm_stays_behind_what_ignores_a_bias() -> None:
    model = conv_norm(4, LINEAR["no bias"])
    with pytest.raises(normswap.ModelError, match="does not just add its bias"):
        normswap.convert(model, "fold")
    assert normswap.convert(model, "est-ws").report.totals.weights_changed == 1
