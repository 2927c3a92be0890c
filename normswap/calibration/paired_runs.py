"""A network and its converted one, run side by side without leaving a trace in either, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from normswap.analysis.running import as_arguments, temporary_hooks
from normswap.calibration.sample_moments import sample_moments

TRAINED = ("weight", "bias", "group_weight", "group_bias")
"""What is fitted of each norm."""
TRAINED_RECURRENT = ("gain_", "bias_")
"""How the names begin of what is fitted of a recurrent layer with layer normalization inside."""
_OUTPUT_WEIGHT = 50.0  # of the network's output in the loss, beside the mean over its norms
_TAPS = 8  # norms, spread over the network, whose outputs are in the loss: each one costs passes over its gradient
_TAP_POSITIONS, _OUTPUT_POSITIONS = 64, 1024  # of a sample, at most, where norms and the network's output are compared
_SURE, _LOST = 2.0, 1.645  # standard errors: what a gain is beyond for sure, and a loss that is chance up to 1 in 20
_CACHE = 1 << 30  # bytes of the teacher's outputs that are kept; the others are computed again each time
_SEED = 0

Train = Literal["norms", "biases", "all"]
"""What is fitted: gains and biases of the changed norms, and beside these all biases, or all parameters."""
ComparedPart = Literal["output", "norms"]
"""Where two networks are compared: at their output, or at the outputs of the changed norms."""
Tap = tuple[str, int]
"""The path of a norm, and how many times it had been called before."""
Watch = Callable[[Tap, Tensor], Tensor | None]
"""From the call of a norm and its output to the output that it shall have, or None for the same."""
ChannelMoments = tuple[Tensor, Tensor]
"""Variance and mean of each channel, (C,)."""


@dataclass(frozen=True)
class Outputs:
    """What one forward gave, at a grid of positions."""

    tensors: list[Tensor]
    """The floating-point tensors of the network's output."""
    taps: dict[Tap, Tensor]
    """The output of each call of a tapped norm."""
    moments: dict[Tap, ChannelMoments]
    """Of the output of each call of a norm, over all positions; for the teacher alone."""


class Distance(NamedTuple):
    """How far outputs are from the teacher's, for each sample and tensor: by rows, the first dimension of a tensor."""

    moved: Tensor = torch.zeros(0, dtype=torch.float64)
    """Square of the difference, (rows,)."""
    size: Tensor = torch.zeros(0, dtype=torch.float64)
    """Square of the teacher's outputs, (rows,)."""
    agreed: Tensor = torch.zeros(0, dtype=torch.float64)
    """The share of first choices that are the teacher's, (rows with choices,)."""

    def with_rows(self, other: Distance) -> Distance:
        """Both."""
        return Distance(*(torch.cat(pair) for pair in zip(self, other, strict=True)))

    @property
    def relative(self) -> float:
        size = self.size.sum().item()
        return math.sqrt(self.moved.sum().item() / size) if size > 0 else math.nan

    @property
    def top1(self) -> float | None:
        return self.agreed.mean().item() if len(self.agreed) else None

    def sure_gain(self, other: Distance) -> float:
        """How much nearer than `other` it is for sure: the mean over the samples, less two standard errors.

        Both are of the same samples, so the differences of each are what counts, of squares over the sample's own size:
        one loud sample shall not decide.
        """
        nearer = ((other.moved - self.moved) / self.size)[self.size > 0]
        return mean_of(nearer) - _SURE * error_of_mean(nearer)

    def is_better(self, other: Distance) -> bool:
        """Nearer for sure, and no more first choices lost than may be chance."""
        if not self.relative < other.relative:
            return False
        lost = other.agreed - self.agreed
        return self.sure_gain(other) >= 0 and mean_of(lost) <= _LOST * error_of_mean(lost)


class FittedPair:
    """The teacher, the student, and the values that are fitted.

    The values are wide copies of parameters of the student. Its forwards run on them, by `functional_call`; the
    student's own parameters get them in the end, or never.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, paths: Sequence[str], train: Train = "norms"):
        self.teacher, self.student, self.paths = teacher, student, tuple(paths)
        self.tapped = _spread(self.paths, _TAPS)
        self._teacher_tensors, self._student_tensors = _tensors_of(teacher), _tensors_of(student)
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in student.named_parameters():
            path, _, last = name.rpartition(".")
            of_norm = path in self.paths and (last in TRAINED or last.startswith(TRAINED_RECURRENT))
            if parameter.is_floating_point() and (of_norm or train == "all" or (train == "biases" and "bias" in last)):
                self.parameters[name] = parameter
        self.values = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32)).clone().requires_grad_()
            for name, p in self.parameters.items()
        }
        self.cache: dict[int, tuple[Any, Outputs]] = {}  # by the id of the batch, which stays with them
        self._cache_left = _CACHE

    def copy_values(self) -> list[Tensor]:
        return [value.detach().clone() for value in self.values.values()]

    def set_values(self, copies: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for value, copy in zip(self.values.values(), copies, strict=True):
                value.copy_(copy)

    def write_values(self) -> None:
        """Give the student the fitted values."""
        for name, parameter in self.parameters.items():
            with torch.inference_mode(parameter.is_inference()), torch.no_grad():
                parameter.copy_(self.values[name])

    def teacher_outputs(self, batch: Any) -> Outputs:
        """The teacher's outputs on a batch; kept where there is room."""
        if id(batch) in self.cache:
            return self.cache[id(batch)][1]
        taps: dict[Tap, Tensor] = {}
        moments: dict[Tap, ChannelMoments] = {}

        def watch(tap: Tap, output: Tensor) -> None:
            if output.dim() > 1 and output.numel():
                moments[tap] = channel_moments(output)
            if tap[0] in self.tapped:
                taps[tap] = on_grid(output, _TAP_POSITIONS).clone()  # what follows may write to it

        with torch.no_grad():
            tensors = _forward(self.teacher, self._teacher_tensors, batch, self.paths, watch)
        outputs = Outputs([tensor.clone() for tensor in tensors], taps, moments)
        size = _bytes_of(outputs)
        if size <= self._cache_left:
            self._cache_left -= size
            self.cache[id(batch)] = batch, outputs
        return outputs

    def forget(self, batch: Any) -> None:
        """The teacher's outputs on a batch, which does not come again."""
        _, outputs = self.cache.pop(id(batch), (None, Outputs([], {}, {})))
        self._cache_left += _bytes_of(outputs)

    def student_outputs(self, batch: Any) -> Outputs:
        """The student's outputs on a batch, with the values as they now are."""
        taps: dict[Tap, Tensor] = {}

        def watch(tap: Tap, output: Tensor) -> None:
            taps[tap] = on_grid(output, _TAP_POSITIONS).clone()

        return Outputs(self.run_student(batch, self.tapped, watch), taps, {})

    def run_student(self, batch: Any, paths: Collection[str], watch: Watch) -> list[Tensor]:
        """The student's output on a batch; `watch` is told of the calls of the norms at `paths`."""
        values = {name: value.to(self.parameters[name].dtype) for name, value in self.values.items()}
        return _forward(self.student, {**self._student_tensors, **values}, batch, paths, watch)

    def loss(self, batch: Any) -> Tensor:
        """Mean square error over variance: the mean of it over the norms, and of the outputs."""
        wanted, given = self.teacher_outputs(batch), self.student_outputs(batch)
        norms = [relative_square(given.taps[tap], wanted.taps[tap]) for tap in wanted.taps if tap in given.taps]
        outputs = [relative_square(a, b) for a, b in zip(given.tensors, wanted.tensors, strict=False)]
        loss = torch.zeros((), dtype=torch.float32)
        for weight, parts in ((1.0, norms), (_OUTPUT_WEIGHT, outputs)):
            found = [part for part in parts if part is not None]
            if found:
                loss = loss.to(found[0].device) + weight * torch.stack([p.to(found[0].device) for p in found]).mean()
        return loss

    def distance(self, batches: Sequence[Any], place: ComparedPart | None = None) -> tuple[Distance, ComparedPart]:
        """How far the student now is from the teacher on `batches`, and where: at `place`, or wherever it can be told.

        That is the output if it holds numbers to compare, else the norms.
        """
        at_output, at_norms = Distance(), Distance()
        for batch in batches:
            with torch.no_grad():
                wanted, given = self.teacher_outputs(batch), self.student_outputs(batch)
            for number, (a, b) in enumerate(zip(given.tensors, wanted.tensors, strict=False)):
                at_output = at_output.with_rows(_distance_of(a, b, ranked=number == 0))
            for tap in wanted.taps.keys() & given.taps.keys():
                at_norms = at_norms.with_rows(_distance_of(given.taps[tap], wanted.taps[tap], ranked=False))
        place = place or ("output" if at_output.size.sum() > 0 else "norms")
        return (at_output if place == "output" else at_norms), place


def _bytes_of(outputs: Outputs) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in (*outputs.taps.values(), *outputs.tensors))


# ---- a forward that leaves no trace ----


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters without gradient, and copies of the buffers, which a forward may write to."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    return {name: t.clone() if t.is_inference() else t for name, t in (parameters | buffers).items()}


def _forward(
    model: nn.Module, tensors: dict[str, Tensor], batch: Any, paths: Collection[str], watch: Watch
) -> list[Tensor]:
    """The output of `model` on `tensors` in place of its own: floating-point tensors, at a grid of positions.

    `watch` is told of each call of the layers at `paths`.
    """
    calls = dict.fromkeys(paths, 0)

    def note(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        tap = path, calls[path]
        calls[path] += 1
        return watch(tap, output) if isinstance(output, Tensor) and output.is_floating_point() else None

    with temporary_hooks([model.get_submodule(path).register_forward_hook(partial(note, path)) for path in paths]):
        torch.manual_seed(_SEED)  # a forward that draws numbers draws the same in both
        batch = pytree.tree_map_only(Tensor, Tensor.clone, batch)
        args, kwargs = as_arguments(batch)
        output = functional_call(model, tensors, args, kwargs)
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [on_grid(leaf, _OUTPUT_POSITIONS) for leaf in leaves]


def random_state_kept() -> AbstractContextManager[None]:
    """torch's random state, on every device in use, comes back afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return torch.random.fork_rng(devices=devices)


# ---- comparing ----


def _spread(paths: Sequence[str], count: int) -> tuple[str, ...]:
    """At most `count` of `paths`, evenly spread, with the last."""
    count = min(count, len(paths))
    return tuple(paths[(i + 1) * len(paths) // count - 1] for i in range(count))


def on_grid(values: Tensor, positions: int) -> Tensor:
    """`values`, (N, C, *spatial), at evenly spaced positions, at most about so many; all others pass as they are."""
    dims = values.dim() - 2
    if dims < 1 or math.prod(values.shape[2:]) <= positions:
        return values
    most = math.ceil(positions ** (1 / dims))  # along each dimension
    steps = [max(1, math.ceil(size / most)) for size in values.shape[2:]]
    return values[(slice(None), slice(None), *(slice(step // 2, None, step) for step in steps))]


def channel_moments(values: Tensor) -> ChannelMoments:
    """Variance and mean a channel of values of shape (N, C, *spatial)."""
    return sample_moments(values).over_samples()


def channel_map(given: ChannelMoments, wanted: ChannelMoments) -> tuple[Tensor, Tensor]:
    """Ratio and shift a channel that take moments `given` to those `wanted`; a constant channel is only shifted."""
    (var, mean), (to_var, to_mean) = given, wanted
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


def _distance_of(given: Tensor, wanted: Tensor, ranked: bool) -> Distance:
    """The distance of one tensor; `ranked` counts too how many argmaxes over dimension 1 agree."""
    if given.shape != wanted.shape or not wanted.numel() or not wanted.isfinite().all():
        return Distance()
    a, b = (tensor.detach().double().reshape(len(tensor) if tensor.dim() else 1, -1) for tensor in (given, wanted))
    moved, size = (a - b).square().sum(1).cpu(), b.square().sum(1).cpu()
    if not ranked or wanted.dim() not in (2, 4) or wanted.shape[1] < 2:
        return Distance(moved, size)
    same = given.argmax(1) == wanted.argmax(1)
    return Distance(moved, size, same.double().flatten(1).mean(1).cpu() if same.dim() > 1 else same.double().cpu())


def mean_of(values: Tensor) -> float:
    """0 of none."""
    return values.mean().item() if len(values) else 0.0


def error_of_mean(values: Tensor) -> float:
    """The standard error of the mean; 0 where one value or none does not tell it."""
    return (values.var() / len(values)).sqrt().item() if len(values) > 1 else 0.0
