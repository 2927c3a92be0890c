"""No norm: what it multiplies and adds goes into the layers around it (Ioffe & Szegedy 2015, section 3.1).

Into the layers before it; else into those behind it; else into one beside it, whose output is added to the norm's.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from normswap.analysis.known_norms import BATCH_NORM_BY_DIMS
from normswap.analysis.obstacles import why_not_like_base
from normswap.analysis.sites import Site
from normswap.analysis.standardizing import class_without_standardization
from normswap.analysis.statistics import is_untrained
from normswap.analysis.trials import own_forward
from normswap.layers.matching import Affine, add_filters_, add_to_middle_, as_affine, scale_filters_, scale_inputs_
from normswap.layers.reparametrized import CONVOLUTIONS, PLAIN, filter_groups
from normswap.layers.subclasses import as_plain
from normswap.layers.torch_normalization import is_torchs_hook, kind_of_normalization
from normswap.targets.context import Absorption, Context, Merger, Place, Swap
from normswap.targets.groups import share_channels
from normswap.targets.parameters import is_trained, read_statistics

AS_BATCH_NORM = (*(cls.__name__ for cls in BATCH_NORM_BY_DIMS.values()), nn.SyncBatchNorm.__name__)
"""How a report begins that tells of a norm which found no layer to go into, and became torch's."""
NO_STATISTICS_TO_FOLD = "has no running statistics, which are what can go into a layer"


def to_folded(site: Site, context: Context) -> Swap | str:
    """No norm, or why it stays: `torch.nn.Identity` is left in its place."""
    stats = read_statistics(site, context)
    if stats is None:
        return NO_STATISTICS_TO_FOLD
    recorded = context.recorded_changes.get(site.path, "")
    if context.recorded_changes and (not recorded or recorded.startswith(AS_BATCH_NORM)):
        return "stayed in the conversion that is repeated here"
    affine = as_affine(stats)
    absorptions = _into_layers_before(site, affine, context)
    # Standardized strictly, a layer loses what a norm gives it, unless it stands before the norm.
    strict = bool(context.rescaling)
    if isinstance(absorptions, str) and site.form == "data" and not strict and is_bare(site):
        behind = _into_layers_behind(site, affine, context)
        beside = [] if isinstance(behind, list) and behind else _into_a_layer_beside(site, affine, context)
        reason = f"{absorptions}; {behind}" if behind and isinstance(behind, str) else absorptions
        absorptions = (behind if isinstance(behind, list) else []) or beside or reason
    if isinstance(absorptions, str):
        return absorptions
    exact = site.form == "data" and context.options.transfer != "reset" and not strict
    place, several = absorptions[0].place, len(absorptions) > 1
    how = f"folded into the {f'{len(absorptions)} layers' if several else 'layer'} {place.value} it"
    # Batch norms take (C, L) for (N, C), which a convolution may give where its input has no batch dimension.
    before = place is Place.BEFORE
    unsure = any(share_channels(absorption.site, site, context, before) is None for absorption in absorptions)
    note = "for inputs with a batch dimension" if unsure else ""
    return Swap(site, nn.Identity(), "Identity", how, exact, note, absorptions=tuple(absorptions))


def in_order(absorptions: Iterable[Absorption]) -> list[Absorption]:
    """Those first that multiply a layer's output: a branch beside it is added to the product."""
    return sorted(absorptions, key=lambda absorption: absorption.place is Place.BESIDE)


def apply_to_weight_(absorption: Absorption, weight: Tensor) -> None:
    """What an absorption does to the weight of its layer, done to `weight`, of the same shape."""
    layer: Any = absorption.site.module
    scale = absorption.affine.scale
    if absorption.place is Place.BEFORE:
        scale_filters_(weight, scale, filter_groups(layer))
    elif absorption.place is Place.BEHIND:
        scale_inputs_(weight, scale, getattr(layer, "groups", 1))
    else:
        add_to_middle_(weight, scale)


def merge_weights_(merger: Merger, weight: Tensor, branch: Tensor) -> None:
    """What a merger does to the weight of its layer, done to `weight`, where the other convolution's is `branch`."""
    add_filters_(weight, branch)
    add_to_middle_(weight, -torch.ones(merger.channels, device=weight.device))


def folded_weight(site: Site, weight: Tensor, context: Context) -> Tensor:
    """The weight of a layer as it is when norms and other layers have gone into it; `weight` itself where none does."""
    absorptions, mergers = context.folded.get(site.path, ()), context.merged.get(site.path, ())
    if not absorptions and not mergers:
        return weight
    with torch.no_grad():
        folded = weight.detach().clone()
        for absorption in in_order(absorptions):
            apply_to_weight_(absorption, folded)
        for merger in mergers:
            branch: Any = merger.branch.module
            merge_weights_(merger, folded, folded_weight(merger.branch, branch.weight, context))
    return folded


def _absorption(into: Site, norm: Site, affine: Affine, place: Place, needs: tuple[str, ...] = ()) -> Absorption:
    """The absorption, with a bias where the layer has none."""
    layer: Any = into.module
    bias = zero_bias(into, is_trained(norm, "bias")) if layer.bias is None else None
    return Absorption(into, affine, bias, place, needs)


def zero_bias(layer: Site, requires_grad: bool) -> nn.Parameter:
    """A bias for a layer that has none."""
    like: Tensor = next(layer.module.parameters())
    zeros = torch.zeros(layer.channels, dtype=like.dtype, device=like.device)
    return nn.Parameter(zeros, requires_grad=requires_grad)


def is_bare(norm: Site) -> bool:
    """Whether a norm gives what it computes: no activation and no hook behind it."""
    hooked = norm.module._forward_hooks or norm.module._forward_pre_hooks
    inner = [child for child in norm.module.modules() if child is not norm.module]
    idle = all(type(m) is nn.Identity or type(m).__module__ == "torch.nn.modules.dropout" for m in inner)
    return not hooked and idle


# ---- into the layers before it ----


def _into_layers_before(norm: Site, affine: Affine, context: Context) -> list[Absorption] | str:
    """Each filter is multiplied, and its bias moved, by what the norm does to its channel."""
    layers, why = context.flow.feeders(norm.path)
    if why:
        return why
    into = [context.sites[path] for path in layers]
    for layer in into:
        if problem := _cannot_absorb(layer, norm, context, Place.BEFORE):
            return f"the layer before it {problem}"
        if len(into) > 1 and layer.layer_kind != "conv":
            return "the layers before it are concatenated, and not all are convolutions"
    widths = [layer.channels for layer in into]
    if sum(widths) != norm.channels:
        return "the layer before it has another number of channels"
    parts = zip(torch.split(affine.scale, widths), torch.split(affine.shift, widths), strict=True)
    return [_absorption(layer, norm, Affine(*part), Place.BEFORE) for layer, part in zip(into, parts, strict=True)]


def _cannot_absorb(into: Site, norm: Site, context: Context, place: Place) -> str:
    layer = into.module
    baked = bool(into.obstacle) and class_without_standardization(layer) is not None  # which is done first
    if into.obstacle and not baked:
        return into.obstacle
    if problem := why_values_stay(into, context):
        return problem
    if norm.module._forward_pre_hooks:
        return "has a forward hook, which would see other values"
    if by_torch := kind_of_normalization(layer):  # it takes a norm in as a plain layer only
        old, new = type(layer), type(as_plain(layer))
        if any(context.flow.who_tells_apart(path, old, new) for path in into.paths):
            return f"is normalized by torch's {by_torch}, and a forward asks for its type"
    if layer.bias is None and not baked and (why := why_not_like_base(as_plain(layer), with_bias=True)):
        return f"has a forward of its own, which {why}"
    shared = share_channels(into, norm, context, place is Place.BEFORE)
    if shared is None and into.layer_kind == "linear":
        return (
            "may have its channels in another dimension than the norm takes: nothing shows how many dimensions there "
            "are, which --input-shape (example_inputs) does"
        )
    return "has its channels in another dimension than the norm takes" if shared is False else ""


def why_values_stay(layer: Site, context: Context) -> str:
    """Why a layer of a known class must go on giving what it gives; "": it need not."""
    if layer in context.excluded:
        return "is excluded"
    if layer.path in context.flow.touched:
        return "has a weight that is also read directly"
    if any(id(p) in context.shared for p in layer.module.parameters()):
        return "shares its weight with another layer"
    normalized_alone = all(map(is_torchs_hook, layer.module._forward_pre_hooks.values()))
    hooked = layer.module._forward_hooks or not normalized_alone
    return "has a forward hook, which would see other values" if hooked else ""


# ---- into the layers behind it ----


def _into_layers_behind(norm: Site, affine: Affine, context: Context) -> list[Absorption] | str:
    """What each filter multiplies of a channel is multiplied, and its bias takes in what the norm adds.

    A layer that pads with zeros does so behind the norm, so that these do not have what the norm adds to all else: it
    takes in a norm that adds nothing.
    """
    into = [context.sites[path] for path in sorted(context.flow.behind(norm.path))]
    unknown = affine.shift.is_meta or is_untrained(norm.module)
    adds = norm.path not in context.recorded_changes if unknown else bool(affine.shift.any())
    for layer in into:
        if (problem := _cannot_absorb(layer, norm, context, Place.BEHIND)) or (
            problem := _cannot_take_inputs(layer, norm, context)
        ):
            return f"the layer after it {problem}"
        if adds and _pads_with_zeros(layer):
            return "the layer after it pads with zeros, which the norm would change"
    return [_absorption(layer, norm, affine, Place.BEHIND) for layer in into]


def _cannot_take_inputs(into: Site, norm: Site, context: Context) -> str:
    layer: Any = into.module
    if into.base in PLAIN:
        return "has a weight that is computed: fold it first (normswap.fold)"
    if getattr(layer, "in_channels", getattr(layer, "in_features", None)) != norm.channels:
        return "has another number of channels"
    if own := own_forward(type(layer)):
        return f"has a {own} of its own, which may do more to its input"
    return "" if into.layer_kind in ("conv", "linear") else "is recurrent"


def _pads_with_zeros(into: Site) -> bool:
    layer: Any = into.module
    if into.layer_kind == "linear":
        return False
    if into.base not in CONVOLUTIONS:
        return True  # a transposed convolution sees zeros around its input
    pointwise = all(size == 1 for size in layer.kernel_size)
    none = layer.padding == "valid" or (pointwise if layer.padding == "same" else not any(layer.padding))
    return layer.padding_mode == "zeros" and not none


# ---- into a layer beside it ----


def _into_a_layer_beside(norm: Site, affine: Affine, context: Context) -> list[Absorption]:
    """A convolution that reads what the norm reads, and whose output is added to the norm's, as in RepVGG.

    At its centre it sees the element that the norm multiplies; it takes in all but the element itself, which the
    identity that is left goes on adding. Source: Ding et al. 2021, "RepVGG", section 3.3.
    """
    for branch in sorted(context.flow.parallel(norm.path)):
        into = context.sites[branch.layer]
        bare = all(is_bare(context.sites[path]) for path in branch.norms)
        if bare and not _cannot_absorb(into, norm, context, Place.BESIDE) and _keeps_elements(into, norm):
            beside = affine._replace(scale=affine.scale - 1)
            return [_absorption(into, norm, beside, Place.BESIDE, branch.norms)]
    return []


def _keeps_elements(into: Site, norm: Site) -> bool:
    """Whether a convolution gives as many elements as it reads, each with the one at its own place in the middle."""
    layer: Any = into.module
    if into.base not in CONVOLUTIONS or own_forward(type(layer)):
        return False
    sizes = list(zip(layer.kernel_size, layer.dilation, strict=True))
    middle = tuple((size - 1) * step // 2 for size, step in sizes)
    padded = layer.padding in (middle, "same") or (layer.padding == "valid" and not any(middle))
    odd, steps = all(size % 2 for size, _ in sizes), all(step == 1 for step in layer.stride)
    return layer.in_channels == layer.out_channels == norm.channels and odd and steps and padded
