"""YOLO models of ultralytics, whose forward cannot be traced as a whole: their blocks fold each by itself."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import distance
from helpers.nets import randomize
from torch import nn

import normswap

ultralytics = pytest.importorskip("ultralytics")

X = torch.rand(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def yolo(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = ultralytics.YOLO(name).model
    return randomize(model).double().eval()


@pytest.mark.parametrize("name", ["yolov5n.yaml", "yolov8n.yaml", "yolov8n-seg.yaml", "yolo11n.yaml"])
def test_every_norm_folds(name: str) -> None:
    model = yolo(name)
    before = model(X)[0]
    folded, report = normswap.convert(model, "fold")
    after = folded(X)[0]
    if isinstance(before, tuple):
        before, after = before[0], after[0]
    assert not [left for left in report.left if left.kind == "norm"]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert distance(before, after) < 1e-10


def test_convolutions_before_norms_are_standardized() -> None:
    model = yolo("yolov8n.yaml")
    converted, report = normswap.convert(model, "frozen-ws")
    assert report.totals.weights_changed == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert distance(model(X)[0], converted(X)[0]) < 1e-9
