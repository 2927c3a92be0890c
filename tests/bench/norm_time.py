"""What a ResNet-50 costs here with other norms in it, contiguous and channels-last, in train and in eval mode.

Run: python tests/bench/norm_time.py [--json] [--results FILE] [--batches 1,8] [--rounds 7] [--threads 2]; ten minutes.
All variants take turns in each round; a number is the median over the rounds of the time as a multiple of the net with
BatchNorm, in the same layout, in the same round. A training step is forward and backward at 224². Last, at batch 1,
steps of the nets as `torch.compile` makes them, as multiples of the step with BatchNorm that is not compiled.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from common import Row, main, numbers
from step_time import SIZE, compared, compiled, forward, step
from torchvision import models

import normswap

TARGETS = ("gn", "ln", "in", "est", "bcn", "frozen", "gn-ws", "fold")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    net = models.resnet50()
    nets = {"bn": net} | {target: normswap.convert(net, target).model for target in TARGETS}
    for layout, form in LAYOUTS.items():
        laid = {name: made.to(memory_format=form) for name, made in nets.items()}
        for batch in numbers(arguments.batches):
            x = torch.randn(batch, 3, SIZE, SIZE).to(memory_format=form)
            for mode, run in (("training", step), ("eval", forward)):
                runs = {name: partial(run, made.train(mode == "training"), x) for name, made in laid.items()}
                rows = compared(runs, arguments.rounds)
                for name, (seconds, times) in rows.items():
                    yield _row(layout, batch, mode, name, seconds, times)
    x = torch.randn(1, 3, SIZE, SIZE)
    trained = {name: made.to(memory_format=torch.contiguous_format).train() for name, made in nets.items()}
    runs = {"not compiled": partial(step, trained["bn"], x)}
    runs |= {name: partial(step, compiled(made), x) for name, made in trained.items()}
    for name, (seconds, times) in compared(runs, arguments.rounds).items():
        if name in nets:
            yield _row("contiguous", 1, "training, compiled", name, seconds, times)


def _row(layout: str, batch: int, mode: str, norm: str, seconds: float, times: float) -> Row:
    return {"layout": layout, "batch": batch, "mode": mode, "norm": norm, "seconds": seconds, "times": times}


if __name__ == "__main__":
    main(__doc__, measure, batches="1,8", rounds=7, threads=2)
