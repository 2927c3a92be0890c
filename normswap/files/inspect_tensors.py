"""The inspection of tensors without their model: what their keys, their shapes and the recipe beside them tell."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from normswap.checkpoints import stored_recipes
from normswap.conversion.request import Progress
from normswap.files import norms_by_keys
from normswap.files.recipe import parse_recipe
from normswap.inspection.examine import examine
from normswap.report.inspection import Advice, Inspection, Layer, Outcome
from normswap.report.wording import plural
from normswap.target_table import NORM_FORMS


def examine_tensors(state: Mapping[str, Any], where: str, progress: Progress) -> Inspection:
    """What a state dict in the file `where` tells: norms by their statistics, convolutions by the shape of weights.

    Of one that was converted, also what its recipe says of each layer. Raises `FileError` for a damaged recipe.
    """
    norms = examine(norms_by_keys.module_of_norms(state, norms_by_keys.DEFAULT_EPS), progress=progress)
    converted = {layer.paths[0]: layer for layer in _converted_layers(state, where)}
    found = [replace(n, module=converted[n.paths[0]].module) if n.paths[0] in converted else n for n in norms.layers]
    known = {path for layer in found for path in layer.paths}
    found += [layer for path, layer in converted.items() if path not in known]
    known |= set(converted)
    statistics = norms_by_keys.statistics_that_are_no_norm(state).items()
    found += [
        replace(_layer(path, "norm", "statistics"), obstacle=why) for path, why in statistics if path not in known
    ]
    convolutions = norms_by_keys.convolution_paths(state)
    found += [_layer(path, "weight", "convolution") for path in convolutions if path not in known]
    parameters, buffers = norms_by_keys.count_elements_by_keys(state)
    outcomes = tuple(_without_model(outcome, bool(norms.layers)) for outcome in norms.outcomes)
    return replace(
        norms, model=f"tensors without their model{_origin(state, len(converted))}", parameters=parameters,
        buffers=buffers, layers=tuple(found), outcomes=outcomes, advice=(*norms.advice, _give_model(where)),
    )  # fmt: skip


def _layer(path: str, kind: Any, name: str, channels: int | None = None, groups: int | None = None) -> Layer:
    return Layer((path,), kind, name, "", channels, groups, None, None, "", "")


def _converted_layers(state: Mapping[str, Any], where: str) -> Iterator[Layer]:
    """The layers that the recipe in `state` names, as it says what they became."""
    stored = stored_recipes.stored_recipe(state)
    if stored is None:
        return
    weights = {
        name.rpartition(".")[0] for name, value in state.items() if isinstance(value, Tensor) and value.dim() > 1
    }
    for path, layer in parse_recipe(stored, where).layers.items():
        gain = state.get(f"{path}.weight")
        kind = "weight" if path in weights else "norm"
        channels = len(gain) if kind == "norm" and isinstance(gain, Tensor) and gain.dim() == 1 else None
        yield _layer(path, kind, layer.to.partition("(")[0], channels, layer.groups)


def _origin(state: Mapping[str, Any], converted: int) -> str:
    """What the recipe in `state` says of the whole; "" where there is none."""
    stored = stored_recipes.stored_recipe(state)
    if stored is None:
        return ""
    folded = " and folded" if stored.get("folded") is True else ""
    return f"; {plural(converted, 'layer')} converted to {stored['target']}{folded} by normswap"


def _without_model(outcome: Outcome, norms_known: bool) -> Outcome:
    """`outcome` as it is for tensors, where most targets need the model."""
    form = NORM_FORMS.get(outcome.target)
    if form is not None and form.on_tensors_alone and norms_known:
        return outcome
    return Outcome(outcome.target, 0, 0, None, 0, (), "needs the model of the tensors (--model)")


def _give_model(where: str) -> Advice:
    return Advice(
        "to see what the tensors do not tell",
        f"normswap inspect {shlex.quote(where)} --model net.py:make_model",
        "a function in net.py that makes the network, or torchvision:NAME, or timm:NAME: then weights, folding and the "
        "sizes of maps are looked at too",
    )
