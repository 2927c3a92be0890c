"""The formats of a report, by the ending of a file's name. A new format is one function and one row."""

import io
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from normswap.printable import printable
from normswap.report.html_inspection import inspection_page
from normswap.report.html_page import report_page
from normswap.report.inspection import Inspection
from normswap.report.markdown import inspection_as_markdown, report_as_markdown
from normswap.report.report import Report
from normswap.report.terminal import ReportView
from normswap.report.terminal_inspection import InspectionView

_SVG_WIDTH = 100  # characters
_SVG = re.sub(r"\s*@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)  # fonts come from a server
_SURROGATE = re.compile("[\ud800-\udfff]")


Found = Report | Inspection
"""What is written."""


def to_html(found: Found, source: str) -> str:
    """A report or an inspection of `source` as one page."""
    return inspection_page(found, source) if isinstance(found, Inspection) else report_page(found, source)


def to_markdown(found: Found, source: str) -> str:
    """A report or an inspection of `source` as Markdown."""
    return inspection_as_markdown(found, source) if isinstance(found, Inspection) else report_as_markdown(found, source)


def to_svg(found: Found, source: str) -> str:
    """A report or an inspection as the terminal shows it, as SVG."""
    console = Console(record=True, width=_SVG_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(
        InspectionView(found, source) if isinstance(found, Inspection) else ReportView(found, source, command=True)
    )
    return console.export_svg(title="normswap", unique_id="normswap", code_format=_SVG)


def to_json(found: Found, source: str = "") -> str:
    """A report or an inspection as `--json` prints it; `source` is not in it.

    Names are the true ones, in ASCII: JSON has escapes of its own for what does not belong on a terminal. A lone
    surrogate alone is shown as in the other views, since many readers refuse a whole file for one. A number that is not
    finite, which JSON does not have, is null.
    """
    return json.dumps(_valid(found.to_dict()), indent=2, allow_nan=False) + "\n"


def _valid(data: Any) -> Any:
    """`data` with texts that are valid Unicode, and finite numbers."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, str):
        return _SURROGATE.sub(lambda found: printable(found[0]), data)
    if isinstance(data, Mapping):
        return {_valid(name): _valid(value) for name, value in data.items()}
    return [_valid(item) for item in data] if isinstance(data, list | tuple) else data


REPORT_FORMATS: dict[str, Callable[[Found, str], str]] = {
    ".html": to_html, ".md": to_markdown, ".json": to_json, ".svg": to_svg
}  # fmt: skip
