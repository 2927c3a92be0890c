"""Label-free distillation: the new norms of a converted network learn to give what the original's gave.

The network is run as it is, from input to output; its norms' gains and biases are fitted so that the network's output,
and those of some changed norms, come near the original's on the same samples: mean square error over variance. Adam,
at a rate that falls to 0 as the time runs out. No label is needed, no weight is touched, and samples that are held out
tell what helped.

Few norms on a grid of positions are enough, and the original's outputs there are small enough to be kept, so that it is
run once a batch. ResNet-20 on CIFAR-10, 512 pictures, 200 steps; held-out error, top-1 on 2,000 others (.806 before,
.777 matched in groups chosen on data), seconds of one core: every norm in full .291, .797, 34 s; every norm at 64
positions .291, .797, 25 s; eight norms at 64 positions .291, .797, 23 s; the output alone .292, .797, 22 s.

The held-out samples are looked at six times on the way: what came nearest is kept, and where they say that it went too
far, the fit goes back there and on at half the rate. ResNet-20 as above, matched on the data (sample_moments.py) to
.791, then 150 steps of 32; held-out error and top-1: without looking .289, .796, with .288, .801; at a rate of 0.003
.288, .800 and .292, .797; of 0.001 without .293, .796; a standard error of these differences is .005.

What few samples say is weighed: a gain counts less two standard errors, and the mean of the first and the best values
is taken where its gain is the surer one (Wortsman et al. 2022 average so). ResNet-20, ten times 64 pictures, 60 steps,
top-1 of 1,000 others, its mean and the largest loss: matched .802; the best .800, .015; halfway .804, .003.

Sixteen samples a step, which cost what 32 do in half the steps: ResNet-20 on 640 pictures (error .340, .788), tested on
2,000, 400 steps of 16 at a rate of 0.005 .293, .799; 200 of 32 at 0.01 .293, .801. EfficientNet-Lite0 on 250 pictures
of 128 pixels (.584), from .610, .520: 160 steps of 16 at 0.005 .493, .540, at 0.01 .488, .524 (a standard error of
.02); 32 steps of 32 at 0.01 had brought .511 of error. At 224 pixels (.844), from .599, .796: 50 steps of 32 .500,
.796; 100 at 0.003, on mirrored pictures too, .479, .824. CREPE tiny: pitch .998, matched .989, 100 steps of 32 at 0.01
.996, at 0.003 .997, of errors .091 and .097.

It starts from the better of matched values and statistics re-estimated layer by layer. Measured as in
tests/bench/calibration.py, 256 unlabelled samples, top-1 on pictures never seen, seconds of one core:
- gn: matched, then distilled: DenseNet 96.0, 99.5 of 99.5 (80 steps, 12 s); ResNet-18 92.2, 97.2 of 99.2 (60 steps, 14
  s); MobileNetV2 87.2 (re-estimated 88.7), 96.7 of 98.7 (150 steps, 42 s). Re-estimation alone gains nothing on
  ResNet-18.
- gn-ws strict, where matching cannot know what the filters' means did: ResNet-18 matched 11, re-estimated 92.7,
  distilled 96.5 (40 steps, 11 s). Leaving the stem helps: 95.2 and 97.2. Re-estimated, without and with the stem left:
  DenseNet 89.4, 97.5; MobileNetV2 23, 38.

Few pictures are mirrored too, for a run of the original more: EfficientNet-Lite0 at 128 pixels, 160 steps of 16,
.484, .556, without .493, .540; ResNet-20, 150 steps .286, .796 for .292, .797. At 224 pixels, from .583, .764, 200
steps on 200 pictures and their mirror images .473, .792; from the 90th on little less of error on those held out.

What did not win: all parameters instead of the norms' (DenseNet 99.5 too, and every weight changed); a weight of 1 or
10 for the output beside the norms (MobileNetV2 after 200 steps 96.0, 96.5; 97.0 with 50); an error over each channel's
own variance (96.0), the sum over the norms (94.7); rates of 0.003 (95.0) and 0.03 (95.7), or relative to each tensor's
size (94.7 to 96.2).
On ResNet-20, 640 pictures, as above: all weights too, at a rate of 0.001 of their size, .286, .798 for .293, .801;
weighted means of two pictures as one (Zhang et al. 2018) .340 of held-out error for .298.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normswap.analysis.running import batch_size, eval_mode
from normswap.calibration.batches import further_batches
from normswap.calibration.interruption import Stop, ended_by_ctrl_c
from normswap.calibration.paired_runs import (
    ChannelMoments,
    ComparedPart,
    Distance,
    FittedPair,
    Tap,
    Train,
    channel_map,
    channel_moments,
    random_state_kept,
)
from normswap.errors import first_line
from normswap.report.report import Calibration

_BATCH = 16  # most samples a step
_SHARE = 5  # one sample in so many is held out
LEAST_SAMPLES = 10
"""With fewer there is nothing to fit and to hold out."""
_RATE, _WARM = 5e-3, 20  # Adam's highest rate, reached after so many steps; of weights, times their root mean square
_FEW = 256  # samples of pictures that are mirrored too
_USES = 4  # passes in which a batch serves, where there are further ones
_PATIENCE = 20  # passes without a better loss before the rate falls at once
_LOOK_EACH = 0.15  # of the schedule: how often the held-out samples are looked at
_RE_ESTIMATION = 0.2  # of the time, at most, goes into statistics layer by layer
_EXACT = 1e-6  # a relative error that needs no repair
_SEED = 0

ShareProgress = Callable[[float], None]
"""Called with the share that is done, from 0 to 1."""


@dataclass(frozen=True)
class FitSettings:
    """How long to fit, and what."""

    seconds: float
    """At most so long, comparisons included."""
    steps: int = 2000
    """At most so many; the default is passes over a few hundred samples by the hundred: the rate falls slowly."""
    train: Train = "norms"
    """What is fitted."""


class Samples(NamedTuple):
    """Batches by what they are for."""

    fitted: list[Any]
    held_out: list[Any]
    further: Iterator[Any]
    """To be fitted on after the first ones, read as they are asked for."""


def distill(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[Any],
    paths: Sequence[str],
    settings: FitSettings,
    progress: ShareProgress = lambda share: None,
) -> Calibration:
    """Fit the norms of `student` at `paths` to what `teacher` gives there and at its output, on unlabelled `batches`.

    Both have these paths; a batch is what `running.call_model` takes. About a fifth of the samples is held out, and
    the fitted values are written only if on these the output is nearer to the teacher's, and its top-1 agrees no less.
    Where nothing can be compared at the output, the norms' outputs are. All else of both models, torch's random state
    too, stays bit by bit; nothing is raised for a model that cannot be fitted: the note says why.
    """
    started = time.monotonic()
    samples = split(batches)
    fitted, held_out = (sum(map(batch_size, part)) for part in (samples.fitted, samples.held_out))
    outcome = Calibration(fitted + held_out, held_out, "matched")
    try:
        if not held_out:
            return replace(outcome, note=f"too few samples to fit anything: at least {LEAST_SAMPLES}")
        with torch.inference_mode(False), random_state_kept(), eval_mode(teacher), eval_mode(student):
            pair = FittedPair(teacher, student, paths, settings.train)
            outcome = _fit_and_compare(pair, samples, outcome, settings, started, progress)
    except Exception as error:  # the forward is anybody's code
        outcome = replace(outcome, note=f"not fitted: {type(error).__name__}: {first_line(error)}")
    progress(1.0)
    return replace(outcome, seconds=time.monotonic() - started)


@torch.enable_grad()
def _fit_and_compare(
    pair: FittedPair,
    samples: Samples,
    outcome: Calibration,
    settings: FitSettings,
    started: float,
    progress: ShareProgress,
) -> Calibration:
    """Fit, compare on the held-out samples, and write what is better."""
    if not pair.values:
        return replace(outcome, note="the changed norms have no gain and no bias to fit")
    begun = time.monotonic()
    before, place = pair.distance(samples.held_out)
    comparing = time.monotonic() - begun
    outcome = replace(outcome, measure=place, matched_error=before.relative, matched_top1=before.top1)
    if not before.relative > _EXACT:
        why = "nothing to repair" if before.relative <= _EXACT else "nothing could be compared"
        return replace(outcome, note=why)
    deadline = started + settings.seconds - 2 * comparing  # the last two comparisons take less than the first
    best = _Best(pair, samples.held_out, place, before)
    stock = _Stock(pair, samples)
    schedule = _Schedule(len(stock.batches), settings.steps, deadline)
    with ended_by_ctrl_c() as stop:
        _re_estimate(pair, samples.fitted, started + _RE_ESTIMATION * (deadline - started), stop)
        best.look()
        best.put_back()
        problem = _descend(pair, stock, schedule, best, stop, progress) or stock.problem
    if schedule.is_sound and schedule.step:
        best.look()
    elif not problem:
        problem = "there was no time for a step of distillation"
    if best.distance is not before:
        best.look_halfway()
    result = best.tried if best.distance is before else best.distance  # what was tried is told even where it is worse
    found: dict[str, Any] = {"calibrated_error": result.relative, "calibrated_top1": result.top1}
    outcome = replace(outcome, samples=outcome.samples + stock.read, steps=schedule.step, note=problem, **found)
    if not result.is_better(before):
        return outcome
    best.put_back()
    pair.write_values()
    return replace(outcome, kept="calibrated")


# ---- statistics, layer by layer ----


def _re_estimate(pair: FittedPair, batches: Sequence[Any], deadline: float, stop: Stop = lambda: False) -> None:
    """Give each norm the gain and bias with which, a channel, its output's mean and variance are the original's.

    In the order of execution, each norm on what the norms before it give once they are corrected; on each batch, and
    the mean over batches.
    """
    maps: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for batch in batches:
        if time.monotonic() > deadline or stop():
            break
        for path, found in _channel_maps(pair, batch).items():
            maps.setdefault(path, []).append(found)
    with torch.no_grad():
        for path, pairs in maps.items():
            ratio, shift = (torch.stack(part).mean(0) for part in zip(*pairs, strict=True))
            pair.values[f"{path}.weight"].mul_(ratio)
            pair.values[f"{path}.bias"].mul_(ratio).add_(shift)


def _channel_maps(pair: FittedPair, batch: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """By path, ratio and shift a channel with which the output of each norm has the original's moments on a batch."""
    wanted = pair.teacher_outputs(batch).moments
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def correct(tap: Tap, output: Tensor) -> Tensor | None:
        """`output` with the moments that the first call of its norm should have."""
        path, target = tap[0], wanted.get((tap[0], 0))
        if path not in found and target is not None and _is_affine(pair, path, output, target):
            found[path] = channel_map(channel_moments(output), target)
        if path not in found:
            return None
        ratio, shift = (v.view(-1, *[1] * (output.dim() - 2)).to(output.dtype) for v in found[path])
        return output * ratio + shift

    with torch.no_grad():
        pair.run_student(batch, pair.paths, correct)
    return found


def _is_affine(pair: FittedPair, path: str, output: Tensor, target: ChannelMoments) -> bool:
    """Whether a norm's output is its gain times something plus its bias, both fitted, with channels as in `target`."""
    norm = pair.student.get_submodule(path)
    if norm._modules or "group_weight" in norm._parameters:
        return False
    both = [pair.values.get(f"{path}.{name}") for name in ("weight", "bias")]
    return all(v is not None and v.shape == output.shape[1:2] for v in (*both, target[1]))


# ---- descent ----


class _Best:
    """The values that came nearest on the held-out samples so far."""

    def __init__(self, pair: FittedPair, held_out: Sequence[Any], place: ComparedPart, distance: Distance):
        self.pair, self.held_out, self.place = pair, held_out, place
        self.distance = self.tried = self.start = distance
        self.values = self.first_values = pair.copy_values()

    def look(self) -> bool:
        """Compare the values as they are now; whether they are the best."""
        self.tried, _ = self.pair.distance(self.held_out, self.place)
        nearer = self.tried.relative < self.distance.relative
        if nearer:
            self.distance, self.values = self.tried, self.pair.copy_values()
        return nearer

    def look_halfway(self) -> None:
        """Compare the mean of the best values and the first; what is nearer for sure is the best from then on."""
        halfway = [(first + best) / 2 for first, best in zip(self.first_values, self.values, strict=True)]
        self.pair.set_values(halfway)
        distance, _ = self.pair.distance(self.held_out, self.place)
        if distance.sure_gain(self.start) > self.distance.sure_gain(self.start):
            self.distance, self.values = distance, halfway

    def put_back(self) -> None:
        self.pair.set_values(self.values)


class _Stock:
    """The batches to fit on, and few pictures mirrored.

    One that has served in some passes gives way to the next further one, where there is one.
    A batch is worth some passes: the original is run on it once.
    """

    def __init__(self, pair: FittedPair, samples: Samples):
        self.pair, self.batches, self.further = pair, list(samples.fitted), samples.further
        if sum(map(batch_size, self.batches)) <= _FEW:
            self.batches += [batch.flip(3) for batch in self.batches if _is_of_pictures(batch)]
        self.uses = [0] * len(self.batches)
        self.read = 0
        """How many further samples there were."""
        self.problem = ""
        """Why there were no more."""

    def take(self, number: int) -> Any:
        if self.uses[number] == _USES and (fresh := self._next()) is not None:
            self.pair.forget(self.batches[number])
            self.batches[number], self.uses[number] = fresh, 0
        self.uses[number] += self.uses[number] < _USES
        return self.batches[number]

    def _next(self) -> Any:
        try:
            fresh = next(self.further, None)
        except Exception as error:  # a loader is anybody's code
            self.problem = f"not all data could be read: {first_line(error)}"
            return None
        self.read += 0 if fresh is None else batch_size(fresh)
        return fresh


class _Schedule:
    """Which batch comes next, and how much of the descent is done: by the clock or by steps, whichever is further."""

    def __init__(self, batches: int, steps: int, deadline: float):
        self.batches, self.steps, self.deadline = batches, steps, deadline
        self.begun = math.inf
        self.generator = torch.Generator().manual_seed(_SEED)
        self.order: list[int] = []  # the rest of this pass over the batches
        self.step = 0
        self.loss, self.best_loss = 0.0, math.inf  # summed over this pass; of the best one
        self.stale_passes = 0
        self.is_sound = True  # nothing went wrong

    def begin(self) -> None:
        self.begun = time.monotonic()

    def share(self) -> float:
        by_clock = (time.monotonic() - self.begun) / max(self.deadline - self.begun, 1e-9)
        return max(by_clock, self.step / self.steps if self.steps else 1.0)

    def next_batch(self) -> int:
        """Each batch once in a pass, in a new order; passes that bring nothing shorten what is left."""
        if not self.order:
            if self.step:
                self.stale_passes += 1
                if self.loss < 0.99 * self.best_loss:
                    self.best_loss, self.stale_passes = self.loss, 0
                self.loss = 0.0
            if self.stale_passes == _PATIENCE:  # on to the last fifth of the schedule: a small rate takes the noise out
                self.steps = min(self.steps, self.step * 5 // 4 + 1)
            self.order = torch.randperm(self.batches, generator=self.generator).tolist()
        return self.order.pop()

    def rate(self, share: float) -> float:
        """The factor on Adam's highest rates: it rises over the first steps, and falls as half a cosine wave."""
        return min(1.0, (self.step + 1) / _WARM) * 0.5 * (1 + math.cos(math.pi * share))

    def count_step(self, loss: float) -> None:
        self.loss += loss
        self.step += 1


def _descend(
    pair: FittedPair,
    stock: _Stock,
    schedule: _Schedule,
    best: _Best,
    stop: Stop,
    progress: ShareProgress,
) -> str:
    """Adam on the values, until the schedule ends; what came in between.

    Where the held-out samples say that it went too far, it goes back to the best values, and on at half the rate.
    """
    values = list(pair.values.values())
    optimizer = _adam(values)
    highest = [group["lr"] for group in optimizer.param_groups]
    half = any(p.dtype == torch.float16 for p in pair.student.parameters())
    scale = 1024.0 if half else 1.0  # small gradients would vanish; Adam does not mind the factor
    reported, next_look = 0.0, _LOOK_EACH
    schedule.begin()
    while (share := schedule.share()) < 1:
        if stop():
            return f"stopped by Ctrl-C after {schedule.step} steps"
        if share >= reported + 0.01:
            progress(reported := share)
        if share >= next_look:
            next_look = share + _LOOK_EACH
            if not best.look():
                best.put_back()
                highest = [rate / 2 for rate in highest]
        loss = pair.loss(stock.take(schedule.next_batch()))
        if not loss.requires_grad:
            schedule.is_sound = False
            return "no gradient reaches the norms: the forward detaches its tensors"
        gradients = torch.autograd.grad(loss * scale, values, allow_unused=True)
        if not loss.isfinite() or not all(g is None or g.isfinite().all() for g in gradients):
            schedule.is_sound = False
            return "the fit met values that are not finite"
        for value, gradient in zip(values, gradients, strict=True):
            value.grad = gradient
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * schedule.rate(share)
        optimizer.step()
        schedule.count_step(loss.item())
    return ""


def _adam(values: Sequence[Tensor]) -> torch.optim.Adam:
    """Adam on `values`, a group for each of their rates: one for all vectors."""
    groups: dict[float, list[Tensor]] = {}
    for value in values:
        rate = _RATE * (1.0 if value.dim() < 2 else value.detach().square().mean().sqrt().item())
        groups.setdefault(rate, []).append(value)
    return torch.optim.Adam([{"params": params, "lr": rate} for rate, params in groups.items()], foreach=True)


# ---- samples ----


def split(batches: Sequence[Any]) -> Samples:
    """Batches of at most 16 samples to fit on, and about every fifth held out; none held out where all are too few.

    A batch that is a tensor, or arguments that all are tensors of one first dimension, is cut along that; any other
    counts as one sample and stays whole.
    """
    total = sum(map(batch_size, batches))
    if total < LEAST_SAMPLES:
        return Samples(list(batches), [], iter(()))
    most = min(_BATCH, total // _SHARE)
    pieces = [piece for batch in batches for piece in _cut(batch, most)]
    further = (piece for batch in further_batches(batches) for piece in _cut(batch, most))
    return Samples([p for i, p in enumerate(pieces) if i % _SHARE != 2], pieces[2::_SHARE], further)


def _is_of_pictures(batch: Any) -> bool:
    """Whether a batch may be mirrored: floats, (N, 3, height, width)."""
    return isinstance(batch, Tensor) and batch.dim() == 4 and batch.shape[1] == 3 and batch.is_floating_point()


def _cut(batch: Any, most: int) -> list[Any]:
    """A batch in parts of at most `most` samples."""
    size = batch_size(batch)
    if size <= most:
        return [batch]
    return [_rows(batch, slice(at, at + most)) for at in range(0, size, most)]


def _rows(batch: Any, part: slice) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[part], batch)
