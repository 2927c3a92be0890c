"""What a plan is made of: the options and facts it reads, the swap it builds, and the parts that targets share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from normswap.analysis.dataflow import Flow
from normswap.analysis.known_norms import eps_of
from normswap.analysis.running import Seen
from normswap.analysis.sites import Site
from normswap.calibration.measuring import AUTO_CHANNELS, AUTO_GROUPS, Measured, affine_of
from normswap.errors import OptionError
from normswap.layers.matching import (
    Affine,
    Statistics,
    as_batch_norm,
    match_groups,
    rescale_input,
    widen,
    without_channel_half,
)
from normswap.layers.norms import BatchChannelNorm
from normswap.layers.recurrent_matching import VectorMoments

AUTO_ELEMENTS = 16
"""`groups="auto"`: at least so many elements in each group, beside at most `AUTO_GROUPS` of at least `AUTO_CHANNELS` channels."""
_TOLERANCE = 1.03
"""On data, `auto` takes the most groups whose error is within so many times the least: more groups fine-tune better."""
LEAST_ELEMENTS = 2  # one element a group is its own mean: the norm would erase it


@dataclass(frozen=True)
class Absorb:
    """A norm goes into the layer before it: its filters times `scale`, its bias times `scale` plus `shift`."""

    site: Site
    affine: Affine
    bias: nn.Parameter | None  # a new one, where the layer has none


@dataclass(frozen=True)
class Swap:
    """A replacement that is built but not yet in the model.

    `writes` are tensors of the model that take new values in place, so that optimizers and
    other holders of a parameter keep it; a large value is a function, computed when its turn comes.
    """

    site: Site
    module: nn.Module
    after: str
    how: str
    exact: bool
    note: str = ""
    groups: int | None = None
    writes: tuple[tuple[Tensor, Tensor | Callable[[], Tensor]], ...] = ()
    absorb: Absorb | None = None


@dataclass(frozen=True)
class Context:
    """What the target functions read: the options, the dataflow, and what is known of the model's tensors.

    `seen` has the sizes that norms saw in example inputs or data; `shared`
    the ids of parameters that stand in more than one module; `sites` all sites by first path, `excluded` those that must stay;
    `measured` and `vectors` what calibration data showed of norms, and of recurrent layers; `given` the groups of norms that a recipe tells; `release` is told of each large weight that has been read;
    `rescaled` the norms whose convolution is standardized strictly, with its change of scale;
    `absorbed` the layers that a norm is folded into, with the scale of their filters; `lengths` those of the filters of shared weights, by its id.
    """

    groups: str | int
    transfer: str
    ws: str
    ws_scope: str
    layers: tuple[str, ...]
    recurrent: str | None
    flow: Flow
    sites: Mapping[str, Site]
    seen: Mapping[str, Seen] = field(default_factory=dict)
    shared: frozenset[int] = frozenset()
    excluded: frozenset[Site] = frozenset()
    measured: Mapping[str, Measured] = field(default_factory=dict)
    vectors: Mapping[str, Mapping[str, VectorMoments]] = field(default_factory=dict)
    given: Mapping[str, int] = field(default_factory=dict)
    release: Callable[[Tensor], None] = lambda tensor: None
    rescaled: dict[str, Tensor] = field(default_factory=dict)
    absorbed: dict[str, Tensor] = field(default_factory=dict)
    lengths: dict[int, nn.Parameter] = field(default_factory=dict)


# ---- statistics and parameters ----


def read_statistics(site: Site, context: Context) -> Statistics | None:
    """The batch norm that stands in for the norm, widened: itself, where it is one, or by what data showed.

    None where there are neither running statistics nor data.
    """
    stats = _own_statistics(site, context)
    scale = context.rescaled.get(site.path)
    if stats is None or scale is None or context.transfer != "match":
        return stats
    feeder = context.sites[str(context.flow.feeder(site.path)[0])].module
    return rescale_input(stats, scale, feeder.bias)  # type: ignore[arg-type]


def _own_statistics(site: Site, context: Context) -> Statistics | None:
    norm, eps, measured = site.module, eps_of(site.module), context.measured.get(site.path)
    if "data" in site.form and isinstance(norm.running_mean, Tensor) and isinstance(norm.running_var, Tensor):
        weight, bias = affine_of(norm, norm.running_mean, context.transfer == "reset")
        stats = Statistics(weight, bias, widen(norm.running_mean), widen(norm.running_var), eps)
    elif site.form == "data" or measured is None:
        return None
    else:
        weight, bias = affine_of(norm, measured.moments.mean, context.transfer == "reset")
        stats = Statistics(weight, bias, measured.moments.mean, measured.moments.var, eps)
    if site.form == "data" or context.transfer != "match":
        return stats
    if not isinstance(norm, BatchChannelNorm):
        assert measured is not None  # for the type checker: excluded above
        return as_batch_norm(measured.moments, weight, bias, eps)
    gain, shift = widen(norm.group_weight), widen(norm.group_bias)
    if measured is None:
        return without_channel_half(stats, gain, shift)
    each = norm.num_features // norm.num_groups
    both = as_batch_norm(measured.moments, gain.repeat_interleave(each), shift.repeat_interleave(each), eps)
    return both._replace(weight=torch.where(weight < 0, -both.weight, both.weight))


def place(site: Site, name: str, value: Tensor, context: Context) -> tuple[nn.Parameter, list[tuple[Tensor, Tensor]]]:
    """The parameter `name` with `value`: the old one where it may be kept, with the write it needs.

    A parameter that two layers share gets a successor of its own in each, since their values
    part. One that the layer did not have is not trained, like the statistics that it carries.
    """
    old = getattr(site.module, name)
    if isinstance(old, nn.Parameter) and id(old) not in context.shared:
        return old, [(old, value)]
    like = old if isinstance(old, Tensor) else like_of(site, context)
    trained = isinstance(old, nn.Parameter) and old.requires_grad
    return nn.Parameter(value.to(like), requires_grad=trained), []


def like_of(site: Site, context: Context) -> Tensor:
    """A tensor of the dtype and the device of a norm's vectors."""
    held = (getattr(site.module, name, None) for name in ("weight", "running_mean", "bias"))
    found = next((tensor for tensor in held if isinstance(tensor, Tensor)), None)
    if found is not None or site.path in context.measured:
        return context.measured[site.path].like if found is None else found
    weights = (other.module._parameters.get("weight") for other in context.sites.values())
    return next((w for w in weights if w is not None), torch.empty(0))


def carry(
    site: Site, new: nn.Module, stats: Statistics | None, groups: int, context: Context, note: str, same: bool = False
) -> Swap:
    """`new`, a group or instance norm, with the affine that `transfer` asks for; `same` if it does what the old one did."""
    old = site.module
    values: dict[str, Tensor | None] = {name: getattr(old, name) for name in ("weight", "bias")}
    how = {"copy": "gain and bias copied as they stand", "reset": "gain 1, bias 0"}.get(context.transfer, "")
    if context.transfer == "reset":
        values = {
            k: None if v is None else (torch.ones_like if k == "weight" else torch.zeros_like)(v)
            for k, v in values.items()
        }
    elif context.transfer == "match" and stats is not None:
        values = dict(match_groups(stats, groups)._asdict())
        values = {"weight": values["scale"], "bias": values["shift"]}
        of = (
            "running statistics"
            if site.form == "data" or site.path not in context.measured
            else "statistics of the data"
        )
        how = f"{of} moved into gain and bias"
        if old.weight is None or old.bias is None:
            note = join_notes(note, "gain and bias added, not trained, to carry the statistics")
    elif not how:
        if context.transfer == "match" and site.form != "data" and not same:
            one = torch.ones(site.channels)  # as on data, where they carry statistics: the architecture is the same
            values = {k: (one if k == "weight" else one * 0) if v is None else v for k, v in values.items()}
        how = "gain and bias copied as they stand"
        note = join_notes(note, "no running statistics and no data to match")
    writes: list[tuple[Tensor, Tensor]] = []
    for name, value in values.items():
        if value is None:
            new.register_parameter(name, None)
            continue
        parameter, write = place(site, name, value, context)
        new.register_parameter(name, parameter)
        writes += write
    if isinstance(old.weight, Tensor) and not isinstance(old.weight, nn.Parameter):
        note = join_notes(note, "gain and bias are not trained, as before: requires_grad_() changes that")
    shared = [name for name in ("weight", "bias") if id(getattr(old, name)) in context.shared]
    if shared:
        note = join_notes(note, f"{' and '.join(shared)} no longer shared with another layer")
    name = f"{type(new).__name__}({groups})" if isinstance(new, nn.GroupNorm) else type(new).__name__
    return Swap(site, new, name, how, False, note, groups, tuple(writes))


def join_notes(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


# ---- groups ----


def parse_groups(groups: str | int) -> tuple[str, int]:
    """("auto", 0), ("groups", 32) or ("channels", 16) for `auto`, `32`, `16c`."""
    text = str(groups).strip()
    if text == "auto":
        return "auto", 0
    match = re.fullmatch(r"(\d+)(c?)", text)
    if match is None or int(match[1]) < 1 or isinstance(groups, bool):
        raise OptionError(
            f"groups: {groups!r} is not possible; give auto, a number of groups from 1 (32), or channels a group (16c)"
        )
    return ("channels" if match[2] else "groups"), int(match[1])


def choose_groups(site: Site, context: Context) -> tuple[int, str] | str:
    """The number of groups for a layer, and a note where it is not what was asked; or why none will do."""
    if site.path in context.given:
        return context.given[site.path], ""
    channels, elements = site.channels, elements_of(site, context)
    kind, number = parse_groups(context.groups)
    if elements is not None and channels * elements < LEAST_ELEMENTS:
        return "has one element a sample, which any norm within a sample would erase"
    auto = max(1, min(AUTO_GROUPS, channels // AUTO_CHANNELS))
    asked = {"auto": auto, "groups": number, "channels": max(1, channels // number if number else 1)}[kind]
    limit = asked
    if elements is not None:
        least = AUTO_ELEMENTS if kind == "auto" else LEAST_ELEMENTS
        limit = max(1, min(asked, channels * elements // least))
    chosen = next(n for n in range(min(limit, channels), 0, -1) if channels % n == 0)
    errors = context.measured[site.path].errors if kind == "auto" and site.path in context.measured else {}
    if within := {n: error for n, error in errors.items() if n <= chosen}:
        kept = max(n for n, error in within.items() if error <= _TOLERANCE * min(within.values()))
        if kept < chosen:
            return kept, f"{_plural(kept)}, not {chosen}: keeps more on the data"
    if kind == "channels" and channels % number == 0 and chosen == asked:
        return chosen, ""
    if chosen == asked and kind != "channels":
        return chosen, ""
    if limit < asked:
        few = "one element" if elements == 1 else f"{elements} elements"
        return chosen, f"{_plural(chosen)}, not {asked}: {few} a channel"
    wanted = f"{number} channels a group" if kind == "channels" else f"{asked} groups"
    return chosen, f"{_plural(chosen)}: {channels} channels do not divide into {wanted}"


def _plural(groups: int) -> str:
    return "1 group" if groups == 1 else f"{groups} groups"


def elements_of(site: Site, context: Context) -> int | None:
    """Elements a channel in the norm's input: measured, or 1 where the graph or the class says so, else None."""
    if site.path in context.seen:
        return 1 if site.form == "last" else context.seen[site.path].elements
    if site.path in context.flow.single:
        return 1
    flat = site.form == "last" or (site.spatial_dims == 1 and site.path not in context.flow.spatial)
    return 1 if flat else None  # BatchNorm1d takes (N, C) as well as (N, C, L)


def dims_of(site: Site, context: Context) -> int | None:
    """The spatial dimensions of a norm's input: by its class, or measured (1 for (N, C) too); None where not known."""
    if site.spatial_dims:
        return site.spatial_dims
    if site.form == "last":
        return 1
    return max(1, context.seen[site.path].dims - 2) if site.path in context.seen else None
