"""The exactness table: every form of norms and of weights × every kind of layer, in float64 and eval mode."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import distance
from helpers.layer_kinds import KINDS, Kind, all_weights
from helpers.quirks import SINGLE_FORMS

import normswap

TIGHT = 1e-12  # relative L2; float64 rounds at 1e-16
EXACT, NEAR, LEFT = "exact", "approximate", "left"
NORM_TARGETS = ("gn", "ln", "in", "pn", "est", "bcn", "bn", "frozen", "fold")
BECOMES: dict[str, tuple[str, ...]] = {
    #             gn     ln    in     pn    est    bcn   bn     frozen fold
    "batch":     (NEAR,  NEAR, NEAR,  NEAR, EXACT, NEAR, LEFT,  EXACT, EXACT),
    "in step":   (NEAR,  NEAR, NEAR,  NEAR, EXACT, NEAR, EXACT, EXACT, EXACT),
    "frozen":    (NEAR,  NEAR, NEAR,  NEAR, EXACT, NEAR, EXACT, LEFT,  EXACT),
    "estimated": (NEAR,  NEAR, NEAR,  NEAR, LEFT,  NEAR, EXACT, EXACT, EXACT),
    "tracked":   (NEAR,  NEAR, NEAR,  NEAR, EXACT, NEAR, EXACT, EXACT, EXACT),
    "channel":   (NEAR,  NEAR, NEAR,  NEAR, NEAR,  LEFT, NEAR,  NEAR,  NEAR),
    "group":     (LEFT,  NEAR, NEAR,  NEAR, NEAR,  NEAR, NEAR,  NEAR,  NEAR),
    "one group": (NEAR,  LEFT, NEAR,  NEAR, NEAR,  NEAR, NEAR,  NEAR,  NEAR),
    "instance":  (NEAR,  NEAR, LEFT,  NEAR, NEAR,  NEAR, NEAR,  NEAR,  NEAR),
    "position":  (NEAR,  NEAR, NEAR,  LEFT, NEAR,  NEAR, NEAR,  NEAR,  NEAR),
    "last":      (EXACT, LEFT, EXACT, LEFT, NEAR,  NEAR, NEAR,  NEAR,  NEAR),
}  # fmt: skip
"""What becomes of each kind of norm. One element a channel leaves `gn` and `in` one group for it, as layer norm has."""


def wanted(kind: Kind, target: str) -> tuple[str, str]:
    """What becomes of the norm, and of the weight, by the table."""
    norm, _, weight = target.partition("-")
    if norm in ("ws", "wn"):
        norm, weight = "", norm
    of_norm = BECOMES[kind.family][NORM_TARGETS.index(norm)] if norm else LEFT
    if norm == "fold" and not kind.foldable:
        of_norm = LEFT
    return of_norm, EXACT if weight else LEFT


WITH_PAIRS = ["Conv2d, BatchNorm2d", "Linear, BatchNorm1d", "BatchNormAct2d", "GroupNorm", "LSTM"]
"""Kinds that meet every target. The others meet each form alone, and the pair whose norms go into the weights."""
CASES = [
    (name, target)
    for name in KINDS
    for target in normswap.TARGETS
    if target in (*SINGLE_FORMS, "fold-ws") or name in WITH_PAIRS
]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_table(name: str, target: str) -> None:
    kind = KINDS[name]
    model, data = kind.make(), kind.data()
    of_norm, of_weight = wanted(kind, target)
    options = all_weights(target) | {"calibrate": data, "calibrate_seconds": 0}
    if of_norm == of_weight == LEFT:
        with pytest.raises(normswap.ModelError, match="nothing to (convert|fold)"):
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
