"""Options, retention, groups, patterns, and refusals of `convert` and `fold`."""

import copy

import pytest
import torch
from helpers.checks import distance, fingerprint, same
from helpers.nets import X, chain, conv_norm, mlp, randomize, resnet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import normswap
from normswap import ModelError, NormswapError, OptionError
from normswap.analysis.dataflow import find_flow
from normswap.analysis.running import Seen
from normswap.analysis.sites import find_sites
from normswap.layers.reparametrized import StandardizedConv2d
from normswap.targets.context import Context
from normswap.targets.groups import choose_groups
from normswap.targets.options import Options

# ---- exactness ----


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("target", ["frozen", "fold", "ws", "frozen-ws", "fold-ws"])
def test_exact_targets(target: str, dtype: torch.dtype, bound: float) -> None:
    model, x = resnet().to(dtype), X.to(dtype)
    converted, report = normswap.convert(model, target, example_inputs=x)
    with torch.no_grad():
        wanted, got = model(x), converted(x)
        assert distance(wanted, got) < bound
        assert distance(got, normswap.fold(converted).model(x)) < bound
    assert report.exact and report.drift.relative_l2 < bound and report.drift.top1_agreement == 1


def test_gn_ws_preserve_equals_gn() -> None:
    model = resnet()
    gn, both = normswap.convert(model, "gn").model, normswap.convert(model, "gn-ws").model
    with torch.no_grad():
        assert distance(gn(X), both(X)) < 1e-5


def test_gn_by_hand() -> None:
    """One norm, every number of the published formula spelled out."""
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3))).eval()
    bn, x = copy.deepcopy(model[1]), torch.randn(4, 3, 9, 9)
    gn = normswap.convert(model, "gn", groups=2).model[1]
    assert type(gn) is nn.GroupNorm and gn.num_groups == 2 and gn.eps == 1e-3
    for c in range(8):
        group = slice(0, 4) if c < 4 else slice(4, 8)
        m = bn.running_mean[group].mean()
        s2 = (bn.running_var[group] + bn.running_mean[group] ** 2).mean() - m**2
        root = (bn.running_var[c] + bn.eps).sqrt()
        torch.testing.assert_close(gn.weight[c], bn.weight[c] * (s2 + bn.eps).sqrt() / root)
        torch.testing.assert_close(gn.bias[c], bn.bias[c] + bn.weight[c] * (m - bn.running_mean[c]) / root)
    assert model(x).shape == gn(model[0](x)).shape


def test_in_is_instance_norm() -> None:
    model = conv_norm()
    norm = normswap.convert(randomize(model), "in").model.norm
    assert type(norm) is nn.InstanceNorm2d
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(norm(x), F.instance_norm(x, weight=norm.weight, bias=norm.bias, eps=norm.eps))
    torch.testing.assert_close(norm.weight, model.norm.weight)


@pytest.mark.parametrize("target", ["gn", "ln", "in"])
def test_transfer_copy_and_reset(target: str) -> None:
    model = randomize(conv_norm())
    copied = normswap.convert(model, target, transfer="copy").model.norm
    assert torch.equal(copied.weight, model.norm.weight) and torch.equal(copied.bias, model.norm.bias)
    reset = normswap.convert(model, target, transfer="reset").model.norm
    assert (reset.weight == 1).all() and (reset.bias == 0).all()


@pytest.mark.parametrize("target", ["frozen", "fold"])
def test_exact_targets_with_transfer(target: str) -> None:
    model, x = randomize(conv_norm()).eval(), torch.randn(2, 3, 8, 8)
    copied, report = normswap.convert(model, target, transfer="copy")
    assert report.exact and distance(model(x), copied(x)) < 1e-5
    reset, report = normswap.convert(model, target, transfer="reset")
    nn.init.ones_(model.norm.weight), nn.init.zeros_(model.norm.bias)
    assert not report.exact and distance(model(x), reset(x)) < 1e-5


# ---- weight standardization ----


def test_strict_is_the_papers_form_and_rescales_the_statistics() -> None:
    """Zero-mean filters: strict standardization changes the scale alone, and the statistics follow it."""
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).double().eval()
    with torch.no_grad():
        model[0].weight -= model[0].weight.mean((1, 2, 3), keepdim=True)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    for target in ("ws", "frozen-ws"):
        strict, report = normswap.convert(model, target, ws="strict")
        assert (strict[0].weight_gain == 1).all() and (strict[0].weight_shift == 0).all()
        assert torch.equal(strict[0].weight, model[0].weight)
        assert not report.exact
        plain = normswap.convert(model, target).model
        assert distance(plain(x), strict(x)) < 1e-3, "what is left is eps, relative to a rescaled variance"


def test_scope() -> None:
    model = nn.Sequential(conv_norm(8), nn.Conv2d(8, 4, 1))
    normed, report = normswap.convert(model, "ws")
    assert isinstance(normed[0].conv, StandardizedConv2d) and type(normed[1]) is nn.Conv2d
    assert [left.reason for left in report.left if left.path == "1"] == ["has no normalization after it"]
    assert isinstance(normswap.convert(model, "ws", ws_scope="all").model[1], StandardizedConv2d)


def test_converted_models_convert_on() -> None:
    model = resnet()
    ws = normswap.convert(model, "ws").model
    with torch.no_grad():
        assert distance(model(X), normswap.convert(ws, "fold").model(X)) < 1e-5, "a norm goes into gain and shift"
        frozen = normswap.convert(model, "frozen").model
        gn, via = normswap.convert(model, "gn").model, normswap.convert(frozen, "gn").model
        assert distance(gn(X), via(X)) < 1e-6


def test_fold_of_a_frozen_norm_without_a_convolution_is_a_batch_norm_in_eval_mode() -> None:
    model = randomize(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())).train()
    frozen = normswap.convert(model, "frozen").model
    folded, report = normswap.fold(frozen)
    assert type(folded[0]) is nn.BatchNorm2d and not folded[0].training
    torch.testing.assert_close(folded(X), frozen(X))
    assert "no convolution" in report.changes[0].note


def test_fold_of_a_plain_model_is_what_the_target_does() -> None:
    model = randomize(resnet()).eval()
    folded, report = normswap.fold(model)
    by_target = normswap.convert(model, "fold")
    assert report.changes == by_target.report.changes and report.totals.norms_changed > 10
    assert folded is not model and same(fingerprint(folded), fingerprint(by_target.model))


# ---- groups ----


@given(
    st.integers(1, 300),
    st.one_of(st.just("auto"), st.integers(1, 64), st.integers(1, 64).map("{}c".format)),
    st.sampled_from([None, 1, 2, 7, 49]),
)
@settings(deadline=None, max_examples=300)
def test_groups(channels: int, groups: str | int, elements: int | None) -> None:
    model = nn.BatchNorm2d(channels)
    (site,) = find_sites(model)
    known = {} if elements is None else {"": Seen(4, elements)}
    context = Context(Options(groups), find_flow(model, [site]), {"": site}, seen=known)
    chosen = choose_groups(site, context)
    if isinstance(chosen, str):
        assert channels * (elements or 2) == 1
        return
    number, note = chosen
    assert channels % number == 0
    if elements:
        assert channels // number * elements >= 2, "never one element a group"
    if isinstance(groups, int):
        best = max(
            n for n in range(1, groups + 1) if channels % n == 0 and (elements is None or channels // n * elements >= 2)
        )
        assert number == best
        assert bool(note) == (number != groups)
    elif groups == "auto":
        assert number <= 8 and (channels // number >= 4 or number == 1)
    elif elements is None:
        each = int(groups[:-1])
        assert bool(note) == (channels // number != each)


def test_no_group_of_one_element() -> None:
    for target in ("gn", "in"):
        for model, x in (
            (mlp(32), torch.randn(4, 6)),
            (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32)), X),
        ):
            asked = {"groups": 32} if target == "gn" else {}
            converted, report = normswap.convert(randomize(model), target, **asked)
            (norm,) = (m for m in converted.modules() if isinstance(m, nn.GroupNorm))
            assert norm.num_groups <= 16
            assert "one element a channel" in next(c.note for c in report.changes if c.kind == "norm")
            assert converted(x).std() > 0


def test_example_inputs_tell_the_size_of_maps() -> None:
    """A map of 1×1 that only a run can tell: the input is as large as the kernel."""
    model = nn.Sequential(nn.Conv2d(3, 32, 8), nn.BatchNorm2d(32))
    blind = normswap.convert(model, "gn", groups=32).model
    told, report = normswap.convert(model, "gn", groups=32, example_inputs=torch.randn(2, 3, 8, 8))
    assert blind[1].num_groups == 32 and told[1].num_groups == 16
    assert report.changes[0].note == "16 groups, not 32: one element a channel"


@pytest.mark.parametrize("groups", [0, -1, "0", "x", "8d", "-4", "0c", 1.5, True])
def test_impossible_groups(groups: object) -> None:
    with pytest.raises(OptionError, match="groups"):
        normswap.convert(resnet(), "gn", groups=groups)


@pytest.mark.parametrize("groups", [9, "9c"])
def test_more_groups_than_channels(groups: object) -> None:
    model = conv_norm()
    before = fingerprint(model)
    with pytest.raises(OptionError, match="more than the 8 channels of the widest layer; give at most so many"):
        normswap.convert(model, "gn", groups=groups, inplace=True)
    assert same(before, fingerprint(model))


# ---- patterns ----


def test_include_and_exclude() -> None:
    model = resnet()
    report = normswap.convert(model, "gn", include=["layer1.*", "bn1"], exclude="*.bn2").report
    assert {p for c in report.changes for p in c.paths} == {"bn1", "layer1.0.bn1", "layer1.1.bn1"}
    assert {left.reason for left in report.left if left.path == "layer1.0.bn2"} == {"not selected"}
    by_function = normswap.convert(
        model, "gn", include=lambda path, m: path == "bn1" and isinstance(m, nn.BatchNorm2d)
    ).report
    assert len(by_function.changes) == 1


def test_an_alias_is_selected_by_any_of_its_names() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    assert normswap.convert(model, "gn", include="b.*").report.changes[0].paths == ("a", "b.0")


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing(option: str) -> None:
    with pytest.raises(OptionError, match=f"{option}: 'layer9"):
        normswap.convert(resnet(), "gn", **{option: "layer9.*"})
    with pytest.raises(OptionError, match=r"write 'layer1\.\*'"):
        normswap.convert(resnet(), "gn", **{option: "layer1"})


def test_fold_with_a_layer_that_was_not_selected() -> None:
    """A norm may go only into a layer that the user lets it change."""
    model = randomize(conv_norm())
    with pytest.raises(ModelError, match="nothing to (convert|fold)"):
        normswap.convert(model, "fold", exclude="conv")


# ---- refusals ----


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        *dict.fromkeys(
            ["GN", "groupnorm", "group_norm", "Group Normalization", "nn.GroupNorm", "GroupNorm2d"], "gn"
        ).items(),
        *dict.fromkeys(
            ["gnws", "ws-gn", "gn_ws", "gn+ws", "groupnorm-weightstandardization", "gn-wss"], "gn-ws"
        ).items(),
        ("instance_norm", "in"),
        ("weight-norm", "wn"),
    ],
)
def test_unknown_target_gets_one_suggestion(written: str, meant: str) -> None:
    with pytest.raises(OptionError) as error:
        normswap.convert(resnet(), written)
    assert str(error.value) == f"unknown target {written!r}; did you mean {meant}? normswap targets lists all"


def test_unknown_target_that_is_like_none() -> None:
    with pytest.raises(OptionError, match="^unknown target 'banana'; normswap targets lists all$"):
        normswap.convert(resnet(), "banana")


@pytest.mark.parametrize("option", ["transfer", "ws", "ws_scope"])
def test_unknown_option(option: str) -> None:
    with pytest.raises(OptionError, match=f"{option}: 'other' is not one of"):
        normswap.convert(resnet(), "gn", **{option: "other"})


def test_nothing_to_convert() -> None:
    with pytest.raises(ModelError, match="nothing to convert to gn: the model has no normalization"):
        normswap.convert(nn.Linear(2, 2), "gn")
    with pytest.raises(ModelError, match="1 GroupNorm: has one group already"):
        normswap.convert(nn.Sequential(nn.GroupNorm(1, 2)), "gn")


def test_distributed_wrapper() -> None:
    """The wrapper's class, without a process group to make a real one."""
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = resnet()
    with pytest.raises(ModelError, match="convert first, then wrap"):
        normswap.convert(wrapper, "gn")


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_what_is_no_model() -> None:
    with pytest.raises(ModelError, match=r"normswap\.convert_file"):
        normswap.convert("model.pt", "gn")
    with pytest.raises(ModelError, match="TorchScript"):
        normswap.convert(torch.jit.script(conv_norm()), "gn")


def test_inputs_that_do_not_fit_change_nothing() -> None:
    model = resnet()
    before = fingerprint(model)
    with pytest.raises(ModelError, match="does not run on the example inputs"):
        normswap.convert(model, "gn", example_inputs=torch.randn(2, 5, 8, 8), inplace=True)
    assert same(before, fingerprint(model))


def test_every_refusal_is_a_normswap_error() -> None:
    assert issubclass(OptionError, NormswapError) and issubclass(ModelError, NormswapError)


def test_modes_come_back_after_a_run() -> None:
    model = chain(4, 8).train()
    model[0].eval()
    converted = normswap.convert(model, "gn", example_inputs=X).model
    assert [m.training for m in converted.modules()] == [m.training for m in model.modules()]
    assert model[1][1].num_batches_tracked == 0
