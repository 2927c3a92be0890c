"""Accuracy right after conversion with unlabelled data, of networks that were trained with BatchNorm.

Run: python tests/bench/calibrated.py [--json] [--results FILE] [--cache FOLDER] [--seeds 1] [--seconds 60] [--targets
"gn;gn-ws strict"] [--tasks digits,gratings] [--threads 2]; up to a minute for each net, seed and target. The folder
keeps the trained weights. The data are 256 training images without labels; accuracy is top-1 on held-out images, the
mean over the seeds. Columns: before; matched without data; calibrated; and what share of the accuracy before that is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import Row, main, mean_spread
from digits import outputs
from nets import TASKS, pairs, trained
from picture import Chart, draw

import normswap

SAMPLES = 256
TARGETS: dict[str, dict[str, Any]] = {"gn": {"to": "gn"}, "gn-ws strict": {"to": "gn-ws", "ws": "strict"}}


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(arguments.threads)
    cache = Path(arguments.cache) if arguments.cache else None
    for target in arguments.targets.split(";"):
        rows: list[Row] = []
        for task, name in pairs():
            if task not in arguments.tasks.split(","):
                continue
            data = TASKS[task]()
            some, _, images, labels = data
            scores: dict[str, list[float]] = {"before": [], "matched": [], "calibrated": []}
            for seed in range(arguments.seeds):
                net = trained(name, cache, task, seed, data)
                matched = normswap.convert(net, **TARGETS[target]).model
                told = {"calibrate": some[:SAMPLES], "calibrate_seconds": arguments.seconds}
                calibrated = normswap.convert(net, **TARGETS[target], **told).model
                for start, model in (("before", net), ("matched", matched), ("calibrated", calibrated)):
                    scores[start].append((outputs(model, images).argmax(1) == labels).double().mean().item())
            row: Row = {"target": target, "task": task, "net": name} | {k: mean_spread(v) for k, v in scores.items()}
            row["kept"] = row["calibrated"]["mean"] / row["before"]["mean"]
            rows.append(row)
            print(row, file=sys.stderr)  # it takes long
            yield row
        means = {
            start: {"mean": statistics.fmean(row[start]["mean"] for row in rows), "spread": None} for start in scores
        }
        yield {
            "target": target,
            "task": "",
            "net": "mean",
            **means,
            "kept": statistics.fmean(row["kept"] for row in rows),
        }


def picture(rows: list[Row]) -> str:
    """For each target, the accuracy of every net before, matched and calibrated."""
    charts = []
    for target in dict.fromkeys(row["target"] for row in rows):
        chosen = [row for row in rows if row["target"] == target and row["task"]]
        series = {
            start: {
                f"{row['net'].replace('-bn', '')}{'*' * (row['task'] == 'gratings')}": 100 * row[start]["mean"]
                for row in chosen
            }
            for start in ("before", "matched", "calibrated")
        }
        charts.append(Chart(f"{target}, before training (* gratings)", "", "accuracy, %", series, bars=True))
    return draw(charts, columns=1)


if __name__ == "__main__":
    main(__doc__, measure, picture, cache=None, seeds=1, threads=2, seconds=60.0, targets="gn", tasks="digits,gratings")
