"""Every kind of layer: a weight, a norm behind it, and data for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.nets import randomize
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

from normswap.layers.norms import BatchChannelNorm, EstimatedBatchNorm, FrozenBatchNorm, PositionNorm

WIDTH = 8


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
    """A weight layer, the norm after it, and the shape of the input."""

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
    "ConvTranspose3d": Kind(
        "batch", lambda: nn.BatchNorm3d(WIDTH), lambda: nn.ConvTranspose3d(3, WIDTH, 2), (3, 4, 4, 4)
    ),
    "depthwise": Kind("batch", B2, lambda: nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH, bias=False), (WIDTH, 7, 7)),
    "Linear, BatchNorm1d": Kind("batch", lambda: nn.BatchNorm1d(WIDTH), lambda: nn.Linear(5, WIDTH), (5,)),
    "SyncBatchNorm": Kind("in step", lambda: nn.SyncBatchNorm(WIDTH), conv, MAP),
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
    "InstanceNorm1d": Kind(
        "instance", lambda: nn.InstanceNorm1d(WIDTH, affine=True), lambda: nn.Conv1d(3, WIDTH, 3), (3, 9)
    ),
    "InstanceNorm2d": Kind("instance", lambda: nn.InstanceNorm2d(WIDTH), conv, MAP),
    "InstanceNorm3d": Kind("instance", lambda: nn.InstanceNorm3d(WIDTH), lambda: nn.Conv3d(3, WIDTH, 3), (3, 5, 5, 5)),
    "InstanceNorm, tracked": Kind(
        "tracked", lambda: nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True), conv, MAP
    ),
    "InstanceNorm, tracked, no affine": Kind(
        "tracked", lambda: nn.InstanceNorm2d(WIDTH, track_running_stats=True), conv, MAP
    ),
    "PositionNorm": Kind("position", lambda: PositionNorm(WIDTH), lambda: nn.Conv1d(3, WIDTH, 3), (3, 9)),
    "LayerNorm2d": Kind("position", lambda: LayerNorm2d(WIDTH), conv, MAP),
    "LayerNormAct2d": Kind("position", timms("LayerNormAct2d"), conv, MAP),
    "Linear, LayerNorm": Kind("last", lambda: nn.LayerNorm(WIDTH), lambda: nn.Linear(5, WIDTH), (5,)),
    "RNN": Kind(
        "batch", lambda: nn.BatchNorm1d(WIDTH), lambda: Recurrent(nn.RNN(3, WIDTH, batch_first=True)), (3, 6), False
    ),
    "LSTM": Kind(
        "batch",
        lambda: nn.BatchNorm1d(WIDTH),
        lambda: Recurrent(nn.LSTM(3, WIDTH // 2, 2, batch_first=True, bidirectional=True)),
        (3, 6),
        False,
    ),
    "GRU": Kind(
        "batch", lambda: nn.BatchNorm1d(WIDTH), lambda: Recurrent(nn.GRU(3, WIDTH, 2, batch_first=True)), (3, 6), False
    ),
    "RNNCell": Kind("batch", lambda: nn.BatchNorm1d(WIDTH), lambda: Recurrent(nn.RNNCell(3, WIDTH)), (3, 6), False),
    "LSTMCell": Kind("batch", lambda: nn.BatchNorm1d(WIDTH), lambda: Recurrent(nn.LSTMCell(3, WIDTH)), (3, 6), False),
    "GRUCell": Kind("batch", lambda: nn.BatchNorm1d(WIDTH), lambda: Recurrent(nn.GRUCell(3, WIDTH)), (3, 6), False),
}


def all_weights(target: str) -> dict[str, Any]:
    """The options with which `target` changes the weights of every layer."""
    return {"layers": ("conv", "linear", "rnn")} | ({"ws_scope": "all"} if target.endswith("ws") else {})
