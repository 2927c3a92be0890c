"""Swap once: built replacements take the places of the old layers, where these stand."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from normswap.analysis.copies import MODULE_STATE
from normswap.analysis.known_norms import own_attributes
from normswap.analysis.sites import Site
from normswap.conversion.request import Request
from normswap.layers.matching import constant_response, widen
from normswap.layers.reparametrized import NORMALIZED, STANDARDIZED
from normswap.targets.context import Absorption, Merger, Place, Swap
from normswap.targets.folding import apply_to_weight_, in_order, merge_weights_

_CONTENTS = {"_parameters", "_buffers", "_modules"}
_REMEMBERED = {"momentum"}  # of a batch norm, by a norm that has no use for it: the way back finds it


def replace_layers(swaps: Sequence[Swap], request: Request) -> None:
    """Put built swaps into the model. Nothing here can fail for a reason that planning could have seen."""
    with torch.no_grad():
        for swap in swaps:
            if swap.first:
                _carry_out(swap)
        # All foldings before other swaps: a layer that takes a norm in may be replaced itself. And before mergers: a
        # convolution goes into another one with the norms that it has taken in.
        for absorption in in_order(absorption for swap in swaps for absorption in swap.absorptions):
            _absorb(absorption)
            if (weight := absorption.site.module._parameters.get("weight")) is not None:
                request.release(weight)
        for merger in (swap.merger for swap in swaps if swap.merger is not None):
            _merge(merger)
            request.release(merger.site.module.weight)  # type: ignore[arg-type]
        for swap in swaps:
            if not swap.first:
                _carry_out(swap)


def _carry_out(swap: Swap) -> None:
    values = [(tensor, value() if callable(value) else value) for tensor, value in swap.writes]
    if swap.module is not swap.site.module:
        _exchange(swap.site, swap.module)
    for tensor, value in values:
        tensor.copy_(value)


def _absorb(absorption: Absorption) -> None:
    """Change a layer's filters and its bias by the norm that it takes in."""
    layer: Any = absorption.site.module
    affine = absorption.affine
    if layer.bias is None:
        layer.register_parameter("bias", absorption.bias)
    if absorption.place is Place.BEFORE:
        _scale_layer(absorption)
        layer.bias.copy_(widen(layer.bias) * affine.scale + affine.shift)
        return
    groups = getattr(layer, "groups", 1)
    added = affine.shift
    if absorption.place is Place.BEHIND:
        added = constant_response(layer.weight, affine.shift, groups)
    layer.bias.copy_(widen(layer.bias) + added)
    apply_to_weight_(absorption, layer.weight)


def _merge(merger: Merger) -> None:
    """Add the filters and the bias of a convolution to those of the one that takes it in."""
    layer: Any = merger.site.module
    branch: Any = merger.branch.module
    if layer.bias is None:
        layer.register_parameter("bias", merger.bias)
    if branch.bias is not None:
        layer.bias.copy_(widen(layer.bias) + widen(branch.bias))
    merge_weights_(merger, layer.weight, branch.weight)


def _scale_layer(absorption: Absorption) -> None:
    """Multiply a layer's filters by the scale of the norm after it."""
    layer: Any = absorption.site.module
    affine = absorption.affine
    if absorption.site.base in STANDARDIZED.values():
        layer.weight_gain.mul_(affine.scale)
        layer.weight_shift.mul_(affine.scale)
    elif absorption.site.base in NORMALIZED.values():
        layer.weight_g.mul_(affine.scale.view_as(layer.weight_g))
    else:
        apply_to_weight_(absorption, layer.weight)


def _exchange(site: Site, new: nn.Module) -> None:
    """Turn a site's module into `new` where it stands, so that every alias, reference and the root itself follow.

    Mode, hooks, and whatever was set from outside stay; the rest is `new`'s.
    """
    old = site.module
    kept: dict[str, Any] = {}
    if new._forward_hooks is old._forward_hooks:  # `new` is `old` retyped; a norm may have given it a bias since
        new._parameters.update({k: p for k, p in old._parameters.items() if new._parameters.get(k, p) is None})
    else:  # carry over what is not the class's own
        base: Any = site.base  # known, else there were no swap
        own = own_attributes(base)
        remembered = _REMEMBERED if hasattr(new, "eps") else set()
        foreign = (set(vars(old)) - own[""] | remembered) - set(vars(new))
        kept = {k: v for k, v in vars(old).items() if k in MODULE_STATE - _CONTENTS or k in foreign}
        for kind in _CONTENTS:
            extra = {k: v for k, v in getattr(old, kind).items() if k not in own[kind] | {"weight", "bias"}}
            getattr(new, kind).update(extra)
        kept["training"] = old.training and new.training  # a norm that is built in eval mode stays in it
        kept["_non_persistent_buffers_set"] = old._non_persistent_buffers_set & set(new._buffers)
    state = {**vars(new), **kept}
    old.__class__ = type(new)
    old.__dict__.clear()
    old.__dict__.update(state)
    if isinstance(old, nn.RNNBase):
        old._init_flat_weights()  # torch's own list of the weights, which other parameters make stale
