"""How the time of a conversion grows with the number of norms, and what memory it takes in place.

Run: python tests/bench/scale.py [--json]. A tenfold of norms may take at most 12 times the time; the memory above the
model at most 5% of it.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator

import torch
from common import Row, main
from torch import Tensor, nn

import normswap


class LayerScale(nn.Module):
    """A forward that reads a parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def stack(norms: int, scaled: bool = False) -> nn.Module:
    """3×3 convolutions of 8 channels, each with a norm behind it, ten a stage; with `scaled`, a layer scale too."""

    def block(channels: int) -> nn.Module:
        last = [LayerScale()] if scaled else []
        return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *last)

    stages = [nn.Sequential(*(block(8) for _ in range(10))) for _ in range(norms // 10)]
    stages[0][0] = block(3)
    return nn.Sequential(*stages)


def times(target: str, scaled: bool = False) -> Iterator[Row]:
    before = None
    for norms in (100, 1000, 10000):
        model, best = stack(norms, scaled), float("inf")
        for _ in range(3):
            start = time.perf_counter()
            normswap.convert(model, target)
            best = min(best, time.perf_counter() - start)
        ratio = best / before if before else None
        yield {"what": f"{target}, {norms} norms{', scaled' * scaled}", "seconds": best, "times the tenth": ratio}
        before = best


def peak() -> int:
    """Peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(target: str, name: str) -> Row:
    """Peak of an in-place conversion above the peak of the model alone."""
    from torchvision import models

    with torch.device("meta"):
        warm = models.resnet18()
    normswap.convert(warm, target)  # imports and caches
    torch.manual_seed(0)
    model = models.get_model(name)
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    before, start = peak(), time.perf_counter()
    normswap.convert(model, target, inplace=True)
    above = (peak() - before) / size
    return {
        "what": f"{target} in place, {name}",
        "seconds": time.perf_counter() - start,
        "memory above the model": above,
    }


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    columns = ("what", "seconds", "times the tenth", "memory above the model")
    rows = [*times("gn-ws"), *times("gn-ws", scaled=True), *times("fold"), memory("gn-ws", arguments.model)]
    yield from ({column: row.get(column, "") for column in columns} for row in rows)


if __name__ == "__main__":
    main(__doc__, measure, model="regnet_y_128gf")
