"""Which layers a forward would go another way for, were others in their places: its traces with both tell.

A forward may ask its layers for anything: their class, its name, an attribute, how many buffers they have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from normswap.analysis.copies import skeleton
from normswap.analysis.dataflow import hooked_paths
from normswap.analysis.flow import Flow, paths_around
from normswap.analysis.sites import Site
from normswap.analysis.tracing import in_words, trace


def told_apart(model: nn.Module, flow: Flow, sites: Sequence[Site], new: Mapping[Site, nn.Module]) -> frozenset[Site]:
    """Those of `new` with which a forward in `model` does something else than with what stands there now.

    Args:
        model: as it is, with none of `new` in it.
        flow: what was traced of it.
        sites: its norms and weight layers.
        new: what each of some sites would become.
    """
    if not flow.words:
        return frozenset()
    others = {site: module for site, module in new.items() if type(module) is not type(site.module)}
    if not others:
        return frozenset()
    bones, others = skeleton(model), {site: skeleton(module) for site, module in others.items()}
    apart = {path for site in sites for path in site.paths} | hooked_paths(model)
    return frozenset(_search(bones, flow, apart, list(others.items())))


def _search(bones: nn.Module, flow: Flow, apart: set[str], new: Sequence[tuple[Site, nn.Module]]) -> list[Site]:
    """Halve what is exchanged as long as a forward differs."""
    if _is_same(bones, flow, apart, new):
        return []
    if len(new) == 1:
        return [new[0][0]]
    half = len(new) // 2
    found = [*_search(bones, flow, apart, new[:half]), *_search(bones, flow, apart, new[half:])]
    return found or [site for site, _ in new]  # only together do they make a difference


def _is_same(bones: nn.Module, flow: Flow, apart: set[str], new: Sequence[tuple[Site, nn.Module]]) -> bool:
    """Whether all that was traced does the same with `new` in place."""
    places: list[tuple[nn.Module, str, nn.Module]] = [
        (*_place(bones, path), module) for site, module in new for path in site.paths if path
    ]
    old = [parent._modules[name] for parent, name, _ in places]
    holders = {part for site, _ in new for path in site.paths for part in paths_around(path)}
    around = [part for part in flow.words if part in holders]
    try:
        for parent, name, module in places:
            parent._modules[name] = module
        there = dict(bones.named_modules(remove_duplicate=False))
        leaves = {id(there[path]) for path in apart & there.keys()}
        traces = (trace(there[path], lambda module: id(module) in leaves) for path in around)
        return all(in_words(traced) == flow.words[path] for path, traced in zip(around, traces, strict=True))
    finally:
        for (parent, name, _), before in zip(places, old, strict=True):
            parent._modules[name] = before


def _place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name
