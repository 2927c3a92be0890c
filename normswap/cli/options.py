"""The arguments and options of the command line: names, help texts, panels."""

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from normswap.target_table import NORM_FORMS, TARGET_FORMS

CONVERSION, READING, DATA, WRITING, SHOWING = "Conversion", "Reading", "Data", "Writing", "Report"
"""The panels of `--help`."""


Format = Enum("Format", {"pt": "pt", "safetensors": "safetensors", "dcp": "dcp"}, type=str)
Purpose = Enum("Purpose", {"training": "training", "use": "use"}, type=str)
TransferRule = Enum("TransferRule", {"match": "match", "copy": "copy", "reset": "reset"}, type=str)
Ws = Enum("Ws", {"preserve": "preserve", "strict": "strict"}, type=str)
WsScope = Enum("WsScope", {"normed": "normed", "all": "all"}, type=str)


_WITH_GROUPS = " and ".join(form.name for form in NORM_FORMS.values() if "groups" in form.options)


def _option(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def _targets(incomplete: str) -> Iterator[str]:
    return (name for name in TARGET_FORMS if name.startswith(incomplete))


Input = Annotated[
    str, typer.Argument(metavar="INPUT", help="A checkpoint (file or folder), torchvision:NAME or timm:NAME.")
]

# fmt: off
# A row an option: its type and panel, then its help, its names and how a value looks.

# ---- what to convert to ----

To = Annotated[str, _option(CONVERSION,
    "A norm, a weight form, or both with a hyphen: gn, ws, gn-ws. [bold]normswap targets[/] lists them.",
    "--to", metavar="TARGET", autocompletion=_targets)]
Groups = Annotated[str, _option(CONVERSION,
    f"Groups of {_WITH_GROUPS}: "
    "auto (at most 8, of at least 4 channels), their number (32), or channels in each (16c).",
    metavar="auto|N|Nc")]
PurposeChoice = Annotated[Purpose, _option(CONVERSION,
    "What auto is for: training fine-tunes best, use keeps most right after the conversion.", "--for")]
TransferChoice = Annotated[TransferRule, _option(CONVERSION,
    "Gain and bias: moved with the running statistics (match), as they stand (copy), or 1 and 0 (reset).")]
WsChoice = Annotated[Ws, _option(CONVERSION,
    "Standardized weights keep each filter's std and mean, or take the paper's form.")]
WsScopeChoice = Annotated[WsScope, _option(CONVERSION, "Standardize the convolutions that a norm follows, or all.")]
Layers = Annotated[str, _option(CONVERSION, "Whose weights ws and wn change, with commas.", metavar="conv,linear,rnn")]
Recurrent = Annotated[str | None, _option(CONVERSION,
    "Layer normalization inside LSTMs, GRUs and their cells.", metavar="ln")]
Include = Annotated[list[str] | None, _option(CONVERSION,
    "Convert only layers on these paths: 'layer4.*'. Repeatable.", metavar="GLOB")]
Exclude = Annotated[list[str] | None, _option(CONVERSION, "Leave layers on these paths. Repeatable.", metavar="GLOB")]
Fold = Annotated[bool, _option(CONVERSION, "Bake the result into plain torch layers.", "--fold")]

# ---- what is read, and how ----

Model = Annotated[str | None, _option(READING,
    "What the tensors of a file belong to: torchvision:NAME, timm:NAME, package.module:factory or file.py:factory.",
    metavar="SPEC")]
ModelArg = Annotated[list[str] | None, _option(READING,
    "An argument of the model, such as num_classes=10. Repeatable.", metavar="K=V")]
Weights = Annotated[str | None, _option(READING, "Published weights of a library's model, by name.", metavar="NAME")]
Key = Annotated[str | None, _option(READING, "Which entry of a training checkpoint is the model.", metavar="NAME")]
Eps = Annotated[float | None, _option(READING,
    "Of the norms in a file without its model; 1e-5 is assumed.", metavar="E")]
Allow = Annotated[list[str] | None, _option(READING,
    "A class that the file may hold, by full name, or all of a package: 'pkg.nn.*'. Repeatable.", metavar="PKG.CLASS")]
Trust = Annotated[bool, _option(READING, "Run whatever code the file holds.", "--trust")]

# ---- data ----

InputShape = Annotated[str | None, _option(DATA,
    "Shape of an input batch: the sizes of maps then count.", metavar="1,3,224,224")]
Calibrate = Annotated[Path | None, _option(DATA,
    "Unlabelled data: a folder of pictures, or tensors in .pt, .npy, .npz, .safetensors.", metavar="PATH")]
CalibrateSeconds = Annotated[float, _option(DATA,
    "The most time that measuring and fitting take; 0: no fit. Ctrl-C ends the fit: the best so far is kept.",
    metavar="S")]
Device = Annotated[str | None, _option(DATA,
    "Where the model is run and fitted: cuda, mps.", metavar="D")]
InputSize = Annotated[str | None, _option(DATA,
    "Size of the pictures, where the model's own is not known.", metavar="N|H,W")]
Mean = Annotated[str | None, _option(DATA, "Their mean, for values from 0 to 1.", metavar="R,G,B")]
Std = Annotated[str | None, _option(DATA, "Their standard deviation.", metavar="R,G,B")]

# ---- what is written and shown ----

Out = Annotated[str | None, _option(WRITING,
    "Where to write: a file, or a folder with a slash; model.TARGET.pt beside the input by default.",
    "-o", "--out", metavar="FILE|FOLDER/")]
FormatChoice = Annotated[Format | None, _option(WRITING,
    "Write another kind of file than the input's: of a training checkpoint, the model.")]
Overwrite = Annotated[bool, _option(WRITING, "Replace what exists, a report too.", "--overwrite")]
DryRun = Annotated[bool, _option(WRITING, "Report, and write no model.", "--dry-run")]
ReportFile = Annotated[list[Path] | None, _option(SHOWING,
    "Write the report too: a page (.html), .md, .json or a picture (.svg). Repeatable.", "--report", metavar="FILE")]
Json = Annotated[bool, _option(SHOWING, "Print it as JSON, and nothing else.", "--json")]
Full = Annotated[bool, _option(SHOWING, "Print a line for every layer.", "--full")]
Quiet = Annotated[bool, _option(SHOWING, "Print nothing but errors.", "--quiet")]
