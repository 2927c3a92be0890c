"""The inspection of a model in a file."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from normswap.checkpoints import contents
from normswap.checkpoints.checkpoint import Checkpoint
from normswap.checkpoints.steady_files import steady_files
from normswap.conversion.pipeline import undisturbed
from normswap.conversion.request import Progress
from normswap.errors import OptionError
from normswap.files import demonstration, model_for_state, model_specs, one_model
from normswap.files.inputs import check_is_there, errors_name, read_input
from normswap.files.inspect_tensors import examine_tensors
from normswap.files.recognized import Recognized, recognized
from normswap.inspection.examine import examine
from normswap.report.inspection import Inspection


@undisturbed()
def inspect_file(
    path: str | os.PathLike[str],
    *,
    model: model_specs.ModelSource | None = None,
    model_args: Mapping[str, Any] | None = None,
    weights: str | None = None,
    key: str | None = None,
    input_shape: Sequence[int] | None = None,
    allow: Iterable[str | type] = (),
    trust: bool = False,
    progress: Progress = lambda phase: None,
) -> Inspection:
    """`normswap.inspect` on the model in a file or a folder, or on a model of a library.

    The arguments and the errors are those of `convert_file`. A file of tensors without their model is inspected as far
    as its keys tell, and its recipe: the batch norms, what has the shape of a convolution, what was converted.
    """
    check_is_there(path)
    with steady_files(path) as check_input:
        progress(f"reading {path}")
        arguments = model_args or {}
        checkpoint = read_input(
            path, model=model, key=key, weights=weights, model_args=arguments, trust=trust, allow=allow
        )
        found = _examine(checkpoint, str(path), model, arguments, key, input_shape, progress)
        check_input()
    return found


def _examine(
    found: Checkpoint, given: str, model: model_specs.ModelSource | None, arguments: Mapping[str, Any],
    key: str | None, input_shape: Sequence[int] | None, progress: Progress,
) -> Inspection:  # fmt: skip
    """The inspection of what was read from the path or the spec `given`."""
    if demonstration.is_demo(given) and input_shape is None:
        return examine(found.content, *demonstration.held_out_pictures(given), progress=progress)
    if model_specs.is_spec(given):
        return _examine_module(found.content, input_shape, progress)
    path = Path(given)
    value = contents.find_entries(found.content, key, path)[0].value
    with errors_name(path):
        if isinstance(value, nn.Module):
            if model is not None:
                raise OptionError(f"--model is for files without their model; {path} holds a {type(value).__name__}")
            return _examine_module(value, input_shape, progress)
        told = recognized(value) if model is None and not arguments else Recognized()
        if model is None and not arguments and told.network is None and model_for_state.spec_of_recipe(value) is None:
            return _as_told(examine_tensors(value, given, progress), told)
        source, arguments = model_for_state.find_source(value, model, arguments, path)
        _, built = model_for_state.models_on_tensors(value, source, arguments, path)[0]
        return _as_told(_examine_module(built, input_shape, progress), told)


def _as_told(found: Inspection, told: Recognized) -> Inspection:
    """`found` with what keys and shapes told of the network."""
    return replace(found, model=f"{found.model}; {told.said}") if told.said else found


def _examine_module(model: nn.Module, shape: Sequence[int] | None, progress: Progress) -> Inspection:
    noise, name = one_model.noise_for(model, shape)
    return examine(model, noise, name, probe_only=shape is None, progress=progress)
