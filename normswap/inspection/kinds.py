"""Norms that every target treats alike: one of each kind is tried, and stands for the others."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from normswap.analysis.copies import MODULE_STATE
from normswap.analysis.sites import Site
from normswap.targets.context import Context

_ATOMS = (int, float, str, bool, type(None))
_TENSORS = {"_parameters", "_buffers"}
_SETTINGS = {"training", "_non_persistent_buffers_set", "_is_full_backward_hook"}  # no target asks for them


Kinds = Mapping[Site, Sequence[Site]]
"""Sites that are alike for a target, by the first of them, which is tried."""


def kinds_of_norms(sites: Iterable[Site], context: Context) -> Kinds:
    """The norms of `sites` by the first of their kind, in order.

    Of one kind are those that differ in no more than their names and the numbers in their tensors, and of which
    `context` tells the same. That is for targets that take each norm by itself: what `fold` makes of one goes by the
    layers around it.
    """
    kinds: dict[Hashable, list[Site]] = defaultdict(list)
    for site in sites:
        if site.kind == "norm":
            kinds[_kind_of(site, context)].append(site)
    return {alike[0]: alike for alike in kinds.values()}


def _kind_of(site: Site, context: Context) -> Hashable:
    """What plans of a norm go by; the site itself where that is more than can be compared: it has hooks, or parts."""
    module, flow, path = site.module, context.flow, site.path
    attributes: list[Hashable] = []
    for name, value in vars(module).items():
        if isinstance(value, _ATOMS):
            attributes.append((name, type(value), value))
        elif name in _TENSORS:
            attributes += [(key, _kind_of_tensor(tensor, context)) for key, tensor in value.items()]
        elif isinstance(value, tuple) and all(isinstance(part, int) for part in value):
            attributes.append((name, value))
        elif name not in _SETTINGS and (name not in MODULE_STATE or value):
            return site
    places = (flow.touched, flow.mixing, flow.single, flow.spatial)
    return (
        type(module), site.base, site.obstacle, site.form, site.form and site.damage, len(site.paths), *attributes,
        *(path in places_of for places_of in places), frozenset(flow.ranks.get(path, ())), context.seen.get(path),
        *(owner for path in site.paths for owner in flow.asking(path)),
    )  # fmt: skip


def _kind_of_tensor(tensor: Any, context: Context) -> Hashable:
    if not isinstance(tensor, Tensor):
        return None if tensor is None else type(tensor).__name__
    return type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, id(tensor) in context.shared
