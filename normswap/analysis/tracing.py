"""Symbolic runs of a module's forward: dataflow without data, along every branch.

Nothing here touches the module that it is given: it runs a copy that shares the tensors, without
hooks. `torch.fx` does the tracing; what this package adds are branches on data (each is followed both
ways), loops over sequences of unknown length (two rounds), and train mode beside eval mode.
"""

import enum
import inspect
import itertools
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx, nn

from normswap.analysis.copies import ATOMS, MODULE_STATE, attributes_restored
from normswap.analysis.stand_ins import ModeWatch, standing_in
from normswap.analysis.tracer import WRONG_WAY, BranchPoint, BranchTracer
from normswap.layers.reparametrized import normalize_weight

_MAX_RUNS = 32  # runs of one forward; a forward with more branches than these cover counts as incomplete
_MAX_FAILURES = 4  # runs that end in an error at one and the same place, before any that ends well
_HOPELESS = 2  # as many failures counts an error that is no refusal of an input: every way may lead there
_NODES, _NODES_A_MODULE = 2000, 8  # the most that all runs of a forward may add up to: time stays linear in the model
_SLACK = 2  # given up where the branches would want that many times the nodes, as they look; some turn out shorter
_ADDRESS = re.compile(r"0x[0-9a-f]+")  # in how Python writes an object
_MAX_FLAGS = 3  # of a forward's boolean arguments, tried both ways


class TracedGraph(NamedTuple):
    """What one symbolic run of a forward gave."""

    graph: fx.Graph
    left_behind: frozenset[fx.Node]
    """Values that the run has left in attributes of modules: whoever reads these reads them too."""
    by_mode: bool = False
    """Whether modules were in train mode, and the forward has asked: then there are graphs of eval mode, too."""


class Traced(NamedTuple):
    """What all symbolic runs of a forward gave."""

    graphs: tuple[TracedGraph, ...]
    """One for each mode and branch."""
    complete: bool
    """Whether these are all that a forward can do."""
    problem: str = ""
    """Why they are not."""


def trace(module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> Traced:
    """The graphs of `module.forward`, in which modules for which `is_leaf` holds are single nodes.

    `module` is left as it was, but its forward runs: pass a copy.
    """
    runs = _Runs(module, is_leaf)
    calls = _calls(module)
    for number, (modes, call) in enumerate(itertools.product(_modes(runs.modules), calls)):
        if number >= len(calls) and not runs.mode.asked:
            break  # in any other mode the runs would be the same
        runs.follow_branches(modes, call)
        if runs.nodes > runs.most_nodes:
            break
    graphs = (graph._replace(by_mode=graph.by_mode and runs.mode.asked) for graph in runs.graphs)
    return Traced(tuple(graphs), not runs.problem and bool(runs.graphs), runs.problem)


def in_words(traced: Traced) -> frozenset[str]:
    """All that a forward does, the same for two that do the same; nothing where that cannot be told."""
    if not traced.complete:
        return frozenset()
    return frozenset(_ADDRESS.sub("", _graph_in_words(run.graph)) for run in traced.graphs)


def _graph_in_words(graph: fx.Graph) -> str:
    """A line an operation. A weight that a layer computes by weight normalization is called what a plain one is."""
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            names[node] = str(node.target)
        elif node.target is normalize_weight and isinstance(direction := node.args[0], fx.Node):
            names[node] = names[direction].removesuffix("_v")
        else:
            names[node] = f"%{len(lines)}"
            values = fx.map_arg((node.args, node.kwargs), names.__getitem__)
            lines.append(f"{node.op} {node.target} {values}")
    return "\n".join(lines)


class _Call(NamedTuple):
    """A way to call a forward, as to the arguments that a caller may leave out."""

    arguments: Mapping[str, Any]
    must_run: bool
    """Whether a forward that fails on it counts as one that cannot be traced."""


def _calls(module: nn.Module) -> list[_Call]:
    """The ways to call a forward that are tried: flags both ways, the rest at their defaults.

    The last, which gives something where None stands, may fail: not every forward can be run so.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    fixed = {
        p.name: p.default
        for p in parameters
        if type(p.default) in (int, float, str) or isinstance(p.default, enum.Enum)
    }
    flags = [p.name for p in parameters if type(p.default) is bool][:_MAX_FLAGS]
    absent = {p.name: None for p in parameters if p.default is None}
    settings = [dict(zip(flags, way, strict=True)) for way in itertools.product((True, False), repeat=len(flags))]
    calls = [_Call({**fixed, **absent, **setting}, True) for setting in settings]
    return [*calls, _Call({**fixed, **settings[0]}, False)] if absent else calls


def _modes(modules: Sequence[nn.Module]) -> list[list[bool]]:
    """`training` of each module: in train mode, in eval mode, and as they are where they differ."""
    own = [m.training for m in modules]
    return [[mode] * len(modules) for mode in (True, False)] + ([own] if len(set(own)) > 1 else [])


class _Runs:
    """Runs of one forward, and what they have found so far."""

    def __init__(self, module: nn.Module, is_leaf: Callable[[nn.Module], bool]):
        self.module, self.modules, self.is_leaf = module, list(module.modules()), is_leaf
        self.mode = ModeWatch()
        self.graphs: list[TracedGraph] = []
        self.problem = ""  # the first reason why the graphs may not be all, if not a later one that weighs more
        self.nodes = 0  # of all runs
        self.most_nodes = _NODES + _NODES_A_MODULE * len(self.modules)
        self.failures: Counter[Any] = Counter()  # by the lines of code that led to the error

    def follow_branches(self, modes: list[bool], call: _Call) -> None:
        """Run the forward along each combination of branches that has not been followed yet.

        A run is told the first few decisions and makes the others itself, all `True`. Each of these flipped, with those
        before it kept, is a run to come: so every branch is entered, and no combination is run twice.
        """
        pending: list[dict[BranchPoint, bool]] = [{}]
        for run in range(_MAX_RUNS):
            if not pending or self._has_enough(run, len(pending)):
                break
            told = pending.pop()
            taken = list(self._run(modes, call, told).items())
            for index in range(len(told), len(taken)):
                place, way = taken[index]
                pending.append({**dict(taken[:index]), place: not way})
        if pending and not self.problem:
            self.problem = "more branches than can be followed"

    def _has_enough(self, runs: int, pending: int) -> bool:
        """Whether more runs are of no use, after so many of a mode, or would take too long."""
        if self.nodes > self.most_nodes or (self.problem and self.graphs):
            return True  # one graph a mode is enough for what stays unsure
        if not self.graphs:
            return max(self.failures.values(), default=0) >= _MAX_FAILURES
        nodes_to_come = pending * self.nodes / max(runs, 1)
        return runs + pending > _MAX_RUNS or self.nodes + nodes_to_come > _SLACK * self.most_nodes

    def _run(self, modes: list[bool], call: _Call, told: dict[BranchPoint, bool]) -> dict[BranchPoint, bool]:
        """One run, and the decisions at the branches on its way, in order: those that it is `told` come first."""
        tracer = BranchTracer(self.is_leaf, told)
        try:
            with attributes_restored(self.modules):
                with standing_in(self.mode, tracer.asked_type):
                    for m, mode in zip(self.modules, modes, strict=True):
                        m.__dict__["training"] = mode  # not train(): some exchange weights in it
                    graph = tracer.trace(self.module, concrete_args=dict(call.arguments))
                self.graphs.append(TracedGraph(graph, _left_behind(self.module.modules(), graph), any(modes)))
            self.problem = self.problem or tracer.inexact
        except Exception as error:  # a forward is anybody's code: whatever it raises means "not traceable"
            where = tuple((f.f_code, line) for f, line in traceback.walk_tb(error.__traceback__))
            self.failures[where] += 1 if isinstance(error, WRONG_WAY) else _HOPELESS
            if call.must_run and not tracer.has_refused(error):
                self.problem = f"{type(error).__name__}: {error}".splitlines()[0]
        self.nodes += len(tracer.graph.nodes) if hasattr(tracer, "graph") else 1
        return tracer.decisions


def _left_behind(modules: Iterable[nn.Module], graph: fx.Graph) -> frozenset[fx.Node]:
    """Values of `graph` that a run has left in attributes of `modules`."""
    found: set[fx.Node] = set()
    for module in modules:
        for name, value in vars(module).items():
            if type(value) in ATOMS or name in MODULE_STATE:
                continue
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            found.update(v.node for v in held if isinstance(v, fx.Proxy) and v.node.graph is graph)
    return frozenset(found)
