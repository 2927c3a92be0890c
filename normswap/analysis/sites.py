"""Read-only: which norms and weights a model has, and under which names."""

from __future__ import annotations

import functools
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from normswap.analysis.copies import MODULE_STATE
from normswap.layers.norms import ACTIVATED, BatchChannelNorm, EstimatedBatchNorm, FrozenBatchNorm
from normswap.layers.recurrent import LAYER_NORMALIZED
from normswap.layers.reparametrized import LAYERS, PLAIN

BATCH_NORMS: dict[type[nn.Module], int | None] = {
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    nn.SyncBatchNorm: None,
    FrozenBatchNorm: None,
    EstimatedBatchNorm: None,
}
"""Norms by running statistics, and how many spatial dimensions each takes (None: any)."""
SAMPLE_NORMS: dict[type[nn.Module], int | None] = {
    BatchChannelNorm: None,
    nn.GroupNorm: None,
    nn.LayerNorm: 0,
    nn.InstanceNorm1d: 1,
    nn.InstanceNorm2d: 2,
    nn.InstanceNorm3d: 3,
}
"""Norms by the statistics of each sample, likewise."""
WEIGHTS: tuple[type[nn.Module], ...] = (
    *PLAIN, *LAYER_NORMALIZED.values(), *(cls for classes in LAYERS.values() for cls in classes),
)  # fmt: skip
_FROZEN = ("weight", "bias", "running_mean", "running_var")  # the buffers of a FrozenBatchNorm2d
_OTHER_NORMS = (*SAMPLE_NORMS, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)


def batch_norms() -> dict[type[nn.Module], int | None]:
    """`BATCH_NORMS` with those of libraries; a model can hold these only if the library is imported."""
    found = dict(BATCH_NORMS)
    if (misc := sys.modules.get("torchvision.ops.misc")) is not None:
        found[misc.FrozenBatchNorm2d] = 2
    if (acts := sys.modules.get("timm.layers.norm_act")) is not None:
        found[acts.FrozenBatchNormAct2d] = 2
    return found


def _of_libraries(*names: str) -> set[type[nn.Module]]:
    """Those norms of timm and torchvision that the model can hold: a library that is not imported has none in it."""
    places = ("timm.layers.norm_act", "timm.layers.norm", "torchvision.models.convnext")
    found = (getattr(sys.modules.get(place), name, None) for place in places for name in names)
    return {cls for cls in found if cls is not None}


def activated() -> set[type[nn.Module]]:
    """Norms with children `drop` and `act` that run behind them: timm's, and what they become here."""
    return {*ACTIVATED.values()} | _of_libraries(
        "BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d", "GroupNormAct", "GroupNorm1Act", "LayerNormAct", "LayerNormAct2d"
    )  # fmt: skip


def _positional() -> set[type[nn.Module]]:
    """Layer norms over the channels at each position of (N, C, H, W)."""
    return _of_libraries("LayerNorm2d", "LayerNormAct2d")


def _known_forwards() -> set[type[nn.Module]]:
    """Subclasses whose forward is their base's in another spelling, with an activation or moved axes at most."""
    return activated() | _positional() | _of_libraries("GroupNorm", "GroupNorm1", "LayerNorm")


@dataclass(frozen=True, eq=False)
class Site:
    """A place in the model: one normalization or weight layer, with every path that leads to it.

    `base` is the known class that it behaves as (None: none), `obstacle` why it must not be
    touched (empty: it may be).
    """

    module: nn.Module
    paths: tuple[str, ...]
    kind: str
    base: type[nn.Module] | None
    obstacle: str = ""

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def name(self) -> str:
        """The class as the report writes it."""
        return type(self.module).__name__

    @property
    def channels(self) -> int:
        """Channels that a norm normalizes or that a weight layer puts out."""
        for attribute in ("num_features", "out_channels", "out_features", "num_channels", "hidden_size"):
            if isinstance(size := getattr(self.module, attribute, None), int):
                return size
        if isinstance(self.module, nn.LayerNorm):
            return self.module.normalized_shape[-1]
        return int(self.module.running_mean.numel())  # type: ignore[union-attr, operator]  # torchvision's frozen norm

    @property
    def spatial_dims(self) -> int | None:
        if isinstance(self.module, FrozenBatchNorm | EstimatedBatchNorm):
            return self.module.spatial_dims
        if type(self.module) in _positional():
            return 2
        return {**SAMPLE_NORMS, **batch_norms()}.get(self.base) if self.base else None

    @property
    def form(self) -> str:
        """Over what a norm takes its statistics in eval mode; "" for what is no source of a conversion.

        "data" (running ones), "batch" (a batch norm without these), "group" (channel groups of a sample), "position" (the channels at each position of (N, C, H, W)),
        "last" (the last dimension), or "data, group" (a batch-channel norm).
        """
        if self.base is BatchChannelNorm:
            return "data, group"
        if self.base and isinstance(getattr(self.module, "running_mean", None), torch.Tensor):
            return "data"  # an instance norm may keep running statistics too, and goes by them in eval mode
        if self.is_batch_norm:
            return "batch"
        if self.base is nn.LayerNorm:
            whole = len(self.module.normalized_shape) > 1  # type: ignore[arg-type]
            return "" if whole else "position" if type(self.module) in _positional() else "last"
        return "group" if self.base in SAMPLE_NORMS else ""

    @property
    def groups(self) -> int | None:
        """The groups of channels that a norm takes statistics over within a sample."""
        if self.form == "last":
            return 1
        return int(getattr(self.module, "num_groups", self.channels)) if "group" in self.form else None

    @property
    def layer_kind(self) -> str:
        """ "conv", "linear" or "rnn" of a weight layer; "conv" for one that only looks like a convolution."""
        if self.base in LAYER_NORMALIZED.values():
            return "rnn"
        plain = PLAIN.get(self.base, self.base) if self.base else None
        return next((kind for kind, classes in LAYERS.items() if plain in classes), "conv")

    @property
    def is_activated(self) -> bool:
        """Whether the norm has an activation of its own behind it, in its children `drop` and `act`."""
        return type(self.module) in activated()

    @property
    def is_batch_norm(self) -> bool:
        return self.base in batch_norms()


def classify(module: nn.Module) -> tuple[str, type[nn.Module] | None, str] | None:
    """(kind, base, obstacle) of a module that a report must name, or None for any other."""
    norms, name = (*batch_norms(), *_OTHER_NORMS), type(module).__name__
    base = next((cls for cls in type(module).__mro__ if cls in norms or cls in WEIGHTS), None)
    if base is None and _is_frozen_copy(module):
        # Imported only for a model that has them; most do without torchvision.
        from torchvision.ops.misc import FrozenBatchNorm2d

        return "norm", FrozenBatchNorm2d, _obstacle(module, type(module))
    if base is None:
        if type(module).__module__.startswith("torch.nn.utils."):  # the formulas of parametrizations
            return None
        looks_normed = isinstance(getattr(module, "running_mean", None), torch.Tensor)
        leaf = not any(True for _ in module.children())
        if looks_normed or (leaf and re.search("norm|GRN$", name, re.IGNORECASE)):
            return "norm", None, f"{name} is not a class that normswap knows"
        weight = module._parameters.get("weight")
        if leaf and weight is not None and re.search("conv(?!next)", name, re.IGNORECASE):
            return "weight", None, f"{name} is not a class that normswap knows"
        return None
    return "norm" if base in norms else "weight", base, _obstacle(module, base)


def _is_frozen_copy(module: nn.Module) -> bool:
    """Whether a module is one of the copies of torchvision's FrozenBatchNorm2d that libraries keep: transformers' detectors, detectron2."""
    cls: Any = type(module)
    held = {*module._buffers} - {"num_batches_tracked"}
    bare = held == {*_FROZEN} and not module._parameters and not module._modules
    return bare and cls.__name__.endswith("FrozenBatchNorm2d") and _acts_frozen(cls)


@functools.cache
def _acts_frozen(cls: Any) -> bool:
    """Whether instances of a class compute what its name says: told by one of three channels, since the code is anybody's."""
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


def eps_of(norm: nn.Module) -> float:
    """What a norm adds to the variance; a frozen copy without `eps` has torch's default in its code."""
    return float(getattr(norm, "eps", 1e-5))


def _obstacle(module: nn.Module, base: type[nn.Module]) -> str:
    for method in ("forward", "_conv_forward", "__call__", "_call_impl"):
        own = getattr(type(module), method, None) is not getattr(base, method, None)
        if method in vars(module) or (own and not (method == "forward" and type(module) in _known_forwards())):
            return f"has a {method} of its own, so it may do more than {base.__name__}"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "belongs to an attention layer, which reads its weight directly"
    if extra := sorted(_own_names(type(module), base)):
        return f"has methods of its own ({', '.join(extra[:3])}) beyond {base.__name__}"
    if any("__slots__" in vars(cls) and vars(cls)["__slots__"] for cls in type(module).__mro__):
        return "has __slots__, so its class cannot be exchanged"
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and tensor.is_inference():
            return "was made in inference mode, so its tensors cannot be changed"
        if tensor is not None and torch._debug_has_internal_overlap(tensor) == 1:
            return "has a tensor whose elements share memory (expand)"
    if parametrize.is_parametrized(module):
        normalized = any("WeightNorm" in type(p).__name__ for ps in module.parametrizations.values() for p in ps)  # type: ignore[union-attr, operator]
        return (
            "is weight-normalized already, by torch's parametrization" if normalized else "has a parametrization on it"
        )
    if any("WeightNorm" in type(hook).__name__ for hook in module._forward_pre_hooks.values()):
        return "is weight-normalized already, by torch's old weight_norm"
    if base in PLAIN:
        return ""
    for name in ("weight", "bias"):
        held = name in module._parameters or name in module._buffers
        if not held and isinstance(getattr(module, name, None), torch.Tensor):
            return f"has a {name} that is computed (weight_norm, spectral_norm or a pruning mask)"
    return ""


def _own_names(cls: type[nn.Module], base: type[nn.Module]) -> set[str]:
    """Public methods that a subclass adds to a known class, and that an exchanged class would lose."""
    above = cls.__mro__[: cls.__mro__.index(base)]
    return {
        name
        for c in above
        for name, value in vars(c).items()
        if callable(value) and name[0] != "_" and not hasattr(base, name)
    }


def find_sites(model: nn.Module) -> list[Site]:
    """Every norm and weight layer of `model`, in order of registration, each with all its paths."""
    paths: dict[int, list[str]] = defaultdict(list)
    modules: dict[int, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths[id(module)].append(path)
        modules[id(module)] = module
    found = ((module, tuple(paths[key]), classify(module)) for key, module in modules.items())
    sites = [Site(module, where, *what) for module, where, what in found if what is not None]
    owners = {
        child: site for site in sites if site.obstacle for child in site.module.modules() if child is not site.module
    }
    return [
        replace(s, obstacle=f"is part of {owners[s.module].name}, which may read it directly")
        if s.module in owners
        else s
        for s in sites
    ]


@functools.cache
def own_attributes(base: Any) -> dict[str, frozenset[str]]:
    """The names that an instance of a norm's class has by itself, as attributes, parameters, buffers and children."""
    fresh = base(1, 1) if issubclass(base, BatchChannelNorm | nn.GroupNorm) else base(1)
    tensors = {kind: frozenset(getattr(fresh, kind)) for kind in ("_parameters", "_buffers")}
    return {"": frozenset(vars(fresh)), "_modules": frozenset()} | tensors  # an activation in a norm is carried over


def hidden_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that stand in plain attributes, lists, tuples or dicts, where torch does not see them."""
    registered = {id(module) for module in model.modules()}

    def search(path: str, value: Any, depth: int) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(value, nn.Module):
            if id(value) not in registered:
                registered.add(id(value))
                yield path, value
        elif depth and isinstance(value, list | tuple | set | frozenset):
            for index, item in enumerate(value):
                yield from search(f"{path}[{index}]", item, depth - 1)
        elif depth and isinstance(value, dict):
            for key, item in value.items():
                yield from search(f"{path}[{key!r}]", item, depth - 1)

    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in MODULE_STATE:
                yield from search(f"{path}.{name}".lstrip("."), value, 2)
