"""Models of timm, whose norms have activations behind them; tests/integration has every family of it."""

import pytest
import torch
from helpers.checks import check_named, distance
from helpers.nets import randomize
from torch import nn

import normswap

timm = pytest.importorskip("timm")

FAMILIES = ["mobilenetv3_small_050", "regnetx_002", "repvgg_a0", "resnet18"]
TARGETS = ["gn-ws", "est", "bcn-ws", "fold-wn"]
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make(name: str) -> nn.Module:
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    return randomize(timm.create_model(name, num_classes=7)).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    model = make(name)
    with torch.no_grad():
        before = model(X)
        for target in TARGETS:
            converted, report = normswap.convert(model, target)
            check_named(converted, report)
            if target != "fold":
                assert not [left for left in report.left if left.kind == "norm" and "fold" not in target]
            after = converted(X)
            assert after.isfinite().all()
            if report.exact:
                assert distance(before, after) < 1e-5
            fresh = normswap.convert(make(name), target).model
            fresh.load_state_dict(converted.state_dict(), strict=True)
            folded = normswap.fold(converted).model
            assert distance(after, folded(X)) < 1e-5
            assert not any(type(m).__module__.startswith("normswap") for m in folded.modules())
            assert converted.train()(X).isfinite().all()


def test_the_activation_is_kept() -> None:
    from timm.layers import BatchNormAct2d

    norm = randomize(BatchNormAct2d(8, act_layer=nn.SiLU)).double().eval()
    model = nn.Sequential(nn.Conv2d(3, 8, 3).double(), norm)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    converted = normswap.convert(model, "gn", groups=2).model
    assert isinstance(converted[1], nn.GroupNorm) and type(converted[1].act) is nn.SiLU
    h = model[0](x)
    gn = nn.functional.group_norm(h, 2, converted[1].weight, converted[1].bias, norm.eps)
    torch.testing.assert_close(converted(x), nn.functional.silu(gn))
    folded = normswap.convert(model, "fold").model
    assert [type(m) for m in folded[1]] == [nn.Identity, nn.SiLU]
    torch.testing.assert_close(folded(x), model(x))


def test_a_synchronized_norm_without_its_activation() -> None:
    """timm's class has neither `drop` nor `act` until something sets them."""
    from timm.layers.norm_act import SyncBatchNormAct

    model = nn.Sequential(nn.Conv2d(3, 8, 3), randomize(SyncBatchNormAct(8))).eval()
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(normswap.convert(model, "est").model(x), model(x))


def test_frozen_norms_of_timm() -> None:
    from timm.layers import freeze_batch_norm_2d

    model = make("efficientnet_b0")
    frozen = freeze_batch_norm_2d(make("efficientnet_b0"))
    with torch.no_grad():
        plain, ours = (normswap.convert(m, "gn").model(X) for m in (model, frozen))
        assert distance(plain, ours) < 1e-5


def test_a_model_of_timm_by_its_name(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    normswap.convert_file("timm:resnet18", "gn-ws")
    loaded = normswap.load("resnet18.gn-ws.pt")
    assert isinstance(loaded.bn1, nn.GroupNorm)
    torch.save(make("efficientnet_b0").state_dict(), "w.pt")
    normswap.convert_file("w.pt", "gn-ws", model="timm:efficientnet_b0", model_args={"num_classes": 7})
    wanted = normswap.convert(make("efficientnet_b0"), "gn-ws").model
    with torch.no_grad():
        assert torch.equal(normswap.load("w.gn-ws.pt")(X), wanted(X))
    with pytest.raises(normswap.OptionError, match="timm has no model 'resnet5'; did you mean"):
        normswap.convert_file("timm:resnet5", "gn")
    with pytest.raises(normswap.OptionError, match="has no weights 'best'; it has"):
        normswap.convert_file("timm:resnet18", "gn", weights="best")
