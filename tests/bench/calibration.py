"""Accuracy after conversion with unlabelled data: matched, re-estimated layer by layer, and distilled.

Run: python tests/bench/calibration.py [--json] [--cache FOLDER] [--nets A,B] [--targets "gn auto;ln"] [--train
norms,biases,all] [--seconds 15,60 | --steps 100,400] [--threads 2], where the folder keeps the trained weights; a
number of steps says the same on a busy machine. The data are 256 training pictures without labels; accuracy is top-1 on
the held-out pictures. Columns: before; matched; re-estimated alone; distilled, by what is trained and for how long;
each with what was kept. Rows come on stderr as they are done.

With --cost [--data FOLDER] [--repeats 5], what it takes instead, in time of the process, so that a busy machine tells
the same: measuring, over a bare forward; a step of the fit, over a forward of the original and a forward and a backward
of the converted net; the same of a batch's first step, which runs the original. With --data (see real_networks.py) of
ResNet-56 (batch 64, 32×32) and EfficientNet-Lite0 (batch 32, 224×224; noise serves for pictures), else of the nets
above.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import real_networks
import torch
from common import Row, main
from digits import accuracy, digits
from nets import NETS, trained
from torch import Tensor, nn

import normswap
from normswap.analysis.sites import find_sites
from normswap.calibration.distillation import FitSettings, distill
from normswap.calibration.measuring import measure_norms
from normswap.calibration.paired_runs import FittedPair

SAMPLES = 256
BATCHES = 4  # that are measured for the costs: what each norm takes once is spread over as many at least
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
    yield from costs(arguments) if arguments.cost else accuracies(arguments)


def accuracies(arguments: argparse.Namespace) -> Iterator[Row]:
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


# ---- what it takes ----


def costs(arguments: argparse.Namespace) -> Iterator[Row]:
    for name, net, batch in _nets_with_batches(arguments):
        sites = [site for site in find_sites(net) if site.kind == "norm"]
        converted, report = normswap.convert(net, "gn")
        norms = [change.paths[0] for change in report.changes if change.kind == "norm"]
        pair = FittedPair(net, converted, norms)
        wanted = list(pair.values.values())
        converted.requires_grad_(False)
        trained_values = [converted.get_parameter(path).requires_grad_() for path in pair.values]

        def bare(net: nn.Module = net, batch: Tensor = batch) -> Tensor:
            with torch.no_grad():
                return net(batch)

        def plain_step(
            bare: Any = bare, net: nn.Module = converted, batch: Tensor = batch, values: Any = trained_values
        ) -> None:
            torch.autograd.grad((net(batch) - bare()).square().mean(), values)

        def step(pair: FittedPair = pair, batch: Tensor = batch, values: Any = wanted) -> None:
            torch.autograd.grad(pair.loss(batch), values)

        def first_step(pair: FittedPair = pair, step: Any = step) -> None:
            pair.cache.clear()
            step()

        def measuring(net: nn.Module = net, batch: Tensor = batch, sites: Any = sites) -> None:
            measure_norms(net, [batch] * BATCHES, sites)

        ways = {"bare": bare, "measuring": measuring, "plain": plain_step, "first": first_step, "step": step}
        took = process_times(ways, arguments.repeats)
        yield {
            "net": name,
            "batch": "×".join(map(str, batch.shape)),
            "forward": f"{took['bare']:.3f} s",
            "measuring": round(took["measuring"] / BATCHES / took["bare"], 2),
            "forwards and backward": f"{took['plain']:.3f} s",
            "step": round(took["step"] / took["plain"], 2),
            "first step": round(took["first"] / took["plain"], 2),
        }


def _nets_with_batches(arguments: argparse.Namespace) -> Iterator[tuple[str, nn.Module, Tensor]]:
    if arguments.data:
        folder = Path(arguments.data)
        yield "ResNet-56", real_networks.cifar_resnet(56, folder), real_networks.cifar_pictures(folder)[:64]
        noise = torch.randn(32, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        yield "EfficientNet-Lite0", real_networks.efficientnet_lite(0), noise
        return
    for name in arguments.nets.split(",") if arguments.nets else NETS:
        yield name, trained(name, Path(arguments.cache) if arguments.cache else None).eval(), digits()[0][:32]


def process_times(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least seconds of the process that each way took, one after the other in turns."""
    took = dict.fromkeys(ways, math.inf)
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            begun = time.process_time()
            way()
            took[name] = min(took[name], time.process_time() - begun) if repeat else math.inf  # the first warms up
    return took


if __name__ == "__main__":
    options = {"cache": None, "nets": None, "targets": None, "train": "norms,biases,all", "seconds": "15,60"}
    main(__doc__, measure, **options, steps=None, threads=2, cost=False, data=None, repeats=5)
