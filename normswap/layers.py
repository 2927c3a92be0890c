"""The modules a converted model is made of, beside torch's own.

State-dict keys of replaced layers stay as they were; a standardized convolution adds the
buffers `weight_gain` and `weight_shift`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

STANDARDIZE_EPS = 1e-10
"""Added to the variance of a filter, as in the paper's code; filters of std 1e-3 are common."""

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


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


def standardize_weight(weight: Tensor, gain: Tensor, shift: Tensor, eps: float = STANDARDIZE_EPS) -> Tensor:
    """Weight standardization of `weight`, of shape (out, in, *kernel), over each filter's fan-in.

    `ŵ = gain · (w − mean) / √(var + eps) + shift`, with the biased variance, and `gain` and `shift` of shape
    (out,). Source: Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and
    Weight Standardization". One fused call: a filter is a group of a group norm.
    """
    out = weight.shape[0]
    layout = _CHANNELS_LAST.get(weight.dim())
    if layout is not None and weight.is_contiguous(memory_format=layout) and not weight.is_contiguous():
        # The order within a filter does not matter to its statistics: read it as it lies in memory.
        lying = weight.movedim(1, -1)
        return F.group_norm(lying.reshape(1, out, -1), out, gain, shift, eps).view(lying.shape).movedim(-1, 1)
    return F.group_norm(weight.reshape(1, out, -1), out, gain, shift, eps).view(weight.shape)


class _Standardized:
    """Mixed into a convolution class: the convolution runs on its standardized weight."""

    weight: Tensor
    weight_gain: Tensor
    weight_shift: Tensor
    bias: Tensor | None

    def standardized_weight(self) -> Tensor:
        """The weight that the convolution runs with, of the shape of `weight`."""
        return standardize_weight(self.weight, self.weight_gain, self.weight_shift)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.standardized_weight(), self.bias)  # type: ignore[attr-defined, no-any-return]


class StandardizedConv1d(_Standardized, nn.Conv1d):
    """`torch.nn.Conv1d` on a standardized weight; buffers `weight_gain`, `weight_shift` of shape (out_channels,)."""


class StandardizedConv2d(_Standardized, nn.Conv2d):
    """`torch.nn.Conv2d` on a standardized weight; buffers `weight_gain`, `weight_shift` of shape (out_channels,)."""


class StandardizedConv3d(_Standardized, nn.Conv3d):
    """`torch.nn.Conv3d` on a standardized weight; buffers `weight_gain`, `weight_shift` of shape (out_channels,)."""


STANDARDIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: StandardizedConv1d,
    nn.Conv2d: StandardizedConv2d,
    nn.Conv3d: StandardizedConv3d,
}
PLAIN = {ours: plain for plain, ours in STANDARDIZED.items()}
