"""Layers of one kind stand for each other: each tried by itself gives the same outcomes."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from helpers.checks import quiet
from helpers.quirks import QUIRKS
from torch import Tensor, nn

import normswap
from normswap.analysis.sites import Site
from normswap.inspection import examine, outcomes
from normswap.inspection.kinds import Kinds
from normswap.targets.context import Context

ALIKE = ("plain", "pre-activation", "concatenation", "convolution with two norms", "zero and constant filters",
         "spectral_norm", "tied convolutions", "forward hook", "transposed", "1d on (N, C)")  # fmt: skip


class BesideEachOther(nn.Module):
    """A block with a convolution, a smaller one and a norm beside one another, as in RepVGG."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.small = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.large(x) + self.small(x) + self.norm(x)).relu()


def one_constant() -> nn.Module:
    """Convolutions that differ in their numbers alone, by which one cannot be standardized."""
    layers = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(3)]
    nn.init.zeros_(layers[1][0].weight)
    return nn.Sequential(*layers)


def outcomes_of(model: nn.Module) -> list[Any]:
    with quiet():
        found = normswap.inspect(model).outcomes
    return [replace(outcome, reasons=tuple(sorted(outcome.reasons))) for outcome in found]


def _alone(sites: Iterable[Site], context: Context) -> Kinds:
    return {site: [site] for site in sites}


OWN = {"beside each other": BesideEachOther, "one constant": one_constant}


@pytest.mark.parametrize("name", [*ALIKE, *OWN])
def test_one_of_a_kind_stands_for_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = QUIRKS[name].make if name in QUIRKS else OWN[name]
    model = nn.Sequential(*(make() for _ in range(3)))
    by_kind = outcomes_of(model)
    monkeypatch.setattr(examine, "kinds_of", _alone)
    monkeypatch.setattr(outcomes, "kinds_to_fold", lambda norms, weights, context: _alone([*norms, *weights], context))
    assert by_kind == outcomes_of(model)
