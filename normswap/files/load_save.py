"""Converted models from files, and into files."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from normswap.checkpoints import contents, mapped_memory, reading, state_keys, stored_recipes, writing
from normswap.checkpoints.checkpoint import RECIPE, Checkpoint
from normswap.checkpoints.own_classes import own_classes
from normswap.checkpoints.steady_files import steady_files
from normswap.errors import FileError, OptionError
from normswap.files import inputs, model_for_state, model_specs, paths, recipe
from normswap.printable import printable
from normswap.report.report import Report


def load(
    path: str | os.PathLike[str],
    *,
    model: model_specs.ModelSource | None = None,
    model_args: Mapping[str, Any] | None = None,
    key: str | None = None,
    trust: bool = False,
    allow: Iterable[str | type] = (),
) -> nn.Module:
    """The model in a file or folder, converted or not, on the CPU.

    A file of tensors needs its model: the recipe in the file converts that before the tensors go in, strictly. Files
    are read without running code: classes must be modules of torch, torchvision, timm or normswap, or stand in `allow`.

    Its mode is that of the module in the file; of tensors that of the model as its factory makes it (a fresh module is
    in training mode, a library's model in eval mode): call `.eval()` or `.train()`.

    Args:
        path: a file (whole module, state dict, training checkpoint, safetensors) or a folder (distributed checkpoint,
            weight files with an index); or `demo:digits`, and `torchvision:NAME`, `timm:NAME` with initial weights.
        model: the model of a file of tensors, before conversion: a factory, a spec (see `convert_file`) or a module,
            which is copied. What was converted as a library's model needs none.
        model_args: keyword arguments of a model that is made.
        key: which entry of a training checkpoint is the model, where it has none of the usual names.
        trust: run whatever code the file holds.
        allow: other classes that the file may hold: themselves, full names (`package.module.Class`), or patterns
            (`package.models.*`), which stand for modules and plain data alone. Where the file turns out to hold tensors
            alone, the one class of a module among them makes the model.

    Raises:
        FileError: no such file, a broken one, or one whose tensors or recipe do not fit the model.
        ModelError: the model reads tensors that no file has: on meta, or drawn anew by its factory each time.
        UnsafeFileError: a class that is not allowed, by name.
    """
    if model_specs.is_spec(str(path)):
        return _of_library(str(path), model, model_args)
    path = Path(path)
    with steady_files(path) as check_input:
        loaded = _loaded(path, model, model_args, key, trust, allow)
        check_input()
    return loaded


def _of_library(spec: str, model: object, model_args: Mapping[str, Any] | None) -> nn.Module:
    if model is not None:
        raise OptionError(f"model= is for files; {spec} is a model itself")
    return model_specs.build(spec, arguments=model_args)


def _loaded(
    path: Path, model: model_specs.ModelSource | None, model_args: Mapping[str, Any] | None, key: str | None,
    trust: bool, allow: Iterable[str | type],
) -> nn.Module:  # fmt: skip
    found = reading.read_checkpoint(path, trust=trust, allow=allow)
    entry = contents.find_entries(found.content, key, path)[0]
    value = entry.value
    if entry.note:
        warnings.warn(printable(f"{path}: {entry.note}"), stacklevel=3)
    if isinstance(value, nn.Module):
        stored_recipes.keep_in_state_dicts(value)
        mapped_memory.hold(value)  # its file may be written anew while it trains
        return value
    if model is None and model_for_state.spec_of_recipe(value) is None:
        model = _only_module(allow)
    source, arguments = model_for_state.find_source(value, model, model_args, path)
    try:
        with inputs.errors_name(path):
            filled = model_for_state.models_on_tensors(value, source, arguments, path, to_run=True)
    except OptionError as error:
        if model is not None:
            raise
        raise FileError(f"{path}: its recipe names a model that cannot be made: {error}") from None
    bindings = [binding for binding, _ in filled]
    beside = state_keys.keys_beside(value, bindings, bindings[0].prefix)
    if beside:
        notice = f"{path}: left out what the model does not have: {state_keys.first_names(beside)}"
        warnings.warn(printable(notice), stacklevel=3)
    return filled[0][1]


def _only_module(allow: Iterable[str | type]) -> type[nn.Module] | None:
    """The one class of a module that is allowed; None where there are none or several."""
    modules = [entry for entry in allow if isinstance(entry, type) and issubclass(entry, nn.Module)]
    return modules[0] if len(modules) == 1 else None


def save(
    model: nn.Module, path: str | os.PathLike[str], *, report: Report | None = None, overwrite: bool = False
) -> Path:
    """Save `model`, converted or not, and return where.

    A whole module is written where `load` reads it without being told more. One with classes of your own is written as
    its state dict, which `load(path, model=make_model)` reads and which outlives changes of your code; so is every
    model where `path` ends in `.safetensors`. `torch.save(model, path)` writes any model whole.

    Args:
        model: is left as it was.
        path: the file.
        report: of the conversion, where the model does not hold its recipe; it goes into the file, as the attribute
            `normswap_recipe` of the model there.
        overwrite: replace an existing file.

    Raises:
        FileError: with nothing written: the file exists and `overwrite` is not set, its folder cannot be written, or
            the model holds something that cannot be pickled.
    """
    path = Path(path)
    format = paths.format_by_ending(path)
    writing.check_format(path, format, overwrite)
    with _as_written(model, report):
        whole = format != "safetensors" and not own_classes(model)
        swapped = any(type(module).__module__.startswith("normswap.layers") for module in model.modules())
        if not whole and swapped and stored_recipes.stored_recipe(model) is None:
            notice = f"{path}: holds no recipe, so that load cannot repeat the conversion; give report="
            warnings.warn(printable(notice), stacklevel=2)
        content = model if whole else recipe.state_dict_with_recipe(model)
        return writing.write_checkpoint(Checkpoint(path, "pt", content), path, format, overwrite=overwrite)


@contextmanager
def _as_written(model: nn.Module, report: Report | None) -> Iterator[None]:
    """Meanwhile `model` has the recipe of `report`, if any, and nothing that a file would need normswap for."""
    own = vars(model).get(RECIPE)
    hooked = [module for module in model.modules() if stored_recipes.keep_out_of_state_dicts(module)]
    try:
        if report is not None:
            stored_recipes.store_recipe(model, report.recipe)
        yield
    finally:  # the caller's model is as it was, whatever happened
        if report is not None and own is None:
            delattr(model, RECIPE)
        elif report is not None:
            stored_recipes.store_recipe(model, own)
        for module in hooked:
            stored_recipes.keep_in_state_dicts(module)
