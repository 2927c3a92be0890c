"""Small networks of torchvision and timm, trained with BatchNorm: what the benchmarks of accuracy convert.

Run: python tests/bench/nets.py [--json] [--cache FOLDER] [--seeds 3], to train them all and to see how well they do.
The architectures are the libraries' own, made narrow so that each trains on one core within half a minute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from common import Row, main
from digits import Data, accuracy, digits
from gratings import gratings
from timm.models import mobilenetv3, regnet
from timm.models import resnet as timm_resnet
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models import efficientnet, vgg

FLOOR = 0.97  # a net that learnt less, the mean over its seeds, says nothing of what conversion keeps


def resnet(block: type[nn.Module], width: int) -> nn.Module:
    channels = tuple(width * 2**stage for stage in range(4))
    return timm_resnet.ResNet(block, (2, 2, 2, 2), num_classes=10, stem_width=width, channels=channels)


def vgg11() -> nn.Module:
    plan: list[str | int] = [16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 128, 128, "M"]
    net = vgg.VGG(vgg.make_layers(plan, batch_norm=True), num_classes=10)
    net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(128, 10)
    return net


def densenet() -> nn.Module:
    return models.DenseNet(growth_rate=16, block_config=(4, 4, 4), num_init_features=32, num_classes=10)


def regnetx() -> nn.Module:
    shape = regnet.RegNetCfg(depth=10, w0=24, wa=24.0, wm=2.2, group_size=8, stem_width=16)
    return regnet.RegNet(shape, num_classes=10)


def efficientnet_b0() -> nn.Module:
    rows = [
        (1, 3, 1, 32, 16, 1),
        (6, 3, 2, 16, 24, 2),
        (6, 5, 2, 24, 40, 2),
        (6, 3, 2, 40, 80, 2),
        (6, 5, 1, 80, 112, 2),
        (6, 5, 2, 112, 192, 2),
    ]
    settings = [efficientnet.MBConvConfig(*row, width_mult=0.35) for row in rows]
    return efficientnet.EfficientNet(settings, dropout=0.0, stochastic_depth_prob=0.0, num_classes=10, last_channel=512)


def mlp() -> nn.Module:
    layers: list[nn.Module] = [nn.AvgPool2d(3), nn.Flatten()]
    for before, after in ((432, 128), (128, 128), (128, 128)):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


class Recipe(NamedTuple):
    """How to make a net, its peak learning rate, and the epochs that it is trained for on each task; 0: not at all."""

    make: Callable[[], nn.Module]
    rate: float
    digits: int
    gratings: int = 0


NETS = {
    "ResNet-18": Recipe(lambda: resnet(timm_resnet.BasicBlock, 24), 4e-3, 7, 4),
    "ResNet-26": Recipe(lambda: resnet(timm_resnet.Bottleneck, 16), 4e-3, 8, 4),
    "VGG-11-bn": Recipe(vgg11, 3e-3, 8),
    "DenseNet": Recipe(densenet, 5e-3, 8),
    "MobileNetV2": Recipe(lambda: models.mobilenet_v2(num_classes=10, width_mult=0.35), 8e-3, 16),
    "MobileNetV3": Recipe(lambda: mobilenetv3.mobilenetv3_small_050(num_classes=10, drop_rate=0.0), 8e-3, 16),
    "RegNetX": Recipe(regnetx, 5e-3, 12, 8),
    "ShuffleNetV2": Recipe(lambda: models.shufflenet_v2_x0_5(num_classes=10), 8e-3, 12),
    "EfficientNet": Recipe(efficientnet_b0, 8e-3, 10),
    "MLP": Recipe(mlp, 3e-3, 20),
}
TASKS: dict[str, Callable[[], Data]] = {"digits": digits, "gratings": gratings}


def train(
    net: nn.Module, images: Tensor, labels: Tensor, rate: float, epochs: int, batch: int = 50, seed: int = 1
) -> nn.Module:
    """Train `net` with AdamW and a one-cycle rate, on images that are moved by up to three pixels."""
    generator = torch.Generator().manual_seed(seed)
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * (len(labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for part in order[: len(labels) // batch * batch].split(batch):
            dy, dx = torch.randint(-3, 4, (2,), generator=generator).tolist()
            loss = F.cross_entropy(net(images[part].roll((dy, dx), (2, 3))), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net


def pairs() -> list[tuple[str, str]]:
    """Every task with every net that is trained on it, by name."""
    return [(task, name) for task in TASKS for name, recipe in NETS.items() if getattr(recipe, task)]


def trained(
    name: str, cache: Path | None = None, task: str = "digits", seed: int = 0, data: Data | None = None
) -> nn.Module:
    """The net called `name`, trained on a task; its weights are kept in the folder `cache`, if one is given."""
    recipe = NETS[name]
    torch.manual_seed(seed)
    net = recipe.make().to(memory_format=torch.channels_last)  # faster for most of them
    file = cache / f"{name}.{task}.{seed}.pt" if cache else None
    if file is not None and file.exists():
        net.load_state_dict(torch.load(file))
        return net.eval()
    images, labels, _, _ = data or TASKS[task]()
    train(net, images, labels, recipe.rate, getattr(recipe, task), seed=seed + 1)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), file)
    return net.eval()


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(arguments.threads)
    for task, name in pairs():
        data = TASKS[task]()
        for seed in range(arguments.seeds):
            start = time.perf_counter()
            net = trained(name, Path(arguments.cache) if arguments.cache else None, task, seed, data)
            seconds = time.perf_counter() - start
            yield {"task": task, "net": name, "seed": seed, "accuracy": accuracy(net, *data[2:]), "seconds": seconds}


if __name__ == "__main__":
    main(__doc__, measure, cache=None, seeds=3, threads=1)
