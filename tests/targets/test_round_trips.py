"""What a norm has beside its function survives each way through the targets and back."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers.nets import randomize, touched
from torch import nn

import normswap

FORMS = ("gn", "ln", "in", "pn", "est", "bcn", "bn", "frozen")
BY_STATISTICS = {"est", "bcn", "bn", "frozen"}
DATA = torch.randn(8, 3, 7, 7, generator=torch.Generator().manual_seed(0))


def test_the_forms_are_all() -> None:
    assert {*FORMS, "fold"} == {target.norm.name for target in normswap.TARGETS.values() if target.norm}


def by_itself(norm: nn.Module) -> None:
    """Gain frozen and bias not, in eval mode within a net in train mode."""
    norm.weight.requires_grad_(False)
    norm.eval()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "slow": lambda: nn.BatchNorm2d(8, eps=1e-3, momentum=0.01),
    "cumulative": lambda: nn.BatchNorm2d(8, momentum=None),
    "kept as they are": lambda: nn.BatchNorm2d(8, momentum=0.0),
    "fixed gain": lambda: touched(nn.BatchNorm2d(8), by_itself),
    "fixed": lambda: touched(nn.BatchNorm2d(8), lambda norm: norm.requires_grad_(False)),
    "without affine": lambda: nn.BatchNorm2d(8, affine=False),
    "untracked": lambda: touched(nn.BatchNorm2d(8), lambda norm: setattr(norm, "track_running_stats", False)),
    "in bfloat16": lambda: nn.BatchNorm2d(8, dtype=torch.bfloat16),
}
pytestmark = pytest.mark.filterwarnings("ignore:the calibration data are")  # noise


def make(name: str) -> nn.Sequential:
    norm = NORMS[name]()
    return randomize(nn.Sequential(nn.Conv2d(3, 8, 3, dtype=norm.running_mean.dtype), norm))


def through(model: nn.Module, form: str) -> nn.Module:
    """Converted, on data where it takes them; as it is where it has the form already."""
    options = {"calibrate": DATA.to(model[0].weight.dtype), "calibrate_seconds": 0} if form in BY_STATISTICS else {}
    try:
        return normswap.convert(model, form, **options).model
    except normswap.ModelError as error:
        assert " already" in str(error)
        return model


@pytest.mark.parametrize("name", NORMS)
def test_attributes_survive(name: str) -> None:
    model = make(name)
    norm = model[1]
    norm.num_batches_tracked.fill_(7)
    for way in itertools.product(FORMS, repeat=2):
        now = through(through(model, way[0]), way[1])[1]
        same = ("eps", "momentum", "training")
        assert {key: getattr(now, key) for key in same} == {key: getattr(norm, key) for key in same}, way
        assert {p.dtype for p in now.parameters()} | {norm.running_mean.dtype} == {norm.running_mean.dtype}, way
        for key, parameter in now.named_parameters():
            held = norm.get_parameter(key.removeprefix("group_")) if norm.affine else None
            assert parameter.requires_grad == (held is not None and held.requires_grad), (way, key)
        if {*way} <= BY_STATISTICS:
            assert now.num_batches_tracked == 7 and now.track_running_stats == norm.track_running_stats, way
        if {*way} <= BY_STATISTICS - {"bcn"}:
            assert now.affine == norm.affine and len([*now.parameters()]) == len([*norm.parameters()]), way


def test_estimates_follow_though_the_momentum_is_zero() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.0)))
    for form in ("est", "bcn"):
        converted, report = normswap.convert(model, form)
        assert "momentum is 0; estimates follow at 0.1" in report.changes[0].note
        batch = model[0](DATA)
        expected = model[1].running_mean.lerp(batch.mean((0, 2, 3)), 0.1)
        converted.train()(DATA)
        torch.testing.assert_close(converted[1].running_mean, expected.detach())


def test_norms_on_fixed_tensors_train_nothing_as_batch_channel_norm() -> None:
    """torchvision's FrozenBatchNorm2d holds gain and bias as buffers."""
    from torchvision.ops import FrozenBatchNorm2d

    converted = normswap.convert(randomize(FrozenBatchNorm2d(8)), "bcn").model
    assert [p.requires_grad for p in converted.parameters()] == [False] * 4
