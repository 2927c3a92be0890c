"""The story for files: what is asked, what is read, which models are in it, each converted, all written."""

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normswap.analysis.copies import clone
from normswap.analysis.reachable import memory_beside, memory_of_tensor
from normswap.checkpoints import atomic_write, contents, mapped_memory, reading, stored_recipes, writing
from normswap.checkpoints.checkpoint import Checkpoint
from normswap.checkpoints.steady_files import steady_files
from normswap.conversion.device import parse_device
from normswap.conversion.request import Progress
from normswap.files import data, demonstration, inputs, model_specs, one_model, paths, recipe, report_file
from normswap.files.file_request import ConvertedEntry, FileRequest
from normswap.files.load_line import load_line
from normswap.report.report import Change, Cost, Report, Written
from normswap.targets.options import Options
from normswap.targets.target import FOLD, Target, check_options, parse_target
from normswap.training import optimizer_states, optimizers, parameter_numbers


def convert_file(
    path: str | os.PathLike[str], to: str | Target | None = None, out: str | os.PathLike[str] | None = None, *,
    model: model_specs.ModelSource | None = None, model_args: Mapping[str, Any] | None = None,
    weights: str | None = None, key: str | None = None, eps: float | None = None, device: Any = None,
    input_shape: Sequence[int] | None = None, example_inputs: Any = None, examples: Any = None, calibrate: Any = None,
    input_size: int | Sequence[int] | None = None, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, fold: bool = False, format: str | None = None, command: str = "",
    allow: Iterable[str | type] = (), trust: bool = False, overwrite: bool = False, dry_run: bool = False,
    reports: Iterable[str | os.PathLike[str]] = (), progress: Progress = lambda phase: None, **options: Any,
) -> Report:  # fmt: skip
    """Convert the model in a file or a folder, or a model of a library, and write it in the same kind.

    Args:
        path: a file (whole module, state dict, training checkpoint, safetensors), a folder (distributed checkpoint,
            weight files with an index), or `demo:digits`, `torchvision:NAME`, `timm:NAME`.
        to: the target, as for `normswap.convert`.
        out: where to write, or the folder; by default `model.gn-ws.pt` beside the input (`resnet50.gn-ws.pt` here).
        model, model_args: what the tensors belong to, where keys do not tell: a spec (`torchvision:NAME`,
            `package.module:factory`, `file.py:factory`), a factory, or a module.
        weights, key: the published weights of a library's model; the entry of a training checkpoint that is the model.
        eps: of the norms in a file without its model; 1e-5 is assumed.
        input_shape, example_inputs: of an input batch, or inputs; group counts then regard the sizes of feature maps.
        calibrate: data as for `normswap.convert`, or the path of a picture, of a folder of them or of a file of tensors
            (`.pt`, `.npy`, `.npz`, `.safetensors`), or `demo:digits`; pictures are prepared as the library has it.
        examples: a few inputs likewise: drift is measured on them, and nothing is fitted.
        input_size, mean, std: for other pictures: side or (height, width); a number a channel, of values from 0 to 1.
        fold: bake standardized weights in and leave plain torch layers.
        format: write `pt`, `safetensors` or `dcp` instead; of a training checkpoint, the model alone.
        overwrite, dry_run: replace existing outputs; write no model.
        reports: files for the report (`.html`, `.md`, `.json`, `.svg`), which come with the model or not at all.
        command, progress: what was typed, for the report; called with the name of each phase.
        allow, trust: as for `normswap.load`; device, options: as for `normswap.convert`.

    Raises:
        NormswapError: with nothing written.
    """
    started = time.monotonic()
    asked = Options(calibrate=calibrate, **options)
    target = to if isinstance(to, Target) else parse_target(to, asked.recurrent)
    check_options(target, asked)
    output, format = paths.output_and_format(out, path, target.name, format)
    load = partial(load_line, path, model=model, model_args=model_args, key=key, trust=trust, allow=allow)
    outputs = Outputs(
        str(path), None if dry_run else output, format, tuple(map(Path, reports)), overwrite, command, load
    )
    given = data.Given(calibrate, examples, (path, model), weights, input_size, mean, std)
    run_on = input_shape, example_inputs, None if examples is None else (examples, ""), parse_device(device)
    request = FileRequest(target, asked, model, model_args or {}, eps, *run_on, fold, progress)
    with ExitStack() as stack:
        stack.enter_context(paths.folder_made(out))
        _check_paths(path, outputs, (model, calibrate, examples))
        check_inputs = stack.enter_context(steady_files(path, calibrate, examples))
        progress(f"reading {path}")
        found = inputs.read_input(
            path, model=model, key=key, weights=weights, model_args=request.model_args,
            trust=trust, allow=allow, scratch=None if dry_run else output.resolve().parent
        )  # fmt: skip
        _check_kind(found, outputs)
        converted, report = _convert_found(path, found, key, request, given)
        return _write(_in_format(converted, format, key), report, outputs, check_inputs, started, progress)


@dataclass(frozen=True)
class Outputs:
    """What is written, and where."""

    source: str
    """The path or the spec of what is converted."""
    model: Path | None
    """None: a report alone."""
    format: str | None
    """None: that of the input."""
    reports: tuple[Path, ...]
    overwrite: bool
    command: str
    """What was typed, if anything was."""
    load: Callable[[Any, Path], str]
    """The line of Python that loads a content that is written to a path."""


def _check_paths(path: str | os.PathLike[str], outputs: Outputs, read_too: Iterable[object]) -> None:
    """Raise, before any work, for an input of another kind, or an output that cannot be written or is read too."""
    paths.check_apart(outputs.model, outputs.reports, (path, *read_too))
    report_file.check_report_files(outputs.reports, outputs.overwrite)
    inputs.check_is_there(path)
    if not model_specs.is_spec(str(path)):
        reading.check_input(Path(path))
    if outputs.model is not None:
        writing.check_format(outputs.model, outputs.format, outputs.overwrite)


def _check_kind(found: Checkpoint, outputs: Outputs) -> None:
    """Raise where the model cannot take the place of what stands there, now that its kind is known."""
    if outputs.model is not None:
        kind = outputs.format or found.kind
        writing.check_format(outputs.model, kind, outputs.overwrite, source=found.path)


# ---- the models in a checkpoint, and their optimizers ----


def _convert_found(
    path: str | os.PathLike[str], found: Checkpoint, key: str | None, request: FileRequest, given: data.Given
) -> tuple[Checkpoint, Report]:
    """What was read from `path`, converted as is asked, with the data that are given; and the report."""
    with inputs.errors_name(path):
        entries = contents.find_entries(found.content, key, path)
        request = one_model.completed_request(entries, found.path, request)
    request = data.with_data(request, replace(given, sources=(path, request.model), model=entries[0].value))
    with inputs.errors_name(path):
        converted, report = _convert_models(found, entries, request)
        return converted, demonstration.with_accuracy(report, path, converted.content, request)


def _convert_models(
    found: Checkpoint, entries: Sequence[contents.Entry], request: FileRequest
) -> tuple[Checkpoint, Report]:
    """`found` with its `entries` converted, and what optimizers hold of their parameters carried over."""
    converted = _convert_each(entries, found, request)
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
    report = replace(
        first.report,
        changes=(*first.report.changes, *copies, *inside, *beside),
        warnings=(*first.report.warnings, *lost_inside, *lost_beside, *about_models),
        notes=(*first.report.notes, *_notes(entries[0], first, request)),
    )
    return replace(found, content=content, optimizers=states), report


def _notes(entry: contents.Entry, done: ConvertedEntry, request: FileRequest) -> list[str]:
    """Which entry is taken for the model, how data were read, and how a folded model comes to do without normswap."""
    notes = [*([entry.note] if entry.note else []), *request.notes]
    if not isinstance(done.value, nn.Module) and (request.fold or request.target is FOLD):
        notes.append(
            "the tensors of a folded model fit no model as it was: load them with normswap, and "
            "torch.save(model, path) writes one that opens without it"
        )
    return notes


def _convert_each(entries: Sequence[contents.Entry], found: Checkpoint, request: FileRequest) -> list[ConvertedEntry]:
    """Every entry converted; a module that stands under two names once, since it is changed in place.

    Modules come last: a state dict may be on the same tensors.
    """
    done: dict[int, ConvertedEntry] = {}
    for entry in sorted(entries, key=lambda entry: isinstance(entry.value, nn.Module)):
        if id(entry.value) not in done:
            done[id(entry.value)] = one_model.convert_entry(_on_memory_of_its_own(entry, found), found.path, request)
    return [done[id(entry.value)] for entry in entries]


def _on_memory_of_its_own(entry: contents.Entry, found: Checkpoint) -> contents.Entry:
    """A module, which is changed in place, as a copy where something beside it in the file is on the same tensors."""
    if not isinstance(entry.value, nn.Module) or not entry.keys:
        return entry
    own = {memory_of_tensor(tensor) for tensor in entry.value.state_dict().values() if isinstance(tensor, Tensor)} - {0}
    return replace(entry, value=clone(entry.value)) if own & memory_beside(entry.value, found.content) else entry


def _remap_optimizers(
    content: Any, pairs: Sequence[tuple[parameter_numbers.Parameters, parameter_numbers.Parameters]], flat: bool = False
) -> tuple[Any, list[Change], list[str]]:
    """`content` with its optimizers' states carried over, a change for each parameter, and what could not be done.

    `flat`: the states are kept as in a distributed checkpoint.
    """
    remap = optimizer_states.remap_flat_states if flat else optimizer_states.remap_states
    content, states, lost = remap(content, pairs)
    changes = [change for name, state in states.items() for change in optimizers.state_changes(name, state)]
    reason = "dropped, since the file does not tell which parameter each state belongs to; make a new optimizer"
    return content, changes, [f"{name}: {reason}" for name in lost]


# ---- writing ----


def _write(
    found: Checkpoint, report: Report, outputs: Outputs, check_inputs: Callable[[], None], started: float,
    progress: Progress,
) -> Report:  # fmt: skip
    """Write the model and the reports in full, then give them their names; gives the report with what all that cost."""
    staged = []
    with ExitStack() as stack:
        if outputs.model is not None:
            progress(f"writing {outputs.model}")
            writing_model = writing.stage_checkpoint(
                found,
                outputs.model,
                outputs.format,
                overwrite=outputs.overwrite,
                mapped=not model_specs.is_spec(outputs.source),
            )
            staged.append(stack.enter_context(writing_model))
        loads = outputs.load(found.content, outputs.model) if outputs.model is not None else ""
        written = Written(outputs.command, str(outputs.model or ""), loads)
        cost = Cost(time.monotonic() - started, mapped_memory.peak_memory())
        report = replace(report, cost=cost, written=written)
        writing_reports = report_file.stage_report_files(report, outputs.source, outputs.reports, outputs.overwrite)
        staged += stack.enter_context(writing_reports)
        check_inputs()
        atomic_write.give_names(staged)
    return report


def _in_format(found: Checkpoint, format: str | None, key: str | None) -> Checkpoint:
    """`found` like the input; in another format the model alone, since not every format holds other entries."""
    return found if format in (None, found.kind) else replace(found, content=_model_alone(found, format, key))


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
