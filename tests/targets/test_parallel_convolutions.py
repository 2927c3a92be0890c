"""Convolutions beside one another whose outputs are added become one, exactly, or stay with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.checks import check_named, distance
from helpers.nets import Forward, randomize
from torch import Tensor, nn
from torch.nn import functional as F

import normswap


def picture(dims: int = 2, channels: int = 4, side: int = 9) -> Tensor:
    shape = (2, channels, *[side + dim for dim in range(dims)])
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def net(run: Callable[..., Tensor], **layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Forward(run, **layers)).double().eval()


def convolutions(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)]


def check(model: nn.Module, stay: list[str], x: Tensor | None = None, to: str = "fold") -> normswap.Report:
    """Fold: so many convolutions are left, the function is the same, inputs are left alone, each layer is reported."""
    x = picture() if x is None else x
    before, given = model(x.clone()), x.clone()
    folded, report = normswap.convert(model, to)
    after = folded(given)
    assert convolutions(folded) == stay
    assert distance(before, after) < 1e-10 and torch.equal(given, x) and report.exact
    check_named(model, report)
    return report


def add(self: nn.Module, x: Tensor) -> Tensor:
    return F.relu(self.a(x) + self.b(x))


def of(**given: object) -> dict[str, object]:
    return {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1, **given}


# ---- which become one ----

PAIRS: dict[str, tuple[type[nn.Module], dict[str, object], dict[str, object], str]] = {
    "3x3 and 1x1": (nn.Conv2d, of(), of(kernel_size=1, padding=0), "Identity"),
    "the same size": (nn.Conv2d, of(), of(), "Identity"),
    "by words": (nn.Conv2d, of(padding="same"), of(kernel_size=1, padding="valid"), "Identity"),
    "without bias": (nn.Conv2d, of(bias=False), of(kernel_size=1, padding=0, bias=False), "Identity"),
    "one bias": (nn.Conv2d, of(bias=False), of(kernel_size=1, padding=0), "Identity"),
    "groups": (nn.Conv2d, of(groups=2), of(kernel_size=1, padding=0, groups=2), "Identity"),
    "depthwise": (nn.Conv2d, of(groups=4), of(kernel_size=1, padding=0, groups=4), "Identity"),
    "dilation": (nn.Conv2d, of(dilation=2, padding=2), of(kernel_size=1, padding=0), "Identity"),
    "oblong": (nn.Conv2d, of(), of(kernel_size=(1, 3), padding=(0, 1)), "Identity"),
    "reflected": (nn.Conv2d, of(padding_mode="reflect"), of(kernel_size=1, padding=0), "Identity"),
    "wrapped both": (nn.Conv2d, of(padding_mode="circular"), of(padding_mode="circular"), "Identity"),
    "a stride": (nn.Conv2d, of(stride=2), of(kernel_size=1, padding=0, stride=2), "AvgPool2d"),
    "two strides": (nn.Conv2d, of(stride=(1, 3)), of(kernel_size=1, padding=0, stride=(1, 3)), "AvgPool2d"),
    "more channels": (nn.Conv2d, of(out_channels=6), of(kernel_size=1, padding=0, out_channels=6), "ConstantPad3d"),
    "fewer channels": (nn.Conv2d, of(out_channels=3), of(kernel_size=1, padding=0, out_channels=3), "ConstantPad3d"),
    "a stride and more channels": (
        nn.Conv2d, of(stride=2, out_channels=7), of(kernel_size=1, padding=0, stride=2, out_channels=7),
        "AvgPool2d, ConstantPad3d",
    ),
    "more channels in groups": (
        nn.Conv2d, of(groups=2, out_channels=6), of(groups=2, out_channels=6), "ConstantPad3d, ConstantPad3d"
    ),
    "fewer channels in groups": (
        nn.Conv2d, of(groups=2, out_channels=2), of(groups=2, out_channels=2), "ConstantPad3d, ConstantPad3d"
    ),
    "a filter for each channel twice": (
        nn.Conv2d, of(groups=4, out_channels=8, stride=2), of(groups=4, out_channels=8, stride=2),
        "AvgPool2d, ConstantPad3d, ConstantPad3d",
    ),
    "1d": (nn.Conv1d, of(stride=2), of(kernel_size=1, padding=0, stride=2), "AvgPool1d"),
    "1d and more channels": (nn.Conv1d, of(out_channels=6), of(out_channels=6), "ConstantPad2d"),
    "3d": (nn.Conv3d, of(kernel_size=5, padding=2), of(), "Identity"),
    "3d and a stride": (nn.Conv3d, of(stride=2), of(stride=2), "AvgPool3d"),
}  # fmt: skip


@pytest.mark.parametrize("to", ["fold", "fold-ws", "fold-wn"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_two_become_one(name: str, normed: bool, to: str) -> None:
    """With and without a batch norm behind each; the larger kernel takes in the other, whichever comes first."""
    cls, large, small, shortcut = PAIRS[name]
    dims = int(cls.__name__[4])
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    layers = {"b": cls(**small), "a": cls(**large)} if large != small else {"a": cls(**large), "b": cls(**small)}
    norms = {"an": norm(large["out_channels"]), "bn": norm(large["out_channels"])} if normed else {}
    run = (lambda self, x: self.an(self.a(x)) + self.bn(self.b(x))) if normed else add
    report = check(net(run, **layers, **norms), ["a"], picture(dims), to)
    changes = {change.paths[0]: change for change in report.changes}
    assert changes["b"].after == shortcut and "merged into the convolution beside it" in changes["b"].how
    assert "took in the convolution beside it" in changes["a"].how and changes["b"].partner == "a"


SUMS: dict[str, Callable[..., Tensor]] = {
    "three and an identity": lambda self, x: self.b(x) + self.a(x) + self.c(x) + x,
    "from zero": lambda self, x: sum([self.b(x), self.a(x), self.c(x)]),
    "in place": lambda self, x: added(self.b(x), self.a(x), self.c(x)),
    "in place by a method": lambda self, x: self.b(x).add_(self.a(x)).add_(self.c(x)),
    "with something else between": lambda self, x: self.b(x) + self.d(x).tanh() + (self.a(x) + self.c(x)),
    "behind dropouts": lambda self, x: F.dropout(self.b(x), 0.5, self.training) + self.a(x) + self.c(x),
    "and read by another layer": lambda self, x: (self.b(x) + self.a(x) + self.c(x)) * self.d(x),
}


def added(first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first += other
    return first


@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str) -> None:
    layers = {"b": nn.Conv2d(4, 4, 1), "a": nn.Conv2d(4, 4, 3, padding=1), "c": nn.Conv2d(4, 4, (3, 1), padding=(1, 0))}
    check(net(SUMS[name], **layers, d=nn.PReLU()), ["a"])


class Block(nn.Module):
    """The convolutions, each with its norm, and a norm alone where shapes allow, of RepVGG's and MobileOne's blocks."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, kernel: int = 3):
        super().__init__()
        self.skip = nn.BatchNorm2d(inputs) if (inputs, stride) == (outputs, 1) else None
        sizes = [kernel, kernel, 1]
        convs = [nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False) for size in sizes]
        self.dense = nn.ModuleList(nn.Sequential(conv, nn.BatchNorm2d(outputs)) for conv in convs[:2])
        self.point = nn.Sequential(convs[2], nn.BatchNorm2d(outputs))


class AddedAtOnce(Block):
    """As the block of RepVGG's own code adds."""

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.skip is None else self.skip(x)
        return F.relu(self.dense[0](x) + self.dense[1](x) + self.point(x) + skip)


class AddedInTurn(Block):
    """As that of MobileOne's own code does."""

    def forward(self, x: Tensor) -> Tensor:
        skip = 0
        if self.skip is not None:
            skip = self.skip(x)
        out = self.point(x) + skip
        for branch in self.dense:
            out += branch(x)
        return F.relu(out)


class AddedInPlace(Block):
    """As that of timm's MobileOne does."""

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.skip is None else self.skip(x)
        out = self.point(x)
        for branch in self.dense:
            out += branch(x)
        out += skip
        return F.relu(out)


@pytest.mark.parametrize("to", ["fold", "fold-wn"])
@pytest.mark.parametrize("block", [AddedAtOnce, AddedInTurn, AddedInPlace])
def test_blocks_become_one_convolution_each(block: type[Block], to: str) -> None:
    sizes = [(4, 6, 2, 1), (6, 6, 1, 1), (6, 6, 1, 2), (6, 6, 2, 6), (6, 6, 1, 6), (6, 4, 1, 1)]
    torch.manual_seed(0)
    model = randomize(nn.Sequential(*(block(*size) for size in sizes))).double().eval()
    report = check(model, [f"{number}.dense.0.0" for number in range(len(sizes))], to=to)
    assert report.totals.norms_changed == 3 * len(sizes) + 3 and not [
        left for left in report.left if left.kind == "norm"
    ]
    for mode in (True, False):
        normswap.convert(model.train(mode), to).model.train()(picture()).sum().backward()


def test_an_identity_is_not_written_into() -> None:
    """What stood in a convolution's place would be the input itself, into which the sum goes; a norm's place too."""
    a, b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
    run = lambda self, x: added(self.b(x), self.a(x))  # noqa: E731
    report = check(net(run, a=a, b=b), ["a"])
    assert {change.after for change in report.changes if change.paths == ("b",)} == {"AvgPool2d"}
    norm = lambda self, x: added(self.norm(x), self.an(self.a(x)))  # noqa: E731
    report = check(net(norm, a=a, an=nn.BatchNorm2d(4), norm=nn.BatchNorm2d(4)), ["a"])
    assert [left.path for left in report.left] == ["norm"]


def test_one_shared_by_two_places() -> None:
    run = lambda self, x: self.a(y := self.a(x) + self.b(x)) + self.b(y)  # noqa: E731
    model = net(run, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1))
    model.alias = model.b
    report = check(model, ["a"])
    assert {change.paths for change in report.changes} == {("a",), ("b", "alias")}


# ---- which stay ----

STAY: dict[str, tuple[Callable[..., Tensor], dict[str, object], dict[str, object], str]] = {
    "groups": (add, of(), of(groups=2), "groups"),
    "strides that differ": (lambda self, x: self.a(x).mean() + self.b(x).mean() + x, of(), of(stride=2), ""),
    "dilation": (add, of(), of(dilation=2, padding=2), "dilation"),
    "crosswise": (add, of(kernel_size=(3, 1), padding=(1, 0)), of(kernel_size=(1, 3), padding=(0, 1)), "kernel"),
    "padding modes": (add, of(kernel_size=5, padding=2), of(padding_mode="reflect"), "padding_mode"),
    "fewer elements": (add, of(padding=0), of(padding=0), "elements"),
    "another input": (lambda self, x: self.a(x) + self.b(x + 1), of(), of(), ""),
    "an activation": (lambda self, x: self.a(x) + self.b(x).relu(), of(), of(), ""),
    "a factor": (lambda self, x: torch.add(self.a(x), self.b(x), alpha=2), of(), of(), ""),
    "a difference": (lambda self, x: self.a(x) - self.b(x), of(), of(), ""),
    "read twice": (lambda self, x: self.a(x) + (y := self.b(x)) + y.mean(), of(), of(), ""),
    "a written input": (lambda self, x: self.a(y := x * 1) + self.b(y.mul_(2)), of(), of(), ""),
    "one more call": (lambda self, x: self.a(x) + self.b(x) + self.b(x + 1).mean(), of(), of(), ""),
    "twice and once": (lambda self, x: self.a(x) + self.a(x) + self.b(x), of(), of(), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", STAY)
def test_others_stay(name: str) -> None:
    """Each has a norm behind the sum of another convolution, so that there is something to fold."""
    run, large, small, reason = STAY[name]
    chain = lambda self, x: run(self, x).mean((2, 3), keepdim=True) + self.norm(self.conv(x))  # noqa: E731
    layers = {"a": nn.Conv2d(**large), "b": nn.Conv2d(**small)}
    width = large["out_channels"]
    report = check(net(chain, **layers, conv=nn.Conv2d(4, width, 1), norm=nn.BatchNorm2d(width)), ["a", "b", "conv"])
    reasons = [left.reason for left in report.left if left.path == "b"]
    assert len(reasons) == bool(reason) and all(reason in found for found in reasons)
    assert all(found.startswith("stays beside another convolution: ") for found in reasons)


def hooked(model: nn.Module) -> None:
    model.b.register_forward_hook(lambda module, args, output: None)


def tied(model: nn.Module) -> None:
    model.c.weight = model.b.weight


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (hooked, {}, "hook"), (tied, {}, "shares its weight"), (lambda model: model.half(), {}, "float16"),
        (lambda model: None, {"exclude": "a"}, "that one is excluded"), (lambda model: None, {"exclude": "bn"}, "norm"),
        (lambda model: setattr(model.b, "weight", nn.Parameter(model.b.weight.float())), {}, "dtype"),
    ],
)  # fmt: skip
def test_layers_that_others_know(change: Callable[[nn.Module], object], options: dict[str, str], reason: str) -> None:
    run = lambda self, x: self.cn(self.c(self.an(self.a(x)) + self.bn(self.b(x))))  # noqa: E731
    convs = {name: nn.Conv2d(4, 4, 1, bias=False) for name in "abc"}
    model = net(run, **convs, **{f"{name}n": nn.BatchNorm2d(4) for name in "abc"})
    change(model)
    folded, report = normswap.convert(model, "fold", **options)
    assert convolutions(folded) == ["a", "b", "c"]
    told = [c.note for c in report.changes if c.paths == ("b",)] + [e.reason for e in report.left if e.path == "b"]
    assert len(told) == 1 and told[0].startswith("stays beside another convolution: ") and reason in told[0]


def test_strictly_standardized_ones_stay() -> None:
    run = lambda self, x: self.an(self.a(x)) + self.bn(self.b(x))  # noqa: E731
    model = net(run, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1), an=nn.BatchNorm2d(4), bn=nn.BatchNorm2d(4))
    assert convolutions(normswap.convert(model, "fold-ws", ws="strict").model) == ["a", "b"]


def test_fold_is_the_target_of_that_name() -> None:
    model = net(add, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1))
    by_name = convolutions(normswap.convert(model, "fold").model)
    assert convolutions(normswap.fold(model).model) == by_name and len(by_name) == 1


# ---- files ----


def branched() -> nn.Module:
    run = lambda self, x: self.an(self.a(x)) + self.bn(self.b(x))  # noqa: E731
    layers = {"a": nn.Conv2d(4, 6, 3, padding=1, stride=2), "b": nn.Conv2d(4, 6, 1, stride=2)}
    return net(run, **layers, an=nn.BatchNorm2d(6), bn=nn.BatchNorm2d(6))


def test_a_folded_file_loads(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    folded, _ = normswap.convert(branched(), "fold")
    torch.save(folded.state_dict(), path)
    loaded = normswap.load(path, model=branched)
    assert convolutions(loaded) == ["a"] and distance(loaded(picture()), branched()(picture())) < 1e-10


def test_a_file_from_before_merging_loads(tmp_path: Path) -> None:
    """Its recipe says that both convolutions took a norm in, and no more."""
    path = tmp_path / "model.pt"
    apart, report = normswap.convert(branched(), "fold", include=["*n", "a"])
    assert convolutions(apart) == ["a", "b"] and {c.paths[0] for c in report.changes} == {"a", "b", "an", "bn"}
    torch.save(apart.state_dict(), path)
    loaded = normswap.load(path, model=branched)
    assert convolutions(loaded) == ["a", "b"] and distance(loaded(picture()), branched()(picture())) < 1e-10
