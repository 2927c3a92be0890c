"""A report as Markdown, for a pull request."""

from collections.abc import Iterable, Iterator, Sequence

from normswap.report import charts, wording
from normswap.report.report import Report

_LONGEST_BAR = 20  # characters


def to_markdown(report: Report, source: str) -> str:
    """The report on a conversion (or a `diff`) of `source`, folded into patterns of paths."""
    return "\n".join(_parts(report, source)) + "\n"


def _parts(report: Report, source: str) -> Iterator[str]:
    yield f"### {_cell(wording.heading(report, source))}\n"
    yield from (f"- {_cell(line)}" for line in wording.summary(report))
    yield from (f"\n> **warning:** {_cell(notice)}" for notice in report.warnings)
    if report.changes:
        rows = [
            (_code(line.path), line.what, str(line.count), section.how + _in_brackets(section.exact))
            for section in wording.sections(report.changes)
            for line in wording.change_lines(section.changes)
        ]
        yield _table(("layers", "became", "count", "how"), rows)
    if notes := wording.notes(report.changes):
        yield "\nDiffers from what was asked:\n"
        yield from (f"- {_cell(note)}" for note in notes)
    if not report.exact and (bars := charts.drift_bars(report.drift)):
        longest = max(bar.value for bar in bars) or 1.0
        drawn = [
            (_code(b.path), f"{b.value:.2g}", "█" * max(1, round(_LONGEST_BAR * b.value / longest)), str(b.count))
            for b in bars
        ]
        yield _table(("layers", "drift, furthest", "", "count"), drawn)
    if report.left:
        rows = [(_code(line.path), line.what, str(line.count), line.reason) for line in wording.left_lines(report.left)]
        yield f"\n<details><summary>{wording.left_heading(report)}</summary>\n"
        yield _table(("layers", "class", "count", "why"), rows)
        yield "\n</details>"


def _in_brackets(exact: bool | None) -> str:
    return "" if exact is None else f" ({wording.verdict(exact)})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`"


def _cell(text: str) -> str:
    """`text` as no Markdown of its own, code in backquotes apart."""
    plain = text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    return plain if text.startswith("`") else plain.replace("*", "\\*").replace("_", "\\_")
