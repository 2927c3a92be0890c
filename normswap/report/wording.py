"""The sentences and the small tables of a report, the same in every view of it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from normswap.report.path_patterns import ROOT, grouped, places, span
from normswap.report.report import Calibration, Change, Cost, Drift, Left, Report, Totals
from normswap.target_table import slowdown

JUDGED = ("norm", "weight", "copy")
"""Kinds of changes that keep a function, or do not."""
_WORST = 3


@dataclass(frozen=True)
class Way:
    """One way of changing: what became of the learnt values, whether that is exact (None: not asked), and the changes."""

    how: str
    exact: bool | None
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Line:
    """Changes of one kind in one line: a pattern of paths, what became what, and how many there are."""

    path: str
    became: str
    count: int


def heading(report: Report, source: str) -> str:
    return source if report.target == "diff" else f"{source} → {report.target}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def verdict(exact: bool) -> str:
    return "exact" if exact else "approximate"


def ways(changes: Sequence[Change]) -> list[Way]:
    """The changes by what became of the learnt values."""
    found: dict[tuple[str, bool], list[Change]] = defaultdict(list)
    for change in changes:
        found[change.how, change.exact].append(change)
    return [
        Way(how, exact if members[0].kind in JUDGED else None, tuple(members))
        for (how, exact), members in found.items()
    ]


def full_lines(changes: Iterable[Change]) -> list[Line]:
    """A line for each change, with all its names."""
    return [
        Line(" = ".join(path or ROOT for path in c.paths), f"{c.before} → {c.after}", len(c.paths)) for c in changes
    ]


def lines(changes: Sequence[Change]) -> list[Line]:
    """The changes folded into patterns."""
    if changes[0].kind == "tensor" and not changes[0].how.startswith("renamed"):
        return list(_tensor_lines(changes))
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
    pairs = []
    for change in changes:
        key = (change.before, change.after.partition("(")[0])
        if found := re.search(r"\((\d+)\)", change.after):
            numbers[key].add(int(found[1]))
        pairs.append((key, change.paths[0]))
    told = []
    for key, pattern, count in grouped(pairs):
        written = f"({span(numbers[key])})" if numbers[key] else ""
        told.append(Line(pattern, f"{key[0]} → {key[1]}{written}", count))
    return told


def _tensor_lines(changes: Sequence[Change]) -> Iterable[Line]:
    """Tensors by the last part of their key; how far those moved that differ in value."""
    pairs = [((change.paths[0].rpartition(".")[2],), change.paths[0]) for change in changes]
    amounts: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for key, change in zip((key for key, _ in pairs), changes, strict=True):
        if change.amount is not None:
            amounts[key].append(change.amount)
    for key, pattern, count in grouped(pairs):
        moved = sorted(amounts[key])
        far = f"relative L2 {moved[0]:.2g}" + (f" to {moved[-1]:.2g}" if len(moved) > 1 else "") if moved else ""
        shapes = {f"{c.before} → {c.after}" for c in changes if c.paths[0].rpartition(".")[2] == key[0]}
        yield Line(pattern, far or (shapes.pop() if len(shapes) == 1 else "several shapes"), count)


def notes(changes: Sequence[Change]) -> list[str]:
    """What differs from what was asked; notes that differ in numbers alone are one."""
    alike: dict[str, list[Change]] = defaultdict(list)
    for change in changes:
        if change.note:
            alike[re.sub(r"\d+", "#", change.note)].append(change)
    told = []
    for text, members in alike.items():
        numbers = zip(*(map(int, re.findall(r"\d+", change.note)) for change in members), strict=True)
        spans = [span(column) for column in numbers]
        note = "".join(part + number for part, number in zip(text.split("#"), [*spans, ""], strict=True))
        told.append(f"{places([change.paths[0] for change in members])}: {note}")
    return told


def left_lines(left: Sequence[Left]) -> list[tuple[str, str, int, str]]:
    """(pattern, class, count, reason) of what stayed."""
    found = grouped(((entry.module, entry.reason), entry.path) for entry in left)
    return [(pattern, module, count, reason) for (module, reason), pattern, count in found]


def left_heading(report: Report) -> str:
    return f"{'the same' if report.target == 'diff' else 'left as it was'}: {report.totals.left}"


def counts(report: Report) -> str:
    """How many were changed, and how many left."""
    totals = report.totals
    if report.target == "diff":
        found = Counter(change.how for change in report.changes)
        told = ", ".join(f"{count} {how}" for how, count in found.items()) or "no difference"
        return f"{told}; {totals.left} the same"
    norms, weights = plural(totals.norms_changed, "norm"), plural(totals.weights_changed, "weight")
    return f"{norms}, {weights} changed: {verdict(report.exact)}; {totals.left} left"


def sizes(totals: Totals) -> str:
    return (
        f"parameters {totals.parameters_before:,} → {totals.parameters_after:,}, "
        f"buffers {totals.buffers_before:,} → {totals.buffers_after:,}"
    )


def summary(report: Report) -> list[str]:
    """Counts, sizes, drift, calibration, what training will take longer, and the cost of it all, a sentence each."""
    if report.target == "diff":
        return [counts(report), sizes(report.totals)]
    told = [counts(report), sizes(report.totals), drift(report.drift)]
    if not report.exact and report.drift and (furthest := worst(report.drift)):
        told.append(furthest)
    told += [calibration(report.calibration)] if report.calibration else []
    told += [slower] if (slower := slowdown(report.target)) and report.changes else []
    return [*told, cost(report.cost)] if report.cost else told


def calibration(found: Calibration) -> str:
    """Which values were kept, and what that is worth."""
    line = f"calibrated on {plural(found.samples, 'sample')}: kept {found.kept}"
    if found.calibrated_error is not None:
        where = "error" if found.measure == "output" else "error at the norms"
        line += f"; {where} {found.matched_error:.2g} matched, {found.calibrated_error:.2g} calibrated"
        if found.matched_top1 is not None and found.calibrated_top1 is not None:
            line += f", top-1 agreement {found.matched_top1:.1%} and {found.calibrated_top1:.1%}"
        line += f" ({found.held_out} held out)"
    return f"{line}; {found.note}" if found.note else line


def drift(found: Drift | None) -> str:
    """How far the output moved, and on what."""
    if found is None:
        return "drift not measured: no probe input"
    measured = [
        f"relative L2 {found.relative_l2:.2g}" if found.relative_l2 is not None else "",
        f"cosine {found.cosine:.4f}" if found.cosine is not None else "",
        f"top-1 agreement {found.top1_agreement:.0%}" if found.top1_agreement is not None else "",
        found.note,
    ]
    caution = " (noise says little about accuracy)" if found.probe.startswith("noise") else ""
    return f"drift on {found.probe}{caution}: {', '.join(part for part in measured if part)}"


def worst(found: Drift) -> str:
    """The layers that moved furthest, which a user may want to exclude."""
    furthest = sorted(found.layers, key=lambda layer: -layer.relative_l2)[:_WORST]
    told = ", ".join(f"{layer.path or ROOT} {layer.relative_l2:.2g}" for layer in furthest)
    return f"furthest: {told}" if told else ""


def cost(found: Cost) -> str:
    """What the run took."""
    memory = f", {found.peak_memory / 2**30:.1f} GiB of memory at most" if found.peak_memory is not None else ""
    return f"took {found.seconds:.1f} s{memory}"
