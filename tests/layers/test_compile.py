"""Converted modules are captured whole by torch.compile, torch.export and torch.fx, and copied and pickled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers.layer_kinds import KINDS, all_weights
from helpers.torch_versions import skip_where_torch_cannot
from torch import fx, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

import normswap

TARGETS = ("ws", "wn", "gn-ws", "bcn-wn", "est-ws", "frozen-wn", "fold-wn")
NAMES = (
    "Conv1d, BatchNorm1d",
    "Conv2d, BatchNorm2d",
    "ConvTranspose2d in groups",
    "Linear, BatchNorm1d",
    "BatchNormAct2d",
    "LSTMCell",
)
RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "RNN": lambda: nn.RNN(3, 4, bidirectional=True),
    "LSTM": lambda: nn.LSTM(3, 4, 2, batch_first=True),
    "GRU": lambda: nn.GRU(3, 4),
}


CASES = [(name, form) for name in NAMES for form in ("ws", "wn")] + [("Conv2d, BatchNorm2d", to) for to in TARGETS[2:]]
"""Each weight under both forms, and each form of norms once; whole nets are in tests/integration."""


@pytest.mark.parametrize(("name", "target"), CASES)
def test_a_graph_without_breaks(name: str, target: str) -> None:
    """Forward and gradients as in eager mode, in train mode too."""
    skip_where_torch_cannot(name)
    model = normswap.convert(KINDS[name].make(), target, **all_weights(target)).model
    x = KINDS[name].data()[0]
    for training in (False, True):
        model.train(training)
        other = copy.deepcopy(model)
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        wanted, got = model(x), compiled(x)
        torch.testing.assert_close(got, wanted)
        wanted.square().sum().backward()
        got.square().sum().backward()
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None:
                torch.testing.assert_close(theirs.grad, ours.grad)
        model.zero_grad()
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "target"), CASES)
def test_export_copy_and_pickle(name: str, target: str) -> None:
    skip_where_torch_cannot(name)
    model = normswap.convert(KINDS[name].make(), target, **all_weights(target)).model.eval()
    x = KINDS[name].data()[0]
    with torch.no_grad():
        wanted = model(x)
        torch._dynamo.reset()  # older torch exports through it, and counts the models
        exported = torch.export.export(model, (x,))
        others = [exported.module(), copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)]
        for other in others:
            torch.testing.assert_close(other(x), wanted)
    assert set(model.state_dict()) <= set(exported.state_dict) | {n for n, _ in exported.named_buffers()}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "LSTMCell"])
def test_a_symbolic_trace(name: str, target: str) -> None:
    """By torch.fx, on which feature extractors and quantization are built; weights are still the graph's parameters."""
    model = normswap.convert(KINDS[name].make(), target, **all_weights(target)).model.eval()
    traced, x = fx.symbolic_trace(model), KINDS[name].data()[0]
    torch.testing.assert_close(traced(x), model(x))
    traced(x).sum().backward()
    assert {n for n, p in traced.named_parameters() if p.grad is not None} == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("target", ["gn-ws", "fold-wn"])
def test_features_of_a_backbone(target: str) -> None:
    torch.manual_seed(0)
    model = normswap.convert(models.resnet18().eval(), target).model
    extractor, x = create_feature_extractor(model, {"layer2": "fine", "fc": "scores"}), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = extractor(x)
        torch.testing.assert_close(found["scores"], model(x))
    assert found["fine"].shape == (1, 128, 8, 8)


@pytest.mark.parametrize("form", ["ws", "wn"])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name: str, form: str) -> None:
    skip_where_torch_cannot(name)
    torch.manual_seed(0)
    model = normswap.convert(RECURRENT[name]().double().eval(), form, **all_weights(form)).model
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)[0]
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x)[0], wanted)
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x)[0], wanted)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], wanted)
    torch._dynamo.reset()


@pytest.mark.parametrize("form", ["ws", "wn"])
@pytest.mark.parametrize("name", RECURRENT)
def test_functional_call(name: str, form: str) -> None:
    """With other parameters, the weights that run are computed from these."""
    model = normswap.convert(RECURRENT[name]().double(), form, **all_weights(form)).model
    others = {key: value.detach() * 1.5 + 0.1 for key, value in model.named_parameters()}
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    got = torch.func.functional_call(model, others, (x,))[0]
    model.load_state_dict(others, strict=False)
    torch.testing.assert_close(got, model(x)[0])
    folded = normswap.fold(model).model
    torch.testing.assert_close(got, folded(x)[0])
