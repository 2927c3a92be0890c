"""How long the views of a report take for the largest models of torchvision, by number of modules.

Run: python tests/bench/report_time.py [--json] [--results FILE] [--models efficientnet_v2_l,densenet201] [--rounds 5];
half a minute. The least of the rounds, also as a multiple of `repr(model)`, which prints the same tree without a word
on it. "lines" is what the terminal gets at 80 columns.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from common import Row, main
from rich.console import Console
from torchvision import models

import normswap
from normswap.report import formats
from normswap.report.terminal import ReportView
from normswap.report.terminal_inspection import InspectionView


def printed(view: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80).print(view)
    return stream.getvalue()


def least(run: Callable[[], str], rounds: int) -> tuple[float, str]:
    """Seconds, and what came out."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        text = run()
        taken.append(time.perf_counter() - start)
    return min(taken), text


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    for name in arguments.models.split(","):
        model = models.get_model(name, weights=None)
        inputs = torch.randn(1, 3, 64, 64)
        report = normswap.convert(model, "gn-ws", example_inputs=inputs).report
        found = normswap.inspect(model, example_inputs=inputs)
        bare, _ = least(partial(repr, model), arguments.rounds)
        runs: dict[str, Callable[[], str]] = {
            "terminal": partial(printed, ReportView(report, name)),
            "inspect, terminal": partial(printed, InspectionView(found, name)),
        }
        runs |= {ending: partial(view, report, name) for ending, view in formats.REPORT_FORMATS.items()}
        for view, run in runs.items():
            seconds, text = least(run, arguments.rounds)
            lines = text.count("\n") if "terminal" in view else None
            yield {"model": name, "view": view, "seconds": seconds, "times repr": seconds / bare, "lines": lines}


if __name__ == "__main__":
    main(__doc__, measure, models="efficientnet_v2_l,densenet201", rounds=5)
