"""What trained networks of the world keep right after conversion, without and with data, before any training.

Run: python tests/bench/real.py --data FOLDER [--json] [--results FILE [--add]] [--networks A,B] [--ways "gn auto;ln"]
[--calibration 1000] [--test 2000] [--threads 2]; most of an hour on two cores, of which each calibrated way takes one
to five minutes a network. What the folder has, and which packages the networks come with, says real_networks.py; --ways
and the numbers, the most samples to calibrate and to test on, make a shorter run. Samples to calibrate on are never
tested on.

Columns: the score (top-1; the share of pitches within 50 cents; the mean cosine of embeddings, beside the original's
own) and the agreement with the original (the same class; pitch within 50 cents of its; of all its embeddings, the own
one nearest), each with its standard error over the samples; and the seconds that the conversion took. Rows come on
stderr as they are done.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from common import Row, main, mean_error
from picture import Chart, draw
from real_networks import SUBJECTS, Subject, data_folder
from torch import Tensor, nn

import normswap

NORM_WAYS: dict[str, dict[str, Any]] = {
    "reset": {"to": "gn", "transfer": "reset"},
    "copied": {"to": "gn", "transfer": "copy"},
    "gn auto": {"to": "gn"},
    "gn 1": {"to": "gn", "groups": 1},
    "gn 8": {"to": "gn", "groups": 8},
    "gn 32": {"to": "gn", "groups": 32},
    "gn for use": {"to": "gn", "purpose": "use"},
    "ln": {"to": "ln"},
    "in": {"to": "in"},
    "bcn": {"to": "bcn"},
    "pn": {"to": "pn"},
    "gn-ws": {"to": "gn-ws"},
    "gn-ws strict": {"to": "gn-ws", "ws": "strict"},
    "gn on data": {"to": "gn", "calibrate_seconds": 0.0},
    "gn calibrated 60 s": {"to": "gn", "calibrate_seconds": 60.0},
    "gn calibrated 180 s": {"to": "gn", "calibrate_seconds": 180.0},
}
"""By name: the options of the conversion; with seconds to calibrate, it gets data."""
RECURRENT_WAYS: dict[str, dict[str, Any]] = {
    "wn": {"to": "wn", "layers": ("rnn", "linear")},
    "recurrent ln": {"to": "ln", "recurrent": "ln"},
    "recurrent ln on data": {"to": "ln", "recurrent": "ln", "calibrate_seconds": 0.0},
    "recurrent ln calibrated 60 s": {"to": "ln", "recurrent": "ln", "calibrate_seconds": 60.0},
    "recurrent ln calibrated 180 s": {"to": "ln", "recurrent": "ln", "calibrate_seconds": 180.0},
}
BATCH = 50


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    folder = data_folder(arguments.data)
    known = {**NORM_WAYS, **RECURRENT_WAYS}
    if unknown := {*filter(None, arguments.ways.split(";"))} - known.keys():
        raise SystemExit(f"--ways: no such way as {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    torch.set_num_threads(arguments.threads)
    for name in arguments.networks.split(","):
        subject = SUBJECTS[name](folder)
        recurrent = any(isinstance(module, nn.RNNBase) for module in subject.network.modules())
        ways = RECURRENT_WAYS if recurrent else NORM_WAYS
        asked = arguments.ways.split(";") if arguments.ways else [*ways]
        test, truth = spread(subject.test, arguments.test), spread(subject.truth, arguments.test)
        original = answers(subject.network, test)
        yield {"network": name, "way": "original"} | _scored(subject, original, truth, original) | {"seconds": 0.0}
        for way in (way for way in ways if way in asked):
            begun = time.perf_counter()
            converted = convert(subject, ways[way], arguments.calibration)
            took = round(time.perf_counter() - begun, 1)
            row = _scored(subject, answers(converted, test), truth, original)
            row = {"network": name, "way": way} | row | {"seconds": took}
            print(row, file=sys.stderr, flush=True)
            yield row


def convert(subject: Subject, options: dict[str, Any], most: int) -> nn.Module:
    """The converted network; with seconds to calibrate, on at most so many samples."""
    data = {"calibrate": spread(subject.calibration, most).split(BATCH)} if "calibrate_seconds" in options else {}
    return normswap.convert(subject.network, **options, **data).model


def spread(values: Tensor, most: int) -> Tensor:
    """At most so many, taken from all over: pictures may be in the order of their classes."""
    return values[torch.linspace(0, len(values) - 1, min(most, len(values))).long()]


def answers(network: nn.Module, inputs: Tensor) -> Tensor:
    """What the network says of `inputs` in eval mode."""
    network.eval()
    with torch.no_grad():
        return torch.cat([network(part) for part in inputs.split(BATCH)])


def _scored(subject: Subject, told: Tensor, truth: Tensor, original: Tensor) -> Row:
    return {
        "measure": subject.measure,
        "score": mean_error(subject.score(told, truth).tolist()),
        "agreement": mean_error(subject.agreement(told, original).tolist()),
        "samples": len(told),
    }


SHOWN = ("original", "reset", "copied", "gn auto", "gn calibrated 60 s")
RECURRENT_SHOWN = ("original", "recurrent ln", "recurrent ln calibrated 60 s")


def picture(rows: list[Row]) -> str:
    """The scores of some ways: for each network with norms, and for the recurrent one."""
    recurrent = [row for row in rows if row["measure"] == "cosine"]
    others = [row for row in rows if row["measure"] != "cosine"]
    charts = []
    for title, some, ways in (
        ("Right after conversion: top-1; of CREPE, pitch within 50 cents", others, SHOWN),
        ("Layer norm inside an LSTM: cosine to the original's embeddings", recurrent, RECURRENT_SHOWN),
    ):
        series = {
            way: {row["network"]: 100 * row["score"]["mean"] for row in some if row["way"] == way}
            for way in ways
            if any(row["way"] == way for row in some)
        }
        charts += [Chart(title, "", "%", series, bars=True)] if series else []
    return draw(charts, columns=1)


if __name__ == "__main__":
    main(
        __doc__,
        measure,
        picture,
        data=None,
        networks="EfficientNet-Lite0,ResNet-20,ResNet-56,CREPE tiny,CREPE full,Resemblyzer",
        ways="",
        calibration=1000,
        test=2000,
        threads=2,
    )
