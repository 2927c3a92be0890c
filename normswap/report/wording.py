"""The sentences and the small tables of a report, the same in every view of it."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from normswap.report import charts
from normswap.report.path_patterns import NUMBER, ROOT, fold_items, fold_paths, span, summarize_paths
from normswap.report.report import (
    CARRIED_OVER,
    Accuracy,
    Calibration,
    Change,
    Cost,
    Drift,
    Left,
    Report,
    Totals,
    Written,
)
from normswap.target_table import describe_slowdown

Item = TypeVar("Item")
GroupKey = TypeVar("GroupKey")
MAY_BE_EXACT = ("norm", "weight", "copy")
"""The kinds of changes of which a report says whether they are exact."""
_MOST_FURTHEST = 3  # layers that are named as those that moved furthest


@dataclass(frozen=True)
class Section:
    """Changes that did the same to the learnt values: they are shown together."""

    how: str  # what became of the learnt values: the heading
    exact: bool | None  # None: changes of a kind that is never called exact
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Line:
    """One layer, or several that are alike, as one line."""

    path: str  # or a pattern of paths
    what: str  # what became what: `BatchNorm2d → GroupNorm(8)`; the class of layers that stayed
    count: int  # of layers
    reason: str = ""  # why they stayed


def heading(report: Report, source: str) -> str:
    return source if report.target == "diff" else f"{source} → {report.target}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def verdict(exact: bool) -> str:
    return "exact" if exact else "approximate"


LEGEND = {
    "exact": "the same outputs as before in eval mode, up to rounding",
    "matched": "near: gain and bias come from the running statistics, no data",
    "calibrated": "nearer: then fitted to the old outputs on your data",
}
"""The words for what a conversion keeps, and what they mean."""
COMMAND = "command"
DRIFT_TITLE = "how much of each layer's output moved"
DRIFT_SCALE = "share of the output (relative L2); a full bar is 100%"


def kept_word(report: Report) -> str:
    """How much of the function the whole conversion keeps: a word of `LEGEND`, or "approximate"."""
    norms = [change for change in report.changes if change.kind == "norm"]
    return verdict(True) if report.exact else _word_of_norms(report) if norms else verdict(False)


def change_word(change: Change, report: Report) -> str:
    """The same of one change, and of those in its section; "" for a kind that is never called exact."""
    if change.kind not in MAY_BE_EXACT:
        return ""
    return _word_of_norms(report) if not change.exact and change.kind == "norm" else verdict(change.exact)


def _word_of_norms(report: Report) -> str:
    """How near the norms are that are not exact."""
    if report.calibration is not None and report.calibration.kept == "calibrated":
        return "calibrated"
    transfer = report.recipe.get("options", {}).get("transfer", "match")
    return "matched" if transfer == "match" else verdict(False)


def _grouped(items: Iterable[Item], key: Callable[[Item], GroupKey]) -> dict[GroupKey, list[Item]]:
    """The items that have the same key, keys in order of appearance."""
    groups: dict[GroupKey, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def sections(changes: Sequence[Change]) -> list[Section]:
    """The changes by what became of the learnt values, in order of appearance."""
    alike = _grouped(changes, lambda change: (change.how, change.exact))
    return [
        Section(how, exact if members[0].kind in MAY_BE_EXACT else None, tuple(members))
        for (how, exact), members in alike.items()
    ]


def change_lines(changes: Sequence[Change], full: bool = False) -> list[Line]:
    """A line for all changes that differ in numbers alone: those in their paths, and the groups of the new layers.

    With `full`, a line for each change, with all its names.
    """
    if full:
        names = [" = ".join(path or ROOT for path in change.paths) for change in changes]
        return [Line(name, f"{c.before} → {c.after}", len(c.paths)) for name, c in zip(names, changes, strict=True)]
    if changes[0].kind == "tensor" and not changes[0].how.startswith("renamed"):
        return _tensor_lines(changes)
    lines = []
    alike = _grouped(changes, lambda change: (change.before, change.after.partition("(")[0]))
    for (before, after), members in alike.items():
        if after == CARRIED_OVER:  # nobody looks for one of them: those that are dropped are named
            lines.append(Line("parameters", f"{before} → {after}", len(members)))
            continue
        for pattern, those in fold_items(members, _first_path):
            groups = [int(found[1]) for change in those if (found := re.search(rf"\(({NUMBER})\)", change.after))]
            what = f"{before} → {after}{f'({span(groups)})' if groups else ''}"
            lines.append(Line(pattern, what, len(those)))
    return lines


def _first_path(change: Change) -> str:
    return change.paths[0]


def _tensor_lines(changes: Sequence[Change]) -> list[Line]:
    """Tensors by the last part of their key; how far those moved that differ in value."""
    alike = _grouped(changes, lambda change: _first_path(change).rpartition(".")[2]).values()
    return [
        Line(pattern, _difference(those), len(those))
        for members in alike
        for pattern, those in fold_items(members, _first_path)
    ]


def _difference(changes: Sequence[Change]) -> str:
    """How far tensors moved that differ in value; of others their shapes."""
    moved = sorted(change.amount for change in changes if change.amount is not None)
    if moved:
        least, most = f"{moved[0]:.2g}", f"{moved[-1]:.2g}"
        return f"relative L2 {least}" + (f" to {most}" if least != most else "")
    shapes = {f"{change.before} → {change.after}" for change in changes}
    return shapes.pop() if len(shapes) == 1 else "several shapes"


def left_lines(left: Sequence[Left], full: bool = False) -> list[Line]:
    """What stayed, and why: a line for all of one class and one reason; with `full`, for each."""
    if full:
        return [Line(entry.path or ROOT, entry.module, 1, entry.reason) for entry in left]
    return [
        Line(pattern, module, count, reason)
        for (module, reason), members in _grouped(left, lambda entry: (entry.module, entry.reason)).items()
        for pattern, count in fold_paths(entry.path for entry in members)
    ]


def left_by_reason(left: Sequence[Left], full: bool = False) -> dict[str, list[Line]]:
    """The lines of what stayed, by why."""
    return _grouped(left_lines(left, full), lambda line: line.reason)


def written_lines(found: Written | None) -> list[tuple[str, str]]:
    """What was typed, what was written, and how to load it, each behind its name."""
    if found is None:
        return []
    lines = [(COMMAND, found.command), ("written to", found.path), ("load it with", found.load)]
    return [(name, text) for name, text in lines if text]


def notes(changes: Sequence[Change]) -> list[str]:
    """What is to be said of single layers; notes that differ in numbers alone are one."""
    texts = []
    noted = [change for change in changes if change.note]
    for between, members in _grouped(noted, lambda change: tuple(re.split(NUMBER, change.note))).items():
        numbers = zip(*(map(int, re.findall(NUMBER, change.note)) for change in members), strict=True)
        spans = [span(column) for column in numbers]
        note = "".join(part + number for part, number in zip(between, [*spans, ""], strict=True))
        texts.append(f"{summarize_paths([change.paths[0] for change in members])}: {note}")
    return texts


def left_heading(report: Report) -> str:
    return f"{'the same' if report.target == 'diff' else 'left as it was'}: {report.totals.left}"


def counts_sentence(report: Report) -> str:
    """How many were changed, and how many left."""
    totals = report.totals
    if report.target == "diff":
        found = Counter(change.how for change in report.changes)
        differences = ", ".join(f"{count} {how}" for how, count in found.items()) or "no difference"
        return f"{differences}; {totals.left} the same"
    norms, weights = plural(totals.norms_changed, "norm"), plural(totals.weights_changed, "weight")
    return f"{norms}, {weights} changed: {kept_word(report)}; {totals.left} left"


def short_counts(report: Report) -> str:
    """The same without how exact it is, in a few words."""
    totals = report.totals
    if report.target == "diff":
        return f"{plural(len(report.changes), 'difference')}, {totals.left} the same"
    norms, weights = plural(totals.norms_changed, "norm"), plural(totals.weights_changed, "weight")
    return f"{norms}, {weights} changed, {totals.left} left"


def sizes_sentence(totals: Totals) -> str:
    """How many parameters and buffer elements there were, and are."""
    return (
        f"parameters {totals.parameters_before:,} → {totals.parameters_after:,}, "
        f"buffers {totals.buffers_before:,} → {totals.buffers_after:,}"
    )


def summary(report: Report) -> list[str]:
    """Counts, and all that `details` has, a sentence each."""
    return [counts_sentence(report), *details(report)]


def details(report: Report) -> list[str]:
    """Sizes, drift, calibration, what training will take longer, and the cost of it all, a sentence each."""
    if report.target == "diff":
        return [sizes_sentence(report.totals)]
    furthest = furthest_sentence(report.drift) if report.drift and not report.exact else ""
    sentences = [
        accuracy_sentence(report.accuracy) if report.accuracy else "",
        report.recognized,
        sizes_sentence(report.totals),
        drift_sentence(report.drift) if report.drift else "",
        furthest,
        calibration_sentence(report.calibration) if report.calibration else "",
        describe_slowdown(report.target) if report.changes else "",
        cost_sentence(report.cost) if report.cost else "",
    ]
    return [sentence for sentence in sentences if sentence]


def calibration_sentence(found: Calibration) -> str:
    """Which values were kept, and what that is worth."""
    line = f"calibration with {plural(found.samples, 'sample')}: kept the {found.kept} values"
    if found.calibrated_error is not None:
        where = "error" if found.measure == "output" else "error at the norms"
        line += f"; {where} {found.matched_error:.2g} matched, {found.calibrated_error:.2g} calibrated"
        if found.matched_top1 is not None and found.calibrated_top1 is not None:
            line += f", top-1 agreement {found.matched_top1:.1%} and {found.calibrated_top1:.1%}"
        line += f" ({found.held_out} held out)"
    if found.unlikeness is not None:
        line += f"; the data are {found.unlikeness:.2g} standard deviations from what the norms have learnt"
    return f"{line}; {found.note}" if found.note else line


def accuracy_sentence(found: Accuracy) -> str:
    """What the demo's network still knows, and what the other ways would have left."""
    line = f"accuracy on {found.data}: {found.before:.1%} before, {found.after:.1%} after"
    if found.reset is None or found.copied is None:
        return line
    return f"{line}; gain and bias reset would have left {found.reset:.1%}, copied {found.copied:.1%}"


def drift_sentence(found: Drift) -> str:
    """How far the output moved, and on what; "" on noise, which has only checked what is exact."""
    if found.probe.startswith("noise"):
        return ""
    measured = [
        f"relative L2 {found.relative_l2:.2g}" if found.relative_l2 is not None else "",
        f"cosine {found.cosine:.4f}" if found.cosine is not None else "",
        f"top-1 agreement {found.top1_agreement:.0%}" if found.top1_agreement is not None else "",
        found.note,
    ]
    return f"drift on {found.probe}: {', '.join(part for part in measured if part)}"


def furthest_sentence(found: Drift) -> str:
    """The layers that moved furthest, which a user may want to exclude."""
    furthest = sorted(found.layers, key=lambda layer: -layer.relative_l2)[:_MOST_FURTHEST]
    named = ", ".join(f"{layer.path or ROOT} {charts.percent(layer.relative_l2)}" for layer in furthest)
    return f"furthest: {named}" if named else ""


def cost_sentence(found: Cost) -> str:
    """What the run took."""
    memory = f", {found.peak_memory / 2**30:.1f} GiB of memory at most" if found.peak_memory is not None else ""
    return f"took {found.seconds:.1f} s{memory}"
