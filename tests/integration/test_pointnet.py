"""PointNet (Qi et al. 2017) in the idiom of its usual implementation: shapes asked for twice, transforms of clouds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.checks import distance
from helpers.nets import randomize
from torch import Tensor, nn
from torch.nn import functional as F

import normswap


class Transform(nn.Module):
    """The matrix that turns a cloud, k by k."""

    def __init__(self, k: int, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(width, 8, 1), nn.Conv1d(8, 16, 1)
        self.fc1, self.fc2 = nn.Linear(16, 12), nn.Linear(12, k * k)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm1d(8), nn.BatchNorm1d(16), nn.BatchNorm1d(12)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        batchsize = x.size()[0]
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 16)
        x = self.fc2(F.relu(self.bn3(self.fc1(x))))
        iden = torch.from_numpy(np.eye(self.k).flatten()).view(1, self.k * self.k).repeat(batchsize, 1)
        if x.is_cuda:
            iden = iden.cuda()
        return (x + iden).view(-1, self.k, self.k)


class PointNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stn, self.fstn = Transform(3, width), Transform(8, 8)
        self.conv1, self.conv2 = nn.Conv1d(width, 8, 1), nn.Conv1d(8, 16, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(8), nn.BatchNorm1d(16)
        self.fc1, self.bn3, self.fc2 = nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, 5)
        self.dropout = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, D, _ = x.size()
        trans = self.stn(x)
        x = x.transpose(2, 1)
        if D > 3:
            feature = x[:, :, 3:]
            x = x[:, :, :3]
        x = torch.bmm(x, trans)
        if D > 3:
            x = torch.cat([x, feature], dim=2)
        x = x.transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        trans_feat = self.fstn(x)
        x = torch.bmm(x.transpose(2, 1), trans_feat).transpose(2, 1)
        x = self.bn2(self.conv2(x))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 16)
        return F.log_softmax(self.fc2(F.relu(self.bn3(self.dropout(self.fc1(x))))), dim=1), trans_feat


@pytest.mark.parametrize("width", [3, 6])
def test_every_norm_folds(width: int) -> None:
    torch.manual_seed(0)
    model = randomize(PointNet(width)).double().eval()
    x = torch.randn(2, width, 7, dtype=torch.float64)
    folded, report = normswap.convert(model, "fold")
    assert not [(left.path, left.reason) for left in report.left if left.kind == "norm"]
    assert distance(model(x)[0], folded(x)[0]) < 1e-10
