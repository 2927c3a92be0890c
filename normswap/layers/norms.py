"""The norms a converted model is made of, beside torch's own. State-dict keys of replaced layers stay as they were."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase


class FrozenBatchNorm(_NormBase):
    """Batch normalization by fixed statistics, in train mode as in eval mode.

    `y = weight · (x − running_mean) / √(running_var + eps) + bias`, per channel of an input of shape
    (N, C, *spatial). `weight` and `bias` are trained as far as they require gradients. The keys are those
    of `torch.nn.BatchNorm2d`; `spatial_dims` remembers which of torch's classes it came from
    (None for SyncBatchNorm, which takes any).
    """

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True, spatial_dims: int | None = None):
        super().__init__(num_features, eps=eps, affine=affine)
        self.spatial_dims = spatial_dims

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def _is_repeated() -> bool:
    """Whether this forward is run again during backward, for gradient checkpointing.

    It must then give what it gave before. torch's own checkpointing asks in the same way.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


RATE = 0.1
"""How fast estimates follow the data where the momentum is 0: torch's default."""


class EstimatedBatchNorm(_NormBase):
    """Batch normalization by moving estimates, which follow the data slowly and take no part in the gradient.

    In train mode `running_mean` first moves towards the batch's mean, at the rate `momentum`, then `running_var`
    towards the batch's mean square distance from it; then, as in eval mode, `y = weight · (x − running_mean) /
    √(running_var + eps) + bias`, per channel of (N, C, *spatial). It learns at batch 1; an empty batch moves nothing.
    A `momentum` of 0, by which a batch norm keeps its statistics, stands for `RATE`: it is kept for the way back.
    Source: Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
    algorithm 1. The authors' published code takes the distance from the mean before it moves; here the paper is
    followed.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        spatial_dims: int | None = None,
    ):
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        self.spatial_dims = spatial_dims

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    @torch.no_grad()
    def _update_estimates(self, input: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum or RATE
        dims = [0, *range(2, input.dim())]
        var, mean = torch.var_mean(input.to(self.running_mean.dtype), dims, correction=0)
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(var + (mean - self.running_mean).square(), rate)

    def forward(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            if input.numel() and not _is_repeated():  # an empty batch tells nothing, not even that it was one
                self._update_estimates(input)
            mean, var = mean.clone(), var.clone()  # backward reads them, maybe after a further forward has moved them
        return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)


class BatchChannelNorm(EstimatedBatchNorm):
    """Batch-channel normalization: `EstimatedBatchNorm`, then groups of channels normalized within each sample.

    The channel half has one gain and one bias a group, `group_weight` and `group_bias`, of shape (num_groups,).
    Source: Qiao et al. 2019, as above.
    """

    def __init__(
        self,
        num_groups: int,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        spatial_dims: int | None = None,
    ):
        super().__init__(num_features, eps, momentum, affine, spatial_dims)
        self.num_groups = num_groups
        self.group_weight = nn.Parameter(torch.ones(num_groups))
        self.group_bias = nn.Parameter(torch.zeros(num_groups))

    def forward(self, input: Tensor) -> Tensor:
        each = self.num_features // self.num_groups
        gain, bias = (p.repeat_interleave(each) for p in (self.group_weight, self.group_bias))
        return F.group_norm(super().forward(input), self.num_groups, gain, bias, self.eps)


# ---- the channels of each position ----


@fx.wrap
def normalize_positions(
    input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The channels of each position of `input`, (N, C, *spatial), normalized by themselves; see `PositionNorm`.

    `shape` is (C,), which `weight` and `bias` have, or they are None. The output lies in memory as the input does.
    """
    last = input.dim() - 1  # not -1, which torch's older ONNX export writes down as it is
    lying = input.movedim(1, last)
    output = F.layer_norm(lying, shape, weight, bias, eps).movedim(last, 1)
    return output if lying.is_contiguous() else output.contiguous()


class PositionNorm(nn.LayerNorm):
    """Position normalization: the channels of each position normalized by themselves, gain and bias a channel.

    `y = weight · (x − mean) / √(var + eps) + bias` on inputs of shape (N, C, *spatial), mean and biased variance over
    the C channels at each position of each sample: no position sees another, so it is causal along time and blind to
    padding. `spatial_dims` remembers how many dimensions the norm before it took (None: any number). It is the
    `LayerNorm2d` of ConvNeXt and timm for any number of dimensions. Source: Li et al. 2019, "Positional
    Normalization", without its moment shortcut.
    """

    def __init__(
        self, num_channels: int, eps: float = 1e-5, affine: bool = True, spatial_dims: int | None = None, **kwargs: Any
    ):
        super().__init__(num_channels, eps, affine, **kwargs)
        self.spatial_dims = spatial_dims

    def forward(self, input: Tensor) -> Tensor:
        return normalize_positions(input, self.normalized_shape, self.weight, self.bias, self.eps)


RUNNING_NORMS = (FrozenBatchNorm, EstimatedBatchNorm, BatchChannelNorm)
"""The norms by running statistics that torch does not have."""


# ---- norms with an activation behind them ----


class _Activated:
    """Mixed into a norm's class: `act(drop(norm(x)))`, as in timm's `BatchNormAct2d`, whose children these are."""

    def forward(self: Any, input: Tensor) -> Tensor:
        output = super().forward(input)  # type: ignore[misc]
        for name in ("drop", "act"):  # timm's SyncBatchNormAct has neither unless it was made from another norm
            output = self._modules[name](output) if name in self._modules else output
        return output  # type: ignore[no-any-return]


ACTIVATED: dict[type[nn.Module], type[nn.Module]] = {}
"""The class with an activation for each norm that can take the place of one with an activation."""
for _plain in (
    nn.GroupNorm, nn.InstanceNorm2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    FrozenBatchNorm, EstimatedBatchNorm, BatchChannelNorm, PositionNorm,
):  # fmt: skip
    _name = f"{_plain.__name__}Act"
    _doc = f"`{_plain.__name__}`, then the children `drop` and `act`."
    ACTIVATED[_plain] = globals()[_name] = type(_name, (_Activated, _plain), {"__module__": __name__, "__doc__": _doc})
