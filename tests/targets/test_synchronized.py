"""SyncBatchNorm, which trains on GPUs alone, becomes torch's batch norm by `bn`: exact, and without data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.nets import Forward, randomize
from torch import Tensor, nn
from torch.nn import functional as F

import normswap


def sync(channels: int = 8, **options: object) -> nn.Module:
    return nn.SyncBatchNorm(channels, **options)


def pooled(self: nn.Module, x: Tensor) -> Tensor:
    return F.max_pool2d(self.norm(F.relu(x)), 2)


def residual(self: nn.Module, x: Tensor) -> Tensor:
    x = self.conv(x)
    return self.norm(torch.cat([x, x + x.relu()], 1))


NETS: dict[str, tuple[type[nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "behind Conv1d": (nn.BatchNorm1d, lambda: nn.Sequential(nn.Conv1d(3, 8, 3), sync()), (3, 9)),
    "behind Conv3d": (nn.BatchNorm3d, lambda: nn.Sequential(nn.ConvTranspose3d(3, 8, 2), sync()), (3, 4, 4, 4)),
    "before Conv2d": (nn.BatchNorm2d, lambda: nn.Sequential(sync(3), nn.ReLU(), nn.Conv2d(3, 8, 3)), (3, 7, 7)),
    "behind another norm": (nn.BatchNorm2d, lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), sync(3)), (3, 7, 7)),
    "on (N, C)": (nn.BatchNorm1d, lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), sync()), (3, 2, 2)),
    "before a pooling": (nn.BatchNorm2d, lambda: Forward(pooled, norm=sync(3)), (3, 8, 8)),
    "behind additions": (nn.BatchNorm2d, lambda: Forward(residual, conv=nn.Conv2d(3, 4, 3), norm=sync()), (3, 8, 8)),
}


@pytest.mark.parametrize("name", NETS)
def test_the_layers_around_it_tell_its_class(name: str) -> None:
    cls, make, shape = NETS[name]
    torch.manual_seed(0)
    model = randomize(make()).eval()
    converted, report = normswap.convert(model, "bn")
    assert cls in map(type, converted.modules()) and nn.SyncBatchNorm not in map(type, converted.modules())
    assert report.exact
    x = torch.randn(4, *shape)
    assert torch.equal(converted(x), model(x))
    converted.train()(x)  # which SyncBatchNorm refuses on a CPU
    model.load_state_dict(converted.state_dict())


def test_attributes_stay() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), sync(eps=1e-3, momentum=None), sync(affine=False)))
    model[1].weight.requires_grad_(False)
    model.append(sync(track_running_stats=False))
    first, bare, untracked = normswap.convert(model, "bn").model[1:]
    assert (first.eps, first.momentum) == (1e-3, None)
    assert (first.weight.requires_grad, first.bias.requires_grad) == (False, True)
    assert bare.weight is None and not bare.affine
    assert untracked.running_mean is None and not untracked.track_running_stats
    assert not hasattr(first, "process_group")


def test_what_nothing_tells_stays_until_inputs_do() -> None:
    model = randomize(nn.Sequential(nn.Linear(5, 6), sync(7), nn.Conv2d(7, 3, 1))).eval()
    lines = randomize(Forward(lambda self, x: self.norm(x.transpose(1, 2)), norm=sync(7))).eval()
    assert isinstance(normswap.convert(model, "bn").model[1], nn.BatchNorm2d)
    with pytest.raises(normswap.ModelError, match="give --input-shape"):
        normswap.convert(lines, "bn")
    x = torch.randn(2, 4, 7)
    converted = normswap.convert(lines, "bn", example_inputs=x).model
    assert type(converted.norm) is nn.BatchNorm1d and torch.equal(converted(x), lines(x))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_timms_with_its_activation(dims: int) -> None:
    acts = pytest.importorskip("timm.layers.norm_act")
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = acts.SyncBatchNormAct(8)
    norm.act, norm.drop = nn.SiLU(), nn.Identity()
    model = randomize(nn.Sequential(conv(3, 8, 3), norm)).eval()
    converted, report = normswap.convert(model, "bn")
    x = torch.randn(2, 3, *[5] * dims)
    assert report.exact and not isinstance(converted[1], nn.SyncBatchNorm)
    assert torch.equal(converted(x), model(x))
    assert torch.allclose(normswap.fold(converted).model(x), model(x), atol=1e-4)


def test_fixed_statistics_of_one_become_plain_too() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), sync())).eval()
    frozen = normswap.convert(model, "frozen").model
    assert type(normswap.convert(frozen, "bn").model[1]) is nn.BatchNorm2d
