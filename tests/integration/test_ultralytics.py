"""YOLO models of ultralytics, whose forward cannot be traced as a whole: their blocks fold each by itself."""

from __future__ import annotations

import ast
import copy
import datetime
from pathlib import Path
from typing import Any

import numpy
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


def checkpoint(model: nn.Module, stripped: bool) -> dict[str, Any]:
    """As its trainer writes it: the average in half precision; at the end of a training without model and optimizer."""
    settings = ultralytics.utils.DEFAULT_CFG  # a namespace of its own class
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9).state_dict()
    return {
        "epoch": -1, "best_fitness": numpy.float64(0.4), "model": None, "ema": copy.deepcopy(model).half(),
        "updates": 7, "optimizer": None if stripped else optimizer, "train_args": settings,
        "date": datetime.datetime(2026, 1, 2), "version": ultralytics.__version__,
    }  # fmt: skip


@pytest.mark.parametrize("stripped", [True, False])
def test_a_checkpoint_converts_with_what_its_refusal_says(tmp_path: Path, stripped: bool) -> None:
    model = yolo("yolov8n.yaml").float()
    torch.save(checkpoint(model, stripped), tmp_path / "best.pt")
    with pytest.raises(normswap.UnsafeFileError) as caught:
        normswap.convert_file(tmp_path / "best.pt", "gn")
    named = ast.literal_eval(str(caught.value).partition("allow=")[2].partition(");")[0])
    assert "ultralytics.nn.tasks.DetectionModel" in named and "ultralytics.utils.IterableSimpleNamespace" in named
    wanted = normswap.convert(copy.deepcopy(model).half(), "gn").model.state_dict()
    for allow in (named, ["ultralytics.*"]):
        report = normswap.convert_file(tmp_path / "best.pt", "gn", overwrite=True, allow=allow)
        got = normswap.load(tmp_path / "best.gn.pt", allow=allow).state_dict()
        assert got.keys() == wanted.keys() and all(torch.equal(got[name], value) for name, value in wanted.items())
        assert not any("optimizer" in warning for warning in report.warnings)
