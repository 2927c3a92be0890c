"""Back to plain torch layers, for deployment: what `normswap.fold` makes of the layers of a converted model."""

from collections import OrderedDict
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from normswap.analysis.known_norms import BATCH_NORM_BY_DIMS, eps_of
from normswap.analysis.obstacles import obstacle_in_state
from normswap.analysis.sites import Site
from normswap.analysis.standardizing import class_without_standardization, computed_weight
from normswap.layers.norms import ACTIVATED, RUNNING_NORMS, BatchChannelNorm, PositionNorm
from normswap.layers.recurrent import LAYER_NORMALIZED
from normswap.layers.reparametrized import NORMALIZED, PLAIN, retyped, weight_names
from normswap.layers.subclasses import plain_class
from normswap.layers.torch_normalization import (
    computed_by_torch,
    kind_of_normalization,
    normalized_by_torch,
    without_normalization,
)
from normswap.targets.context import Context, Swap
from normswap.targets.folding import to_folded
from normswap.targets.groups import spatial_dims_of


def to_folded_or_plain(site: Site, context: Context) -> Swap | str:
    """A norm into the layers around it; one of normswap's own that cannot go there as torch's layers."""
    alone = isinstance(site.module, PositionNorm) and site.path not in context.measured
    own = site.base in RUNNING_NORMS or alone
    swap = to_plain_norm(site, context) if own else to_folded(site, context)
    return _without_activation(site) if isinstance(swap, str) and type(site.module) in ACTIVATED.values() else swap


def to_plain_norm(site: Site, context: Context) -> Swap | str:
    """A norm of normswap's own as torch layers: folded, or a batch norm in eval mode; and a group norm behind it."""
    if isinstance(site.module, PositionNorm):
        return "normalizes each position by itself, which no layer of torch does"
    if site.base not in RUNNING_NORMS:
        return _without_activation(site) if type(site.module) in ACTIVATED.values() else "is a plain layer"
    old, folded = site.module, to_folded(site, context)
    channels = _channel_half(old) if isinstance(old, BatchChannelNorm) else None
    if isinstance(folded, Swap):
        return folded if channels is None else replace(folded, module=channels, after=f"GroupNorm({old.num_groups})")
    cls = BATCH_NORM_BY_DIMS.get(spatial_dims_of(site, context) or 0, nn.SyncBatchNorm)
    new: Any = cls(site.channels, eps=eps_of(old), momentum=0.0, device="meta").eval()
    new._parameters.update({name: old._parameters[name] for name in ("weight", "bias")})
    new._buffers.update(old._buffers)
    new.affine = old.weight is not None
    how, note = "statistics fixed as long as it is in eval mode", f"not folded: {folded}"
    if channels is None:
        return Swap(site, new, cls.__name__, how, True, note)
    return Swap(site, nn.Sequential(new, channels), f"{cls.__name__}, GroupNorm({old.num_groups})", how, True, note)


def _without_activation(site: Site) -> Swap:
    """A norm of torch's that had taken in an activation, alone."""
    cls: Any = site.base
    new = cls.__new__(cls)
    hooks: dict[str, Any] = {"_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    new.__dict__ = {**vars(site.module), "_modules": {}, **hooks}
    return Swap(site, new, site.name.removesuffix("Act"), "activation apart", True)


def _channel_half(norm: BatchChannelNorm) -> nn.GroupNorm:
    """The second half of a batch-channel norm as torch's group norm."""
    new = nn.GroupNorm(norm.num_groups, norm.num_features, eps=norm.eps, device="meta")
    each = norm.num_features // norm.num_groups
    for name, parameter in (("weight", norm.group_weight), ("bias", norm.group_bias)):
        spread = parameter.detach().repeat_interleave(each)
        new.register_parameter(name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
    return new


def to_baked_weight(site: Site, context: Context) -> Swap | str:
    """A library's convolution that standardizes its weight by itself, with that weight baked in."""
    old: Any = site.module
    cls = class_without_standardization(old)
    if cls is None or site.base is None or obstacle_in_state(old, site.base) or site.path in context.flow.touched:
        return site.obstacle
    weight, note = old.weight, ""
    if id(weight) in context.shared:
        weight, note = nn.Parameter(weight.detach().clone(), weight.requires_grad), "weight no longer shared"
    new = retyped(old, cls, parameters={"weight": weight, "bias": old.bias})
    baked = partial(computed_weight, old)
    return Swap(
        site, new, cls.__name__, "standardized weight baked in", True, note, writes=((weight, baked),), first=True
    )


def to_plain_weight(site: Site, context: Context) -> Swap | str:
    """A re-parametrized layer as a plain one, its standardized or normalized weights baked in."""
    if site.base in LAYER_NORMALIZED.values():
        return "has layer normalization inside, which no layer of torch has"
    if site.base not in PLAIN:
        return "is a plain layer"
    old: Any = site.module
    normalized, names = site.base in NORMALIZED.values(), weight_names(old)
    held: dict[str, nn.Parameter] = {name: old._parameters[f"{name}_v" if normalized else name] for name in names}
    writes: list[tuple[Tensor, Any]] = []
    note = ""
    for name, weight in held.items():
        if id(weight) in context.shared:
            note = "weight no longer shared with another layer"
            held[name] = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        writes.append((held[name], partial(old.computed, name)))
    parameters: dict[str, nn.Parameter | None] = {}
    for name, parameter in old._parameters.items():
        plain = name.removesuffix("_v") if normalized else name
        if plain in held or not (normalized and name.removesuffix("_g") in held):
            parameters[plain] = held.get(plain, parameter)
    new = retyped(old, plain_class(type(old)), parameters=parameters)
    for name in names:
        for buffer in (f"{name}_gain", f"{name}_shift"):
            new._buffers.pop(buffer, None)
    form = "normalized" if normalized else "standardized"
    return Swap(site, new, type(new).__name__, f"{form} weight baked in", True, note, writes=tuple(writes))


def without_torchs_normalization(site: Site, context: Context) -> Swap:
    """A layer that torch's own `weight_norm` or `spectral_norm` normalizes as a plain one, its weights baked in."""
    old, new = site.module, without_normalization(site.module)
    writes: list[tuple[Tensor, Any]] = []
    note = ""
    for name in normalized_by_torch(old):
        held: Any = new._parameters[name]
        if id(held) in context.shared:
            note = "weight no longer shared with another layer"
            held = new._parameters[name] = nn.Parameter(held.detach().clone(), requires_grad=held.requires_grad)
        writes.append((held, partial(computed_by_torch, old, name)))
    how = f"torch's {kind_of_normalization(old)} baked in"
    return Swap(site, new, type(new).__name__, how, True, note, writes=tuple(writes), first=True)
