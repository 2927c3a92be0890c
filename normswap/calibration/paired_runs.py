"""Forwards of two models, run without leaving a trace in them, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from normswap.analysis.drift import floating_tensors, same_first_choices
from normswap.analysis.running import SEED, as_arguments, eval_mode, temporary_hooks

ChangeOutput = Callable[[str, Tensor], Tensor]
Tap = tuple[str, int]  # the path of a norm, and how many times it had been called before


@dataclass
class Outputs:
    """What one forward gave: the output of each norm that it reached, and the floating-point tensors of the output."""

    taps: dict[Tap, Tensor]
    tensors: list[Tensor]


@dataclass
class Error:
    """How far outputs are from the original's: sums over batches."""

    moved: float = 0.0
    size: float = 0.0
    agreed: float = 0.0
    asked: int = 0

    @property
    def relative(self) -> float:
        return math.sqrt(self.moved / self.size) if self.size > 0 else math.nan

    def is_better(self, other: Error) -> bool:
        """Nearer, and no fewer of the first choices lost."""
        return self.relative < other.relative and (self.top1 or 0.0) >= (other.top1 or 0.0)

    @property
    def top1(self) -> float | None:
        return self.agreed / self.asked if self.asked else None


# ---- a forward that leaves no trace ----


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters without gradient, and copies of the buffers, which a forward may write to."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    return {name: t.clone() if t.is_inference() else t for name, t in (parameters | buffers).items()}


def forward(
    model: nn.Module, tensors: dict[str, Tensor], batch: Any, paths: Sequence[str], change: ChangeOutput | None = None
) -> Outputs:
    taps: dict[Tap, Tensor] = {}
    calls = dict.fromkeys(paths, 0)

    def watch(path: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, Tensor) and output.is_floating_point():
                output = output if change is None else change(path, output)
                taps[path, calls[path]] = output.clone()  # what follows may write to it
            calls[path] += 1
            return output

        return model.get_submodule(path).register_forward_hook(note)

    with temporary_hooks([watch(path) for path in paths]):
        torch.manual_seed(SEED)  # a forward that draws numbers draws the same in both
        batch = pytree.tree_map_only(Tensor, Tensor.clone, batch)
        args, kwargs = as_arguments(batch)
        output = functional_call(model, tensors, args, kwargs)
    return Outputs(taps, floating_tensors(output))


@contextmanager
def both_evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode in all of `models`, with gradients."""
    with eval_mode(models[0]), eval_mode(models[-1]), torch.enable_grad():
        yield


@contextmanager
def same_randomness() -> Iterator[None]:
    """torch's random state, on every device in use, as it was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        yield


# ---- comparing ----


def matching(given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Ratio and shift with which `given` has the mean and variance of `wanted` a channel; a constant channel is only shifted."""
    dims = [0, *range(2, given.dim())]
    (var, mean), (to_var, to_mean) = (torch.var_mean(t.float(), dims, correction=0) for t in (given, wanted))
    alive = var > var.max() * 1e-6
    ratio = torch.where(alive, to_var / torch.where(alive, var, 1), 1).sqrt()
    return ratio, to_mean - ratio * mean


def relative_square(given: Tensor, wanted: Tensor) -> Tensor | None:
    """Mean square error over the variance of `wanted`; None where the two cannot be compared."""
    if given.shape != wanted.shape or not wanted.numel() or not wanted.isfinite().all():
        return None
    given, wanted = given.float(), wanted.float()
    spread = wanted.var(correction=0) if wanted.numel() > 1 else wanted.square().mean()
    return (given - wanted).square().mean() / spread if spread > 0 else None


def add(error: Error, given: Tensor, wanted: Tensor, ranked: bool) -> None:
    """Count one tensor in; where it is `ranked`, over dimension 1, the share of argmaxes that agree too."""
    if given.shape != wanted.shape or not wanted.isfinite().all():
        return
    a, b = given.detach().double(), wanted.double()
    error.moved += (a - b).square().sum().item()
    error.size += b.square().sum().item()
    if ranked and (same := same_first_choices(a, b)) is not None:
        error.agreed += same.double().sum().item()
        error.asked += same.numel()
