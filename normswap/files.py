"""The story for files: read, convert, write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap import checkpoint, probe, sources
from normswap.convert import Conversion, Options, Progress, run
from normswap.convert import fold as fold_model
from normswap.errors import FileError
from normswap.report import Report
from normswap.targets import parse_target

RECIPE = "normswap_recipe"
"""The attribute of a whole module that holds the recipe of its conversion, a plain dict."""


def convert_file(
    path: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str] | None = None,
    *,
    weights: str | None = None,
    input_shape: Sequence[int] | None = None,
    example_inputs: Any = None,
    fold: bool = False,
    allow: Iterable[str] = (),
    trust: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda phase: None,
    **options: Any,
) -> Report:
    """Convert the model in a file, or a model of torchvision, and save it whole; what the CLI calls.

    Args:
        path: a whole-module file, or `torchvision:NAME`.
        to: the target, as for `normswap.convert`.
        out: where to write; by default `model.gn-ws.pt` beside the input (`resnet50.gn-ws.pt` here).
        weights: the published weights of a torchvision model, by name.
        input_shape: the shape of an input batch; group counts then regard the sizes of feature maps.
        example_inputs: the same with inputs of your own.
        fold: bake standardized weights in and leave plain torch layers.
        allow, trust: which classes a file may hold; see `normswap.load`.
        overwrite: replace an existing output.
        dry_run: write nothing.
        progress: called with the name of each phase.
        options: those of `normswap.convert`.

    Raises:
        NormswapError: with nothing written.
    """
    target, checked = parse_target(to), Options(**options)
    out = default_out(path, to) if out is None else Path(out)
    if not dry_run:
        checkpoint.check_writable(out, overwrite)
    progress(f"reading {path}")
    model = _open(path, weights, allow, trust)
    inputs, name = example_inputs, "example inputs"
    probe_only = inputs is None and input_shape is None
    if inputs is None:
        inputs, name = probe.guess_inputs(model, None if input_shape is None else tuple(input_shape)) or (None, "")
    model, report = run(model, target, checked, inputs, name, probe_only=probe_only, inplace=True, progress=progress)
    if fold:
        progress("folding")
        model = fold_model(model).model
    if not dry_run:
        progress(f"writing {out}")
        save(model, out, report=report, overwrite=overwrite)
    return report


def fold_file(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    allow: Iterable[str] = (),
    trust: bool = False,
    overwrite: bool = False,
) -> Report:
    """Fold the converted model in a file into plain torch layers and save it; `model.fold.pt` by default."""
    out = default_out(path, "fold") if out is None else Path(out)
    checkpoint.check_writable(out, overwrite)
    conversion: Conversion = fold_model(_open(path, None, allow, trust))
    save(conversion.model, out, report=conversion.report, overwrite=overwrite)
    return conversion.report


def default_out(path: str | os.PathLike[str], suffix: str) -> Path:
    """`model.gn-ws.pt` beside `model.pt`; `resnet50.gn-ws.pt` in this folder for `torchvision:resnet50`."""
    if sources.is_spec(str(path)):
        return Path(f"{sources.short_name(str(path))}.{suffix}.pt")
    path = Path(path)
    return path.with_name(f"{path.stem}.{suffix}{path.suffix or '.pt'}")


def _open(path: str | os.PathLike[str], weights: str | None, allow: Iterable[str], trust: bool) -> nn.Module:
    if sources.is_spec(str(path)):
        return sources.build(str(path), weights)
    return load(path, trust=trust, allow=allow)


def load(path: str | os.PathLike[str], *, trust: bool = False, allow: Iterable[str] = ()) -> nn.Module:
    """The model in a whole-module file, converted or not, on the CPU.

    Files are read without running code: classes must be modules of torch, torchvision, timm or
    normswap, or stand in `allow` by full name (`package.module.Class`). `trust` lifts that, and runs whatever
    the file says.

    Raises:
        FileError: no such file, a broken one, or one that does not hold a whole model.
        UnsafeFileError: a class that is not allowed, by name.
    """
    found = checkpoint.read(path, trust=trust, allow=allow)
    if isinstance(found, nn.Module):
        return found
    tensors = isinstance(found, dict) and any(isinstance(value, torch.Tensor) for value in found.values())
    kind = "a state dict: tensors without their model" if tensors else f"a {type(found).__name__}, not a model"
    raise FileError(f"{path}: holds {kind}; load it into the model, then save that whole: torch.save(model, ...)")


def save(
    model: nn.Module, path: str | os.PathLike[str], *, report: Report | None = None, overwrite: bool = False
) -> Path:
    """Save `model` whole, with the recipe of `report` as its attribute `normswap_recipe`.

    Raises `FileError`, with nothing written: the file exists and `overwrite` is not set, its folder cannot be written,
    or the model holds something that cannot be pickled.
    """
    had = vars(model).get(RECIPE)
    try:
        if report is not None:
            setattr(model, RECIPE, report.recipe)
        return checkpoint.write(model, path, overwrite=overwrite)
    finally:
        if report is not None and had is None:
            delattr(model, RECIPE)
        elif report is not None:
            setattr(model, RECIPE, had)
