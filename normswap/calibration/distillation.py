"""Label-free distillation: the new norms of a converted network learn to give what the original's gave.

The network is run as it is, from input to output; its norms' gains and biases are fitted so that the output of each changed
norm, and the network's, come near the original's on the same samples: mean square error over variance. Adam, at a rate that
falls to 0 as the time runs out. No label is needed, no weight is touched, and what helped is told by samples held out.

It starts from the better of matched values and statistics re-estimated layer by layer. Measured as in tests/bench/calibration.py,
256 unlabelled samples, top-1 on pictures never seen, seconds of one core:
- gn: matched, then distilled: DenseNet 96.0, 99.5 of 99.5 (80 steps, 12 s); ResNet-18 92.2, 97.2 of 99.2 (60 steps, 14 s);
  MobileNetV2 87.2 (re-estimated 88.7), 96.7 of 98.7 (150 steps, 42 s). Re-estimation alone gains nothing on ResNet-18.
- gn-ws strict, where matching cannot know what the filters' means did: ResNet-18 matched 11, re-estimated 92.7, distilled 96.5
  (40 steps, 11 s). Leaving the stem helps: 95.2 and 97.2. Re-estimated, without and with the stem left: DenseNet 89.4, 97.5;
  MobileNetV2 23, 38.
What did not win: all parameters instead of the norms' (DenseNet 99.5 too, and every weight changed); a weight of 1 or 10 for the
output beside the norms (MobileNetV2 after 200 steps 96.0, 96.5; 97.0 with 50); an error over each channel's own variance
(96.0), the sum over the norms (94.7); rates of 0.003 (95.0) and 0.03 (95.7), or relative to each tensor's size (94.7 to 96.2).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normswap.analysis.running import batch_size
from normswap.calibration.paired_runs import (
    ChangeOutput,
    Error,
    Outputs,
    Tap,
    add,
    both_evaluating,
    forward,
    matching,
    relative_square,
    same_randomness,
    tensors_of,
)
from normswap.errors import first_line
from normswap.report.report import Calibration

TRAINED = ("weight", "bias", "group_weight", "group_bias")
"""What is fitted of each norm."""
RECURRENT = ("gain_", "bias_")
"""How the names begin of what is fitted of a recurrent layer with layer normalization inside."""
_STEPS = 2000  # passes over a few hundred samples by the hundred: enough for the rate to fall slowly
_BATCH = 32  # most samples a step
_SHARE = 5  # one sample in so many is held out
_LEAST = 10  # samples with which there is anything to fit and to hold out
_RATE, _WARM = 1e-2, 20  # Adam's highest rate, reached after so many steps; of weights, times their root mean square
_OUTPUT = 50.0  # weight of the network's output beside the mean over its norms
_PATIENCE = 20  # passes without a better loss before the rate falls at once
_CACHE = 1 << 30  # bytes of the original's outputs that are kept; the others are computed again each time
_EXACT = 1e-6  # an error that needs no repair
_SEED = 0


def distill(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[Any],
    paths: Sequence[str],
    *,
    seconds: float,
    steps: int = _STEPS,
    train: str = "norms",
    progress: Callable[[float], None] = lambda share: None,
) -> Calibration:
    """Fit the norms of `student` at `paths` to what `teacher` gives there and at its output, on unlabelled `batches`.

    Both have these paths; a batch is what `running.call` takes. At most `seconds` and `steps`; `progress` is told the share
    that is done. About a fifth of the samples is held out, and the fitted values are written only if on these the
    output is nearer to the teacher's, and its top-1 agrees no less. Where nothing can be compared at the output, the norms' outputs
    are. All else of both models, torch's random state too, stays bit by bit; nothing is raised for a model that
    cannot be fitted: the note says why.
    """
    started = time.monotonic()
    fitted, held = split(batches)
    samples, held_out = (sum(map(batch_size, part)) for part in (fitted, held))
    outcome = Calibration(samples + held_out, held_out, "matched")
    try:
        if not held:
            return replace(outcome, note=f"too few samples to fit anything: at least {_LEAST}")
        with torch.inference_mode(False), torch.enable_grad(), same_randomness(), both_evaluating(teacher, student):
            fit = _Fit(teacher, student, paths, train)
            outcome = fit.run(fitted, held, outcome, started, seconds, steps, progress)
    except Exception as error:  # the forward is anybody's code
        outcome = replace(outcome, note=f"not fitted: {type(error).__name__}: {first_line(error)}")
    progress(1.0)
    return replace(outcome, seconds=time.monotonic() - started)


class _Fit:
    """The two models, and the values that are fitted: wide copies, which the student's own tensors get in the end, or never."""

    def __init__(self, teacher: nn.Module, student: nn.Module, paths: Sequence[str], train: str):
        self.teacher, self.student, self.paths = teacher, student, tuple(paths)
        self.given, self.fixed = tensors_of(teacher), tensors_of(student)
        self.own: dict[str, nn.Parameter] = {}
        for name, parameter in student.named_parameters():
            path, _, last = name.rpartition(".")
            norm = path in self.paths and (last in TRAINED or last.startswith(RECURRENT))
            if parameter.is_floating_point() and (norm or train == "all" or (train == "biases" and "bias" in last)):
                self.own[name] = parameter
        self.values = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32)).clone().requires_grad_()
            for name, p in self.own.items()
        }
        self.scale = 1024.0 if any(p.dtype == torch.float16 for p in student.parameters()) else 1.0  # small gradients
        self.cache: dict[int, Outputs] = {}
        self.left = _CACHE

    def run(
        self,
        fitted: Sequence[Any],
        held: Sequence[Any],
        outcome: Calibration,
        started: float,
        seconds: float,
        steps: int,
        progress: Callable[[float], None],
    ) -> Calibration:
        """Fit, compare on the held-out samples, and write what is better."""
        if not self.own:
            return replace(outcome, note="the changed norms have no gain and no bias to fit")
        begun = time.monotonic()
        before, measure = self.error(held)
        comparing = time.monotonic() - begun
        outcome = replace(outcome, measure=measure, matched_error=before.relative, matched_top1=before.top1)
        if not before.relative > _EXACT:
            why = "nothing to repair" if before.relative <= _EXACT else "nothing could be compared"
            return replace(outcome, note=why)
        deadline = started + seconds - comparing  # the last comparison takes as long as the first
        best, kept = before, self.copies()
        self.restate(fitted, deadline - comparing)
        tried, _ = self.error(held, measure)
        if tried.is_better(before):
            best, kept = tried, self.copies()
        self.take(kept)
        done, note = self.descend(fitted, deadline, steps, progress)
        if done and not note:
            fit, _ = self.error(held, measure)
            tried = fit if fit.is_better(best) or best is before else best
            kept = self.copies() if fit.is_better(best) else kept
        elif not done and not note:
            note = "there was no time for a step of distillation"
        outcome = replace(outcome, steps=done, calibrated_error=tried.relative, calibrated_top1=tried.top1, note=note)
        if not tried.is_better(before):
            return outcome
        self.take(kept)
        self.write()
        return replace(outcome, kept="calibrated")

    def copies(self) -> list[Tensor]:
        return [value.detach().clone() for value in self.values.values()]

    def take(self, copies: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for value, copy in zip(self.values.values(), copies, strict=True):
                value.copy_(copy)

    def restate(self, batches: Sequence[Any], deadline: float) -> None:
        """Give each norm the gain and bias with which, a channel, its output's mean and variance are the original's.

        In the order of execution, each norm on what the restated ones before it give; on each batch, and the mean over batches.
        """
        maps: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for index, batch in enumerate(batches):
            if time.monotonic() > deadline:
                break
            found: dict[str, tuple[Tensor, Tensor]] = {}
            with torch.no_grad():
                self.converted(batch, partial(self.restated, self.original(index, batch).taps, found))
            for path, pair in found.items():
                maps.setdefault(path, []).append(pair)
        with torch.no_grad():
            for path, pairs in maps.items():
                ratio, shift = (torch.stack(part).mean(0) for part in zip(*pairs, strict=True))
                self.values[f"{path}.weight"].mul_(ratio)
                self.values[f"{path}.bias"].mul_(ratio).add_(shift)

    def restated(
        self, wanted: Mapping[Tap, Tensor], found: dict[str, tuple[Tensor, Tensor]], path: str, output: Tensor
    ) -> Tensor:
        """`output` with the moments that the first call of its norm should have; what that takes goes into `found`."""
        target = wanted.get((path, 0))
        if path not in found and target is not None and target.shape == output.shape and self.is_plain(path, output):
            found[path] = matching(output, target)
        if path not in found:
            return output
        ratio, shift = (v.view(-1, *[1] * (output.dim() - 2)).to(output.dtype) for v in found[path])
        return output * ratio + shift

    def is_plain(self, path: str, output: Tensor) -> bool:
        """Whether a norm's output is its gain times something plus its bias, and both are fitted."""
        norm = self.student.get_submodule(path)
        if norm._modules or "group_weight" in norm._parameters:
            return False
        both = [self.values.get(f"{path}.{name}") for name in ("weight", "bias")]
        return all(v is not None and v.shape == output.shape[1:2] for v in both)

    def descend(
        self, batches: Sequence[Any], deadline: float, steps: int, progress: Callable[[float], None]
    ) -> tuple[int, str]:
        """Adam on the values; the number of steps, and what went wrong."""
        rates = [
            _RATE * (1.0 if v.dim() < 2 else v.detach().square().mean().sqrt().item()) for v in self.values.values()
        ]
        optimizer = torch.optim.Adam([{"params": [value]} for value in self.values.values()])
        generator = torch.Generator().manual_seed(_SEED)
        begun = time.monotonic()
        best, stale, summed, step, told = math.inf, 0, 0.0, 0, 0.0
        order: list[int] = []
        while True:
            share = max((time.monotonic() - begun) / max(deadline - begun, 1e-9), step / steps if steps else 1.0)
            if share >= 1:
                return step, ""
            if share >= told + 0.01:
                progress(told := share)
            if not order:
                if step:
                    best, stale = (summed, 0) if summed < 0.99 * best else (best, stale + 1)
                    summed = 0.0
                if stale == _PATIENCE:  # on to the last fifth of the schedule: a small rate takes the noise out
                    steps = min(steps, step * 5 // 4 + 1)
                order = torch.randperm(len(batches), generator=generator).tolist()
            index = order.pop()
            loss = self.loss(batches[index], self.original(index, batches[index]))
            if not loss.requires_grad:
                return step, "no gradient reaches the norms: the forward detaches its tensors"
            gradients = torch.autograd.grad(loss * self.scale, list(self.values.values()), allow_unused=True)
            if not loss.isfinite() or not all(g is None or g.isfinite().all() for g in gradients):
                return step, "the fit met values that are not finite"
            for value, gradient in zip(self.values.values(), gradients, strict=True):
                value.grad = gradient
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, (step + 1) / _WARM) * 0.5 * (1 + math.cos(math.pi * share))
            optimizer.step()
            summed += loss.item()
            step += 1

    def loss(self, batch: Any, wanted: Outputs) -> Tensor:
        """Mean square error over variance: the mean of it over the norms, and of the outputs."""
        given = self.converted(batch)
        norms = [relative_square(given.taps[tap], wanted.taps[tap]) for tap in wanted.taps if tap in given.taps]
        outputs = [relative_square(a, b) for a, b in zip(given.tensors, wanted.tensors, strict=False)]
        loss = torch.zeros((), dtype=torch.float32)
        for weight, parts in ((1.0, norms), (_OUTPUT, outputs)):
            found = [part for part in parts if part is not None]
            if found:
                loss = loss.to(found[0].device) + weight * torch.stack([p.to(found[0].device) for p in found]).mean()
        return loss

    def error(self, held: Sequence[Any], measure: str = "") -> tuple[Error, str]:
        """How far the student now is from the teacher on `held`: at the output, else at the norms; and which."""
        at_output, at_norms = Error(), Error()
        for batch in held:
            with torch.no_grad():
                wanted, given = self.original(None, batch), self.converted(batch)
            for number, (a, b) in enumerate(zip(given.tensors, wanted.tensors, strict=False)):
                add(at_output, a, b, ranked=number == 0)
            for tap in wanted.taps.keys() & given.taps.keys():
                add(at_norms, given.taps[tap], wanted.taps[tap], ranked=False)
        measure = measure or ("output" if at_output.size > 0 else "norms")
        return (at_output if measure == "output" else at_norms), measure

    def original(self, index: int | None, batch: Any) -> Outputs:
        """The teacher's outputs on a batch; those of an `index` are kept where they fit."""
        if index is not None and index in self.cache:
            return self.cache[index]
        with torch.no_grad():
            outputs = forward(self.teacher, self.given, batch, self.paths)
        size = sum(t.numel() * t.itemsize for t in (*outputs.taps.values(), *outputs.tensors))
        if index is not None and size <= self.left:
            self.left -= size
            self.cache[index] = outputs
        return outputs

    def converted(self, batch: Any, change: ChangeOutput | None = None) -> Outputs:
        """The student's outputs on a batch, with the values as they now are, norms' outputs as `change` makes them."""
        values = {name: value.to(self.own[name].dtype) for name, value in self.values.items()}
        return forward(self.student, {**self.fixed, **values}, batch, self.paths, change)

    def write(self) -> None:
        for name, parameter in self.own.items():
            with torch.inference_mode(parameter.is_inference()), torch.no_grad():
                parameter.copy_(self.values[name])


# ---- samples ----


def split(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Batches of at most 32 samples to fit on, and about every fifth held out; none held out where all are too few.

    A batch that is a tensor, or arguments that all are tensors of one first dimension, is cut along that; any other counts
    as one sample and stays whole.
    """
    total = sum(map(batch_size, batches))
    if total < _LEAST:
        return list(batches), []
    most = min(_BATCH, total // _SHARE)
    pieces = [piece for batch in batches for piece in _cut(batch, most)]
    return [p for i, p in enumerate(pieces) if i % _SHARE != 2], pieces[2::_SHARE]


def _cut(batch: Any, most: int) -> list[Any]:
    size = batch_size(batch)
    if size <= most:
        return [batch]
    return [_rows(batch, slice(at, at + most)) for at in range(0, size, most)]


def _rows(batch: Any, part: slice) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[part], batch)
