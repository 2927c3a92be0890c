"""Symbolic runs of a module's forward: dataflow without data, along every branch.

Nothing here touches the module that it is given: it runs a copy that shares the tensors, without
hooks. `torch.fx` does the tracing; what this file adds are branches on data (each is followed both
ways), loops over sequences of unknown length (two rounds), and train mode beside eval mode.
"""

from __future__ import annotations

import copy
import inspect
import sys
import types
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

_MAX_RUNS = 32  # runs of one forward; a forward with more branches than these cover counts as incomplete
_MAX_ROUNDS = 100  # answers alike at one place in the code: ends a loop whose condition is data
_WRONG_WAY = (AssertionError, ValueError, NotImplementedError)  # a branch that only refuses its input


@dataclass(frozen=True)
class Traced:
    """The graphs of one module's forward, one for each mode and branch, and whether these are all."""

    graphs: tuple[fx.Graph, ...]
    complete: bool
    problem: str = ""


def clone(model: nn.Module) -> nn.Module:
    """A deep copy of `model`.

    Process groups are handles, not data, and stay shared. Tensors that hooks compute (weight_norm, pruning)
    are copied without their history, which torch's own copy refuses. Raises whatever an attribute raises that cannot be copied.
    """
    return copy.deepcopy(model, _handles(model.modules()))


def _handles(modules: Iterable[nn.Module]) -> dict[int, Any]:
    """The memo with which the attributes of `modules` can be copied."""
    memo: dict[int, Any] = {}
    for module in modules:
        group = getattr(module, "process_group", None)
        if group is not None:
            memo[id(group)] = group
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return memo


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of `model` to trace: the same tensors, no hooks (they are made for tensors, not for proxies).

    Attributes are copied as in `clone`, since a forward may change them; raises what they raise.
    """
    modules = list(model.modules())
    memo = _handles(modules)
    for module in modules:
        if isinstance(module, fx.GraphModule):  # its class is its own
            memo[id(module)] = copy.copy(module)
        else:
            memo[id(module)] = type(module).__new__(type(module))
    for module in modules:
        state: dict[str, Any] = {}
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                state[name] = dict(value)
            elif name == "_modules":
                state[name] = {key: None if child is None else memo[id(child)] for key, child in value.items()}
            elif name in _HOOKS:
                state[name] = OrderedDict()
            else:
                state[name] = value if isinstance(value, _ATOMS) else copy.deepcopy(value, memo)
        memo[id(module)].__dict__.update(state)
    copied = memo[id(model)]
    assert isinstance(copied, nn.Module)  # for the type checker: the memo holds what was put in above
    return copied


_ATOMS = (bool, int, float, str, bytes, type, types.FunctionType, types.BuiltinFunctionType, type(None))
_HOOKS = frozenset(name for name in vars(nn.Module()) if "_hooks" in name)


class _Tracer(fx.Tracer):
    """Follows one combination of branches; a place in the code is decided once a run."""

    proxy_buffer_attributes = True  # a buffer that a forward reads directly must show in the graph

    def __init__(self, is_leaf: Callable[[nn.Module], bool], decisions: dict[Any, bool]):
        super().__init__()
        self._is_leaf = is_leaf
        self.decisions = dict(decisions)
        self._asked: Counter[Any] = Counter()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m) or super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: fx.Proxy) -> bool:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(fx.__path__[0]):
            frame = frame.f_back
        place = (frame.f_code, frame.f_lasti)
        self._asked[place] += 1
        decided = self.decisions.setdefault(place, True)
        return decided if self._asked[place] <= _MAX_ROUNDS else not decided

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([obj[0], obj[1]])  # type: ignore[index]


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Arguments that a caller usually leaves out, at their defaults; flags are left open, as branches."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is None or type(p.default) in (int, float, str)}


def trace(module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> Traced:
    """The graphs of `module.forward`, in which modules for which `is_leaf` holds are single nodes.

    `module` is trained and evaluated in turn and may be left with proxies in its attributes: pass a copy.
    """
    graphs: list[fx.Graph] = []
    problem = ""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for training in (True, False):
            module.train(training)
            pending: list[dict[Any, bool]] = [{}]
            for _ in range(_MAX_RUNS):
                if not pending:
                    break
                asked = pending.pop()
                tracer = _Tracer(is_leaf, asked)
                try:
                    graphs.append(tracer.trace(module, concrete_args=_defaults(module)))
                except Exception as error:  # a forward is anybody's code: whatever it raises means "not traceable"
                    refused = isinstance(error, _WRONG_WAY) and not isinstance(error, fx.proxy.TraceError)
                    if not (refused and tracer.decisions):
                        problem = f"{type(error).__name__}: {error}".splitlines()[0]
                # Flip each new decision, keeping those before it: every branch is entered once.
                taken = list(tracer.decisions.items())
                for index in range(len(asked), len(taken)):
                    place, way = taken[index]
                    pending.append({**dict(taken[:index]), place: not way})
            if pending:
                problem = f"more than {_MAX_RUNS} branches"
    return Traced(tuple(graphs), not problem and bool(graphs), problem)
