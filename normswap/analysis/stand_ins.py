"""What stands in for parts of Python and torch while a forward runs symbolically, for the tracing thread alone.

A symbolic run has to know what a forward asks of its values and of its module. torch.fx offers no hook for that, so a
builtin, and attributes of torch's classes, are exchanged as long as a run lasts. Other threads may train meanwhile, so
each stand-in asks first whose call it is, and does for any other thread what the real thing does. Two threads that
exchanged the same attribute in turn could put back each other's stand-in for good, which a lock prevents.

Not for one thread alone, since Python and torch keep one of each: warnings are silent during a run, and random numbers
that other threads draw from torch's generator meanwhile are drawn again afterwards.
"""

import builtins
import dis
import functools
import itertools
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn

_LOCK = threading.RLock()  # a forward may itself trace another model
_TORCH = torch.__path__[0]
_PACKING_DEPTH = 4  # calls from where a dataclass is filled to where a type is asked for


class ModeWatch:
    """Stands in for the attribute `training` of all modules, and notes whether a forward asks for it."""

    def __init__(self) -> None:
        self.asked = False
        self._thread = threading.get_ident()

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        self.asked = self.asked or threading.get_ident() == self._thread
        try:
            return module.__dict__["training"]
        except KeyError:
            raise AttributeError("training") from None

    def __set__(self, module: nn.Module, value: Any) -> None:
        module.__dict__["training"] = value


@contextmanager
def standing_in(mode: ModeWatch, asked_type: Callable[[fx.Proxy, Any], None]) -> Iterator[None]:
    """Exchange what a symbolic run needs exchanged, and keep its gradients, warnings and random numbers from everybody.

    `mode` notes whether the forward asks for its mode. `asked_type` is called with a symbolic value and the classes
    that it is compared with, where the answer of `isinstance` may mislead the forward.
    """
    with _LOCK, ExitStack() as stack:
        _exchange(stack, builtins, "isinstance", _watching_isinstance(asked_type))
        _exchange(stack, torch.autocast, "__init__", _autocast_on_any_device())
        _exchange(stack, dis, "get_instructions", _remembering_instructions())
        _exchange(stack, nn.Module, "training", mode)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        yield


def _exchange(stack: ExitStack, owner: Any, name: str, stand_in: Any) -> None:
    """Exchange an attribute of a module or a class until `stack` closes."""
    if name in vars(owner):
        stack.callback(setattr, owner, name, vars(owner)[name])
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, stand_in)


def _watching_isinstance(asked_type: Callable[[fx.Proxy, Any], None]) -> Callable[[Any, Any], bool]:
    """`isinstance` that tells of symbolic values: they are no tensors, so its answer misleads a forward."""
    real, symbolic, here = builtins.isinstance, fx.Proxy, threading.get_ident()

    def watched(value: Any, kinds: Any) -> bool:
        if real(value, symbolic) and threading.get_ident() == here:
            asking = sys._getframe(1)
            # torch's own functions ask in order to hand symbolic values on; `is_tensor` asks for the forward's sake.
            known = asking.f_code.co_filename.startswith(_TORCH) and asking.f_code.co_name != "is_tensor"
            if not known and not _is_packing(asking):
                asked_type(value, kinds)
        return real(value, kinds)

    return watched


def _is_packing(frame: types.FrameType) -> bool:
    """Whether a dataclass is being filled, as transformers' outputs are: it only holds what it is given."""
    frames = itertools.islice(traceback.walk_stack(frame), _PACKING_DEPTH)
    return any(frame.f_code.co_name == "__post_init__" for frame, _ in frames)


def _autocast_on_any_device() -> Callable[..., None]:
    """autocast's constructor, which refuses a symbolic device (`torch.autocast(x.device.type)`); any device will do."""
    real, here = torch.autocast.__init__, threading.get_ident()

    def on_any_device(self: torch.autocast, device_type: Any, *args: Any, **options: Any) -> None:
        symbolic = issubclass(type(device_type), fx.Proxy)  # not `isinstance`, which is watched
        real(self, "cpu" if symbolic and threading.get_ident() == here else device_type, *args, **options)

    return on_any_device


def _remembering_instructions() -> Callable[..., Any]:
    """`dis.get_instructions` that takes each function apart once.

    torch.fx asks for the whole function each time that a symbolic value is unpacked (`n, c = x.shape`). Without
    this, the dataflow of timm's efficientvit_m5 takes 5.7 s of processor time, with it 3.6 s.
    """
    real, here = dis.get_instructions, threading.get_ident()

    def remembering(code: Any, **options: Any) -> Any:
        return _instructions(code, **options) if threading.get_ident() == here else real(code, **options)

    return remembering


@functools.lru_cache(maxsize=256)
def _instructions(code: types.CodeType, **options: Any) -> tuple[dis.Instruction, ...]:
    return tuple(dis.Bytecode(code, **options))
