"""What a normalization can become: a function for each row of `NORM_FORMS` in `target_table`.

A function takes a site and the context and returns a `Swap`, or the reason why the site is left. It builds; it changes
nothing in the model.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normswap.analysis.known_norms import BATCH_NORM_BY_DIMS, INSTANCE_NORM_BY_DIMS, eps_of
from normswap.analysis.sites import Site
from normswap.errors import OptionError
from normswap.layers.matching import Statistics, match_output, shrinking_eps
from normswap.layers.norms import RATE, BatchChannelNorm, EstimatedBatchNorm, FrozenBatchNorm, PositionNorm
from normswap.layers.reparametrized import retyped
from normswap.targets.context import Context, Swap, join_notes
from normswap.targets.groups import LEAST_ELEMENTS, choose_groups, elements_of, spatial_dims_of
from normswap.targets.parameters import example_tensor, is_trained, read_statistics, successor, swap_with_affine


def to_group_norm(site: Site, context: Context) -> Swap | str:
    """`torch.nn.GroupNorm` (Wu & He 2018) with the statistics matched over each group."""
    between = site.form == "group" and 1 < (site.groups or 0) < site.channels  # neither a layer nor an instance norm
    if between and context.options.groups == "auto" and site.path not in context.recorded_groups:
        return "has groups already; give groups= to change their number"
    chosen = choose_groups(site, context)
    if isinstance(chosen, str):
        return chosen
    measured = context.measured.get(site.path)
    serves = context.options.purpose == "use" or bool(measured and measured.errors)  # not data that were refused
    shrinks = context.options.shrinks and serves and site.form == "data"
    stats = read_statistics(site, context) if shrinks else None
    eps = shrinking_eps(stats, chosen[0]) if stats is not None else None
    return _group_norm(site, context, *chosen, context.recorded_eps.get(site.path, eps))


def to_layer_norm(site: Site, context: Context) -> Swap | str:
    """Layer norm over (C, *spatial) (Ba et al. 2016): `torch.nn.GroupNorm` with one group."""
    if site.form == "last":
        return "is a layer norm already"
    if elements_of(site, context) == 1 and site.channels < LEAST_ELEMENTS:
        return "has one element per sample, which a norm within a sample would turn into a constant"
    return _group_norm(site, context, 1, "")


def to_instance_norm(site: Site, context: Context) -> Swap | str:
    """Instance norm (Ulyanov et al. 2016): every channel a group; fewer groups where a channel has one element."""
    recorded = context.recorded_groups.get(site.path, site.channels)
    if recorded != site.channels:
        return _group_norm(site, context, recorded, "")
    if elements_of(site, context) == 1:
        options = replace(context.options, groups="auto")
        chosen = choose_groups(site, replace(context, options=options, recorded_groups={}))
        if isinstance(chosen, str):
            return chosen
        return _group_norm(site, context, chosen[0], f"{chosen[0]} groups, not {site.channels}: one element a channel")
    if site.base in INSTANCE_NORM_BY_DIMS.values() and site.form != "data":
        return "is an instance norm already"
    if site.spatial_dims not in INSTANCE_NORM_BY_DIMS:
        return _group_norm(site, context, site.channels, "")
    cls = INSTANCE_NORM_BY_DIMS[site.spatial_dims]
    new: Any = cls(site.channels, eps=eps_of(site.module), affine=True, device="meta")
    new.momentum = _momentum(site)
    new.affine = site.module.weight is not None or context.options.transfer == "match"
    return swap_with_affine(site, new, read_statistics(site, context), site.channels, context, "")


def to_position_norm(site: Site, context: Context) -> Swap | str:
    """Position norm (Li et al. 2019): the channels of each position by themselves, all of them one group."""
    if site.form in ("position", "last"):
        return "is a position norm already"
    if site.channels < LEAST_ELEMENTS:
        return "has one channel, which a norm over the channels would turn into a constant"
    new = PositionNorm(site.channels, eps_of(site.module), spatial_dims=site.spatial_dims, device="meta")
    new.elementwise_affine = site.module.weight is not None or context.options.transfer == "match"
    swap = swap_with_affine(site, new, read_statistics(site, context), 1, context, "")
    return replace(swap, groups=None)


def _group_norm(site: Site, context: Context, groups: int, note: str, eps: float | None = None) -> Swap | str:
    same = site.form in ("group", "last") and site.groups == groups
    if same and site.base is nn.GroupNorm:
        return f"has {'one group' if groups == 1 else f'{groups} groups'} already"
    eps = eps_of(site.module) if eps is None else eps
    new: Any = nn.GroupNorm(groups, site.channels, eps, affine=True, device="meta")
    stats = None if same else read_statistics(site, context)
    new.affine = site.module.weight is not None or (context.options.transfer == "match" and not same)
    swap = swap_with_affine(site, new, stats, groups, context, note, same)
    if not same or context.options.transfer == "reset":
        return swap
    return replace(swap, how="gain and bias unchanged: the same function", exact=True, note=note)


def to_batch_norm(site: Site, context: Context) -> Swap | str:
    """torch's batch norm (Ioffe & Szegedy 2015): exact from fixed statistics or many processes, else by data."""
    if site.base is nn.SyncBatchNorm:
        return _without_processes(site, context)
    if site.base and issubclass(site.base, nn.modules.batchnorm._BatchNorm):
        return "is a batch norm already"
    if site.form != "data" and site.path not in context.measured:
        raise OptionError(
            f"{site.path or 'the model'} ({site.name}) has no statistics of a batch, which bn needs: give data with "
            "calibrate= (--calibrate) that reach it, or leave it with exclude="
        )
    cls = BATCH_NORM_BY_DIMS.get(spatial_dims_of(site, context) or 0, nn.SyncBatchNorm)
    new = cls(site.channels, eps=eps_of(site.module), momentum=_momentum(site), device="meta")
    kept = _keep_statistics(site, context, new, "statistics follow the batches again")
    for name, parameter in new._parameters.items():
        if parameter is not None and name in site.module._buffers:
            parameter.requires_grad_(True)  # a buffer of the frozen norm: who wants batch norm back wants to train it
    return kept


def _without_processes(site: Site, context: Context) -> Swap | str:
    """A SyncBatchNorm as the batch norm of one process: the same tensors and the same function."""
    cls = BATCH_NORM_BY_DIMS.get(spatial_dims_of(site, context) or 0)
    if cls is None:
        return "may read any number of dimensions (BatchNorm1d, 2d or 3d): give --input-shape (example_inputs)"
    new = retyped(site.module, cls)
    vars(new).pop("process_group", None)
    return Swap(site, new, cls.__name__, "statistics of each process by itself", True)


def to_frozen(site: Site, context: Context) -> Swap | str:
    """The same batch norm by fixed statistics: exact, and gain and bias are trained as before."""
    if site.base is FrozenBatchNorm or "Frozen" in site.name:
        return "has fixed statistics already"
    new = FrozenBatchNorm(site.channels, eps_of(site.module), affine=False, spatial_dims=site.spatial_dims)
    new.momentum = _momentum(site)
    return _keep_statistics(site, context, new, "statistics fixed")


def to_estimated(site: Site, context: Context) -> Swap | str:
    """The same batch norm by moving estimates (Qiao et al. 2019): exact, and it learns at batch 1."""
    if site.base is EstimatedBatchNorm:
        return "uses moving estimates already"
    new = EstimatedBatchNorm(site.channels, eps_of(site.module), _momentum(site), False, site.spatial_dims)
    return _keep_statistics(site, context, new, "statistics become moving estimates")


def to_batch_channel(site: Site, context: Context) -> Swap | str:
    """Batch-channel norm (Qiao et al. 2019): moving estimates, then groups that start as those are over the data."""
    if site.base is BatchChannelNorm:
        return "is a batch-channel norm already"
    chosen = choose_groups(site, context)
    if isinstance(chosen, str):
        return chosen
    groups, note = chosen
    new = BatchChannelNorm(groups, site.channels, eps_of(site.module), _momentum(site), False, site.spatial_dims)
    kept = _keep_statistics(site, context, new, "statistics become moving estimates")
    stats = read_statistics(site, context)
    if isinstance(kept, str) or stats is None:
        return kept
    how = f"{kept.how}; one gain and one bias per group"
    like = example_tensor(site, context)
    if context.options.transfer == "match":
        gain, bias = match_output(stats, groups)
        new.group_weight, new.group_bias = nn.Parameter(gain.to(like)), nn.Parameter(bias.to(like))
        how = f"{kept.how}; groups start as these are over the data"
    else:
        new.to(like.device, like.dtype)
    for name in ("weight", "bias"):
        new.get_parameter(f"group_{name}").requires_grad_(is_trained(site, name))
    note = join_notes(kept.note, note)
    return replace(kept, after=f"{kept.after}({groups})", how=how, exact=False, note=note, groups=groups)


def _momentum(site: Site) -> float | None:
    """How fast a norm's running statistics follow the data; torch's default for one that has none."""
    momentum: float | None = getattr(site.module, "momentum", 0.1)
    return momentum


def _keep_statistics(site: Site, context: Context, new: Any, how: str) -> Swap | str:
    """`new`, a norm by running statistics: on the tensors of the one at `site`, or on those that data showed."""
    stats = read_statistics(site, context)
    if stats is None:
        return "has no running statistics: they need data (calibrate)"
    old, exact = site.module, site.form == "data" and context.options.transfer != "reset"
    writes: list[tuple[Tensor, Tensor]] = []
    for name in ("weight", "bias"):
        held = getattr(old, name)
        same = held is None or (isinstance(held, nn.Parameter) and context.options.transfer != "reset")
        if site.form != "data" or not same:
            held, write = successor(site, name, getattr(stats, name), context)
            writes += write
        new.register_parameter(name, held)
    new.affine = new.weight is not None
    new.track_running_stats = "data" not in site.form or getattr(old, "track_running_stats", True)
    like = example_tensor(site, context)
    for name, value in (("running_mean", stats.mean), ("running_var", stats.var)):
        buffer = getattr(old, name, None)
        new._buffers[name] = value.to(like) if buffer is None else buffer
        if buffer is not None and site.form != "data" and site.path in context.measured:
            writes.append((buffer, value))
    counted = getattr(old, "num_batches_tracked", None)
    none_yet = torch.zeros((), dtype=torch.long, device=like.device)
    new._buffers["num_batches_tracked"] = none_yet if counted is None else counted
    if site.form != "data":
        how = f"{how}; those that the data showed" if site.path in context.measured else how
    elif site.path in context.rescaling and context.options.transfer == "match":
        exact, how = False, f"{how}, rescaled for standardized weights"
        writes += _statistics_writes(site, stats)
    if context.options.transfer == "reset":
        how = f"{how}; gain 1, bias 0"
    note = _why_they_follow(site, new) if isinstance(new, EstimatedBatchNorm) else ""
    return Swap(site, new, type(new).__name__, how, exact, note, writes=tuple(writes))


def _why_they_follow(site: Site, new: EstimatedBatchNorm) -> str:
    """A note where estimates follow the data, which the running statistics did not; the way back finds that."""
    if new.momentum == 0:
        return f"momentum is 0; estimates follow at {RATE}"
    return "" if new.track_running_stats else "statistics were not tracked; estimates follow the data"


def _statistics_writes(site: Site, stats: Statistics) -> list[tuple[Tensor, Tensor]]:
    norm: Any = site.module
    return [(norm.running_mean, stats.mean), (norm.running_var, stats.var)]


def rescale_statistics(site: Site, context: Context) -> Swap | str:
    """A batch norm that stays, behind a convolution whose filters strict standardization rescales."""
    stats = read_statistics(site, context)
    if stats is None or context.options.transfer != "match":
        return "is not changed by this target"
    how = "statistics rescaled for standardized weights"
    return Swap(site, site.module, site.name, how, False, writes=tuple(_statistics_writes(site, stats)))
