"""Which start, target and number of groups to take: trained networks of the world, fine-tuned on other tasks.

Run: python tests/bench/real_fine_tune.py --data FOLDER [--json] [--results FILE [--add]] [--networks A,B] [--tasks
"shifted;animals"] [--starts "bn;gn auto"] [--batches 2] [--seeds 2] [--rates 2e-4,6e-4,1.8e-3] [--share 1.0]
[--test 700] [--processes 2] [--threads 1]; about two hours on two cores. What the folder has, and which packages the
networks come with, says real_networks.py. --share makes every number of steps (BUDGETS, below) so much shorter; --test
takes so many pictures to test on.

Tasks: "shifted", the ten classes of CIFAR-10 in pictures whose channels are in another order (blue, red, green), that
are turned by 0, 90, 180 or 270 degrees at random, and fainter (a third of the contrast); "few pictures", the same with
ten pictures of each class to train on; "fewer classes", cats, deer, dogs and horses in plain pictures, told apart by a
new head; "animals", whether a picture of ImageNet, of 96×96 pixels, turned and fainter in the same way, shows an animal
or a thing, by a new head. No picture is in two of the parts to train, to choose a rate, and to test on,
and none of CIFAR-10's was ever trained on.

Every start gets the same: AdamW with a rate that falls to 0 by a cosine, the best of the rates by the accuracy on
pictures apart (half the steps), then all steps for each seed, which orders the pictures. Each number is top-1 on the
pictures to test: the mean over the seeds, with its standard deviation. "steps" are the steps done of the whole budget,
so those in between are not yet cooled down. Rows come on stderr as they are done.
"""

from __future__ import annotations

import argparse
import copy
import functools
import multiprocessing
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import Row, main, mean_spread, numbers
from digits import accuracy
from fine_tune import fine_tune, trial_of
from picture import Chart, draw
from real_networks import (
    cifar_labels,
    cifar_pictures,
    cifar_resnet,
    data_folder,
    efficientnet_lite,
    imagenet_pictures,
)  # fmt: skip
from torch import Tensor, nn

import normswap

STARTS: dict[str, dict[str, Any] | None] = {
    "bn": None,
    "frozen": {"to": "frozen"},
    "est": {"to": "est"},
    "gn reset": {"to": "gn", "transfer": "reset"},
    "gn copied": {"to": "gn", "transfer": "copy"},
    "gn auto": {"to": "gn"},
    "gn 1": {"to": "gn", "groups": 1},
    "gn 4": {"to": "gn", "groups": 4},
    "gn 8": {"to": "gn", "groups": 8},
    "gn 16": {"to": "gn", "groups": 16},
    "gn 32": {"to": "gn", "groups": 32},
    "gn for use": {"to": "gn", "purpose": "use"},
    "gn-ws auto": {"to": "gn-ws"},
    "gn-ws 1": {"to": "gn-ws", "groups": 1},
    "gn-ws 8": {"to": "gn-ws", "groups": 8},
    "gn-ws for use": {"to": "gn-ws", "purpose": "use"},
    "bcn": {"to": "bcn"},
}
"""By name: the options of the conversion; those without a word on it are matched."""
BUDGETS: dict[tuple[str, str], dict[int, int]] = {
    ("ResNet-20", "shifted"): {1: 400, 2: 400, 8: 200, 32: 50},
    ("ResNet-20", "fewer classes"): {2: 100},
    ("ResNet-20", "few pictures"): {2: 200},
    ("ResNet-56", "shifted"): {1: 200, 2: 200},
    ("ResNet-56", "fewer classes"): {2: 50},
    ("ResNet-56", "few pictures"): {2: 100},
    ("EfficientNet-Lite0", "animals"): {2: 100},
}
"""Steps at each batch size, by network and task."""
LOOKS = (25, 50, 100, 200)
"""Steps after which a network is looked at on its way, at batch 2."""
Pictures = tuple[Tensor, Tensor]


class Task(NamedTuple):
    """A trained network, with a new head where the task wants one, and pictures with their labels."""

    network: nn.Module
    train: Pictures
    apart: Pictures
    test: Pictures


# ---- tasks ----


@functools.lru_cache(maxsize=1)
def task_of(network: str, task: str, folder: Path) -> Task:
    if network == "EfficientNet-Lite0":
        net = efficientnet_lite(0)
        net._fc = _head(net._fc, 2)
        images, classes = imagenet_pictures(folder, 96)
        images, labels = shifted(images), (classes >= ANIMALS).long()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        parts = [order[:200], order[200:250], order[250:]]
        return Task(net, *((images[part], labels[part]) for part in parts))
    net = cifar_resnet(int(network.removeprefix("ResNet-")), folder)
    images, labels = cifar_pictures(folder, "test2000"), cifar_labels(folder)
    if task != "fewer classes":
        images = shifted(images)
    parts = [(images[part], labels[part]) for part in (slice(1000), slice(1000, 1300), slice(1300, 2000))]
    if task == "fewer classes":
        net.linear = _head(net.linear, len(FOUR_FOOTED))
        parts = [_only(part, FOUR_FOOTED) for part in parts]
    if task == "few pictures":
        parts[0] = _first_of_each_class(parts[0], 10)
    return Task(net, *parts)


ANIMALS = 398  # ImageNet's classes before this one
FOUR_FOOTED = (3, 4, 5, 7)  # CIFAR-10's cats, deer, dogs and horses


def shifted(images: Tensor) -> Tensor:
    """In other colours, turned by a multiple of 90 degrees, and fainter, as this script's head says."""
    turns = torch.randint(4, (len(images),), generator=torch.Generator().manual_seed(0)).tolist()
    turned = [torch.rot90(image, turn, (1, 2)) for image, turn in zip(images[:, [2, 0, 1]], turns, strict=True)]
    return torch.stack(turned) / 3


def _head(old: Any, classes: int) -> nn.Module:
    """A new one, the same for every start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(old.in_features, classes)


def _only(pictures: Pictures, classes: tuple[int, ...]) -> Pictures:
    images, labels = pictures
    chosen = torch.isin(labels, torch.tensor(classes))
    return images[chosen], torch.tensor([classes.index(label) for label in labels[chosen].tolist()])


def _first_of_each_class(pictures: Pictures, number: int) -> Pictures:
    images, labels = pictures
    chosen = torch.cat([(labels == label).nonzero()[:number, 0] for label in labels.unique()])
    return images[chosen], labels[chosen]


# ---- runs ----


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    data_folder(arguments.data)  # before anything is started
    starts = arguments.starts.split(";") if arguments.starts else [*STARTS]
    networks, tasks = arguments.networks.split(","), arguments.tasks.split(";")
    pairs = [(network, task) for network, task in BUDGETS if network in networks and task in tasks]
    if not pairs or {*starts} - {*STARTS}:
        raise SystemExit(f"--networks, --tasks: some of {[*BUDGETS]}; --starts: some of {[*STARTS]}")
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for rows in pool.imap(_cell, [(arguments, *pair, start) for pair in pairs for start in starts]):
            print(rows[-1], file=sys.stderr, flush=True)
            yield from rows


def _cell(asked: tuple[argparse.Namespace, str, str, str]) -> list[Row]:
    """All rows of one network, task and start."""
    arguments, name, task_name, start = asked
    torch.set_num_threads(arguments.threads)
    task = task_of(name, task_name, data_folder(arguments.data))
    # In an order of its own, so that fewer are of all kinds.
    order = torch.randperm(len(task.test[1]), generator=torch.Generator().manual_seed(0))[: arguments.test]
    test = task.test[0][order], task.test[1][order]
    options = STARTS[start]
    net = task.network if options is None else normswap.convert(task.network, **options).model
    same = {"network": name, "task": task_name, "start": start}
    before = mean_spread([accuracy(net, *test)])
    rows: list[Row] = [{**same, "batch": "", "rate": "", "steps": 0, "accuracy": before, "samples": len(order)}]
    for batch, whole in BUDGETS[name, task_name].items():
        if batch not in numbers(arguments.batches):
            continue
        steps = max(2, round(arguments.share * whole))
        rates = [float(rate) for rate in arguments.rates.split(",")]
        scores = {rate: trial_of(net, *task.train, task.apart, rate, batch, steps // 2) for rate in rates}
        best = max(scores, key=lambda rate: scores[rate])
        found: dict[int, list[float]] = defaultdict(list)
        for seed in range(arguments.seeds):
            model = copy.deepcopy(net)
            for done in fine_tune(model, *task.train, best, batch, steps, seed, LOOKS if batch == 2 else ()):
                found[done].append(accuracy(model, *test))
        rows += [
            {
                **same,
                "batch": batch,
                "rate": best,
                "steps": done,
                "accuracy": mean_spread(values),
                "samples": len(order),
            }
            for done, values in found.items()
        ]
    return rows


SHOWN = ("bn", "frozen", "gn reset", "gn copied", "gn auto", "gn for use", "gn-ws auto", "gn-ws for use", "bcn")


def picture(rows: list[Row]) -> str:
    """For each network and task, some starts over the steps at batch 2."""
    charts = []
    for network, task in dict.fromkeys((row["network"], row["task"]) for row in rows):
        mine = [row for row in rows if (row["network"], row["task"]) == (network, task) and row["batch"] in ("", 2)]
        series = {
            start: {str(row["steps"]): 100 * row["accuracy"]["mean"] for row in mine if row["start"] == start}
            for start in dict.fromkeys(row["start"] for row in mine)
            if start in SHOWN
        }
        charts += [Chart(f"{network}, {task}, batch 2", "steps", "top-1, %", series)] if series else []
    return draw(charts)


if __name__ == "__main__":
    main(
        __doc__,
        measure,
        picture,
        data=None,
        networks="ResNet-20,ResNet-56,EfficientNet-Lite0",
        tasks="shifted;fewer classes;few pictures;animals",
        starts="",
        batches="1,2,8,32",
        seeds=2,
        rates="2e-4,6e-4,1.8e-3",
        share=1.0,
        test=700,
        processes=2,
        threads=1,
    )
