"""Convolutions that hold a norm and run it behind themselves: detectron2's `Conv2d(norm=..., activation=...)`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.checks import distance
from helpers.nets import randomize
from torch import Tensor, nn
from torch.nn import functional as F

import normswap

X = torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Holder(nn.Conv2d):
    """A padded convolution, its norm, its activation."""

    def __init__(self, *args: int, norm: nn.Module | None = None, activation: object = F.relu, **options: bool):
        super().__init__(*args, **options)
        self.norm = norm
        self.activation = activation

    def run(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 0, 1, 0)), self.weight, self.bias, self.stride, groups=self.groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


def holders(cls: type[nn.Module], norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    first, last = cls(3, 8, 3, bias=False, norm=norm(8)), cls(8, 8, 3, groups=2, norm=norm(8), activation=nn.PReLU())
    return randomize(nn.Sequential(first, last)).double().eval()


@pytest.mark.parametrize("norm", ["", "gn", "in", "est", "frozen", "fold"])
@pytest.mark.parametrize("weight", ["", "ws", "wn"])
def test_every_target_reaches_the_norm_and_the_weight(norm: str, weight: str) -> None:
    if not (target := "-".join(filter(None, (norm, weight)))):
        return
    model = holders(Holder)
    converted, report = normswap.convert(model, target)
    changed = {change.paths[0] for change in report.changes}
    assert changed >= ({"0.norm", "1.norm"} if norm else set()) | ({"0", "1"} if weight or norm == "fold" else set())
    moved = distance(model(X), converted(X))
    assert moved < 1e-12 if report.exact else moved > 1e-3
    assert report.exact == (norm not in ("gn", "in"))
    plain = normswap.fold(converted).model if weight or norm in ("est", "frozen") else converted
    assert [type(layer) for layer in plain] == [Holder, Holder]
    assert not [m for m in plain.modules() if type(m).__module__.startswith("normswap")]
    torch.testing.assert_close(plain(X), converted(X))


class ReadsEps(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.run(x)) + self.norm.eps


class ReadsStatistics(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.run(x), self.norm.running_mean, self.norm.running_var)


class AsksForClass(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.run(x)) if isinstance(self.norm, nn.BatchNorm2d) else self.norm(x[:, :1] * self.run(x))


class AsksForType(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.run(x)) * (2 if type(self.norm) in (nn.GroupNorm, nn.Identity) else 1)


class AsksForName(Holder):
    def forward(self, x: Tensor) -> Tensor:
        x = self.run(x)
        return self.norm(x) if "Batch" in self.norm.__class__.__name__ else x


class AsksForAttribute(Holder):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.run(x))
        return x if hasattr(self.norm, "running_mean") else x.relu()


@pytest.mark.parametrize("cls", [ReadsEps, ReadsStatistics, AsksForClass, AsksForType, AsksForName, AsksForAttribute])
def test_a_norm_that_is_more_than_called_stays(cls: type[nn.Module]) -> None:
    with pytest.raises(normswap.ModelError, match=r"is part of \w+, which may read it directly"):
        normswap.convert(holders(cls), "gn")


class RefusesOnly(Holder):
    """As detectron2 does."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0 and self.training:
            assert not isinstance(self.norm, nn.SyncBatchNorm), "SyncBatchNorm does not support empty inputs"
        return super().forward(x)


class NormFirst(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.norm(x))


class ActivationFirst(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.run(x).relu())


class WithSkip(Holder):
    def forward(self, x: Tensor) -> Tensor:
        x = self.run(x)
        return self.norm(x) + x


class WithoutBias(Holder):
    def run(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, groups=self.groups)


class Twice(Holder):
    def run(self, x: Tensor) -> Tensor:
        return super().run(x) + super().run(x.flip(-1))


class Decayed(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.square().mean()


class Adapted(Holder):
    """As LoRA does."""

    def __init__(self, *args: int, **options: bool):
        super().__init__(*args, **options)
        self.down, self.up = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, self.weight[0].numel()))

    def run(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + (self.down @ self.up).view_as(self.weight), self.bias, groups=self.groups)


@pytest.mark.parametrize(
    ("cls", "folds", "standardized"),
    [
        (RefusesOnly, True, True),
        (ActivationFirst, False, True),
        (WithSkip, False, True),
        (WithoutBias, False, True),
        (Twice, False, False),
        (Decayed, False, False),
        (Adapted, False, False),
    ],
)
def test_what_the_forward_does_beside(cls: type[nn.Module], folds: bool, standardized: bool) -> None:
    """The norm is exchanged in each; it folds, and the weight is standardized, where nothing else reads the weight."""
    model = holders(cls)
    for target, works in (("frozen", True), ("fold", folds), ("ws", standardized)):
        if not works:
            with pytest.raises(normswap.ModelError, match="nothing to (convert|fold)"):
                normswap.convert(model, target)
            continue
        converted, report = normswap.convert(model, target)
        assert len({path for change in report.changes for path in change.paths if "norm" in path}) in (0, 2)
        assert report.exact and distance(model(X), converted(X)) < 1e-12


def test_a_norm_before_its_convolution() -> None:
    model = randomize(nn.Sequential(NormFirst(3, 8, 3, norm=nn.BatchNorm2d(3)))).double().eval()
    converted, report = normswap.convert(model, "est-wn")
    assert {c.paths[0] for c in report.changes} == {"0", "0.norm"} and distance(model(X), converted(X)) < 1e-12
    with pytest.raises(normswap.ModelError, match="no convolution or linear layer directly before it"):
        normswap.convert(model, "fold")


def test_the_model_itself_and_other_layers() -> None:
    """A holder at the root, a transposed one whose norm lies deeper, a linear one."""

    class Up(nn.ConvTranspose2d):
        def forward(self, x: Tensor) -> Tensor:
            return self.after(super().forward(x))

    class Line(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(super().forward(x))

    root = randomize(Holder(3, 8, 3, norm=nn.BatchNorm2d(8))).double().eval()
    assert distance(root(X), normswap.convert(root, "fold-ws").model(X)) < 1e-12
    up, line = Up(3, 4, 2, stride=2, bias=False), Line(4 * 9 * 9, 6)
    up.after = nn.Sequential(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.AvgPool2d(2))
    line.norm = nn.BatchNorm1d(6)
    model = randomize(nn.Sequential(up, nn.Flatten(), line)).double().eval()
    converted, report = normswap.convert(model, "fold", example_inputs=X)
    assert {c.paths[0] for c in report.changes if c.kind == "norm"} == {"0.after.0.0", "2.norm"}
    assert report.exact and distance(model(X), converted(X)) < 1e-12


def test_in_a_forward_that_cannot_be_traced() -> None:
    class Repeated(nn.Module):
        def __init__(self, *layers: nn.Module):
            super().__init__()
            self.first, self.again = layers

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for _ in range(int(x.abs().max()) % 2 + 1):
                x = self.again(x)
            return x

    model = Repeated(*holders(Holder)).eval()
    for options in ({}, {"example_inputs": X}):
        converted, report = normswap.convert(model, "fold", **options)
        assert not report.left and distance(model(X), converted(X)) < 1e-12


def test_a_synchronized_norm_inside_becomes_plain() -> None:
    model = holders(Holder, nn.SyncBatchNorm)
    converted, report = normswap.convert(model, "bn")
    assert type(converted[0].norm) is nn.BatchNorm2d and report.exact and torch.equal(model(X), converted(X))


class Pointwise(Holder):
    def run(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


def test_one_element_behind_a_pooling_is_known_inside() -> None:
    pooled = Pointwise(3, 32, 1, norm=nn.BatchNorm2d(32))
    (change,) = normswap.convert(nn.Sequential(nn.AdaptiveAvgPool2d(1), pooled), "gn").report.changes
    assert "one element" in change.note
