"""One symbolic run of a forward: torch.fx's tracer, made to choose a way at each branch on data."""

import itertools
import operator
import sys
import threading
import traceback
import types
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.analysis.conditions import condition_of
from normswap.layers.reparametrized import CONVOLUTIONS

BranchPoint = tuple[str, tuple[tuple[types.CodeType, int], ...]]
"""Where a forward branches: the path of the module, and the code and instruction of each frame that led there."""

WRONG_WAY = (AssertionError, ValueError, NotImplementedError)
"""What a forward raises that only refuses its input."""
_REFUSAL_LINES = 3  # from the test of an input to the end of the statement that refuses it
_MAX_ROUNDS = 100  # answers alike at one place in the code: ends a loop whose condition is data
_FX = fx.__path__[0]
_NO_TENSORS = {list, tuple, dict, set, str, int, float, bool, type(None)}
_GIVES_A_TENSOR: tuple[Any, ...] = (*CONVOLUTIONS, nn.Linear, _BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.ReLU)


class _Value(fx.Proxy):
    """A symbolic value that tells more than torch.fx's."""

    def __len__(self) -> int:
        """Of which `list` can be made: it asks for the length first, and does without on this error."""
        raise TypeError("'len' is not supported in symbolic tracing")

    def __iadd__(self, other: Any) -> Any:
        """Of which `+=` is not recorded as `+`: it writes into the value."""
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


def _number_of_chunks(node: fx.Node) -> int | None:
    """Into how many parts a value is cut that can be cut so; None where that is not written."""
    if node.target not in ("chunk", "split", torch.chunk, torch.split):
        return None
    number = node.args[1] if len(node.args) > 1 else node.kwargs.get("chunks", node.kwargs.get("split_size"))
    if isinstance(number, list | tuple):
        return len(number)
    return number if isinstance(number, int) and node.target in ("chunk", torch.chunk) else None


class BranchTracer(fx.Tracer):
    """Follows one combination of branches. A place in the code is decided once a run: a loop would not end otherwise.

    `decisions` says which way to go at the places that it names; at all others the run goes the way of `True`, and adds
    its decision. `inexact` says what a forward asked of a value that a symbolic run cannot answer as a real one would.
    """

    proxy_buffer_attributes = True  # a buffer that a forward reads directly must show in the graph

    def __init__(self, is_leaf: Callable[[nn.Module], bool], decisions: Mapping[BranchPoint, bool]):
        super().__init__()
        self.decisions = dict(decisions)
        self.inexact = ""
        self._is_leaf = is_leaf
        # Code and line of each frame that led to the last branch.
        self._last_asked: list[tuple[types.CodeType, int]] = []
        self._times_asked: Counter[BranchPoint] = Counter()
        self._answers: dict[Hashable, bool] = {}  # to conditions that one run cannot meet and not meet
        self._names: dict[Tensor, str] = {}  # of the root's parameters and buffers
        self._thread = threading.get_ident()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """As in torch.fx. The frames of one run lie above this one, which is where `to_bool` stops to look."""
        return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # torch.fx exchanges `nn.Module.__call__` for all threads: a module that another one runs is none of this model.
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_arg(self, a: Any) -> Any:
        """As in torch.fx, which takes its time to find out that most arguments are symbolic values, or none."""
        if type(a) is _Value:
            return a.node
        if type(a) is tuple and all(type(part) is _Value for part in a):
            return tuple(part.node for part in a)
        return {} if type(a) is dict and not a else super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """A parameter or a buffer that a forward reads, as a symbolic value.

        torch.fx looks through all tensors of the model each time, which is quadratic. It exchanges
        `nn.Module.__getattr__` for all threads too, and the copy that is traced has the tensors of the user's model.
        """
        if not isinstance(attr_val, Tensor) or threading.get_ident() != self._thread:
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
        """Which way to go where a forward branches on a symbolic value."""
        above = (frame for frame, _ in traceback.walk_stack(sys._getframe(1)))
        run = itertools.takewhile(lambda frame: frame.f_code is not BranchTracer.trace.__code__, above)
        frames = [frame for frame in run if not frame.f_code.co_filename.startswith(_FX)]
        self._last_asked = [(frame.f_code, frame.f_lineno) for frame in frames]
        # One instance of a block may go where another does not.
        place = (self.scope.module_path, tuple((frame.f_code, frame.f_lasti) for frame in frames))
        self._times_asked[place] += 1
        asked, opposite = condition_of(obj.node) or (obj.node, False)
        if asked not in self._answers:
            self._answers[asked] = self.decisions.setdefault(place, True) is not opposite
        decided = self._answers[asked] is not opposite
        return decided if self._times_asked[place] <= _MAX_ROUNDS else not decided

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Two rounds of a loop over a value of unknown length: enough to see what one round hands to the next."""
        return iter([obj[i] for i in range(_number_of_chunks(obj.node) or 2)])  # type: ignore[index]

    def asked_type(self, value: fx.Proxy, kinds: Any) -> None:
        """Note that a forward asks whether a symbolic value is one of `kinds`: a tensor may give another answer."""
        if not self._is_truly_no(value, kinds):
            self.inexact = "its forward asks for the type of a value"

    def _is_truly_no(self, value: fx.Proxy, kinds: Any) -> bool:
        """Whether a real value is none of `kinds` either: a tensor from a layer of torch is no list or the like."""
        if value.node.op != "call_module" or not {*(kinds if type(kinds) is tuple else (kinds,))} <= _NO_TENSORS:
            return False
        layer = self.root.get_submodule(str(value.node.target))
        return any(type(layer).forward is cls.forward for cls in _GIVES_A_TENSOR if isinstance(layer, cls))

    def has_refused(self, error: BaseException) -> bool:
        """Whether `error` says that the branch just taken only refuses its input: no good input takes it."""
        if not isinstance(error, WRONG_WAY) or isinstance(error, fx.proxy.TraceError):
            return False
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        return any(frame.f_code is code and 0 <= line - asked <= _REFUSAL_LINES for code, asked in self._last_asked)
