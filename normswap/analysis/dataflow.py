"""Read-only: what feeds what, as far as a trace of the forward tells."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from normswap.analysis.bytecode import reaches_into
from normswap.analysis.copies import skeleton
from normswap.analysis.known_norms import WEIGHT_LAYERS
from normswap.analysis.sites import Site
from normswap.analysis.tracing import TracedGraph, trace
from normswap.layers.reparametrized import LAYERS, TRANSPOSED

_LINEAR_MAPS = (*WEIGHT_LAYERS, nn.Bilinear, nn.MultiheadAttention, nn.Embedding)
_FUNCTIONAL_NORMS = {F.batch_norm, F.group_norm, F.layer_norm, F.instance_norm, torch.batch_norm, torch.group_norm}
_FUNCTIONAL_MAPS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear,
    torch.conv1d, torch.conv2d, torch.conv3d, torch.matmul, torch.bmm, torch.einsum,
}  # fmt: skip
_HARMLESS_READS = {"shape", "dtype", "device", "ndim", "size", "dim", "is_cuda"}


@dataclass
class Flow:
    """What feeds what, as far as the forward could be traced. Sites are named by their first path.

    `readers[w]` lists the norm behind each use of a weight layer's output, None for any other
    use; `writers[n]` likewise the weight layer before each call of a norm. `single` and `spatial` are
    norms whose input has one element a channel, or more; `flat` those whose input is (N, C); `first` weight layers
    that read the model's input. `between` has, for each site, the site before it (None: none, or several) and the names of the
    non-linearities and dropouts between the two, from the last to the first; `calls` how often one forward calls it. `complete` are sites all of whose
    uses are known, `touched` those whose tensors some forward reads directly, `functional` norms that
    no module holds, `problems` what stood in the way, by module path.
    """

    readers: dict[str, list[str | None]] = field(default_factory=lambda: defaultdict(list))
    writers: dict[str, list[str | None]] = field(default_factory=lambda: defaultdict(list))
    normed: set[str] = field(default_factory=set)
    single: set[str] = field(default_factory=set)
    spatial: set[str] = field(default_factory=set)
    flat: set[str] = field(default_factory=set)
    first: set[str] = field(default_factory=set)
    between: dict[str, set[tuple[str | None, tuple[str, ...]]]] = field(default_factory=lambda: defaultdict(set))
    calls: dict[str, int] = field(default_factory=dict)
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
    norms = {site.path for site in sites if site.kind == "norm"}
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
        if type(module) is nn.MultiheadAttention:  # known, and has more branches than can be followed
            flow.touched |= below[path]
            return
        if not below[path] & flow.complete and type(module).forward is not nn.Module.forward:
            traced = trace(module, lambda m: id(m) in leaves)
            if traced.problem:
                flow.problems[path] = traced.problem
                doubted.update(_reached_into(module, path, below[path]))
            for run in traced.graphs:
                _Reader(run, module, path, first, norms, flow, hooked).read(traced.complete)
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
    unreached = {site.path.rpartition(".")[0] for site in sites if site.form and not flow.seen(site.path)}
    flow.complete -= {path for path in flow.complete if path.rpartition(".")[0] in unreached}


def _guess_unseen(flow: Flow, sites: list[Site]) -> None:
    """A convolution that no trace reached counts as normed when its next sibling is a norm of its width."""
    for site, following in pairwise(sites):
        siblings = site.path.rpartition(".")[0] == following.path.rpartition(".")[0]
        pair = site.kind == "weight" and following.form and siblings
        if pair and not flow.seen(site.path) and site.channels == following.channels:
            flow.normed.add(site.path)


class _Reader:
    """Reads one traced graph into a `Flow`."""

    def __init__(
        self,
        run: TracedGraph,
        root: nn.Module,
        prefix: str,
        first: dict[str, str],
        norms: set[str],
        flow: Flow,
        hooked: set[int],
    ):
        self.nodes = list(run.graph.nodes)
        self.left_behind = run.left_behind
        self.prefix, self.first, self.norms, self.flow = prefix, first, norms, flow
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.hooked = {path for path, module in self.modules.items() if id(module) in hooked}
        self.behind: dict[fx.Node, bool] = {}  # whether a norm comes before the next weight layer
        self.single: dict[fx.Node, bool | None] = {}
        self.flat: dict[fx.Node, bool] = {}

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _site(self, node: fx.Node) -> str | None:
        if node.op != "call_module":
            return None
        return self.first.get(f"{self.prefix}.{node.target}".lstrip("."))

    def _is_identity(self, node: fx.Node) -> bool:
        return type(self._module(node)) is nn.Identity and str(node.target) not in self.hooked

    def _is_norm(self, node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target in _FUNCTIONAL_NORMS
        return self._site(node) in self.norms

    def _is_map(self, node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target in _FUNCTIONAL_MAPS
        return isinstance(self._module(node), _LINEAR_MAPS)

    def read(self, complete: bool) -> None:
        inner = [node for node in self.nodes if node.op not in ("placeholder", "output")]
        self.perceptron = complete and not self.prefix and all(self._keeps_shape(node) for node in inner)
        for node in self.nodes:
            self._read_access(node)
            self.single[node] = self._is_single(node)
            self.flat[node] = self._is_flat(node)
        for node in reversed(self.nodes):
            users = node.users
            self.behind[node] = any(self._is_norm(u) or (not self._is_map(u) and self.behind[u]) for u in users)
        behind_map: dict[fx.Node, bool] = {}
        for node in self.nodes:
            sources = node.all_input_nodes
            behind_map[node] = any(behind_map[source] or self._is_map(source) for source in sources)
        called = Counter(path for node in self.nodes if (path := self._site(node)) is not None)
        for path, times in called.items():
            self.flow.calls[path] = max(times, self.flow.calls.get(path, 0))
        for node in self.nodes:
            path = self._site(node)
            if path is None:
                continue
            if complete:
                self.flow.complete.add(path)
            self.flow.between[path].add(self._between(node))
            if not self.prefix and self._is_map(node) and not behind_map[node]:
                self.flow.first.add(path)
            if self._is_norm(node):
                self.flow.writers[path].append(self._writer(node))
                if (single := self.single[node]) is not None:
                    (self.flow.single if single else self.flow.spatial).add(path)
                if self.flat[node]:
                    self.flow.flat.add(path)
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

    def _between(self, node: fx.Node) -> tuple[str | None, tuple[str, ...]]:
        """The site before a node, and what non-linearities and dropouts stand between them."""
        names, source = [], _input(node)
        while source is not None and (self._is_identity(source) or self._shaping(source)):
            names += [] if self._is_identity(source) else [self._shaping(source)]
            source = _input(source)
        return (None if source is None else self._site(source)), tuple(names)

    def _shaping(self, node: fx.Node) -> str:
        """The name of a non-linearity or of a dropout that drops something; "" for any other node."""
        module = self._module(node)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            return type(module).__name__ if module.p > 0 else ""
        if module is not None:
            inside = type(module).__module__ == "torch.nn.modules.activation"
            return type(module).__name__ if inside and not isinstance(module, nn.MultiheadAttention) else ""
        if node.target in _DROPOUTS:
            chance = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            return "" if chance == 0 else str(getattr(node.target, "__name__", node.target))
        return str(getattr(node.target, "__name__", node.target)) if node.target in _NON_LINEAR else ""

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

    def _is_flat(self, node: fx.Node) -> bool:
        """Whether the value is (N, C): made so, or the input of a model that is nothing but a multilayer perceptron."""
        module = self._module(node)
        if isinstance(module, nn.Flatten):
            return (module.start_dim, module.end_dim) == (1, -1)
        if node.target in (torch.flatten, "flatten"):
            return node.args[1:] == (1,) and not node.kwargs
        if node.op == "placeholder":
            return self.perceptron
        return self._keeps_shape(node) and all(self.flat.get(source, False) for source in node.all_input_nodes)

    def _keeps_shape(self, node: fx.Node) -> bool:
        """Whether the value has the dimensions of what it is made from, the size of the last one apart."""
        if node.op != "call_module":
            return node.target in _POINTWISE
        module = self._module(node)
        where = type(module).__module__
        pointwise = where in ("torch.nn.modules.activation", "torch.nn.modules.dropout")
        known = isinstance(module, nn.Linear | nn.Identity) or pointwise or self._is_norm(node)
        return known and not isinstance(module, nn.MultiheadAttention)


_NON_LINEAR: set[Any] = {
    torch.relu, torch.relu_, torch.tanh, torch.sigmoid, F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.silu, F.gelu, F.mish, F.softplus,
    F.hardswish, F.tanh, F.sigmoid, "relu", "relu_", "tanh", "sigmoid",
}  # fmt: skip
_DROPOUTS: set[Any] = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout}
_POINTWISE: set[Any] = {
    *_NON_LINEAR, *_DROPOUTS, operator.add, operator.iadd, operator.sub, operator.mul, torch.add, torch.mul, "add", "mul",
}  # fmt: skip
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
