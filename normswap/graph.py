"""Read-only: which norms and weights a model has, under which names, and what feeds what."""

from __future__ import annotations

import functools
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from normswap.layers import ACTIVATED, BatchChannelNorm, EstimatedBatchNorm, FrozenBatchNorm
from normswap.trace import reaches_into, skeleton, trace
from normswap.weights import LAYERS, PLAIN, TRANSPOSED

BATCH_NORMS: dict[type[nn.Module], int | None] = {
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    nn.SyncBatchNorm: None,
    FrozenBatchNorm: None,
    EstimatedBatchNorm: None,
}
"""The sources of a conversion, and how many spatial dimensions each takes (None: any)."""
WEIGHTS: tuple[type[nn.Module], ...] = (*PLAIN, *(cls for classes in LAYERS.values() for cls in classes))
_OTHER_NORMS = (
    BatchChannelNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.LocalResponseNorm, nn.CrossMapLRN2d,
)  # fmt: skip
_LINEAR_MAPS = (*WEIGHTS, nn.Bilinear, nn.MultiheadAttention, nn.Embedding)
_FUNCTIONAL_NORMS = {F.batch_norm, F.group_norm, F.layer_norm, F.instance_norm, torch.batch_norm, torch.group_norm}
_FUNCTIONAL_MAPS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear,
    torch.conv1d, torch.conv2d, torch.conv3d, torch.matmul, torch.bmm, torch.einsum,
}  # fmt: skip
_HARMLESS_READS = {"shape", "dtype", "device", "ndim", "size", "dim", "is_cuda"}


def batch_norms() -> dict[type[nn.Module], int | None]:
    """`BATCH_NORMS` with those of libraries; a model can hold these only if the library is imported."""
    found = dict(BATCH_NORMS)
    if (misc := sys.modules.get("torchvision.ops.misc")) is not None:
        found[misc.FrozenBatchNorm2d] = 2
    if (acts := sys.modules.get("timm.layers.norm_act")) is not None:
        found[acts.FrozenBatchNormAct2d] = 2
    return found


def activated() -> set[type[nn.Module]]:
    """Norms with children `drop` and `act` that run behind them: timm's, and what they become here."""
    acts = sys.modules.get("timm.layers.norm_act")
    theirs = () if acts is None else (acts.BatchNormAct2d, acts.SyncBatchNormAct, acts.FrozenBatchNormAct2d)
    return {*ACTIVATED.values(), *theirs}


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
        """Channels that a batch norm normalizes or that a weight layer puts out."""
        for attribute in ("num_features", "out_channels", "out_features", "num_channels", "hidden_size"):
            if isinstance(size := getattr(self.module, attribute, None), int):
                return size
        return int(self.module.running_mean.numel())  # type: ignore[union-attr, operator]  # torchvision's frozen norm

    @property
    def spatial_dims(self) -> int | None:
        if isinstance(self.module, FrozenBatchNorm | EstimatedBatchNorm):
            return self.module.spatial_dims
        return batch_norms().get(self.base) if self.base else None

    @property
    def layer_kind(self) -> str:
        """ "conv", "linear" or "rnn" of a weight layer; "conv" for one that only looks like a convolution."""
        plain = PLAIN.get(self.base, self.base) if self.base else None
        return next((kind for kind, classes in LAYERS.items() if plain in classes), "conv")

    @property
    def is_activated(self) -> bool:
        """Whether the norm has an activation of its own behind it, in its children `drop` and `act`."""
        return type(self.module) in activated()

    @property
    def is_batch_norm(self) -> bool:
        return self.base in batch_norms()


def _classify(module: nn.Module) -> tuple[str, type[nn.Module] | None, str] | None:
    """(kind, base, obstacle) of a module that a report must name, or None for any other."""
    norms, name = (*batch_norms(), *_OTHER_NORMS), type(module).__name__
    base = next((cls for cls in type(module).__mro__ if cls in norms or cls in WEIGHTS), None)
    if base is None:
        if type(module).__module__.startswith("torch.nn.utils."):  # the formulas of parametrizations
            return None
        looks_normed = isinstance(getattr(module, "running_mean", None), torch.Tensor)
        leaf = not any(True for _ in module.children())
        if looks_normed or (leaf and re.search("norm", name, re.IGNORECASE)):
            return "norm", None, f"{name} is not a class that normswap knows"
        weight = module._parameters.get("weight")
        if leaf and weight is not None and re.search("conv", name, re.IGNORECASE):
            return "weight", None, f"{name} is not a class that normswap knows"
        return None
    return "norm" if base in norms else "weight", base, _obstacle(module, base)


def _obstacle(module: nn.Module, base: type[nn.Module]) -> str:
    for method in ("forward", "_conv_forward", "__call__", "_call_impl"):
        own = getattr(type(module), method, None) is not getattr(base, method, None)
        if method in vars(module) or (own and not (method == "forward" and type(module) in activated())):
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
    found = ((module, tuple(paths[key]), _classify(module)) for key, module in modules.items())
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
            if name not in _MODULE_STATE:
                yield from search(f"{path}.{name}".lstrip("."), value, 2)


_MODULE_STATE = set(vars(nn.Module()))


@dataclass
class Flow:
    """What feeds what, as far as the forward could be traced. Sites are named by their first path.

    `readers[w]` lists the norm behind each use of a weight layer's output, None for any other
    use; `writers[n]` likewise the weight layer before each call of a norm. `single` and `spatial` are
    norms whose input has one element a channel, or more. `complete` are sites all of whose
    uses are known, `touched` those whose tensors some forward reads directly, `functional` norms that
    no module holds, `problems` what stood in the way, by module path.
    """

    readers: dict[str, list[str | None]] = field(default_factory=lambda: defaultdict(list))
    writers: dict[str, list[str | None]] = field(default_factory=lambda: defaultdict(list))
    normed: set[str] = field(default_factory=set)
    single: set[str] = field(default_factory=set)
    spatial: set[str] = field(default_factory=set)
    touched: set[str] = field(default_factory=set)
    complete: set[str] = field(default_factory=set)
    functional: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def seen(self, path: str) -> bool:
        return path in self.readers or path in self.writers

    def _why(self, path: str) -> str:
        """What stood in the way of tracing the nearest module around `path`."""
        while path:
            path = path.rpartition(".")[0]
            if path in self.problems:
                return f" ({self.problems[path][:100]})"
        return ""

    def feeder(self, norm: str) -> tuple[str | None, str]:
        """The one layer whose output the norm reads and nothing else does; or None, and why."""
        if norm not in self.complete:
            return None, f"what comes before it could not be traced{self._why(norm)}"
        writers = set(self.writers[norm])
        if None in writers:
            return None, "no convolution or linear layer directly before it"
        if len(writers) > 1:
            return None, "more than one layer before it"
        (writer,) = writers
        assert writer is not None  # for the type checker: None was excluded above
        if writer not in self.complete or set(self.readers[writer]) != {norm}:
            return None, "the layer before it has other readers"
        return writer, ""


def find_flow(model: nn.Module, sites: Iterable[Site]) -> Flow:
    """Trace `model`, or its largest parts that can be traced, and read off what feeds what."""
    flow, sites = Flow(), list(sites)
    first = {path: site.path for site in sites for path in site.paths}
    try:
        bones = skeleton(model)
    except Exception as error:  # an attribute of the model that cannot be copied: no dataflow, and the report says so
        flow.problems[""] = f"cannot be copied for tracing: {error}"
        return flow
    modules = dict(bones.named_modules(remove_duplicate=False))
    leaves = {id(modules[path]) for path in first}
    hooked = {
        id(modules[path])
        for path, module in model.named_modules(remove_duplicate=False)
        if path and (module._forward_hooks or module._forward_pre_hooks)
    }
    leaves |= hooked  # what hooks do to a value is not in any forward
    below: dict[str, set[str]] = defaultdict(set)  # the sites below each module that holds some
    for path, name in first.items():
        parts = path.split(".")
        for end in range(len(parts)):
            below[".".join(parts[:end])].add(name)

    def visit(module: nn.Module, path: str) -> None:
        """Trace a module none of whose sites is known yet, then the parts that it does not reach."""
        if not below[path] & flow.complete and type(module).forward is not nn.Module.forward:
            traced = trace(module, lambda m: id(m) in leaves)
            if traced.problem:
                flow.problems[path] = traced.problem
                doubted.update(_reached_into(module, path, below[path]))
            for graph in traced.graphs:
                _Reader(graph, module, path, first, flow, hooked).read(traced.complete)
        for name, child in module.named_children():
            inner = f"{path}.{name}".lstrip(".")
            if inner not in first and not below[inner] <= flow.complete:
                visit(child, inner)

    doubted: set[str] = set()  # sites that a forward which could not be traced may use by itself
    if "" not in first:
        visit(bones, "")
    flow.complete -= doubted
    _doubt_unreached(flow, sites)
    _guess_unseen(flow, sites)
    return flow


def _reached_into(module: nn.Module, path: str, sites: Iterable[str]) -> Iterator[str]:
    """Those of the sites below a module that its code may use past their parent's forward: `self.block.conv(x)`, or
    `self.block.features(x)`, a method that runs any of them.
    """
    pairs = reaches_into(type(module))  # type: ignore[arg-type]
    opened = {
        name
        for name, child in module.named_children()
        for owner, attribute in pairs
        if owner == name and attribute != "forward" and callable(getattr(type(child), attribute, None))
    }
    for site in sites:
        parts = site.removeprefix(path).strip(".").split(".")
        if parts[0] in opened or pairs & set(pairwise(parts)):
            yield site


def _doubt_unreached(flow: Flow, sites: list[Site]) -> None:
    """Where a forward passes one norm by, it may have chosen its neighbour: nothing is complete beside it."""
    unreached = {site.path.rpartition(".")[0] for site in sites if site.is_batch_norm and not flow.seen(site.path)}
    flow.complete -= {path for path in flow.complete if path.rpartition(".")[0] in unreached}


def _guess_unseen(flow: Flow, sites: list[Site]) -> None:
    """A convolution that no trace reached counts as normed when its next sibling is a norm of its width."""
    for site, following in pairwise(sites):
        siblings = site.path.rpartition(".")[0] == following.path.rpartition(".")[0]
        pair = site.kind == "weight" and following.is_batch_norm and siblings
        if pair and not flow.seen(site.path) and site.channels == following.channels:
            flow.normed.add(site.path)


class _Reader:
    """Reads one traced graph into a `Flow`."""

    def __init__(
        self, graph: fx.Graph, root: nn.Module, prefix: str, first: dict[str, str], flow: Flow, hooked: set[int]
    ):
        self.nodes = list(graph.nodes)
        self.left_behind: set[fx.Node] = getattr(graph, "_left_behind", set())
        self.prefix, self.first, self.flow = prefix, first, flow
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.hooked = {path for path, module in self.modules.items() if id(module) in hooked}
        self.behind: dict[fx.Node, bool] = {}  # whether a norm comes before the next weight layer
        self.single: dict[fx.Node, bool | None] = {}

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _site(self, node: fx.Node) -> str | None:
        if node.op != "call_module":
            return None
        return self.first.get(f"{self.prefix}.{node.target}".lstrip("."))

    def _is_identity(self, node: fx.Node) -> bool:
        return type(self._module(node)) is nn.Identity and str(node.target) not in self.hooked

    def _is_norm(self, node: fx.Node) -> bool:
        module = self._module(node)
        if module is None:
            return node.op == "call_function" and node.target in _FUNCTIONAL_NORMS
        what = _classify(module)
        return what is not None and what[0] == "norm"

    def _is_map(self, node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target in _FUNCTIONAL_MAPS
        return isinstance(self._module(node), _LINEAR_MAPS)

    def read(self, complete: bool) -> None:
        for node in self.nodes:
            self._read_access(node)
            self.single[node] = self._is_single(node)
        for node in reversed(self.nodes):
            users = node.users
            self.behind[node] = any(self._is_norm(u) or (not self._is_map(u) and self.behind[u]) for u in users)
        for node in self.nodes:
            path = self._site(node)
            if path is None:
                continue
            if complete:
                self.flow.complete.add(path)
            if self._is_norm(node):
                self.flow.writers[path].append(self._writer(node))
                if (single := self.single[node]) is not None:
                    (self.flow.single if single else self.flow.spatial).add(path)
            else:
                self.flow.readers[path] += self._readers(node)
                if self.behind[node]:
                    self.flow.normed.add(path)

    def _read_access(self, node: fx.Node) -> None:
        """Note tensors of sites that a forward reads itself, and norms called as functions."""
        if node.op == "get_attr":
            owner = f"{self.prefix}.{str(node.target).rpartition('.')[0]}".strip(".")
            if owner in self.first:
                self.flow.touched.add(self.first[owner])
        elif node.op == "call_function" and node.target in _FUNCTIONAL_NORMS:
            stack = node.meta.get("nn_module_stack") or {}
            inner = next(reversed(stack), "")
            where = f"{self.prefix}.{inner}".strip(".")
            self.flow.functional[where] = getattr(node.target, "__name__", str(node.target))

    def _writer(self, node: fx.Node) -> str | None:
        """The weight layer whose output is the whole input of this call of a norm."""
        source = _input(node)
        while source is not None and self._is_identity(source):
            source = _input(source)
        return self._site(source) if source is not None and not self._is_norm(source) else None

    def _readers(self, node: fx.Node) -> list[str | None]:
        """The norm behind each use of a weight layer's output; None for every other use."""
        found: list[str | None] = []
        for user in node.users:
            if self._is_identity(user):
                found += self._readers(user)
            elif not _reads_shape_only(user):
                found.append(self._site(user) if self._is_norm(user) and _input(user) is node else None)
        return found if node not in self.left_behind else [*found, None]

    def _is_single(self, node: fx.Node) -> bool | None:
        """Whether the value has one element per sample and channel (None: not known)."""
        module = self._module(node)
        inputs = [self.single[source] for source in node.all_input_nodes if source in self.single]
        before = True if inputs and all(inputs) else (False if False in inputs else None)
        if isinstance(module, nn.Linear | nn.Flatten) or node.target in (torch.flatten, "flatten"):
            return True
        if isinstance(module, nn.modules.pooling._AdaptiveAvgPoolNd | nn.modules.pooling._AdaptiveMaxPoolNd):
            return _all_ones(module.output_size)
        if node.target in _ADAPTIVE_POOLS and len(node.args) > 1:
            return _all_ones(node.args[1])
        if node.target in ("mean", torch.mean):
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            return True if dims in ([2, 3], (2, 3), [-2, -1], (-2, -1), [-1, -2], (-1, -2)) else None
        if isinstance(module, LAYERS["conv"]):
            pointwise = _all_ones(module.kernel_size) and not isinstance(module, TRANSPOSED)
            return bool(before and pointwise)
        if node.target in _RESHAPES or isinstance(module, nn.Unflatten | nn.Upsample):
            return None
        return before


_ADAPTIVE_POOLS = {
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
}  # fmt: skip
_RESHAPES: set[Any] = {
    "view", "reshape", "permute", "transpose", "unsqueeze", "expand", "repeat", "size",
    torch.reshape, torch.permute, torch.transpose, torch.unsqueeze, F.interpolate,
}  # fmt: skip


def _all_ones(size: Any) -> bool:
    return all(length == 1 for length in (size if isinstance(size, tuple | list) else (size,)))


def _input(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, fx.Node) else None


def _reads_shape_only(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _HARMLESS_READS
    return node.op == "call_function" and node.target is getattr and node.args[1] in _HARMLESS_READS


@functools.cache
def own_attributes(base: Any) -> dict[str, frozenset[str]]:
    """The names that an instance of a norm's class has by itself, as attributes, parameters, buffers and children."""
    fresh = base(1, 1) if issubclass(base, BatchChannelNorm | nn.GroupNorm) else base(1)
    return (
        {"": frozenset(vars(fresh))}
        | {kind: frozenset(getattr(fresh, kind)) for kind in ("_parameters", "_buffers")}
        | {"_modules": frozenset()}
    )  # no norm has children of its own; an activation in one is carried over
