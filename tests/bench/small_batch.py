"""The field's claim, from scratch: which norm still learns when the batch is small.

Run: python tests/bench/small_batch.py [--json] [--results FILE] [--quick] [--seeds 3] [--batches 1,2,4,8,16,32]
[--epochs 2] [--threads 1]; about ten minutes on one core. A net of five convolutions with BatchNorm, fresh, is
converted to each target (weight standardization in the paper's form, `--ws strict`; WN is `fold-wn`) and trained on
scikit-learn's digits at 12×12 with SGD. Equal numbers of samples are seen at every batch size. The rate is the best of
four, each linear in the batch size, for each norm and batch size alike, by the accuracy on 300 images apart (a seed
apart). Numbers are errors on held-out images: the mean over the seeds, with its standard deviation. WN from a random
start, with no data to scale it by as its paper does, learns in some seeds only. The picture puts the others beside the
published errors of ResNet-50 on ImageNet (Wu & He 2018; Qiao et al. 2019).
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from common import Row, main, mean_spread, numbers
from digits import accuracy, digits
from picture import Chart, draw
from torch import Tensor, nn
from torch.nn import functional as F

import normswap

NORMS: dict[str, str | None] = {
    "BN": None,
    "LN": "ln",
    "IN": "in",
    "GN": "gn",
    "WN": "fold-wn",
    "BN+WS": "ws",
    "GN+WS": "gn-ws",
    "BCN+WS": "bcn-ws",
}
PUBLISHED = {
    "BN": {2: 34.7, 4: 27.3, 8: 24.8, 16: 23.7, 32: 23.6},
    "GN": {2: 24.1, 4: 24.2, 8: 24.2, 16: 24.0, 32: 24.1},
    "GN+WS": {1: 23.72},
}
FACTORS = (0.0003, 0.001, 0.003, 0.01)
"""Learning rates, times the batch size."""


def fresh(norm: str, seed: int) -> nn.Module:
    """An untrained net with that norm; the same weights for every norm that does not rescale them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    target = NORMS[norm]
    strict = {"ws": "strict"} if target and target.endswith("ws") else {}
    return net if target is None else normswap.convert(net, target, transfer="copy", **strict).model


def train(net: nn.Module, images: Tensor, labels: Tensor, rate: float, batch: int, epochs: int, seed: int) -> None:
    """SGD with momentum; the rate falls to 0 by a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    order = torch.cat([torch.randperm(len(labels), generator=generator) for _ in range(epochs)])
    parts = order.split(batch)
    net.train()
    for step, part in enumerate(parts):
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / len(parts))) / 2
        loss = F.cross_entropy(net(images[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(arguments.threads)
    images, labels, tests, truth = digits()
    images, tests = F.avg_pool2d(images, 3), F.avg_pool2d(tests, 3)
    batches, seeds = numbers(arguments.batches), arguments.seeds
    if arguments.quick:
        images, labels, batches, seeds = images[:600], labels[:600], [8], 1
    for norm in NORMS:
        for batch in batches:
            tried = {}
            for rate in (factor * batch for factor in FACTORS):
                net = fresh(norm, 100)
                train(net, images[300:], labels[300:], rate, batch, arguments.epochs, 100)
                tried[rate] = accuracy(net, images[:300], labels[:300])
            best = max(tried, key=lambda rate: tried[rate])
            errors = []
            for seed in range(seeds):
                net = fresh(norm, seed)
                train(net, images, labels, best, batch, arguments.epochs, seed)
                errors.append(1 - accuracy(net, tests, truth))
            yield {"norm": norm, "batch": batch, "rate": round(best, 6), "error": mean_spread(errors)}


def picture(rows: list[Row]) -> str:
    """Error over batch size: measured on the left, published on the right; without WN, which would flatten the rest."""
    measured: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["norm"] == "WN":
            continue
        measured[row["norm"]][str(row["batch"])] = 100 * row["error"]["mean"]
    published = {
        norm: {str(batch): error for batch, error in sorted(found.items())} for norm, found in PUBLISHED.items()
    }
    published = {
        "GN+WS": published.pop("GN+WS"),
        **published,
    }  # the one with batch 1 comes first: places keep their order
    return draw(
        [
            Chart("Digits, from scratch", "batch", "error, %", measured),
            Chart("Published: ResNet-50 on ImageNet", "batch", "error, %", published),
        ]
    )


if __name__ == "__main__":
    main(__doc__, measure, picture, quick=False, seeds=3, batches="1,2,4,8,16,32", epochs=2, threads=1)
