"""The command line: arguments, progress, exit codes."""

from __future__ import annotations

import io
import json
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from normswap.errors import NormswapError, OptionError
from normswap.norm_forms import NORMS
from normswap.weight_forms import RECURRENT, WEIGHTS

_PHASES = 9  # words of progress that a conversion gives: the length of the bar
_PATIENCE = 1.0  # seconds before the bar shows

app = typer.Typer(
    name="normswap", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Swap the normalization of a trained PyTorch model, and keep the trained function.",
)  # fmt: skip


class Format(str, Enum):
    pt = "pt"
    safetensors = "safetensors"
    dcp = "dcp"


class Transfer(str, Enum):
    match = "match"
    copy = "copy"
    reset = "reset"


class Ws(str, Enum):
    preserve = "preserve"
    strict = "strict"


class WsScope(str, Enum):
    normed = "normed"
    all = "all"


Input = Annotated[
    str, typer.Argument(metavar="INPUT", help="A checkpoint (file or folder), torchvision:NAME or timm:NAME.")
]
Out = Annotated[
    Path | None, typer.Option("-o", "--out", help="Where to write; model.TARGET.pt beside the input by default.")
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="What the tensors of a file belong to: torchvision:NAME, timm:NAME, package.module:factory or file.py:factory.",
    ),
]
ModelArg = Annotated[
    list[str] | None, typer.Option(metavar="K=V", help="An argument of the model, such as num_classes=10. Repeatable.")
]
Key = Annotated[str | None, typer.Option(metavar="NAME", help="Which entry of a training checkpoint is the model.")]
Weights = Annotated[str | None, typer.Option(metavar="NAME", help="Published weights of a library's model, by name.")]
InputShape = Annotated[str | None, typer.Option(metavar="1,3,224,224", help="Shape of an input batch.")]
Allow = Annotated[
    list[str] | None,
    typer.Option(help="A class that the file may hold, by full name. Repeatable.", metavar="PKG.CLASS"),
]
Trust = Annotated[bool, typer.Option("--trust", help="Run whatever code the file holds.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")]
Full = Annotated[bool, typer.Option("--full", help="Print a line for every layer.")]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="FILE", help="Write the report too: a page (.html), .md, .json or a picture (.svg)."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"normswap {version('normswap')}")
        raise typer.Exit


@app.callback()
def _app(
    show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Swap the normalization of a trained PyTorch model, and keep the trained function."""


@app.command()
def convert(
    input: Input,
    to: Annotated[
        str, typer.Option("--to", metavar="TARGET", help="What to convert to: a norm, a weight form, or both (gn-ws).")
    ],
    out: Out = None,
    model: Model = None,
    model_arg: ModelArg = None,
    weights: Weights = None,
    key: Key = None,
    groups: Annotated[
        str, typer.Option(metavar="auto|N|Nc", help="Groups of gn: auto, their number, or channels in each.")
    ] = "auto",
    eps: Annotated[
        float | None, typer.Option(metavar="E", help="Of the norms in a file without its model; 1e-5 is assumed.")
    ] = None,
    transfer: Annotated[
        Transfer, typer.Option(help="What becomes of the learnt gain, bias and statistics.")
    ] = Transfer.match,
    ws: Annotated[Ws, typer.Option(help="Keep each filter's std and mean, or take the paper's form.")] = Ws.preserve,
    ws_scope: Annotated[
        WsScope, typer.Option(help="Standardize convolutions that a norm follows, or all.")
    ] = WsScope.normed,
    layers: Annotated[
        str, typer.Option(metavar="conv,linear,rnn", help="Whose weights ws and wn change, with commas.")
    ] = "conv",
    recurrent: Annotated[
        str | None, typer.Option(metavar="ln", help="Layer normalization inside LSTMs, GRUs and their cells.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Convert only layers on these paths. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Leave layers on these paths. Repeatable.")
    ] = None,
    input_shape: InputShape = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Unlabelled data: a folder of pictures, or tensors in .pt, .npy, .npz, .safetensors."
        ),
    ] = None,
    calibrate_seconds: Annotated[
        float, typer.Option(metavar="S", help="The most time that the new norms are fitted to the data; 0: not at all.")
    ] = 60.0,
    input_size: Annotated[
        str | None, typer.Option(metavar="N|H,W", help="Size of the pictures, where the model's own is not known.")
    ] = None,
    mean: Annotated[str | None, typer.Option(metavar="R,G,B", help="Their mean, for values from 0 to 1.")] = None,
    std: Annotated[str | None, typer.Option(metavar="R,G,B", help="Their standard deviation.")] = None,
    fold: Annotated[bool, typer.Option("--fold", help="Bake the result into plain torch layers.")] = False,
    format: Annotated[
        Format | None,
        typer.Option(help="Write another kind of file than the input's: of a training checkpoint, the model."),
    ] = None,
    allow: Allow = None,
    trust: Trust = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report, and write nothing.")] = False,
    as_json: Json = False,
    report_file: ReportFile = None,
    full: Full = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model: swap its norms, standardize its convolutions.

    Example: normswap convert torchvision:resnet50 --to gn-ws
    """
    from normswap import files, sources

    form = format.value if format else None
    with _speaking(_PHASES, quiet or as_json) as progress:
        _check_report(report_file, overwrite)
        shape, arguments = _parse_shape(input_shape), sources.parse_arguments(model_arg or [])
        size = _numbers("--input-size", input_size, int)
        report = files.convert_file(
            input, to, out, model=model, model_args=arguments, weights=weights, key=key, eps=eps, input_shape=shape,
            fold=fold, format=form, allow=_importable(allow), trust=trust, overwrite=overwrite, dry_run=dry_run,
            progress=progress, groups=groups, transfer=transfer.value, ws=ws.value, ws_scope=ws_scope.value,
            calibrate=calibrate, calibrate_seconds=calibrate_seconds, input_size=size and (size if len(size) > 1 else size[0]),
            mean=_numbers("--mean", mean, float), std=_numbers("--std", std, float),
            layers=tuple(layers.split(",")), recurrent=recurrent, include=include or None, exclude=exclude or None,
        )  # fmt: skip
        _write_report(report, input, report_file, overwrite)
    _print(report, input, "" if dry_run else str(out or files.default_out(input, to, form)), as_json, full, quiet)


@app.command()
def inspect(
    input: Input,
    model: Model = None,
    model_arg: ModelArg = None,
    weights: Weights = None,
    key: Key = None,
    input_shape: InputShape = None,
    allow: Allow = None,
    trust: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON, and nothing else.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Print the whole tree, and every path.")] = False,
    quiet: Quiet = False,
) -> None:
    """Show what is in a model, what it would become, what is wrong with it, and what to pick.

    Example: normswap inspect torchvision:mobilenet_v2
    """
    from normswap import files, sources

    with _speaking(5, quiet or as_json) as progress:
        found = files.inspect_file(
            input, model=model, model_args=sources.parse_arguments(model_arg or []), weights=weights, key=key,
            input_shape=_parse_shape(input_shape), allow=_importable(allow), trust=trust, progress=progress,
        )  # fmt: skip
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=2) + "\n")
    elif not quiet:
        from normswap.render_inspection import InspectionView

        Console().print(InspectionView(found, input, full))


@app.command()
def fold(
    input: Input,
    out: Out = None,
    model: Model = None,
    model_arg: ModelArg = None,
    key: Key = None,
    allow: Allow = None,
    trust: Trust = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    report_file: ReportFile = None,
    full: Full = False,
    quiet: Quiet = False,
) -> None:
    """Bake a converted model into plain torch layers, for deployment.

    Example: normswap fold resnet50.gn-ws.pt
    """
    from normswap import files, sources

    with _speaking(2, quiet or as_json) as progress:
        _check_report(report_file, overwrite)
        progress(f"folding {input}")
        report = files.fold_file(
            input, out, model=model, model_args=sources.parse_arguments(model_arg or []), key=key,
            allow=_importable(allow), trust=trust, overwrite=overwrite,
        )  # fmt: skip
        _write_report(report, input, report_file, overwrite)
    _print(report, input, str(out or files.default_out(input, "fold")), as_json, full, quiet)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint, file or folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    key: Key = None,
    allow: Allow = None,
    trust: Trust = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report file.")] = False,
    as_json: Json = False,
    report_file: ReportFile = None,
    full: Full = False,
    quiet: Quiet = False,
) -> None:
    """Say what differs between two checkpoints: keys, modules, shapes, values.

    Example: normswap diff model.pt model.gn-ws.pt
    """
    from normswap.diff import diff as compare

    with _speaking(2, quiet or as_json) as progress:
        _check_report(report_file, overwrite)
        progress(f"comparing {a} with {b}")
        report = compare(a, b, key=key, allow=_importable(allow), trust=trust)
        _write_report(report, f"{a} and {b}", report_file, overwrite)
    _print(report, f"{a} and {b}", "", as_json, full, quiet)


@app.command()
def targets() -> None:
    """List the targets, and when to choose which."""
    console = Console()
    tables = (("a normalization becomes", NORMS), ("a weight becomes", WEIGHTS), ("with --recurrent", RECURRENT))
    for title, forms in tables:
        table = Table(box=None, pad_edge=False)
        for heading in ("name", title, "in eval mode", "paper", "choose it for"):
            table.add_column(heading, overflow="fold", min_width=18 if heading == title else None)
        for form in forms.values():
            table.add_row(form.name, form.becomes, form.exactness, form.paper, form.choose_when)
        console.print(table, "")
    console.print("Any of the first with any of the second: " + ", ".join(f"{n}-{w}" for n in NORMS for w in WEIGHTS))


@contextmanager
def _speaking(phases: int, silent: bool) -> Iterator[Callable[[str], None]]:
    """Progress on stderr where the run takes more than a moment; errors of ours as one line and exit code 1."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=silent or not console.is_terminal)
    task = bar.add_task("starting", total=phases)
    later = threading.Timer(_PATIENCE, bar.start)  # a short run needs no bar, and a long phase gets one too
    later.daemon = True

    def step(phase: str) -> None:
        bar.update(task, description=phase, advance=0 if "%" in phase else 1)

    def done() -> None:
        later.cancel()
        bar.stop()

    if not bar.disable:
        later.start()
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():  # what a model prints is not the report
            warnings.simplefilter("ignore", UserWarning)  # the report repeats ours; torch's are not the user's doing
            yield step
    except NormswapError as error:
        done()
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    finally:
        done()


def _parse_shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise OptionError(f"--input-shape: {text!r} is no shape; write numbers from 1 with commas, such as 1,3,224,224")
    return shape


def _numbers(option: str, text: str | None, kind: Callable[[str], Any]) -> Any:
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"{option}: {text!r} is not possible; write numbers with commas") from None


def _importable(allow: list[str] | None) -> list[str]:
    """Allowed classes may stand in the folder where the command runs."""
    if allow and "" not in sys.path:
        sys.path.insert(0, "")
    return allow or []


def _check_report(path: Path | None, overwrite: bool) -> None:
    if path is not None:
        from normswap import views

        views.check(path, overwrite)


def _write_report(report: Any, source: str, path: Path | None, overwrite: bool) -> None:
    if path is not None:
        from normswap import views

        views.write(report, source, path, overwrite)


def _print(report: Any, source: str, out: str, as_json: bool, full: bool, quiet: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(report.to_dict(), indent=2) + "\n")
    elif not quiet:
        from normswap.render import ReportView

        Console().print(ReportView(report, source, out, full))


def main() -> None:
    """The command `normswap`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without → or × shows ? and not a traceback
    app()


if __name__ == "__main__":
    main()
