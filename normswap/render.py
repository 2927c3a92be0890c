"""A report to the terminal: lines folded into patterns of paths, or every line."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from normswap.report import Calibration, Change, Drift, Left, Report, Totals

_MOST_NOTES = 8
_ROOT = "(root)"
_JUDGED = ("norm", "weight", "copy")  # kinds of changes that keep a function, or do not
Key = TypeVar("Key", bound=Hashable)


def fold_paths(paths: Iterable[str]) -> list[tuple[str, int]]:
    """Module paths as patterns, each with the number of paths it stands for.

    Paths that differ in numbers alone fall together: `layer1.0.bn1` to `layer4.2.bn3` are
    `layer[1-4].*.bn[1-3]`. A pattern sums up; it may cover paths that were not given.
    """
    shapes: dict[tuple[str, ...], list[list[int | None]]] = defaultdict(list)
    for path in paths:
        parts = [re.fullmatch(r"(.*?)(\d*)", part) for part in path.split(".")]
        stems = tuple(f"{part[1]}#" if part[2] else part[1] for part in parts if part)
        shapes[stems].append([int(part[2]) if part[2] else None for part in parts if part])
    folded = []
    for stems, rows in shapes.items():
        columns = zip(*rows, strict=True)
        written = (_segment(stem, set(column)) for stem, column in zip(stems, columns, strict=True))
        folded.append((".".join(written) or _ROOT, len(rows)))
    return folded


def _segment(stem: str, numbers: set[int | None]) -> str:
    if not stem.endswith("#"):
        return stem
    found = sorted(number for number in numbers if number is not None)
    if len(found) == 1:
        return f"{stem[:-1]}{found[0]}"
    if stem == "#":
        return "*"
    together = found[-1] - found[0] == len(found) - 1
    return f"{stem[:-1]}[{found[0]}-{found[-1]}]" if together else f"{stem[:-1]}[{','.join(map(str, found))}]"


def _grouped(pairs: Iterable[tuple[Key, str]]) -> Iterator[tuple[Key, str, int]]:
    """(key, pattern, count) for paths that are folded apart for each key, keys in order of appearance."""
    paths: dict[Key, list[str]] = defaultdict(list)
    for key, path in pairs:
        paths[key].append(path)
    for key, members in paths.items():
        for pattern, count in fold_paths(members):
            yield key, pattern, count


class ReportView:
    """A `Report` for rich: folded into patterns, or with `full` a line for every layer."""

    def __init__(self, report: Report, title: str = "", out: str = "", full: bool = False):
        self.report, self.title, self.out, self.full = report, title, out, full

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        report = self.report
        arrow = "" if report.target == "diff" else f" → {report.target}"
        parts: list[Table | Text] = [Text(f"{self.title}{arrow}", style="bold"), Text()]
        if report.changes:
            parts += _changes(report.changes, self.full)
        notes = _notes(report.changes, self.full)
        if notes:
            parts += [Text("differs from what was asked", style="bold"), *notes, Text()]
        if report.left:
            heading = "the same" if report.target == "diff" else "left as it was"
            parts += [Text(f"{heading}: {len(report.left)}", style="bold"), _left(report.left, self.full), Text()]
        parts += [*_summary(report), *(Text(f"warning: {notice}", style="yellow") for notice in report.warnings)]
        if self.out:
            parts.append(Text.assemble(("written to", "bold"), f" {self.out}", overflow="fold"))
        yield Group(*parts)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in columns:
        number = name == "count"
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number)
    return table


def _changes(changes: Sequence[Change], full: bool) -> Iterator[Table | Text]:
    """A heading for each way of changing, and below it what became what."""
    ways: dict[tuple[str, bool], list[Change]] = defaultdict(list)
    for change in changes:
        ways[change.how, change.exact].append(change)
    lines = {way: list(_change_lines(members, full)) for way, members in ways.items()}
    width = max(len(path) for members in lines.values() for path, _, _ in members)
    for way, members in lines.items():
        how, exact = way
        verdict = ("exact", "green") if exact else ("approximate", "yellow")
        judged = ways[way][0].kind in _JUDGED
        yield Text.assemble((how, "bold"), *((" (", verdict, ")") if judged else ()))
        table = _table("path", "change", "count")
        table.columns[0].min_width = min(width + 2, 50)
        for path, became, count in members:
            table.add_row(Text(f"  {path}"), Text(became), Text(count))
        yield table
        yield Text()


def _change_lines(changes: Sequence[Change], full: bool) -> Iterator[tuple[str, str, str]]:
    if full:
        for change in changes:
            yield " = ".join(path or _ROOT for path in change.paths), f"{change.before} → {change.after}", ""
        return
    if changes[0].kind == "tensor" and not changes[0].how.startswith("renamed"):
        yield from _tensor_lines(changes)
        return
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
    pairs = []
    for change in changes:
        key = (change.before, change.after.partition("(")[0])
        if "(" in change.after and change.groups:
            numbers[key].add(change.groups)
        pairs.append((key, change.paths[0]))
    for key, pattern, count in _grouped(pairs):
        groups = sorted(numbers[key])
        written = f"({groups[0]})" if len(groups) == 1 else f"({groups[0]}-{groups[-1]})" if groups else ""
        yield pattern, f"{key[0]} → {key[1]}{written}", f"×{count}"


def _tensor_lines(changes: Sequence[Change]) -> Iterator[tuple[str, str, str]]:
    """Tensors by the last part of their key; how far those moved that differ in value."""
    pairs = [((change.paths[0].rpartition(".")[2],), change.paths[0]) for change in changes]
    amounts: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for key, change in zip((key for key, _ in pairs), changes, strict=True):
        if change.amount is not None:
            amounts[key].append(change.amount)
    for key, pattern, count in _grouped(pairs):
        moved = sorted(amounts[key])
        far = f"relative L2 {moved[0]:.2g}" + (f" to {moved[-1]:.2g}" if len(moved) > 1 else "") if moved else ""
        shapes = {f"{c.before} → {c.after}" for c in changes if c.paths[0].rpartition(".")[2] == key[0]}
        yield pattern, far or (shapes.pop() if len(shapes) == 1 else "several shapes"), f"×{count}"


def _notes(changes: Sequence[Change], full: bool) -> list[Text]:
    lines = []
    for note, pattern, count in _grouped((change.note, change.paths[0]) for change in changes if change.note):
        lines.append(Text(f"{pattern}{f' ×{count}' if count > 1 else ''}: {note}"))
    if len(lines) > _MOST_NOTES and not full:
        hidden = len(lines) - _MOST_NOTES
        return [*lines[:_MOST_NOTES], Text(f"and {hidden} more lines (--full)", style="dim")]
    return lines


def _left(left: Sequence[Left], full: bool) -> Table:
    table = _table("path", "module", "count", "reason")
    if full:
        for entry in left:
            table.add_row(Text(entry.path or _ROOT), entry.module, "", Text(entry.reason))
        return table
    for (module, reason), pattern, count in _grouped(((entry.module, entry.reason), entry.path) for entry in left):
        table.add_row(Text(pattern), module, f"×{count}", Text(reason))
    return table


def _summary(report: Report) -> list[Text]:
    totals = report.totals
    if report.target == "diff":
        counts = Counter(change.how for change in report.changes)
        found = ", ".join(f"{count} {how}" for how, count in counts.items()) or "no difference"
        return [Text(f"{found}; {totals.left} the same"), _sizes(totals)]
    verdict = ("exact", "green") if report.exact else ("approximate", "yellow")
    return [
        Text.assemble(
            f"{_plural(totals.norms_changed, 'norm')}, {_plural(totals.weights_changed, 'weight')} changed: ",
            verdict,
            f"; {totals.left} left",
        ),
        _sizes(totals),
        Text(_drift(report.drift)),
        *([Text(_calibration(report.calibration))] if report.calibration else ()),
    ]


def _sizes(totals: Totals) -> Text:
    return Text(
        f"parameters {totals.parameters_before:,} → {totals.parameters_after:,}, "
        f"buffers {totals.buffers_before:,} → {totals.buffers_after:,}"
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _calibration(found: Calibration) -> str:
    """Which values were kept, and what that is worth."""
    line = f"calibrated on {_plural(found.samples, 'sample')}: kept {found.kept}"
    if found.calibrated_error is not None:
        where = "error" if found.measure == "output" else "error at the norms"
        line += f"; {where} {found.matched_error:.2g} matched, {found.calibrated_error:.2g} calibrated"
        if found.matched_top1 is not None and found.calibrated_top1 is not None:
            line += f", top-1 agreement {found.matched_top1:.1%} and {found.calibrated_top1:.1%}"
        line += f" ({found.held_out} held out)"
    return f"{line}; {found.note}" if found.note else line


def _drift(drift: Drift | None) -> str:
    if drift is None:
        return "drift not measured: no probe input"
    measured = [
        f"relative L2 {drift.relative_l2:.2g}" if drift.relative_l2 is not None else "",
        f"cosine {drift.cosine:.4f}" if drift.cosine is not None else "",
        f"top-1 agreement {drift.top1_agreement:.0%}" if drift.top1_agreement is not None else "",
        drift.note,
    ]
    caution = " (noise says little about accuracy)" if drift.probe.startswith("noise") else ""
    return f"drift on {drift.probe}{caution}: {', '.join(part for part in measured if part)}"
