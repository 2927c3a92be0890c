"""The report of a conversion, put together from its phases, with the recipe that a converted file carries."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch

from normswap.conversion.accounting import class_names, count_elements
from normswap.conversion.evidence import Survey
from normswap.conversion.planning import Plan
from normswap.conversion.request import Request
from normswap.report.report import Calibration, Change, Drift, Node, Report, Totals
from normswap.targets.options import Options
from normswap.targets.target import PLAIN_TARGET, Target

MEASURE = "to see how far outputs move on real inputs: --examples PATH, a few pictures or tensors (examples= in Python)"
"""The note where drift was not measured."""


def make_report(
    survey: Survey, plan: Plan, calibration: Calibration | None, drift: Drift | None, request: Request
) -> Report:
    """The report on a conversion that is done: `survey` was made before, its model has been changed since."""
    return Report(
        target=request.target.name,
        changes=tuple(plan.changes),
        left=tuple(plan.left),
        totals=_totals(survey, plan),
        drift=drift,
        recipe=_recipe(request.target, request.options, plan.changes),
        warnings=tuple(plan.notices),
        calibration=calibration,
        modules=_module_tree(survey, plan.changes),
        notes=tuple(_notes(plan, drift, request)),
    )


def _notes(plan: Plan, drift: Drift | None, request: Request) -> Iterator[str]:
    """That there was nothing to keep, or else how to see what was kept."""
    if request.target is PLAIN_TARGET:
        return
    if plan.untrained:
        yield "the running statistics were never trained: there is no function to keep"
    elif drift is None and not all(swap.exact for swap in plan.swaps):
        yield MEASURE


def _totals(survey: Survey, plan: Plan) -> Totals:
    kinds, before, after = (
        Counter(change.kind for change in plan.changes),
        survey.elements,
        count_elements(survey.model),
    )
    return Totals(kinds["norm"], kinds["weight"], len(plan.left), before[0], after[0], before[1], after[1])


def _module_tree(survey: Survey, changes: Sequence[Change]) -> tuple[Node, ...]:
    """Every module by its path, before and after."""
    written = {path: change for change in changes for path in change.paths}
    before, after = survey.class_names, class_names(survey.model)
    pairs = ((path, before.get(path, ""), after.get(path, "")) for path in dict.fromkeys([*before, *after]))
    return tuple(
        Node(path, written[path].before, written[path].after) if path in written else Node(path, old, new)
        for path, old, new in pairs
    )


def _recipe(target: Target, options: Options, changes: Sequence[Change]) -> dict[str, Any]:
    """What a converted file carries, so that `normswap.load` can repeat the conversion on a fresh model; plain data."""
    choices = {name: "a function" if callable(value) else value for name, value in vars(options).items()}
    data, seconds, recurrent = (choices.pop(name) for name in ("calibrate", "calibrate_seconds", "recurrent"))
    choices = {k: list(v) if isinstance(v, Iterable) and not isinstance(v, str) else v for k, v in choices.items()}
    choices |= {} if data is None else {"calibrate": True, "calibrate_seconds": seconds}
    choices |= {} if recurrent is None else {"recurrent": recurrent}
    layers = {
        c.paths[0]: {"from": c.before, "to": c.after, "groups": c.groups} | ({"eps": c.eps} if c.eps else {})
        for c in changes
    }
    versions = {"normswap": version("normswap"), "torch": torch.__version__.split("+")[0]}
    format = 2 if any(change.eps for change in changes) else 1  # a reader of 1 would not heed them
    return {"format": format, "target": target.name, "options": choices, "versions": versions, "layers": layers}
