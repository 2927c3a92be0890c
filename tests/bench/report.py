"""The picture of a report that the README opens with: its first command.

Run: python tests/bench/report.py; it takes seconds. Writes results/report.svg.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path

from normswap.files.convert_file import convert_file
from normswap.report.formats import to_svg

COMMAND = "normswap convert demo:digits --to gn-ws"
PICTURE = Path(__file__).parent / "results" / "report.svg"


def draw() -> str:
    """The picture, as SVG."""
    _, _, source, _, target = shlex.split(COMMAND)
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where the command writes its model
        report = convert_file(source, target, command=COMMAND)
        os.chdir(here)
    return to_svg(report, source)


if __name__ == "__main__":
    PICTURE.write_text(draw())
