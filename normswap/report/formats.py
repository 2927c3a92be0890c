"""A report as a file: `--report FILE`, by the ending of its name. A new format is one function and one row."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from normswap.checkpoints import atomic_write
from normswap.errors import OptionError
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


def check(path: Path, overwrite: bool) -> None:
    """Raise, before any work, where no report can be written to `path`."""
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"--report {path}: give a name that ends in one of {', '.join(FORMATS)}")
    atomic_write.check_writable(path, overwrite)


def write(report: Report, source: str, path: Path, overwrite: bool) -> None:
    """Write the report on a conversion of `source`; raises `FileError`, with nothing written."""
    text = FORMATS[path.suffix.lower()](report, source)
    atomic_write.write_file(path, lambda file: file.write(text.encode("utf-8")), overwrite=overwrite)
