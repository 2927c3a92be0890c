"""What the benchmarks share: the machine and the versions of a run, and its end as text or JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def environment() -> dict[str, Any]:
    """Machine, versions and date, for a reader who compares two runs."""
    packages = {}
    for name in ("normswap", "torch", "torchvision", "timm", "safetensors"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "packages": packages,
    }


def main(description: str | None, measure: Callable[[argparse.Namespace], Iterable[Row]], **options: Any) -> None:
    """Run `measure`, which yields rows, and print them as a table, or with `--json` as data.

    `options` are further arguments of the script, by name, each with its default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    for name, default in options.items():
        kind = type(default) if default is not None else str
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, type=kind)
    arguments = parser.parse_args()
    rows = list(measure(arguments))
    if arguments.json:
        print(json.dumps({"environment": environment(), "rows": rows}, indent=2))
        return
    console = Console()
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    console.print(environment(), style="dim")
