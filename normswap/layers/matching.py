"""The mathematics of moving a learnt normalization: tensors to tensors.

All vectors have one element a channel, shape (C,). They are computed in float64 where the device
has it, and rounded once, by the caller, to the dtype of the tensor that they are written to.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.layers.reparametrized import filter_dims

_FAINT = 1e-3  # below this part of its group's variance, a channel is nearly constant
_CHUNK = 1 << 18  # elements of a weight that are widened at once: they stay in the processor's cache


class Statistics(NamedTuple):
    """What a batch norm has learnt: `y = weight · (x − mean) / √(var + eps) + bias`, all of shape (C,)."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float


class Affine(NamedTuple):
    """`y = scale · x + shift` per channel, both of shape (C,)."""

    scale: Tensor
    shift: Tensor


class Moments(NamedTuple):
    """What a norm within a sample does to data; all of shape (C,)."""

    mean: Tensor
    """Of its input."""
    var: Tensor
    normed_mean: Tensor
    """Of its normalized output, before gain and bias."""
    normed_var: Tensor


def widen(tensor: Tensor) -> Tensor:
    """`tensor`, detached, in float64, or in float32 on a device without float64."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def as_affine(stats: Statistics) -> Affine:
    """Batch norm in eval mode as one multiplication and one addition a channel (Ioffe & Szegedy 2015)."""
    scale = stats.weight / (stats.var + stats.eps).sqrt()
    return Affine(scale, stats.bias - scale * stats.mean)


def match_groups(stats: Statistics, groups: int, eps: float | None = None) -> Affine:
    """The gain and bias of a group norm that stands in for a batch norm, moment-matched.

    Over the data, a group's mean is `m = mean_c μ_c` and its total variance `s² = mean_c(σ²_c + μ²_c) − m²`: the
    spread of the channel means is part of it. Where a sample's statistics equal the data's, group norm with the
    returned affine equals the batch norm. Exact for one channel a group in that same case, when it returns the batch
    norm's own gain and bias. A channel that is nearly constant (a dead filter) would need so large a gain that
    samples' different statistics drown it: below `_FAINT` of its group's variance, the gain falls with the channel's
    own, down to 0, and the bias keeps the channel's mean. `eps` is the group norm's, where it is not the batch norm's.
    """
    mean, var = stats.mean.view(groups, -1), stats.var.view(groups, -1)
    group_mean, group_var = group_moments(stats, groups)
    faint = (var / (_FAINT * group_var).clamp(min=torch.finfo(var.dtype).tiny)).clamp(max=1)
    scale = as_affine(stats).scale.view(groups, -1) * torch.where(group_var > 0, faint, 1)
    weight = scale * (group_var + (stats.eps if eps is None else eps)).sqrt()
    bias = stats.bias.view(groups, -1) + scale * (group_mean - mean)
    return Affine(weight.flatten(), bias.flatten())


def group_moments(stats: Statistics, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and total variance of each group of channels over the data, two of shape (groups, 1)."""
    mean, var = stats.mean.view(groups, -1), stats.var.view(groups, -1)
    group_mean = mean.mean(1, keepdim=True)
    # mean(σ² + μ²) − m², in the form that does not cancel when the means are large.
    return group_mean, var.mean(1, keepdim=True) + (mean - group_mean).square().mean(1, keepdim=True)


def shrinking_eps(stats: Statistics, groups: int) -> float:
    """The eps with which a group norm divides by the mean of a sample's variance and the data's.

    A sample's own variance is a noisy stand-in for the data's, by which the batch norm divides; the mean of the two
    is nearer to it (shrinkage, as James & Stein 1961). With eps the data's variance, `x / √(var + eps)` is that, but
    for a factor, which the gain takes back. Top-1 without data, in one group: with the batch norm's eps, with 0.5, 1,
    2, 3 and 10 times the data's variance: ResNet-20 (.806 before) .772, .796, .798, .793, .792, .770; ResNet-56 (.829)
    .772, .787, .801, .817, .815, .779; EfficientNet-Lite0 (.88, 125 pictures) with none, 1 and 3 times .85, .88, .88.
    On data, with the batch norm's eps and with this one, fitted: ResNet-20 .801, .808; ResNet-56 .816, .824;
    EfficientNet-Lite0 (.852, 250 pictures, 180 s) .79, .832.
    """
    shrinkage = group_moments(stats, groups)[1].mean()
    return stats.eps if shrinkage.is_meta else stats.eps + shrinkage.item()


def as_batch_norm(moments: Moments, weight: Tensor, bias: Tensor, eps: float) -> Statistics:
    """The batch norm that stands in for a norm within a sample with gain `weight` and bias `bias`, both (C,).

    Over the data it has the same mean and variance in each channel: the gain of a channel is the ratio of the standard
    deviations behind and before the norm. Exact where a sample has the data's statistics. A channel that is constant
    takes the mean ratio of the others.
    """
    alive = moments.var > moments.var.max() * torch.finfo(moments.var.dtype).eps
    ratio = torch.where(alive, moments.normed_var / torch.where(alive, moments.var, 1), 0).sqrt()
    ratio = torch.where(alive, ratio, ratio.sum() / alive.sum().clamp(min=1))
    scale = weight * ratio * (moments.var + eps).sqrt()
    return Statistics(scale, bias + weight * moments.normed_mean, moments.mean, moments.var, eps)


def without_channel_half(stats: Statistics, gain: Tensor, bias: Tensor) -> Statistics:
    """The batch norm that stands in for a batch-channel norm, `stats` its batch half; `gain` and `bias` are (groups,).

    The inverse of `match_output`, and as exact: over the data the channel half is one multiplication and one addition
    a group.
    """
    std, mean = match_output(stats, len(gain))
    ratio, each = gain / std, len(stats.mean) // len(gain)
    ratio, shift = ratio.repeat_interleave(each), (bias - ratio * mean).repeat_interleave(each)
    return stats._replace(weight=stats.weight * ratio, bias=stats.bias * ratio + shift)


def match_output(stats: Statistics, groups: int) -> Affine:
    """The gain and bias a group with which the channel half of a batch-channel norm undoes its own normalization.

    They are the standard deviation and the mean that the batch half's output has over the group: its channels have the
    means β_c and the variances γ_c²·σ²_c / (σ²_c + ε). Both of shape (groups,). Exact where a sample has the data's.
    """
    output = stats._replace(mean=stats.bias, var=as_affine(stats).scale.square() * stats.var)
    group_mean, group_var = group_moments(output, groups)
    return Affine((group_var + stats.eps).sqrt().flatten(), group_mean.flatten())


def rescale_input(stats: Statistics, scale: Tensor, bias: Tensor | None) -> Statistics:
    """Statistics of a channel whose convolution is multiplied by `scale`, its bias `bias` apart."""
    offset = torch.zeros_like(stats.mean) if bias is None else widen(bias)
    return stats._replace(mean=(stats.mean - offset) * scale + offset, var=stats.var * scale.square())


def filter_moments(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each filter of a weight of shape (out, *fan-in): two of shape (out,)."""
    rows = max(1, _CHUNK // max(1, weight[0].numel()))
    means, variances = [], []
    for part in torch.split(weight.detach(), rows):
        filters = widen(part).flatten(1)
        mean = filters.mean(1)
        deviations = filters - mean[:, None]
        means.append(mean)
        variances.append(torch.linalg.vector_norm(deviations, dim=1).square() / filters.shape[1])
    return torch.cat(means), torch.cat(variances)


def scale_inputs_(weight: Tensor, scale: Tensor, groups: int = 1) -> None:
    """Multiply in place what each filter of a convolution of `groups` groups, or of a linear layer, takes of a channel.

    `weight` is (out, in / groups, *kernel), `scale` (in,).
    """
    each = scale.to(weight.dtype).view(groups, 1, -1, *[1] * (weight.dim() - 2))
    with torch.no_grad():
        weight.view(groups, -1, *weight.shape[1:]).mul_(each)


def constant_response(weight: Tensor, inputs: Tensor, groups: int = 1) -> Tensor:
    """What a layer gives, (out,), without its bias, where each input channel has one value, of `inputs`, (in,)."""
    filters = widen(weight).flatten(2).sum(2) if weight.dim() > 2 else widen(weight)
    return (filters.view(groups, -1, filters.shape[1]) @ inputs.view(groups, -1, 1)).flatten()


def add_to_middle_(weight: Tensor, amount: Tensor) -> None:
    """Add to the middle of each of the first filters of a convolution, where it meets the input of its own channel.

    `weight` is (out, in / groups, *kernel) with odd kernels and, where there are several groups, as many inputs as
    outputs; `amount` is (channels,), at most as many as there are inputs and outputs.
    """
    channel = torch.arange(len(amount), device=weight.device)
    at: list[Any] = [channel, channel % weight.shape[1], *(size // 2 for size in weight.shape[2:])]
    with torch.no_grad():
        weight[tuple(at)] += amount.to(weight.dtype)


def add_filters_(weight: Tensor, smaller: Tensor) -> None:
    """Add to the middle of the filters of a convolution those of another, with the same groups.

    `weight` is (out, in / groups, *kernel), `smaller` the same with a kernel that is smaller by even numbers.
    """
    for dim, size in enumerate(smaller.shape):
        weight = weight.narrow(dim, (weight.shape[dim] - size) // 2, size)
    with torch.no_grad():
        weight.add_(smaller)


def scale_filters_(weight: Tensor, scale: Tensor, transposed_groups: int | None = None) -> None:
    """Multiply each filter of `weight` in place by its element of `scale`, of shape (out_channels,).

    A weight has the shape (out, in, *kernel); a transposed convolution's, of `transposed_groups` groups, has
    (in, out / groups, *kernel).
    """
    blocks, _, one = filter_dims(weight, transposed_groups)
    with torch.no_grad():
        blocks.mul_(scale.to(weight.dtype).view(one))
