"""The phases of a conversion: told in their order, and no more than there are."""

import pytest
import torch
from helpers.nets import chain

from normswap.conversion.pipeline import run
from normswap.conversion.request import Request, phases
from normswap.targets.options import Options
from normswap.targets.target import TARGETS

X = torch.randn(12, 3, 8, 8)


@pytest.mark.parametrize("on_data", [False, True])
def test_phases_are_told_in_their_order(on_data: bool) -> None:
    told: list[str] = []
    options = Options(calibrate=[X], calibrate_seconds=1) if on_data else Options()
    run(chain(8, 8).eval(), Request(TARGETS["gn"], options, example_inputs=X, progress=told.append))
    assert [phase for phase in told if "%" not in phase] == [phase.value for phase in phases(on_data)]
