"""A report to the terminal: lines folded into patterns of paths, or every line."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from normswap.printable import printable
from normswap.report import charts, wording
from normswap.report.report import Left, Report

_MOST_NOTES = 8
_LONGEST_BAR = 24  # characters
_SHORTEST_PATH = 20  # characters
_COLORS = {"small": "green", "medium": "yellow", "large": "red"}
_ASCII = str.maketrans({"→": "->", "×": "x", "█": "#", "…": "...", "·": "-", "–": "-", "—": "-", "‖": "|", "’": "'"})


@dataclass(frozen=True)
class Terminal:
    """What a terminal can show."""

    width: int  # columns
    ascii_only: bool  # its encoding has no arrows

    def string(self, text: str) -> str:
        """`text` in characters that do nothing to a terminal, and that this one has."""
        shown = printable(text)
        return shown.translate(_ASCII) if self.ascii_only else shown

    def text(self, text: str, style: str = "") -> Text:
        """The same for rich."""
        return Text(self.string(text), style=style)

    def fitted(self, text: str, columns: int) -> Text:
        """The same in one line of at most so many columns: what is too much is left out in the middle."""
        shown, gap = self.string(text), self.string("…")
        if len(shown) <= columns:
            return Text(shown)
        kept = columns - len(gap)
        return Text(f"{shown[: kept - kept // 2]}{gap}{shown[len(shown) - kept // 2 :]}")


def plain_table(*names: str) -> Table:
    """A table without lines or header, whose texts fold; `count` and `value` stand at the right."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in names:
        number = name in ("count", "value")
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number)
    return table


@dataclass(frozen=True)
class ReportView:
    """A `Report` for rich."""

    report: Report
    title: str = ""  # what was converted
    full: bool = False  # a line for every layer, not patterns
    command: bool = False  # what was typed, which a terminal shows already

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(*self._parts(Terminal(options.max_width, options.ascii_only)))

    def _parts(self, terminal: Terminal) -> Iterator[Table | Text]:
        report = self.report
        yield terminal.text(wording.heading(report, self.title), "bold")
        yield Text()
        yield from self._changes(terminal)
        if notes := self._notes(terminal):
            yield from (Text("notes on single layers", style="bold"), *notes, Text())
        if report.left:
            yield from (Text(wording.left_heading(report), style="bold"), *self._left(terminal), Text())
        if not report.exact and (bars := charts.drift_bars(report.drift, self.full)):
            yield from (Text(wording.DRIFT_TITLE, style="bold"), terminal.text(wording.DRIFT_SCALE, "dim"))
            yield from (_drift_chart(bars, terminal), Text())
        yield from (_with_verdict(terminal.text(sentence)) for sentence in wording.summary(report))
        yield from (terminal.text(note, "dim") for note in report.notes)
        yield from (terminal.text(f"warning: {notice}", "yellow") for notice in report.warnings)
        if report.target != "diff":
            yield from (Text(), _legend(terminal))
        lines = wording.written_lines(report.written)
        if lines := [(name, text) for name, text in lines if self.command or name != wording.COMMAND]:
            yield from (Text(), _written(lines, terminal))

    def _changes(self, terminal: Terminal) -> Iterator[Table | Text]:
        """A heading for each section, and below it what became what."""
        sections = wording.sections(self.report.changes)
        lines_of = [wording.change_lines(section.changes, self.full) for section in sections]
        width = max((len(terminal.string(line.path)) for lines in lines_of for line in lines), default=0)
        for section, lines in zip(sections, lines_of, strict=True):
            title = terminal.text(section.how, "bold")
            if section.exact is not None:
                style = "green" if section.exact else "yellow"
                word = wording.change_word(section.changes[0], self.report)
                title.append_text(Text.assemble(" (", (word, style), ")", style="none"))
            yield title
            table = plain_table("path", "change", "count")
            table.columns[0].min_width = min(width + 2, 50, max(26, terminal.width - 34))
            for line in lines:
                count = "" if self.full else f"×{line.count}"
                table.add_row(*map(terminal.text, (f"  {line.path}", line.what, count)))
            yield table
            yield Text()

    def _notes(self, terminal: Terminal) -> list[Text]:
        notes = [terminal.text(note) for note in wording.notes(self.report.changes)]
        if len(notes) > _MOST_NOTES and not self.full:
            hidden = len(notes) - _MOST_NOTES
            return [*notes[:_MOST_NOTES], Text(f"and {hidden} more lines (--full)", style="dim")]
        return notes

    def _left(self, terminal: Terminal) -> Iterator[Table | Text]:
        """Each reason, and below it the layers that stay for it."""
        for reason, lines in wording.left_by_reason(self.report.left, self.full).items():
            table = plain_table("path", "module", "count")
            for line in lines:
                count = "" if self.full else f"×{line.count}"
                table.add_row(*map(terminal.text, (f"    {line.path}", line.what, count)))
            if self.report.target != "diff":  # whose heading says it: the same
                yield terminal.text(f"  {reason}")
            yield table


def _with_verdict(sentence: Text) -> Text:
    sentence.highlight_words(["approximate;", "matched;", "calibrated;"], "yellow")
    sentence.highlight_words(["exact;"], "green")
    return sentence


def _legend(terminal: Terminal) -> Table:
    table = plain_table("word", "meaning")
    table.columns[0].no_wrap = True
    for word, meaning in wording.LEGEND.items():
        table.add_row(terminal.text(word, "dim"), terminal.text(meaning, "dim"))
    return table


def _written(lines: list[tuple[str, str]], terminal: Terminal) -> Table:
    table = plain_table("name", "text")
    table.columns[0].no_wrap = True
    for name, value in lines:
        table.add_row(terminal.text(name, "bold"), terminal.text(value))
    return table


def _drift_chart(bars: list[charts.Bar], terminal: Terminal) -> Table:
    """A bar a line on one scale, which no label breaks."""
    table = plain_table("path", "value", "bar", "count")
    table.columns[0].no_wrap = table.columns[2].no_wrap = table.columns[3].no_wrap = True
    most = max(6, min(_LONGEST_BAR, terminal.width // 3 - 8))
    beside = (
        2 + most + max(len(bar.shown) for bar in bars) + max(len(bar.several) for bar in bars) + 6
    )  # two spaces between columns
    for bar in bars:
        length = max(1, round(most * bar.share))
        filled, rest = terminal.string("█" * length), terminal.string("·" * (most - length))
        drawn = Text.assemble((filled, _COLORS[bar.severity]), (rest, "dim"))
        path = Text("  ") + terminal.fitted(bar.path, max(_SHORTEST_PATH, terminal.width - beside))
        table.add_row(path, bar.shown, drawn, terminal.text(bar.several, "dim"))
    return table


def left_table(left: Sequence[Left]) -> Table:
    """What stayed, and why, for rich."""
    table = plain_table("path", "module", "count", "reason")
    for line in wording.left_lines(left):
        table.add_row(*map(Text, map(printable, (line.path, line.what, f"×{line.count}", line.reason))))
    return table
