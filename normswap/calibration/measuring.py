"""What data tells: the moments of the values that pass through each norm."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.analysis.known_norms import eps_of
from normswap.analysis.running import Seen, run_model, temporary_hooks
from normswap.analysis.sites import Site
from normswap.calibration.sample_moments import MatchedGroups, SampleMoments, normalized_in_groups, sample_moments
from normswap.errors import ModelError
from normswap.layers.matching import Moments, Statistics, as_affine, shrinking_eps, widen
from normswap.layers.recurrent_matching import VectorMoments, measured_moments, merge_moments

AUTO_GROUPS, AUTO_CHANNELS = 8, 4
"""`groups="auto"`: at most so many groups, with at least so many channels in each."""
_DATA = "calibration data"
_WAITING = 1 << 17  # samples' channels that wait at most


@dataclass(frozen=True)
class Measured:
    """What the data showed of one norm."""

    moments: Moments
    """Before and behind the norm, over all samples."""
    seen: Seen
    """The sizes of its input."""
    like: Tensor
    """Without elements: it has the dtype and the device of the input."""
    errors: Mapping[int, float] = field(default_factory=dict)
    """By number of groups: the square error, summed over the data, of the group norm that is matched to the norm."""
    gains: Mapping[int, float] = field(default_factory=dict)
    """By number of groups: by what the gain of that group norm is multiplied, as samples' statistics are not the
    data's."""


def auto_numbers(site: Site) -> list[int]:
    """The numbers of groups that `auto` chooses from."""
    numbers = [n for n in range(1, AUTO_GROUPS + 1) if n == 1 or site.channels // n >= AUTO_CHANNELS]
    return [n for n in numbers if site.channels % n == 0]


class _MomentGatherer:
    """Mean and variance over batches, merged by the parallel form of Chan, Golub & LeVeque 1983."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, moments: SampleMoments) -> None:
        var, mean = moments.over_samples()
        count = len(moments.mean) * moments.positions
        total = self.count + count
        delta = mean - self.mean.to(mean)
        self.squares = self.squares.to(var) + var * count + delta.square() * self.count * count / total
        self.mean = self.mean.to(mean) + delta * count / total
        self.count = total

    @property
    def var(self) -> Tensor:
        return self.squares / self.count


class _NormGatherer:
    """Gathers over batches what passes through one norm."""

    def __init__(self, site: Site, numbers: Sequence[int], shrinks: bool):
        self.site = site
        self.before = _MomentGatherer()
        self.behind = self.before if site.form == "data" else _MomentGatherer()
        self.like = torch.empty(0)
        self.waiting: list[SampleMoments] = []
        self.samples = 0
        self.compared: dict[int, tuple[Tensor, Tensor]] = {}
        self.tried: list[MatchedGroups] = []
        if numbers and site.form == "data":
            stats = running_statistics(site.module)
            self.tried = [MatchedGroups(stats, n, shrinking_eps(stats, n) if shrinks else stats.eps) for n in numbers]

    def add(self, values: Tensor) -> None:
        """`values` of shape (N, C, *spatial): an input of the norm."""
        moments = sample_moments(values)
        self.like = values.new_empty(0)
        if self.site.form != "data":
            self.before.add(moments)
            self.behind.add(self._normalized(values, moments))
            return
        if any(waiting.positions != moments.positions for waiting in self.waiting[:1]):
            self._take_in()
        self.waiting.append(moments)
        if sum(waiting.mean.numel() for waiting in self.waiting) > _WAITING:
            self._take_in()

    def _take_in(self) -> None:
        """Take in what is waiting, all at once: one by one, small batches would cost as much as a forward."""
        if not self.waiting:
            return
        means, variances, positions = zip(*self.waiting, strict=True)
        moments = SampleMoments(torch.cat(means), torch.cat(variances), positions[0])
        self.waiting = []
        self.before.add(moments)
        self.samples += len(moments.mean)
        for matched in self.tried:
            error, ratio = matched.compare(moments)
            errors, ratios = self.compared.get(matched.groups, (0.0, 0.0))
            self.compared[matched.groups] = errors + error, ratios + ratio

    def _normalized(self, values: Tensor, moments: SampleMoments) -> SampleMoments:
        """The moments of what the norm makes of `values`, before its last gain and bias."""
        site, eps = self.site, eps_of(self.site.module)
        if site.form in ("position", "last"):  # each position has statistics of its own
            normalized = F.layer_norm(values.movedim(1, -1), (site.channels,), eps=eps)
            return sample_moments(normalized.movedim(-1, 1))
        if site.form == "batch":
            batch = _MomentGatherer()
            batch.add(moments)
            scale = (batch.var + eps).rsqrt()
            return moments.mapped(scale, -batch.mean * scale)
        if site.form == "data, group":
            moments = moments.mapped(*as_affine(running_statistics(site.module)))
        return normalized_in_groups(moments, site.groups or site.channels, eps)

    def measured(self, seen: Seen) -> Measured:
        self._take_in()
        moments = Moments(self.before.mean, self.before.var, self.behind.mean, self.behind.var)
        if not all(values.isfinite().all() for values in moments):
            raise ModelError(f"{self.site.path}: its input on the calibration data is not finite")
        errors = {groups: float(error) for groups, (error, _) in self.compared.items()}
        gains = {groups: self.samples / float(ratio) for groups, (_, ratio) in self.compared.items()}
        return Measured(moments, seen, self.like, errors, gains)


def measure_norms(
    model: nn.Module,
    batches: Sequence[Any],
    sites: Sequence[Site],
    numbers: Callable[[Site], Sequence[int]] = auto_numbers,
    shrinks: bool = False,
) -> dict[str, Measured]:
    """Run `model` in eval mode on `batches` and gather, by path, what passes through each norm of `sites`.

    `numbers` gives the numbers of groups that are tried on the data, by `shrinking_eps` where `shrinks`.
    Raises `ModelError` where the model does not run on a batch, or a value is not finite.
    """
    gatherers: dict[str, _NormGatherer] = {}  # in the order in which norms are reached: the first that fails is named
    seen: dict[str, Seen] = {}

    def note(site: Site, module: nn.Module, args: tuple[Any, ...]) -> None:
        values = _channels_second(site, args)
        if values is not None:
            gatherers.setdefault(site.path, _NormGatherer(site, numbers(site), shrinks)).add(values)

    with temporary_hooks([site.module.register_forward_pre_hook(partial(note, site)) for site in sites]):
        for batch in batches:
            for path, now in run_model(model, batch, sites, name=_DATA).seen.items():
                seen[path] = Seen(now.dims, min(now.elements, seen.get(path, now).elements))
    return {path: gatherer.measured(seen[path]) for path, gatherer in gatherers.items()}


def _channels_second(site: Site, args: tuple[Any, ...]) -> Tensor | None:
    """The input of a norm as (N, C, *spatial); None where it is no such thing, or empty.

    In a layout other than the norm's own, what the numbers say would be of other channels.
    """
    if not args or not isinstance(args[0], Tensor) or args[0].dim() < 2 or not args[0].numel():
        return None
    values = args[0].movedim(-1, 1) if site.form == "last" and args[0].dim() > 2 else args[0]
    return values if values.shape[1] == site.channels else None


def affine_of(norm: nn.Module, like: Tensor, reset: bool = False) -> tuple[Tensor, Tensor]:
    """Gain and bias of a norm, widened; 1 and 0, of the shape of `like`, where it has none or shall forget them."""
    weight: Any = torch.ones_like(like) if norm.weight is None or reset else norm.weight
    bias: Any = torch.zeros_like(like) if norm.bias is None or reset else norm.bias
    return widen(weight), widen(bias)


def running_statistics(norm: Any, reset: bool = False) -> Statistics:
    """What a norm by running statistics has learnt, widened."""
    weight, bias = affine_of(norm, norm.running_mean, reset)
    return Statistics(weight, bias, widen(norm.running_mean), widen(norm.running_var), eps_of(norm))


def measure_recurrent(
    model: nn.Module, batches: Sequence[Any], sites: Iterable[Site]
) -> dict[str, dict[str, VectorMoments]]:
    """Run `model` in eval mode on `batches`; gather, by path, what layer norms inside its LSTMs and GRUs would see."""
    found: dict[str, dict[str, VectorMoments]] = {}

    def note(site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        moments = measured_moments(module, *args, **kwargs)
        found[site.path] = merge_moments(found.get(site.path, {}), moments)

    hooks = [site.module.register_forward_pre_hook(partial(note, site), with_kwargs=True) for site in sites]
    with temporary_hooks(hooks):
        for batch in batches:
            run_model(model, batch, name=_DATA)
    return found
