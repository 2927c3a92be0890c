"""Which start and which target to take at which batch size: nets trained with BatchNorm, fine-tuned on a shifted task.

Run: python tests/bench/fine_tune.py [--json] [--results FILE] [--cache FOLDER] [--quick] [--nets A,B] [--seeds 3]
[--batches 1,2,4,16] [--steps 200,200,100,50] [--rates 2e-4,6e-4,1.8e-3] [--threads 1] [--processes 1] [--starts "gn
matched;gn calibrated"] [--task shifted]. The task is the digits turned, fainter and noisy, or with `--task same` those
that the nets were trained on. A calibrated start was fitted for up to half a minute to 256 unlabelled images of the old
task. Every start gets the same: AdamW with a rate that falls to 0 by a cosine, the best of the rates by the accuracy on
300 images apart (net of seed 0, half the steps), then that many steps from the net of each seed. Each number is
accuracy on held-out images: the mean over the seeds, with its standard deviation. "steps" are the steps done of the
whole budget, so those in between are not yet cooled down.
"""

from __future__ import annotations

import argparse
import copy
import math
import multiprocessing
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Row, main, mean_spread, numbers
from digits import accuracy, digits, shifted
from nets import trained
from picture import Chart, draw
from torch import Tensor, nn
from torch.nn import functional as F

import normswap

STARTS: dict[str, dict[str, Any] | None] = {
    "bn": None,
    "frozen": {"to": "frozen"},
    "gn reset": {"to": "gn", "transfer": "reset"},
    "gn copied": {"to": "gn", "transfer": "copy"},
    "gn matched": {"to": "gn"},
    "gn calibrated": {"to": "gn", "calibrate": 256, "calibrate_seconds": 30.0},
    "ln matched": {"to": "ln"},
    "in matched": {"to": "in"},
    "gn-ws matched": {"to": "gn-ws"},
    "gn-ws strict matched": {"to": "gn-ws", "ws": "strict"},
    "bcn matched": {"to": "bcn"},
}
VALIDATED = 300
LOOKS = (25, 50, 100)
"""Steps after which a net is looked at on its way, at batch 2."""


def start_from(net: nn.Module, start: str, images: Tensor) -> nn.Module:
    """A copy of the net with the norms, gain and bias of that start; it may be calibrated on `images`."""
    options = STARTS[start]
    if options is None:
        return copy.deepcopy(net)
    data = {"calibrate": images[: options["calibrate"]]} if "calibrate" in options else {}
    return normswap.convert(net, **options | data).model


def fine_tune(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    rate: float,
    batch: int,
    steps: int,
    seed: int,
    looks: Sequence[int] = (),
) -> Iterator[int]:
    """Train `net`, and yield the number of steps done wherever it is to be looked at, the end included."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [torch.randperm(len(labels), generator=generator) for _ in range(1 + batch * steps // len(labels))]
    )
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        net.train()
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        part = order[step * batch : (step + 1) * batch]
        loss = F.cross_entropy(net(images[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 == steps or step + 1 in looks:
            yield step + 1


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    names = arguments.nets.split(",")
    if arguments.quick:
        names, arguments.seeds, arguments.rates, arguments.batches, arguments.steps = names[:1], 1, "6e-4", "2", "20"
    starts = arguments.starts.split(";") if arguments.starts else [*STARTS]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for rows in pool.imap(_cell, [(arguments, name, start) for name in names for start in starts]):
            yield from rows


def _cell(asked: tuple[argparse.Namespace, str, str]) -> list[Row]:
    """All rows of one net and one start."""
    arguments, name, start = asked
    torch.set_num_threads(arguments.threads)
    budgets = dict(zip(numbers(arguments.batches), numbers(arguments.steps), strict=True))
    rates = [float(rate) for rate in arguments.rates.split(",")]
    data = digits()
    moved = shifted if arguments.task == "shifted" else lambda images, seed: images
    images, labels = moved(data[0], 0).contiguous(memory_format=torch.channels_last), data[1]
    apart = images[:VALIDATED], labels[:VALIDATED]
    images, labels, held_out = images[VALIDATED:], labels[VALIDATED:], (moved(data[2], 1), data[3])
    cache = Path(arguments.cache) if arguments.cache else None
    nets = [trained(name, cache, "digits", seed, data) for seed in range(arguments.seeds)]
    starts = [start_from(net, start, data[0]) for net in nets]
    before = mean_spread([accuracy(net, *held_out) for net in starts])
    same = {"task": arguments.task, "net": name}
    rows = [{**same, "start": start, "batch": "", "rate": "", "steps": 0, "accuracy": before}]
    for batch, steps in budgets.items():
        scores = {rate: trial_of(starts[0], images, labels, apart, rate, batch, steps // 2) for rate in rates}
        best = max(scores, key=lambda rate: scores[rate])
        found: dict[int, list[float]] = defaultdict(list)
        for seed, net in enumerate(starts):
            model = copy.deepcopy(net)
            for done in fine_tune(model, images, labels, best, batch, steps, seed, LOOKS if batch == 2 else ()):
                found[done].append(accuracy(model, *held_out))
        for done, values in found.items():
            rows.append(
                {
                    **same,
                    "start": start,
                    "batch": batch,
                    "rate": best,
                    "steps": done,
                    "accuracy": mean_spread(values),
                }
            )
    return rows


def trial_of(
    start: nn.Module, images: Tensor, labels: Tensor, apart: tuple[Tensor, Tensor], rate: float, batch: int, steps: int
) -> float:
    """Accuracy on images apart, after a trial of a rate."""
    model = copy.deepcopy(start)
    for _ in fine_tune(model, images, labels, rate, batch, steps, 100):
        pass
    return accuracy(model, *apart)


def picture(rows: list[Row]) -> str:
    """Means over the nets: on the left the curve at batch 2, on the right the end over the batch size."""
    curve: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    ends: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    last = {row["batch"]: row["steps"] for row in rows}
    for row in rows:
        value = 100 * row["accuracy"]["mean"]
        if row["batch"] in ("", 2):
            curve[row["start"]][str(row["steps"])].append(value)
        if row["batch"] != "" and row["steps"] == last[row["batch"]]:
            ends[row["start"]][str(row["batch"])].append(value)
    return draw(
        [
            Chart("Fine-tuned at batch 2", "steps", "accuracy, %", _means(curve)),
            Chart("Fine-tuned to the end", "batch", "accuracy, %", _means(ends)),
        ]
    )


def _means(series: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    return {name: {place: sum(v) / len(v) for place, v in points.items()} for name, points in series.items()}


if __name__ == "__main__":
    main(
        __doc__,
        measure,
        picture,
        cache=None,
        quick=False,
        nets="DenseNet,VGG-11-bn,ResNet-26",
        seeds=3,
        batches="1,2,4,16",
        steps="200,200,100,50",
        rates="2e-4,6e-4,1.8e-3",
        threads=1,
        processes=1,
        starts="",
        task="shifted",
    )
