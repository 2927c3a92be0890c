"""Makes objects without their constructors, and fills them: modules, plain data, and what the user allows.

As in `pickled_tensors`, each function gets the `Claims` of the file first, then the object or the arguments.
"""

from typing import Any

from torch import nn

from normswap.checkpoints.pickle_claims import ITEM, Claims, refuse
from normswap.checkpoints.pickled_values import plain_number
from normswap.errors import FileError


def blank(kind: Any, claims: Claims, *arguments: Any) -> Any:
    """An object without content of a class that has no constructor of its own in C or in `__new__`."""
    if arguments or kind.__new__ is not object.__new__:
        raise refuse(f"makes a {kind.__name__} anew, where it is only restored")
    return object.__new__(kind)


def restore(claims: Claims, made: Any, state: Any) -> None:
    """Give an object its attributes, by no code of its class."""
    _check_attributes(made, state)
    claims.take(ITEM * len(state))
    vars(made).update(state)


def _check_attributes(made: Any, state: Any) -> None:
    if type(state) is not dict or not {*map(type, state)} <= {str}:
        raise FileError(f"it has a {type(made).__name__} whose attributes are none")


def restore_uuid(claims: Claims, made: Any, state: Any) -> None:
    """Give a UUID its number."""
    number = state.get("int") if type(state) is dict else None
    if type(number) is not int or not 0 <= number < 1 << 128:
        raise FileError("it has a UUID without a number")
    made.__setstate__({"int": number})


def restore_partial(claims: Claims, made: Any, state: Any) -> None:
    """Give a `functools.partial` what it will call."""
    made.__setstate__(state)


_MODULES_WITH_STATES = ("torch.nn.modules.", "timm.layers.", "torch._dynamo.")
"""Whose `__setstate__` fill in what older versions lack; once a compiler is imported, all of torch's go through its."""
_MOST_LAYERS = 10_000  # of a recurrent network


def restore_library_module(claims: Claims, made: Any, state: Any) -> None:
    """Give a module of a library its parts; those of compiled layers are code of their own in C, and refused."""
    restoring: Any = type(made).__setstate__
    if not restoring.__module__.startswith(_MODULES_WITH_STATES):
        raise refuse(f"restores a {type(made).__name__}, whose class runs code for that")
    _check_attributes(made, state)
    restore_module(claims, made, state)


def restore_module(claims: Claims, made: Any, state: Any) -> None:
    """Give a module its parts by its `__setstate__`, most often torch's."""
    parts = state if isinstance(state, dict) else {}
    if not all(isinstance(parts.get(name, {}), dict) for name in ("_modules", "_parameters", "_buffers")):
        raise FileError(f"it has a {type(made).__name__} whose parts are none")  # others run code when looked through
    claims.take(ITEM * len(parts))
    parts = parts if isinstance(made, nn.RNNBase) else {}
    layers, names = parts.get("num_layers", 0), parts.get("_flat_weights_names", [])
    if not 0 <= plain_number(layers) <= _MOST_LAYERS or type(names) is not list:
        raise FileError(f"it has a {type(made).__name__} of {layers:,} layers")
    made.__setstate__(state)


# ---- what the user allows ----


def restore_as_pickle(claims: Claims, made: Any, state: Any) -> None:
    """Give an object its state as pickle does: by its `__setstate__`, or as attributes and slots."""
    if hasattr(made, "__setstate__"):
        made.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    if attributes:
        vars(made).update(attributes)
    for name, value in (slots or {}).items():
        setattr(made, name, value)


def of_plain_base(kind: Any, claims: Claims, *arguments: Any) -> Any:
    """An object of a class without code that is a kind of text, number, tuple, list or dict."""
    if issubclass(kind, str | int | float) and not all(type(part) in (str, int, float, bool) for part in arguments):
        raise refuse(f"makes a {kind.__name__} of other than texts and numbers")
    claims.take(ITEM * sum(len(part) for part in arguments if isinstance(part, str | list | tuple | dict)))
    return kind.__new__(kind, *arguments)


def called_plain(kind: Any, claims: Claims, *arguments: Any) -> Any:
    """A member of an enumeration, or a set, of a class without code."""
    for key in arguments[0] if issubclass(kind, set) and arguments else arguments:
        claims.check_key(kind, key)
    claims.take(ITEM * sum(len(part) for part in arguments if isinstance(part, str | list | tuple)))
    return kind(*arguments)
