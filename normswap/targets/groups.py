"""How many groups a norm gets, by what was asked, the channels, and how many elements a sample has."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from normswap.analysis.known_norms import INSTANCE_NORM_BY_DIMS
from normswap.analysis.sites import Site
from normswap.calibration.measuring import AUTO_CHANNELS, AUTO_GROUPS, auto_numbers
from normswap.target_table import Form
from normswap.targets.context import Context, join_notes
from normswap.targets.options import Options, parse_groups

AUTO_ELEMENTS = 16
"""`groups="auto"`: at least so many elements in each group, beside at most `AUTO_GROUPS` of `AUTO_CHANNELS` or more."""
LEAST_ELEMENTS = 2  # one element a group is its own mean: the norm would erase it
_TOLERANCE = 1.03
"""On data, `auto` takes the most groups whose error is within so many times the least: more groups fine-tune better."""


def numbers_to_measure(form: Form | None, options: Options) -> Callable[[Site], Sequence[int]]:
    """The numbers of groups that a norm of this form may get, as far as data can tell of them."""
    if form is None or not form.over_positions:
        return lambda site: ()
    if options.groups == "auto" and form.compares_groups:
        return auto_numbers
    if "groups" in form.options:
        return lambda site: (_largest_divisor(site.channels, _asked_groups(site.channels, options)),)
    return lambda site: (1,)


def choose_groups(site: Site, context: Context) -> tuple[int, str] | str:
    """The number of groups for a layer, and a note where it is not what was asked; or why none will do."""
    if site.path in context.recorded_groups:
        return context.recorded_groups[site.path], ""
    channels, elements = site.channels, elements_of(site, context)
    rule, number = parse_groups(context.options.groups)
    asked = _asked_groups(channels, context.options)
    if elements is not None and channels * elements < LEAST_ELEMENTS:
        return "has one element per sample, which a norm within a sample would turn into a constant"
    limit = asked
    if elements is not None:
        least = AUTO_ELEMENTS if rule == "auto" else LEAST_ELEMENTS
        limit = max(1, min(asked, channels * elements // least))
    chosen = _largest_divisor(channels, limit)
    if rule == "auto" and (for_purpose := _for_purpose(site, chosen, context)) is not None:
        return for_purpose
    if chosen == asked and (rule != "channels" or channels % number == 0):
        return chosen, ""
    if limit < asked:
        few = "one element" if elements == 1 else f"{elements} elements"
        return chosen, f"{_plural(chosen)}{'' if rule == 'auto' else f', not {asked}'}: {few} a channel"
    if rule == "auto":
        return chosen, ""
    wanted = f"{number} channels a group" if rule == "channels" else f"{asked} groups"
    return chosen, f"{_plural(chosen)}: {channels} channels do not divide into {wanted}"


def _for_purpose(site: Site, most: int, context: Context) -> tuple[int, str] | None:
    """The number of groups up to `most` for the purpose of the conversion, with a note that names both purposes'; None
    where that is `most`, for training, and nothing tells more.
    """
    measured = context.measured.get(site.path)
    on_data = {n: error for n, error in measured.errors.items() if n <= most} if measured else {}
    training = _most_near_least(on_data) if on_data else most
    if on_data:
        use, by = min(on_data, key=lambda n: on_data[n]), " on the data"
    else:
        # An instance norm is nearest to many groups, all others to one. Groups chosen on pictures of overlapping shapes
        # ("dead leaves") were tried: on two ResNets and an EfficientNet-Lite0 as good as one group, within noise.
        use, by = most if site.form == "group" else 1, ""
    if context.options.purpose == "use":
        other = f"{training} for training" if training != use else ""
        return use, join_notes(f"{_plural(use)} for use: keeps most{by}", other)
    other = f"{use} for use" if on_data and use != training else ""
    if training < most:
        return training, join_notes(f"{_plural(training)}: keeps more on the data", other)
    return (training, f"{_plural(training)} for training; {other}") if other else None


def _most_near_least(errors: Mapping[int, float]) -> int:
    """The most groups whose error is near the least."""
    return max(n for n, error in errors.items() if error <= _TOLERANCE * min(errors.values()))


def _asked_groups(channels: int, options: Options) -> int:
    """The number of groups that was asked for, whether or not the channels divide into it."""
    rule, number = parse_groups(options.groups)
    auto = max(1, min(AUTO_GROUPS, channels // AUTO_CHANNELS))
    return {"auto": auto, "groups": number, "channels": max(1, channels // number if number else 1)}[rule]


def _largest_divisor(number: int, most: int) -> int:
    return next(n for n in range(min(most, number), 0, -1) if number % n == 0)


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


def spatial_dims_of(site: Site, context: Context) -> int | None:
    """The spatial dimensions of a norm's input, 1 for (N, C) too: by class, measured, or by the layers around it; None
    where these do not tell.
    """
    if site.spatial_dims:
        return site.spatial_dims
    if site.form == "last":
        return 1
    if site.path in context.seen:
        return max(1, context.seen[site.path].dims - 2)
    around = context.flow.ranks.get(site.path) or {0}
    # Convolutions take inputs without a batch dimension too, which batch norms do not: of two ranks it is the greater.
    return max(1, max(around) - 2) if max(around) > 1 and max(around) - min(around) <= 1 else None


def share_channels(layer: Site, norm: Site, context: Context, before: bool = True) -> bool | None:
    """Whether the dimension of the channels that `layer` gives is the one that `norm`, right behind it, takes; or, if
    the layer is not `before` the norm but reads what the norm gives or reads, of those that it takes.

    A linear layer gives them last, a convolution before its spatial dimensions; batch norms take the second dimension.
    None where neither a class nor a shape tells: a linear layer may read (N, C, L), a convolution (C, L).
    """
    module: Any = layer.module
    dims = 0 if layer.layer_kind == "linear" else len(module.kernel_size)
    if norm.base in INSTANCE_NORM_BY_DIMS.values():  # which takes (C, L) as convolutions do
        return norm.spatial_dims == dims
    if norm.form == "last" or norm.path in context.recorded_changes:
        return True
    seen, ranks = context.seen.get(norm.path), context.flow.ranks.get(norm.path, set())
    ranks = ranks if seen is None else {seen.dims}
    if before:  # and nothing but one element a channel is flattened, where the norm has as many channels
        ranks = context.flow.flattened.get(norm.path, ranks)
    return dims + 2 in ranks if len(ranks) == 1 or dims + 2 not in ranks else None
