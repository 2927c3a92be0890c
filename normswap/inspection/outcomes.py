"""What each target would do with a model, every option at its default."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace

from torch import nn

from normswap.analysis.other_ways import told_apart
from normswap.analysis.sites import Site
from normswap.conversion.accounting import why_nothing_to_convert
from normswap.conversion.planning import plan_sites
from normswap.errors import NormswapError
from normswap.inspection.kinds import Kinds, kinds_to_fold
from normswap.layers.recurrent import LAYER_NORMALIZED
from normswap.report.inspection import Outcome
from normswap.target_table import NORM_FORMS, RECURRENT_FORMS, WEIGHT_FORMS
from normswap.targets.context import Context
from normswap.targets.target import RECURRENT_TARGETS, TARGETS, Target


def outcomes_of(model: nn.Module, norms: Kinds, weights: Kinds, context: Context) -> Iterator[Outcome]:
    """The outcome of each form of norms, of weights, and of recurrent layers where there are some.

    `norms` and `weights` are the layers of `model` by kind.
    """
    for form in NORM_FORMS.values():
        kinds = kinds_to_fold(norms, weights, context) if form.into_neighbours else norms
        yield _try_target(model, TARGETS[form.name], kinds, context)
    for name in WEIGHT_FORMS:
        yield _try_target(model, TARGETS[name], weights, context)
    if any(site.base in LAYER_NORMALIZED for site in weights):
        for name, inside in zip(RECURRENT_TARGETS, RECURRENT_FORMS, strict=True):
            asked = replace(context, options=replace(context.options, recurrent=inside))
            yield _try_target(model, RECURRENT_TARGETS[name], weights, asked)


def _try_target(model: nn.Module, target: Target, kinds: Kinds, context: Context) -> Outcome:
    """What a target would do: replacements are built, and none is put in."""
    try:
        swaps, changes, left = plan_sites(tuple(kinds), set(kinds), target, context)
        new = {site: swap.module for swap in swaps for site in kinds[swap.site]}
        if apart := told_apart(model, context.flow, tuple(context.sites.values()), new):
            kinds = _split(kinds, apart)
            swaps, changes, left = plan_sites(tuple(kinds), set(kinds), target, replace(context, told_apart=apart))
    except NormswapError as error:
        return Outcome(target.name, 0, 0, None, 0, (), str(error))
    alike = {path: len(sites) for first, sites in kinds.items() for path in first.paths}
    mine = "norm" if target.norm else "weight"
    changed, reasons = Counter[str](), Counter[str]()
    for change in changes:
        of = change.paths[0] if change.paths[0] in alike else str(change.partner)  # a norm that the layer takes in
        changed[change.kind] += alike[of]
    for entry in left:
        if entry.kind == mine:
            reasons[entry.reason] += alike.get(entry.path, 1)  # functions that norm are no site
    exact = all(swap.exact for swap in swaps) if swaps else None
    most = tuple(reasons.most_common())
    problem = ""
    if not swaps and not most:
        stay = [entry for entry in left for _ in range(alike.get(entry.path, 1))]
        problem = why_nothing_to_convert(target, stay, context.options)
    return Outcome(target.name, changed["norm"], changed["weight"], exact, reasons.total(), most, problem)


def _split(kinds: Kinds, apart: Collection[Site]) -> Kinds:
    """The same, where those of a kind that are `apart` are one of their own."""
    parts = (
        [site for site in alike if (site in apart) is there] for alike in kinds.values() for there in (False, True)
    )
    return {part[0]: part for part in parts if part}
