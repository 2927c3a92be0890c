"""Which classes a pickle may name: modules of known libraries, plain data, and what the user allows."""

import argparse
import re
import shlex
import types
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, EnumMeta
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap.checkpoints import pickled_objects as objects
from normswap.checkpoints.allowed_calls import FAMILIES, TABLE, Row, module_row, row_of
from normswap.errors import FileError, UnsafeFileError

_CODE = ("__new__", "__init__", "__post_init__", "__setstate__", "__setattr__", "__getattribute__", "__del__",
         "__reduce__", "__reduce_ex__", "__setitem__", "append", "extend", "_missing_")  # fmt: skip
"""What runs while a pickle is read, or once what it made is gone."""
_PLAIN_BASES = {object, dict, list, tuple, set, str, int, float, Enum, types.SimpleNamespace, argparse.Namespace}
_SYSTEM = ("sys", "os", "posix", "nt")  # nothing of these is loaded, whatever is allowed
_ALLOWED = "the user allows it by its name"
_LONGEST_LINE = 400  # characters of names to type: more are put together as patterns


@dataclass(frozen=True)
class Allowance:
    """What a user allows beyond what is known to be harmless."""

    classes: Mapping[str, Any]
    """By full name, whatever it is: a class or a function."""
    patterns: tuple[str, ...] = ()
    """Of full names; they allow modules and plain data alone: no code of a package is at the service of a file."""


def parse_allowance(allow: Iterable[str | type], path: Path) -> Allowance:
    """What the entries of `allow` name: classes, their full names, or patterns such as `package.models.*`.

    Raises `FileError` for what is no name, or cannot be imported; `path` is the file that is to be read.
    """
    classes, patterns = {}, []
    for entry in allow:
        if isinstance(entry, type):
            classes[f"{entry.__module__}.{entry.__qualname__}"] = entry
        elif re.search(r"[*?\[]", entry):
            if re.search(r"[*?\[]", entry.partition(".")[0]) or "." not in entry:
                raise FileError(f"--allow {entry}: a pattern begins with the name of a package: package.*")
            patterns.append(entry)
        else:
            classes[entry] = imported(entry, path)
    return Allowance(classes, tuple(patterns))


def find_row(name: str, allowance: Allowance, path: Path) -> Row | None:
    """What a pickle may do with the object called `name`; None if it may not name it."""
    if name in TABLE or name.rpartition(".")[0] in _SYSTEM:
        return row_of(name)
    if name in allowance.classes:
        return _row_allowed_by_name(allowance.classes[name])
    if class_behind(name) != name and find_row(class_behind(name), allowance, path) is None:
        return None
    by_pattern = [pattern for pattern in allowance.patterns if fnmatchcase(name, pattern)]
    literal = {part for pattern in by_pattern for part in pattern.split(".")}
    if any(part.startswith("__") and part not in literal for part in name.split(".")):
        return None
    if name.startswith(FAMILIES) or by_pattern:
        found = imported(name, path)
        if _is_module(found):
            return module_row(found) if name.startswith(FAMILIES) else _row_allowed_by_name(found)
        known = by_pattern or isinstance(found, EnumMeta)
        if known and _is_plain_data(found) and _is_of(found, name.partition(".")[0]):
            return _row_of_plain_data(found)
    return None


def _row_allowed_by_name(found: Any) -> Row:
    if not isinstance(found, type):
        return Row(_ALLOWED, found, call=lambda claims, *arguments: found(*arguments))
    if issubclass(found, nn.Module):
        return Row(_ALLOWED, found, new=partial(objects.blank, found), build=objects.restore_module)
    return Row(
        _ALLOWED,
        found,
        call=lambda claims, *arguments: found(*arguments),
        new=lambda claims, *arguments: found.__new__(found, *arguments),
        build=objects.restore_as_pickle,
        filled=issubclass(found, dict | list | deque),
    )


def _row_of_plain_data(found: Any) -> Row:
    called = issubclass(found, Enum | set | types.SimpleNamespace)
    return Row(
        "has no code of its own, in a package that the user has or allows",
        found,
        call=partial(objects.called_plain, found) if called else None,
        new=partial(objects.of_plain_base, found),
        build=objects.restore_as_pickle,
        filled=issubclass(found, dict | list),
    )


def class_behind(name: str) -> str:
    """The name of the class that a form was made of by `normswap.layers.subclasses`; else `name` itself."""
    return name.partition("@")[2].replace("@", ".").replace("/", ".") or name


def refusal(names: Sequence[str], allowance: Allowance, path: Path) -> UnsafeFileError:
    """The error for a file that holds classes called `names`, with what to type to allow them all."""
    commands = [name for name in names if name.rpartition(".")[0] in _SYSTEM]
    if commands:
        return UnsafeFileError(f"{path}: holds {', '.join(commands[:3])}, which is loaded only with --trust")
    patterned = [name for name in names if any(fnmatchcase(name, pattern) for pattern in allowance.patterns)]
    but = f"; a pattern allows modules and plain data alone: {', '.join(patterned[:3])} is neither" if patterned else ""
    options, listed = list(names), ""
    if sum(map(len, options)) > _LONGEST_LINE:
        packages = {name.partition(".")[0] for name in names if name not in patterned}
        options, listed = [f"{package}.*" for package in sorted(packages)] + patterned, f"; they are {', '.join(names)}"
    what = f"{names[0]}, which is not a class" if len(names) == 1 else f"{len(names)} classes that are not"
    line = " ".join(f"--allow {shlex.quote(option)}" for option in options)
    return UnsafeFileError(
        f"{path}: holds {what} of torch, torchvision, timm or normswap{but}. If you trust that, allow it: {line} "
        f"(in Python: allow={options}); --trust runs any code in the file{listed}"
    )


def imported(name: str, path: Path) -> Any:
    """The object with the full name `name`. Raises `FileError` where there is none."""
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise FileError(f"--allow {name}: is not a full class name; write package.module.Class")
    try:
        return getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, TypeError):
        raise FileError(
            f"{path}: needs {name}, which cannot be imported here; install its package, "
            "or run in the folder that holds it"
        ) from None


def _is_module(found: Any) -> bool:
    compiled = torch.fx.GraphModule | torch.jit.ScriptModule
    return isinstance(found, type) and issubclass(found, nn.Module) and not issubclass(found, compiled)


def _is_of(found: type, package: str) -> bool:
    return found.__module__.partition(".")[0] == package


def _is_plain_data(found: Any) -> bool:
    """Whether making and filling an object of a class runs none of the class's own code."""
    if not isinstance(found, type) or type(found) not in (type, EnumMeta):
        return False
    return all(cls in _PLAIN_BASES or _adds_no_code(cls) for cls in found.__mro__) and found not in _PLAIN_BASES


def _adds_no_code(cls: type) -> bool:
    own = {name: vars(cls)[name] for name in _CODE if name in vars(cls)}
    if "__dataclass_params__" in vars(cls):  # made by `dataclass`, in place of whatever the class had
        made = vars(cls)["__dataclass_params__"]
        generated = {"__init__"} if made.init else set()
        generated |= {"__setattr__"} if made.frozen else set()
        own = {name: code for name, code in own.items() if name not in generated}
    if cls.__bases__ == (tuple,) and hasattr(cls, "_fields"):  # a named tuple
        own.pop("__new__", None)
    if issubclass(cls, Enum):
        own = {name: code for name, code in own.items() if getattr(code, "__module__", "enum") != "enum"}
    setters = [value for value in vars(cls).values() if isinstance(value, property) and value.fset]
    return not own and not setters
