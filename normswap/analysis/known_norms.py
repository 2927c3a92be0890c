"""The classes of norms and weight layers that normswap knows, torch's and those of libraries, and facts about them."""

import copy
import functools
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from normswap.layers.norms import (
    ACTIVATED,
    BatchChannelNorm,
    EstimatedBatchNorm,
    FrozenBatchNorm,
    PositionNorm,
    normalize_positions,
)
from normswap.layers.recurrent import LAYER_NORMALIZED
from normswap.layers.reparametrized import LAYERS, PLAIN

BATCH_NORM_BY_DIMS: dict[int, type[_BatchNorm]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
"""torch's batch norm for each number of spatial dimensions."""
INSTANCE_NORM_BY_DIMS: dict[int, type[_InstanceNorm]] = {
    1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d,
}  # fmt: skip
"""torch's instance norm, likewise."""
BATCH_NORMS: dict[type[nn.Module], int | None] = {
    **{cls: dims for dims, cls in BATCH_NORM_BY_DIMS.items()},
    **dict.fromkeys((nn.SyncBatchNorm, FrozenBatchNorm, EstimatedBatchNorm)),
}
"""Norms by running statistics, and how many spatial dimensions each takes (None: any)."""
SAMPLE_NORMS: dict[type[nn.Module], int | None] = {
    **dict.fromkeys((BatchChannelNorm, nn.GroupNorm, PositionNorm)),
    nn.LayerNorm: 0,
    **{cls: dims for dims, cls in INSTANCE_NORM_BY_DIMS.items()},
}
"""Norms by the statistics of each sample, likewise."""
OTHER_NORMS = (nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
"""Norms that a report names and that nothing is converted from."""
WEIGHT_LAYERS: tuple[type[nn.Module], ...] = (
    *PLAIN, *LAYER_NORMALIZED.values(), *(cls for classes in LAYERS.values() for cls in classes),
)  # fmt: skip
"""torch's layers with weights that a conversion may re-parametrize, and what they become here."""
_FROZEN = ("weight", "bias", "running_mean", "running_var")  # the buffers of a FrozenBatchNorm2d
_MOST_TRIED = 1 << 16  # channels of a norm that is tried: a damaged file may claim any number


def batch_norms() -> Mapping[type[nn.Module], int | None]:
    """`BATCH_NORMS` with those of libraries; a model can hold these only if the library is imported."""
    return _batch_norms(sys.modules.get("torchvision.ops.misc"), sys.modules.get("timm.layers.norm_act"))


@functools.lru_cache(maxsize=8)
def _batch_norms(misc: Any, acts: Any) -> Mapping[type[nn.Module], int | None]:
    frozen = [getattr(misc, "FrozenBatchNorm2d", None), getattr(acts, "FrozenBatchNormAct2d", None)]
    return {**BATCH_NORMS, **{cls: 2 for cls in frozen if cls is not None}}


def _of_libraries(*names: str) -> frozenset[type[nn.Module]]:
    """Those norms of timm and torchvision that the model can hold: a library that is not imported has none in it."""
    places = ("timm.layers.norm_act", "timm.layers.norm", "torchvision.models.convnext")
    return _named(tuple(sys.modules.get(place) for place in places), names)


@functools.lru_cache(maxsize=64)
def _named(libraries: tuple[Any, ...], names: tuple[str, ...]) -> frozenset[type[nn.Module]]:
    """The classes called so in modules of libraries, which are asked for of each layer."""
    found = (getattr(library, name, None) for library in libraries for name in names)
    return frozenset(cls for cls in found if cls is not None)


def activated() -> frozenset[type[nn.Module]]:
    """Norms with children `drop` and `act` that run behind them: timm's, and what they become here."""
    return frozenset(ACTIVATED.values()) | _of_libraries(
        "BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d",
        "GroupNormAct", "GroupNorm1Act", "LayerNormAct", "LayerNormAct2d", "LayerNormAct2dFp32",
    )  # fmt: skip


def positional() -> frozenset[type[nn.Module]]:
    """Layer norms over the channels at each position of (N, C, H, W)."""
    return _of_libraries("LayerNorm2d", "LayerNorm2dFp32", "LayerNormAct2d", "LayerNormAct2dFp32")


def known_forwards() -> frozenset[type[nn.Module]]:
    """Subclasses whose forward is their base's in another spelling, with an activation or moved axes at most."""
    return activated() | positional() | _of_libraries("GroupNorm", "GroupNorm1", "LayerNorm")


def eps_of(norm: nn.Module) -> float:
    """What a norm adds to the variance; a frozen copy without `eps` has torch's default in its code."""
    return float(getattr(norm, "eps", 1e-5))


@functools.cache
def own_attributes(base: Any) -> dict[str, frozenset[str]]:
    """The names that an instance of a class has by itself, as attributes, parameters, buffers and children.

    `base` is a norm's or a convolution's.
    """
    convolves, has_groups = (issubclass(base, kinds) for kinds in (_ConvNd, BatchChannelNorm | nn.GroupNorm))
    fresh = base(*[1] * (3 if convolves else 2 if has_groups else 1))
    tensors = {kind: frozenset(getattr(fresh, kind)) for kind in ("_parameters", "_buffers")}
    return {"": frozenset(vars(fresh)), "_modules": frozenset()} | tensors  # an activation in a norm is carried over


def is_frozen_copy(module: nn.Module) -> bool:
    """Whether a module is a library's copy of torchvision's FrozenBatchNorm2d: transformers and detectron2 have one."""
    cls: Any = type(module)
    held = {*module._buffers} - {"num_batches_tracked"}
    bare = held == {*_FROZEN} and not module._parameters and not module._modules
    return bare and cls.__name__.endswith("FrozenBatchNorm2d") and _acts_frozen(cls)


@functools.cache
def _acts_frozen(cls: Any) -> bool:
    """Whether instances of a class compute what its name says: one is tried, since the code is anybody's."""
    try:
        with torch.device("cpu"), torch.no_grad():  # the caller may be building on `meta`, where nothing can be told
            norm = cls(3)
            given = {name: torch.linspace(0.5 + i, 1.5, 3) for i, name in enumerate(_FROZEN)}
            norm.load_state_dict(given, strict=False)
            x = torch.linspace(-2, 2, 12).view(1, 3, 2, 2)
            weight, bias, mean, var = (value.view(1, -1, 1, 1) for value in given.values())
            wanted = (x - mean) / (var + eps_of(norm)).sqrt() * weight + bias
            return all(torch.allclose(norm.train(mode)(x), wanted, atol=1e-5) for mode in (False, True))
    except Exception:  # whatever it raises means that it is something else
        return False


def position_dims(module: nn.Module) -> tuple[int, ...]:
    """With how many spatial dimensions a module computes what `PositionNorm` does; none: it is no such norm.

    Many libraries have a class of their own for it (`LayerNorm2d`, a layer norm with its channels first), so what the
    code computes decides: a copy with other gains and biases is tried on values of two sizes, which show its eps too.
    """
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    bare = not module._buffers and not module._modules and set(module._parameters) == {"weight", "bias"}
    if not bare or weight is None or bias is None or weight.dim() != 1 or weight.shape != bias.shape:
        return ()
    if not 1 < len(weight) <= _MOST_TRIED:
        return ()
    return tuple(dims for dims in (1, 2, 3) if _normalizes_positions(module, len(weight), dims))


def _normalizes_positions(module: nn.Module, channels: int, dims: int) -> bool:
    """Whether a module with a gain and a bias of `channels` elements is a position norm on so many dimensions."""
    sizes = ((2, 3, 4) if channels > 4 else (5, 6, 7))[:dims]  # none of them is the number of channels
    trial = copy.copy(module)
    try:
        with torch.device("cpu"), torch.no_grad():
            gain, bias = torch.linspace(0.5, 1.5, channels).double(), torch.linspace(-1, 1, channels).double()
            own = {"weight": nn.Parameter(gain), "bias": nn.Parameter(bias)}
            hooks: dict[str, Any] = {"_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
            trial.__dict__ = {**vars(module), "_parameters": own, **hooks}
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(2, channels, *sizes, generator=generator).double()
            for values in (x, x * eps_of(module) ** 0.5):
                wanted = normalize_positions(values, (channels,), gain, bias, eps_of(module))
                for mode in (False, True):
                    trial.__dict__["training"] = mode
                    given = trial(values.clone())
                    if given.shape != wanted.shape or not torch.allclose(given.double(), wanted, atol=1e-4):
                        return False
            return True
    except Exception:  # whatever it raises means that it is something else
        return False
