"""The sentences and the small tables of an inspection, the same in every view of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from normswap.report.inspection import Inspection, Layer
from normswap.report.path_patterns import ROOT
from normswap.report.wording import plural, verdict
from normswap.target_table import NORM_FORMS

_MOST_REASONS = 3
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
        left = outcome.problem or _reasons(own)
        lines.append(OutcomeLine(outcome.target, ", ".join(changes) or "nothing", outcome.exact, left))
    if common:
        left = _reasons(sorted(common, key=lambda reason: -reason[1]))
        lines.append(OutcomeLine("all", "of gn to fold", None, left))
    return lines


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
