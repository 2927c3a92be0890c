"""The story for files: what is asked, what is read, which models are in it, each converted, all written."""

import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normswap.calibration.batches import input_batches, read_samples
from normswap.checkpoints import contents, mapped_memory, reading, stored_recipes, writing
from normswap.checkpoints.checkpoint import Checkpoint
from normswap.conversion.request import Progress
from normswap.errors import OptionError
from normswap.files import inputs, model_specs, one_model, paths, recipe
from normswap.files.file_request import ConvertedEntry, FileRequest
from normswap.report.report import Change, Cost, Report
from normswap.targets.options import Options
from normswap.targets.target import Target, check_options, parse_target
from normswap.training import optimizer_states, optimizers, parameter_numbers


def convert_file(
    path: str | os.PathLike[str], to: str | Target, out: str | os.PathLike[str] | None = None, *,
    model: model_specs.ModelSource | None = None, model_args: Mapping[str, Any] | None = None,
    weights: str | None = None, key: str | None = None, eps: float | None = None,
    input_shape: Sequence[int] | None = None, example_inputs: Any = None, calibrate: Any = None,
    input_size: int | Sequence[int] | None = None, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, fold: bool = False, format: str | None = None, allow: Iterable[str | type] = (),
    trust: bool = False, overwrite: bool = False, dry_run: bool = False,
    progress: Progress = lambda phase: None, **options: Any,
) -> Report:  # fmt: skip
    """Convert the model in a file or a folder, or a model of a library, and write it in the same kind.

    Args:
        path: a file (whole module, state dict, training checkpoint, safetensors), a folder (distributed checkpoint,
            weight files with an index), or `torchvision:NAME`, `timm:NAME`.
        to: the target, as for `normswap.convert`; `PLAIN_TARGET` folds what is converted, as `normswap.fold` does.
        out: where to write; by default `model.gn-ws.pt` beside the input (`resnet50.gn-ws.pt` here).
        model: what the tensors belong to, where the file holds no module: a spec (`torchvision:NAME`, `timm:NAME`,
            `package.module:factory`, `file.py:factory`), a factory, or a module. Most norms do without.
        model_args: keyword arguments of a model that is built.
        weights: the published weights of a library's model, by name.
        key: which entry of a training checkpoint is the model, where it has none of the usual names.
        eps: of the norms in a file without its model; 1e-5 is assumed.
        input_shape: the shape of an input batch; group counts then regard the sizes of feature maps.
        example_inputs: the same with inputs of your own.
        calibrate: data as for `normswap.convert`, or the path of a folder of pictures or of a file of tensors (`.pt`,
            `.npy`, `.npz`, `.safetensors`); pictures are prepared as the library's model has it.
        input_size, mean, std: for other pictures: side or (height, width); a number a channel, of values from 0 to 1.
        fold: bake standardized weights in and leave plain torch layers.
        format: write `pt`, `safetensors` or `dcp` instead; of a training checkpoint, the model alone.
        allow, trust: which classes a file may hold; see `normswap.load`.
        overwrite, dry_run: replace an existing output; write nothing.
        progress: called with the name of each phase.
        options: those of `normswap.convert`.

    Raises:
        NormswapError: with nothing written.
    """
    started = time.monotonic()
    asked, target = Options(calibrate=calibrate, **options), to if isinstance(to, Target) else parse_target(to)
    check_options(target, asked)
    out = paths.default_output(path, target.name, format) if out is None else Path(out)
    format = format or paths.format_by_ending(out)
    _check_paths(path, out, format, None if dry_run else overwrite)
    spec = next((str(s) for s in (path, model) if isinstance(s, str) and model_specs.is_spec(s)), None)
    pictures = {"input_size": input_size, "mean": mean, "std": std}
    request = FileRequest(target, asked, model, model_args or {}, eps, input_shape, example_inputs, fold, progress)
    progress(f"reading {path}")
    found = inputs.read_input(
        path, model=model, key=key, weights=weights, model_args=request.model_args,
        trust=trust, allow=allow, scratch=None if dry_run else out.resolve().parent
    )  # fmt: skip
    with inputs.errors_name(path):
        one_model.check_request(entries := contents.find_entries(found.content, key, found.path), found.path, request)
        asked = replace(asked, calibrate=_read_data(calibrate, spec, weights, pictures, progress))
        converted, report = _convert_models(found, entries, replace(request, options=asked))
    if not dry_run:
        progress(f"writing {out}")
        _write(converted, out, format, key, overwrite)
    return replace(report, cost=Cost(time.monotonic() - started, mapped_memory.peak_memory()))


def _check_paths(path: str | os.PathLike[str], out: Path, format: str | None, overwrite: bool | None) -> None:
    """Raise, before any work, for an input of another kind or an output that cannot be written (None: none is)."""
    if not model_specs.is_spec(str(path)):
        reading.check_input(Path(path))
    if overwrite is not None:
        writing.check_format(out, format, overwrite)


def _read_data(
    calibrate: Any, spec: str | None, weights: str | None, pictures: Mapping[str, Any], progress: Progress
) -> Any:
    """The batches of calibration data, or None; `pictures` says how pictures are prepared, or else the model `spec`."""
    if isinstance(calibrate, str | os.PathLike):
        progress(f"reading {calibrate}")
        return read_samples(calibrate, spec=spec, weights=weights, **pictures)
    if calibrate is not None:
        return input_batches(calibrate)
    if any(pictures.values()):
        raise OptionError("--input-size, --mean and --std are for the pictures of --calibrate")
    return None


# ---- the models in a checkpoint, and their optimizers ----


def _convert_models(
    found: Checkpoint, entries: Sequence[contents.Entry], request: FileRequest
) -> tuple[Checkpoint, Report]:
    """`found` with its `entries` converted, and what optimizers hold of their parameters carried over."""
    converted = _convert_each(entries, found.path, request)
    content = found.content
    for entry, new in zip(entries, converted, strict=True):
        content = contents.with_value_at(content, entry, new.value)
    first = converted[0]
    content, inside, lost_inside = _remap_optimizers(content, first.parameter_pairs, flat=found.kind == "dcp")
    states, beside, lost_beside = _remap_optimizers(dict(found.optimizers), first.parameter_pairs)
    copies = [
        Change((entry.name,), "copy", "copy of the model", "converted", "converted like the model", new.report.exact)
        for entry, new in zip(entries[1:], converted[1:], strict=True)
    ]
    others = ", ".join(contents.other_models(found.content, entries))
    about_models = [f"not converted, though it looks like a model: {others}; convert it with --key"] if others else []
    about_models += [entries[0].note] if entries[0].note else []
    report = replace(
        first.report,
        changes=(*first.report.changes, *copies, *inside, *beside),
        warnings=(*first.report.warnings, *lost_inside, *lost_beside, *about_models),
    )
    return replace(found, content=content, optimizers=states), report


def _convert_each(entries: Sequence[contents.Entry], where: Path, request: FileRequest) -> list[ConvertedEntry]:
    """Every entry converted in turn; a module that stands under two names once, since it is changed in place."""
    done: dict[int, ConvertedEntry] = {}
    for entry in entries:
        if id(entry.value) not in done:
            done[id(entry.value)] = one_model.convert_entry(entry, where, request)
    return [done[id(entry.value)] for entry in entries]


def _remap_optimizers(
    content: Any, pairs: Sequence[tuple[parameter_numbers.Parameters, parameter_numbers.Parameters]], flat: bool = False
) -> tuple[Any, list[Change], list[str]]:
    """`content` with its optimizers' states carried over, a change for each parameter, and what could not be done.

    `flat`: the states are kept as in a distributed checkpoint.
    """
    remap = optimizer_states.remap_flat_states if flat else optimizer_states.remap_states
    content, states, lost = remap(content, pairs)
    changes = [change for name, state in states.items() for change in optimizers.state_changes(name, state)]
    reason = "dropped, since nothing tells which parameter each of its states belongs to; start it anew"
    return content, changes, [f"{name}: {reason}" for name in lost]


# ---- writing ----


def _write(found: Checkpoint, out: Path, format: str | None, key: str | None, overwrite: bool) -> None:
    """Write `found` like the input; in another format the model alone, since not every format holds other entries."""
    if format is not None and format != found.kind:
        found = replace(found, content=_model_alone(found, format, key))
    writing.write_checkpoint(found, out, format, overwrite=overwrite, mapped=not model_specs.is_spec(str(found.path)))


def _model_alone(found: Checkpoint, format: str, key: str | None) -> Any:
    """The model of a checkpoint as a state dict with its recipe, without what is no tensor in a file of torch's."""
    model = contents.find_entries(found.content, key, found.path)[0].value
    if isinstance(model, nn.Module):
        return recipe.state_dict_with_recipe(model)
    if format != "pt":
        return model
    tensors = OrderedDict((name, value) for name, value in model.items() if isinstance(value, Tensor))
    stored_recipes.store_recipe(tensors, stored_recipes.stored_recipe(model))
    return tensors
