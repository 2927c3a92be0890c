"""The recipe of a conversion, as a file holds it: checked, repeated on a fresh model, and completed for a new file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normswap.analysis.known_norms import BATCH_NORM_BY_DIMS
from normswap.analysis.running import Seen
from normswap.analysis.sites import Site, find_sites
from normswap.calibration.measuring import Measured
from normswap.checkpoints import stored_recipes
from normswap.conversion.pipeline import run
from normswap.conversion.request import Recorded, Request
from normswap.errors import FileError
from normswap.files import model_specs
from normswap.layers.matching import Moments
from normswap.layers.reparametrized import LAYERS
from normswap.report.report import Report
from normswap.targets.options import Options
from normswap.targets.target import PLAIN_TARGET, RECURRENT_TARGETS, TARGETS, Target

_NEWEST_FORMAT = 2  # from 2 on, layers may have an eps of their own
_MOST_CONVERSIONS = 16  # one after the other
_LONGEST_PREFIX = 16  # parts with dots
_DEEPEST, _PART = 100, 64  # levels of a recipe; characters that each part of it counts
_SHOWN = 3  # names in a message
_DIMS = {cls.__name__: dims + 2 for dims, cls in BATCH_NORM_BY_DIMS.items()}
_MANY = 1 << 20  # elements a channel: no reason for fewer groups than the recipe tells


@dataclass(frozen=True)
class LayerRecipe:
    """What one layer became."""

    to: str
    """As a report writes it: `GroupNorm(8)`."""
    groups: int | None
    eps: float | None
    """Where it is another than before."""


@dataclass(frozen=True)
class Recipe:
    """What a file tells of the conversion of its model, checked."""

    target: str
    layers: Mapping[str, LayerRecipe]
    """By path, those that were changed."""
    on_data: bool
    """Whether it was calibrated."""
    folded: bool
    """Whether the result was folded into plain torch layers."""
    previous: Recipe | None
    """The conversion before this one, where the model was converted already."""


def parse_recipe(stored: Any, where: object, most_before: int = _MOST_CONVERSIONS) -> Recipe:
    """The recipe that the file `where` holds, with those of at most so many conversions before it.

    Raises `FileError` unless it is one that this version can repeat.
    """
    check_plain_data(stored, where)
    if not isinstance(stored, Mapping) or type(stored.get("format")) is not int:
        raise FileError(f"{where}: its recipe is damaged; give the model and convert it again")
    if stored["format"] > _NEWEST_FORMAT:
        versions = stored.get("versions")
        newer = versions.get("normswap") if isinstance(versions, Mapping) else None
        raise FileError(
            f"{where}: its recipe has the format {stored['format']}, made by normswap {newer}, newer than this one; "
            "upgrade: pip install -U normswap"
        )
    target, layers, options = (stored.get(name) for name in ("target", "layers", "options"))
    if not isinstance(target, str) or target not in TARGETS | RECURRENT_TARGETS:
        raise FileError(f"{where}: its recipe names the target {target!r}, which is none of {', '.join(TARGETS)}")
    if not isinstance(layers, Mapping) or not all(_is_layer(path, layer) for path, layer in layers.items()):
        raise FileError(f"{where}: its recipe is damaged: the layers are not paths with what they became")
    previous = stored.get("previous")
    if previous is not None and most_before == 0:
        raise FileError(f"{where}: its recipe is damaged: too many conversions of conversions")
    return Recipe(
        target,
        {path: LayerRecipe(layer["to"], layer.get("groups"), layer.get("eps")) for path, layer in layers.items()},
        on_data=isinstance(options, Mapping) and bool(options.get("calibrate")),
        folded=stored.get("folded") is True,
        previous=None if previous is None else parse_recipe(previous, where, most_before - 1),
    )


def check_plain_data(stored: Any, where: object) -> None:
    """Raise `FileError` for a stored recipe that reports and other formats could not hold: they write it as JSON.

    A few bytes of a pickle can stand for parts within parts without end, each of which holds the next one many times.
    """
    pending, size = [(stored, 0)], 0
    while pending:
        value, depth = pending.pop()
        parts: Iterable[Any] = ()
        if isinstance(value, Mapping):
            parts = [*value, *value.values()]
        elif isinstance(value, list | tuple):
            parts = value
        size += _PART + (len(value) if isinstance(value, str) else 0)
        plain = value is None or isinstance(value, str | int | float | Mapping | list | tuple)
        keys = all(isinstance(key, str) for key in value) if isinstance(value, Mapping) else True
        if not (plain and keys) or depth > _DEEPEST or size > stored_recipes.LARGEST_RECIPE:
            raise FileError(f"{where}: its recipe is damaged: it is no plain data; convert the original again")
        pending += [(part, depth + 1) for part in parts]


def _is_layer(path: Any, layer: Any) -> bool:
    if not isinstance(path, str) or not isinstance(layer, Mapping) or not isinstance(layer.get("to"), str):
        return False
    groups, eps = layer.get("groups"), layer.get("eps")
    sound = groups is None or (isinstance(groups, int) and not isinstance(groups, bool) and groups > 0)
    return sound and (eps is None or (isinstance(eps, float) and math.isfinite(eps) and eps >= 0))


# ---- repeated ----


def replay(model: nn.Module, recipe: Recipe, where: object) -> nn.Module:
    """`model` with the architecture that the conversion gave its like, changed in place; its values are to be loaded.

    Raises `FileError` where the recipe was made for another architecture; `where` is the file.
    """
    if recipe.previous is not None:
        model = replay(model, recipe.previous, where)
    sites = {path: site for site in find_sites(model) for path in site.paths}
    layers = _by_own_paths(recipe.layers, sites)
    _check_architecture(layers, sites, where)
    # Which layers were converted depended on options and on how layers are connected. Here the list in the recipe
    # alone decides, and no option keeps a layer out. The groups are given too: data or the sizes of feature maps may
    # have decided them, and neither is known here.
    groups = {path: layer.groups for path, layer in layers.items() if layer.groups is not None}
    recurrent = "ln" if any(layer.to.startswith("LayerNorm") for layer in layers.values()) else None
    target = (TARGETS | RECURRENT_TARGETS)[recipe.target]
    options = Options(ws_scope="all", layers=tuple(LAYERS), recurrent=recurrent, include=lambda path, _: path in layers)
    sizes = _stand_in_sizes(recipe, target, layers, sites)
    moments = _stand_in_moments(model, sites, sizes) if recipe.on_data else {}
    eps = {path: layer.eps for path, layer in layers.items() if layer.eps is not None}
    recorded = Recorded(groups, eps, {path: layer.to for path, layer in layers.items()}, moments, sizes)
    converted, report = run(model, Request(target, options, inplace=True, may_be_idle=True, recorded=recorded))
    _check_outcome(layers, sites, report, where)
    if not recipe.folded:
        return converted
    return run(converted, Request(PLAIN_TARGET, inplace=True, may_be_idle=True)).model


def _by_own_paths(layers: Mapping[str, LayerRecipe], sites: Mapping[str, Site]) -> dict[str, LayerRecipe]:
    """The layers by the model's own paths.

    A conversion of tensors alone took the file's keys for paths, and these may begin with a prefix (`module.`,
    `model.`) that the model does not have. Its length is not known: parts are cut until all paths are the model's.
    """
    longest = max((path.count(".") for path in layers), default=0) - min((path.count(".") for path in sites), default=0)
    for parts in range(min(longest, _LONGEST_PREFIX) + 1):
        shortened = {path.split(".", parts)[-1]: layer for path, layer in layers.items()}
        if all(path in sites for path in shortened):
            return shortened
    return dict(layers)


def _check_architecture(layers: Mapping[str, LayerRecipe], sites: Mapping[str, Site], where: object) -> None:
    """Raise `FileError` where the model has other layers than the one that was converted."""
    missing = [path for path in layers if path not in sites]
    if missing:
        raise _misfit(where, f"the model has no {', '.join(repr(path) for path in missing[:_SHOWN])}")
    for path, layer in layers.items():
        site = sites[path]
        if not (site.form or site.kind == "weight"):
            raise _misfit(where, f"{path} is a {site.name} already")
        if layer.groups is not None and site.channels % layer.groups:
            raise _misfit(where, f"{path} has {site.channels} channels, not a multiple of {layer.groups} groups")


def _misfit(where: object, what: str) -> FileError:
    """The error for a model that is not the one whose conversion the recipe tells, for `what`."""
    return FileError(
        f"{where}: its recipe is for another architecture: {what}; give the model that was converted, with "
        "the arguments that it was made with: --model-arg (model_args)"
    )


def _check_outcome(layers: Mapping[str, LayerRecipe], sites: Mapping[str, Site], report: Report, where: object) -> None:
    """Raise `FileError` where a layer became something else than the recipe tells, and is not that already."""
    changes = {path: change for change in report.changes for path in change.paths}
    for path, layer in layers.items():
        change = changes.get(path)
        same_groups = change is not None and change.groups is not None and change.groups == layer.groups
        here = change.after if change else sites[path].name
        if not (same_groups or here == layer.to):
            raise _misfit(where, f"{path} became {layer.to}, here {here}")


def _stand_in_sizes(
    recipe: Recipe, target: Target, layers: Mapping[str, LayerRecipe], sites: Mapping[str, Site]
) -> dict[str, Seen]:
    """Stand-ins for the sizes that the norms saw when they were converted, where the new layer's class depends on them.

    The dimensions of the input decide which of torch's batch norms a norm becomes. The number of elements a channel is
    large, so that it is no reason for fewer groups than the recipe has, except for inputs of shape (N, C).
    """
    by_dimension = target.norm is not None and target.norm.class_by_dimension
    sizes = {}
    for path, layer in layers.items():
        site = sites[path]
        dims = _DIMS.get(layer.to.removesuffix("Act")) if by_dimension else None
        dims = 2 if site.form == "last" else dims
        if site.kind == "norm" and (dims or recipe.on_data):
            sizes[site.path] = Seen(dims or (site.spatial_dims or 2) + 2, 1 if dims == 2 else _MANY)
    return sizes


def _stand_in_moments(model: nn.Module, sites: Mapping[str, Site], sizes: Mapping[str, Seen]) -> dict[str, Measured]:
    """Stand-ins for what the data showed of each norm: the moments of standard normal data.

    Without moments, a norm that keeps no running statistics could not become one that does. Their values do not matter:
    the file's own are loaded afterwards.
    """
    like = next((p.detach().new_empty(0) for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    moments = {}
    for path, seen in sizes.items():
        channels = sites[path].channels
        zero, one = torch.zeros(channels, device=like.device), torch.ones(channels, device=like.device)
        moments[path] = Measured(Moments(zero, one, zero, one), seen, like)
    return moments


# ---- completed ----


def state_dict_with_recipe(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model, with the recipe that the model has as an attribute."""
    state = model.state_dict()
    stored_recipes.store_recipe(state, stored_recipes.stored_recipe(model))
    return state


def with_origin(
    recipe: Mapping[str, Any], model: model_specs.ModelSource | None, arguments: Mapping[str, Any], previous: Any
) -> dict[str, Any]:
    """A recipe with the spec of its model, where that is a library's, and the conversion before it."""
    spec = model if isinstance(model, str) and model_specs.is_spec(model) else None
    source = {"model": spec, "model_args": dict(arguments)} if spec else {}
    return {**recipe, **source} | ({"previous": previous} if previous else {})
