"""What the code of a module's class says that its forward may use of the modules in it, where no trace tells."""

import dis
import functools
import itertools
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any


@functools.cache
def reaches_into(cls: Any) -> frozenset[tuple[str, str]]:
    """The pairs (a, b) where code that a class's forward may run says `.a.b`: parts of children that it may use itself.

    Asked where a forward cannot be traced. The children may be traced then, each by itself, but what such a forward
    does with the parts of a child is in none of these traces: it may run `self.block.conv` beside the block's own
    forward. The code cannot tell which object a name stands for, so any `.a.b` counts.
    """
    pairs = set()
    for code in _reached(cls):
        loads = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "RESUME", "EXTENDED_ARG")]
        chain = [i.argval if i.opname in ("LOAD_ATTR", "LOAD_METHOD") else None for i in loads]
        pairs |= {(a, b) for a, b in itertools.pairwise(chain) if a is not None and b is not None}
    return frozenset(pairs)


def _reached(cls: Any) -> list[types.CodeType]:
    """The code that the forward of a class may run: its own, and that of methods whose names occur in what it may run.

    All of the class's code where it may choose a method by a string, with `getattr`.
    """
    owners = itertools.takewhile(lambda owner: not owner.__module__.startswith("torch."), cls.__mro__)
    methods = [
        (name, [code for function in _functions(value) for code in _codes(function.__code__)])
        for owner in owners
        for name, value in vars(owner).items()
        if name != "__init__"  # which no forward runs
    ]
    called, reached = {"forward"}, list[types.CodeType]()
    while found := [c for name, codes in methods if name in called for c in codes if c not in reached]:
        reached += found
        called |= {name for code in found for name in code.co_names}
    return [code for _, codes in methods for code in codes] if "getattr" in called else reached


def _functions(value: Any) -> list[types.FunctionType]:
    """The functions that an attribute of a class runs: a method's, a property's, and those that decorators hold."""
    found: list[types.FunctionType] = []
    pending = [getattr(value, "fget", getattr(value, "__func__", value))]
    while pending:
        function = pending.pop()
        if isinstance(function, types.FunctionType) and function not in found:  # a function may hold itself
            found.append(function)
            for cell in function.__closure__ or ():
                with suppress(ValueError):  # a cell that is empty
                    pending.append(cell.cell_contents)
    return found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function, and of the functions and comprehensions in it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)
