"""EfficientNet-PyTorch, whose convolutions all pad by themselves, by itself and as an encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.checks import check_named, distance
from helpers.nets import randomize
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap

efficientnet_pytorch = pytest.importorskip("efficientnet_pytorch")
from efficientnet_pytorch.utils import Conv2dDynamicSamePadding, Conv2dStaticSamePadding  # noqa: E402

X = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
PADDED = (Conv2dDynamicSamePadding, Conv2dStaticSamePadding)


def by_itself(**options: object) -> nn.Module:
    """81 convolutions and 49 norms."""
    model: nn.Module = efficientnet_pytorch.EfficientNet.from_name("efficientnet-b0", **options)
    return randomize(model).double().eval()


NETS: dict[str, Callable[[], nn.Module]] = {
    "padded for one size": by_itself,
    "padded for each input": lambda: by_itself(image_size=None),
}


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
@pytest.mark.parametrize(
    ("target", "norms", "weights"),
    [("ws", 0, 49), ("wn", 0, 81), ("fold", 49, 49), ("frozen-ws", 49, 49), ("est-wn", 49, 81)],
)
def test_each_layer_takes_part(make: Callable[[], nn.Module], target: str, norms: int, weights: int) -> None:
    model = make()
    wanted = model(X)
    converted, report = normswap.convert(model, target)
    check_named(converted, report)
    assert (report.totals.norms_changed, report.totals.weights_changed) == (norms, weights)
    assert distance(wanted, converted(X)) < 1e-12
    plain = normswap.fold(converted).model
    assert distance(wanted, plain(X)) < 1e-12
    assert norms == 0 or not any(isinstance(m, _BatchNorm) for m in plain.modules())
    for path, layer in model.named_modules():
        if isinstance(layer, PADDED):
            assert isinstance(converted.get_submodule(path), type(layer))
            assert type(plain.get_submodule(path)) is type(layer)


def test_training_and_files(tmp_path: Path) -> None:
    converted, report = normswap.convert(by_itself().float(), "gn-ws")
    x = X.float()
    optimizer = torch.optim.SGD(normswap.param_groups(converted, weight_decay=0.01), lr=0.01)
    converted.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in converted.parameters())
    optimizer.step()
    wanted = converted.eval()(x)
    torch.save(converted, tmp_path / "whole.pt")
    for name in ("tensors.pt", "tensors.safetensors"):
        normswap.save(converted, tmp_path / name, report=report)
    with pytest.raises(normswap.UnsafeFileError, match="efficientnet_pytorch"):
        normswap.load(tmp_path / "whole.pt")
    for loaded in (
        normswap.load(tmp_path / "whole.pt", trust=True),
        normswap.load(tmp_path / "tensors.pt", model=lambda: by_itself().float()),
        normswap.load(tmp_path / "tensors.safetensors", model=lambda: by_itself().float()),
    ):
        assert distance(wanted, loaded.eval()(x)) < 1e-5
        assert [type(m) for m in loaded.modules()] == [type(m) for m in converted.modules()]


@pytest.mark.parametrize("encoder", ["efficientnet-b0", "timm-efficientnet-b0", "tu-tf_efficientnet_b0"])
def test_as_an_encoder(encoder: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = randomize(smp.Unet(encoder, encoder_weights=None, decoder_channels=(32, 16, 16, 16, 16))).double().eval()
    wanted = model(X)
    for target in ("fold", "frozen-ws"):
        converted, report = normswap.convert(model, target)
        padded = [left for left in report.left if "Padding" in left.module or "Same" in left.module]
        assert not [left for left in padded if "forward of its own" in left.reason]
        assert distance(wanted, converted(X)) < 1e-12
        assert distance(wanted, normswap.fold(converted).model(X)) < 1e-12
        unreached = [path for path, m in converted.named_modules() if isinstance(m, _BatchNorm)]
        assert all(path.startswith("encoder.") for path in unreached) and len(unreached) <= 2
