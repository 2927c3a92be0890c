"""The learnt values of a norm: read as those of a batch norm, and put into the parameters of a new layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normswap.analysis.known_norms import eps_of
from normswap.analysis.sites import Site
from normswap.calibration.measuring import affine_of, running_statistics
from normswap.layers import matching
from normswap.layers.matching import Statistics, widen
from normswap.layers.norms import BatchChannelNorm
from normswap.targets.context import Context, Swap, join_notes


def read_statistics(site: Site, context: Context) -> Statistics | None:
    """The batch norm that stands in for a norm, in float64: itself, where it is one, or by what data showed.

    None where there are neither running statistics nor data.
    """
    stats = _own_statistics(site, context)
    scale = context.rescaling.get(site.path)
    if stats is None or scale is None or context.options.transfer != "match":
        return stats
    feeder: Any = context.sites[str(context.flow.feeder(site.path))].module
    return matching.rescale_input(stats, scale, feeder.bias)


def _own_statistics(site: Site, context: Context) -> Statistics | None:
    norm: Any = site.module
    eps, measured, options = eps_of(norm), context.measured.get(site.path), context.options
    if "data" in site.form and isinstance(norm.running_mean, Tensor) and isinstance(norm.running_var, Tensor):
        stats = running_statistics(norm, options.transfer == "reset")
    elif site.form == "data" or measured is None:
        return None
    else:
        affine = affine_of(norm, measured.moments.mean, options.transfer == "reset")
        stats = Statistics(*affine, measured.moments.mean, measured.moments.var, eps)
    if site.form == "data" or options.transfer != "match":
        return stats
    weight, bias = stats.weight, stats.bias
    if not isinstance(norm, BatchChannelNorm):
        return matching.as_batch_norm(measured.moments, weight, bias, eps) if measured else None
    gain, shift = widen(norm.group_weight), widen(norm.group_bias)
    if measured is None:
        return matching.without_channel_half(stats, gain, shift)
    each = norm.num_features // norm.num_groups
    both = matching.as_batch_norm(measured.moments, gain.repeat_interleave(each), shift.repeat_interleave(each), eps)
    return both._replace(weight=torch.where(weight < 0, -both.weight, both.weight))


def successor(
    site: Site, name: str, value: Tensor, context: Context
) -> tuple[nn.Parameter, list[tuple[Tensor, Tensor]]]:
    """The parameter called `name` of the new layer, which is to hold `value`, and the write that this takes.

    It is the old parameter where that may be kept. One that two layers share gets a successor of its own in each,
    since their values part. One that the layer did not have is not trained, like the statistics that it carries.
    """
    old = getattr(site.module, name)
    if isinstance(old, nn.Parameter) and id(old) not in context.shared:
        return old, [(old, value)]
    like = old if isinstance(old, Tensor) else example_tensor(site, context)
    return nn.Parameter(value.to(like), requires_grad=is_trained(site, name)), []


def is_trained(site: Site, name: str) -> bool:
    """Whether a layer has a parameter called `name` that is trained."""
    parameter = site.module._parameters.get(name)
    return parameter is not None and parameter.requires_grad


def example_tensor(site: Site, context: Context) -> Tensor:
    """A tensor of the dtype and the device of a norm's vectors."""
    held = (getattr(site.module, name, None) for name in ("weight", "running_mean", "bias"))
    found = next((tensor for tensor in held if isinstance(tensor, Tensor)), None)
    if found is not None:
        return found
    if site.path in context.measured:
        return context.measured[site.path].like
    weights = (other.module._parameters.get("weight") for other in context.sites.values())
    return next((w for w in weights if w is not None), torch.empty(0))


def swap_with_affine(
    site: Site, new: nn.Module, stats: Statistics | None, groups: int, context: Context, note: str, same: bool = False
) -> Swap:
    """The swap for `new`, a group or instance norm, with the gain and bias that the option `transfer` asks for.

    `stats` is the batch norm that it stands in for, None where that is not known; `same` says that `new` takes its
    statistics over what the old norm does.
    """
    old: Any = site.module
    eps = eps_of(new) if eps_of(new) != eps_of(old) else None
    values, how, more = _affine_values(site, stats, groups, eps, context, same)
    writes: list[tuple[Tensor, Tensor]] = []
    for name, value in values.items():
        if value is None:
            new.register_parameter(name, None)
            continue
        parameter, write = successor(site, name, value, context)
        new.register_parameter(name, parameter)
        writes += write
    if isinstance(old.weight, Tensor) and not isinstance(old.weight, nn.Parameter):
        more = join_notes(more, "gain and bias are not trained, as before: requires_grad_() changes that")
    shared = [name for name in ("weight", "bias") if id(getattr(old, name)) in context.shared]
    if shared:
        more = join_notes(more, f"{' and '.join(shared)} no longer shared with another layer")
    name = f"{type(new).__name__}({groups})" if isinstance(new, nn.GroupNorm) else type(new).__name__
    return Swap(site, new, name, how, False, join_notes(note, more), groups, eps, tuple(writes))


def _affine_values(
    site: Site, stats: Statistics | None, groups: int, eps: float | None, context: Context, same: bool
) -> tuple[Mapping[str, Tensor | None], str, str]:
    """Gain and bias of a norm within a sample by the option `transfer`; what becomes of the old ones, and a note.

    `eps` is the new norm's, where it is another than the old one's.
    """
    old: Any = site.module
    values: dict[str, Tensor | None] = {"weight": old.weight, "bias": old.bias}
    transfer = context.options.transfer
    if transfer == "reset":
        ones_or_zeros = {"weight": torch.ones_like, "bias": torch.zeros_like}
        return {k: None if v is None else ones_or_zeros[k](v) for k, v in values.items()}, "gain 1, bias 0", ""
    if transfer == "copy":
        return values, "gain and bias copied unchanged", ""
    if stats is not None:
        affine = matching.match_groups(stats, groups, eps)
        own = site.form == "data" or site.path not in context.measured
        into = "gain and bias" if eps is None else "gain, bias and eps"
        how = f"{'running statistics' if own else 'statistics of the data'} moved into {into}"
        measured = context.measured.get(site.path) if site.path not in context.rescaling else None
        factor = measured.gains.get(groups, 1.0) if measured else 1.0
        if factor != 1:
            affine, how = affine._replace(scale=affine.scale * factor), f"{how}, scaled on the data"
        lacking = old.weight is None or old.bias is None
        added = "gain and bias added, not trained, to carry the statistics" if lacking else ""
        return {"weight": affine.scale, "bias": affine.shift}, how, added
    if site.form != "data" and not same:
        # As on data, where gain and bias carry statistics: the architecture is the same with and without.
        one = torch.ones(site.channels)
        values = {k: (one if k == "weight" else one * 0) if v is None else v for k, v in values.items()}
    return values, "gain and bias copied unchanged", "no running statistics and no data to match"
