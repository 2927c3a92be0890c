"""Decide, before anything moves: for each norm and weight layer its replacement, built, or why it is left."""

from __future__ import annotations

from collections.abc import Sequence

from normswap.analysis.sites import Site
from normswap.conversion.accounting import is_reported
from normswap.errors import OptionError
from normswap.report.report import Left
from normswap.targets.context import Context, Swap, parse_groups
from normswap.targets.target import Target, plan_norm, plan_weight
from normswap.targets.weights import strict_rescaling


def decide(sites: Sequence[Site], chosen: set[Site], target: Target, context: Context) -> tuple[list[Swap], list[Left]]:
    """A swap, built, or a reason for every site and for each norm that is called as a function; norms first, since what they
    fold into changes the weights.
    """
    norms = [site for site in sites if site.kind == "norm"]
    weights = [site for site in sites if site.kind == "weight"]
    if target.weight is not None and target.weight.name == "ws" and context.ws == "strict":
        for site in norms:
            into = context.sites.get(context.flow.feeder(site.path)[0] or "")
            if into in chosen and site in chosen and isinstance(plan_weight(into, target, context), Swap):
                context.rescaled[site.path] = strict_rescaling(into)
    plans: dict[Site, Swap | str] = dict.fromkeys(sites, "not selected")
    for site in norms:
        if site in chosen:
            swap = plans[site] = plan_norm(site, target, context)
            if isinstance(swap, Swap) and swap.absorb:
                context.absorbed[swap.absorb.site.path] = swap.absorb.affine.scale
    for site in weights:
        if site in chosen:
            plans[site] = plan_weight(site, target, context)
    swaps = [plan for plan in plans.values() if isinstance(plan, Swap)]
    layers = (*context.layers, "rnn") if context.recurrent else context.layers
    left = [
        Left(path, site.kind, site.name, plan)
        for site, plan in plans.items()
        if isinstance(plan, str) and site.path not in context.absorbed and is_reported(site, layers)
        for path in site.paths
    ]
    unheld = "is a function call that no module holds"
    left += [Left(where, "norm", name, unheld) for where, name in context.flow.functional.items()]
    return swaps, left


def check_groups(target: Target, swaps: Sequence[Swap], groups: str | int) -> None:
    _, number = parse_groups(groups)
    widths = [swap.site.channels for swap in swaps if swap.site.kind == "norm"]
    if target.norm and target.norm.name in ("gn", "bcn") and widths and number > max(widths):
        raise OptionError(f"groups: {groups} is more than the {max(widths)} channels of the widest layer")
