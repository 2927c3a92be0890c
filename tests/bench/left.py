"""The share of norms and convolutions that a conversion leaves, by reason, over architectures of other libraries.

Run: python tests/bench/left.py [--json] [--targets gn-ws,fold] [--members 3] [--libraries timm,...] [--name NAME].
Of each file of architectures in timm and torchvision so many members are taken, spread over the list of their names;
with them come nets of efficientnet_pytorch, segmentation_models_pytorch, ultralytics and torch_geometric. All are built
without memory, where they can be, and without trained values. `--name` is what the results call this version of
normswap: with `--add`, two versions stand beside each other in a table.
"""

from __future__ import annotations

import argparse
import re
import signal
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from common import Row, main
from torch import nn

from normswap.conversion.pipeline import run
from normswap.conversion.request import Request
from normswap.errors import NormswapError
from normswap.report.report import Report
from normswap.targets.target import parse_target

SECONDS = 120  # of processor time, for one conversion
Makers = dict[str, Callable[[], nn.Module]]


def spread(names: list[str], most: int) -> list[str]:
    """At most so many of a sorted list, the first and the last among them."""
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / max(1, most - 1))] for i in range(most)]


def by_file(names: list[str], file_of: Callable[[str], str], members: int) -> list[str]:
    files = defaultdict(list)
    for name in sorted(names):
        files[file_of(name)].append(name)
    return [name for group in files.values() for name in spread(group, members)]


def of_timm(members: int) -> Makers:
    import timm

    names = by_file(timm.list_models(), lambda name: timm.models.model_entrypoint(name).__module__, members)
    return {name: partial(timm.create_model, name) for name in names}


def of_torchvision(members: int) -> Makers:
    from torchvision import models

    names = by_file(models.list_models(), lambda name: models.get_model_builder(name).__module__, members)
    bare: dict[str, Any] = {"weights": None}
    detectors = ("rcnn", "retinanet", "fcos", "ssd", "deeplab", "fcn", "lraspp")
    return {
        name: partial(models.get_model, name, **bare, **({"weights_backbone": None} if is_any(name, detectors) else {}))
        for name in names
    }


def is_any(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name for part in parts)


def of_efficientnet_pytorch(members: int) -> Makers:
    from efficientnet_pytorch import EfficientNet

    return {f"efficientnet-b{i}": partial(EfficientNet.from_name, f"efficientnet-b{i}") for i in (0, 4, 7)[:members]}


def of_segmentation_models_pytorch(members: int) -> Makers:
    import segmentation_models_pytorch as smp

    encoders = ("resnet18", "efficientnet-b0", "timm-regnetx_002", "mobilenet_v2", "densenet121", "xception", "dpn68")
    heads = (smp.Unet, smp.FPN, smp.DeepLabV3Plus, smp.PSPNet, smp.UnetPlusPlus, smp.Linknet, smp.PAN, smp.MAnet)
    nets = {f"{head.__name__}, {name}": (head, name) for name in encoders[:2] for head in heads[: 2 * members]}
    nets |= {f"Unet, {name}": (smp.Unet, name) for name in encoders}
    return {label: partial(head, name, encoder_weights=None) for label, (head, name) in nets.items()}


def of_ultralytics(members: int) -> Makers:
    from ultralytics import YOLO

    names = ("yolov8n", "yolo11n", "yolov8n-seg", "yolov8n-pose", "yolov5n", "yolov9t", "yolov10n")
    return {name: lambda name=name: YOLO(f"{name}.yaml").model for name in names[: 2 * members]}


def of_torch_geometric(members: int) -> Makers:
    from torch_geometric import nn as graphs

    kinds = (graphs.GCN, graphs.GraphSAGE, graphs.GIN, graphs.GAT, graphs.PNA, graphs.EdgeCNN)
    some: dict[type[nn.Module], Row] = {
        graphs.PNA: {"aggregators": ["mean"], "scalers": ["identity"], "deg": torch.ones(3)}
    }
    return {kind.__name__: partial(kind, 8, 16, 3, norm="batch_norm", **some.get(kind, {})) for kind in kinds}


LIBRARIES: dict[str, Callable[[int], Makers]] = {
    "timm": of_timm,
    "torchvision": of_torchvision,
    "efficientnet_pytorch": of_efficientnet_pytorch,
    "segmentation_models_pytorch": of_segmentation_models_pytorch,
    "ultralytics": of_ultralytics,
    "torch_geometric": of_torch_geometric,
}


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """Without memory where the architecture can be built so."""
    try:
        with torch.device("meta"):
            return make().eval()
    except Exception:  # an architecture computes with values as it is built
        return make().eval()


def general(reason: str) -> str:
    """A reason without names and numbers of the one layer."""
    reason = re.sub(r" \(.*\)|: .*|, (?:so|which|of an input) .*", "", reason)
    reason = re.sub(r"\bhas a (?:forward|_conv_forward) of its own\b.*", "has a forward of its own", reason)
    reason = re.sub(r"\b(?:an?|is part of|is) [A-Z]\w+\b", "is a class", reason)
    reason = re.sub(r"^[A-Z]\w+ is", "is", reason)
    return re.sub(r"\d+", "N", reason)


class TooSlow(Exception):
    """A conversion takes more than `SECONDS`."""


def converted(model: nn.Module, target: str) -> Report | str:
    """The report of a conversion, or why there is none."""

    def stop(*_: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return run(model, Request(parse_target(target), may_be_idle=True)).report
    except NormswapError as error:
        return f"not converted: {general(str(error))}"
    except TooSlow:
        return f"not converted in {SECONDS} s"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def count(report: Report, target: str) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """How many norms and convolutions there are that a target is for, and how many are left for each reason."""
    kinds = {"norm": not target.startswith("w"), "weight": target.endswith(("ws", "wn"))}
    left = Counter((entry.kind, general(entry.reason)) for entry in report.left if kinds[entry.kind])
    own = [change for change in report.changes if kinds[change.kind] and change.before != change.after]
    total = Counter(change.kind for change in own for _ in change.paths)
    for (kind, _), number in left.items():
        total[kind] += number
    return total, left


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    warnings.simplefilter("ignore")
    targets = arguments.targets.split(",")
    for library in arguments.libraries.split(",") if arguments.libraries else LIBRARIES:
        totals: dict[str, Counter[str]] = {target: Counter() for target in targets}
        left: dict[str, Counter[tuple[str, str]]] = {target: Counter() for target in targets}
        models = Counter[str]()
        for name, make in LIBRARIES[library](arguments.members).items():
            model = built(make)
            for target in targets:
                found = converted(model, target)
                if isinstance(found, str):
                    left[target]["model", f"{name}: {found}"] += 1
                    continue
                models[target] += 1
                total, reasons = count(found, target)
                totals[target] += total
                left[target] += reasons
        for target in targets:
            head = {"version": arguments.name, "library": library, "models": models[target], "target": target}
            for kind in ("norm", "weight"):
                mine = sum(n for (of, _), n in left[target].items() if of == kind)
                if totals[target][kind]:
                    yield {**head, "kind": kind, "layers": totals[target][kind], "left": mine, "reason": "(all)"}
            for (kind, reason), number in left[target].most_common():
                yield {**head, "kind": kind, "layers": totals[target][kind], "left": number, "reason": reason}


if __name__ == "__main__":
    main(__doc__, measure, targets="gn-ws,fold", members=3, libraries="", name="this one")
