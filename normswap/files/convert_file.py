"""The story for files: read, convert, write."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normswap.calibration.batches import input_batches, read_samples
from normswap.checkpoints import checkpoint, contents, mapped_memory, reading, writing
from normswap.checkpoints.checkpoint import RECIPE, Checkpoint
from normswap.conversion.convert import Options, Progress
from normswap.errors import FileError, ModelError, OptionError
from normswap.files import model_specs, norms_by_keys
from normswap.files.model_for_state import fill, source_of
from normswap.files.model_specs import Source
from normswap.files.one_model import EPS, Done, Job, convert_entry, noise_for
from normswap.inspection.examine import examine
from normswap.report.inspection import Inspection, Layer
from normswap.report.report import Change, Cost, Report
from normswap.targets.target import PLAIN_TARGET, parse_target
from normswap.training import optimizer_states
from normswap.training.optimizers import state_changes


def convert_file(
    path: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str] | None = None,
    *,
    model: Source | None = None,
    model_args: Mapping[str, Any] | None = None,
    weights: str | None = None,
    key: str | None = None,
    eps: float | None = None,
    input_shape: Sequence[int] | None = None,
    example_inputs: Any = None,
    calibrate: Any = None,
    input_size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fold: bool = False,
    format: str | None = None,
    allow: Iterable[str] = (),
    trust: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda phase: None,
    **options: Any,
) -> Report:
    """Convert the model in a file or a folder, or a model of a library, and write it in the same kind; what the CLI calls.

    Args:
        path: a file (whole module, state dict, training checkpoint, safetensors), a folder (distributed checkpoint, weight files
            with an index), or `torchvision:NAME`, `timm:NAME`.
        to: the target, as for `normswap.convert`.
        out: where to write; by default `model.gn-ws.pt` beside the input (`resnet50.gn-ws.pt` here).
        model: what the tensors belong to, where the file holds no module: a spec (`torchvision:NAME`, `timm:NAME`,
            `package.module:factory`, `file.py:factory`), a factory, or a module. `gn`, `ln`, `in` and `frozen` do without.
        model_args: keyword arguments of a model that is built.
        weights: the published weights of a library's model, by name.
        key: which entry of a training checkpoint is the model, where it has none of the usual names.
        eps: of the norms in a file without its model; 1e-5 is assumed.
        input_shape: the shape of an input batch; group counts then regard the sizes of feature maps.
        example_inputs: the same with inputs of your own.
        calibrate: data as for `normswap.convert`, or the path of a folder of pictures or of a file of tensors (`.pt`, `.npy`, `.npz`,
            `.safetensors`); pictures are prepared as the library's model has it.
        input_size, mean, std: how pictures are prepared else: side or (height, width), and a number a channel for values from 0 to 1.
        fold: bake standardized weights in and leave plain torch layers.
        format: write `pt`, `safetensors` or `dcp` instead; of a training checkpoint, the model alone.
        allow, trust: which classes a file may hold; see `normswap.load`.
        overwrite: replace an existing output.
        dry_run: write nothing.
        progress: called with the name of each phase.
        options: those of `normswap.convert`.

    Raises:
        NormswapError: with nothing written.
    """
    started = time.monotonic()
    asked, target = Options(**options), parse_target(to)
    if not model_specs.is_spec(str(path)):
        reading.check_input(Path(path))
    out = default_out(path, to, format) if out is None else Path(out)
    form = _form(out, format)
    if not dry_run:
        writing.check_format(out, form, overwrite)
    if isinstance(calibrate, str | os.PathLike):
        progress(f"reading {calibrate}")
        known = next((str(s) for s in (path, model) if isinstance(s, str) and model_specs.is_spec(s)), None)
        calibrate = read_samples(
            calibrate, spec=known, weights=weights, input_size=input_size, mean=mean, std=std
        )  # fmt: skip
    elif calibrate is not None:
        calibrate = input_batches(calibrate)
    elif input_size or mean or std:
        raise OptionError("--input-size, --mean and --std are for the pictures of --calibrate")
    asked = replace(asked, calibrate=calibrate)
    job = Job(target, asked, model, model_args or {}, eps, input_shape, example_inputs, fold, progress)
    progress(f"reading {path}")
    _check_source(path, model, key, weights)
    if model_specs.is_spec(str(path)):
        found = Checkpoint(Path(str(path)), "pt", model_specs.build(str(path), weights, job.arguments))
    else:
        found = reading.read_checkpoint(
            path, trust=trust, allow=allow, scratch=None if dry_run else out.resolve().parent
        )
    with _naming(path):
        found, report = _convert(found, key, job)
    if not dry_run:
        progress(f"writing {out}")
        _write(found, out, form, key, overwrite)
    return _with_cost(report, started)


def _check_source(path: str | os.PathLike[str], model: Source | None, key: str | None, weights: str | None) -> None:
    """Options that do not go with what is converted."""
    if not model_specs.is_spec(str(path)):
        if weights is not None:
            raise OptionError(f"--weights {weights} is for a model of a library; {path} has its own")
    elif model is not None or key is not None:
        raise OptionError(f"--model and --key are for files; {path} is a model itself")


def _with_cost(report: Report, started: float) -> Report:
    return replace(report, cost=Cost(time.monotonic() - started, mapped_memory.peak_memory()))


def inspect_file(
    path: str | os.PathLike[str],
    *,
    model: Source | None = None,
    model_args: Mapping[str, Any] | None = None,
    weights: str | None = None,
    key: str | None = None,
    input_shape: Sequence[int] | None = None,
    allow: Iterable[str] = (),
    trust: bool = False,
    progress: Progress = lambda phase: None,
) -> Inspection:
    """`normswap.inspect` on the model in a file or a folder, or on a model of a library; the arguments are those of `convert_file`.

    A file of tensors without their model is inspected as far as its keys tell: the batch norms, and what has the shape of a convolution.
    """
    progress(f"reading {path}")
    _check_source(path, model, key, weights)
    path = Path(path)
    if model_specs.is_spec(str(path)):
        made = model_specs.build(str(path), weights, model_args or {})
        return _examined(made, input_shape, progress)
    found = reading.read_checkpoint(path, trust=trust, allow=allow)
    entry = contents.find_entries(found.content, key, path)[0]
    with _naming(path):
        if isinstance(entry.value, nn.Module):
            if model is not None:
                raise OptionError(
                    f"--model is for files without their model; {path} holds a {type(entry.value).__name__}"
                )
            return _examined(entry.value, input_shape, progress)
        if model is None and checkpoint.stored_recipe(entry.value) is None:
            seen = examine(norms_by_keys.norms_of(entry.value, EPS), progress=progress)
            extra = [
                Layer((p,), "weight", "convolution", "", None, None, None, None, "", "")
                for p in norms_by_keys.convolution_keys(entry.value)
            ]
            return replace(seen, model="tensors without their model", layers=(*seen.layers, *extra))
        source, arguments = source_of(entry.value, model, model_args or {}, path)
        return _examined(fill(entry.value, source, arguments, path)[0][1], input_shape, progress)


def _examined(model: nn.Module, shape: Sequence[int] | None, progress: Progress) -> Inspection:
    inputs, name = noise_for(model, shape)
    return examine(model, inputs, name, probe_only=shape is None, progress=progress)


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors about the content of a file name the file."""
    try:
        yield
    except (ModelError, FileError) as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def _convert(found: Checkpoint, key: str | None, job: Job) -> tuple[Checkpoint, Report]:
    """Every copy of the model in `found`, and what optimizers hold of its parameters."""
    content = found.content
    dones: list[Done] = []
    copies: list[Change] = []
    made: dict[int, Done] = {}  # one module may stand under two names
    models = contents.find_entries(content, key, found.path)
    for entry in models:
        place = id(entry.value)
        done = made[place] = made.get(place) or convert_entry(entry, found.path, job)
        content = contents.with_value_at(content, entry, done.value)
        if dones:
            how, exact = "converted like the model", done.report.exact
            copies.append(Change((entry.name,), "copy", "copy of the model", "converted", how, exact))
        dones.append(done)
    first, report = dones[0], dones[0].report
    content, changes, notices = _mend(content, first, flat=found.kind == "dcp")
    held, more, further = _mend(dict(found.optimizers), first)
    if others := contents.other_models(found.content, models):
        further.append(f"not converted, though it looks like a model: {', '.join(others)}; convert it with --key")
    report = replace(
        report, changes=(*report.changes, *copies, *changes, *more), warnings=(*report.warnings, *notices, *further)
    )
    return replace(found, content=content, optimizers=held), report


# ---- optimizers ----


def _mend(content: Any, done: Done, flat: bool = False) -> tuple[Any, list[Change], list[str]]:
    """`content` with its optimizers' states carried over, a change for each parameter, and what could not be done."""
    mended, carried, lost = (optimizer_states.remap_flat_states if flat else optimizer_states.remap_states)(
        content, done.ways
    )
    changes = [change for name, state in carried.items() for change in state_changes(name, state)]
    reason = "dropped, since nothing tells which parameter each of its states belongs to; start it anew"
    return mended, changes, [f"{name}: {reason}" for name in lost]


# ---- writing, loading, folding ----


def _write(found: Checkpoint, out: Path, form: str | None, key: str | None, overwrite: bool) -> None:
    if form is not None and form != found.kind:
        alone = contents.find_entries(found.content, key, found.path)[0].value
        if form == "pt" and not isinstance(alone, nn.Module):
            tensors = OrderedDict((k, v) for k, v in alone.items() if isinstance(v, Tensor))
            checkpoint.store_recipe(tensors, checkpoint.stored_recipe(alone))
            alone = tensors
        elif isinstance(alone, nn.Module):
            alone = _state_of(alone)
        found = replace(found, kind=form, content=alone)
    writing.write_checkpoint(found, out, form, overwrite=overwrite, mapped=not model_specs.is_spec(str(found.path)))


def _state_of(model: nn.Module) -> Any:
    state = model.state_dict()
    checkpoint.store_recipe(state, checkpoint.stored_recipe(model))
    return state


def _form(out: Path, form: str | None) -> str | None:
    """The format that was asked for, or that the name of the output tells."""
    return form or ("safetensors" if out.suffix == ".safetensors" else None)


def default_out(path: str | os.PathLike[str], suffix: str, form: str | None = None) -> Path:
    """`model.gn-ws.pt` beside `model.pt`; `resnet50.gn-ws.pt` in this folder for `torchvision:resnet50`."""
    if model_specs.is_spec(str(path)):
        return writing.path_beside(f"{model_specs.short_name(str(path))}.pt", suffix, form)
    return writing.path_beside(path, suffix, form)


def fold_file(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    model: Source | None = None,
    model_args: Mapping[str, Any] | None = None,
    key: str | None = None,
    allow: Iterable[str] = (),
    trust: bool = False,
    overwrite: bool = False,
) -> Report:
    """Fold the converted model in a file into plain torch layers and save it; `model.fold.pt` by default."""
    if model_specs.is_spec(str(path)):
        raise OptionError(f"{path} is a model, not a converted file; convert it first: --to fold, or --to gn-ws --fold")
    started = time.monotonic()
    out = default_out(path, "fold") if out is None else Path(out)
    writing.check_format(out, None, overwrite)
    found = reading.read_checkpoint(path, trust=trust, allow=allow, scratch=out.resolve().parent)
    with _naming(path):
        found, report = _convert(found, key, Job(PLAIN_TARGET, Options(), model, model_args or {}))
    writing.write_checkpoint(found, out, overwrite=overwrite)
    return _with_cost(report, started)


def load(
    path: str | os.PathLike[str],
    *,
    model: Source | None = None,
    model_args: Mapping[str, Any] | None = None,
    key: str | None = None,
    trust: bool = False,
    allow: Iterable[str] = (),
) -> nn.Module:
    """The model in a file or folder, converted or not, on the CPU.

    A file of tensors needs `model`, the one before conversion: a factory, a spec (see `convert_file`) or a module, which is
    copied; the recipe in the file converts it before the tensors go in, strictly. A library's model needs none.
    Files are read without running code: classes must be modules of torch, torchvision, timm or
    normswap, or stand in `allow` by full name (`package.module.Class`). `trust` lifts that, and runs whatever
    the file says.

    Raises:
        FileError: no such file, a broken one, or one whose tensors or recipe do not fit the model.
        UnsafeFileError: a class that is not allowed, by name.
    """
    path = Path(path)
    found = reading.read_checkpoint(path, trust=trust, allow=allow)
    entry = contents.find_entries(found.content, key, path)[0]
    if isinstance(entry.value, nn.Module):
        return entry.value
    source, arguments = source_of(entry.value, model, model_args, path)
    try:
        with _naming(path):
            return fill(entry.value, source, arguments, path)[0][1]
    except OptionError as error:
        if model is not None:
            raise
        raise FileError(f"{path}: its recipe names a model that cannot be made: {error}") from None


def save(
    model: nn.Module, path: str | os.PathLike[str], *, report: Report | None = None, overwrite: bool = False
) -> Path:
    """Save `model` whole, with the recipe of `report` as its attribute `normswap_recipe`; `.safetensors`: its state dict.

    Raises `FileError`, with nothing written: the file exists and `overwrite` is not set, its folder cannot be written,
    or the model holds something that cannot be pickled.
    """
    path = Path(path)
    form = _form(path, None)
    writing.check_format(path, form, overwrite)
    had = vars(model).get(RECIPE)
    try:
        if report is not None:
            setattr(model, RECIPE, report.recipe)
        content = _state_of(model) if form == "safetensors" else model
        return writing.write_checkpoint(Checkpoint(path, form or "pt", content), path, overwrite=overwrite)
    finally:
        if report is not None and had is None:
            delattr(model, RECIPE)
        elif report is not None:
            setattr(model, RECIPE, had)
