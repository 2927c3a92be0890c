"""Norms other than batch norm as sources, and batch norm as a target: what data tells, and what is refused without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.checks import distance
from helpers.nets import Forward, randomize
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.ops import FrozenBatchNorm2d
from typer.testing import CliRunner

import normswap
from normswap.cli.commands import app
from normswap.layers.norms import BatchChannelNorm, EstimatedBatchNorm, FrozenBatchNorm, PositionNorm

X = torch.randn(48, 3, 10, 10, generator=torch.Generator().manual_seed(0)) + 0.4
DATA = list(X.split(16))


def net(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        if norm.weight is not None:
            norm.weight.copy_(torch.linspace(-1, 1.5, 8))
            norm.bias.copy_(torch.linspace(0.5, -0.5, 8))
    return model.eval()


def settled(norm: nn.Module) -> nn.Sequential:
    """With the running statistics of the data."""
    model = net(norm)
    with torch.no_grad():
        values = model[0](X)
        norm.running_mean.copy_(values.mean((0, 2, 3)))
        norm.running_var.copy_(values.var((0, 2, 3), correction=0))
    return model


@pytest.mark.parametrize("inplace", [False, True])
def test_bn_is_refused_without_data_and_nothing_changes(inplace: bool) -> None:
    for norm in (nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), BatchChannelNorm(2, 8)):
        model = net(norm)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(normswap.OptionError, match=rf"1 \({type(norm).__name__}\).*give data with calibrate="):
            normswap.convert(model, "bn", inplace=inplace)
        assert type(model[1]) is type(norm)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bn_has_the_statistics_of_the_data() -> None:
    """Mean and variance of its input, and with gain and bias those of the old norm's output, channel by channel."""
    model = net(nn.GroupNorm(2, 8)).double()
    converted, report = normswap.convert(model, "bn", calibrate=[batch.double() for batch in DATA], calibrate_seconds=0)
    norm = converted[1]
    assert type(norm) is nn.BatchNorm2d and not report.exact and norm.eps == model[1].eps
    with torch.no_grad():
        values = model[0](X.double())
        old, new = model[1](values), norm(values)
    torch.testing.assert_close(norm.running_mean, values.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, values.var((0, 2, 3), correction=0))
    torch.testing.assert_close(new.mean((0, 2, 3)), old.mean((0, 2, 3)))
    torch.testing.assert_close(new.var((0, 2, 3)), old.var((0, 2, 3)))
    assert ((old - new).norm() / old.norm()) < 0.2, "and the sign of each gain"
    converted.train()(X.double()).square().sum().backward()
    assert norm.num_batches_tracked == 1 and norm.weight.grad is not None


@pytest.mark.parametrize(
    "make", [lambda: FrozenBatchNorm(8, spatial_dims=2), lambda: EstimatedBatchNorm(8, momentum=0.03)]
)
def test_bn_is_exact_from_fixed_statistics(make: object) -> None:
    model = settled(make())
    converted, report = normswap.convert(model, "bn")
    assert report.exact and isinstance(converted[1], nn.modules.batchnorm._BatchNorm)
    assert converted[1].momentum == getattr(model[1], "momentum", 0.1)
    with torch.no_grad():
        torch.testing.assert_close(converted(X), model(X))


def test_bn_from_a_frozen_norm_of_torchvision_is_trained() -> None:
    model = models.resnet18(norm_layer=FrozenBatchNorm2d)
    converted, report = normswap.convert(randomize(model), "bn")
    norms = [m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and report.exact and not [left for left in report.left if left.kind == "norm"]
    assert all(norm.weight.requires_grad and norm.bias.requires_grad for norm in norms)
    assert all(norm.num_batches_tracked == 0 for norm in norms)


def test_there_and_back() -> None:
    """bn to gn and, on data, back: most of the function is still there."""
    model = settled(nn.BatchNorm2d(8))
    there = normswap.convert(model, "gn", groups=1).model
    back = normswap.convert(there, "bn", calibrate=DATA, calibrate_seconds=0).model
    with torch.no_grad():
        assert distance(model(X), back(X)) < 0.1
    channel = normswap.convert(model, "bcn").model
    torch.testing.assert_close(
        normswap.convert(channel, "frozen").model(X), model(X)
    )  # no data: what was put in comes out


@pytest.mark.parametrize("groups", [1, 4, "4c", "auto"])
@pytest.mark.parametrize("source", [nn.GroupNorm(8, 8), nn.GroupNorm(1, 8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8)])
def test_other_groups(source: nn.Module, groups: str | int) -> None:
    model = net(source)
    number = {"4c": 2, "auto": 2}.get(groups, groups)
    if isinstance(source, nn.GroupNorm) and source.num_groups == number:
        with pytest.raises(normswap.ModelError, match="already"):
            normswap.convert(model, "gn", groups=groups)
        return
    copied, _ = normswap.convert(model, "gn", groups=groups)
    measured, _ = normswap.convert(model, "gn", groups=groups, calibrate=DATA, calibrate_seconds=0)
    assert copied[1].num_groups == measured[1].num_groups == number
    with torch.no_grad():
        before, without, on_data = model(X), copied(X), measured(X)
    assert distance(before, on_data) < 0.8 * distance(before, without)


def test_an_instance_norm_is_a_group_norm_of_single_channels() -> None:
    model = net(nn.InstanceNorm2d(8, affine=True))
    converted, report = normswap.convert(model, "gn", groups=8)
    assert type(converted[1]) is nn.GroupNorm and report.exact
    with torch.no_grad():
        torch.testing.assert_close(converted(X), model(X))


# ---- layer norm ----


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2)
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(0.5, 1.5, 8))
    return model.eval()


def test_layer_norm_after_a_linear_layer() -> None:
    model, x = perceptron(), torch.randn(64, 6)
    with pytest.raises(normswap.ModelError, match="give --input-shape"):  # it may be one of tokens, (N, T, C)
        normswap.convert(model, "gn")
    one, report = normswap.convert(model, "gn", groups=1, example_inputs=x)
    assert report.exact and isinstance(one[1], nn.GroupNorm)
    torch.testing.assert_close(one(x), model(x))
    four = normswap.convert(nn.Sequential(nn.Flatten(), *model), "gn", groups=4).model[1:]
    assert four[4].num_groups == 4 and four(x).isfinite().all()
    bn, _ = normswap.convert(model, "bn", calibrate=x, calibrate_seconds=0)
    assert type(bn[1]) is nn.BatchNorm1d
    assert distance(model(x), bn(x)) < 0.5
    assert not [
        m
        for m in normswap.convert(model, "fold", calibrate=x, calibrate_seconds=0).model
        if isinstance(m, nn.LayerNorm)
    ]


class Tokens(nn.Module):
    """(N, L, C): its channels are last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Conv2d(3, 8, 4, 4), perceptron()
        self.body[0] = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.embed(x).flatten(2).transpose(1, 2)).mean(1)


@pytest.mark.parametrize("options", [{}, {"example_inputs": X}, {"calibrate": DATA, "calibrate_seconds": 0}])
def test_layer_norm_over_tokens_stays(options: dict[str, object]) -> None:
    model = Tokens().eval()
    with pytest.raises(normswap.ModelError, match="normalizes the last"):
        normswap.convert(model, "gn", **options)


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t"])
def test_transformers_keep_their_layer_norms(name: str) -> None:
    with torch.device("meta"):
        model = getattr(models, name)()
    with pytest.raises(normswap.ModelError, match="nothing to (convert|fold)"):
        normswap.convert(model, "gn")


def test_layer_norm_whose_layout_an_example_shows() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = perceptron()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.reshape(x.shape))

    model = Branches().eval()
    with pytest.raises(normswap.ModelError, match="give --input-shape"):
        normswap.convert(model, "gn")
    assert normswap.convert(model, "gn", example_inputs=torch.randn(4, 6)).report.totals.norms_changed == 2


def test_convnext_on_data() -> None:
    """Its norms between channels-last permutations stay, those over maps become group norms."""
    model = models.ConvNeXt(
        [models.convnext.CNBlockConfig(16, 32, 1), models.convnext.CNBlockConfig(32, None, 1)], num_classes=5
    )
    x = torch.randn(8, 3, 32, 32)
    converted, report = normswap.convert(model.eval(), "ln", calibrate=x, calibrate_seconds=0)
    assert report.totals.norms_changed == 3
    assert all(
        "normalizes the last" in left.reason or "already" in left.reason for left in report.left if left.kind == "norm"
    )
    assert converted(x).isfinite().all()


# ---- files ----


def frozen_backbone() -> nn.Module:
    return normswap.convert(settled(nn.BatchNorm2d(8)), "frozen").model


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (lambda: net(nn.GroupNorm(2, 8)), "bn"),
        (lambda: net(nn.GroupNorm(2, 8)), "frozen-ws"),
        (lambda: net(nn.InstanceNorm2d(8)), "gn"),
        (lambda: net(nn.InstanceNorm2d(8)), "bn"),
        (lambda: net(nn.GroupNorm(2, 8)), "fold"),
        (lambda: net(nn.GroupNorm(2, 8)), "bcn-wn"),
        (frozen_backbone, "bn"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_what_data_decided_comes_back(tmp_path: Path, make: object, target: str, whole: bool) -> None:
    """A file converted on data loads, with or without its architecture in it, and computes the same."""
    model = make()
    options = {} if make is frozen_backbone else {"calibrate": DATA, "calibrate_seconds": 0}
    wanted = normswap.convert(model, target, **options).model
    path = tmp_path / "model.pt"
    torch.save(model if whole else model.state_dict(), path)
    source = {} if whole else {"model": make}
    normswap.convert_file(path, target, **options, **source)
    loaded = normswap.load(tmp_path / f"model.{target}.pt", **source)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in wanted.modules()]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(X), wanted(X))


def test_data_that_do_not_fit() -> None:
    model = net(nn.GroupNorm(2, 8))
    with pytest.raises(normswap.ModelError, match="does not run"):
        normswap.convert(model, "bn", calibrate=torch.randn(4, 5, 10, 10))
    with pytest.raises(normswap.ModelError, match="not finite"):
        normswap.convert(model, "bn", calibrate=X * float("inf"))
    for nothing in ([], "images", torch.empty(0, 3, 8, 8)):
        with pytest.raises(normswap.OptionError, match="calibrate"):
            normswap.convert(model, "bn", calibrate=nothing)


def test_a_batch_that_is_empty_where_a_norm_reads_tells_nothing() -> None:
    def proposals(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x[x[:, 0, 0, 0] > 0]))

    model = Forward(proposals, conv=nn.Conv2d(3, 8, 3), norm=nn.GroupNorm(2, 8))
    some, none = DATA[0].abs(), -DATA[0].abs()
    options = {"calibrate_seconds": 0}
    ours, wanted = (normswap.convert(model, "bn", calibrate=data, **options).model for data in ([some, none], [some]))
    torch.testing.assert_close(ours.state_dict(), wanted.state_dict())


def test_an_instance_norm_that_no_longer_tracks_statistics_goes_by_the_sample() -> None:
    model = settled(nn.InstanceNorm2d(8, affine=True, track_running_stats=True))
    model[1].track_running_stats = False
    converted, report = normswap.convert(model, "gn", groups=8)
    assert report.exact
    torch.testing.assert_close(converted(X), model(X))


def test_data_take_the_dtype_of_the_model() -> None:
    model = net(nn.GroupNorm(2, 8)).bfloat16()
    converted = normswap.convert(model, "bn", calibrate=DATA).model
    assert converted[1].running_mean.dtype == converted[1].weight.dtype == torch.bfloat16
    labelled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, torch.arange(len(X))), 16)
    ours, theirs = (normswap.convert(net(nn.GroupNorm(2, 8)), "bn", calibrate=data).model for data in (labelled, DATA))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_a_norm_that_data_do_not_reach() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = net(nn.GroupNorm(2, 8)), nn.GroupNorm(2, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(normswap.OptionError, match="unused.*that reach it"):
        normswap.convert(Optional(), "bn", calibrate=DATA, calibrate_seconds=0)
    assert (
        normswap.convert(
            Optional(), "bn", calibrate=DATA, calibrate_seconds=0, exclude="unused"
        ).report.totals.norms_changed
        == 1
    )


@pytest.mark.parametrize("target", ["gn", "ln"])
@pytest.mark.parametrize("make", [lambda: nn.InstanceNorm2d(8), lambda: nn.GroupNorm(4, 8, affine=False)])
def test_the_architecture_is_the_same_with_data_and_without(make: Callable[[], nn.Module], target: str) -> None:
    options = {"groups": 2} if target == "gn" else {}
    on_data = normswap.convert(net(make()), target, calibrate=DATA, calibrate_seconds=0, **options).model
    fresh = normswap.convert(net(make()), target, **options).model
    fresh.load_state_dict(on_data.state_dict(), strict=True)


@pytest.mark.parametrize("target", ["est", "frozen", "fold", "bcn", "gn"])
def test_a_batch_norm_without_statistics_takes_those_of_the_data(target: str) -> None:
    model = net(nn.BatchNorm2d(8, track_running_stats=False))
    converted, report = normswap.convert(model, target, calibrate=X, calibrate_seconds=0)
    assert report.totals.norms_changed == 1 and not report.exact
    if target in ("est", "frozen", "fold"):
        with torch.no_grad():
            torch.testing.assert_close(converted(X), model(X), rtol=1e-3, atol=1e-3)


def test_groups_are_chosen_on_the_data() -> None:
    """Samples whose channels differ in strength from one to the next: small groups would even that out."""
    model = settled(nn.BatchNorm2d(8))
    _, blind = normswap.convert(model, "gn")
    _, report = normswap.convert(model, "gn", calibrate=DATA, calibrate_seconds=0)
    (before,), (after,) = ([c for c in r.changes if c.kind == "norm"] for r in (blind, report))
    assert before.groups == 2 and after.groups == 1 and "keeps more on the data" in after.note
    errors = {
        groups: normswap.convert(model, "gn", groups=groups, example_inputs=X).report.drift.relative_l2
        for groups in (1, 2)
    }
    assert errors[1] < errors[2]
    assert normswap.convert(model, "gn", groups=2, calibrate=DATA, calibrate_seconds=0).report.changes[0].groups == 2


def test_packed_sequences_are_data() -> None:
    model = nn.LSTM(3, 4)
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in (5, 3, 2)])
    for data in (packed, [packed], [(packed,)]):
        options = {"recurrent": "ln", "calibrate": data, "calibrate_seconds": 0, "example_inputs": packed}
        assert normswap.convert(model, "ln", **options).report.drift.relative_l2 is not None


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(net(nn.GroupNorm(2, 8)), "net.pt")
    torch.save(X, "data.pt")
    run = CliRunner()
    refused = run.invoke(app, ["convert", "net.pt", "--to", "bn"])
    assert refused.exit_code == 1 and "--calibrate" in refused.stderr and not Path("net.bn.pt").exists()
    done = run.invoke(app, ["convert", "net.pt", "--to", "bn", "--calibrate", "data.pt", "--calibrate-seconds", "0"])
    assert done.exit_code == 0, done.output
    wanted = normswap.convert(net(nn.GroupNorm(2, 8)), "bn", calibrate=X, calibrate_seconds=0).model
    with torch.no_grad():
        torch.testing.assert_close(normswap.load("net.bn.pt")(X), wanted(X))
    wrong = run.invoke(
        app, ["convert", "net.pt", "--to", "bn", "--calibrate", "data.pt", "--overwrite", "--mean", "a,b"]
    )
    assert wrong.exit_code == 1 and "--mean" in wrong.stderr


# ---- position norm ----


class _ChannelsFirst(nn.Module):
    def __init__(self, channels: int, eps: float = 1e-4):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps


class TransposingNorm(_ChannelsFirst):
    """As speech synthesis has it, for any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.transpose(1, -1), self.weight.shape, self.weight, self.bias, self.eps).transpose(1, -1)


class SpelledOutNorm2d(_ChannelsFirst):
    """As segmentation models have it, for maps alone."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        normed = centred / torch.sqrt(centred.square().mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * normed + self.bias[:, None, None]


class OtherEpsNorm(_ChannelsFirst):
    """It says one eps and takes another."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.transpose(1, -1), self.weight.shape, self.weight, self.bias, 1e-6).transpose(1, -1)


class RootMeanNorm(_ChannelsFirst):
    """It leaves the mean in."""

    def forward(self, x: Tensor) -> Tensor:
        normed = x / torch.sqrt(x.square().mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * normed + self.bias[:, None, None]


@pytest.mark.parametrize("make", [TransposingNorm, SpelledOutNorm2d, PositionNorm])
def test_a_position_norm_is_known_by_what_it_computes(make: Callable[[int], nn.Module]) -> None:
    model = net(make(8))
    assert "is a position norm already" in {left.reason for left in normswap.convert(model, "pn-ws").report.left}
    converted, _ = normswap.convert(model, "bn", calibrate=DATA, calibrate_seconds=0)
    assert type(converted[1]) is nn.BatchNorm2d and converted[1].eps == model[1].eps
    with torch.no_grad():
        old, new = (net[:2](X) for net in (model, converted))
    torch.testing.assert_close((new.mean((0, 2, 3)), new.var((0, 2, 3))), (old.mean((0, 2, 3)), old.var((0, 2, 3))))


@pytest.mark.parametrize("make", [OtherEpsNorm, RootMeanNorm])
def test_a_norm_that_computes_something_else_is_left(make: Callable[[int], nn.Module]) -> None:
    with pytest.raises(normswap.ModelError, match="not a class that normswap knows"):
        normswap.convert(net(make(8)), "gn")


class Causal(nn.Module):
    """Two convolutions that see the past alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)
        self.conv2, self.norm2 = nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(F.pad(x, (2, 0)))).relu()
        return self.norm2(self.conv2(F.pad(x, (2, 0))))


@pytest.mark.parametrize(("target", "causal"), [("pn", True), ("pn-ws", True), ("gn", False), ("ln", False)])
def test_position_norm_sees_no_future(target: str, causal: bool) -> None:
    torch.manual_seed(0)
    model = normswap.convert(randomize(Causal()), target).model
    x = torch.randn(2, 3, 20)
    other = x.clone()
    other[..., 12:] = 9
    for mode in (True, False):
        with torch.no_grad():
            past, again = (model.train(mode)(values)[..., :12] for values in (x, other))
        assert torch.equal(past, again) == causal


def test_position_norm_in_files(tmp_path: Path) -> None:
    """On tensors alone as by the model, and back to batch norm on data with the class of before."""
    model = settled(nn.BatchNorm2d(8))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    normswap.convert_file(tmp_path / "m.pt", "pn", tmp_path / "out.pt")
    converted = normswap.load(tmp_path / "out.pt", model=lambda: net(nn.BatchNorm2d(8)))
    with torch.no_grad():
        torch.testing.assert_close(converted(X), normswap.convert(model, "pn").model(X))
    back = normswap.convert(converted, "bn", calibrate=DATA, calibrate_seconds=0).model
    assert type(back[1]) is nn.BatchNorm2d
    (left,) = normswap.fold(converted).report.left
    assert left.module == "PositionNorm" and "no layer of torch" in left.reason


class GlobalNorm(nn.Module):
    """Over channels and positions, with parameters of names that no norm of torch has."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(1, channels, 1)), nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean((1, 2), keepdim=True), x.var((1, 2), keepdim=True, unbiased=False)
        return self.gamma * (x - mean) / (var + 1e-8).sqrt() + self.beta


def test_a_norm_of_no_known_class_stays_beside_those_that_change() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 1), GlobalNorm(8), nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8)).eval()
    report = normswap.convert(randomize(model), "fold").report
    (left,) = (entry for entry in report.left if entry.kind == "norm")
    assert (left.path, left.module, report.totals.norms_changed) == ("1", "GlobalNorm", 1)
    assert "not a class that normswap knows" in left.reason
