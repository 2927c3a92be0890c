"""A report as the terminal shows it."""

import io
import re

from rich.console import Console

import normswap
from normswap.report.terminal import ReportView


def printed(report: normswap.Report, width: int = 100, full: bool = False) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(ReportView(report, "model.pt", full))
    return re.sub(r" +$", "", stream.getvalue(), flags=re.MULTILINE)
