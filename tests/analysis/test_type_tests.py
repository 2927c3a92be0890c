"""Forwards that ask for the class of their layers, which a conversion changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import distance
from helpers.nets import randomize
from torch import Tensor, nn

import normswap
from normswap.analysis.type_tests import find_type_tests

KINDS = (nn.Conv1d, nn.Conv2d)
BY_KIND = {nn.Conv2d: 2.0}
BY_NAME = {"Conv2d": 2.0, "BatchNorm2d": 3.0}


class Asking(nn.Module):
    """Doubles what the layers give that `test` finds."""

    kinds = (nn.Conv2d,)

    def __init__(self, test: Callable[[nn.Module, nn.Module], Any]):
        super().__init__()
        self.test = test
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * (2 if self.test(self, layer) else 1)
        return x


def is_conv(layer: nn.Module) -> bool:
    return type(layer) is nn.Conv2d


def by_case(self: nn.Module, layer: nn.Module) -> bool:
    match layer:
        case nn.BatchNorm2d():
            return True
    return False


def in_two_steps(self: nn.Module, layer: nn.Module) -> bool:
    kind = type(layer)
    return kind in (
        nn.Linear,
        nn.Conv2d,
    )


def forbids(self: nn.Module, layer: nn.Module) -> bool:
    if self.training:
        assert not isinstance(layer, nn.BatchNorm2d)
    return False


TESTS: dict[str, tuple[Callable[[nn.Module, nn.Module], Any], str]] = {
    "is": (lambda self, layer: type(layer) is nn.Conv2d, "conv"),
    "equals": (
        lambda self, layer: nn.Conv2d == type(layer),  # noqa: E721
        "conv",
    ),
    "__class__": (lambda self, layer: layer.__class__ is not nn.Conv2d, "conv"),
    "one of a global": (lambda self, layer: type(layer) in KINDS, "conv"),
    "one of the class's own": (lambda self, layer: type(layer) in self.kinds, "conv"),
    "a table": (lambda self, layer: BY_KIND.get(type(layer)), "conv"),
    "in two steps": (in_two_steps, "conv"),
    "a helper": (lambda self, layer: is_conv(layer), "conv"),
    "its name": (lambda self, layer: type(layer).__name__ == "Conv2d", "conv"),
    "the start of its name": (lambda self, layer: layer.__class__.__name__.startswith("Conv"), "conv"),
    "a part of its name": (lambda self, layer: "BatchNorm" in layer._get_name(), "norm"),
    "isinstance of a norm": (lambda self, layer: isinstance(layer, (nn.BatchNorm2d, nn.Linear)), "norm"),
    "a case": (by_case, "norm"),
    "isinstance of a convolution": (lambda self, layer: isinstance(layer, nn.Conv2d), ""),
    "of another class": (lambda self, layer: type(layer) is nn.Linear, ""),
    "only to forbid it": (forbids, ""),
    "of a value": (lambda self, layer: type(self.training) is bool, ""),
}
"""A question, and which layer gn-ws must leave for it."""


@pytest.mark.parametrize("name", TESTS)
def test_what_is_asked_for_is_left(name: str) -> None:
    test, kept = TESTS[name]
    torch.manual_seed(0)
    model = randomize(Asking(test)).double().eval()
    report = normswap.convert(model, "gn-ws").report
    found = {left.kind for left in report.left if "asks for the type of its layers" in left.reason}
    assert found == {"conv": {"weight"}, "norm": {"norm"}, "": set()}[kept]
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for target in ("ws", "wn"):
        try:
            converted = normswap.convert(model, target).model
        except normswap.ModelError as error:
            assert "asks for the type" in str(error) and kept == "conv"
            continue
        assert distance(model(x), converted(x)) < 1e-12


@functools.singledispatch
def by_dispatch(layer: nn.Module) -> bool:
    return False


by_dispatch.register(nn.BatchNorm2d, lambda layer: True)

SEEN_IN_A_TRACE: dict[str, tuple[Callable[[nn.Module, nn.Module], Any], set[str]]] = {
    "a table of names": (lambda self, layer: BY_NAME.get(layer.__class__.__name__), {"norm", "weight"}),
    "a part of its name in small letters": (lambda self, layer: "batchnorm" in type(layer).__name__.lower(), {"norm"}),
    "a dispatch": (lambda self, layer: by_dispatch(layer), {"norm"}),
    "one of some": (lambda self, layer: any(type(layer) is kind for kind in (nn.BatchNorm2d, nn.ReLU)), {"norm"}),
    "an attribute": (lambda self, layer: hasattr(layer, "num_features"), {"norm"}),
    "its buffers": (lambda self, layer: [*layer.named_buffers()], {"norm", "weight"}),
    "a way that is computed": (
        lambda self, layer: vars(nn).get("Conv" + "2d") is getattr(layer, "__cl" + "ass__"),
        {"weight"},
    ),
}
"""A question that a trace of the forward with other layers answers otherwise, and for which layers."""


@pytest.mark.parametrize("name", SEEN_IN_A_TRACE)
@pytest.mark.parametrize("with_inputs", [False, True])
def test_what_makes_a_difference_in_a_trace_is_left(name: str, with_inputs: bool) -> None:
    test, kept = SEEN_IN_A_TRACE[name]
    torch.manual_seed(0)
    model = randomize(Asking(test)).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    given = {"example_inputs": x} if with_inputs else {}
    for target, kinds in (("frozen", {"norm"}), ("gn-ws", {"norm", "weight"}), ("ws", {"weight"})):
        try:
            converted, report = normswap.convert(model, target, **given)
        except normswap.ModelError as error:
            assert kinds & kept and any(why in str(error) for why in ("asks for the type", "reads directly"))
            continue
        left = {entry.kind for entry in report.left if "asks" in entry.reason}
        assert left <= kept
        if report.exact:
            assert distance(model(x), converted(x)) < 1e-12
        else:
            assert left == kinds & kept


class Untraceable(Asking):
    """Asks for the length of a batch, which no symbolic run knows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * min(len(x), 1))


@pytest.mark.parametrize("target", ["ws", "gn-ws", "gn-wn"])
def test_with_inputs_the_exact_half_is_measured(target: str) -> None:
    """What neither code nor a trace shows: the class is asked for by a way that is computed."""
    model = randomize(
        Untraceable(lambda self, layer: vars(nn).get("Conv" + "2d") is getattr(layer, "__cl" + "ass__"))
    ).eval()
    assert not find_type_tests(model)
    with pytest.raises(normswap.ModelError, match="should be exact"):
        normswap.convert(model, target, example_inputs=torch.randn(2, 3, 6, 6))
    assert normswap.convert(model, "gn", example_inputs=torch.randn(2, 3, 6, 6)).report.totals.norms_changed == 1


def test_what_moves_the_output_on_inputs_stays_where_a_forward_asks_for_it() -> None:
    model = randomize(Asking(lambda self, layer: type(layer) is nn.Conv2d)).eval()
    x = torch.randn(2, 3, 6, 6)
    report = normswap.convert(model, "gn-ws", example_inputs=x).report
    assert [(left.kind, "asks for the type" in left.reason) for left in report.left] == [("weight", True)]
    assert report.totals.norms_changed == 1


def test_a_measured_conversion_is_loaded_again(tmp_path: Path) -> None:
    """The recipe decides then, though the code may ask."""
    model = randomize(Asking(lambda self, layer: type(layer) is nn.Conv2d and x is None)).eval()
    x = torch.randn(2, 3, 6, 6)
    converted, report = normswap.convert(model, "ws", example_inputs=x)
    normswap.save(converted, tmp_path / "m.safetensors", report=report)
    loaded = normswap.load(tmp_path / "m.safetensors", model=lambda: Asking(model.test)).eval()
    torch.testing.assert_close(loaded(x), model(x))
