"""Convolutions beside one another, that read the same and whose outputs are added, become one.

Which is exact: a sum of convolutions is one, whose filters are the sum (Ding et al. 2021, "RepVGG", section 3.3). The
forward stays as it is and goes on adding up what stands in their places. So each that is taken in leaves a shortcut
without parameters (He et al. 2015, "Deep Residual Learning", option A: the input at its stride, with channels of zeros
where there are more), and the one that takes it in computes what that does not.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from normswap.analysis.connections import Branch
from normswap.analysis.sites import Site
from normswap.analysis.trials import own_forward
from normswap.layers.reparametrized import CONVOLUTIONS
from normswap.layers.torch_normalization import normalized_by_torch
from normswap.targets.context import Context, Merger, Place, Swap
from normswap.targets.folding import is_bare, why_values_stay, zero_bias

_POOLINGS: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_PADDINGS: dict[int, Any] = {1: nn.ConstantPad2d, 2: nn.ConstantPad3d}  # of the spatial dimensions and the channels
_PRECISE = (torch.float32, torch.float64)


class _Member(NamedTuple):
    """One of the convolutions whose outputs are added."""

    site: Site
    branch: Branch


def plan_mergers(
    chosen: Collection[Site], plans: Mapping[Site, Swap | str], context: Context
) -> dict[Site, Swap | str]:
    """For convolutions beside others: the swap by which one goes into another, or why it stays.

    Args:
        chosen: the sites that may be changed.
        plans: what becomes of each norm: those behind a convolution have to go into it.
        context: with what is folded.

    Returns:
        Nothing for a convolution that takes in others, or stands beside none.
    """
    if context.rescaling:  # standardized strictly, the sum would lose what its parts are worth
        return {}
    branches = {
        site.path: {branch.layer: branch for branch in context.flow.parallel(site.path)}
        for site in context.sites.values()
        if site.base in CONVOLUTIONS
    }
    found: dict[Site, Swap | str] = {}
    takes_in = set[Site]()
    for site, other in _pairs(branches, context.sites):  # the larger kernel comes first
        if other not in chosen or other in takes_in or any(isinstance(found.get(s), Swap) for s in (site, other)):
            continue
        into, member = (_Member(s, branches[s.path][s.path]) for s in (site, other))
        why = _why_apart(into, member, plans, context)
        found[other] = f"stays beside another convolution: {why}" if why else _swap(into, member, context)
        takes_in |= set() if why else {site}
    return {site: plan for site, plan in found.items() if site not in takes_in}


def _pairs(branches: Mapping[str, Mapping[str, Branch]], sites: Mapping[str, Site]) -> Iterator[tuple[Site, Site]]:
    """Each two convolutions that stand beside one another in all that is known of either."""
    by_size = sorted(branches, key=lambda path: math.prod(sites[path].module.kernel_size), reverse=True)  # type: ignore[arg-type]
    place = {path: number for number, path in enumerate(by_size)}
    for path in by_size:
        others = [p for p in branches[path] if p in place and place[p] > place[path] and path in branches[p]]
        yield from ((sites[path], sites[other]) for other in sorted(others, key=place.__getitem__))


def _swap(into: _Member, member: _Member, context: Context) -> Swap:
    layer: Any = into.site.module
    branch: Any = member.site.module
    adds = branch.bias is not None or member.site.path in context.folded
    bias = zero_bias(into.site, layer.weight.requires_grad) if adds and layer.bias is None else None
    channels = _kept_channels(branch)
    shortcut = _shortcut(branch, channels, member.branch.written)
    after = ", ".join(type(part).__name__ for part in (shortcut if isinstance(shortcut, nn.Sequential) else [shortcut]))
    how = "merged into the convolution beside it"
    return Swap(member.site, shortcut, after, how, True, merger=Merger(into.site, member.site, channels, bias))


def _kept_channels(layer: Any) -> int:
    """How many of its input's first channels a convolution can give at its own first outputs, with a filter of 1."""
    fewest = int(min(layer.in_channels, layer.out_channels))
    same = layer.in_channels == layer.out_channels
    return fewest if same else fewest // int(layer.groups)  # else those of the first group


def _shortcut(layer: Any, channels: int, written: bool) -> nn.Module:
    """What a convolution leaves: its input's first channels, at its stride, and zeros for the rest; as a tensor of its
    own if that is `written` into.
    """
    dims, strided = len(layer.kernel_size), any(step != 1 for step in layer.stride)
    changes = [change for change in (channels - layer.in_channels, layer.out_channels - channels) if change]
    parts: list[nn.Module] = [_POOLINGS[dims](1, layer.stride)] if strided or (written and not changes) else []
    parts += [_PADDINGS[dims]((*[0, 0] * dims, 0, change), 0.0) for change in changes]
    if not parts:
        return nn.Identity()
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)


# ---- why not ----


def _why_apart(into: _Member, member: _Member, plans: Mapping[Site, Swap | str], context: Context) -> str:
    """Why one of two convolutions beside one another cannot go into the other; "": it can."""
    for layer in (into, member):
        if problem := _why_not_merged(layer, plans, context):
            return f"{'that one' if layer is into else 'it'} {problem}"
    if context.recorded_changes.get(member.site.path, "") == member.site.name:
        return "as in the conversion that is repeated here"
    return _why_no_sum(into.site.module, member.site.module) or _why_no_shortcut(member.site.module)


def _why_not_merged(member: _Member, plans: Mapping[Site, Swap | str], context: Context) -> str:
    site = member.site
    if site.obstacle:
        return site.obstacle
    if site.base not in CONVOLUTIONS or normalized_by_torch(site.module):
        return "is not a plain convolution"
    if own := own_forward(type(site.module)):
        return f"has a {own} of its own"
    if problem := why_values_stay(site, context):
        return problem
    for path in member.branch.norms:
        swap = plans.get(context.sites[path])
        absorptions = swap.absorptions if isinstance(swap, Swap) else ()
        if [(a.site, a.place) for a in absorptions] != [(site, Place.BEFORE)] or not is_bare(context.sites[path]):
            return "has a norm after it that stays"
    return ""


def _why_no_sum(large: Any, small: Any) -> str:
    """Why two convolutions of one input are not one, with the filters of `small` in the middle of those of `large`."""
    for name in ("in_channels", "out_channels", "groups", "stride"):
        if getattr(large, name) != getattr(small, name):
            return f"they differ in {name}"
    if (large.weight.dtype, large.weight.device) != (small.weight.dtype, small.weight.device):
        return "they differ in dtype or device"
    pad, small_pad = _padding(large), _padding(small)
    if pad is None or small_pad is None:
        return "one pads more on one side"
    for dim, (more, fewer) in enumerate(zip(large.kernel_size, small.kernel_size, strict=True)):
        step = large.dilation[dim]
        if fewer > 1 and step != small.dilation[dim]:
            return "they differ in dilation"
        if more < fewer or (more - fewer) % 2 or 2 * (pad[dim] - small_pad[dim]) != step * (more - fewer):
            return "neither kernel lies in the other"
    if any(small_pad) and large.padding_mode != small.padding_mode:
        return "they differ in padding_mode"
    return ""


def _why_no_shortcut(layer: Any) -> str:
    """Why no shortcut can stand in the place of a convolution, as if it were one with a filter of 1."""
    sizes = list(zip(layer.kernel_size, layer.dilation, _padding(layer) or (), strict=True))
    if any(size % 2 == 0 or 2 * pad != step * (size - 1) for size, step, pad in sizes):
        return "they give fewer or more elements than they read"
    if layer.in_channels != layer.out_channels and len(sizes) not in _PADDINGS:
        return "they change the number of channels in three dimensions"
    if layer.weight.dtype not in _PRECISE:  # the shortcut's part is large beside what it is taken from
        return f"digits would be lost in {str(layer.weight.dtype)[6:]}: fold in float32"
    return ""


def _padding(layer: Any) -> tuple[int, ...] | None:
    """How many elements a convolution adds on each side of a dimension; None where the sides differ."""
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    if layer.padding != "same":
        return tuple(layer.padding)
    added = [step * (size - 1) for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    return None if any(number % 2 for number in added) else tuple(number // 2 for number in added)
