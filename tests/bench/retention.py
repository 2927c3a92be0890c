"""Accuracy and drift right after conversion, before any training, of networks that were trained with BatchNorm.

Run: python tests/bench/retention.py [--json] [--results FILE] [--cache FOLDER] [--seeds 3] [--calibrate-seconds S]
[--tasks digits,gratings] [--threads 1]; about ten minutes on one core once the nets are trained, and S seconds for each
of 195 calibrations. The folder keeps the trained weights. Each number is the mean over the seeds, with its standard
deviation. Columns: accuracy before; then after conversion, by what becomes of gain and bias: reset, copied, matched;
and with `--calibrate-seconds`, matched and then calibrated on 256 training images, with `auto` groups alone. The drift
is the relative L2 distance of the outputs. `ln` is one group, `in` one channel a group, and `gn-ws preserve` is the
same function as `gn` from every start.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import Row, main, mean_spread
from digits import outputs
from nets import FLOOR, TASKS, pairs, trained
from picture import Chart, draw

import normswap

STARTS = {"reset": "reset", "copied": "copy", "matched": "match"}
TARGETS: dict[str, dict[str, Any]] = {
    "gn": {"to": "gn"},
    "ln": {"to": "ln"},
    "in": {"to": "in"},
    "gn-ws preserve": {"to": "gn-ws"},
    "gn-ws strict": {"to": "gn-ws", "ws": "strict"},
    "bcn": {"to": "bcn"},
}
GROUPS: dict[str, tuple[int | str, ...]] = {"gn": (8, 32, "auto"), "ln": ("",), "in": ("",)}
OTHER_GROUPS: tuple[int | str, ...] = (32, "auto")
CALIBRATED = 256  # training images


def kinds() -> Iterator[tuple[str, int | str]]:
    """Every target with every choice of groups that is measured."""
    for target in TARGETS:
        yield from ((target, groups) for groups in GROUPS.get(target, OTHER_GROUPS))


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(arguments.threads)
    cache = Path(arguments.cache) if arguments.cache else None
    for task, name in pairs():
        if task not in arguments.tasks.split(","):
            continue
        data = TASKS[task]()
        some, _, images, labels = data
        before: list[float] = []
        scores: dict[tuple[str, int | str, str], list[tuple[float, float]]] = defaultdict(list)
        for seed in range(arguments.seeds):
            net = trained(name, cache, task, seed, data)
            told = outputs(net, images)
            before.append((told.argmax(1) == labels).double().mean().item())
            for target, groups in kinds():
                options = TARGETS[target] | ({"groups": groups} if groups else {})
                for start, transfer in STARTS.items():
                    if target == "gn-ws preserve" and start != "matched":
                        continue  # the same function as gn from that start
                    model = normswap.convert(net, transfer=transfer, **options).model
                    scores[target, groups, start].append(_score(model, told, images, labels))
                if arguments.calibrate_seconds and groups in ("", "auto") and target != "gn-ws preserve":
                    seconds = {"calibrate": some[:CALIBRATED], "calibrate_seconds": arguments.calibrate_seconds}
                    model = normswap.convert(net, **options, **seconds).model
                    scores[target, groups, "calibrated"].append(_score(model, told, images, labels))
        if mean_spread(before)["mean"] < FLOOR:
            raise SystemExit(f"{name}, {task}: trained to {before} only; nothing can be said of what conversion keeps")
        columns = [*STARTS, "calibrated"] if arguments.calibrate_seconds else [*STARTS]
        for target, groups in kinds():
            row = {"task": task, "net": name, "target": target, "groups": groups, "before": mean_spread(before)}
            for start in columns:
                found = scores[target, groups, start]
                row[start] = mean_spread([accuracy for accuracy, _ in found]) if found else ""
                if found:
                    row[start]["drift"] = mean_spread([drift for _, drift in found])["mean"]
            yield row


def _score(
    model: torch.nn.Module, told: torch.Tensor, images: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float]:
    """Accuracy, and drift of the outputs from what the net before `told`."""
    tells = outputs(model, images)
    return (tells.argmax(1) == labels).double().mean().item(), ((tells - told).norm() / told.norm()).item()


def picture(rows: list[Row]) -> str:
    """For each task, the accuracy of every net after `gn`, by start."""
    charts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        chosen = [row for row in rows if (row["task"], row["target"], row["groups"]) == (task, "gn", "auto")]
        series = {
            start: {row["net"].replace("-bn", ""): 100 * row[start]["mean"] for row in chosen}
            for start in ("before", "reset", "copied", "matched", "calibrated")
            if start in chosen[0]
        }
        charts.append(Chart(f"{task}: gn, auto groups, before training", "", "accuracy, %", series, bars=True))
    return draw(charts, columns=1)


if __name__ == "__main__":
    main(__doc__, measure, picture, cache=None, seeds=3, threads=1, calibrate_seconds=0.0, tasks="digits,gratings")
