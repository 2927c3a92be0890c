"""The two tables: what a normalization can become, and what a weight can become.

A new target is one function and one row. A function gets a site and the context and returns a
`Swap`, or the reason why the site is left. It builds; it changes nothing in the model.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import OptionError
from normswap.layers import ACTIVATED, BatchChannelNorm, EstimatedBatchNorm, FrozenBatchNorm
from normswap.plan import (
    LEAST_ELEMENTS,
    Absorb,
    Context,
    Swap,
    carry,
    choose_groups,
    dims_of,
    elements_of,
    eps_of,
    like_of,
    place,
    read_statistics,
)
from normswap.recurrent import LAYER_NORMALIZED
from normswap.recurrent_transfer import layer_normalized
from normswap.sites import Site
from normswap.transfer import Statistics, as_affine, filter_moments, match_output, widen
from normswap.weights import (
    NORMALIZED,
    PLAIN,
    STANDARDIZE_EPS,
    STANDARDIZED,
    as_filters,
    filter_groups,
    gain_shape,
    retyped,
    weight_names,
)

Plan = Callable[[Site, Context], "Swap | str"]
NO_STATISTICS = "has no running statistics: they need data (calibrate)"


@dataclass(frozen=True)
class Form:
    """A row of a table: what a norm or a weight becomes, and how a user knows whether to want it."""

    name: str
    becomes: str
    exactness: str
    paper: str
    choose_when: str
    plan: Plan


@dataclass(frozen=True)
class Target:
    """A norm form, a weight form, or both."""

    name: str
    norm: Form | None
    weight: Form | None


# ---- normalizations ----


def to_group_norm(site: Site, context: Context) -> Swap | str:
    """`torch.nn.GroupNorm` (Wu & He 2018) with the statistics matched over each group."""
    between = site.form == "group" and 1 < (site.groups or 0) < site.channels  # neither a layer nor an instance norm
    if between and context.groups == "auto" and site.path not in context.given:
        return "has groups already; give groups= to change their number"
    chosen = choose_groups(site, context)
    return chosen if isinstance(chosen, str) else _group_norm(site, context, *chosen)


def to_layer_norm(site: Site, context: Context) -> Swap | str:
    """Layer norm over (C, *spatial) (Ba et al. 2016): `torch.nn.GroupNorm` with one group."""
    if site.form == "last":
        return "is a layer norm already"
    if elements_of(site, context) == 1 and site.channels < LEAST_ELEMENTS:
        return "has one element a sample, which any norm within a sample would erase"
    return _group_norm(site, context, 1, "")


def to_instance_norm(site: Site, context: Context) -> Swap | str:
    """Instance norm (Ulyanov et al. 2016): every channel a group; fewer groups where a channel has one element."""
    told = context.given.get(site.path, site.channels)
    if told != site.channels:
        return _group_norm(site, context, told, "")
    if elements_of(site, context) == 1:
        chosen = choose_groups(site, replace(context, groups="auto", given={}))
        if isinstance(chosen, str):
            return chosen
        return _group_norm(site, context, chosen[0], f"{chosen[0]} groups, not {site.channels}: one element a channel")
    norms = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
    if site.base in norms.values():
        return "is an instance norm already"
    if site.spatial_dims not in norms:
        return _group_norm(site, context, site.channels, "")
    new = norms[site.spatial_dims](site.channels, eps=eps_of(site.module), affine=True, device="meta")
    stats = read_statistics(site, context)
    return carry(site, _affine_flag(new, site, context, stats), stats, site.channels, context, "")


def _group_norm(site: Site, context: Context, groups: int, note: str) -> Swap | str:
    same = site.form in ("group", "last") and site.groups == groups
    if same and site.base is nn.GroupNorm:
        return f"has {'one group' if groups == 1 else f'{groups} groups'} already"
    new = nn.GroupNorm(groups, site.channels, eps=eps_of(site.module), affine=True, device="meta")
    stats = None if same else read_statistics(site, context)
    swap = carry(site, _affine_flag(new, site, context, stats), stats, groups, context, note)
    if not same or context.transfer == "reset":
        return swap
    return replace(swap, how="gain and bias as they stand: the same function", exact=True, note=note)


def _affine_flag(new: nn.Module, site: Site, context: Context, stats: Statistics | None) -> nn.Module:
    """Set `affine` on a new norm: false where it will have no gain and bias."""
    new.affine = (context.transfer == "match" and stats is not None) or site.module.weight is not None  # type: ignore[assignment]
    return new


def to_batch_norm(site: Site, context: Context) -> Swap | str:
    """torch's batch norm (Ioffe & Szegedy 2015): exact from fixed statistics, else with those that data showed."""
    if issubclass(site.base, nn.modules.batchnorm._BatchNorm):  # type: ignore[arg-type]
        return "is a batch norm already"
    if site.form != "data" and site.path not in context.measured:
        raise OptionError(
            f"{site.path or 'the model'} ({site.name}) has no statistics of a batch, which bn needs: give data with calibrate= "
            "(--calibrate) that reach it, or leave it with exclude="
        )
    classes: dict[int | None, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    cls = classes.get(dims_of(site, context), nn.SyncBatchNorm)
    new = cls(site.channels, eps=eps_of(site.module), momentum=_rate(site), device="meta")
    kept = _keep_statistics(site, context, new, "statistics follow the batches again")
    for name, parameter in new._parameters.items():
        if parameter is not None and not isinstance(getattr(site.module, name), nn.Parameter):
            parameter.requires_grad_(True)  # a buffer of the frozen norm: who wants batch norm back wants to train it
    return kept


def to_frozen(site: Site, context: Context) -> Swap | str:
    """The same batch norm by fixed statistics: exact, and gain and bias are trained as before."""
    if site.base is FrozenBatchNorm or "Frozen" in site.name:
        return "has fixed statistics already"
    new = FrozenBatchNorm(site.channels, eps_of(site.module), affine=False, spatial_dims=site.spatial_dims)
    return _keep_statistics(site, context, new, "statistics fixed")


def to_estimated(site: Site, context: Context) -> Swap | str:
    """The same batch norm by moving estimates (Qiao et al. 2019): exact, and it learns at batch 1."""
    if site.base is EstimatedBatchNorm:
        return "goes by moving estimates already"
    new = EstimatedBatchNorm(site.channels, eps_of(site.module), _rate(site), False, site.spatial_dims)
    return _keep_statistics(site, context, new, "statistics become moving estimates")


def to_batch_channel(site: Site, context: Context) -> Swap | str:
    """Batch-channel norm (Qiao et al. 2019): moving estimates, then groups that start as those are over the data."""
    if site.base is BatchChannelNorm:
        return "is a batch-channel norm already"
    chosen = choose_groups(site, context)
    if isinstance(chosen, str):
        return chosen
    groups, note = chosen
    new = BatchChannelNorm(groups, site.channels, eps_of(site.module), _rate(site), False, site.spatial_dims)
    kept = _keep_statistics(site, context, new, "statistics become moving estimates")
    if isinstance(kept, str):
        return kept
    stats = read_statistics(site, context)
    assert stats is not None  # for the type checker: a norm without statistics was left above
    how = f"{kept.how}; a gain and a bias a group"
    like = like_of(site, context)
    if context.transfer == "match":
        gain, bias = match_output(stats, groups)
        new.group_weight, new.group_bias = nn.Parameter(gain.to(like)), nn.Parameter(bias.to(like))
        how = f"{kept.how}; groups start as these are over the data"
    else:
        new.to(like.device, like.dtype)
    return replace(kept, after=f"{kept.after}({groups})", how=how, exact=False, note=note, groups=groups)


def _rate(site: Site) -> float | None:
    """How fast estimates follow: as the batch norm's own running statistics did."""
    momentum = getattr(site.module, "momentum", 0.1)
    return momentum if momentum is None or momentum else 0.1


def _keep_statistics(site: Site, context: Context, new: nn.Module, how: str) -> Swap | str:
    """`new`, a norm by running statistics: on the tensors of the one at `site`, or on those that data showed."""
    stats = read_statistics(site, context)
    if stats is None:
        return NO_STATISTICS
    old, exact = site.module, site.form == "data" and context.transfer != "reset"
    writes: list[tuple[Tensor, Tensor]] = []
    for name in ("weight", "bias"):
        held = getattr(old, name)
        same = held is None or (isinstance(held, nn.Parameter) and context.transfer != "reset")
        if site.form != "data" or not same:
            held, write = place(site, name, getattr(stats, name), context)
            writes += write
        new.register_parameter(name, held)
    new.affine = new.weight is not None  # type: ignore[assignment]
    like = like_of(site, context)
    for name, value in (("running_mean", stats.mean), ("running_var", stats.var)):
        buffer = getattr(old, name, None)
        new._buffers[name] = value.to(like) if buffer is None else buffer
        if buffer is not None and site.path in context.measured:
            writes.append((buffer, value))
    counted = getattr(old, "num_batches_tracked", None)
    new._buffers["num_batches_tracked"] = (
        torch.zeros((), dtype=torch.long, device=like.device) if counted is None else counted
    )
    if site.form != "data":
        how = f"{how}; those that the data showed" if site.path in context.measured else how
    elif site.path in context.rescaled and context.transfer == "match":
        exact, how = False, f"{how}, rescaled for standardized weights"
        writes += _statistics_writes(site, stats)
    if context.transfer == "reset":
        how = f"{how}; gain 1, bias 0"
    return Swap(site, new, type(new).__name__, how, exact, writes=tuple(writes))


def _statistics_writes(site: Site, stats: Statistics) -> list[tuple[Tensor, Tensor]]:
    return [(site.module.running_mean, stats.mean), (site.module.running_var, stats.var)]  # type: ignore[list-item]


def to_folded(site: Site, context: Context) -> Swap | str:
    """No norm: its scale and shift go into the layer before it (Ioffe & Szegedy 2015, section 3.1)."""
    stats = read_statistics(site, context)
    if stats is None:
        return NO_STATISTICS
    feeder, why = context.flow.feeder(site.path)
    if feeder is None:
        return why
    into = context.sites[feeder]
    if problem := _cannot_absorb(into, site, context):
        return f"the layer before it {problem}"
    layer = into.module
    bias = None
    if layer.bias is None:
        like = layer.weight
        assert isinstance(like, Tensor)  # for the type checker: a layer without a plain weight was refused above
        trained = isinstance(site.module.bias, nn.Parameter) and site.module.bias.requires_grad
        bias = nn.Parameter(torch.zeros(site.channels, dtype=like.dtype, device=like.device), requires_grad=trained)
    exact = site.form == "data" and context.transfer != "reset" and site.path not in context.rescaled
    how = "folded into the layer before it"
    return Swap(site, nn.Identity(), "Identity", how, exact, absorb=Absorb(into, as_affine(stats), bias))


def _cannot_absorb(into: Site, norm: Site, context: Context) -> str:
    layer = into.module
    if into.obstacle:
        return into.obstacle
    if into in context.excluded:
        return "is excluded"
    if into.channels != norm.channels:
        return "has another number of channels"
    if into.path in context.flow.touched:
        return "has a weight that is also read directly"
    if any(id(p) in context.shared for p in (layer.weight, layer.bias)):
        return "shares its weight with another layer"
    if layer._forward_hooks or layer._forward_pre_hooks or norm.module._forward_pre_hooks:
        return "has a forward hook, which would see other values"
    if into.layer_kind == "linear" and norm.spatial_dims in (2, 3):
        return "is linear, and the norm takes another dimension than its own"
    return ""


# ---- weights ----


def to_standardized(site: Site, context: Context) -> Swap | str:
    """A layer on standardized weights (Qiao et al. 2019); exact where gain and shift keep the filters' own."""
    if site.base in STANDARDIZED.values():
        return "is standardized already"
    if problem := _cannot_compute(site, STANDARDIZED):
        return problem
    seen = context.flow.seen(site.path)
    if context.ws_scope == "normed" and site.layer_kind != "rnn" and site.path not in context.flow.normed:
        return "has no normalization after it" if seen else "was not traced, and no norm stands beside it"
    strict = context.ws == "strict"
    buffers: dict[str, Tensor] = {}
    for name in weight_names(site.module):
        weight = getattr(site.module, name)
        filters = as_filters(weight, filter_groups(site.module))
        if filters.shape[1] < 2:
            return "has a fan-in of 1: nothing to standardize over"
        gain, shift = torch.ones(len(filters), device=weight.device), torch.zeros(len(filters), device=weight.device)
        if not strict:
            shift, variance = filter_moments(filters)
            context.release(weight)
            if (scale := context.absorbed.get(site.path)) is not None:
                shift, variance = shift * scale, variance * scale.square()
            gain = (variance + STANDARDIZE_EPS).sqrt()
        buffers |= {f"{name}_gain": gain.to(weight.dtype), f"{name}_shift": shift.to(weight.dtype)}
    new = retyped(site.module, STANDARDIZED[site.base], buffers)  # type: ignore[index]
    how = "gain 1, shift 0" if strict else "gain and shift keep each filter's own std and mean"
    note = "" if seen or site.layer_kind == "rnn" else "not traced: a norm of its width stands beside it"
    return Swap(site, new, type(new).__name__, how, not strict, note)


def to_normalized(site: Site, context: Context) -> Swap | str:
    """A layer on normalized weights (Salimans & Kingma 2016): each filter's length a parameter of its own; exact."""
    if site.base in NORMALIZED.values():
        return "is weight-normalized already"
    if problem := _cannot_compute(site, NORMALIZED):
        return problem
    old, parameters = site.module, {}
    for name, parameter in old._parameters.items():
        if name not in weight_names(old):
            parameters[name] = parameter
            continue
        assert parameter is not None  # for the type checker: a computed weight is an obstacle
        groups = filter_groups(old)
        length = torch.linalg.vector_norm(widen(as_filters(parameter, groups)), dim=1)
        context.release(parameter)
        if (scale := context.absorbed.get(site.path)) is not None:
            length = length * scale.abs()
        g = length.to(parameter.dtype).view(gain_shape(parameter, groups))
        parameters |= {f"{name}_g": nn.Parameter(g, requires_grad=parameter.requires_grad), f"{name}_v": parameter}
    new = retyped(old, NORMALIZED[site.base], parameters=parameters)  # type: ignore[index]
    return Swap(site, new, type(new).__name__, "g is each filter's own length", True)


def to_layer_normalized(site: Site, context: Context) -> Swap | str:
    """An LSTM or GRU with layer normalization inside (Ba et al. 2016), which starts as close as is known to the trained one."""
    if site.base in LAYER_NORMALIZED.values():
        return "has layer normalization inside already"
    if site.base not in LAYER_NORMALIZED:
        return f"{site.name} has no form with layer normalization inside: LSTM, GRU and their cells have"
    moments = context.vectors.get(site.path)
    new, writes = layer_normalized(site.module, moments, context.transfer, context.shared)
    how = "norms start with gain 1"
    if context.transfer == "match":
        how = f"norms start with the std and mean that vectors have on {'the data' if moments else 'noise'}"
    note = "" if moments or context.transfer != "match" else "more is kept with data (calibrate)"
    return Swap(site, new, type(new).__name__, how, False, note, writes=tuple(writes))


def _cannot_compute(site: Site, form: Mapping[type[nn.Module], type[nn.Module]]) -> str:
    if site.base in PLAIN:
        return f"is {site.name} already: fold it first (normswap.fold)"
    if site.base not in form:
        return f"{site.name} is not covered"
    if not all(getattr(site.module, name).is_floating_point() for name in weight_names(site.module)):
        return "has a weight that is not real"
    return ""


def strict_rescaling(site: Site) -> Tensor:
    """By how much strict standardization multiplies each filter of a convolution, of shape (out_channels,)."""
    weight = site.module.weight
    assert isinstance(weight, Tensor)  # for the type checker: the site was planned
    return 1 / (filter_moments(as_filters(weight, filter_groups(site.module)))[1] + STANDARDIZE_EPS).sqrt()


def rescale_statistics(site: Site, context: Context) -> Swap | str:
    """A batch norm that stays, behind a convolution whose filters strict standardization rescales."""
    stats = read_statistics(site, context)
    if stats is None or context.transfer != "match":
        return "is not what the target changes"
    how = "statistics rescaled for standardized weights"
    return Swap(site, site.module, site.name, how, False, writes=tuple(_statistics_writes(site, stats)))


# ---- back to plain torch ----


def to_plain_norm(site: Site, context: Context) -> Swap | str:
    """A norm of normswap's own as torch layers: folded, or else a batch norm in eval mode; and a group norm behind it."""
    if site.base not in (FrozenBatchNorm, EstimatedBatchNorm, BatchChannelNorm):
        return _without_activation(site) if type(site.module) in ACTIVATED.values() else "is a plain layer"
    old, folded = site.module, to_folded(site, context)
    channels = _channel_half(old) if isinstance(old, BatchChannelNorm) else None
    if isinstance(folded, Swap):
        return folded if channels is None else replace(folded, module=channels, after=f"GroupNorm({old.num_groups})")
    classes = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    cls = classes.get(site.spatial_dims or 0, nn.SyncBatchNorm)
    new = cls(site.channels, eps=eps_of(old), momentum=0.0, device="meta").eval()
    new._parameters.update({name: old._parameters[name] for name in ("weight", "bias")})
    new._buffers.update(old._buffers)
    new.affine = old.weight is not None
    how, note = "statistics fixed as long as it is in eval mode", f"not folded: {folded}"
    if channels is None:
        return Swap(site, new, cls.__name__, how, True, note)
    return Swap(site, nn.Sequential(new, channels), f"{cls.__name__}, GroupNorm({old.num_groups})", how, True, note)


def _without_activation(site: Site) -> Swap:
    """A norm of torch's that had taken in an activation, alone."""
    assert site.base is not None  # for the type checker: the classes with an activation are known
    new = site.base.__new__(site.base)
    new.__dict__ = {
        **vars(site.module),
        "_modules": {},
        "_forward_hooks": OrderedDict(),
        "_forward_pre_hooks": OrderedDict(),
    }
    return Swap(site, new, site.name.removesuffix("Act"), "activation apart", True)


def _channel_half(norm: BatchChannelNorm) -> nn.GroupNorm:
    """The second half of a batch-channel norm as torch's group norm."""
    new = nn.GroupNorm(norm.num_groups, norm.num_features, eps=norm.eps, device="meta")
    each = norm.num_features // norm.num_groups
    for name, parameter in (("weight", norm.group_weight), ("bias", norm.group_bias)):
        spread = parameter.detach().repeat_interleave(each)
        new.register_parameter(name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
    return new


def to_plain_weight(site: Site, context: Context) -> Swap | str:
    """A re-parametrized layer as a plain one, its standardized or normalized weights baked in."""
    if site.base in LAYER_NORMALIZED.values():
        return "has layer normalization inside, which no layer of torch has"
    if site.base not in PLAIN:
        return "is a plain layer"
    old = site.module
    normalized, names = site.base in NORMALIZED.values(), weight_names(old)
    held = {name: old._parameters[f"{name}_v" if normalized else name] for name in names}
    writes: list[tuple[Tensor, Any]] = []
    for name, weight in held.items():
        assert weight is not None  # for the type checker: a layer of ours has all its weights
        if id(weight) in context.shared:
            held[name] = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        writes.append((held[name], partial(old.computed, name)))  # type: ignore[arg-type, operator, misc]
    parameters: dict[str, nn.Parameter | None] = {}
    for name, parameter in old._parameters.items():
        plain = name.removesuffix("_v") if normalized else name
        if plain in held or not (normalized and name.removesuffix("_g") in held):
            parameters[plain] = held.get(plain, parameter)
    new = retyped(old, PLAIN[site.base], parameters=parameters)
    for name in names:
        for buffer in (f"{name}_gain", f"{name}_shift"):
            new._buffers.pop(buffer, None)
    form = "normalized" if normalized else "standardized"
    return Swap(site, new, PLAIN[site.base].__name__, f"{form} weight baked in", True, writes=tuple(writes))


# ---- the tables ----

NORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(
            "gn",
            "GroupNorm",
            "approximate, moment-matched",
            "Wu & He 2018",
            "small batches, private or federated training",
            to_group_norm,
        ),
        Form(
            "ln",
            "GroupNorm with one group",
            "approximate, moment-matched",
            "Ba et al. 2016",
            "the most of the function before training",
            to_layer_norm,
        ),
        Form(
            "in",
            "InstanceNorm",
            "approximate, moment-matched",
            "Ulyanov et al. 2016",
            "style transfer, contrast that should not matter",
            to_instance_norm,
        ),
        Form(
            "est",
            "EstimatedBatchNorm",
            "exact",
            "Qiao et al. 2019",
            "batch 1 without another norm",
            to_estimated,
        ),
        Form(
            "bcn",
            "BatchChannelNorm",
            "approximate, moment-matched",
            "Qiao et al. 2019",
            "batch 1 and 2, best with ws",
            to_batch_channel,
        ),
        Form(
            "bn",
            "BatchNorm",
            "approximate, needs data; exact from frozen, est",
            "Ioffe & Szegedy 2015",
            "large batches, speed; the way back",
            to_batch_norm,
        ),
        Form(
            "frozen",
            "FrozenBatchNorm",
            "exact",
            "He et al. 2017",
            "short fine-tuning near the original data",
            to_frozen,
        ),
        Form(
            "fold",
            "nothing: into the layer before it",
            "exact",
            "Ioffe & Szegedy 2015",
            "deployment, or training without norms",
            to_folded,
        ),
    )
}
WEIGHTS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(
            "ws",
            "Standardized Conv, Linear, RNN",
            "exact; approximate with ws=strict",
            "Qiao et al. 2019",
            "GroupNorm at batch 1 and 2",
            to_standardized,
        ),
        Form(
            "wn",
            "Normalized Conv, Linear, RNN",
            "exact",
            "Salimans & Kingma 2016",
            "recurrent nets, training without norms (fold-wn)",
            to_normalized,
        ),
    )
}
RECURRENT: dict[str, Form] = {
    form.name: form
    for form in (
        Form(
            "ln",
            "LSTM, GRU with layer norm inside",
            "approximate",
            "Ba et al. 2016",
            "long sequences, small batches",
            to_layer_normalized,
        ),
    )
}
"""What a recurrent layer can become, beside whatever the target is."""
TARGETS: dict[str, Target] = {
    name: Target(name, norm, weight)
    for norm in (None, *NORMS.values())
    for weight in (None, *WEIGHTS.values())
    if (name := "-".join(form.name for form in (norm, weight) if form is not None))
}
"""Every target by name: each norm form, each weight form, and each pair of them."""

PLAIN_TARGET = Target(
    "plain torch",
    Form("plain", "torch's own layer", "exact", "", "deployment", to_plain_norm),
    Form("plain", "torch's own layer", "exact", "", "deployment", to_plain_weight),
)
"""What `normswap.fold` converts to; it is no target that a user names."""


def parse_target(name: str) -> Target:
    """The target called `name`; raises `OptionError`, which lists the known ones."""
    if isinstance(name, str) and name in TARGETS:
        return TARGETS[name]
    asked = str(name).lower()
    turned = "-".join(reversed(asked.split("-")))
    near = [n for n in (asked, turned) if n in TARGETS] or difflib.get_close_matches(asked, TARGETS, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise OptionError(f"unknown target {name!r}{hint}; the known ones are {', '.join(TARGETS)}")


def plan_norm(site: Site, target: Target, context: Context) -> Swap | str:
    """The swap of a normalization, or why it is left."""
    if site.obstacle:
        return site.obstacle
    if not site.form:
        return f"{site.name} is no norm that can be converted"
    if site.path in context.flow.touched:
        return "has tensors that a forward reads directly"
    if problem := _unsound(site) or ("" if target is PLAIN_TARGET else _misplaced(site, context)):
        return problem
    if target.norm is not None:
        plan = target.norm.plan(site, context)
        return _activated(site, plan, target) if isinstance(plan, Swap) and site.is_activated else plan
    return rescale_statistics(site, context) if site.path in context.rescaled else f"{target.name} changes no norms"


def _activated(site: Site, swap: Swap, target: Target) -> Swap:
    """`swap` for a norm that has an activation behind it, which stays: its modules are carried over to the new one."""
    new, name = swap.module, type(swap.module).__name__
    if target is PLAIN_TARGET:  # to plain torch: the parts one after the other
        if type(new) is nn.Identity:
            new = nn.Sequential()
        elif not isinstance(new, nn.Sequential):
            new = nn.Sequential(OrderedDict(norm=new))
        return replace(swap, module=new, after=f"{swap.after}, activation")
    if type(new) is nn.Identity:
        return replace(swap, module=nn.Sequential(), after="its activation")  # its children come into the empty one
    new.__class__ = ACTIVATED[type(new)]
    return replace(swap, after=swap.after.replace(name, type(new).__name__, 1))


def _unsound(site: Site) -> str:
    """What is wrong with a norm, so that no layer could stand in for it."""
    norm = site.module
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if not isinstance(norm.eps, int | float):
        return "has an eps that is no number"
    sizes = {len(t) for t in (mean, var, norm.weight, norm.bias) if isinstance(t, Tensor) and t.dim() == 1}
    if sizes and sizes != {site.channels}:
        return "has tensors of different sizes"
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or mean.is_meta:
        return ""
    if not (widen(mean).isfinite().all() and widen(var).isfinite().all()):
        return "has running statistics that are not finite"
    return "has a negative running variance" if (widen(var) < 0).any() else ""


def _misplaced(site: Site, context: Context) -> str:
    """Why a norm that takes several layouts cannot be exchanged for one that takes (N, C, *spatial)."""
    seen = context.seen.get(site.path)
    if site.form == "last" and seen is None and site.path not in context.flow.flat:
        return "normalizes the last dimension, of an input that may have others: give example_inputs if it is (N, C)"
    if site.form == "last" and seen is not None and seen.dims != 2:
        return f"normalizes the last of {seen.dims} dimensions, where channels are the second"
    dims = site.spatial_dims
    if "group" in site.form and dims and seen is not None and seen.dims != dims + 2:
        return "runs without a batch dimension"
    return ""


def plan_weight(site: Site, target: Target, context: Context) -> Swap | str:
    """The swap of a weight layer, or why it is left."""
    if context.recurrent and site.layer_kind == "rnn" and site.base is not None and target is not PLAIN_TARGET:
        plan = site.obstacle or RECURRENT[context.recurrent].plan(site, context)
        if isinstance(plan, Swap) or target.weight is None or "rnn" not in context.layers:
            return plan
    if target.weight is None or site.base is None:
        return site.obstacle if site.base is None else f"{target.name} changes no weights of this kind"
    if site.layer_kind not in context.layers and target is not PLAIN_TARGET:
        return f"is not among the layers to change: {', '.join(context.layers)}"
    if site.obstacle:
        return site.obstacle
    return target.weight.plan(site, context)
