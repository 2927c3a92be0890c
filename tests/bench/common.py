"""What the benchmarks share: the machine and the versions of a run, and its end as text or JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
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


def mean_spread(values: Sequence[float]) -> Row:
    """Mean and standard deviation over seeds, rounded to what they can tell; one seed has no spread."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 4), "spread": None if spread is None else round(spread, 4)}


def mean_error(values: Sequence[float]) -> Row:
    """Mean over samples and its standard error: of a share p of n, √(p(1 - p)/n)."""
    error = statistics.pstdev(values) / math.sqrt(len(values))
    return {"mean": round(statistics.fmean(values), 4), "error": round(error, 4)}


# The kernel's high-water mark of this program alone; getrusage would count the one that started it.
PEAK = "\nprint(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"


def peak_of(code: str) -> int:
    """Bytes that a process of its own held at most while it ran `code`, which may import the benchmarks."""
    words = [sys.executable, "-W", "ignore", "-c", code + PEAK]
    done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def numbers(text: str) -> list[int]:
    """An option that lists numbers: "1,2,4"."""
    return [int(part) for part in text.split(",")]


def shown(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, dict) and "mean" in value:
        spread = value.get("spread", value.get("error"))
        return f"{value['mean']:.1%}" + (f" ±{100 * spread:.1f}" if spread is not None else "")
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(
    description: str | None,
    measure: Callable[[argparse.Namespace], Iterable[Row]],
    picture: Callable[[list[Row]], str] | None = None,
    **options: Any,
) -> None:
    """Run `measure`, which yields rows, and print them as a table, or with `--json` as data.

    With `--results FILE` the data is written to the file, and `picture`, an SVG drawn of the rows, beside it; with
    `--add` too, after the rows that the file has, so that a long benchmark can be run in parts. `options` are further
    arguments of the script, by name, each with its default; one whose default is False is a flag.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    parser.add_argument(
        "--results", type=Path, help="write the data to this file, and a picture, if there is one, beside it"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep the rows that the results file has: this is a further part"
    )
    for name, default in options.items():
        flag = f"--{name.replace('_', '-')}"
        if default is False:
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, default=default, type=type(default) if default is not None else str)
    arguments = parser.parse_args()
    start = time.perf_counter()
    rows = list(measure(arguments))
    apart = ("json", "results", "add", "cache", "data")  # how it is written, and where things lie on this machine
    asked = {name: value for name, value in vars(arguments).items() if name not in apart}
    made = {**environment(), "arguments": asked, "minutes": round((time.perf_counter() - start) / 60, 1)}
    data = {"environment": made, "rows": rows}
    if arguments.results:
        if arguments.add and arguments.results.exists():
            data = joined(json.loads(arguments.results.read_text()), data)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(_lines(data))
        if picture is not None:
            arguments.results.with_suffix(".svg").write_text(picture(data["rows"]))
    if arguments.json:
        print(_lines(data), end="")
        return
    console = Console()
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(shown(value) for value in row.values()))
    console.print(table)
    console.print(made, style="dim")


def joined(first: Row, second: Row) -> Row:
    """The results of two parts as one: minutes added up, arguments that differ listed one after the other."""
    was, made = first["environment"], second["environment"]
    asked = {
        name: value if (old := was["arguments"].get(name, value)) == value else f"{old},{value}" if value else old
        for name, value in made["arguments"].items()
    }
    made = {**made, "arguments": asked, "minutes": round(was["minutes"] + made["minutes"], 1)}
    return {"environment": made, "rows": first["rows"] + second["rows"]}


def _lines(data: Row) -> str:
    """JSON with one row a line."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in data["rows"])
    head = json.dumps(data["environment"], indent=2).replace("\n", "\n  ")
    return f'{{\n  "environment": {head},\n  "rows": [\n{rows}\n  ]\n}}\n'
