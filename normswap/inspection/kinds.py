"""Norms and weight layers that a target treats alike: one of each kind is tried, and stands for the others."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from normswap.analysis.copies import MODULE_STATE
from normswap.analysis.sites import Site
from normswap.analysis.statistics import has_plain_values
from normswap.layers.reparametrized import PLAIN, as_filters, filter_groups, weight_names
from normswap.targets.context import Context

_ATOMS = (int, float, str, bool, type(None))
_TENSORS = {"_parameters", "_buffers"}
_SETTINGS = {"training", "_non_persistent_buffers_set", "_is_full_backward_hook"}  # no target asks for them
_PARTS = MODULE_STATE - _TENSORS - _SETTINGS  # hooks and children

Kinds = Mapping[Site, Sequence[Site]]
"""Sites that are alike for a target, by the first of them, which is tried."""


def kinds_of(sites: Iterable[Site], context: Context) -> Kinds:
    """`sites` by the first of their kind, in order.

    Of one kind are those that differ in no more than their names and the numbers in their tensors, and of which
    `context` tells the same. That is for targets that take each layer by itself; for `fold` see `kinds_to_fold`.
    """
    return _by_kind((site, _kind_of(site, context)) for site in sites)


def kinds_to_fold(norms: Kinds, weights: Kinds, context: Context) -> Kinds:
    """The norms by the first of those that are alike with the layers which they go into, and weight layers that folding
    may change by themselves.

    A norm that may go elsewhere than into the layers before it, or beside which layers may become one, is alone.

    Args:
        norms: the norms of a model by kind.
        weights: its weight layers by kind.
        context: what is known of the model.
    """
    flow = context.flow
    own = {site: first for kinds in (norms, weights) for first, alike in kinds.items() for site in alike}
    pairs = [(site.path, branch.layer) for site in own for branch in flow.parallel(site.path)]
    beside = {path for pair in pairs if pair[0] != pair[1] for path in pair}
    # What hooks and the like do to a layer cannot be compared: each is the only one of its kind. A weight that is baked
    # in changes by itself, whether a norm goes into it or not.
    apart = {site for alike in weights.values() for site in alike
             if len(alike) == 1 or site.obstacle or site.base in PLAIN or site.path in beside}  # fmt: skip

    def kind_with_neighbours(norm: Site) -> Hashable:
        paths, why = flow.feeders(norm.path)
        before = [context.sites[path] for path in paths]
        if norm.path in beside or (why and flow.behind(norm.path)) or not apart.isdisjoint(before):
            return norm
        return own[norm], why, tuple(own[layer] for layer in before)

    return _by_kind((site, site if site in apart else kind_with_neighbours(site))
                    for site in own if site.kind == "norm" or site in apart)  # fmt: skip


def _by_kind(kinds: Iterable[tuple[Site, Hashable]]) -> Kinds:
    alike: dict[Hashable, list[Site]] = defaultdict(list)
    for site, kind in kinds:
        alike[kind].append(site)
    return {sites[0]: sites for sites in alike.values()}


def _kind_of(site: Site, context: Context) -> Hashable:
    """What plans of a layer go by; the site itself where that is more than can be compared: it has hooks, or parts."""
    module, flow, path = site.module, context.flow, site.path
    attributes: list[Hashable] = []
    for name, value in vars(module).items():
        if name in _PARTS:
            if value:
                return site
        elif isinstance(value, _ATOMS):
            attributes.append((name, type(value), value))
        elif name in _TENSORS:
            attributes += [(key, _kind_of_tensor(tensor, context)) for key, tensor in value.items()]
        elif isinstance(value, tuple | list) and all(isinstance(part, int) for part in value):
            attributes.append((name, tuple(value)))
        elif name not in _SETTINGS:
            return site
    if site.kind == "weight" and _may_be_constant(site):
        return site
    places = (flow.touched, flow.mixing, flow.single, flow.spatial, flow.normed, flow.first, flow.readers)
    return (
        type(module), site.kind, site.base, site.obstacle, site.form, site.form and site.damage, len(site.paths),
        *attributes, *(path in places_of for places_of in places), frozenset(flow.ranks.get(path, ())),
        frozenset(flow.flattened.get(path, ())), context.seen.get(path),
        *(owner for path in site.paths for owner in flow.asking(path)),
    )  # fmt: skip


def _kind_of_tensor(tensor: Any, context: Context) -> Hashable:
    if not isinstance(tensor, Tensor):
        return None if tensor is None else type(tensor).__name__
    return type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, id(tensor) in context.shared


def _may_be_constant(layer: Site) -> bool:
    """Whether no filter of a layer may vary: such a layer is not standardized."""
    weights = [layer.module._parameters.get(name) for name in weight_names(layer.module)] if layer.base else []
    for weight in weights:
        if weight is None or weight.dim() < 2 or not (weight.is_meta or has_plain_values(weight)):
            return True
        filters = as_filters(weight.detach(), filter_groups(layer.module))
        if not weight.is_meta and bool((filters == filters[:, :1]).all()):
            return True
    return False
