"""How many groups keep most: accuracy and drift after conversion to matched GroupNorm, for 1, 2, 4, … and `auto`.

On data (256 training images, whose labels are not used) `auto` chooses by what they show; nothing is fitted to them.

Run: python tests/bench/groups.py [--json] [--results FILE] [--cache FOLDER] [--seeds 3] [--threads 1]; about five
minutes on one core once the nets are trained. A number that a layer's channels can't be divided by becomes the largest
divisor below it. Each number is the mean over the seeds, with its standard deviation. The last rows are the mean over
all nets: what to hold `auto` against.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from common import Row, main, mean_spread
from digits import outputs
from nets import TASKS, pairs, trained
from picture import Chart, draw
from torch import nn

import normswap

ALL = "all nets"
AUTO, ON_DATA = "auto", "auto, on data"
SAMPLES = 256


def choices(net: nn.Module) -> list[int | str]:
    """1, 2, 4, … up to the most channels that a norm of the net has, and `auto`, without and with data."""
    widest = max(m.num_features for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [*(2**k for k in range(widest.bit_length())), AUTO, ON_DATA]


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(arguments.threads)
    cache = Path(arguments.cache) if arguments.cache else None
    everywhere: dict[int | str, list[tuple[float, float]]] = defaultdict(list)
    for task, name in pairs():
        data = TASKS[task]()
        some, _, images, labels = data
        scores: dict[int | str, list[tuple[float, float]]] = defaultdict(list)
        for seed in range(arguments.seeds):
            net = trained(name, cache, task, seed, data)
            told = outputs(net, images)
            for groups in choices(net):
                options = (
                    {"calibrate": some[:SAMPLES], "calibrate_seconds": 0} if groups == ON_DATA else {"groups": groups}
                )
                tells = outputs(normswap.convert(net, "gn", **options).model, images)
                right = (tells.argmax(1) == labels).double().mean().item()
                scores[groups].append((right, ((tells - told).norm() / told.norm()).item()))
        for groups, found in scores.items():
            everywhere[groups] += found
            yield _row(task, name, groups, found)
    runs = len(pairs()) * arguments.seeds
    yield from (_row("", ALL, groups, found) for groups, found in everywhere.items() if len(found) == runs)


def _row(task: str, name: str, groups: int | str, found: list[tuple[float, float]]) -> Row:
    accuracy, drift = (mean_spread(values) for values in zip(*found, strict=True))
    return {"task": task, "net": name, "groups": groups, "accuracy": accuracy, "drift": drift["mean"]}


def picture(rows: list[Row]) -> str:
    """Accuracy and drift over the number of groups, a line a net; `auto` has no place on that axis."""
    charts = []
    for task in dict.fromkeys(row["task"] for row in rows if row["task"]):
        for label, value in (
            ("accuracy, %", lambda row: 100 * row["accuracy"]["mean"]),
            ("drift, %", lambda row: 100 * row["drift"]),
        ):
            series: dict[str, dict[str, float]] = defaultdict(dict)
            for row in rows:
                if row["task"] == task and row["groups"] not in (AUTO, ON_DATA):
                    series[row["net"]][str(row["groups"])] = value(row)
            charts.append(Chart(f"{task}, before training", "groups", label, series))
    return draw(charts)


if __name__ == "__main__":
    main(__doc__, measure, picture, cache=None, seeds=3, threads=1)
