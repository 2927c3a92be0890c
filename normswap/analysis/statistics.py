"""The state of a norm's running statistics: healthy, never trained, dead channels, or broken."""

import math

import torch
from torch import Tensor, nn

from normswap.analysis.known_norms import eps_of
from normswap.layers.matching import widen

NOT_FINITE, NEGATIVE = "not finite", "negative variance"
"""Two of the states that `statistics_of` gives."""
_DEAD = 1e-3  # of eps: a variance below is as good as none


def statistics_of(norm: nn.Module) -> str:
    """The state of a norm's running statistics: "healthy", what is wrong, or "" where it keeps none."""
    mean, var = (getattr(norm, name, None) for name in ("running_mean", "running_var"))
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return ""
    if not has_plain_values(mean) or not has_plain_values(var):
        return "without values" if mean.is_meta or var.is_meta else "without plain values"
    least, greatest = _extremes(var)
    if not all(map(math.isfinite, (*_extremes(mean), least, greatest))):
        return NOT_FINITE
    if least < 0:
        return NEGATIVE
    if is_untrained(norm):
        return "never trained"
    eps = eps_of(norm) if isinstance(getattr(norm, "eps", 0), int | float) else 0.0  # a file may hold anything
    dead = int((widen(var) < _DEAD * eps).sum()) if least < _DEAD * eps else 0
    return f"{dead} dead channel{'s' * (dead != 1)}" if dead else "healthy"


def _extremes(tensor: Tensor) -> tuple[float, float]:
    """The least and the greatest element of a tensor: NaN where one is; 0 where it has none."""
    if not tensor.numel():
        return 0.0, 0.0
    # Not all dtypes can be compared, but widening takes as long as the rest.
    least, greatest = torch.aminmax(tensor.detach() if tensor.dtype is torch.float32 else widen(tensor))
    return float(least), float(greatest)


def is_untrained(norm: nn.Module) -> bool:
    """Whether a norm's running statistics are those it was made with."""
    tensors = [norm._buffers.get(name) for name in ("num_batches_tracked", "running_mean")]
    return all(t is not None and has_plain_values(t) and not t.any() for t in tensors)


def has_plain_values(tensor: Tensor) -> bool:
    """Whether a tensor can be asked for its values: a file may hold sparse and quantized ones, or none."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
