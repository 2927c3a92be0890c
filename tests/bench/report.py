"""The picture of a report that the README opens with: a MobileNetV2 that was trained on the digits, converted.

Run: python tests/bench/report.py [--cache FOLDER]; half a minute, or seconds where the folder has the trained weights.
Writes results/report.svg.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import torch
from digits import digits
from nets import trained
from typer.testing import CliRunner

from normswap.cli import commands

PICTURE = Path(__file__).parent / "results" / "report.svg"


def draw(cache: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, data, picture = (Path(folder) / name for name in ("mobilenet_v2.pt", "pictures.pt", "report.svg"))
        torch.save(trained("MobileNetV2", cache), model)
        torch.save(digits()[0][:256], data)
        asked = ["convert", model.name, "--to", "gn-ws", "--calibrate", data.name, "--report", picture.name]
        here = Path.cwd()
        os.chdir(folder)  # the picture names files without their folder
        done = CliRunner().invoke(commands.app, [*asked, "--dry-run", "--quiet"])
        os.chdir(here)
        if done.exit_code:
            raise SystemExit(done.stderr)
        shutil.copy(picture, PICTURE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="keeps the trained weights")
    draw(parser.parse_args().cache)
