"""Models of segmentation_models_pytorch: encoder and decoder converted, exactly where said, and trained at batch 1."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap

smp = pytest.importorskip("segmentation_models_pytorch")

EXACT = ("frozen", "fold", "frozen-ws", "fold-wn")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) + 0.5


def unet(encoder: str = "resnet18", **options: object) -> nn.Module:
    channels = (64, 32, 16, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of `timm-`, which older code still writes
        made: nn.Module = smp.Unet(encoder, encoder_weights=None, decoder_channels=channels, **options)
    return made


UNETS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": unet,
    "mobilenet_v2": lambda: unet("mobilenet_v2"),
    "timm's, by its old name": lambda: unet("timm-mobilenetv3_small_100"),
    "timm's": lambda: unet("tu-mobilenetv3_small_100"),
    "attention": lambda: unet(decoder_attention_type="scse"),
    "a classifier beside it": lambda: unet(aux_params={"classes": 2, "dropout": 0.2}),
    "an encoder's norms alone": lambda: unet(decoder_use_norm=False),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "FPN": lambda: smp.FPN(
        "resnet18", encoder_weights=None, decoder_pyramid_channels=64, decoder_segmentation_channels=64
    ),
    "DeepLabV3Plus": lambda: smp.DeepLabV3Plus("resnet18", encoder_weights=None, decoder_channels=64),
}
MODELS = {**UNETS, **OTHERS}


def batch_norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """A model whose norms are far from where they start."""
    torch.manual_seed(0)
    model = make().train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 64, 64) + 0.5)
    return model.eval()


def outputs(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        found = model.eval()(X)
    return [found] if isinstance(found, Tensor) else list(found)


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    """Up to rounding, measured by how far the outputs for two pictures are apart."""
    for a, b in zip(got, wanted, strict=True):
        apart = (b[0] - b[1]).abs().max().item()
        assert apart > 1e-3, "the outputs hardly depend on the input, so they prove nothing"
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * apart)


# ---- conversion ----


@pytest.mark.parametrize("name", MODELS)
def test_exact_targets_keep_the_mask(name: str) -> None:
    model = trained(MODELS[name])
    wanted = outputs(model)
    for target in EXACT:
        converted, report = normswap.convert(model, target)
        assert report.exact and report.totals.norms_changed > 0 and report.warnings == (), target
        assert_same(outputs(converted), wanted)
    assert_same(outputs(model), wanted)


@pytest.mark.parametrize("target", ["gn", "gn-ws"])
@pytest.mark.parametrize("name", MODELS)
def test_no_batch_norm_is_left(name: str, target: str) -> None:
    model = trained(MODELS[name])
    names, wanted = batch_norms(model), outputs(model)
    assert any(n.startswith("encoder") for n in names)
    assert any(n.startswith("decoder") for n in names) == (name not in ("an encoder's norms alone", "FPN"))
    converted, report = normswap.convert(model, target)
    assert batch_norms(converted) == []
    assert {path for c in report.changes if c.kind == "norm" for path in c.paths} == set(names)
    assert {c.after.partition("(")[0] for c in report.changes if c.kind == "norm"} <= {"GroupNorm", "GroupNormAct"}
    got = outputs(converted)
    assert all(a.shape == b.shape and a.isfinite().all() for a, b in zip(got, wanted, strict=True))
    assert not torch.allclose(got[0], wanted[0], rtol=1e-2, atol=1e-2), "said to be approximate"


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "timm's", "attention", "a classifier beside it"])
def test_fold_takes_the_norms_of_encoder_and_decoder(name: str) -> None:
    converted, report = normswap.convert(trained(MODELS[name]), "fold")
    assert batch_norms(converted) == [] and not any(row.kind == "norm" for row in report.left)


def test_the_groups_of_a_decoder_stay_as_they_are() -> None:
    """FPN's decoder has group norms of its own."""
    model = trained(OTHERS["FPN"])
    own = {n: m.num_groups for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)}
    converted, report = normswap.convert(model, "gn")
    assert own and all(name.startswith("decoder") for name in own)
    assert {row.path for row in report.left if row.kind == "norm"} == set(own)
    assert {n: m.num_groups for n, m in converted.named_modules() if n in own} == own
    asked = normswap.convert(model, "gn", groups=16, include="decoder.*").model
    assert {m.num_groups for n, m in asked.named_modules() if n in own} == {16}


def test_a_decoder_of_instance_norms() -> None:
    """`decoder_use_norm` gives these too; without statistics, frozen leaves them and gn takes gain and bias."""
    model = trained(lambda: unet(decoder_use_norm={"type": "instancenorm", "affine": True}))
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.InstanceNorm2d)}
    frozen, report = normswap.convert(model, "frozen")
    assert norms and {row.path for row in report.left if row.kind == "norm"} == norms
    assert all("no running statistics" in row.reason for row in report.left if row.kind == "norm")
    assert_same(outputs(frozen), outputs(model))
    assert not any(isinstance(m, nn.InstanceNorm2d) for m in normswap.convert(model, "gn").model.modules())


def test_encoder_or_decoder_alone() -> None:
    model = trained(unet)
    encoder = normswap.convert(model, "gn", include="encoder*").model
    assert all(name.startswith("decoder") for name in batch_norms(encoder)) and batch_norms(encoder)
    decoder = normswap.convert(model, "gn-ws", exclude="encoder*").model
    assert all(name.startswith("encoder") for name in batch_norms(decoder)) and batch_norms(decoder)


def test_a_state_dict_goes_into_a_converted_model() -> None:
    model = trained(unet)
    wanted = normswap.convert(model, "gn-ws").model
    again = normswap.convert(unet(), "gn-ws").model
    again.load_state_dict(wanted.state_dict(), strict=True)
    for a, b in zip(outputs(again), outputs(wanted), strict=True):
        assert torch.equal(a, b)


# ---- training ----


def picture() -> tuple[Tensor, Tensor]:
    """A bright disc on noise, and its mask."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    mask = ((rows - 36) ** 2 + (columns - 26) ** 2 < 14**2).float()[None, None]
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    return noise + 1.5 * mask, mask


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("resnet18", "gn"), ("resnet18", "gn-ws"), ("resnet18", "frozen"), ("timm's", "gn-ws"), ("FPN", "gn-ws"),
        ("DeepLabV3Plus", "gn"),
    ],
)  # fmt: skip
def test_twenty_steps_at_batch_1_lower_the_dice_loss(name: str, target: str) -> None:
    model = normswap.convert(trained(MODELS[name]), target).model.train()
    image, mask = picture()
    dice = smp.losses.DiceLoss(mode="binary")
    optimizer = torch.optim.Adam(normswap.param_groups(model, 1e-4), lr=5e-4)
    torch.manual_seed(0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = dice(model(image), mask)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.15, losses


def test_batch_norm_cannot_do_that_in_deeplab() -> None:
    """Its pooled branch has one value a channel at batch 1: what the conversion is for."""
    model = trained(OTHERS["DeepLabV3Plus"]).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(picture()[0])
