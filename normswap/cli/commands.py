"""The commands: what each calls, what it prints, and its exit code."""

import gc
import io
import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from normswap.cli import options as opt
from normswap.cli.progress import show_progress
from normswap.cli.values import allowed_classes, parse_numbers, parse_shape, parse_size
from normswap.errors import NormswapError, path_error
from normswap.printable import printable
from normswap.report.formats import to_json
from normswap.report.inspection import Inspection
from normswap.report.report import Report
from normswap.report.terminal import ReportView
from normswap.report.terminal_inspection import InspectionView
from normswap.signals import end_on_signals
from normswap.target_table import NORM_FORMS, RECURRENT_FORMS, TARGET_FORMS, WEIGHT_FORMS, described_targets

# What a command needs is imported when it runs: `normswap --help` does without torch, which takes seconds.


_WIDE = 110  # columns from which the table of targets shows the papers
_UsageError: Any = typer.BadParameter.__base__  # click's, or of the click that newer versions of typer bring along


class _Commands(TyperGroup):
    """The commands, whose errors about arguments show these in characters that do nothing to a terminal."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **more: Any) -> Any:
        typed = shlex.join(["normswap", *args])
        with _printable_usage_errors():
            return super().make_context(info_name, args, *rest, obj=typed, **more)

    def invoke(self, ctx: Any) -> Any:
        with _printable_usage_errors():
            return super().invoke(ctx)


@contextmanager
def _printable_usage_errors() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.message = printable(error.message)
        raise


app = typer.Typer(
    name="normswap", cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Swap the normalization of a trained PyTorch model, and keep the trained function.\n\n"
         "[bold]normswap convert model.pt --to gn-ws[/]",
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
    context: typer.Context,
    input: opt.Input, to: opt.To = None, groups: opt.Groups = "auto", purpose: opt.PurposeChoice = opt.Purpose.training,
    transfer: opt.TransferChoice = opt.TransferRule.match,
    ws: opt.WsChoice = opt.Ws.preserve, ws_scope: opt.WsScopeChoice = opt.WsScope.normed, layers: opt.Layers = "conv",
    recurrent: opt.Recurrent = None, include: opt.Include = None, exclude: opt.Exclude = None, fold: opt.Fold = False,
    model: opt.Model = None, model_arg: opt.ModelArg = None, weights: opt.Weights = None, key: opt.Key = None,
    eps: opt.Eps = None, allow: opt.Allow = None, trust: opt.Trust = False, input_shape: opt.InputShape = None,
    examples: opt.Examples = None, calibrate: opt.Calibrate = None, calibrate_seconds: opt.CalibrateSeconds = 60.0,
    device: opt.Device = None, input_size: opt.InputSize = None, mean: opt.Mean = None, std: opt.Std = None,
    out: opt.Out = None, format: opt.FormatChoice = None, overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False, report: opt.ReportFile = None, as_json: opt.Json = False, full: opt.Full = False,
    quiet: opt.Quiet = False,
) -> None:  # fmt: skip
    """Convert a model: exchange its norms, keep what it has learnt, and write it to a new file.

    [bold]normswap convert demo:digits --to gn-ws[/]

    [bold]normswap convert model.pt --to gn-ws --report report.html[/]
    """
    if to is None and recurrent is None:
        raise _UsageError("Missing option '--to': a target, such as gn-ws; or give --recurrent ln, for LSTMs and GRUs.")
    from normswap.conversion.request import phases
    from normswap.files import convert_file, model_specs

    form, data = format.value if format else None, calibrate is not None
    read = sum((True, data, examples is not None))
    count = read + len(phases(data)) + sum((fold, not dry_run))
    with _exit_on_error(), show_progress(count, silent=quiet or as_json) as progress:
        done = convert_file.convert_file(
            input, to, out,
            input_shape=parse_shape(input_shape), model=model, model_args=model_specs.parse_arguments(model_arg or []),
            weights=weights, key=key, eps=eps, allow=allowed_classes(allow, trust), trust=trust,
            groups=groups, purpose=purpose.value, transfer=transfer.value, ws=ws.value, ws_scope=ws_scope.value,
            layers=tuple(layers.split(",")), recurrent=recurrent, include=include or None, exclude=exclude or None,
            input_size=parse_size(input_size), mean=parse_numbers("--mean", mean, float),
            std=parse_numbers("--std", std, float), examples=examples, calibrate=calibrate,
            calibrate_seconds=calibrate_seconds, device=device, fold=fold, format=form, overwrite=overwrite,
            dry_run=dry_run, reports=report or (), command=_typed(context), progress=progress,
        )  # fmt: skip
    _show(done, ReportView(done, input, full), as_json, quiet)


@app.command()
def inspect(
    input: opt.Input, model: opt.Model = None, model_arg: opt.ModelArg = None, weights: opt.Weights = None,
    key: opt.Key = None, allow: opt.Allow = None, trust: opt.Trust = False, input_shape: opt.InputShape = None,
    overwrite: opt.Overwrite = False, report: opt.ReportFile = None, as_json: opt.Json = False, full: opt.Full = False,
    quiet: opt.Quiet = False,
) -> None:  # fmt: skip
    """Show what is in a model, what each target would do to it, what is wrong, and which target to take.

    [bold]normswap inspect torchvision:mobilenet_v2[/]
    """
    from normswap.files import inspect_file, model_specs, paths, report_file

    with _exit_on_error(), show_progress(5, silent=quiet or as_json) as progress:
        files = report or []
        paths.check_apart(None, files, (input, model))
        report_file.check_report_files(files, overwrite)
        found = inspect_file.inspect_file(
            input, model=model, model_args=model_specs.parse_arguments(model_arg or []), weights=weights, key=key,
            input_shape=parse_shape(input_shape), allow=allowed_classes(allow, trust), trust=trust, progress=progress,
        )  # fmt: skip
        report_file.write_report_files(found, input, files, overwrite)
    _show(found, InspectionView(found, input, full), as_json, quiet)


@app.command()
def fold(
    context: typer.Context,
    input: opt.Input, model: opt.Model = None, model_arg: opt.ModelArg = None, weights: opt.Weights = None,
    key: opt.Key = None, allow: opt.Allow = None, trust: opt.Trust = False, input_shape: opt.InputShape = None,
    out: opt.Out = None, overwrite: opt.Overwrite = False, report: opt.ReportFile = None, as_json: opt.Json = False,
    full: opt.Full = False, quiet: opt.Quiet = False,
) -> None:  # fmt: skip
    """Fold norms into the layers around them and leave torch's own layers, for deployment: convert --to fold.

    Standardized and normalized weights are baked in. Where there is nothing to fold, nothing is written.

    [bold]normswap fold resnet50.gn-ws.pt[/]
    """
    from normswap.conversion.request import phases
    from normswap.files import convert_file, model_specs

    with _exit_on_error(), show_progress(len(phases(False)) + 2, silent=quiet or as_json) as progress:
        done = convert_file.convert_file(
            input, "fold", out, model=model, model_args=model_specs.parse_arguments(model_arg or []), weights=weights,
            key=key, input_shape=parse_shape(input_shape), allow=allowed_classes(allow, trust), trust=trust,
            overwrite=overwrite, reports=report or (), progress=progress, command=_typed(context),
        )  # fmt: skip
    _show(done, ReportView(done, input, full), as_json, quiet)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint, file or folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    key: opt.Key = None, allow: opt.Allow = None, trust: opt.Trust = False, overwrite: opt.Overwrite = False,
    report: opt.ReportFile = None, as_json: opt.Json = False, full: opt.Full = False, quiet: opt.Quiet = False,
) -> None:  # fmt: skip
    """Show what differs between two checkpoints: keys, modules, shapes, values.

    [bold]normswap diff model.pt model.gn-ws.pt[/]
    """
    from normswap.files import paths, report_file
    from normswap.files.diff import diff as compare

    with _exit_on_error(), show_progress(2, silent=quiet or as_json) as progress:
        files = report or []
        paths.check_apart(None, files, (a, b))
        report_file.check_report_files(files, overwrite)
        progress(f"comparing {a} with {b}")
        done = compare(a, b, key=key, allow=allowed_classes(allow, trust), trust=trust)
        report_file.write_report_files(done, f"{a} and {b}", files, overwrite)
    _show(done, ReportView(done, f"{a} and {b}", full), as_json, quiet)


@app.command()
def targets(as_json: opt.Json = False) -> None:
    """List the targets: what each makes of a norm or a weight, and when to choose it.

    [bold]normswap targets[/]
    """
    if as_json:
        sys.stdout.write(json.dumps(described_targets(), indent=2) + "\n")
        return
    console = Console()
    titles = ("a normalization becomes", "a weight becomes", "with --recurrent")
    for title, forms in zip(titles, (NORM_FORMS, WEIGHT_FORMS, RECURRENT_FORMS), strict=True):
        table = Table(box=None, pad_edge=False)
        wide = console.width >= _WIDE
        for heading in ("name", title, "in eval mode", "choose it for", *(["paper"] if wide else [])):
            table.add_column(heading, overflow="fold")
        for form in forms.values():
            cells = (form.name, form.becomes, form.exactness, form.choose_when, form.paper)
            table.add_row(*cells[: len(table.columns)])
        console.print(table, "")
    console.print("A norm and a weight form together: " + ", ".join(name for name in TARGET_FORMS if "-" in name))


def _typed(context: typer.Context) -> str:
    """The command as it was typed, in the shell's quotes."""
    return str(context.obj or "")


@contextmanager
def _exit_on_error() -> Iterator[None]:
    """Errors of ours end the command with one line on stderr and exit code 1; stdout is left to the report."""
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():  # what a model prints is not the report
            warnings.simplefilter("ignore", UserWarning)  # the report repeats ours; torch's are not the user's doing
            yield
    except NormswapError as error:
        raise _told(error) from None
    except OSError as error:  # of a path that no call of ours has looked at
        if error.filename is None:
            raise
        raise _told(path_error(error.filename, error)) from None


def _told(error: Exception) -> typer.Exit:
    """The end of the command, with an error told in one line on stderr."""
    Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
    return typer.Exit(1)


def _show(found: Report | Inspection, view: ReportView | InspectionView, as_json: bool, quiet: bool) -> None:
    """A report or an inspection on stdout, as data or as the view shows it."""
    try:
        if as_json:
            sys.stdout.write(to_json(found))
        elif not quiet:
            Console().print(view)
        sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`: click ends the command
        raise
    except OSError as error:  # a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that what is left of it is not tried again at the end
        raise _told(path_error("standard output", error)) from None


def main() -> None:
    """The command `normswap`."""
    end_on_signals()  # again, for a script that comes here without `normswap.cli.main`
    # Importing torch makes a million objects that stay, and a large model more: a tenth of the time went into looking
    # through them for garbage. A command ends before there is much of that.
    gc.disable()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without → or × shows ? and not a traceback
    try:
        app()
    except Exception:  # a fault of ours, told whole; what it quotes may come from a file
        lines = traceback.format_exc().splitlines()
        sys.stderr.write("".join(f"{printable(line)}\n" for line in lines))
        sys.exit(1)
    finally:
        gc.freeze()  # nor at the end of the process


if __name__ == "__main__":
    main()
