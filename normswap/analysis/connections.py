"""Which norms and weight layers stand next to each other in one traced graph, as far as folding a norm goes."""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import fx, nn

from normswap.analysis import operations
from normswap.analysis.traced_part import TracedPart
from normswap.analysis.tracing import TracedGraph

_IN_PLACE = {operator.iadd, "add_"}
_ADDITIONS = {operator.add, torch.add, "add", *_IN_PLACE}
_MOST_NORMS = 16  # between a layer and a sum, as far as anybody looks


class Branch(NamedTuple):
    """A layer that reads what another site reads, and whose output is added to that one's, by addition alone."""

    layer: str
    norms: tuple[str, ...]
    """The norms between the layer and the sum."""
    written: bool = False
    """Whether what the branch gives takes in the sum, in place: `y = branch(x); y += other(x)`."""


class _Sum(NamedTuple):
    """The last of the additions that a value goes into and nothing else."""

    total: fx.Node
    norms: tuple[str, ...]
    """The norms on the way there."""
    written: bool
    """Whether the first of the additions writes into the value."""


class Connections:
    """What stands next to each norm and weight layer of a graph.

    Seen through, as they hand on what they read: identities, dropouts where they are off in eval mode, and flattenings
    of (N, C, 1, 1) to (N, C), which is what a layer's channels tell where the norm after it has as many.
    """

    def __init__(self, run: TracedGraph, part: TracedPart):
        self.run, self.part = run, part
        # What one value is asked for by each that reads it: every value is followed once.
        self._beside: dict[fx.Node, dict[fx.Node, frozenset[Branch]]] = {}
        self._last: dict[fx.Node, fx.Node] = {}
        self._seen: dict[tuple[fx.Node, bool], fx.Node] = {}

    # ---- a norm behind layers ----

    def writers(self, norm: fx.Node) -> tuple[str, ...] | None:
        """The layers whose outputs, laid behind each other along the channels, a norm reads; None for anything else."""
        source = self._source(norm, flattened=True)
        if source is None or source.op == "placeholder":
            return None
        if not operations.concatenates_channels(source):
            return self._layers([source])
        parts = operations.concatenated(source)
        if not isinstance(parts, tuple | list):  # what another function gives at once: `x.chunk(2)`
            return None
        read = [self._seen_through(part, flattened=False) for part in parts]
        return self._layers(read)

    def flattened(self, norm: fx.Node) -> fx.Node | None:
        """What a norm reads flattened; None where nothing flattens it."""
        source, whole = self._source(norm, flattened=False), self._source(norm, flattened=True)
        return None if whole is source else whole

    def _layers(self, nodes: list[fx.Node]) -> tuple[str, ...] | None:
        sites = [self.part.site_of(node) for node in nodes]
        paths = tuple(site.path for site in sites if site is not None and site.kind == "weight")
        return paths if len(paths) == len(nodes) == len(set(paths)) else None

    def readers(self, node: fx.Node) -> Iterator[str | None]:
        """The norm after each use of a layer's output; None for every other use."""

        def passes(user: fx.Node) -> bool:
            return self._hands_on(user) or self._flattens(user) or operations.concatenates_channels(user)

        for value, user in self._uses(node, passes):
            site = self.part.site_of(user) if user is not None else None
            alone = user is not None and operations.input_of(user) is value
            yield site.path if alone and site is not None and site.kind == "norm" else None

    # ---- a norm before layers ----

    def followers(self, node: fx.Node) -> Iterator[str | None]:
        """The layer behind each use of a norm's output; None for every other use."""
        for value, user in self._uses(node, self._hands_on):
            site = self.part.site_of(user) if user is not None else None
            alone = user is not None and user.all_input_nodes == [value]
            yield site.path if alone and site is not None and site.kind == "weight" else None

    def norm_before(self, layer: fx.Node) -> str | None:
        """The norm whose output a layer reads; None where it reads anything else."""
        source = self._source(layer, flattened=False)
        site = None if source is None else self.part.site_of(source)
        return site.path if site is not None and site.kind == "norm" else None

    # ---- beside a norm or a layer ----

    def beside(self, node: fx.Node) -> frozenset[Branch]:
        """The layers of branches that are parallel to a norm, or to a layer, which is one of them."""
        source, own = self._source(node, flattened=False), self._sum_of(node)
        if source is None or own is None:
            return frozenset()
        site = self.part.site_of(node)
        if site is not None and site.kind == "norm" and (own.norms or own.written):  # an identity could not stand there
            return frozenset()
        if source not in self._beside:
            self._beside[source] = self._branches(source)
        return self._beside[source].get(own.total, frozenset())

    def _branches(self, source: fx.Node) -> dict[fx.Node, frozenset[Branch]]:
        """The layers that read a value and whose output is added up, by the last addition."""
        uses = [user for value in self._handed_on(source, self._hands_on) for user in value.users]
        uses = [user for user in uses if not self._hands_on(user)]
        if any(self._may_write(user) for user in uses):
            return {}
        branches: dict[fx.Node, set[Branch]] = defaultdict(set)
        for node in uses:
            reads = operations.input_of(node)
            alone = reads is not None and self._seen_through(reads, flattened=False) is source
            site, reached = self.part.site_of(node) if alone else None, self._sum_of(node)
            if site is not None and site.kind == "weight" and reached is not None:
                branches[reached.total].add(Branch(site.path, reached.norms, reached.written))
        return {total: frozenset(found) for total, found in branches.items()}

    def _sum_of(self, node: fx.Node) -> _Sum | None:
        """The sum that the value of a node goes into; None where it goes elsewhere, too."""
        norms: list[str] = []
        while (user := self._only_user(node)) is not None:
            site = self.part.site_of(user)
            if operations.input_of(user) is node and site is not None and site.kind == "norm":
                norms.append(site.path)
                if len(norms) > _MOST_NORMS:
                    break
            elif _adds(user):
                written = user.target in _IN_PLACE and user.args[0] is node
                return _Sum(self._last_addition(user), tuple(norms), written)
            elif not self._hands_on(user):
                break
            node = user
        return None

    def _last_addition(self, total: fx.Node) -> fx.Node:
        """The last addition that a sum goes into, by way of additions and of what hands it on alone."""
        way, node, last = [total], total, total
        while node not in self._last and (user := self._only_user(node)) is not None:
            if not (added := _adds(user)) and not self._hands_on(user):
                break
            node, last = user, user if added else last
            way.append(node)
        last = self._last.get(node, last)
        self._last.update(dict.fromkeys(way, last))
        return last

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        users = [user for user in node.users if not operations.reads_shape_only(user)]
        return users[0] if len(users) == 1 and node not in self.run.left_behind else None

    def _may_write(self, user: fx.Node) -> bool:
        """Whether a node may write into what it reads, so that two that read it need not read the same."""
        module = self.part.module_of(user)
        if module is not None:
            known = self.part.site_of(user) is not None or type(module).__module__.startswith("torch.nn.modules.")
            return not known or bool(getattr(module, "inplace", False))
        return not operations.reads_shape_only(user) and user.target not in (operator.add, torch.add, "add")

    # ---- what hands values on ----

    def _uses(self, value: fx.Node, passes: Callable[[fx.Node], bool]) -> Iterator[tuple[fx.Node, fx.Node | None]]:
        """What is made of a value by nodes that pass it on, and each other use of that; None: by who called the part.

        Who asks for a shape alone does not use it.
        """
        values = self._handed_on(value, passes)
        for made in values:
            if made in self.run.left_behind:
                yield made, None
            for user in made.users:
                if user not in values and not operations.reads_shape_only(user):
                    yield made, user

    def _handed_on(self, value: fx.Node, passes: Callable[[fx.Node], bool]) -> dict[fx.Node, None]:
        """A value and, each once, the nodes that pass it on."""
        values, pending = {value: None}, [value]
        while pending:
            passing = [user for user in pending.pop().users if user not in values and passes(user)]
            values |= dict.fromkeys(passing)
            pending += passing
        return values

    def _source(self, node: fx.Node, flattened: bool) -> fx.Node | None:
        """What a node reads, seen through what hands it on; `flattened` says whether flattenings are."""
        source = operations.input_of(node)
        return None if source is None else self._seen_through(source, flattened)

    def _seen_through(self, node: fx.Node, flattened: bool) -> fx.Node:
        way = [node]
        while (node, flattened) not in self._seen and (self._hands_on(node) or (flattened and self._flattens(node))):
            source = operations.input_of(node)
            if source is None:
                break
            node = source
            way.append(node)
        node = self._seen.get((node, flattened), node)
        self._seen.update(dict.fromkeys(((on_way, flattened) for on_way in way), node))
        return node

    def _hands_on(self, node: fx.Node) -> bool:
        """Whether a node gives what it reads, in eval mode."""
        module = self.part.module_of(node)
        if module is not None:
            known = type(module) is nn.Identity or type(module).__module__ == "torch.nn.modules.dropout"
            return known and id(module) not in self.part.hooked
        same = node.op == "call_method" and node.target == "contiguous"
        return same or operations.is_idle_dropout(node, self.run.by_mode)

    def _flattens(self, node: fx.Node) -> bool:
        """Whether a node makes (N, C * H * W) of (N, C, H, W)."""
        module = self.part.module_of(node)
        if isinstance(module, nn.Flatten):
            return (module.start_dim, module.end_dim) == (1, -1) and id(module) not in self.part.hooked
        return module is None and operations.flattens_samples(node)


def _adds(node: fx.Node) -> bool:
    """Whether a node adds two values, or a value and zero."""
    plain = node.target in _ADDITIONS and len(node.args) == 2 and not node.kwargs
    return plain and node.args[0] is not node.args[1] and all(isinstance(a, fx.Node) or a == 0 for a in node.args)
