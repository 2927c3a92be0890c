"""Decide, before anything moves: for each norm and weight layer its replacement, built, or why it is left."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from normswap.analysis.other_ways import told_apart
from normswap.analysis.sites import Site
from normswap.analysis.statistics import is_untrained
from normswap.conversion.accounting import changes_of, folds, is_meant, unasked_layers, why_nothing_to_convert
from normswap.conversion.evidence import Evidence, Survey
from normswap.conversion.request import Phase, Request
from normswap.errors import ModelError, OptionError
from normswap.layers.torch_normalization import normalized_by_torch
from normswap.report.path_patterns import summarize_paths
from normswap.report.report import Change, Left
from normswap.target_table import NORM_FORMS
from normswap.targets.context import Absorption, Context, Merger, Swap
from normswap.targets.groups import share_channels
from normswap.targets.merging import plan_mergers
from normswap.targets.options import parse_groups
from normswap.targets.target import PLAIN_TARGET, Target, plan_norm, plan_weight
from normswap.targets.weights import strict_rescaling


@dataclass(frozen=True)
class Plan:
    """All that a conversion is about to do, and all that it leaves."""

    swaps: Sequence[Swap]
    changes: Sequence[Change]
    """The swaps as the report has them."""
    left: Sequence[Left]
    """What stays, by path, with the reason."""
    notices: Sequence[str]
    """Warnings for the report."""
    untrained: bool = False
    """Whether the statistics of all batch norms are those of a new network."""

    @property
    def fitted(self) -> list[str]:
        """The paths of new norms that are not exact: calibration may bring them nearer."""
        sites = [swap.site for swap in self.swaps if not swap.exact]
        return [site.path for site in sites if site.kind == "norm" or site.layer_kind == "rnn"]

    def halves(self) -> tuple[list[Swap], list[Swap]]:
        """What is exact, and the rest, to be put in after it; all at once where a layer takes in another one."""
        if any(swap.absorptions or swap.merger for swap in self.swaps):
            return [], list(self.swaps)
        exact = [swap for swap in self.swaps if swap.exact]
        return exact, [swap for swap in self.swaps if not swap.exact]


def plan_conversion(survey: Survey, evidence: Evidence, request: Request) -> Plan:
    """Build the replacements. Raises `ModelError` for nothing to convert, `OptionError` for too many groups."""
    request.begin(Phase.PLAN)
    options, sites = request.options, survey.sites
    context = Context(
        options=options,
        flow=survey.flow.doubting(evidence.outside, "is used outside of the block that was traced, as a run shows"),
        sites={site.path: site for site in sites},
        shared=survey.shared,
        excluded=survey.excluded,
        seen=evidence.seen,
        measured=evidence.measured,
        vectors=evidence.vectors,
        recorded_groups=request.recorded.groups,
        recorded_eps=request.recorded.eps,
        recorded_changes=request.recorded.changes,
        measured_exact=evidence.tells_of_exactness and not (request.heeds_type_tests or request.inplace),
        release=request.release,
    )
    swaps, changes, left = plan_sites(sites, survey.chosen, request.target, context)
    if request.target is not PLAIN_TARGET and not request.recorded.changes:
        apart = told_apart(survey.model, survey.flow, sites, {swap.site: swap.module for swap in swaps})
        if apart:
            swaps, changes, left = plan_sites(sites, survey.chosen, request.target, replace(context, told_apart=apart))
    meant = {"norm": request.target.norm, "weight": request.target.weight}
    left += [layer for layer in survey.hidden if meant[layer.kind] is not None]
    if not swaps and not request.may_be_idle:
        unasked = "" if folds(request.target) else unasked_layers(sites, options)
        raise ModelError(why_nothing_to_convert(request.target, left, options) + unasked)
    _check_groups(request.target, swaps, options.groups)
    notices = [*survey.notices, *_notices(survey, request, swaps, left)]
    if folds(request.target) and not swaps:
        notices.append(why_nothing_to_convert(request.target, left, options))
    return Plan(swaps, changes, sorted(left, key=lambda entry: entry.path), notices, _is_untrained(survey))


def plan_sites(
    sites: Sequence[Site], chosen: Collection[Site], target: Target, context: Context
) -> tuple[list[Swap], list[Change], list[Left]]:
    """A swap, built, or a reason, for each site and for each norm that is called as a function; the swaps as the report
    has them, too.

    Norms come first: what they fold into changes the weights, which are then planned with the norms' scales in them,
    and with the convolutions beside them that go into them.
    """
    if target.weight is not None and target.weight.name == "ws" and context.options.ws == "strict":
        context = replace(context, rescaling=_rescaling(sites, chosen, target, context))
    plans: dict[Site, Swap | str] = dict.fromkeys(sites, "not selected")
    for site in sites:
        if site.kind == "norm" and site in chosen:
            plans[site] = _unless_told_apart(plan_norm(site, target, context), target, context)
    context = replace(context, folded=_foldings(plans))
    merged, notes = _mergers(chosen, plans, target, context)
    context = replace(context, merged=_by_layer(merged.values()))
    for site in sites:
        if site in merged:
            plans[site] = merged[site]
        elif site.kind == "weight" and (site in chosen or _must_be_plain(site, context)):
            swap = plans[site] = _unless_told_apart(plan_weight(site, target, context), target, context)
            if isinstance(swap, Swap) and swap.tied_lengths:
                context = replace(context, tied_lengths={**context.tied_lengths, **swap.tied_lengths})
    swaps = [plan for plan in plans.values() if isinstance(plan, Swap)]
    left = []
    for site, reason in plans.items():
        taken_in = site.path in context.folded or site.path in context.merged
        if isinstance(reason, str) and not taken_in and (site in notes or is_meant(site, target, context.options)):
            left += [Left(path, site.kind, site.name, notes.get(site, reason)) for path in site.paths]
    if target.norm is not None:
        unheld = "is a function call that no module holds"
        left += [Left(where, "norm", name, unheld) for where, name in context.flow.functional.items()]
    return swaps, changes_of(swaps, notes), left


def _foldings(plans: dict[Site, Swap | str]) -> dict[str, list[Absorption]]:
    """By the path of a layer, what it takes in. A norm in `plans` that needs others in its layer stays without them."""
    folded: dict[str, list[Absorption]] = defaultdict(list)
    swaps = {site: plan for site, plan in plans.items() if isinstance(plan, Swap)}
    into = {site.path: {absorption.site.path for absorption in swap.absorptions} for site, swap in swaps.items()}
    for site, swap in swaps.items():
        for absorption in swap.absorptions:
            if all(into.get(norm) == {absorption.site.path} for norm in absorption.needs):
                folded[absorption.site.path].append(absorption)
            else:
                plans[site] = "no convolution or linear layer directly before it; a norm beside it stays"
    return dict(folded)


def _mergers(
    chosen: Collection[Site], plans: Mapping[Site, Swap | str], target: Target, context: Context
) -> tuple[dict[Site, Swap], dict[Site, str]]:
    """Of convolutions beside others, to whose outputs theirs are added: the swaps of those that go into one of them,
    and why the others stay.
    """
    found = plan_mergers(chosen, plans, context) if target.norm is NORM_FORMS["fold"] else {}
    found = {site: _unless_told_apart(plan, target, context) for site, plan in found.items()}
    merged = {site: plan for site, plan in found.items() if isinstance(plan, Swap)}
    return merged, {site: plan for site, plan in found.items() if isinstance(plan, str)}


def _by_layer(swaps: Iterable[Swap]) -> dict[str, list[Merger]]:
    """By the path of a convolution, those that it takes in."""
    mergers: dict[str, list[Merger]] = defaultdict(list)
    for swap in swaps:
        if swap.merger is not None:
            mergers[swap.merger.site.path].append(swap.merger)
    return dict(mergers)


def _unless_told_apart(swap: Swap | str, target: Target, context: Context) -> Swap | str:
    """`swap`, or why the layer is left: a forward asks for its class, and nothing measures what comes of that."""
    if isinstance(swap, str) or target is PLAIN_TARGET or swap.site.path in context.recorded_changes:
        return swap
    if swap.site in context.told_apart:
        asked = f"as in type(m) is {swap.site.name}, or for what they have"
        return f"a forward asks for the type of its layers, {asked}: it would go another way"
    if swap.exact and context.measured_exact:
        return swap
    old, new = type(swap.site.module), type(swap.module)
    who = next((who for path in swap.site.paths if (who := context.flow.who_tells_apart(path, old, new))), "")
    if not who:
        return swap
    return f"{who} asks for the type of its layers, as in type(m) is {old.__name__}: it would go another way"


def _must_be_plain(site: Site, context: Context) -> bool:
    """Whether a norm is folded into a layer that it can go into only when its weight is baked in."""
    return site.path in context.folded and bool(normalized_by_torch(site.module) or site.obstacle)


def _rescaling(
    sites: Sequence[Site], chosen: Collection[Site], target: Target, context: Context
) -> Mapping[str, Tensor]:
    """By the path of a norm: how strict standardization multiplies the filters of the convolution before it."""
    found = {}
    for site in sites:
        into = context.sites.get(context.flow.feeder(site.path) or "") if site.kind == "norm" else None
        if into is None or not {into, site} <= set(chosen) or share_channels(into, site, context) is False:
            continue
        if isinstance(plan_weight(into, target, context), Swap):
            found[site.path] = strict_rescaling(into)
    return found


def _check_groups(target: Target, swaps: Sequence[Swap], groups: str | int) -> None:
    _, number = parse_groups(groups)
    widths = [swap.site.channels for swap in swaps if swap.site.kind == "norm"]
    if target.norm and "groups" in target.norm.options and widths and number > max(widths):
        raise OptionError(
            f"groups: {groups} is more than the {max(widths)} channels of the widest layer; give at most so many"
        )


def _is_untrained(survey: Survey) -> bool:
    batch_norms = [site.module for site in survey.sites if site in survey.chosen and site.is_batch_norm]
    return bool(batch_norms) and all(is_untrained(norm) for norm in batch_norms)


def _notices(survey: Survey, request: Request, swaps: Sequence[Swap], left: Sequence[Left]) -> list[str]:
    """What a user should know though it is no error: half of the target found nothing, an option has no effect."""
    target, options, notices = request.target, request.options, []
    kinds = {swap.site.kind for swap in swaps}
    stay = {entry.path for entry in left}
    # Folding is for batch norms: where there are none, nobody misses them.
    missed = not folds(target) or any(site.is_batch_norm and site.path in stay for site in survey.sites)
    if target.norm and target is not PLAIN_TARGET and swaps and "norm" not in kinds and missed:
        notices.append(
            f"no norm was changed: the model has none that {target.norm.name} can replace; see what was left"
        )
    if options.recurrent and not any(site.layer_kind == "rnn" for site in survey.sites):
        notices.append(f"recurrent={options.recurrent} changed nothing: the model has no recurrent layer")
    if target.weight is None and target is not PLAIN_TARGET and set(options.layers) != {"conv"}:
        notices.append(f"layers={','.join(options.layers)}: {target.name} changes no weights, whatever the layer")
    if target.weight and target is not PLAIN_TARGET and swaps and "weight" not in kinds:
        unasked = unasked_layers(survey.sites, options)
        notices.append(f"no weight was changed{unasked}; see what was left")
    if target.norm and target.norm.over_positions:
        notices += _reaching_along_time(survey, swaps, target.norm.name)
    return notices


def _reaching_along_time(survey: Survey, swaps: Sequence[Swap], form: str) -> list[str]:
    """Norms that took each position by itself, in nets where that counts, and do no longer."""
    along_time = survey.flow.along_time
    alone = [swap.site.path for swap in swaps if swap.site.path in along_time]
    return [
        f"{summarize_paths(paths)}: in {what}, and {form} takes statistics along time: outputs will depend on later "
        "positions and on padding; pn, frozen and est keep positions apart"
        for what in dict.fromkeys(along_time.values())
        if (paths := [path for path in alone if along_time[path] == what])
    ]
