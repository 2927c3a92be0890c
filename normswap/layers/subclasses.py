"""Re-parametrized forms of subclasses of torch's layers, which keep the subclass's own forward, methods and name.

`form_of_subclass(StandardizedConv2d, Conv2dSame)` is a subclass of both. Pickles find it by its name in this file,
which says what it is made of: `StandardizedConv2d@timm/layers/conv2d_same@Conv2dSame`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from normswap.layers.reparametrized import CONVOLUTIONS, NORMALIZED, PLAIN, STANDARDIZED, TRANSPOSED
from normswap.layers.torch_normalization import normalized_by_torch, without_normalization

WITH_FORMS: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
"""Layers of whose subclasses there are forms."""
_FORMS: dict[str, Any] = {form.__name__: form for table in (STANDARDIZED, NORMALIZED) for form in table.values()}
_BETWEEN, _DOT = "@", "/"  # pickle takes a dot in a name for an attribute of an attribute


@functools.cache
def form_of_subclass(form: Any, cls: Any) -> Any:
    """The re-parametrized class `form` of torch's layer for `cls`, a subclass of that layer.

    Its weight is computed at each forward, which is the one of `cls`.
    """
    prefix = form.__name__.removesuffix(PLAIN[form].__name__)
    place = (form.__name__, cls.__module__, cls.__qualname__)
    members: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": _BETWEEN.join(place).replace(".", _DOT),
        "__doc__": cls.__doc__,
        "_plain_class": cls,
    }
    if form in STANDARDIZED.values():  # which has a parameter of the name `weight`; a normalized one computes it anyway
        members["forward"] = _forward_on_computed(cls)
    return type(cls)(f"{prefix}{cls.__name__}", (cls, form), members)


def form_for(layer: nn.Module, forms: Mapping[type[nn.Module], type[nn.Module]]) -> Any:
    """The class that a layer of a class in `forms`, or of a subclass of one, becomes."""
    cls: Any = type(layer)
    base = next(c for c in cls.__mro__ if c in forms)
    form: Any = forms[base]
    return form_of_subclass(form, cls) if cls is not base and base in WITH_FORMS else form


def _forward_on_computed(cls: type[nn.Module]) -> Any:
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(with_weight(self, cls, self.computed()), *args, **kwargs)

    return forward


def with_weight(layer: nn.Module, cls: type[nn.Module], weight: Any) -> nn.Module:
    """`layer` as an instance of `cls` that runs on `weight`; all else is the same objects.

    A module of its own, so that other threads may run the layer meanwhile.
    """
    instead = object.__new__(cls)
    others = {name: parameter for name, parameter in layer._parameters.items() if name != "weight"}
    instead.__dict__ = {**layer.__dict__, "_parameters": others, "weight": weight}
    return instead


def as_plain(layer: nn.Module) -> nn.Module:
    """A re-parametrized layer as an instance of the class that it was made from, on the same tensors; others as is."""
    if normalized_by_torch(layer):
        return without_normalization(layer)
    cls = plain_class(type(layer))
    if cls is type(layer):
        return layer
    ours = {f"weight_{name}" for name in ("gain", "shift", "g", "v")}
    held = {name: parameter for name, parameter in layer._parameters.items() if name not in ours}
    held.setdefault("weight", layer._parameters.get("weight_v"))
    plain = object.__new__(cls)
    buffers = {name: buffer for name, buffer in layer._buffers.items() if name not in ours}
    plain.__dict__ = {**vars(layer), "_parameters": held, "_buffers": buffers}
    return plain


def is_form(cls: type[nn.Module]) -> bool:
    """Whether a class is one that `form_of_subclass` has made."""
    return "_plain_class" in vars(cls)


def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a re-parametrized one was made from; any other class itself."""
    return next((made for c in cls.__mro__ if (made := vars(c).get("_plain_class") or PLAIN.get(c))), cls)


def __getattr__(name: str) -> Any:
    """The class that a pickle names."""
    form, *place = name.replace(_DOT, ".").split(_BETWEEN)
    if form not in _FORMS or len(place) != 2:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: Any = import_module(place[0])
    for attribute in place[1].split("."):
        found = getattr(found, attribute)
    if not (isinstance(found, type) and issubclass(found, PLAIN[_FORMS[form]])):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    cls: Any = found
    return form_of_subclass(_FORMS[form], cls)
