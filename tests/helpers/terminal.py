"""A report as the terminal shows it."""

import io
import re

from rich.console import Console

import normswap
from normswap.report.terminal import ReportView


def printed(report: normswap.Report, width: int = 100, full: bool = False, out: str = "") -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(ReportView(report, "model.pt", out, full))
    return re.sub(r" +$", "", stream.getvalue(), flags=re.MULTILINE)
