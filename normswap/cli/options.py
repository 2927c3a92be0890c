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


def _flag(panel: str, help: str, name: str) -> Any:
    return _option(panel, help, name, metavar="")  # else each shows <bool>


def _targets(incomplete: str) -> Iterator[str]:
    return (name for name in TARGET_FORMS if name.startswith(incomplete))


Input = Annotated[str, typer.Argument(
    metavar="INPUT", help="A checkpoint (file or folder), or a model: demo:digits, torchvision:resnet50, timm:NAME.",
)]  # fmt: skip

# fmt: off
# A row an option: its type and panel, then its help, its names and how a value looks.

# ---- what to convert to ----

To = Annotated[
    str | None,
    _option(
        CONVERSION,
        "What to convert to: a norm (gn), a weight form (ws), or both (gn-ws). [bold]normswap targets[/] lists all.",
        "--to",
        metavar="TARGET",
        autocompletion=_targets,
    ),
]
Groups = Annotated[
    str,
    _option(
        CONVERSION,
        f"Groups of {_WITH_GROUPS}: "
        "auto (at most 8, with at least 4 channels in each), a number (32), or channels in each (16c).",
        metavar="auto|N|Nc",
    ),
]
PurposeChoice = Annotated[
    Purpose,
    _option(
        CONVERSION,
        "What the groups of auto are for: training (fine-tunes best) or use (most accurate without training).",
        "--for",
    ),
]
TransferChoice = Annotated[
    TransferRule,
    _option(
        CONVERSION, "New gain and bias: from the running statistics (match), as they are (copy), or 1 and 0 (reset)."
    ),
]
WsChoice = Annotated[
    Ws,
    _option(
        CONVERSION, "Standardized weights: same function (preserve), or the paper's form, which changes it (strict)."
    ),
]
WsScopeChoice = Annotated[
    WsScope, _option(CONVERSION, "Which convolutions ws changes: those before a norm (normed), or all.")
]
Layers = Annotated[
    str, _option(CONVERSION, "Which weights ws and wn change, separated by commas.", metavar="conv,linear,rnn")
]
Recurrent = Annotated[
    str | None, _option(CONVERSION, "Put layer normalization inside LSTM and GRU; alone, or with --to.", metavar="ln")
]
Include = Annotated[
    list[str] | None,
    _option(CONVERSION, "Convert only layers with such a path: 'layer4.*'. Can be repeated.", metavar="GLOB"),
]
Exclude = Annotated[
    list[str] | None, _option(CONVERSION, "Leave layers with such a path as they are. Can be repeated.", metavar="GLOB")
]
Fold = Annotated[bool, _flag(CONVERSION, "Bake the result into plain torch layers.", "--fold")]

# ---- what is read, and how ----

Model = Annotated[
    str | None,
    _option(
        READING,
        "The model of a file of tensors: torchvision:NAME, timm:NAME, file.py:function, package.module:function.",
        metavar="SPEC",
    ),
]
ModelArg = Annotated[
    list[str] | None, _option(READING, "An argument for the model: num_classes=10. Can be repeated.", metavar="K=V")
]
Weights = Annotated[
    str | None, _option(READING, "Published weights of a torchvision or timm model: IMAGENET1K_V2.", metavar="NAME")
]
Key = Annotated[
    str | None, _option(READING, "The entry of a training checkpoint that holds the model: ema.", metavar="NAME")
]
Eps = Annotated[
    float | None,
    _option(READING, "eps of the norms, for a file of tensors without --model; 1e-5 if not given.", metavar="E"),
]
Allow = Annotated[
    list[str] | None,
    _option(
        READING,
        "A class that the file may hold, by its full name; 'pkg.nn.*' for a package. Can be repeated.",
        metavar="PKG.CLASS",
    ),
]
Trust = Annotated[
    bool, _flag(READING, "Run any code that the file holds. Only for files from people you trust.", "--trust")
]

# ---- data ----

InputShape = Annotated[
    str | None,
    _option(DATA, "Shape of an input batch; the groups then fit the size of feature maps.", metavar="1,3,224,224"),
]
Examples = Annotated[
    str | None,
    _option(DATA, "A few inputs to measure the drift on, as for --calibrate; nothing is fitted.", metavar="PATH"),
]
Calibrate = Annotated[
    str | None,
    _option(
        DATA,
        "Data without labels, to keep more: pictures (a folder, or one), or tensors in .pt, .npy, .npz, .safetensors.",
        metavar="PATH",
    ),
]
CalibrateSeconds = Annotated[
    float,
    _option(
        DATA,
        "Longest time to measure and fit; 0 only measures. Ctrl-C ends it early and keeps the best so far.",
        metavar="S",
    ),
]
Device = Annotated[str | None, _option(DATA, "Where the model is run and fitted: cuda, mps.", metavar="D")]
InputSize = Annotated[
    str | None, _option(DATA, "Size of the pictures, if the model's own is not known.", metavar="N|H,W")
]
Mean = Annotated[
    str | None,
    _option(
        DATA,
        "Mean of the pictures' channels, values from 0 to 1. Default: the model's own, or ImageNet's.",
        metavar="R,G,B",
    ),
]
Std = Annotated[
    str | None,
    _option(DATA, "Standard deviation of the same; --mean 0 --std 1 leaves the values from 0 to 1.", metavar="R,G,B"),
]

# ---- what is written and shown ----

Out = Annotated[
    str | None,
    _option(
        WRITING,
        "The file to write, or the folder to write into. Default: model.TARGET.pt beside the input.",
        "-o",
        "--out",
        metavar="FILE|FOLDER/",
    ),
]
FormatChoice = Annotated[
    Format | None,
    _option(WRITING, "Kind of file to write, if not the input's. Of a training checkpoint, only the model is written."),
]
Overwrite = Annotated[bool, _flag(WRITING, "Replace files that exist.", "--overwrite")]
DryRun = Annotated[bool, _flag(WRITING, "Only report; write no model.", "--dry-run")]
ReportFile = Annotated[
    list[Path] | None,
    _option(
        SHOWING,
        "Write the report to a file too: .html (a page), .md, .json or .svg (a picture). Can be repeated.",
        "--report",
        metavar="FILE",
    ),
]
Json = Annotated[bool, _flag(SHOWING, "Print JSON, and nothing else.", "--json")]
Full = Annotated[bool, _flag(SHOWING, "Print a line for every layer.", "--full")]
Quiet = Annotated[bool, _flag(SHOWING, "Print nothing but errors.", "--quiet")]
