"""Does a fit ever leave a network worse? On few pictures of its own, drawn again and again, and on other ones.

Run: python tests/bench/fits.py --data FOLDER [--json] [--depth 20] [--counts 64,128,256] [--seeds 20] [--steps 60]
[--tested 1000] [--threads 1], with the folder of real_networks.py. A row each for a number of pictures and for each
kind of others: top-1 before, and matched on these data; the change by the fit, its mean, and its least over the seeds
with its standard error (paired); how many fits were kept, and how many were refused for the data. Rows come on stderr
as they are done.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Iterator

import real_networks
import torch
from common import Row, main
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.calibration.distillation import FitSettings, distill


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(arguments.threads)
    folder = real_networks.data_folder(arguments.data)
    net, own = real_networks.cifar_resnet(arguments.depth, folder), real_networks.cifar_pictures(folder)
    tested = real_networks.cifar_pictures(folder, "test2000")[: arguments.tested]
    labels = real_networks.cifar_labels(folder)[: arguments.tested]
    for count in map(int, arguments.counts.split(",")):
        draws = [own[torch.randperm(len(own), generator=seeded(seed))[:count]] for seed in range(arguments.seeds)]
        yield row(f"{count} of its own", net, draws, tested, labels, arguments.steps)
    for name, pictures in others(own[:128]).items():
        yield row(name, net, [pictures], tested, labels, arguments.steps)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def others(own: Tensor) -> dict[str, Tensor]:
    """Pictures that are not what the network was trained on, of the shape of its own."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (real_networks.CIFAR_MEAN, real_networks.CIFAR_STD))
    plain, noise = own * std + mean, torch.randn(own.shape, generator=seeded(0))
    return {
        "Gaussian noise": noise,
        "uniform noise": (torch.rand(own.shape, generator=seeded(0)) - mean) / std,
        "one colour each": (torch.rand(len(own), 3, 1, 1, generator=seeded(0)).expand_as(own) - mean) / std,
        "bytes": plain * 255,
        "not normalized": plain,
        "normalized by halves": (plain - 0.5) / 0.5,
        "noise added": ((plain + 0.1 * noise).clamp(0, 1) - mean) / std,
        "half as bright": (plain / 2 - mean) / std,
        "grey": (plain.mean(1, keepdim=True).expand_as(plain) - mean) / std,
        "blue for red": (plain.flip(1) - mean) / std,
        "upside down": own.flip(2),
        "blurred": F.avg_pool2d(own, 3, 1, 1),
    }


def row(name: str, net: nn.Module, draws: list[Tensor], tested: Tensor, labels: Tensor, steps: int) -> Row:
    before = right(net, tested, labels)
    matched, changes, errors, kept, refused = [], [], [], 0, 0
    for pictures in draws:
        batches = list(pictures.split(32))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that data are refused: the row says so
            converted, report = normswap.convert(net, "gn", calibrate=batches, calibrate_seconds=0)
        start = right(converted, tested, labels)
        if report.warnings:
            refused += 1
        else:
            norms = [change.paths[0] for change in report.changes if change.kind == "norm"]
            kept += distill(net, converted, batches, norms, FitSettings(math.inf, steps)).kept == "calibrated"
        change = right(converted, tested, labels) - start
        matched.append(start.mean().item())
        changes.append(change.mean().item())
        errors.append((change.var() / len(change)).sqrt().item())
    found: Row = {
        "pictures": name,
        "before": f"{before.mean():.1%}",
        "matched": f"{sum(matched) / len(matched):.1%}",
        "change by the fit": f"{sum(changes) / len(changes):+.1%}",
        "least": f"{min(changes):+.1%} ± {errors[changes.index(min(changes))]:.1%}",
        "kept": f"{kept} of {len(draws)}",
        "refused": f"{refused} of {len(draws)}",
    }
    print(found, file=sys.stderr, flush=True)
    return found


@torch.no_grad()
def right(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """1 for each picture whose class is told, else 0."""
    return (torch.cat([net(part).argmax(1) for part in images.split(100)]) == labels).double()


if __name__ == "__main__":
    options = {"data": None, "depth": 20, "counts": "64,128,256", "seeds": 20, "steps": 60, "tested": 1000}
    main(__doc__, measure, **options, threads=1)
