"""Accuracy after conversion with unlabelled data: matched, re-estimated layer by layer, and distilled.

Run: python tests/bench/calibration.py [--json] [--cache FOLDER] [--nets A,B] [--targets "gn auto;ln"] [--train
norms,biases,all] [--seconds 15,60 | --steps 100,400] [--threads 2], where the folder keeps the trained weights; a
number of steps says the same on a busy machine. The data are 256 training pictures without labels; accuracy is top-1 on
the held-out pictures. Columns: before; matched; re-estimated alone; distilled, by what is trained and for how long;
each with what was kept. Rows come on stderr as they are done.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import Row, main
from digits import accuracy, digits
from nets import NETS, trained

import normswap
from normswap.calibration.distillation import FitSettings, distill

SAMPLES = 256
STEMS = ["conv1", "features.0", "features.conv0", "features.0.0"]
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "gn auto": ("gn", {}),
    "gn 32": ("gn", {"groups": 32}),
    "ln": ("ln", {}),
    "gn-ws": ("gn-ws", {}),
    "gn-ws strict": ("gn-ws", {"ws": "strict"}),
    "gn-ws strict, stem left": ("gn-ws", {"ws": "strict", "exclude": lambda path, module: path in STEMS}),
    "bcn": ("bcn", {}),
}
"""By name: the target and the options."""


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(arguments.threads)
    data, _, images, labels = digits()
    batches = list(data[:SAMPLES].split(32))
    for name in arguments.nets.split(",") if arguments.nets else NETS:
        net = trained(name, Path(arguments.cache) if arguments.cache else None)
        before = accuracy(net, images, labels)
        for target in arguments.targets.split(";") if arguments.targets else TARGETS:
            to, options = TARGETS[target]
            matched, report = normswap.convert(net, to, calibrate=batches, calibrate_seconds=0, **options)
            norms = [change.paths[0] for change in report.changes if change.kind == "norm"]
            row: Row = {"net": name, "target": target, "before": f"{before:.1%}"}
            row["matched"] = f"{accuracy(matched, images, labels):.1%}"
            restated = copy.deepcopy(matched)
            found = distill(net, restated, batches, norms, FitSettings(math.inf, 0))
            row["re-estimated"] = f"{accuracy(restated, images, labels):.1%} {found.kept}"
            for train in arguments.train.split(","):
                for limit in (arguments.steps or arguments.seconds).split(","):
                    bound: dict[str, Any] = {"seconds": float(limit)}
                    if arguments.steps:
                        bound = {"seconds": math.inf, "steps": int(limit)}
                    fitted = copy.deepcopy(matched)
                    found = distill(net, fitted, batches, norms, FitSettings(train=train, **bound))
                    scored = f"{accuracy(fitted, images, labels):.1%} {found.kept} ({found.steps} steps)"
                    row[f"{train}, {limit} {'steps' if arguments.steps else 's'}"] = scored
            print(row, file=sys.stderr, flush=True)
            yield row


if __name__ == "__main__":
    options = {"cache": None, "nets": None, "targets": None, "train": "norms,biases,all", "seconds": "15,60"}
    main(__doc__, measure, **options, steps=None, threads=2)
