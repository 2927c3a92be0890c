"""The formats of a report, by the ending of a file's name. A new format is one function and one row."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable

from rich.console import Console

from normswap.report.html_page import page
from normswap.report.markdown import markdown
from normswap.report.report import Report
from normswap.report.terminal import ReportView

_SVG_WIDTH = 100  # characters


def picture(report: Report, source: str) -> str:
    """The report as the terminal shows it, as SVG."""
    console = Console(record=True, width=_SVG_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(ReportView(report, source))
    drawn = console.export_svg(title="normswap", unique_id="normswap")
    return re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL)  # they would be fetched from a server


def data(report: Report, source: str) -> str:
    """The report as `--json` prints it."""
    return json.dumps(report.to_dict(), indent=2) + "\n"


FORMATS: dict[str, Callable[[Report, str], str]] = {".html": page, ".md": markdown, ".json": data, ".svg": picture}
