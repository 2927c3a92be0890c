"""What a subclass of torch's convolutions and linear layers computes, told by a small trial.

The code of a subclass is anybody's. Where its output is still a convolution's (of a padded input, cut, or computed in
parts), each channel is linear in its own filter, plus the bias: then weights may be re-parametrized under it, and a
norm may be folded into it.
"""

from __future__ import annotations

import enum
import functools
import inspect
import numbers
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.analysis.copies import MODULE_STATE, skeleton
from normswap.errors import first_line
from normswap.layers.matching import scale_filters_
from normswap.layers.reparametrized import TRANSPOSED, as_filters, filter_groups
from normswap.layers.subclasses import WITH_FORMS, with_weight

_COUNTS = ("in_channels", "out_channels", "groups", "in_features", "out_features")
_TOLERANCE = 1e-9  # beside what is added up, in float64
_MOST_ELEMENTS = 1 << 24  # of a weight that is tried
_DECADES = 3  # filters are scaled by up to 1e3 and down to 1e-3, past where clipping or rounding would show
_DATA = (
    numbers.Number, str, bytes, type, type(None), enum.Enum, torch.dtype, torch.device, types.FunctionType,
    types.BuiltinFunctionType,
)  # fmt: skip


class Unlike(Exception):
    """Says how a layer is not like its base."""


def own_forward(cls: type[nn.Module]) -> str:
    """The method by which a subclass of a convolution or linear layer runs its own code; "": it has none."""
    base = _base_of(cls)
    own = (m for m in ("forward", "_conv_forward") if getattr(cls, m, None) is not getattr(base, m, None))
    return next(own, "") if base else ""


def _base_of(cls: type[nn.Module]) -> type[nn.Module] | None:
    return next((c for c in cls.__mro__ if c in WITH_FORMS), None)


def why_not_linear(layer: nn.Module, with_bias: bool) -> str:
    """Why an output channel of `layer` may not be linear in its filter, plus its bias; "": it is.

    Args:
        layer: a convolution, a transposed one or a linear layer, or of a subclass, on any device. It is left as it is:
            what runs is a copy of it on other tensors, in float64 on the CPU.
        with_bias: whether to give it a bias, also where it has none.
    """
    if not own_forward(type(layer)):
        return ""
    try:
        return _tried(_specimen(layer, with_bias))
    except Unlike as problem:
        return str(problem)
    except Exception as error:  # a forward is anybody's code
        return f"cannot be tried ({first_line(error)[:80]})"


@dataclass(frozen=True)
class _Specimen:
    """A layer without its tensors. Two are equal that differ in how many channels they have, at most."""

    kind: Any
    """What its forward can read of it, numbers of channels apart."""
    with_bias: bool
    layer: nn.Module = field(compare=False)
    shape: torch.Size = field(compare=False)
    """Of the weight."""
    settings: Any = field(compare=False)


def _specimen(layer: Any, with_bias: bool) -> _Specimen:
    own = inspect.signature(type(layer).forward).parameters.values()
    arguments = [p.name for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    known = 3 if isinstance(layer, TRANSPOSED) else 2  # self, input, output_size
    if len(arguments) > known:
        raise Unlike(f"takes more than an input ({', '.join(arguments[known:])})")
    held = [name for name, _ in (*layer.named_parameters(), *layer.named_buffers()) if name not in ("weight", "bias")]
    if held:
        raise Unlike(f"may depend on more than its weight and bias ({', '.join(held[:3])})")
    if layer.weight.numel() > _MOST_ELEMENTS:
        raise Unlike("is too large to be tried")
    settings = settings_of(layer)
    copied = skeleton(layer)
    copied._parameters, copied._buffers = {"bias": None}, {}
    cls, attributes, children = settings
    groups = getattr(layer, "groups", 1)
    several = groups > 1, groups == getattr(layer, "in_channels", None)
    alike = cls, *((name, value) for name, value in attributes if name not in _COUNTS), children, several
    return _Specimen(alike, with_bias, copied, layer.weight.shape, settings)


def settings_of(layer: nn.Module) -> Any:
    """All that the forward of a module without tensors can read of it, as a value to compare."""
    own = {name: value for name, value in vars(layer).items() if name not in MODULE_STATE and name != "weight"}
    attributes = tuple((name, _value(name, value)) for name, value in sorted(own.items()))
    children = tuple((name, child and settings_of(child)) for name, child in layer._modules.items())
    return type(layer), attributes, children


def _value(name: str, value: Any) -> Any:
    """An attribute as a value to compare; raises `Unlike` where it may hold more than plain data."""
    if isinstance(value, list | tuple):
        return type(value), *(_value(name, item) for item in value)
    if isinstance(value, dict):
        return dict, *((key, _value(name, item)) for key, item in value.items())
    if isinstance(value, functools.partial):
        return _value(name, [value.func, value.args, value.keywords])
    if not isinstance(value, _DATA):
        raise Unlike(f"may depend on more than its weight and bias ({name}, a {type(value).__name__})")
    return type(value), value


# ---- the trial ----


@functools.lru_cache(maxsize=4096)
def _tried(specimen: _Specimen) -> str:
    """`why_not_linear` of layers like this; raises whatever its forward raises."""
    layer = skeleton(specimen.layer)
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.random.fork_rng([]):
            for training, shape in zip((False, True), _input_shapes(layer), strict=True):
                layer.train(training)
                _check_linear(_Trial(layer, specimen, _normal(shape, generator)), generator)
    except Unlike as problem:
        return str(problem)
    return ""


def _normal(shape: Iterable[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _input_shapes(layer: Any) -> list[tuple[int, ...]]:
    """Shapes of two inputs: of odd and even lengths, with room for a few places of the filters."""
    if isinstance(layer, nn.Linear):
        return [(2, 3, layer.in_features), (2, layer.in_features)]
    wide = 2 if len(layer.kernel_size) == 1 else 1  # causal ones cut off as much as they pad
    reach = [wide * d * (k - 1) + k for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [
        (1, layer.in_channels, *(r + times * s + i for i, (r, s) in enumerate(zip(reach, layer.stride, strict=True))))
        for times in (1, 2)
    ]


class _Trial(NamedTuple):
    """A layer on one input."""

    layer: nn.Module
    specimen: _Specimen
    x: Tensor

    def run(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output for a weight and a bias."""
        self.layer._parameters["bias"] = None if bias is None else nn.Parameter(bias)
        held = weight.clone()
        run: Any = with_weight(self.layer, type(self.layer), held)
        output = run.forward(self.x.clone())
        if settings_of(run) != self.specimen.settings or run.weight is not held or not torch.equal(held, weight):
            raise Unlike("leaves something behind in the layer")
        if not isinstance(output, Tensor) or output.dim() != self.x.dim() or output.dtype != torch.float64:
            raise Unlike("gives something else than a tensor like the input")
        return output if isinstance(run, nn.Linear) else output.movedim(1, -1)


def _check_linear(trial: _Trial, generator: torch.Generator) -> None:
    """Raise `Unlike` unless filters that are scaled and added, and a bias, do the same to the output's channels."""
    groups, shape = filter_groups(trial.layer), trial.specimen.shape
    first, second = (_normal(shape, generator) for _ in range(2))
    channels = len(as_filters(first, groups))
    none = torch.zeros(channels, dtype=torch.float64) if trial.specimen.with_bias else None
    one, other = trial.run(first, none), trial.run(second, none)
    signs = 1 - 2 * torch.randint(2, (3, channels), generator=generator)
    s, t, bias = signs * 10 ** (_DECADES * (2 * torch.rand(3, channels, generator=generator, dtype=torch.float64) - 1))
    s[0] = 10**_DECADES
    if one.shape[-1] != channels:
        raise Unlike("gives something else than a tensor of its channels")
    if not torch.equal(trial.run(first, none), one):
        raise Unlike("gives another output the second time")
    scale_filters_(first, s, groups)
    scale_filters_(second, t, groups)
    bound = _TOLERANCE * (s.abs() * one.abs().max() + t.abs() * other.abs().max() + bias.abs())
    off = trial.run(first + second, none) - (s * one + t * other)
    if not (off.abs() <= bound).all():
        raise Unlike("is not linear in its weight")
    if none is not None:
        off = trial.run(first + second, bias) - (s * one + t * other + bias)
        if not (off.abs() <= bound).all():
            raise Unlike("does not just add its bias")
