"""Reads one traced graph of a part of a model into a `Flow`."""

from collections import Counter

from torch import fx, nn

from normswap.analysis import batch_axis, operations, ranks, time_axis
from normswap.analysis.connections import Connections
from normswap.analysis.flow import Flow
from normswap.analysis.sites import Site
from normswap.analysis.traced_part import TracedPart
from normswap.analysis.tracing import TracedGraph
from normswap.layers.reparametrized import LAYERS, TRANSPOSED


class GraphReader:
    """One graph, whose nodes stand in the order in which they run: each before those that use its value."""

    def __init__(self, run: TracedGraph, part: TracedPart):
        self.part, self.connections = part, Connections(run, part)
        self.nodes = list(run.graph.nodes)
        self._modules = {node: part.module_of(node) for node in self.nodes}
        self._sites = {node: part.site_of(node) for node in self.nodes}
        self.ranks = ranks.possible_ranks(self.nodes, self._layer)

    # ---- what a node is ----

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[node]

    def _site(self, node: fx.Node) -> Site | None:
        return self._sites[node]

    def _serves_own_call(self, node: fx.Node) -> bool:
        """Whether a node is a tensor of such a layer that this call alone reads, or what is made of it for the call."""
        made = node.op == "get_attr" or node.target in operations.REPARAMETRIZATIONS
        return (
            made
            and bool(node.users)
            and all(self.part.is_own_call(user) or self._serves_own_call(user) for user in node.users)
        )

    def _layer(self, node: fx.Node) -> ranks.Layer:
        """What a node calls, as far as that is the layer alone and not what hooks, or its own forward, make of it."""
        module = self._module(node)
        more = id(module) in self.part.hooked or self.part.norms_in(node)
        return ranks.Layer(None, None) if more else ranks.Layer(module, self._site(node))

    def _is_identity(self, node: fx.Node) -> bool:
        module = self._module(node)
        return type(module) is nn.Identity and id(module) not in self.part.hooked

    def _is_norm(self, node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target in operations.FUNCTIONAL_NORMS
        site = self._site(node)
        return site is not None and site.kind == "norm"

    def _is_weighted(self, node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target in operations.WEIGHTED_FUNCTIONS
        return isinstance(self._module(node), operations.WEIGHTED_MODULES)

    # ---- the whole graph ----

    def flow(self, complete: bool) -> Flow:
        """What the graph tells. `complete` says whether the graphs that were traced are all that the forward can do."""
        flow = Flow()
        norm_ahead, weights_before = self._norm_ahead(), self._weights_before()
        single, along_time = self._single(), time_axis.near_causal_layers(self.nodes, self._module)
        called = [(node, site) for node in self.nodes if (site := self._site(node)) is not None]
        flow.calls = Counter(site.path for _, site in called)
        for node in self.nodes:
            self._note_direct_access(node, flow)
        for node in self.nodes:
            for norm in self.part.norms_in(node):
                flow.calls[norm] += 1
                if (one := single[node]) is not None:
                    (flow.single if one else flow.spatial).add(norm)
        for node, site in called:
            path = site.path
            before, shapings = self._between(node)
            flow.between[path].add((before, shapings))
            flow.beside[path].append(self.connections.beside(node))
            # Only the whole model's input is the user's; that of a part may be anything.
            if not self.part.path and self._is_weighted(node) and not weights_before[node]:
                flow.first.add(path)
            if site.kind == "norm":
                flow.writers[path].append(self.connections.writers(node))
                flow.followers[path] += self.connections.followers(node)
                if (flattened := self.connections.flattened(node)) is not None:
                    flow.flattened[path] |= self.ranks.get(flattened, ranks.ANY_RANK)
                if (one := single[node]) is not None:
                    (flow.single if one else flow.spatial).add(path)
                possible = self.ranks.get(operations.input_of(node), ranks.ANY_RANK)  # type: ignore[arg-type]
                flow.ranks[path] |= possible
                read = operations.input_of(node)
                if site.has_channels and batch_axis.holds_samples_in_channels(read, site.channels, self._channels):
                    flow.mixing.add(path)
                if node in along_time and possible != {2} and site.form in time_axis.APART:
                    flow.along_time[path] = time_axis.CAUSAL
            else:
                flow.readers[path] += self.connections.readers(node)
                flow.norms_before[path].append(self.connections.norm_before(node))
                if norm_ahead[node]:
                    flow.normed.add(path)
        return flow

    def _norm_ahead(self) -> dict[fx.Node, bool]:
        """Whether the value of a node reaches a norm before another weight layer, on some way."""
        ahead: dict[fx.Node, bool] = {}
        for node in reversed(self.nodes):
            ahead[node] = any(self._is_norm(u) or (not self._is_weighted(u) and ahead[u]) for u in node.users)
        return ahead

    def _weights_before(self) -> dict[fx.Node, bool]:
        """Whether a weight layer has a part in what a node reads."""
        before: dict[fx.Node, bool] = {}
        for node in self.nodes:
            before[node] = any(before[source] or self._is_weighted(source) for source in node.all_input_nodes)
        return before

    def _note_direct_access(self, node: fx.Node, flow: Flow) -> None:
        """Tensors of sites that a forward reads itself, and norms called as functions."""
        if node.op == "get_attr":
            owner = self.part.site(str(node.target).rpartition(".")[0])
            if owner is not None and not self._serves_own_call(node):
                flow.touched.add(owner.path)
        elif node.op == "call_function" and node.target in operations.FUNCTIONAL_NORMS:
            stack = node.meta.get("nn_module_stack") or {}
            inner = next(reversed(stack), "")  # the innermost module that was running
            flow.functional[f"{self.part.path}.{inner}".strip(".")] = operations.name_of(node)

    # ---- what stands around a site ----

    def _between(self, node: fx.Node) -> tuple[str | None, tuple[str, ...]]:
        """The site before a node, and what non-linearities and dropouts stand between them."""
        names, source = [], operations.input_of(node)
        while source is not None:
            name = operations.shaping(source, self._module(source))
            if not name and not self._is_identity(source):
                break
            names += [name] if name else []
            source = operations.input_of(source)
        site = None if source is None else self._site(source)
        return (site.path if site else None), tuple(names)

    def _channels(self, node: fx.Node) -> int | None:
        """How many channels the site before a node gives, where that is the only one."""
        site = self.part.sites.get(self._between(node)[0] or "")
        return site.channels if site is not None and site.has_channels else None

    # ---- the shape of values ----

    def _single(self) -> dict[fx.Node, bool | None]:
        """Whether the value of each node has one element a sample and channel; None where that is not known."""
        single: dict[fx.Node, bool | None] = {}
        for node in self.nodes:
            inputs = [single[source] for source in node.all_input_nodes]
            before = True if inputs and all(inputs) else (False if False in inputs else None)
            single[node] = self._stays_single(node, before)
        return single

    def _stays_single(self, node: fx.Node, before: bool | None) -> bool | None:
        """`_single` of a node, where `before` says it of what it reads."""
        module = self._module(node)
        if isinstance(module, nn.Linear | nn.Flatten) or node.target in operations.FLATTENINGS:
            return True if 2 in self.ranks[node] else None  # (N, C), unless something shows that it is not
        if (pooled := operations.pools_to_one(node, module)) is not None:
            return pooled
        if (mean := operations.is_spatial_mean(node)) is not None:
            return True if mean else None
        if isinstance(module, LAYERS["conv"]):
            pointwise = operations.all_ones(module.kernel_size) and not isinstance(module, TRANSPOSED)
            return bool(before and pointwise)
        if node.target in operations.RESHAPES or isinstance(module, nn.Unflatten | nn.Upsample):
            return None
        return before
