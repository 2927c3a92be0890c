"""A report as Markdown, for a pull request."""

import re
from collections.abc import Iterable, Iterator, Sequence

from normswap.printable import printable
from normswap.report import charts, inspection_wording, wording
from normswap.report.inspection import Inspection
from normswap.report.path_patterns import summarize_paths
from normswap.report.report import Report

_LONGEST_BAR = 20  # characters
_MARKS = re.compile(r"[\\`*_\[\]<>~&#]|^[-+=]")
"""What Markdown takes for its own in a line of text, bars of tables apart; a backslash makes text of it."""
_INDENTED = re.compile(r"^(?: |\d(?=\d*[.)](?: |$)))")
"""And what no backslash helps against: the beginning of a block of code, or of a numbered list."""
_BAR = r"\|"
_LINKED = re.compile(r"@|//|\bwww\.|:\S+:|\$|#\d", re.IGNORECASE)
"""What GitHub makes a mention, a link, a picture or a formula of, however it is escaped, unless it is code."""


def report_as_markdown(report: Report, source: str) -> str:
    """The report on a conversion (or a `diff`) of `source`, folded into patterns of paths."""
    return "\n".join(_parts(report, source)) + "\n"


def inspection_as_markdown(found: Inspection, source: str) -> str:
    """The inspection of `source`."""
    return "\n".join(_inspection_parts(found, source)) + "\n"


def _inspection_parts(found: Inspection, source: str) -> Iterator[str]:
    yield f"### {_plain(f'{source} · {found.model}')}\n"
    yield f"{_plain(inspection_wording.counts(found))}"
    if found.advice:
        yield f"\n#### {inspection_wording.ADVICE.capitalize()}\n"
        yield from (f"- {_plain(a.situation)}: **{_plain(a.choose)}**: {_plain(a.why)}" for a in found.advice)
    if found.findings:
        yield f"\n#### {inspection_wording.FINDINGS.capitalize()}\n"
        for finding in found.findings:
            yield f"- {_plain(finding.problem)}: {_code(summarize_paths(finding.paths))}: {_plain(finding.note)}"
    yield f"\n#### {inspection_wording.OUTCOMES.capitalize()}"
    outcomes = [
        (_code(line.target), line.changes, line.verdict, _plain(line.left))
        for line in inspection_wording.outcome_lines(found)
    ]
    yield _table(("target", "changes", "in eval mode", "what stays, and why"), outcomes)
    if found.layers:
        probe = f" (maps: {_plain(found.probe)})" if found.probe else ""
        yield f"\n<details><summary>{inspection_wording.WHAT_IS_IN_IT}{probe}</summary>\n"
        rows = [
            [_code(path), *map(_plain, cells)] for path, *cells in map(inspection_wording.layer_cells, found.layers)
        ]
        yield _table(("path", "layer", "maps", "state"), rows)
        yield "\n</details>"


def _parts(report: Report, source: str) -> Iterator[str]:
    yield f"### {_plain(wording.heading(report, source))}\n"
    yield from (f"- {_plain(line)}" for line in wording.summary(report))
    yield from (f"- {_plain(note)}" for note in report.notes)
    yield from (f"\n> **warning:** {_plain(notice)}" for notice in report.warnings)
    if report.changes:
        rows = [
            (
                _code(line.path),
                _plain(line.what),
                str(line.count),
                _plain(section.how + _in_brackets(wording.change_word(section.changes[0], report))),
            )
            for section in wording.sections(report.changes)
            for line in wording.change_lines(section.changes)
        ]
        yield _table(("layers", "became", "count", "how"), rows)
    if notes := wording.notes(report.changes):
        yield "\nNotes on single layers:\n"
        yield from (f"- {_plain(note)}" for note in notes)
    if not report.exact and (bars := charts.drift_bars(report.drift)):
        drawn = [
            (_code(bar.path), bar.shown, "█" * max(1, round(_LONGEST_BAR * bar.share)), bar.several) for bar in bars
        ]
        yield f"\n{_plain(wording.DRIFT_TITLE.capitalize())} ({_plain(wording.DRIFT_SCALE)}):"
        yield _table(("layers", "moved", "", ""), drawn)
    if report.left:
        rows = [
            (_code(line.path), _plain(line.what), str(line.count), _plain(line.reason))
            for line in wording.left_lines(report.left)
        ]
        yield f"\n<details><summary>{wording.left_heading(report)}</summary>\n"
        yield _table(("layers", "class", "count", "why"), rows)
        yield "\n</details>"
    if report.target != "diff":
        yield "\n" + "; ".join(f"*{word}*: {_plain(meaning)}" for word, meaning in wording.LEGEND.items())
    yield from (f"\n{name}: {_code(text)}" for name, text in wording.written_lines(report.written))


def _in_brackets(word: str) -> str:
    return f" ({word})" if word else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "\n".join(f"| {' | '.join(cell.replace('|', _BAR) for cell in line)} |" for line in lines)


def _code(text: str) -> str:
    """`text` as code: between more backquotes than it has in a row."""
    shown = printable(text).replace("\\|", r"\\x7c")  # no two readers agree on a bar behind a backslash
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if shown.startswith(("`", " ")) or shown.endswith(("`", " ")) else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _plain(text: str) -> str:
    """`text` as no Markdown of its own."""
    shown = printable(text)
    if _LINKED.search(shown):
        return _code(shown)
    return _INDENTED.sub(lambda found: f"&#{ord(found[0])};", _MARKS.sub(r"\\\g<0>", shown))
