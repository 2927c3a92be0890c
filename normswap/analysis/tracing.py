"""Symbolic runs of a module's forward: dataflow without data, along every branch.

Nothing here touches the module that it is given: it runs a copy that shares the tensors, without
hooks. `torch.fx` does the tracing; what this file adds are branches on data (each is followed both
ways), loops over sequences of unknown length (two rounds), and train mode beside eval mode.
"""

from __future__ import annotations

import builtins
import copy
import dis
import enum
import functools
import inspect
import itertools
import sys
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.analysis.copies import MODULE_STATE, opened

_MAX_RUNS = 32  # runs of one forward; a forward with more branches than these cover counts as incomplete
_MAX_FAILURES = 4  # runs that end in an error at one and the same place, before any that ends well
_NODES, _NODES_A_MODULE = 2000, 8  # the most that all runs of a forward may add up to: time stays linear in the model
_HOPELESS = 2  # as many failures counts an error that is no refusal of an input: every way may lead there
_SLACK = 2  # a forward is given up where its branches would want that many times the nodes, as they look; some turn out shorter
_MAX_FLAGS = 3  # of a forward's boolean arguments, tried both ways
_NO_TENSORS = {list, tuple, dict, set, str, int, float, bool, type(None)}
_GIVES_A_TENSOR = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.ReLU,
)
_PACKING_DEPTH = 4  # calls from where a dataclass is filled to where a type is asked for
_MAX_ROUNDS = 100  # answers alike at one place in the code: ends a loop whose condition is data
_WRONG_WAY = (AssertionError, ValueError, NotImplementedError)  # a branch that only refuses its input


@dataclass(frozen=True)
class Traced:
    """The graphs of one module's forward, one for each mode and branch, and whether these are all."""

    graphs: tuple[fx.Graph, ...]
    complete: bool
    problem: str = ""


class _Tracer(fx.Tracer):
    """Follows one combination of branches; a place in the code is decided once a run.

    `inexact` says what a forward asked of a value that a symbolic run cannot answer as a real one would.
    """

    proxy_buffer_attributes = True  # a buffer that a forward reads directly must show in the graph

    def __init__(self, is_leaf: Callable[[nn.Module], bool], decisions: dict[Any, bool]):
        super().__init__()
        self._is_leaf = is_leaf
        self.decisions = dict(decisions)
        self.inexact = ""
        self.last_asked: list[
            tuple[types.CodeType, int]
        ] = []  # code and line of each frame that led to the last decision
        self._asked: Counter[Any] = Counter()
        self._names: dict[Tensor, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m) or super().is_leaf_module(m, module_qualified_name)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """A parameter or a buffer that a forward reads. torch.fx looks through all tensors of the model each time, which is quadratic."""
        if not isinstance(attr_val, Tensor):
            return attr_val
        if not self._names:
            named = itertools.chain(self.root.named_buffers(), self.root.named_parameters())
            self._names = {tensor: name for name, tensor in named}  # by identity, as tensors hash
        name = self._names.get(attr_val)
        if name is None:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def to_bool(self, obj: fx.Proxy) -> bool:
        chain, self.last_asked = [], []
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not trace.__code__:
            if not frame.f_code.co_filename.startswith(_FX):
                chain.append((frame.f_code, frame.f_lasti))
                self.last_asked.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back
        place = (self.scope.module_path, tuple(chain))  # one instance of a block may go where another does not
        self._asked[place] += 1
        decided = self.decisions.setdefault(place, True)
        return decided if self._asked[place] <= _MAX_ROUNDS else not decided

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([obj[0], obj[1]])  # type: ignore[index]

    def refused(self, error: BaseException) -> bool:
        """Whether `error` says that the branch just taken only refuses its input."""
        if not isinstance(error, _WRONG_WAY) or isinstance(error, fx.proxy.TraceError):
            return False
        tail = error.__traceback__
        while tail is not None and tail.tb_next is not None:
            tail = tail.tb_next
        return tail is not None and any(
            tail.tb_frame.f_code is code and 0 <= tail.tb_lineno - line <= _REFUSAL_LINES
            for code, line in self.last_asked
        )


_FX = fx.__path__[0]
_TORCH = torch.__path__[0]
_REFUSAL_LINES = 3  # from the test of an input to the end of the statement that refuses it


@contextmanager
def _observed(tracer: _Tracer) -> Iterator[None]:
    """Note where a forward asks for the type of a value: a symbolic one is no tensor, so the answer misleads."""
    real = builtins.isinstance

    def watched(value: Any, kinds: Any) -> bool:
        if real(value, fx.Proxy):
            asking = sys._getframe(1).f_code
            known = asking.co_filename.startswith(_TORCH) and asking.co_name != "is_tensor"
            if not known and not _is_packing(sys._getframe(1)) and not _is_truly_no(tracer, value, kinds):
                tracer.inexact = "its forward asks for the type of a value"
        return real(value, kinds)

    builtins.isinstance = watched
    try:
        yield
    finally:
        builtins.isinstance = real


def _is_truly_no(tracer: _Tracer, value: fx.Proxy, kinds: Any) -> bool:
    """Whether a real value is none of `kinds` either: what a layer of torch gives, a tensor, asked whether it is a list or the like."""
    if value.node.op != "call_module" or not {*(kinds if type(kinds) is tuple else (kinds,))} <= _NO_TENSORS:
        return False
    layer = tracer.root.get_submodule(str(value.node.target))
    return any(type(layer).forward is cls.forward for cls in _GIVES_A_TENSOR if isinstance(layer, cls))


def _is_packing(frame: types.FrameType | None) -> bool:
    """Whether a dataclass is being filled, which only holds what it is given, as the outputs of transformers' models do."""
    for _ in range(_PACKING_DEPTH):
        if frame is None:
            break
        if frame.f_code.co_name == "__post_init__":
            return True
        frame = frame.f_back
    return False


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Attributes of all modules, and containers in their classes, as they were: a run leaves symbolic values behind."""
    modules = list(module.modules())
    states = [_state(m) for m in modules]
    classes = {cls for m in modules for cls in type(m).__mro__ if not cls.__module__.startswith("torch.")}
    shared = [(v, copy.copy(v)) for cls in classes for v in vars(cls).values() if type(v) in (dict, list, set)]
    try:
        yield
    finally:
        for m, state in zip(modules, states, strict=True):
            vars(m).clear()
            vars(m).update(state)
        for value, before in shared:
            value.clear()
            (value.extend if type(value) is list else value.update)(before)


def _state(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, with copies of containers that a run may fill; torch's own layers only have their children changed."""
    if type(module).__module__.startswith("torch.nn.modules."):
        return {**vars(module), "_modules": dict(module._modules)}
    return {name: opened(value) for name, value in vars(module).items()}


def _left_behind(module: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Values of `graph` that a run has left in attributes: whoever reads these reads them too."""
    found = set()
    for m in module.modules():
        for name, value in vars(m).items():
            if name not in MODULE_STATE:
                values = (
                    value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
                )
                found |= {v.node for v in values if isinstance(v, fx.Proxy) and v.node.graph is graph}
    return found


def _arguments(module: nn.Module) -> list[tuple[dict[str, Any], bool]]:
    """Ways to call a forward as to the arguments that a caller may leave out: flags both ways, the rest at their defaults.

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
    ways = [dict(zip(flags, way, strict=True)) for way in itertools.product((True, False), repeat=len(flags))]
    calls = [{**fixed, **absent, **way} for way in ways]
    return [(call, True) for call in calls] + ([({**fixed, **ways[0]}, False)] if absent else [])


class _Mode:
    """In the place of the attribute `training` of all modules: notes whether a forward asks for it."""

    def __init__(self) -> None:
        self.asked = False

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        self.asked = True
        try:
            return module.__dict__["training"]
        except KeyError:
            raise AttributeError("training") from None

    def __set__(self, module: nn.Module, value: Any) -> None:
        module.__dict__["training"] = value

    @contextmanager
    def watching(self) -> Iterator[None]:
        nn.Module.training = self  # type: ignore[assignment]
        try:
            yield
        finally:
            del nn.Module.training


def _modes(module: nn.Module) -> list[list[bool]]:
    """Train mode, eval mode, and the mode that the modules are in where they differ."""
    modules = list(module.modules())
    own = [m.training for m in modules]
    return [[mode] * len(modules) for mode in (True, False)] + ([own] if len(set(own)) > 1 else [])


def trace(module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> Traced:
    """The graphs of `module.forward`, in which modules for which `is_leaf` holds are single nodes.

    `module` is left as it was, but its forward runs: pass a copy.
    """
    graphs: list[fx.Graph] = []
    problem, nodes = "", 0
    failures: Counter[Any] = Counter()
    most = _NODES + _NODES_A_MODULE * sum(1 for _ in module.modules())
    calls, watch = _arguments(module), _Mode()
    for number, (modes, (arguments, must_run)) in enumerate(itertools.product(_modes(module), calls)):
        if number >= len(calls) and not watch.asked:
            break  # in any other mode the runs would be the same
        pending: list[dict[Any, bool]] = [{}]
        for run in range(_MAX_RUNS):
            if not pending or nodes > most or (problem and graphs):  # one graph a mode is enough for what stays unsure
                break
            too_many = run + len(pending) > _MAX_RUNS or nodes + len(pending) * nodes / max(run, 1) > _SLACK * most
            if (graphs and too_many) or (not graphs and max(failures.values(), default=0) >= _MAX_FAILURES):
                break
            asked = pending.pop()
            tracer = _Tracer(is_leaf, asked)
            try:
                with _symbolic(), _restored(module), _observed(tracer), watch.watching():
                    for m, mode in zip(module.modules(), modes, strict=True):
                        m.__dict__["training"] = mode  # not train(): some exchange weights in it
                    graph = tracer.trace(module, concrete_args=arguments)
                    graph._left_behind = _left_behind(module, graph)  # type: ignore[attr-defined]
                graphs.append(graph)
                problem = problem or tracer.inexact
            except Exception as error:  # a forward is anybody's code: whatever it raises means "not traceable"
                where = tuple((f.f_code, line) for f, line in traceback.walk_tb(error.__traceback__))
                failures[where] += 1 if isinstance(error, _WRONG_WAY) else _HOPELESS
                if must_run and not tracer.refused(error):
                    problem = f"{type(error).__name__}: {error}".splitlines()[0]
            nodes += len(tracer.graph.nodes) if hasattr(tracer, "graph") else 1
            # Flip each new decision, keeping those before it: every branch is entered once.
            taken = list(tracer.decisions.items())
            for index in range(len(asked), len(taken)):
                place, way = taken[index]
                pending.append({**dict(taken[:index]), place: not way})
        if pending and not problem:
            problem = "more branches than can be followed"
        if nodes > most:
            break
    return Traced(tuple(graphs), not problem and bool(graphs), problem)


@contextmanager
def _symbolic() -> Iterator[None]:
    """No gradients, warnings or random numbers of a symbolic run reach anybody; autocast takes the device of a symbolic value.

    Each time that a value is taken apart (`n, c = x.shape`), torch.fx disassembles the whole function, of which one time is enough.
    """
    real, disassemble = torch.autocast.__init__, dis.get_instructions

    def on_any_device(self: torch.autocast, device_type: Any, *args: Any, **options: Any) -> None:
        symbolic = issubclass(type(device_type), fx.Proxy)  # `isinstance` is watched
        real(self, "cpu" if symbolic else device_type, *args, **options)

    torch.autocast.__init__ = on_any_device  # type: ignore[method-assign]
    dis.get_instructions = _instructions  # type: ignore[assignment]
    try:
        with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.autocast.__init__ = real  # type: ignore[method-assign]
        dis.get_instructions = disassemble


@functools.lru_cache(maxsize=256)
def _instructions(code: types.CodeType, **options: Any) -> tuple[dis.Instruction, ...]:
    return tuple(dis.Bytecode(code, **options))
