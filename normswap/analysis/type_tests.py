"""Where the code of a forward asks for the class of a layer, which a conversion changes: `type(m) is nn.Conv2d`."""

from __future__ import annotations

import builtins
import dis
import inspect
import itertools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from normswap.analysis.bytecode import ReachedCode, reached_code, steps_of

_ENDS = ("STORE", "POP_JUMP", "JUMP", "RETURN", "POP_TOP", "FOR_ITER", "YIELD")  # of an expression, by opcode
_EQUALITIES = ("==", "!=", "bool(==)", "bool(!=)")
_INHERITED = ("isinstance", "issubclass")
# Who asks for an identity passes by what does nothing; the others are no layers.
_NOT_ASKED_FOR = {nn.Identity, nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict}
_PARTS = ("startswith", "endswith")
_NAMES = {"__name__", "__qualname__", "_get_name"}


class TypeTest(NamedTuple):
    """A question for the class of a layer."""

    where: str
    """The function that asks."""
    inherited: bool
    """Whether a subclass is as good: `isinstance`."""
    classes: tuple[type[nn.Module], ...]
    """The classes that are asked for."""
    names: tuple[str, ...]
    """Parts of class names that are."""
    compared: tuple[Callable[[str, str], bool], ...]
    """How a class's name is compared with one of `names`."""

    def tells_apart(self, old: type[nn.Module], new: type[nn.Module]) -> bool:
        """Whether the answer is another for a layer of the class `new` than for one of `old`."""
        return self._answers(old) != self._answers(new)

    def _answers(self, cls: type[nn.Module]) -> list[bool]:
        of_class = issubclass(cls, self.classes) if self.inherited else cls in self.classes
        return [of_class, *(compare(cls.__name__, name) for compare in self.compared for name in self.names)]


def find_type_tests(model: nn.Module) -> dict[str, tuple[TypeTest, ...]]:
    """By the path of a module: what its forward, and what that calls, may ask of the classes of layers in it."""
    known: dict[Any, tuple[TypeTest, ...]] = {}
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module).__module__.startswith("torch.nn.") or not module._modules:
            continue
        own = ((name, value) for name, value in vars(module).items() if callable(value) or _classes_in(value))
        key = (type(module), *((name, id(value)) for name, value in own))
        if key not in known:
            known[key] = tuple(
                test for reached in reached_code(module, only_named=True) for test in _tests_in(reached, module)
            )
        if known[key]:
            found[path] = known[key]
    return found


def _tests_in(reached: ReachedCode, module: nn.Module) -> Iterator[TypeTest]:
    code, selfs, function = reached
    asks_names = bool(_NAMES & {*code.co_names})
    pieces = [*_expressions(steps_of(code)), []]
    for steps, after in itertools.pairwise(pieces):
        if _forbids(steps, after):
            continue
        names, attributes = _loaded(steps, "LOAD_GLOBAL", "LOAD_NAME"), _loaded(steps, "LOAD_ATTR", "LOAD_METHOD")
        inherited = bool({*_INHERITED} & names) or any(s.opname == "MATCH_CLASS" for s in steps)
        compared = (asks_names and {*_PARTS} & attributes) or ("get" in attributes and "type" in names)
        if not (inherited or compared or any(map(_is_comparison, steps))):
            continue
        values = list(_values(steps, selfs, function, module))
        classes = tuple(dict.fromkeys(cls for value in values for cls in _classes_in(value)))
        parts = tuple(dict.fromkeys(s for step in steps for s in _strings(step))) if asks_names else ()
        if classes or parts:
            where = getattr(code, "co_qualname", code.co_name)  # from Python 3.11 on
            yield TypeTest(where, inherited, classes, parts, tuple(_comparisons(steps, attributes)))


def _expressions(steps: Iterable[dis.Instruction]) -> Iterator[list[dis.Instruction]]:
    """The instructions in pieces that leave nothing on the stack, or a condition."""
    piece: list[dis.Instruction] = []
    for step in steps:
        piece.append(step)
        if step.opname.startswith(_ENDS):
            yield piece
            piece = []
    yield piece


def _forbids(steps: list[dis.Instruction], after: list[dis.Instruction]) -> bool:
    """Whether an expression is one of `assert not ...`: where it held, the forward did not run at all."""
    raises = bool(after) and (after[0].opname == "LOAD_ASSERTION_ERROR" or after[0].argrepr == "AssertionError")
    return raises and bool(steps) and steps[-1].opname.endswith("_IF_FALSE")


def _loaded(steps: Iterable[dis.Instruction], *opnames: str) -> set[str]:
    return {step.argval for step in steps if step.opname in opnames}


def _is_comparison(step: dis.Instruction) -> bool:
    """Whether an instruction compares two values, looks for one among others, or looks one up."""
    if step.opname == "COMPARE_OP":
        return str(step.argval) in _EQUALITIES
    subscript = step.opname == "BINARY_OP" and step.argrepr == "[]"
    return subscript or step.opname in ("IS_OP", "CONTAINS_OP", "BINARY_SUBSCR")


def _comparisons(steps: Iterable[dis.Instruction], attributes: set[str]) -> Iterator[Callable[[str, str], bool]]:
    yield str.__eq__
    if any(step.opname == "CONTAINS_OP" for step in steps):
        yield str.__contains__
    yield from (getattr(str, name) for name in _PARTS if name in attributes)


def _strings(step: dis.Instruction) -> tuple[str, ...]:
    """The strings of a constant."""
    value = step.argval if step.opname.startswith("LOAD_CONST") else None
    held = value if isinstance(value, tuple | frozenset) else (value,)
    return tuple(part for part in held if isinstance(part, str) and part)


def _values(
    steps: list[dis.Instruction], selfs: frozenset[str], function: types.FunctionType, module: nn.Module
) -> Iterator[Any]:
    """What the names in an expression stand for, as far as modules, classes and `self` hold it: `nn.Conv2d`."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    outer = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    known = {**vars(builtins), **function.__globals__, **outer, **dict.fromkeys(selfs, module)}
    value: Any = None
    for step, after in itertools.pairwise([*steps, steps[-1]]):
        if step.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_FAST")):
            name = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
            value = known.get(name) if not step.opname.startswith("LOAD_FAST") or name in selfs else None
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            holds = isinstance(value, types.ModuleType | type) or value is module
            value = inspect.getattr_static(value, step.argval, None) if holds else None
        else:
            value = None
        if after.opname not in ("LOAD_ATTR", "LOAD_METHOD") or isinstance(value, dict):  # BY_CLASS.get(type(m))
            yield value


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _classes_in(value: Any) -> tuple[type[nn.Module], ...]:
    """The classes of layers, containers apart, that a value is, or holds: a class, several, a table by class."""
    held = value if isinstance(value, tuple | list | set | frozenset | dict) else getattr(value, "__args__", (value,))
    return tuple(v for v in held if isinstance(v, type) and issubclass(v, nn.Module) and v not in _NOT_ASKED_FOR)
