"""Which layers take in a norm: those before it, behind it or beside it, each exact, or left with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.checks import distance
from helpers.nets import Forward, randomize
from torch import Tensor, nn
from torch.nn import functional as F

import normswap

X = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def net(run: Callable[..., Tensor], **layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Forward(run, **layers)).double().eval()


def check(model: nn.Module, folds: int, to: str = "fold", x: Tensor = X) -> normswap.Report:
    """Convert; so many norms are folded, which leaves an identity of each; the rest stays and is named."""
    before = model(x)
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if not folds:
        with pytest.raises(normswap.ModelError, match="nothing to (convert|fold)") as error:
            normswap.convert(model, to)
        return error
    converted, report = normswap.convert(model, to)
    kept = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in converted.modules())
    assert (report.totals.norms_changed, kept) == (folds, norms - folds)
    assert distance(before, converted(x)) < 1e-10 and report.exact
    assert distance(before, normswap.fold(converted).model(x)) < 1e-10
    return report


CONV, NORM = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)

# ---- layers before ----


def drop_by_mode(self: nn.Module, x: Tensor) -> Tensor:
    return self.norm(F.dropout(self.conv(x), 0.5, self.training))


def drop_always(self: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return self.norm(F.dropout(self.conv(x), 0.5))


BETWEEN: dict[str, tuple[Callable[..., Tensor], int]] = {
    "a dropout": (lambda self, x: self.norm(self.drop(self.conv(x))), 1),
    "a dropout by mode": (drop_by_mode, 1),
    "a dropout that stays on in eval mode": (drop_always, 0),
    "a memory format": (lambda self, x: self.norm(self.conv(x).contiguous()), 1),
    "an activation": (lambda self, x: self.norm(self.conv(x).relu()), 0),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_stands_between(name: str) -> None:
    run, folds = BETWEEN[name]
    check(net(run, conv=nn.Conv2d(4, 8, 3), norm=nn.BatchNorm2d(8), drop=nn.Dropout2d(0.3)), folds)


FLATTENINGS: dict[str, Callable[..., Tensor]] = {
    "torch.flatten": lambda self, x: self.norm(torch.flatten(self.conv(x), 1)),
    "a method": lambda self, x: self.norm(self.conv(x).flatten(1)),
    "a layer": lambda self, x: self.norm(self.flat(self.conv(x))),
    "a view": lambda self, x: self.norm((y := self.conv(x)).view(y.size(0), -1)),
    "a view by shape": lambda self, x: self.norm((y := self.conv(x)).reshape(y.shape[0], -1)),
}


@pytest.mark.parametrize("name", FLATTENINGS)
def test_flattened(name: str) -> None:
    """As many channels behind as before say that nothing else was flattened."""
    check(net(FLATTENINGS[name], conv=nn.Conv2d(4, 8, 6), norm=nn.BatchNorm1d(8), flat=nn.Flatten()), 1)
    check(net(FLATTENINGS[name], conv=nn.Conv2d(4, 8, 5), norm=nn.BatchNorm1d(32), flat=nn.Flatten()), 0)


def test_concatenated_convolutions() -> None:
    """As in MixNet, each with its part of the channels."""
    run = lambda self, x: self.norm(torch.cat([self.a(x), self.b(x), self.c(x)], dim=1))  # noqa: E731
    parts = {"a": nn.Conv2d(4, 3, 1, bias=False), "b": nn.Conv2d(4, 4, 3, padding=1, groups=2), "c": nn.Conv2d(4, 1, 1)}
    for to in ("fold", "fold-ws", "fold-wn"):
        report = check(net(run, norm=nn.BatchNorm2d(8), **parts), 1, to)
        assert {c.paths[0] for c in report.changes if "took in" in c.how} == {"a", "b", "c"}


CONCATENATIONS: dict[str, Callable[..., Tensor]] = {
    "with something else": lambda self, x: self.norm(torch.cat([self.a(x), x], 1)),
    "of one layer twice": lambda self, x: self.norm(torch.cat([self.a(x), self.a(x + 1)], 1)),
    "that is read twice": lambda self, x: self.norm(y := torch.cat([self.a(x), self.b(x)], 1)) + y,
    "along the rows": lambda self, x: self.norm(torch.cat([self.c(x), self.d(x)], 2)),
    "of which one part is read twice": lambda self, x: self.norm(torch.cat([y := self.a(x), self.b(x)], 1)) + y.sum(),
}


@pytest.mark.parametrize("name", CONCATENATIONS)
def test_concatenations_that_do_not_fold(name: str) -> None:
    four, eight = (lambda: nn.Conv2d(4, 4, 1)), (lambda: nn.Conv2d(4, 8, 1))
    check(net(CONCATENATIONS[name], norm=nn.BatchNorm2d(8), a=four(), b=four(), c=eight(), d=eight()), 0)


# ---- layers behind ----


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, bias=False, groups=2, stride=2), nn.Conv2d(4, 6, 1, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 6, 3, padding="valid"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("to", ["fold", "fold-ws", "fold-wn"])
def test_into_the_convolution_behind(conv: nn.Module, to: str) -> None:
    report = check(net(lambda self, x: self.conv(self.norm(x)), norm=nn.BatchNorm2d(4), conv=conv), 1, to)
    assert "took in the norm before it" in next(c.how for c in report.changes if c.paths == ("conv",))


def test_before_and_behind_one_convolution() -> None:
    for groups in (1, 2):
        conv = nn.Conv2d(4, 8, 3, groups=groups)
        check(net(lambda self, x: self.b(self.conv(self.a(x))), a=nn.BatchNorm2d(4), conv=conv, b=nn.BatchNorm2d(8)), 2)


def test_into_the_linear_layer_behind() -> None:
    run = lambda self, x: self.linear(self.drop(self.norm(x.mean((2, 3)).flatten(1))))  # noqa: E731
    check(net(run, norm=nn.BatchNorm1d(4), drop=nn.Dropout(), linear=nn.Linear(4, 3)), 1)


BEHIND: dict[str, tuple[Callable[..., Tensor], nn.Module, str]] = {
    "zeros around": (lambda self, x: self.conv(self.norm(x)), nn.Conv2d(4, 6, 3, padding=1), "pads with zeros"),
    "zeros between": (lambda self, x: self.conv(self.norm(x)), nn.ConvTranspose2d(4, 6, 2, 2), "pads with zeros"),
    "an activation": (lambda self, x: self.conv(self.norm(x).relu()), nn.Conv2d(4, 6, 1), "no convolution"),
    "another reader": (lambda self, x: self.conv(y := self.norm(x)) + y.sum(), nn.Conv2d(4, 6, 1), "no convolution"),
    "another input": (lambda self, x: self.conv(self.norm(x)) + self.conv(x), nn.Conv2d(4, 6, 1), "no convolution"),
}


@pytest.mark.parametrize("name", BEHIND)
def test_norms_before_convolutions_that_stay(name: str) -> None:
    run, conv, reason = BEHIND[name]
    assert reason in str(check(net(run, norm=nn.BatchNorm2d(4), conv=conv), 0).value)


def test_a_norm_that_adds_nothing_goes_into_a_padded_convolution() -> None:
    model = net(lambda self, x: self.conv(self.norm(x)), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 6, 3, padding=1))
    model.norm.running_mean.zero_()
    nn.init.zeros_(model.norm.bias)
    model.norm.num_batches_tracked += 1
    check(model, 1)


# ---- a layer beside ----


def branches(self: nn.Module, x: Tensor) -> Tensor:
    return F.relu(self.kn(self.k(x)) + self.pn(self.p(x)) + self.norm(x))


def branch_layers(**other: nn.Module) -> dict[str, nn.Module]:
    layers = {
        "k": nn.Conv2d(4, 4, 3, padding=1, bias=False), "kn": nn.BatchNorm2d(4), "norm": nn.BatchNorm2d(4),
        "p": nn.Conv2d(4, 4, 1, bias=False), "pn": nn.BatchNorm2d(4),
    }  # fmt: skip
    return layers | other


@pytest.mark.parametrize("to", ["fold", "fold-ws", "fold-wn"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_parallel_branches(groups: int, to: str) -> None:
    convs = {
        "k": nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=groups), "p": nn.Conv2d(4, 4, 1, groups=groups),
    }  # fmt: skip
    report = check(net(branches, **branch_layers(**convs)), 3, to)
    assert any("took in the norm beside it" in change.how for change in report.changes)


def test_parallel_branches_behind_an_identity() -> None:
    run = lambda self, x: self.k(y := self.same(x * 2)) + self.norm(self.other(y))  # noqa: E731
    layers = {
        "k": nn.Conv2d(4, 4, 3, padding=1),
        "norm": nn.BatchNorm2d(4),
        "same": nn.Identity(),
        "other": nn.Identity(),
    }
    check(net(run, **layers), 1)


BESIDE: dict[str, tuple[Callable[..., Tensor], dict[str, nn.Module]]] = {
    "an activation in the branches": (
        lambda self, x: F.relu(self.kn(self.k(x))) + self.pn(self.p(x)).relu() + self.norm(x), {}
    ),
    "the norm twice": (lambda self, x: self.kn(self.k(x)) + self.pn(self.p(x)) + (y := self.norm(x)) + y, {}),
    "another input": (lambda self, x: self.kn(self.k(x + 1)) + self.pn(self.p(x + 1)) + self.norm(x), {}),
    "an input that is written into": (
        lambda self, x: self.kn(self.k(y := x * 1)) + self.pn(self.p(y)) + self.norm(y.mul_(2)), {}
    ),
    "a product": (lambda self, x: (self.kn(self.k(x)) + self.pn(self.p(x))) * self.norm(x), {}),
    "the sum is read before": (
        lambda self, x: (y := self.kn(self.k(x)) + self.pn(self.p(x))) + self.norm(x) + y.sum(), {}
    ),
    "other places": (
        branches, {"k": nn.Conv2d(4, 4, 2, padding="same"), "p": nn.Conv2d(4, 4, 4, padding="same")},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", BESIDE)
def test_norms_beside_branches_that_stay(name: str) -> None:
    run, other = BESIDE[name]
    report = check(net(run, **branch_layers(**other)), 2)
    assert [left.path for left in report.left if left.kind == "norm"] == ["norm"]


def test_a_norm_in_a_branch_that_stays_keeps_the_one_beside_it() -> None:
    layers = {name: layer for name, layer in branch_layers().items() if name not in ("p", "pn")}
    model = net(lambda self, x: self.kn(self.k(x)) + self.norm(x), **layers)
    check(model, 2)
    with pytest.raises(normswap.ModelError, match="a norm beside it stays"):
        normswap.convert(model, "fold", exclude="kn")
