"""Read-only: which norms and weights a model has, and under which names."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normswap.analysis import known_norms
from normswap.analysis.copies import MODULE_STATE
from normswap.analysis.holders import only_called
from normswap.analysis.obstacles import obstacle_of
from normswap.analysis.statistics import NEGATIVE, NOT_FINITE, statistics_of
from normswap.layers.norms import BatchChannelNorm, EstimatedBatchNorm, FrozenBatchNorm, PositionNorm
from normswap.layers.recurrent import LAYER_NORMALIZED
from normswap.layers.reparametrized import LAYERS, PLAIN

_CONTAINERS = (list, tuple, set, frozenset, dict)
_HOLDING = (nn.Module, *_CONTAINERS)  # what may be a hidden module, or hold one
SiteKind = Literal["norm", "weight"]
NormForm = Literal["data", "batch", "group", "position", "last", "data, group", ""]
"""Over what a norm takes its statistics.

The data (running ones), the batch (a batch norm without running ones), groups of a sample's channels, the channels at
each position of (N, C, H, W), the last dimension, or the data and then groups (a batch-channel norm).
"""


@dataclass(frozen=True, eq=False)
class Site:
    """A place in the model: one normalization or weight layer."""

    module: nn.Module
    paths: tuple[str, ...]
    """Every path that leads to it, in order of registration: a shared module has several."""
    kind: SiteKind
    base: type[nn.Module] | None
    """The known class that it behaves as; None: none."""
    obstacle: str = ""
    """Why it must not be touched; "": it may be."""

    @cached_property
    def path(self) -> str:
        """The first path, by which the site is named."""
        return self.paths[0]

    @property
    def name(self) -> str:
        """The class as the report writes it."""
        return type(self.module).__name__

    @property
    def has_channels(self) -> bool:
        """Whether `channels` is known: it is not of every module that a report names."""
        return bool(self.form) if self.kind == "norm" else self.base is not None

    @property
    def channels(self) -> int:
        """Channels that a norm normalizes or that a weight layer puts out."""
        for attribute in ("num_features", "out_channels", "out_features", "num_channels", "hidden_size"):
            if isinstance(size := getattr(self.module, attribute, None), int):
                return size
        if isinstance(self.module, nn.LayerNorm):
            return self.module.normalized_shape[-1]
        if self.base is PositionNorm:
            return len(self.module.weight)  # type: ignore[arg-type]
        return int(self.module.running_mean.numel())  # type: ignore[union-attr, operator]  # torchvision's frozen norm

    @cached_property
    def spatial_dims(self) -> int | None:
        """How many dimensions the input of a norm has behind (N, C); None: any number, or not known."""
        if isinstance(self.module, FrozenBatchNorm | EstimatedBatchNorm | PositionNorm):
            return self.module.spatial_dims
        if type(self.module) in known_norms.positional():
            return 2
        if self.base is PositionNorm:
            dims = known_norms.position_dims(self.module)
            return dims[0] if len(dims) == 1 else None
        return {**known_norms.SAMPLE_NORMS, **known_norms.batch_norms()}.get(self.base) if self.base else None

    @cached_property
    def form(self) -> NormForm:
        """Over what a norm takes its statistics in eval mode; "" for what is no source of a conversion."""
        if self.base is BatchChannelNorm:
            return "data, group"
        tracked = self.is_batch_norm or getattr(self.module, "track_running_stats", False)
        if self.base and tracked and isinstance(getattr(self.module, "running_mean", None), torch.Tensor):
            return "data"  # an instance norm too goes by running statistics in eval mode, as long as it tracks them
        if self.is_batch_norm:
            return "batch"
        if self.base is nn.LayerNorm:
            return "" if len(self.module.normalized_shape) > 1 else "last"  # type: ignore[arg-type]
        if self.base is PositionNorm:
            return "position"
        return "group" if self.base in known_norms.SAMPLE_NORMS else ""

    @cached_property
    def damage(self) -> str:
        """What is wrong with the tensors of a norm that has a `form`, so that no layer could stand in for it."""
        norm: Any = self.module
        mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
        if not isinstance(getattr(norm, "eps", 0.0), int | float):
            return "has an eps that is not a number"
        tensors = [t for t in (mean, var, norm.weight, norm.bias) if isinstance(t, Tensor)]
        if not all(t.is_floating_point() and t.layout is torch.strided for t in tensors):
            return "has tensors that are not plain floating-point numbers"
        if len({t.is_meta for t in tensors}) > 1:
            return "has some tensors without memory"
        if self.base is not PositionNorm and not all(t.dim() == 1 for t in tensors):
            return "has tensors that are not vectors"
        if any(len(tensor) != self.channels for tensor in tensors if tensor.dim() == 1):
            return "has tensors of different sizes"
        return {NOT_FINITE: "has running statistics that are not finite",
                NEGATIVE: "has a negative running variance"}.get(self.statistics, "")  # fmt: skip

    @cached_property
    def statistics(self) -> str:
        """The state of a norm's running statistics, see `statistics_of`."""
        return statistics_of(self.module)

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
        return type(self.module) in known_norms.activated()

    @property
    def is_batch_norm(self) -> bool:
        return self.base in known_norms.batch_norms()


def classify(module: nn.Module) -> tuple[SiteKind, type[nn.Module] | None, str] | None:
    """(kind, base, obstacle) of a module that a report must name, or None for any other."""
    norms = (*known_norms.batch_norms(), *known_norms.SAMPLE_NORMS, *known_norms.OTHER_NORMS)
    name = type(module).__name__
    base = next((cls for cls in type(module).__mro__ if cls in norms or cls in known_norms.WEIGHT_LAYERS), None)
    if base is None and known_norms.is_frozen_copy(module):
        # Imported only for a model that has them; most do without torchvision.
        from torchvision.ops.misc import FrozenBatchNorm2d

        return "norm", FrozenBatchNorm2d, obstacle_of(module, type(module))
    if base is nn.LayerNorm and type(module) in known_norms.positional():
        return "norm", PositionNorm, obstacle_of(module, nn.LayerNorm)
    if base in (None, nn.LayerNorm) and _is_position_norm(module):
        return "norm", PositionNorm, obstacle_of(module, type(module))
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
    return "norm" if base in norms else "weight", base, obstacle_of(module, base)


def _is_position_norm(module: nn.Module) -> bool:
    """Whether a module with a forward of its own is a position norm, by its name and by what it computes."""
    named = re.search("norm|^LN", type(module).__name__, re.IGNORECASE)
    return bool(named) and type(module).forward is not nn.LayerNorm.forward and bool(known_norms.position_dims(module))


def find_sites(model: nn.Module) -> list[Site]:
    """Every norm and weight layer of `model`, in order of registration, each with all its paths."""
    paths: dict[int, list[str]] = defaultdict(list)
    modules: dict[int, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths[id(module)].append(path)
        modules[id(module)] = module
    found = ((module, tuple(paths[key]), classify(module)) for key, module in modules.items())
    sites = [Site(module, where, *what) for module, where, what in found if what is not None]
    owners = {child: site.name for site in sites for child in _held_fast(site)}
    return [
        replace(s, obstacle=f"is part of {owners[s.module]}, which may read it directly") if s.module in owners else s
        for s in sites
    ]


def _held_fast(site: Site) -> Iterator[nn.Module]:
    """The modules in a site whose own forward may do more with them than call them."""
    inside = [(path, module) for path, module in site.module.named_modules() if path]
    if inside and (site.obstacle or site.kind == "weight"):
        called = only_called(site.module) if site.kind == "weight" else ()
        yield from (module for path, module in inside if path not in called)


def hidden_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that stand in plain attributes, lists, tuples or dicts, where torch does not see them."""
    named = list(model.named_modules())
    registered = {id(module) for _, module in named}

    def search(path: str, value: Any, depth: int) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(value, nn.Module):
            if id(value) not in registered:
                registered.add(id(value))
                yield path, value
        elif depth and isinstance(value, _CONTAINERS):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(item, _HOLDING):
                    yield from search(f"{path}[{key!r}]", item, depth - 1)

    for path, module in named:
        for name, value in vars(module).items():
            if name not in MODULE_STATE and isinstance(value, _HOLDING):
                yield from search(f"{path}.{name}".lstrip("."), value, 2)
