"""What a ResNet-50 costs on this machine with other norms in it, contiguous and channels-last, in training and in eval mode.

Run: python tests/bench/norm_time.py [--json] [--results FILE] [--batches 1,8] [--rounds 7] [--threads 2]; some minutes. All variants take turns in
each round; a number is the median over the rounds of the time as a multiple of the net with BatchNorm, in the same layout, in the same
round. A training step is forward and backward at 224².
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from common import Row, main, numbers
from step_time import SIZE, compared, forward, step
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
                    yield {
                        "layout": layout,
                        "batch": batch,
                        "mode": mode,
                        "norm": name,
                        "seconds": seconds,
                        "times": times,
                    }


if __name__ == "__main__":
    main(__doc__, measure, batches="1,8", rounds=7, threads=2)
