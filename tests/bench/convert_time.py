"""Time and peak memory of a conversion, beside other converters, and of the command beside a bare script.

Run: python tests/bench/convert_time.py [--json] [--results FILE] [--rounds 3] [--models resnet50,...] [--threads 2]; a
few minutes. In-process: batch norm to group norm of a model that is there already, each converter in turn in each
round, a number the least of the rounds: ours copying and in place, `opacus.validators.ModuleValidator.fix` (which
copies, and resets gain and bias), torch's `SyncBatchNorm.convert_sync_batchnorm` (in place), and composer's
`replace_module_classes` (in place; resets too), where it is there: `pip install --no-deps mosaicml`, since it pins an
old torch and its surgery needs nothing but torch. "10,000 norms" is a made net. Peak memory is what a process of its
own held at most, above one that only builds the model, as a multiple of the model's size; a copy is 1. The command is
`normswap convert FILE --to gn` on a whole module; the bare script imports the same libraries, loads and saves. "Graph
analysis" is the part of a conversion that traces forwards, of the largest models by number of modules and of those with
the most branches, beside `torch.fx.symbolic_trace`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import math
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from common import Row, main, peak_of
from scale import stack
from torch import fx, nn
from torchvision import models

import normswap
from normswap.analysis.dataflow import find_flow
from normswap.analysis.sites import find_sites

MADE = "10,000 norms"
BARE = (
    "import torch, torchvision, safetensors, rich.console, typer\n"
    "torch.save(torch.load('model.pt', weights_only=False), 'bare.pt')"
)


def build(name: str) -> nn.Module:
    return stack(10_000) if name == MADE else models.get_model(name, weights=None)


def opacus(model: nn.Module) -> Any:
    from opacus.validators import ModuleValidator

    return ModuleValidator.fix(model)


def composer(model: nn.Module) -> Any:
    surgery = importlib.import_module("composer.utils.module_surgery")

    def group_norm(old: nn.Module, index: int) -> nn.Module:
        assert isinstance(old, nn.BatchNorm2d)
        return nn.GroupNorm(math.gcd(32, old.num_features), old.num_features)

    return surgery.replace_module_classes(model, {nn.BatchNorm2d: group_norm})


def _has_composer() -> bool:
    """Whether composer's files are there; its packages are stood in for, so that only its surgery is imported."""
    found = importlib.util.find_spec("composer")
    if found is None or found.submodule_search_locations is None:
        return False
    root = Path(next(iter(found.submodule_search_locations)))
    for name, folder in (("composer", root), ("composer.utils", root / "utils")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    return True


CONVERTERS: dict[str, Callable[[nn.Module], Any]] = {
    "ours, copying": lambda model: normswap.convert(model, "gn"),
    "ours, in place": lambda model: normswap.convert(model, "gn", inplace=True),
    "opacus, copying": opacus,
    "torch's SyncBatchNorm, in place": nn.SyncBatchNorm.convert_sync_batchnorm,
}
if _has_composer():
    CONVERTERS["composer, in place"] = composer


def taken(convert: Callable[[nn.Module], Any], model: nn.Module) -> float:
    start = time.perf_counter()
    convert(model)
    return time.perf_counter() - start


def peak(name: str, converter: str) -> int:
    """Bytes that a process of its own held at most; one without a converter only builds the model."""
    code = f"import convert_time as c, opacus; model = c.build({name!r}); c.CONVERTERS.get({converter!r}, id)(model)"
    return peak_of(code)


def command(rounds: int) -> tuple[float, float]:
    """Seconds of the command and of a bare script on a ResNet-50, the least of the rounds each."""
    ours, bare = [], []
    with tempfile.TemporaryDirectory() as folder:
        torch.save(build("resnet50"), Path(folder) / "model.pt")
        asked = ["convert", "model.pt", "--to", "gn", "--quiet", "--overwrite"]
        for _ in range(rounds):
            for words, times in (
                ([sys.executable, "-c", BARE], bare),
                ([sys.executable, "-m", "normswap", *asked], ours),
            ):
                start = time.perf_counter()
                subprocess.run(words, cwd=folder, check=True, capture_output=True)
                times.append(time.perf_counter() - start)
    return min(ours), min(bare)


def conversions(names: list[str], rounds: int, memory: bool) -> Iterator[Row]:
    for name in names:
        model = build(name)
        size = sum(t.numel() * t.itemsize for t in model.state_dict().values())
        times: dict[str, list[float]] = {converter: [] for converter in CONVERTERS}
        for _ in range(rounds):
            for converter, convert in CONVERTERS.items():
                times[converter].append(taken(convert, copy.deepcopy(model)))
        del model
        floor = peak(name, "") if memory else 0
        for converter, found in times.items():
            held = (peak(name, converter) - floor) / size if memory else None
            yield {
                "model": name, "converter": converter, "seconds": min(found),
                "times": min(found) / min(times["ours, copying"]), "memory": held,
            }  # fmt: skip


def analyses(names: list[str], rounds: int) -> Iterator[Row]:
    """How layers are connected, of a model on the meta device, beside a trace by torch.fx, where that succeeds."""
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name.removeprefix("timm:")) if name.startswith("timm:") else build(name)
        sites = find_sites(model)
        gc.collect()
        gc.disable()  # as a conversion does
        ours = min(taken(partial(find_flow, sites=sites), model) for _ in range(rounds))
        try:
            times = ours / min(taken(fx.symbolic_trace, model) for _ in range(rounds))
        except fx.proxy.TraceError:
            times = None
        gc.enable()
        yield {"model": name, "converter": "graph analysis", "seconds": ours, "times": times, "memory": None}


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(arguments.threads)
    yield from conversions(list(filter(None, arguments.models.split(";"))), arguments.rounds, arguments.memory)
    yield from analyses(list(filter(None, arguments.graphs.split(";"))), arguments.rounds)
    if arguments.command:
        ours, bare = command(arguments.rounds)
        yield {"model": "resnet50", "converter": "the command", "seconds": ours, "times": ours / bare, "memory": None}


if __name__ == "__main__":
    names = f"resnet50;regnet_y_128gf;efficientnet_v2_l;{MADE}"
    largest = "efficientnet_v2_l;timm:resnetrs420;timm:efficientnetv2_xl;timm:efficientnet_l2;timm:hrnet_w64"
    branchy = "timm:mvitv2_huge_cls;timm:efficientvit_m5;timm:tiny_vit_21m_512;timm:mobilenetv5_300m"
    main(__doc__, measure, rounds=3, models=names, graphs=f"{largest};{branchy}", command=True, threads=2, memory=True)
