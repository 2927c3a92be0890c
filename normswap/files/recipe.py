"""Recipes: what a converted file tells of its conversion, checked, and repeated on a fresh model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from normswap.analysis.known_norms import BATCH_NORM_BY_DIMS
from normswap.analysis.running import Seen
from normswap.analysis.sites import Site, find_sites
from normswap.calibration.measuring import Measured
from normswap.checkpoints import checkpoint
from normswap.conversion.convert import fold
from normswap.conversion.pipeline import run
from normswap.conversion.request import Recorded, Request
from normswap.errors import FileError
from normswap.layers.matching import Moments
from normswap.layers.reparametrized import LAYERS
from normswap.targets.options import Options
from normswap.targets.target import TARGETS, parse_target

FORMAT = 1
_MOST_STEPS = 16  # conversions of conversions
_DEEPEST = 16  # parts of a prefix
_MISSED = 3  # names in a message
_DIMS = {cls.__name__: dims + 2 for dims, cls in BATCH_NORM_BY_DIMS.items()}
_MANY = 1 << 20  # elements a channel: no reason for fewer groups than the recipe tells


def check(recipe: Any, where: object, steps: int = 0) -> dict[str, Any]:
    """`recipe`, which came from a file, if it is one that this version can repeat. Raises `FileError`."""
    if not isinstance(recipe, Mapping) or type(recipe.get("format")) is not int:
        raise FileError(f"{where}: its recipe is damaged; give the model and convert it again")
    if recipe["format"] > FORMAT:
        made = recipe.get("versions")
        newer = made.get("normswap") if isinstance(made, Mapping) else None
        raise FileError(
            f"{where}: its recipe has the format {recipe['format']}, made by normswap {newer}, newer than this one; "
            "upgrade: pip install -U normswap"
        )
    target, layers = recipe.get("target"), recipe.get("layers")
    if not isinstance(target, str) or target not in TARGETS:
        raise FileError(f"{where}: its recipe names the target {target!r}, which is none of {', '.join(TARGETS)}")
    if not isinstance(layers, Mapping) or not all(_is_layer(path, layer) for path, layer in layers.items()):
        raise FileError(f"{where}: its recipe is damaged: the layers are not paths with what they became")
    if recipe.get("previous") is not None:
        if steps >= _MOST_STEPS:
            raise FileError(f"{where}: its recipe is damaged: too many conversions of conversions")
        check(recipe["previous"], where, steps + 1)
    return dict(recipe)


def _is_layer(path: Any, layer: Any) -> bool:
    if not isinstance(path, str) or not isinstance(layer, Mapping) or not isinstance(layer.get("to"), str):
        return False
    groups = layer.get("groups")
    return groups is None or (isinstance(groups, int) and not isinstance(groups, bool) and groups > 0)


def replay(model: nn.Module, recipe: Any, where: object, *, steps: int = 0) -> nn.Module:
    """`model` with the architecture that the conversion gave its like, changed in place; its values are to be loaded.

    Raises `FileError` where the recipe is not one, or was made for another architecture; `where` is the file.
    """
    recipe = check(recipe, where)
    if recipe.get("previous") is not None:
        if steps >= _MOST_STEPS:
            raise FileError(f"{where}: its recipe is damaged: too many conversions of conversions")
        model = replay(model, recipe["previous"], where, steps=steps + 1)
    sites = {path: site for site in find_sites(model) for path in site.paths}
    layers = _relative(recipe["layers"], sites)
    missing = [path for path in layers if path not in sites]
    if missing:
        listed = ", ".join(repr(path) for path in missing[:_MISSED])
        raise FileError(f"{where}: its recipe is for another architecture: the model has no {listed}")
    for path, layer in layers.items():
        groups = layer.get("groups")
        if not (sites[path].form or sites[path].kind == "weight"):
            raise FileError(f"{where}: its recipe is for another architecture: {path} is a {sites[path].name} already")
        if groups is not None and sites[path].channels % groups:
            raise FileError(
                f"{where}: its recipe is for another architecture: {path} has {sites[path].channels} channels, not a multiple of {groups} groups"
            )
    measured, seen = _as_on_data(recipe, layers, sites, model)
    given = {path: layer["groups"] for path, layer in layers.items() if layer.get("groups") is not None}
    recurrent = "ln" if any(layer["to"].startswith("LayerNorm") for layer in layers.values()) else None
    chosen = Options(
        ws_scope="all", layers=tuple(LAYERS), recurrent=recurrent, include=lambda path, module: path in layers
    )
    recorded = Recorded(given, measured, seen)
    request = Request(parse_target(recipe["target"]), chosen, inplace=True, may_be_idle=True, recorded=recorded)
    converted, report = run(model, request)
    became = {path: change for change in report.changes for path in change.paths}
    for path, layer in layers.items():
        change = became.get(path)
        same_groups = change is not None and change.groups is not None and change.groups == layer.get("groups")
        if change is None or not (same_groups or change.after == layer["to"]):
            here = change.after if change else "nothing"
            raise FileError(
                f"{where}: its recipe is for another architecture: {path} became {layer['to']}, here {here}"
            )
    return fold(converted).model if recipe.get("folded") is True else converted


def _as_on_data(
    recipe: Mapping[str, Any], layers: Mapping[str, Any], sites: Mapping[str, Site], model: nn.Module
) -> tuple[dict[str, Measured], dict[str, Seen]]:
    """What data or example inputs told of the norms when they were converted, in so far as the new layers' kind and keys hang on it.

    The values are loaded later: here all moments are those of standard normal data.
    """
    like = next((p.detach().new_empty(0) for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    options = recipe.get("options")
    on_data = isinstance(options, Mapping) and bool(options.get("calibrate"))
    measured, seen = {}, {}
    for path, layer in layers.items():
        site = sites[path]
        dims = 2 if site.form == "last" else _DIMS.get(layer["to"].removesuffix("Act"))
        if site.kind == "norm" and (dims or on_data):
            seen[site.path] = Seen(dims or (site.spatial_dims or 2) + 2, 1 if dims == 2 else _MANY)
        if site.kind == "norm" and on_data:
            zero, one = torch.zeros(site.channels, device=like.device), torch.ones(site.channels, device=like.device)
            measured[site.path] = Measured(Moments(zero, one, zero, one), seen[site.path], like)
    return measured, seen


def _relative(layers: Mapping[str, Any], sites: Mapping[str, Any]) -> dict[str, Any]:
    """The layers by the model's own paths: a conversion without the model saw them under the prefix of the file."""
    deepest = max((path.count(".") for path in layers), default=0) - min((path.count(".") for path in sites), default=0)
    deepest = min(deepest, _DEEPEST)
    for cut in range(deepest + 1):
        shortened = {path.split(".", cut)[-1]: layer for path, layer in layers.items()}
        if all(path in sites for path in shortened):
            return shortened
    return dict(layers)


def state_dict_with_recipe(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model, with the recipe that the model has as an attribute."""
    state = model.state_dict()
    checkpoint.store_recipe(state, checkpoint.stored_recipe(model))
    return state
