"""Folding is never wrong: forwards that do something between a convolution and its norm, hard to see."""

import copy
import enum
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from helpers.checks import distance
from helpers.nets import randomize
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import normswap

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


class Mode(enum.Enum):
    A = 1


def by_flag(self: Pair, x: torch.Tensor, scale: bool = True) -> torch.Tensor:
    y = self.conv(x)
    if scale is True:
        y = y * 2
    return self.bn(y)


def by_enum(self: Pair, x: torch.Tensor, mode: Mode = Mode.A) -> torch.Tensor:
    y = self.conv(x)
    if mode is Mode.A:
        y = y * 2
    return self.bn(y)


def by_isinstance(self: Pair, x: torch.Tensor) -> torch.Tensor:
    y = self.conv(x)
    if isinstance(y, torch.Tensor):
        y = y * 2
    return self.bn(y)


def by_is_tensor(self: Pair, x: torch.Tensor) -> torch.Tensor:
    y = self.conv(x)
    if torch.is_tensor(y):
        y = y * 2
    return self.bn(y)


def raw(self: Pair, x: torch.Tensor, raw: bool = False) -> torch.Tensor:
    y = self.conv(x)
    if raw:
        assert isinstance(y, torch.Tensor)
        return y
    return self.bn(y)


def with_skip(self: Pair, x: torch.Tensor, skip: float | None = None) -> torch.Tensor:
    y = self.conv(x)
    if skip is not None:
        y = y + skip
    return self.bn(y)


def leaves_behind(self: Pair, x: torch.Tensor) -> torch.Tensor:
    self.h = self.conv(x)
    return self.bn(self.h)


def pair(forward: Callable[..., torch.Tensor]) -> nn.Module:
    return type("Made", (Pair,), {"forward": forward})()


class Block(nn.Module):
    """Goes another way on small maps: no two instances need go the same."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.a = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.b = nn.Conv2d(3, 3, 3, padding=1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.bn(x)) if x.shape[-1] > 4 else x + self.a(x)


class Domains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bns = nn.Conv2d(3, 8, 3), nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, x: torch.Tensor, domain: int = 0) -> torch.Tensor:
        return self.bns[domain](self.conv(x))


class Reaching(nn.Module):
    """Cannot be traced, and uses a part of its child by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Pair()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        len(x)
        return self.a(x) + self.a.conv(x)


class Watching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = pair(leaves_behind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.a.h


class Wrapped(nn.Module):
    def __init__(self, hooked: str) -> None:
        super().__init__()
        self.pre, self.id, self.bn = nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Identity(), nn.BatchNorm2d(8)
        getattr(self, hooked).register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.id(self.pre(x)))


def tied_by_memory() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[2].weight.data = model[0].weight.data
    return model


def pruned_bias() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    prune.l1_unstructured(model[0], "bias", 0.5)
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[object, ...]]] = {
    "a flag, by identity": (lambda: pair(by_flag), ()),
    "an enum, by identity": (lambda: pair(by_enum), ()),
    "isinstance": (lambda: pair(by_isinstance), ()),
    "is_tensor": (lambda: pair(by_is_tensor), ()),
    "an assertion behind a flag": (lambda: pair(raw), (True,)),
    "an argument that may be None": (lambda: pair(with_skip), (1.0,)),
    "instances that go different ways": (lambda: nn.Sequential(Block(), Block(), Block()), ()),
    "a norm for each domain": (Domains, (1,)),
    "a part of a child": (Reaching, ()),
    "what a child left behind": (Watching, ()),
    "a hook on a container": (lambda: Wrapped("pre"), ()),
    "a hook on an identity": (lambda: Wrapped("id"), ()),
    "tied by memory": (tied_by_memory, ()),
    "a pruned bias": (pruned_bias, ()),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_folding_is_right_or_refused(name: str, inplace: bool) -> None:
    make, arguments = CASES[name]
    torch.manual_seed(0)
    model = randomize(make()).double().eval()
    with torch.no_grad():
        before = model(X, *arguments)
        try:
            folded = normswap.convert(model, "fold", inplace=inplace).model
        except normswap.ModelError as error:
            assert "nothing to fold" in str(error)
            folded = model
        assert distance(before, folded(X, *arguments)) < 1e-10


def by_type(self: Pair, x: torch.Tensor) -> torch.Tensor:
    y = self.conv(x)
    if type(y) is torch.Tensor:
        y = y * 2
    return self.bn(y)


def test_what_no_trace_sees_is_measured() -> None:
    with pytest.raises(normswap.ModelError, match="should be exact, but on example inputs the output moved by"):
        normswap.convert(randomize(pair(by_type)).double().eval(), "fold", example_inputs=X)


class Merging(nn.Module):
    """Changes its weight as the mode changes, as LoRA layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.merged = nn.Conv2d(3, 8, 1), False
        self.delta = nn.Parameter(torch.randn(8, 3, 1, 1))

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode == self.merged:
            self.conv.weight.data += -self.delta.data if mode else self.delta.data
            self.merged = not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if self.merged else self.conv(x) + F.conv2d(x, self.delta)


@pytest.mark.parametrize("inplace", [False, True])
def test_weights_that_move_with_the_mode(inplace: bool) -> None:
    model = randomize(nn.Sequential(Merging(), nn.BatchNorm2d(8))).double().train()
    wanted = copy.deepcopy(model).eval()(X)
    converted = normswap.convert(model, "frozen", inplace=inplace).model
    torch.testing.assert_close(converted.eval()(X), wanted)


class Caching(Pair):
    shared: dict[str, torch.Tensor] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "own" not in self.cache:
            self.cache["own"] = self.conv.bias.sum() * 2
        if "all" not in Caching.shared:
            Caching.shared["all"] = x.new_ones(1)
        return self.bn(self.conv(x)) * Caching.shared["all"] + self.cache["own"]


def test_caches_of_a_forward_hold_no_symbols_afterwards() -> None:
    model = Caching().eval()
    normswap.convert(model, "gn")
    assert not model.cache and not Caching.shared
    assert type(model(torch.randn(1, 3, 4, 4))) is torch.Tensor


def test_a_norm_within_a_layer_that_reads_it_is_left() -> None:
    class Fused(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 8, 1)
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.bn.running_var.view(1, -1, 1, 1)

    report = normswap.convert(nn.Sequential(Fused(), nn.BatchNorm2d(8)), "gn").report
    assert [c.paths for c in report.changes] == [("1",)]
    assert "is part of Fused" in next(left.reason for left in report.left if left.path == "0.bn")


# ---- forwards that cannot be traced, whose parts can ----


LIST = [X[:1], X[1:]]


class Untraced(nn.Module):
    """Takes a list, as no symbolic run can answer, and uses its parts as a function says."""

    def __init__(self, use: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.use = use
        self.block, self.blocks = Pair(), nn.ModuleList([Pair(), Pair()])
        self.line = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, xs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([self.use(self, x) for x in xs][: len(xs)])


def conv_of(net: Untraced, x: torch.Tensor) -> torch.Tensor:
    return net.block.conv(x)


def of_a_list(self: Untraced, x: torch.Tensor) -> torch.Tensor:
    y = self.block(x)
    for block in self.blocks:
        y = y + block(x)
    return y + self.line(x)


def each_step(self: Untraced, x: torch.Tensor) -> torch.Tensor:
    steps = [self.block(x) + self.blocks[0](x) + self.blocks[1](x)]
    for layer in self.line:
        x = layer(x)
        steps.append(x)
    return torch.cat(steps)


# How a forward uses its parts, and how many of the four norms fold.
REACHES: dict[str, tuple[Callable[[nn.Module, torch.Tensor], torch.Tensor], int]] = {
    "whole blocks": (of_a_list, 4),
    "the steps of a sequence": (each_step, 3),
    "a part by its name": (lambda self, x: of_a_list(self, x) + self.block.conv(x), 3),
    "a part of an element": (lambda self, x: of_a_list(self, x) + self.blocks[0].conv(x), 2),
    "a part by a name that is computed": (
        lambda self, x: of_a_list(self, x) + getattr(self.block, "".join(["con", "v"]))(x),
        1,
    ),
    "a part by an index": (lambda self, x: of_a_list(self, x) + self.line[0](x), 3),
    "a part in another function": (lambda self, x: of_a_list(self, x) + conv_of(self, x), 3),
    "a part that only a run tells": (lambda self, x: of_a_list(self, x) + attrgetter("block.conv")(self)(x), 3),
    "a list of children": (lambda self, x: of_a_list(self, x) + next(self.block.children())(x), 3),
    "any module": (lambda self, x: of_a_list(self, x) + list(self.modules())[2](x), 0),
}


@pytest.mark.parametrize("name", REACHES)
def test_parts_fold_where_no_caller_reaches_into_them(name: str) -> None:
    use, folds = REACHES[name]
    torch.manual_seed(0)
    model = randomize(Untraced(use)).double().eval()
    before = model(LIST)
    try:
        folded, report = normswap.convert(model, "fold", example_inputs=(LIST,))
    except normswap.ModelError as error:
        assert "nothing to fold" in str(error) and not folds
        return
    assert distance(before, folded(LIST)) < 1e-10
    assert report.totals.norms_changed == folds and len(report.left) >= 4 - folds


def test_without_inputs_noise_shows_what_code_does_not() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Pair()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert str(x.shape[0])[0] in "0123456789"  # no symbolic run can answer
            return self.block(x) + attrgetter("block.conv")(self)(x)

    with pytest.raises(normswap.ModelError, match="the output of the layer before it is used elsewhere too"):
        normswap.convert(Hidden(), "fold")


def test_lists_of_chunks_are_traced() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 6, 1), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = list(self.a(x).chunk(3, 1))
            return y[0] + self.bn(self.b(y[2]))

    model = randomize(Split()).double().eval()
    folded, report = normswap.convert(model, "fold")
    assert report.totals.norms_changed == 1 and distance(model(X), folded(X)) < 1e-10


# ---- the dimension of the channels ----


def test_a_norm_over_tokens_stays_behind_a_linear_layer() -> None:
    """BatchNorm1d takes (N, C) as well as (N, C, L), where it normalizes another dimension than the layer gives."""
    model = randomize(nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16))).double().eval()
    tokens, rows = torch.randn(3, 16, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    for options, reason in (
        ({}, "may have its channels in another"),
        ({"example_inputs": tokens}, "has its channels"),
    ):
        with pytest.raises(normswap.ModelError, match=reason):
            normswap.convert(model, "fold", **options)
    folded, report = normswap.convert(model, "fold", example_inputs=rows)
    assert report.exact and distance(model(rows), folded(rows)) < 1e-12


def test_a_norm_stays_behind_a_convolution_without_a_batch() -> None:
    model = randomize(nn.Sequential(nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16))).double().eval()
    alone, batch = torch.randn(4, 16, dtype=torch.float64), torch.randn(2, 4, 9, dtype=torch.float64)
    with pytest.raises(normswap.ModelError, match="another dimension"):
        normswap.convert(model, "fold", example_inputs=alone)
    for options, note in (({}, "for inputs with a batch dimension"), ({"example_inputs": batch}, "")):
        folded, report = normswap.convert(model, "fold", **options)
        assert report.changes[0].note == note and distance(model(batch), folded(batch)) < 1e-12


def test_norms_over_maps_behind_a_linear_layer() -> None:
    """BatchNorm2d says that there are maps: groups are as for maps, and nothing is folded."""
    model = randomize(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm2d(8)))
    with pytest.raises(normswap.ModelError, match="has its channels in another dimension"):
        normswap.convert(model, "fold")
    assert normswap.convert(model, "gn", groups=8).model[1].num_groups == 8
    assert type(normswap.convert(model, "in").model[1]) is nn.InstanceNorm2d


def test_a_file_tells_what_was_folded(tmp_path: Path) -> None:
    """What example inputs had shown is not asked again where a conversion is repeated for its file."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16))

    model, x = randomize(make()).eval(), torch.randn(3, 4)
    folded, report = normswap.convert(model, "fold", example_inputs=x)
    normswap.save(folded, tmp_path / "folded.safetensors", report=report)
    loaded = normswap.load(tmp_path / "folded.safetensors", model=make)
    torch.testing.assert_close(loaded(x), model(x))
