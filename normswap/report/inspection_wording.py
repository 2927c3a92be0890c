"""The sentences and the small tables of an inspection, the same in every view of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from normswap.report.inspection import Inspection, Layer
from normswap.report.path_patterns import ROOT
from normswap.report.wording import plural, verdict
from normswap.target_table import NORM_FORMS

_MOST_REASONS = 3
_NOTHING = re.compile("^nothing to (fold|convert to [a-z-]+): ")  # which a line of the table says already
WHAT_IS_IN_IT = "what is in it"
OUTCOMES = "what each target would do"
FINDINGS = "what is wrong, or suspicious"
ADVICE = "what to pick"


@dataclass(frozen=True)
class OutcomeLine:
    """What one target would do, or what all norms' targets leave."""

    target: str
    changes: str
    exact: bool | None  # None: nothing is changed
    left: str  # why the rest stays

    @property
    def verdict(self) -> str:
        return "" if self.exact is None else verdict(self.exact)


def counts(found: Inspection) -> str:
    """How much there is of each kind."""
    norms = sum(layer.kind == "norm" for layer in found.layers)
    layers = f"{plural(norms, 'norm')}, {plural(len(found.layers) - norms, 'weight layer')}"
    return f"{layers}, {plural(found.parameters, 'parameter')}, {plural(found.buffers, 'buffer element')}"


def outcome_lines(found: Inspection) -> list[OutcomeLine]:
    """A line a target; what the targets of norms all leave is said once, in a line of its own."""
    norms = [set(outcome.reasons) for outcome in found.outcomes if outcome.target in NORM_FORMS]
    common = set.intersection(*norms) if norms else set()
    lines = []
    for outcome in found.outcomes:
        changes = [plural(n, w) for n, w in ((outcome.norms, "norm"), (outcome.weights, "weight")) if n]
        own = [reason for reason in outcome.reasons if outcome.target not in NORM_FORMS or reason not in common]
        left = _NOTHING.sub("", outcome.problem) or _reasons(own)
        lines.append(OutcomeLine(_as_typed(outcome.target), ", ".join(changes) or "nothing", outcome.exact, left))
    groups = groupby(lines, key=lambda line: line.left if line.changes == "nothing" else line)
    lines = [_spanning(list(alike)) for _, alike in groups]
    if common:
        left = _reasons(sorted(common, key=lambda reason: -reason[1]))
        lines.append(OutcomeLine("all", "of gn to fold", None, left))
    return lines


def _as_typed(target: str) -> str:
    """A target as an option names it that is none of `--to`."""
    option, _, form = target.partition("-")
    return f"--{option} {form}" if option == "recurrent" else target


def _spanning(alike: Sequence[OutcomeLine]) -> OutcomeLine:
    """Targets that follow each other and change nothing for the same reason as one line; a single one as it is."""
    names = [line.target for line in alike]
    name = names[0] if len(names) == 1 else ", ".join(names) if len(names) == 2 else f"{names[0]} to {names[-1]}"
    return replace(alike[0], target=name)


def _reasons(reasons: Sequence[tuple[str, int]]) -> str:
    return "; ".join(f"{count} left: {reason}" for reason, count in reasons[:_MOST_REASONS])


def layer_cells(layer: Layer) -> tuple[str, str, str, str]:
    """One layer: its names, what it is, the size of the maps that it reads, and its state."""
    groups = f", {plural(layer.groups, 'group')}" if layer.groups is not None else ""
    size = layer.size or (f"{layer.channels}{groups}" if layer.channels is not None else "")
    maps = "×".join(map(str, layer.spatial)) if layer.spatial else ""
    frozen = "frozen" if layer.trained is False else ""
    state = ", ".join(word for word in (frozen, layer.statistics, layer.obstacle) if word)
    return " = ".join(path or ROOT for path in layer.paths), f"{layer.module} {size}".rstrip(), maps, state
