"""What the code of a module says that its forward may use of the modules in it, where no trace tells."""

import dis
import itertools
import types
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from torch import nn

_WALKS = {"modules", "named_modules", "get_submodule"}  # which lead to any module at all
_LISTS = {"children", "named_children", "_modules", "__dict__"}  # which lead to the children of a module
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What no forward runs, or what is called like a method of tensors: `x.to(...)`.
_BESIDE_FORWARD = {"__init__", *(name for name in vars(nn.Module) if not name.startswith("__"))} - {"forward"}
_BESIDE = ("CACHE", "RESUME", "EXTENDED_ARG", "NOP", "COPY_FREE_VARS", "NOT_TAKEN")


class Uses(NamedTuple):
    """What the code that a forward may run does with attributes, by their names.

    The code cannot tell which object a name stands for, so a name counts for each module that it may mean.
    """

    pairs: frozenset[tuple[str, str]]
    """(a, b) where it says `.a.b`."""
    opened: frozenset[str]
    """Attributes of what is not `self` and no attribute: of a local variable, or an element of a list."""
    handled: frozenset[str]
    """Attributes whose value is neither called nor asked for an attribute at once: it may be iterated or handed on."""
    chooses: bool
    """Whether it may take any child of `self`, as by a name that is computed."""
    lists: int
    """How often it takes any child of another module so: as deep it may reach."""
    walks: bool
    """Whether it may take any module at all."""


def parts_used(module: nn.Module) -> Iterator[str]:
    """The paths of the modules below `module` that its code may use by themselves, past their parent's forward.

    Asked where its forward cannot be traced. Parts may be traced then, each by itself, but what such a forward does
    with what lies in a part is in none of these traces: it may run `self.block.conv` beside the block's own forward,
    take the elements of an `nn.Sequential` one by one, or call `self.block.features(x)`, a method that runs any.
    """
    uses = uses_of(module)
    handled = [(name, child, uses.chooses or name in uses.handled) for name, child in _children(module)]
    pending = [(name, name, child, is_value, uses.lists) for name, child, is_value in handled]
    while pending:
        path, name, part, is_value, lists = pending.pop()
        if _runs_a_method(part, name, uses, is_value):
            yield from (f"{path}.{inner}" for inner, _ in part.named_modules(remove_duplicate=False) if inner)
            continue
        listed = uses.walks or any((name, way) in uses.pairs for way in _LISTS) or (is_value and lists > 0)
        # A block that is made as a subclass of a container is taken for one only where it stands in the module itself.
        container = _is_container(part) if path == name else type(part) in _CONTAINERS
        for inner, child in _children(part):
            if listed or (is_value and container) or (name, inner) in uses.pairs or (is_value and inner in uses.opened):
                yield f"{path}.{inner}"
                pending.append((f"{path}.{inner}", inner, child, True, lists if container else lists - 1))


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _is_container(module: nn.Module) -> bool:
    """Whether the parts of a module can be taken by an index, a key or a loop."""
    return any(hasattr(type(module), name) for name in ("__getitem__", "__iter__"))


def _runs_a_method(part: nn.Module, name: str, uses: Uses, is_value: bool) -> bool:
    """Whether the code may call a method of a part, other than its forward and what torch gives each module."""
    named = {b for a, b in uses.pairs if a == name} | (uses.opened if is_value else frozenset())
    methods = {attribute: getattr(type(part), attribute, None) for attribute in named - {"forward", "__class__"}}
    return any(callable(m) and not str(getattr(m, "__module__", "")).startswith("torch.nn.") for m in methods.values())


def uses_of(module: nn.Module) -> Uses:
    """What the code that `module.forward` may run does with attributes."""
    pairs: set[tuple[str, str]] = set()
    opened: set[str] = set()
    handled: set[str] = set()
    chooses, lists, walks = False, 0, False
    files = {owner.__module__ for owner in type(module).__mro__}
    for code, selfs, function in reached_code(module):
        steps = steps_of(code)
        # What a library's tools walk over elsewhere, as to hook what a user wants to see, runs no layer by itself.
        may_walk = function.__module__ in files
        walks = walks or (may_walk and "vars" in code.co_names)
        for before, step, after in _attributes(steps):
            name, of_self = step.argval, _loads(before, selfs)
            if before.opname == "LOAD_ATTR":
                pairs.add((before.argval, name))
            elif not of_self:
                opened.add(name)
            if not (_is_called(step) or after[0].opname in ("LOAD_ATTR", "LOAD_METHOD") or _is_asked_for(after)):
                handled.add(name)
            nested = name in _LISTS and code.co_name in code.co_names + code.co_freevars
            walks = walks or (may_walk and (name in _WALKS or nested))
            chooses = chooses or (name in _LISTS and of_self)
            lists += may_walk and name in opened & _LISTS
        for of_self, asked in _asked_by_string(steps, module, selfs):
            opened, handled = opened | {asked} - {""}, handled | {asked} - {""}
            chooses, lists = chooses or (not asked and of_self), lists + (not asked and not of_self)
    return Uses(frozenset(pairs), frozenset(opened), frozenset(handled), chooses, lists, walks)


def _attributes(
    steps: list[dis.Instruction],
) -> Iterator[tuple[dis.Instruction, dis.Instruction, list[dis.Instruction]]]:
    """Each instruction that loads an attribute, with that before and two after it; none of what a global stands for."""
    for index, (before, step) in enumerate(itertools.pairwise(steps)):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and before.opname != "LOAD_GLOBAL":
            yield before, step, steps[index + 2 : index + 4]


def _is_asked_for(after: list[dis.Instruction]) -> bool:
    """Whether a value is only compared with None, or as a condition: `if self.head is not None`."""
    first, second = after[0], after[-1]
    condition = "JUMP" in first.opname and "OR_POP" not in first.opname
    compared = first.opname.startswith("LOAD_CONST") and first.argval is None and second.opname == "IS_OP"
    return condition or compared or first.opname in ("UNARY_NOT", "TO_BOOL")


def steps_of(code: types.CodeType) -> list[dis.Instruction]:
    """The instructions of a code, without those that do nothing to values."""
    return [i for i in dis.get_instructions(code) if i.opname not in _BESIDE]


def _is_called(step: dis.Instruction) -> bool:
    """Whether an attribute is loaded to be called: Python up to 3.11 has an instruction of its own for it."""
    return step.opname == "LOAD_METHOD" or "NULL|self" in step.argrepr


def _loads(step: dis.Instruction, names: Iterable[str]) -> bool:
    """Whether an instruction loads one of the variables `names`; some load two, of which the last counts."""
    last = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
    return step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and last in names


def _asked_by_string(
    steps: list[dis.Instruction], module: nn.Module, selfs: Iterable[str] = ()
) -> Iterator[tuple[bool, str]]:
    """For each use of `getattr`: whether it is asked of `self` itself, and for which name; "" for a computed one."""
    for index, step in enumerate(steps):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval == "getattr":
            made = _makers_of_arguments(steps[index + 1 :])
            owner, name = [*made, [], []][:2]
            if owner and owner[0].opname == "LOAD_GLOBAL" and all(i.opname == "LOAD_ATTR" for i in owner[1:]):
                continue  # of a module of Python or the like
            if owner and _is_plain_value(owner[-1], module):
                continue  # as of `self.config`
            of_self = len(owner) == 1 and _loads(owner[0], selfs)
            constant = len(name) == 1 and name[0].opname.startswith("LOAD_CONST") and type(name[0].argval) is str
            yield of_self, name[0].argval if constant else ""


def _is_plain_value(step: dis.Instruction, module: nn.Module) -> bool:
    """Whether an instruction loads an attribute of a name under which the module holds a value that has no layers."""
    value = vars(module).get(step.argval) if step.opname == "LOAD_ATTR" else None
    return value is not None and not callable(value) and not isinstance(value, list | tuple | set | dict)


def _makers_of_arguments(steps: list[dis.Instruction]) -> list[list[dis.Instruction]]:
    """The instructions that make each argument of a call; `steps` are those behind the one that loads the callable."""
    depth, made = 0, list[list[dis.Instruction]]()
    for step in itertools.dropwhile(lambda s: s.opname == "PUSH_NULL", steps):
        if isinstance(step.argval, tuple) and step.opname.startswith("LOAD_FAST"):  # it loads two
            made += [[step._replace(argval=name)] for name in step.argval] if depth == 0 else []
            depth += 2
            continue
        depth += dis.stack_effect(step.opcode, step.arg, jump=False)
        if depth < 1:
            return made
        made += [[] for _ in range(depth - len(made))]
        made[depth - 1].append(step)
        del made[depth:]
    return made


ReachedCode = tuple[types.CodeType, frozenset[str], types.FunctionType]
"""A code, the names that `self` has in it, and the function that it is in."""


def reached_code(module: nn.Module, only_named: bool = False) -> list[ReachedCode]:
    """The code that the forward of a module may run.

    The forward's own, and that of methods, of functions that the module holds, and of functions of the same package,
    whose names occur in what it may run. All of the class's code where it may choose a method by a string, unless
    `only_named`: classes of libraries have much code beside their forward, which looks attributes up so.
    """
    cls = type(module)
    owners = itertools.takewhile(lambda owner: not owner.__module__.startswith("torch."), cls.__mro__)
    held = [(name, value) for owner in owners for name, value in vars(owner).items()]
    held += [(name, value) for name, value in vars(module).items() if callable(value) or name == "forward"]
    methods = [(name, f, _self_names(value, f)) for name, value in held for f in _functions(value)]
    called, reached = {"forward"}, list[ReachedCode]()
    seen: set[types.FunctionType] = set()
    computed = False
    pending = [entry for entry in methods if entry[0] in called]
    while pending:
        for _, function, selfs in pending:
            seen.add(function)
            found = list(_codes(function.__code__))
            reached += [(code, selfs, function) for code in found]
            steps = [steps_of(code) for code in found]
            asked = {name for code in steps for _, name in _asked_by_string(code, module)}
            called |= asked | {step.argval for code in steps for _, step, _ in _attributes(code)}
            computed = computed or ("" in asked and not only_named)
            helpers = [f for code in steps for f in _functions_named(code, function, cls.__module__.partition(".")[0])]
            methods += [(f.__name__, f, frozenset()) for f in helpers]
            called |= {f.__name__ for f in helpers}
        new = [method for method in methods if method[1] not in seen and method[0] not in _BESIDE_FORWARD]
        wanted = [method for method in new if computed or method[0] in called]
        pending = list({function: (name, function, selfs) for name, function, selfs in wanted}.values())
    return reached


def _self_names(value: Any, function: types.FunctionType) -> frozenset[str]:
    """How a function of a class calls the module: its first argument, or `self` in those that a decorator holds."""
    first = function.__code__.co_varnames[:1] if function.__code__.co_argcount else ()
    return frozenset(first if value is function or getattr(value, "fget", None) is function else ()) | {"self"}


def _functions_named(
    steps: list[dis.Instruction], function: types.FunctionType, package: str
) -> Iterator[types.FunctionType]:
    """The functions of a package that the code of `function` names, which may be handed the module or its parts."""
    for step, after in itertools.pairwise(steps):
        value = function.__globals__.get(step.argval) if step.opname == "LOAD_GLOBAL" else None
        if isinstance(value, types.ModuleType) and after.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            value = getattr(value, after.argval, None)
        if isinstance(value, types.FunctionType) and value.__module__.partition(".")[0] == package:
            yield value


def _functions(value: Any) -> list[types.FunctionType]:
    """The functions that an attribute runs: a method's, a property's, and those that decorators hold."""
    found: list[types.FunctionType] = []
    pending = [getattr(value, "fget", getattr(value, "__func__", getattr(value, "func", value)))]
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
