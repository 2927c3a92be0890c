"""The exactness table: every target × every kind of layer, in float64 and eval mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from test_quirks import distance
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d
from zoo import randomize

import normswap
from normswap.layers.norms import BatchChannelNorm, EstimatedBatchNorm, FrozenBatchNorm

WIDTH = 8
TIGHT = 1e-12  # relative L2; float64 rounds at 1e-16
EXACT, NEAR, LEFT = "exact", "approximate", "left"
NORM_TARGETS = ("gn", "ln", "in", "est", "bcn", "bn", "frozen", "fold")
BECOMES: dict[str, tuple[str, ...]] = {
    #             gn     ln    in    est    bcn   bn     frozen fold
    "batch":     (NEAR,  NEAR, NEAR, EXACT, NEAR, LEFT,  EXACT, EXACT),
    "frozen":    (NEAR,  NEAR, NEAR, EXACT, NEAR, EXACT, LEFT,  EXACT),
    "estimated": (NEAR,  NEAR, NEAR, LEFT,  NEAR, EXACT, EXACT, EXACT),
    "tracked":   (NEAR,  NEAR, NEAR, EXACT, NEAR, EXACT, EXACT, EXACT),
    "channel":   (NEAR,  NEAR, NEAR, NEAR,  LEFT, NEAR,  NEAR,  NEAR),
    "group":     (LEFT,  NEAR, NEAR, NEAR,  NEAR, NEAR,  NEAR,  NEAR),
    "one group": (NEAR,  LEFT, NEAR, NEAR,  NEAR, NEAR,  NEAR,  NEAR),
    "instance":  (NEAR,  NEAR, LEFT, NEAR,  NEAR, NEAR,  NEAR,  NEAR),
    "position":  (NEAR,  NEAR, NEAR, NEAR,  NEAR, NEAR,  NEAR,  NEAR),
    "last":      (EXACT, LEFT, EXACT, NEAR, NEAR, NEAR,  NEAR,  NEAR),
}  # fmt: skip
"""What becomes of each kind of norm. One element a channel leaves `gn` and `in` one group for it, as layer norm has."""


class Recurrent(nn.Module):
    """(N, C, L) through a recurrent layer or a cell's loop."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        if isinstance(self.layer, nn.RNNBase):
            return self.layer(x)[0].transpose(1, 2)
        state, states = None, []
        for step in x.unbind(1):
            state = self.layer(step, state)
            states.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(states, 2)


@dataclass(frozen=True)
class Kind:
    """A weight layer, the norm behind it, and the shape of the input."""

    family: str
    norm: Callable[[], nn.Module]
    weight: Callable[[], nn.Module]
    shape: tuple[int, ...]
    foldable: bool = True

    def make(self) -> nn.Module:
        """With random gains and biases; running statistics are those of the data, as after training."""
        torch.manual_seed(0)
        model = randomize(nn.Sequential(self.weight(), self.norm(), nn.Tanh())).double().eval()
        with torch.no_grad():
            values = model[0](torch.cat(self.data()))
            for name, generator in (("weight", torch.rand), ("bias", torch.randn)):
                if getattr(model[1], name) is not None:
                    getattr(model[1], name).copy_(generator(WIDTH) / 2 + 0.5)
            if isinstance(getattr(model[1], "running_mean", None), Tensor):
                dims = [0, *range(2, values.dim())]
                model[1].running_mean.copy_(values.mean(dims))
                model[1].running_var.copy_(values.var(dims))
        return model

    def data(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(16, *self.shape, generator=generator, dtype=torch.float64) + 0.3 for _ in range(2)]


def timms(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers = pytest.importorskip("timm.layers")
        return getattr(layers, name)(WIDTH, act_layer=nn.SiLU, **({"num_groups": 2} if name == "GroupNormAct" else {}))

    return make


def conv() -> nn.Module:
    return nn.Conv2d(3, WIDTH, 3)


MAP, B2 = (3, 7, 7), lambda: nn.BatchNorm2d(WIDTH)
KINDS: dict[str, Kind] = {
    "Conv1d, BatchNorm1d": Kind("batch", lambda: nn.BatchNorm1d(WIDTH), lambda: nn.Conv1d(3, WIDTH, 3), (3, 9)),
    "Conv2d, BatchNorm2d": Kind("batch", B2, conv, MAP),
    "Conv3d, BatchNorm3d": Kind("batch", lambda: nn.BatchNorm3d(WIDTH), lambda: nn.Conv3d(3, WIDTH, 3), (3, 5, 5, 5)),
    "ConvTranspose1d": Kind("batch", lambda: nn.BatchNorm1d(WIDTH), lambda: nn.ConvTranspose1d(3, WIDTH, 3), (3, 9)),
    "ConvTranspose2d in groups": Kind("batch", B2, lambda: nn.ConvTranspose2d(4, WIDTH, 3, groups=2), (4, 7, 7)),
    "ConvTranspose3d": Kind("batch", lambda: nn.BatchNorm3d(WIDTH), lambda: nn.ConvTranspose3d(3, WIDTH, 2), (3, 4, 4, 4)),
    "depthwise": Kind("batch", B2, lambda: nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH, bias=False), (WIDTH, 7, 7)),
    "Linear, BatchNorm1d": Kind("batch", lambda: nn.BatchNorm1d(WIDTH), lambda: nn.Linear(5, WIDTH), (5,)),
    "SyncBatchNorm": Kind("batch", lambda: nn.SyncBatchNorm(WIDTH), conv, MAP),
    "BatchNorm without affine": Kind("batch", lambda: nn.BatchNorm2d(WIDTH, affine=False), conv, MAP),
    "BatchNormAct2d": Kind("batch", timms("BatchNormAct2d"), conv, MAP),
    "FrozenBatchNorm2d": Kind("frozen", lambda: FrozenBatchNorm2d(WIDTH), conv, MAP),
    "FrozenBatchNormAct2d": Kind("frozen", timms("FrozenBatchNormAct2d"), conv, MAP),
    "FrozenBatchNorm": Kind("frozen", lambda: FrozenBatchNorm(WIDTH, spatial_dims=2), conv, MAP),
    "EstimatedBatchNorm": Kind("estimated", lambda: EstimatedBatchNorm(WIDTH), conv, MAP),
    "BatchChannelNorm": Kind("channel", lambda: BatchChannelNorm(2, WIDTH), conv, MAP),
    "GroupNorm": Kind("group", lambda: nn.GroupNorm(2, WIDTH), conv, MAP),
    "GroupNorm on (N, C)": Kind("group", lambda: nn.GroupNorm(2, WIDTH), lambda: nn.Linear(5, WIDTH), (5,)),
    "GroupNormAct": Kind("group", timms("GroupNormAct"), conv, MAP),
    "GroupNorm, one group": Kind("one group", lambda: nn.GroupNorm(1, WIDTH), conv, MAP),
    "InstanceNorm1d": Kind("instance", lambda: nn.InstanceNorm1d(WIDTH, affine=True), lambda: nn.Conv1d(3, WIDTH, 3), (3, 9)),
    "InstanceNorm2d": Kind("instance", lambda: nn.InstanceNorm2d(WIDTH), conv, MAP),
    "InstanceNorm3d": Kind("instance", lambda: nn.InstanceNorm3d(WIDTH), lambda: nn.Conv3d(3, WIDTH, 3), (3, 5, 5, 5)),
    "InstanceNorm, tracked": Kind("tracked", lambda: nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True), conv, MAP),
    "InstanceNorm, tracked, no affine": Kind("tracked", lambda: nn.InstanceNorm2d(WIDTH, track_running_stats=True), conv, MAP),
    "LayerNorm2d": Kind("position", lambda: LayerNorm2d(WIDTH), conv, MAP),
    "LayerNormAct2d": Kind("position", timms("LayerNormAct2d"), conv, MAP),
    "Linear, LayerNorm": Kind("last", lambda: nn.LayerNorm(WIDTH), lambda: nn.Linear(5, WIDTH), (5,)),
    "RNN": Kind("batch", lambda: nn.BatchNorm1d(WIDTH), lambda: Recurrent(nn.RNN(3, WIDTH, batch_first=True)), (3, 6), False),
    "LSTM": Kind("batch", lambda: nn.BatchNorm1d(WIDTH), lambda: Recurrent(nn.LSTM(3, WIDTH // 2, 2, batch_first=True, bidirectional=True)), (3, 6), False),
    "GRU": Kind("batch", lambda: nn.BatchNorm1d(WIDTH), lambda: Recurrent(nn.GRU(3, WIDTH, 2, batch_first=True)), (3, 6), False),
    "RNNCell": Kind("batch", lambda: nn.BatchNorm1d(WIDTH), lambda: Recurrent(nn.RNNCell(3, WIDTH)), (3, 6), False),
    "LSTMCell": Kind("batch", lambda: nn.BatchNorm1d(WIDTH), lambda: Recurrent(nn.LSTMCell(3, WIDTH)), (3, 6), False),
    "GRUCell": Kind("batch", lambda: nn.BatchNorm1d(WIDTH), lambda: Recurrent(nn.GRUCell(3, WIDTH)), (3, 6), False),
}  # fmt: skip


def wanted(kind: Kind, target: str) -> tuple[str, str]:
    """What becomes of the norm, and of the weight, by the table."""
    norm, _, weight = target.partition("-")
    if norm in ("ws", "wn"):
        norm, weight = "", norm
    of_norm = BECOMES[kind.family][NORM_TARGETS.index(norm)] if norm else LEFT
    if norm == "fold" and not kind.foldable:
        of_norm = LEFT
    return of_norm, EXACT if weight else LEFT


@pytest.mark.parametrize("target", normswap.TARGETS)
@pytest.mark.parametrize("name", KINDS)
def test_table(name: str, target: str) -> None:
    kind = KINDS[name]
    model, data = kind.make(), kind.data()
    of_norm, of_weight = wanted(kind, target)
    options = {"layers": ("conv", "linear", "rnn"), "ws_scope": "all", "calibrate": data, "calibrate_seconds": 0}
    if of_norm == of_weight == LEFT:
        with pytest.raises(normswap.ModelError, match="nothing to convert"):
            normswap.convert(model, target, **options)
        return
    converted, report = normswap.convert(model, target, **options)
    norms = [change.exact for change in report.changes if change.kind == "norm"]
    assert [EXACT if exact else NEAR for exact in norms] == [of_norm] * (of_norm != LEFT)
    if of_weight == EXACT:
        assert [change for change in report.changes if change.kind == "weight" and change.after != change.before]
    with torch.no_grad():
        before, after = model(data[0]), converted(data[0])
    assert after.dtype == torch.float64 and not converted.training
    moved = distance(before, after)
    assert moved < (TIGHT if report.exact else 1.0)
    assert report.exact == (NEAR not in (of_norm, of_weight))
    if of_norm != NEAR:
        return
    reset = normswap.convert(model, target, **options, transfer="reset").model
    with torch.no_grad():
        assert moved <= distance(before, reset(data[0])) + TIGHT, "what is reset keeps more"


def test_the_table_is_whole() -> None:
    assert set(NORM_TARGETS) == {target.norm.name for target in normswap.TARGETS.values() if target.norm}
    assert {kind.family for kind in KINDS.values()} == set(BECOMES)
