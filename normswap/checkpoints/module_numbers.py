"""Whether the numbers in torch's own layers are such as their constructors take: a file may hold any."""

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy
from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv, dropout, padding, rnn

_LARGEST = 1 << 31


def _is_length(value: Any) -> bool:
    is_whole = type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))  # numpy's, too
    return is_whole and 0 <= int(value) < _LARGEST


def _is_size(value: Any) -> bool:
    return _is_length(value) and value > 0


def _are_sizes(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(map(_is_size, value))


def _are_lengths(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(map(_is_length, value))


def _is_padding(value: Any) -> bool:
    return value.lower() in ("same", "valid") if isinstance(value, str) else _are_lengths(value)


def _is_number(value: Any) -> bool:
    real: Any = value if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    return bool(abs(real) <= sys.float_info.max)  # not of infinity or NaN, nor of a whole number that is no float


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool | numpy.bool_) or (type(value) is int and value in (0, 1))


def _is_dim(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < _LARGEST


def _are_pads(value: Any) -> bool:
    return _is_dim(value) or (isinstance(value, tuple | list) and all(map(_is_dim, value)))


def _for_each(dims: int, fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value fits, or has as many that do as there are spatial dimensions."""
    return lambda value: (
        len(value) == dims and all(map(fits, value)) if isinstance(value, tuple | list) else bool(fits(value))
    )


def _numbers_of_pools(dims: int) -> Mapping[str, Callable[[Any], bool]]:
    sizes, lengths = _for_each(dims, _is_size), _for_each(dims, _is_length)
    return {
        "kernel_size": sizes, "stride": _for_each(dims, lambda step: step is None or _is_size(step)), "dilation": sizes,
        "padding": lengths, "output_size": _for_each(dims, lambda size: size is None or _is_length(size)),
        "ceil_mode": _is_flag,
    }  # fmt: skip


_NUMBERS: Mapping[type[nn.Module], Mapping[str, Callable[[Any], bool]]] = {
    conv._ConvNd: {
        "in_channels": _is_length, "out_channels": _is_size, "groups": _is_size, "kernel_size": _are_sizes,
        "stride": _are_sizes, "dilation": _are_sizes, "padding": _is_padding, "output_padding": _are_lengths,
        "padding_mode": lambda mode: isinstance(mode, str) and mode in ("zeros", "reflect", "replicate", "circular"),
        "transposed": _is_flag,
    },
    nn.Linear: {"in_features": _is_length, "out_features": _is_length},
    rnn.RNNBase: {"input_size": _is_length, "hidden_size": _is_size, "num_layers": _is_size},
    rnn.RNNCellBase: {"input_size": _is_length, "hidden_size": _is_size},
    batchnorm._NormBase: {
        "num_features": _is_length, "num_groups": _is_size, "eps": _is_number, "affine": _is_flag,
        "momentum": lambda rate: rate is None or _is_number(rate), "track_running_stats": _is_flag,
    },
    nn.GroupNorm: {"num_groups": _is_size, "num_channels": _is_size, "eps": _is_number, "affine": _is_flag},
    nn.LayerNorm: {"normalized_shape": _are_lengths, "eps": _is_number, "elementwise_affine": _is_flag},
    dropout._DropoutNd: {"p": _is_number, "inplace": _is_flag},
    nn.Flatten: {"start_dim": _is_dim, "end_dim": _is_dim},
    **{cls: {"padding": _are_pads}
       for cls in (padding._ConstantPadNd, padding._ReflectionPadNd, padding._ReplicationPadNd)},
    **{cls: _numbers_of_pools(dims)
       for dims in (1, 2, 3)
       for kind in ("MaxPool", "AvgPool", "LPPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "FractionalMaxPool")
       if (cls := getattr(nn, f"{kind}{dims}d", None)) is not None},
}  # fmt: skip
"""What each attribute of a layer has to be. One that a layer lacks is none of it: there are older files."""

_NEEDED: Mapping[type[nn.Module], Sequence[str]] = {
    conv._ConvNd: ("in_channels", "out_channels", "groups", "kernel_size", "stride", "dilation"),
    nn.Linear: ("in_features", "out_features"),
}
"""What a layer with a weight has had in every version of torch."""


def why_no_layer(module: nn.Module) -> str:
    """What is wrong with the numbers of a layer of torch's, or of a class made of one, as the rest of a sentence."""
    kind: Any = type(module)
    cls = _known_base(kind)
    if cls is None:
        return ""
    for name, fits in _NUMBERS[cls].items():
        if name in vars(module) and not fits(vars(module)[name]):
            return f"has a {name} that cannot be: {_shown(vars(module)[name])}"
    return _why_they_differ(module, cls)


@functools.lru_cache(maxsize=1024)
def _known_base(kind: Any) -> type[nn.Module] | None:
    return next((cls for cls in _NUMBERS if issubclass(kind, cls)), None)


def _shown(value: Any) -> str:
    plain = isinstance(value, float | bool | None) or (isinstance(value, int) and abs(value) < 1 << 64)
    return f"{value!r}" if plain else f"{value[:40]!r}" if isinstance(value, str) else f"such a {type(value).__name__}"


def _why_they_differ(module: Any, cls: type[nn.Module]) -> str:
    """Where a layer of torch's itself has a weight that its numbers do not tell of."""
    weight = module._parameters.get("weight")
    if (
        not isinstance(weight, Tensor)
        or nn.parameter.is_lazy(weight)
        or not type(module).__module__.startswith("torch.nn.modules.")
    ):
        return ""
    if lacking := [name for name in _NEEDED.get(cls, ()) if name not in vars(module)]:
        return f"has no {lacking[0]}"
    if cls is conv._ConvNd:
        size = module.in_channels * module.out_channels * math.prod(module.kernel_size) // module.groups
        dims = len(module.kernel_size)
        fits = {dims} == {len(module.stride), len(module.dilation), weight.dim() - 2} and weight.numel() == size
    elif cls is nn.Linear:
        fits = weight.shape == (module.out_features, module.in_features)
    else:
        return ""
    return "" if fits else f"has a weight of the shape {tuple(weight.shape)}, which does not fit its settings"
