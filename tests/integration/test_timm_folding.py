"""Models of timm whose norms or weights lie otherwise than in a chain: parallel branches, concatenations, StdConv2d."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import check_named, distance
from helpers.nets import randomize
from torch import Tensor, nn

import normswap

timm = pytest.importorskip("timm")


def picture(side: int = 64) -> Tensor:
    return torch.randn(1, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(timm.create_model(name, num_classes=5)).double().eval()


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s1", "mixnet_s"])
def test_every_norm_folds(name: str) -> None:
    model = model_of(name)
    folded, report = normswap.convert(model, "fold")
    assert not [left for left in report.left if left.kind == "norm"]
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    assert distance(model(picture()), folded(picture())) < 1e-10


@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4", "mobileone_s0", "mobileone_s2", "mobileone_s4"])
def test_parallel_branches_become_one_convolution(name: str) -> None:
    """As many convolutions as timm's own `reparameterize` leaves, and the same function in plain torch layers."""
    model = model_of(name)
    folded, report = normswap.convert(model, "fold")
    check_named(model, report)
    assert distance(before := model(picture()), folded(picture())) < 1e-10
    changed = [folded.get_submodule(change.paths[0]) for change in report.changes]
    assert all(type(layer).__module__.startswith("torch.nn.") for layer in changed)
    plain = timm.utils.reparameterize_model(model)
    assert distance(before, plain(picture())) < 1e-10
    assert convolutions(folded) == convolutions(plain) < convolutions(model)


@pytest.mark.parametrize("name", ["resnetv2_50x1_bit", "nf_resnet26", "dm_nfnet_f0"])
def test_weights_that_are_standardized_are_baked(name: str) -> None:
    model = model_of(name)
    plain, report = normswap.fold(model)
    assert report.totals.weights_changed == sum("StdConv" in type(m).__name__ for m in model.modules()) > 0
    assert not any("StdConv" in type(m).__name__ for m in plain.modules())
    assert distance(model(picture()), plain(picture())) < 1e-10
