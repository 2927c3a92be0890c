"""A report to the terminal: lines folded into patterns of paths, or every line."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from normswap.report import charts, wording
from normswap.report.path_patterns import ROOT
from normswap.report.report import Report

_MOST_NOTES = 8
_BAR = 24  # characters of the longest bar
_FAR = 1.0  # relative L2 beyond which a bar grows no more: the output has little in common with the one before
_ASCII = str.maketrans({"→": "->", "×": "x", "█": "#", "…": "...", "·": "-", "–": "-", "—": "-", "‖": "|", "’": "'"})


def told(text: str, options: ConsoleOptions) -> str:
    """`text` as the terminal can show it."""
    return text.translate(_ASCII) if options.ascii_only else text


def columns(*names: str) -> Table:
    """A table without lines or header, whose texts fold; `count` stands at the right."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in names:
        number = name in ("count", "value")
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number)
    return table


class ReportView:
    """A `Report` for rich: folded into patterns, or with `full` a line for every layer."""

    def __init__(self, report: Report, title: str = "", out: str = "", full: bool = False):
        self.report, self.title, self.out, self.full = report, title, out, full

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.options = options
        report = self.report
        parts: list[Table | Text] = [self._text(wording.heading(report, self.title), "bold"), Text()]
        parts += self._changes()
        if notes := self._notes():
            parts += [Text("differs from what was asked", style="bold"), *notes, Text()]
        if report.left:
            parts += [Text(wording.left_heading(report), style="bold"), self._left(), Text()]
        if not report.exact and (bars := charts.bars(report.drift, self.full)):
            parts += [Text("drift of each layer's output", style="bold"), self._bars(bars), Text()]
        parts += [self._verdict(line) for line in wording.summary(report)]
        parts += [self._text(f"warning: {notice}", "yellow") for notice in report.warnings]
        if self.out:
            parts.append(Text.assemble(("written to", "bold"), f" {self.out}", overflow="fold"))
        yield Group(*parts)

    def _text(self, text: str, style: str = "") -> Text:
        return Text(told(text, self.options), style=style)

    def _verdict(self, line: str) -> Text:
        text = self._text(line)
        text.highlight_words(["approximate;"], "yellow")
        text.highlight_words(["exact;"], "green")
        return text

    def _changes(self) -> Iterator[Table | Text]:
        """A heading for each way of changing, and below it what became what."""
        ways = wording.ways(self.report.changes)
        lines = [wording.full_lines(way.changes) if self.full else wording.lines(way.changes) for way in ways]
        width = max((len(line.path) for members in lines for line in members), default=0)
        for way, members in zip(ways, lines, strict=True):
            title = self._text(way.how, "bold")
            if way.exact is not None:
                title.append_text(
                    Text.assemble(" (", (wording.verdict(way.exact), _style(way.exact)), ")", style="none")
                )
            yield title
            table = columns("path", "change", "count")
            table.columns[0].min_width = min(width + 2, 50, max(26, self.options.max_width - 34))
            for line in members:
                count = "" if self.full else f"×{line.count}"
                table.add_row(self._text(f"  {line.path}"), self._text(line.became), self._text(count))
            yield table
            yield Text()

    def _notes(self) -> list[Text]:
        notes = [self._text(note) for note in wording.notes(self.report.changes)]
        if len(notes) > _MOST_NOTES and not self.full:
            hidden = len(notes) - _MOST_NOTES
            return [*notes[:_MOST_NOTES], Text(f"and {hidden} more lines (--full)", style="dim")]
        return notes

    def _left(self) -> Table:
        table = columns("path", "module", "count", "reason")
        if self.full:
            for entry in self.report.left:
                table.add_row(self._text(entry.path or ROOT), entry.module, "", self._text(entry.reason))
            return table
        for pattern, module, count, reason in wording.left_lines(self.report.left):
            table.add_row(self._text(pattern), module, self._text(f"×{count}"), self._text(reason))
        return table

    def _bars(self, bars: list[charts.Bar]) -> Table:
        table = columns("path", "value", "bar", "count")
        table.columns[2].no_wrap = table.columns[3].no_wrap = True
        longest = min(_FAR, max(bar.value for bar in bars)) or 1.0
        most = max(6, min(_BAR, self.options.max_width // 3 - 8))
        for bar in bars:
            length = max(1, round(most * min(1.0, bar.value / longest)))
            style = "red" if bar.value > 0.75 * longest else "yellow"
            several = f"furthest of {bar.count}" if bar.count > 1 else ""
            drawn = self._text("█" * length, style)
            table.add_row(self._text(f"  {bar.path}"), f"{bar.value:.2g}", drawn, self._text(several, "dim"))
        return table


def _style(exact: bool) -> str:
    return "green" if exact else "yellow"
