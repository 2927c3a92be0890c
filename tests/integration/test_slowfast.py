"""SlowFast (Feichtenhofer et al. 2019) in its own idiom: batch norm by splits of the batch, two pathways."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import distance
from helpers.nets import randomize
from torch import Tensor, nn

import normswap


class SubBatchNorm3d(nn.Module):
    """Batch norm over each of `num_splits` parts of the batch in training, over their common statistics in use."""

    def __init__(self, num_splits: int, **args: object) -> None:
        super().__init__()
        self.num_splits, self.num_features = num_splits, args["num_features"]
        self.weight = nn.Parameter(torch.ones(self.num_features))
        self.bias = nn.Parameter(torch.zeros(self.num_features))
        self.bn = nn.BatchNorm3d(self.num_features, affine=False)
        self.split_bn = nn.BatchNorm3d(self.num_features * num_splits, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            n, c, t, h, w = x.shape
            x = x.view(n // self.num_splits, c * self.num_splits, t, h, w)
            x = self.split_bn(x)
            x = x.view(n, c, t, h, w)
        else:
            x = self.bn(x)
        x = x * self.weight.view((-1, 1, 1, 1))
        return x + self.bias.view((-1, 1, 1, 1))


class Stem(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, width, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.bn, self.relu = SubBatchNorm3d(num_splits=2, num_features=width), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class Pathways(nn.Module):
    """Takes a list of two clips, slow and fast, and fuses fast into slow."""

    def __init__(self) -> None:
        super().__init__()
        self.num_pathways = 2
        for pathway, width in enumerate((8, 4)):
            self.add_module(f"pathway{pathway}_stem", Stem(width))
        self.fuse, self.fuse_bn = nn.Conv3d(4, 8, (5, 1, 1), stride=(4, 1, 1), padding=(2, 0, 0)), nn.BatchNorm3d(8)
        self.head = nn.Linear(20, 5)

    def forward(self, x: list[Tensor]) -> Tensor:
        assert len(x) == self.num_pathways, f"Input tensor does not contain {self.num_pathways} pathway"
        slow, fast = (getattr(self, f"pathway{pathway}_stem")(x[pathway]) for pathway in range(self.num_pathways))
        slow = torch.cat([slow, self.fuse_bn(self.fuse(fast)).relu()], 1)
        return self.head(torch.cat([slow.mean((2, 3, 4)), fast.mean((2, 3, 4))], 1))


def clips() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 3, frames, 6, 6) for frames in (2, 8)]


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("target", ["gn", "gn-ws", "ln", "pn", "bcn"])
def test_split_norms_are_named(target: str, inputs: bool) -> None:
    model = randomize(Pathways()).eval()
    report = normswap.convert(model, target, **({"example_inputs": (clips(),)} if inputs else {})).report
    named = {left.path: left.reason for left in report.left if left.kind == "norm"}
    assert set(named) == {f"pathway{pathway}_stem.bn.split_bn" for pathway in (0, 1)}
    assert all("several samples" in reason for reason in named.values())


@pytest.mark.parametrize("target", ["frozen", "est", "ws", "wn", "fold-ws"])
def test_exact_targets(target: str) -> None:
    model = randomize(Pathways()).double().eval()
    x = [clip.double() for clip in clips()]
    converted, report = normswap.convert(model, target)
    assert report.exact and distance(model(x), converted(x)) < 1e-10
