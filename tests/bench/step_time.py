"""What weight standardization and weight normalization cost in training, beside other ways to write them.

Run: python tests/bench/step_time.py [--json] [--results FILE] [--batches 1,2,8] [--rounds 7] [--threads 2]; ten
minutes. A step is forward and backward of a ResNet-50 with GroupNorm at 224², in train mode; all variants take turns in
each round, and a number is the median over the rounds of the time as a multiple of the plain net's in the same round.
Then its weights alone (forward and backward of all that are standardized, no convolution), as a multiple of copying
them once; the forward in eval mode without gradients, of the plain net, of the converted one, and of that folded; and a
step of each net as `torch.compile` makes it, as a multiple of the plain one's. Peak memory is that of a process that
does two steps, above one that only builds the net, in MiB. "spelled out" is the paper's arithmetic, as in its code;
"timm" is `timm.layers.StdConv2d`; "torch" is `torch.nn.utils.parametrizations.weight_norm`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from common import Row, main, numbers, peak_of
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision import models

import normswap

SIZE = 224


class SpelledOut(nn.Conv2d):
    """Weight standardization as the authors' code has it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = _spelled_out(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return normswap.convert(models.resnet50(), "gn").model.train()


def _each(make: Callable[[nn.Conv2d], nn.Module]) -> nn.Module:
    """The plain net with every convolution made anew."""
    net = plain()
    for module in [*net.modules()]:
        for name, child in [*module.named_children()]:
            if type(child) is nn.Conv2d:
                setattr(module, name, make(child))
    return net


def _like(cls: type[nn.Conv2d], conv: nn.Conv2d) -> nn.Module:
    made = cls(
        conv.in_channels, conv.out_channels, conv.kernel_size, stride=conv.stride, padding=conv.padding,
        dilation=conv.dilation, groups=conv.groups, bias=conv.bias is not None,
    )  # fmt: skip
    made.load_state_dict(conv.state_dict())
    return made


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "ws, ours": lambda: normswap.convert(plain(), "ws").model.train(),
    "ws strict, ours": lambda: normswap.convert(plain(), "ws", ws="strict").model.train(),
    "ws, timm": lambda: _each(lambda conv: _like(StdConv2d, conv)),
    "ws, spelled out": lambda: _each(lambda conv: _like(SpelledOut, conv)),
    "wn, ours": lambda: normswap.convert(plain(), "wn").model.train(),
    "wn, torch": lambda: _each(parametrizations.weight_norm),
}


def step(net: nn.Module, x: Tensor) -> None:
    net.zero_grad(set_to_none=True)
    net(x).sum().backward()


def forward(net: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        net(x)


def compiled(net: nn.Module) -> nn.Module:
    """The net as torch compiles it. A high limit: dynamo takes many nets of one class for one that changes."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(net)  # type: ignore[return-value]


def weight_of(conv: nn.Module) -> Callable[[], Tensor]:
    """How a variant's convolution makes the weight that it runs with; that of a plain one is copied."""
    if hasattr(conv, "computed"):
        return conv.computed
    if isinstance(conv, StdConv2d):
        return lambda: F.batch_norm(
            conv.weight.reshape(1, conv.out_channels, -1), None, None, training=True, momentum=0.0, eps=conv.eps
        ).reshape_as(conv.weight)
    if isinstance(conv, SpelledOut):
        return lambda: _spelled_out(conv.weight)
    return (lambda: conv.weight) if hasattr(conv, "parametrizations") else lambda: conv.weight.clone()


def _spelled_out(weight: Tensor) -> Tensor:
    centred = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
    return centred / (centred.view(len(centred), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5)


def weights_step(net: nn.Module) -> Callable[[], None]:
    made = [weight_of(m) for m in net.modules() if isinstance(m, nn.Conv2d)]
    gradients = [torch.ones_like(make()) for make in made]

    def run() -> None:
        net.zero_grad(set_to_none=True)
        for make, gradient in zip(made, gradients, strict=True):
            make().backward(gradient)

    return run


def peak(name: str, batch: int, steps: int) -> float:
    """MiB that a process of its own held at most."""
    made = f"net = s.VARIANTS[{name!r}](); x = torch.randn({batch}, 3, {SIZE}, {SIZE})"
    start = "import step_time as s, torch; torch.set_num_threads(1)"
    return peak_of(f"{start}; {made}\nfor _ in range({steps}): s.step(net, x)") / 2**20


def compared(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, tuple[float, float]]:
    """Of each run the median seconds, and the median over rounds of its time as a multiple of the first's."""
    for run in runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    first = taken[next(iter(runs))]
    return {
        name: (
            statistics.median(times),
            statistics.median(mine / base for mine, base in zip(times, first, strict=True)),
        )
        for name, times in taken.items()
    }


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(arguments.threads)
    nets = {name: make() for name, make in VARIANTS.items()}
    for batch in numbers(arguments.batches):
        x = torch.randn(batch, 3, SIZE, SIZE)
        runs = {name: partial(step, net, x) for name, net in nets.items()}
        for row in _rows(f"step, batch {batch}", runs, arguments.rounds):
            name = row["variant"]
            yield row | {"MiB": peak(name, batch, 2) - peak(name, batch, 0) if arguments.memory else None}
    evaluated = {"plain": nets["plain"], "ws, ours": nets["ws, ours"], "wn, ours": nets["wn, ours"]}
    evaluated |= {f"{name}, folded": normswap.fold(evaluated[name]).model for name in ("ws, ours", "wn, ours")}
    for batch in numbers(arguments.batches):
        x = torch.randn(batch, 3, SIZE, SIZE)
        runs = {name: partial(forward, copy.deepcopy(net).eval(), x) for name, net in evaluated.items()}
        yield from _rows(f"eval, batch {batch}", runs, 3 * arguments.rounds)
    alone = {name: weights_step(copy.deepcopy(net)) for name, net in nets.items()}
    yield from _rows("weights alone", alone, 3 * arguments.rounds)
    if arguments.compiled:
        x = torch.randn(1, 3, SIZE, SIZE)
        runs = {name: partial(step, compiled(net), x) for name, net in nets.items()}
        yield from _rows("compiled, batch 1", runs, 3 * arguments.rounds)


def _rows(what: str, runs: dict[str, Callable[[], None]], rounds: int) -> Iterator[Row]:
    for name, (seconds, times) in compared(runs, rounds).items():
        yield {"what": what, "variant": name, "seconds": seconds, "times": times, "MiB": None}


if __name__ == "__main__":
    main(__doc__, measure, batches="1,2,8", rounds=7, threads=2, memory=True, compiled=True)
