"""Accuracy right after conversion, before any training, of networks trained with BatchNorm on scikit-learn's digits.

Run: python tests/bench/retention.py [--json] [--cache FOLDER], where the folder keeps the trained weights. About ten
minutes on two cores. Columns: accuracy before; then after `gn` by what becomes of gain and bias (reset, copy, match), and
after `gn-ws`, matched, in both forms of weight standardization.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from common import Row, main
from digits import NETS, accuracy, digits, trained

import normswap

FLOOR = 0.97  # a net that learnt less says nothing about what conversion keeps


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    *_, images, labels = digits()
    for name in NETS:
        net = trained(name, Path(arguments.cache) if arguments.cache else None)
        before = accuracy(net, images, labels)
        if before < FLOOR:
            raise SystemExit(f"{name}: trained to {before:.1%} only; nothing can be said of what conversion keeps")
        for groups in (1, 8, 32, "auto"):
            after = {
                how: normswap.convert(net, "gn", groups=groups, transfer=how).model
                for how in ("reset", "copy", "match")
            }
            for ws in ("preserve", "strict"):
                after[f"gn-ws {ws}"] = normswap.convert(net, "gn-ws", groups=groups, ws=ws).model
            scores = {how: f"{accuracy(model, images, labels):.1%}" for how, model in after.items()}
            yield {"net": name, "before": f"{before:.1%}", "groups": groups, **scores}


if __name__ == "__main__":
    main(__doc__, measure, cache=None)
