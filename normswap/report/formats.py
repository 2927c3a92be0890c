"""The formats of a report, by the ending of a file's name. A new format is one function and one row."""

import io
import json
import re
from collections.abc import Callable

from rich.console import Console

from normswap.report.html_page import to_html
from normswap.report.inspection import Inspection
from normswap.report.markdown import to_markdown
from normswap.report.report import Report
from normswap.report.terminal import ReportView

_SVG_WIDTH = 100  # characters


def to_svg(report: Report, source: str) -> str:
    """The report as the terminal shows it, as SVG."""
    console = Console(record=True, width=_SVG_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(ReportView(report, source))
    drawn = console.export_svg(title="normswap", unique_id="normswap")
    return re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL)  # they would be fetched from a server


def to_json(found: Report | Inspection, source: str = "") -> str:
    """A report or an inspection as `--json` prints it; `source` is not in it."""
    return json.dumps(found.to_dict(), indent=2) + "\n"


REPORT_FORMATS: dict[str, Callable[[Report, str], str]] = {
    ".html": to_html, ".md": to_markdown, ".json": to_json, ".svg": to_svg
}  # fmt: skip
