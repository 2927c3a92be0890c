"""Data that are not a network's own are noticed: nothing is chosen or fitted on them, and one warning says so."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from helpers.terminal import printed
from torch import Tensor, nn

import normswap
from normswap.analysis.sites import find_sites
from normswap.calibration.likeness import FURTHEST, Unlikeness, mean_divergence, unlikeness
from normswap.calibration.measuring import measure_norms
from normswap.layers.matching import Moments, Statistics


def pictures(count: int, seed: int) -> Tensor:
    """Smooth ones, each of a contrast and a colour of its own."""
    drawn = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 3, 3, generator=drawn) * torch.rand(count, 1, 1, 1, generator=drawn).add(0.3)
    return nn.functional.interpolate(coarse, size=12, mode="bilinear")


def net(seed: int = 0) -> nn.Module:
    """One whose running statistics are those of its pictures."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs in (3, 16, 16):
        layers += [nn.Conv2d(inputs, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16, momentum=None), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    with torch.no_grad():
        for batch in pictures(512, 1).split(64):
            model(batch)
    return model.eval()


OTHERS = {
    "noise": torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0)),
    "bytes": pictures(64, 2) * 60 + 128,
    "not centred": pictures(64, 2) + 2,
    "faint": pictures(64, 2) / 5,
    "black": torch.zeros(64, 3, 12, 12),
}


def found_on(model: nn.Module, data: Tensor) -> Unlikeness:
    found = unlikeness(find_sites(model), measure_norms(model, [data], find_sites(model)), len(data))
    assert found is not None
    return found


@pytest.mark.parametrize("count", [16, 64, 256])
@pytest.mark.parametrize("seed", range(5))
def test_its_own_pictures_pass(count: int, seed: int) -> None:
    assert not found_on(net(), pictures(count, 10 + seed)).is_refused


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("seconds", [0, 60])
def test_others_are_refused_with_one_warning(data: Tensor, seconds: float) -> None:
    model = net()
    wanted, plain = normswap.convert(model, "gn")
    with pytest.warns(UserWarning) as caught:
        given, report = normswap.convert(model, "gn", calibrate=list(data.split(16)), calibrate_seconds=seconds)
    assert len(caught) == 1 and "standard deviations from what the norms have learnt" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert report.warnings == (str(caught[0].message),)
    assert report.calibration.kept == "matched" and report.calibration.unlikeness > FURTHEST
    assert [c.groups for c in report.changes] == [c.groups for c in plain.changes]
    assert all(torch.equal(value, given.state_dict()[name]) for name, value in wanted.state_dict().items())


def test_the_report_tells_how_unlike_they_are() -> None:
    _, report = normswap.convert(net(), "gn", calibrate=list(pictures(64, 3).split(16)), calibrate_seconds=2)
    found = report.to_dict()["calibration"]["unlikeness"]
    assert 0 <= found < FURTHEST and not report.warnings
    assert "standard deviations from what the norms have learnt" in printed(report, 300)


@pytest.mark.parametrize("to", ["frozen", "est", "fold"])
def test_what_takes_nothing_from_data_warns_of_nothing(to: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = normswap.convert(net(), to, calibrate=list(OTHERS["noise"].split(16)))
    assert not report.warnings and report.calibration is None


def test_statistics_that_were_never_trained_tell_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    sites = find_sites(model)
    assert unlikeness(sites, measure_norms(model, [OTHERS["bytes"]], sites), 64) is None


def test_the_worst_norm_is_named() -> None:
    model: Any = net()
    model[7].running_mean += 3
    found = found_on(model, pictures(64, 3))
    assert found.worst_path == "7" and found.worst > 2 > found.median and "7: " in str(found)


def test_a_shift_by_one_standard_deviation_counts_as_one() -> None:
    zero, one = torch.zeros(4).double(), torch.ones(4).double()
    stats = Statistics(one, zero, zero, one * 3, 1.0)
    assert mean_divergence(Moments(zero, one * 3, zero, one), stats) == 0
    assert math.sqrt(2 * mean_divergence(Moments(one * 2, one * 3, zero, one), stats)) == pytest.approx(1)
