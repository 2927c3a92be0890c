"""What the weights of a layer can become: a function for each row of `WEIGHT_FORMS` and `RECURRENT_FORMS`.

As in `norms`, a function builds a `Swap`, or says why the site is left, and changes nothing in the model.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.analysis.sites import Site
from normswap.layers.matching import filter_moments, widen
from normswap.layers.recurrent import LAYER_NORMALIZED
from normswap.layers.recurrent_matching import layer_normalized
from normswap.layers.reparametrized import (
    NORMALIZED,
    PLAIN,
    STANDARDIZE_EPS,
    STANDARDIZED,
    as_filters,
    as_weight,
    filter_groups,
    gain_shape,
    retyped,
    weight_names,
)
from normswap.layers.subclasses import form_for
from normswap.targets.context import Context, Swap, join_notes
from normswap.targets.folding import folded_weight


def to_standardized(site: Site, context: Context) -> Swap | str:
    """A layer on standardized weights (Qiao et al. 2019); exact where gain and shift keep the filters' own."""
    if problem := _why_not_standardized(site, context):
        return problem
    strict = context.options.ws == "strict"
    buffers: dict[str, Tensor] = {}
    constant = total = 0
    for name in weight_names(site.module):
        weight = folded_weight(site, getattr(site.module, name), context)
        filters = as_filters(weight, filter_groups(site.module))
        if filters.shape[1] < 2:
            return "has a fan-in of 1: nothing to standardize over"
        gain, shift = torch.ones(len(filters), device=weight.device), torch.zeros(len(filters), device=weight.device)
        if not strict:
            shift, variance = filter_moments(filters)
            context.release(getattr(site.module, name))
            gain = (variance + STANDARDIZE_EPS).sqrt()
            if not variance.is_meta:
                constant, total = constant + int((variance == 0).sum()), total + len(variance)
        buffers |= {f"{name}_gain": gain.to(weight.dtype), f"{name}_shift": shift.to(weight.dtype)}
    if constant and constant == total:
        return "has only constant filters (all zeros?), which cannot be standardized"
    new = retyped(site.module, form_for(site.module, STANDARDIZED), buffers)
    how = "gain 1, shift 0" if strict else "gain and shift keep each filter's own std and mean"
    traced = context.flow.seen(site.path) or site.layer_kind == "rnn"
    note = "" if traced else "its connections are not known; a norm with as many channels is next to it"
    if constant:
        note = join_notes(note, f"{constant} of {total} filters are constant, and stay so")
    return Swap(site, new, STANDARDIZED[site.base].__name__, how, not strict, note)  # type: ignore[index]


def _why_not_standardized(site: Site, context: Context) -> str:
    """Why a layer that could be standardized is left; "" for no reason."""
    if problem := _why_not_covered(site, STANDARDIZED, "is standardized already"):
        return problem
    if site.path in context.flow.touched:
        return "has a weight that a forward reads directly, past the standardization"
    options, path = context.options, site.path
    if options.ws_scope == "normed" and site.layer_kind != "rnn" and path not in context.flow.normed:
        traced = context.flow.seen(path)
        return "has no normalization after it" if traced else "its connections are not known, and no norm is next to it"
    if options.ws == "strict" and context.measured and options.ws_scope == "normed" and path in context.flow.first:
        # Measured (tests/bench/calibration.py): standardized strictly, it costs more than data bring back.
        return "reads the model's input, where strict standardization loses most; --ws-scope all takes it too"
    return ""


def to_normalized(site: Site, context: Context) -> Swap | str:
    """A layer on normalized weights (Salimans & Kingma 2016): each filter's length is a parameter; exact."""
    if problem := _why_not_covered(site, NORMALIZED, "is weight-normalized already"):
        return problem
    old, parameters, groups = site.module, dict[str, nn.Parameter | None](), filter_groups(site.module)
    writes: list[tuple[Tensor, Any]] = []
    tied: dict[int, nn.Parameter] = {}
    for name, parameter in old._parameters.items():
        if parameter is None or name not in weight_names(old):
            parameters[name] = parameter
            continue
        length = torch.linalg.vector_norm(widen(as_filters(folded_weight(site, parameter, context), groups)), dim=1)
        context.release(parameter)
        g = nn.Parameter(length.to(parameter.dtype).view(gain_shape(parameter, groups)), parameter.requires_grad)
        if id(parameter) in context.shared:  # layers that are tied share their lengths too
            g = tied[id(parameter)] = {**context.tied_lengths, **tied}.get(id(parameter), g)
        elif not length.is_meta and not length.all():
            writes.append((parameter, partial(_with_directions, parameter, length == 0, groups)))
        parameters |= {f"{name}_g": g, f"{name}_v": parameter}
    new = retyped(old, form_for(old, NORMALIZED), parameters=parameters)
    note = "its weight is shared: what is not normalized with it goes by the direction alone" if tied else ""
    how = "g is each filter's own length"
    after = NORMALIZED[site.base].__name__  # type: ignore[index]
    return Swap(site, new, after, how, True, note, writes=tuple(writes), tied_lengths=tied)


def _with_directions(weight: Tensor, empty: Tensor, groups: int | None) -> Tensor:
    """`weight` with a direction for each filter of zeros, whose length stays zero: without one it could never train."""
    filters = as_filters(weight.detach(), groups).clone()
    noise = torch.randn(filters.shape, generator=torch.Generator().manual_seed(0)).to(filters)
    return as_weight(torch.where(empty.view(-1, 1), noise, filters), weight, groups)


def to_layer_normalized(site: Site, context: Context) -> Swap | str:
    """An LSTM or GRU with layer normalization inside (Ba et al. 2016), which starts close to the trained one."""
    if site.base in LAYER_NORMALIZED.values():
        return "has layer normalization inside already"
    if site.base not in LAYER_NORMALIZED:
        return f"{site.name} has no form with layer normalization inside: LSTM, GRU and their cells have"
    moments, transfer = context.vectors.get(site.path), context.options.transfer
    new, writes = layer_normalized(site.module, moments, transfer, context.shared)
    how = "norms start with gain 1"
    if transfer == "match":
        how = f"norms start with the std and mean that vectors have on {'the data' if moments else 'noise'}"
    note = "" if moments or transfer != "match" else "more is kept with data (calibrate)"
    return Swap(site, new, type(new).__name__, how, False, note, writes=tuple(writes))


def _why_not_covered(site: Site, classes: Mapping[type[nn.Module], type[nn.Module]], already: str) -> str:
    """Why no class of `classes` can take the place of a layer; "" for no reason."""
    if site.base in classes.values():
        return already
    if site.base in PLAIN:
        return f"is {site.name} already: fold it first (normswap.fold)"
    if site.base not in classes:
        return f"{site.name} is not supported"
    if not all(getattr(site.module, name).is_floating_point() for name in weight_names(site.module)):
        return "has a weight of complex numbers"
    return ""


def strict_rescaling(site: Site) -> Tensor:
    """By how much strict standardization multiplies each filter of a convolution, of shape (out_channels,)."""
    layer: Any = site.module
    return 1 / (filter_moments(as_filters(layer.weight, filter_groups(layer)))[1] + STANDARDIZE_EPS).sqrt()
