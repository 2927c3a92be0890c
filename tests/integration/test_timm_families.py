"""Every family of timm with batch norm, by one small member; what timm's norms and data recipes ask of a conversion."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.checks import check_named, distance
from helpers.command import run
from helpers.nets import randomize
from helpers.pictures import picture
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import normswap
from normswap.calibration.batches import read_samples

timm = pytest.importorskip("timm")
from timm.layers import BatchNormAct2d, GroupNormAct  # noqa: E402

BATCH_NORM = nn.modules.batchnorm._BatchNorm


class Member(NamedTuple):
    """A model of a family: its name, the side of a picture that it takes, how many batch norms `fold` may leave at most
    (they have no layer of their own before them, or none that can be seen), and arguments that make it smaller.
    """

    name: str
    side: int = 64
    unfolded: int = 0
    arguments: dict[str, Any] = {}  # noqa: RUF012  # never written to


TWO_STAGES = {"depth": (1, 1), "num_heads": (4, 4), "window_size": (7, 7)}
TWO_OF_TINY = {"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (2, 4), "window_sizes": (7, 7)}
FAMILIES = {
    "byoanet": Member("eca_botnext26ts_256", 256, 3),
    "byobnet": Member("test_byobnet"),
    "convmixer": Member("convmixer_768_32", 64, 65),
    "cpubone": Member("cpubone_nano"),
    "cspnet": Member("cs3darknet_focus_s"),
    "cspnext": Member("cspnext_tiny"),
    "densenet": Member("densenet121", 64, 62),
    "dla": Member("dla46x_c"),
    "dpn": Member("dpn48b", 64, 21),
    "efficientformer": Member("efficientformer_l1", 224),
    "efficientformer_v2": Member("efficientformerv2_s0", 224, 1, {"depths": (1, 1, 1, 1)}),
    "efficientnet": Member("test_efficientnet"),
    "efficientvim": Member("efficientvim_m1"),
    "efficientvit_mit": Member("efficientvit_b0", 64, 0, {"depths": (1, 1, 1, 1, 1)}),
    "efficientvit_msra": Member("efficientvit_m0", 224, 1, TWO_STAGES | {"embed_dim": (64, 128), "key_dim": (16, 16)}),
    "fasternet": Member("fasternet_t0"),
    "fastvit": Member("fastvit_t8", 64, 10),
    "ghostnet": Member("ghostnet_050"),
    "hardcorenas": Member("hardcorenas_b"),
    "hgnet": Member("hgnetv2_b0"),
    "hrnet": Member("hrnet_w18_small"),
    "iformer": Member("iformer_t"),
    "inception_next": Member("inception_next_atto"),
    "inception_resnet_v2": Member("inception_resnet_v2", 96),
    "inception_v3": Member("inception_v3", 96),
    "inception_v4": Member("inception_v4", 96),
    "lcnetv2": Member("lcnetv2_small"),
    "levit": Member("levit_conv_128s", 224, 2, {"depth": (1, 1, 1)}),
    "lowformer": Member("lowformer_b0"),
    "maxxvit": Member("test_coatnet", 160, 2),
    "mobilenetv3": Member("mobilenetv3_small_050"),
    "mobilevit": Member("mobilevitv2_050"),
    "nasnet": Member("nasnetalarge", 32, 1, {"num_features": 384, "stem_size": 24}),
    "nextvit": Member("nextvit_small", 64, 8),
    "pnasnet": Member("pnasnet5large", 32, 1),
    "regnet": Member("regnetx_002"),
    "repghost": Member("repghostnet_050"),
    "repvit": Member("repvit_m1"),
    "res2net": Member("res2next50"),
    "resnest": Member("resnest14d"),
    "resnet": Member("test_resnet"),
    "resnetv2": Member("resnetv2_18", 64, 9),
    "rexnet": Member("rexnet_100"),
    "selecsls": Member("selecsls42"),
    "senet": Member("legacy_seresnet18"),
    "shvit": Member("shvit_s1"),
    "sknet": Member("skresnet18"),
    "starnet": Member("starnet_s050", 64, 1),
    "swiftformer": Member("swiftformer_xs", 224, 1),
    "tiny_vit": Member("tiny_vit_5m_224", 64, 0, TWO_OF_TINY),
    "tresnet": Member("tresnet_m"),
    "vgg": Member("vgg11_bn", 64, 0, {"mlp_ratio": 0.1}),
    "visformer": Member("visformer_tiny", 224, 1),
    "vision_transformer_hybrid": Member("vit_small_resnet26d_224", 224, 0, {"depth": 1, "embed_dim": 96}),
    "volo": Member("volo_d1_224", 224),
    "vovnet": Member("ese_vovnet19b_slim_dw"),
    "xception": Member("legacy_xception"),
    "xception_aligned": Member("xception41p", 64, 12),
    "xcit": Member("xcit_nano_12_p16_224", 224, 2, {"depth": 2}),
}


class _WithoutInitialization(TorchFunctionMode):
    """Leaves out every operation in place: on meta most time would go into first values, which it does not hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], Tensor):
            return args[0]
        return func(*args, **(kwargs or {}))


def has_batch_norm(name: str, **arguments: Any) -> bool:
    with torch.device("meta"), _WithoutInitialization():
        return any(isinstance(m, BATCH_NORM) for m in timm.create_model(name, **arguments).modules())


def test_the_table_is_complete() -> None:
    """Every model of every other family is built, on meta."""
    for family, member in FAMILIES.items():
        assert member.name in timm.list_models(module=family), f"{family}: not the family of {member.name}"
        assert has_batch_norm(member.name, **member.arguments), f"{family}: {member.name} has no batch norm"
    others = set(timm.list_modules()) - FAMILIES.keys()
    missing = {family for family in others if any(has_batch_norm(name) for name in timm.list_models(module=family))}
    assert not missing, f"families with batch norm that are not in the table: {missing}"


UNREADABLE = {"fasternet"}
"""Hold a method of theirs, which a pickle gets by `getattr`."""


def test_whole_models_load_back_safely(tmp_path: Path) -> None:
    """One of each family, with batch norm or not: their classes and enumerations are allowed."""
    with torch.device("meta"):
        for family in sorted(set(timm.list_modules()) - UNREADABLE):
            torch.save(timm.create_model(timm.list_models(module=family)[0]), tmp_path / "model.pt")
            assert isinstance(normswap.load(tmp_path / "model.pt"), nn.Module)


# ---- the families ----


def make(family: str) -> nn.Module:
    member = FAMILIES[family]
    torch.manual_seed(0)
    return timm.create_model(member.name, num_classes=7, **member.arguments).double()


def with_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """Gains and biases as after training, and the running statistics of the activations that these give on `x`."""
    norms = [m for m in randomize(model).modules() if isinstance(m, BATCH_NORM)]
    rates = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.9
    output(model.train(), x)
    for norm, rate in zip(norms, rates, strict=True):
        norm.momentum = rate
    return model.eval()


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@functools.lru_cache(maxsize=1)  # the tests of one family follow one another
def original(family: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, an input and what it makes of it, in float64: rounding does not hide what is not exact."""
    side = FAMILIES[family].side
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = with_statistics(make(family), x)
    return model, x[:1], output(model, x[:1])


@functools.lru_cache(maxsize=1)
def as_gn(family: str) -> tuple[normswap.Conversion, Tensor]:
    model, x, _ = original(family)
    conversion = normswap.convert(model, "gn")
    return conversion, output(conversion.model, x)


def batch_norms(model: nn.Module) -> set[str]:
    return {path for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, BATCH_NORM)}


@pytest.mark.parametrize("target", ["gn", "gn-ws", "frozen", "fold"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, target: str) -> None:
    model, x, before = original(family)
    norms = batch_norms(model)
    if (family, target) == ("convmixer", "fold"):  # an activation stands between each convolution and its norm
        with pytest.raises(normswap.ModelError, match="no convolution or linear layer directly before it"):
            normswap.convert(model, target)
        return
    converted, report = as_gn(family)[0] if target == "gn" else normswap.convert(model, target)
    check_named(converted, report)

    still = batch_norms(converted)
    changed = {path for change in report.changes if change.kind == "norm" for path in change.paths}
    assert still <= {entry.path for entry in report.left}
    assert norms - still <= changed
    assert len(still) <= (FAMILIES[family].unfolded if target == "fold" else 0)
    if target == "fold":
        assert norms - still, "nothing was folded"

    after = output(converted, x)
    check_loads(family, target, converted, x, after)
    if target in ("frozen", "fold"):
        assert report.exact
        assert distance(before, after) < 1e-9
    else:
        assert not report.exact
        assert distance(before, after) > 1e-3, "the statistics of a sample are not those of the data"
        assert distance(as_gn(family)[1], after) < 1e-9
        check_learns(converted, x)


def check_loads(family: str, target: str, converted: nn.Module, x: Tensor, after: Tensor) -> None:
    """The state dict fits what a fresh model becomes, and there it is the same function."""
    fresh = normswap.convert(make(family), target, inplace=True).model.eval()
    fresh.load_state_dict(converted.state_dict(), strict=True, assign=True)
    assert torch.equal(output(fresh, x), after)


def check_learns(model: nn.Module, x: Tensor) -> None:
    """One step of training at batch 1, with a gradient for every parameter."""
    outputs = [leaf for leaf in pytree.tree_leaves(model.train()(x)) if leaf.is_floating_point()]
    assert outputs and all(leaf.isfinite().all() for leaf in outputs)
    sum(leaf.square().mean() for leaf in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    assert output(model.eval(), x).isfinite().all()


def test_a_model_of_timm_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    done = run("convert", "timm:test_resnet", "--to", "gn-ws", "--model-arg", "num_classes=7", "-o", out)
    assert done.exit_code == 0, done.stderr
    assert "15 norms, 15 weights changed" in done.stdout
    model = normswap.load(out)
    assert sum(isinstance(m, nn.GroupNorm) for m in model.modules()) == 15 and not batch_norms(model)
    assert output(model.eval(), torch.randn(2, 3, 64, 64)).shape == (2, 7)


# ---- norms with an activation and a dropout behind them ----


def with_dropout(model: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    """The norms of a kind, every other one with a dropout between it and its activation."""
    norms = {path: m for path, m in model.named_modules() if isinstance(m, kind)}
    for norm in list(norms.values())[::2]:
        norm.drop = nn.Dropout(0.25)
    model.eval()
    assert norms
    return norms


def check_behind(
    norms: dict[str, nn.Module], converted: nn.Module, x: Tensor, bare: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    """Each new norm has the old one's dropout and activation: `act(drop(bare(norm, input)))`, in train mode too."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for path in norms:

        def note(module: nn.Module, args: tuple[Tensor], result: Tensor, path: str = path) -> None:
            seen[path] = (args[0].clone(), result.clone())  # an activation may work in place

        converted.get_submodule(path).register_forward_hook(note)
    output(converted.eval(), x)
    assert seen.keys() == norms.keys()
    for path, old in norms.items():
        new, (given, result) = converted.get_submodule(path), seen[path]
        assert str(new.act) == str(old.act) and str(new.drop) == str(old.drop)
        torch.testing.assert_close(result, old.act(bare(new, given).clone()))
        torch.manual_seed(0)
        trained = new.train()(given.clone())
        torch.manual_seed(0)
        torch.testing.assert_close(trained, old.act(old.drop.train()(bare(new, given))))


def group_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """By running statistics in eval mode, by the batch's in train mode, as torch has it."""
    mean, var = (norm.running_mean.clone(), norm.running_var.clone())
    return F.batch_norm(x, mean, var, norm.weight, norm.bias, norm.training, 0.0, norm.eps)


def test_activation_and_dropout_stay_behind_a_group_norm() -> None:
    x = torch.randn(4, 3, 64, 64)
    model = with_statistics(timm.create_model("test_efficientnet"), x)
    norms = with_dropout(model, BatchNormAct2d)
    check_behind(norms, normswap.convert(model, "gn").model, x, group_norm)


def test_activation_and_dropout_stay_behind_a_frozen_norm() -> None:
    x = torch.randn(4, 3, 64, 64)
    model = with_statistics(timm.create_model("test_efficientnet"), x)
    norms = with_dropout(model, BatchNormAct2d)

    def fixed(norm: nn.Module, x: Tensor) -> Tensor:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)

    check_behind(norms, normswap.convert(model, "frozen").model, x, fixed)


def test_activation_and_dropout_stay_where_a_norm_was_folded() -> None:
    x = torch.randn(4, 3, 64, 64)
    model = with_statistics(timm.create_model("test_efficientnet"), x)
    norms = with_dropout(model, BatchNormAct2d)
    converted = normswap.convert(model, "fold").model
    assert distance(output(model, x), output(converted, x)) < 1e-5
    for path, old in norms.items():
        kept = [str(m) for m in converted.get_submodule(path).children() if not isinstance(m, nn.Identity)]
        assert kept == [str(m) for m in (old.drop, old.act) if not isinstance(m, nn.Identity)]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("test_efficientnet_gn", {}), ("resnetv2_50d_gn", {"layers": (1, 1, 1, 1), "channels": (128,) * 4})],
    ids=["efficientnet", "resnetv2"],
)
def test_group_norms_with_an_activation_become_batch_norms(name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **arguments).eval()
    norms = with_dropout(model, GroupNormAct)
    x = torch.randn(32, 3, 64, 64)
    with pytest.raises(normswap.NormswapError, match="calibrate"):
        normswap.convert(model, "bn")
    converted, report = normswap.convert(model, "bn", calibrate=x, calibrate_seconds=0)
    assert report.totals.norms_changed == len(norms) and batch_norms(converted) == norms.keys()
    assert distance(output(model, x), output(converted, x)) < 0.6
    first = next(iter(norms))
    inputs: list[Tensor] = []
    model.get_submodule(first).register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    output(model, x)
    torch.testing.assert_close(converted.get_submodule(first).running_mean, inputs[0].mean((0, 2, 3)))
    check_behind(norms, converted, x, batch_norm)


# ---- pictures ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, size in enumerate([(60, 40), (300, 200), (90, 200), (500, 400)]):
        picture(size=size, seed=seed).save(tmp_path / f"{seed}.png")
    return tmp_path


def prepared(model: nn.Module) -> Tensor:
    """The folder's pictures as timm itself prepares them for the model."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    sizes = [(60, 40), (300, 200), (90, 200), (500, 400)]
    return torch.stack([transform(picture(size=size, seed=seed)) for seed, size in enumerate(sizes)])


RECIPES = [
    "test_efficientnet_gn",
    "inception_v3",
    "nasnetalarge",
    "tresnet_m",
    "xcit_nano_12_p8_384",
    "mobilevit_xxs",
    "hgnetv2_b0",
]
"""Models whose recipes differ in size, mean and std, crop and interpolation."""


@pytest.mark.parametrize("name", RECIPES)
def test_pictures_are_prepared_as_timm_prepares_them(folder: Path, name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    wanted, read = prepared(model), torch.cat(read_samples(folder, spec=f"timm:{name}"))
    assert len(read) == len(wanted)  # in any order: samples are dealt into mixed batches
    for x in wanted:
        assert any(torch.equal(x, y) for y in read)


def test_calibration_on_a_folder_uses_the_recipe(folder: Path, tmp_path: Path) -> None:
    """Seen from outside: the first norm's running mean is that of timm's own tensors."""
    out = tmp_path / "out.pt"
    options = ["--calibrate", folder, "--calibrate-seconds", 0, "--quiet", "-o", out]
    done = run("convert", "timm:test_efficientnet_gn", "--to", "bn", *options)
    assert done.exit_code == 0, done.stderr
    model = normswap.load(out)
    first = output(model.conv_stem, prepared(model))
    torch.testing.assert_close(model.bn1.running_mean, first.mean((0, 2, 3)))
    assert distance(output(model.conv_stem, torch.rand(4, 3, 160, 160)).mean((0, 2, 3)), model.bn1.running_mean) > 0.1
