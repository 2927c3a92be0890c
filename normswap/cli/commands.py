"""The command line: arguments, progress, exit codes."""

from __future__ import annotations

import gc
import io
import json
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from normswap.cli import options as opt
from normswap.errors import NormswapError, OptionError
from normswap.target_table import NORM_FORMS, RECURRENT_FORMS, TARGET_FORMS, WEIGHT_FORMS

_PHASES = 9  # words of progress that a conversion gives: the length of the bar
_PATIENCE = 1.0  # seconds before the bar shows

app = typer.Typer(
    name="normswap", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Swap the normalization of a trained PyTorch model, and keep the trained function.",
)  # fmt: skip


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
    input: opt.Input,
    to: opt.To,
    groups: opt.Groups = "auto",
    transfer: opt.TransferChoice = opt.Transfer.match,
    ws: opt.WsChoice = opt.Ws.preserve,
    ws_scope: opt.WsScopeChoice = opt.WsScope.normed,
    layers: opt.Layers = "conv",
    recurrent: opt.Recurrent = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    fold: opt.Fold = False,
    model: opt.Model = None,
    model_arg: opt.ModelArg = None,
    weights: opt.Weights = None,
    key: opt.Key = None,
    eps: opt.Eps = None,
    allow: opt.Allow = None,
    trust: opt.Trust = False,
    input_shape: opt.InputShape = None,
    calibrate: opt.Calibrate = None,
    calibrate_seconds: opt.CalibrateSeconds = 60.0,
    input_size: opt.InputSize = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    out: opt.Out = None,
    format: opt.FormatChoice = None,
    overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False,
    report: opt.ReportFile = None,
    as_json: opt.Json = False,
    full: opt.Full = False,
    quiet: opt.Quiet = False,
) -> None:
    """Convert a model: swap its norms, standardize its convolutions, keep what it has learnt.

    [bold]normswap convert model.pt --to gn-ws[/]

    [bold]normswap convert torchvision:resnet50 --to gn --calibrate pictures/ --report report.html[/]
    """
    from normswap.files import convert_file, model_specs, paths

    form = format.value if format else None
    with _speaking(_PHASES, quiet or as_json) as progress:
        _check_report(report, overwrite)
        shape, arguments = _parse_shape(input_shape), model_specs.parse_arguments(model_arg or [])
        size = _numbers("--input-size", input_size, int)
        done = convert_file.convert_file(
            input, to, out, model=model, model_args=arguments, weights=weights, key=key, eps=eps, input_shape=shape,
            fold=fold, format=form, allow=_importable(allow), trust=trust, overwrite=overwrite, dry_run=dry_run,
            progress=progress, groups=groups, transfer=transfer.value, ws=ws.value, ws_scope=ws_scope.value,
            calibrate=calibrate, calibrate_seconds=calibrate_seconds, input_size=size and (size if len(size) > 1 else size[0]),
            mean=_numbers("--mean", mean, float), std=_numbers("--std", std, float),
            layers=tuple(layers.split(",")), recurrent=recurrent, include=include or None, exclude=exclude or None,
        )  # fmt: skip
        _write_report(done, input, report, overwrite)
    _print(done, input, "" if dry_run else str(out or paths.default_output(input, to, form)), as_json, full, quiet)


@app.command()
def inspect(
    input: opt.Input,
    model: opt.Model = None,
    model_arg: opt.ModelArg = None,
    weights: opt.Weights = None,
    key: opt.Key = None,
    allow: opt.Allow = None,
    trust: opt.Trust = False,
    input_shape: opt.InputShape = None,
    as_json: opt.Json = False,
    full: opt.Full = False,
    quiet: opt.Quiet = False,
) -> None:
    """Show what is in a model, what it would become, what is wrong with it, and what to pick.

    [bold]normswap inspect torchvision:mobilenet_v2[/]
    """
    from normswap.files import inspect_file, model_specs

    with _speaking(5, quiet or as_json) as progress:
        found = inspect_file.inspect_file(
            input, model=model, model_args=model_specs.parse_arguments(model_arg or []), weights=weights, key=key,
            input_shape=_parse_shape(input_shape), allow=_importable(allow), trust=trust, progress=progress,
        )  # fmt: skip

    def view() -> Any:
        from normswap.report.terminal_inspection import InspectionView

        return InspectionView(found, input, full)

    _show(found, view, as_json, quiet)


@app.command()
def fold(
    input: opt.Input,
    model: opt.Model = None,
    model_arg: opt.ModelArg = None,
    key: opt.Key = None,
    allow: opt.Allow = None,
    trust: opt.Trust = False,
    out: opt.Out = None,
    overwrite: opt.Overwrite = False,
    report: opt.ReportFile = None,
    as_json: opt.Json = False,
    full: opt.Full = False,
    quiet: opt.Quiet = False,
) -> None:
    """Bake a converted model into plain torch layers, for deployment: it then does without normswap.

    [bold]normswap fold resnet50.gn-ws.pt[/]
    """
    from normswap.files import convert_file, model_specs, paths

    with _speaking(2, quiet or as_json) as progress:
        _check_report(report, overwrite)
        progress(f"folding {input}")
        done = convert_file.fold_file(
            input, out, model=model, model_args=model_specs.parse_arguments(model_arg or []), key=key,
            allow=_importable(allow), trust=trust, overwrite=overwrite,
        )  # fmt: skip
        _write_report(done, input, report, overwrite)
    _print(done, input, str(out or paths.default_output(input, "fold")), as_json, full, quiet)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint, file or folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    key: opt.Key = None,
    allow: opt.Allow = None,
    trust: opt.Trust = False,
    overwrite: opt.Overwrite = False,
    report: opt.ReportFile = None,
    as_json: opt.Json = False,
    full: opt.Full = False,
    quiet: opt.Quiet = False,
) -> None:
    """Say what differs between two checkpoints: keys, modules, shapes, values.

    [bold]normswap diff model.pt model.gn-ws.pt[/]
    """
    from normswap.files.diff import diff as compare

    with _speaking(2, quiet or as_json) as progress:
        _check_report(report, overwrite)
        progress(f"comparing {a} with {b}")
        done = compare(a, b, key=key, allow=_importable(allow), trust=trust)
        _write_report(done, f"{a} and {b}", report, overwrite)
    _print(done, f"{a} and {b}", "", as_json, full, quiet)


@app.command()
def targets() -> None:
    """List the targets, and when to choose which.

    [bold]normswap targets[/]
    """
    console = Console()
    tables = (
        ("a normalization becomes", NORM_FORMS),
        ("a weight becomes", WEIGHT_FORMS),
        ("with --recurrent", RECURRENT_FORMS),
    )
    for title, forms in tables:
        table = Table(box=None, pad_edge=False)
        for heading in ("name", title, "in eval mode", "paper", "choose it for"):
            table.add_column(heading, overflow="fold", min_width=18 if heading == title else None)
        for form in forms.values():
            table.add_row(form.name, form.becomes, form.exactness, form.paper, form.choose_when)
        console.print(table, "")
    console.print("Any of the first with any of the second: " + ", ".join(name for name in TARGET_FORMS if "-" in name))


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
        new = "%" not in phase
        bar.update(task, description=phase, advance=int(new), refresh=new)  # the shortest phase shows too

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
        from normswap.files.report_file import check_report_file

        check_report_file(path, overwrite)


def _write_report(report: Any, source: str, path: Path | None, overwrite: bool) -> None:
    if path is not None:
        from normswap.files.report_file import write_report_file

        write_report_file(report, source, path, overwrite)


def _print(report: Any, source: str, out: str, as_json: bool, full: bool, quiet: bool) -> None:
    def view() -> Any:
        from normswap.report.terminal import ReportView

        return ReportView(report, source, out, full)

    _show(report, view, as_json, quiet)


def _show(found: Any, view: Callable[[], Any], as_json: bool, quiet: bool) -> None:
    """A report or an inspection on stdout, as data or as it is viewed."""
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=2) + "\n")
    elif not quiet:
        Console().print(view())


def main() -> None:
    """The command `normswap`."""
    # Importing torch makes a million objects that stay: a tenth of the time went into looking through them for garbage.
    gc.set_threshold(100_000)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without → or × shows ? and not a traceback
    app()


if __name__ == "__main__":
    main()
