"""A conversion on another device. Torch has its CPU and `meta` everywhere: the CPU stands in for a distant one."""

import copy
from typing import Any

import pytest
import torch
from helpers.nets import chain
from torch import nn

import normswap
from normswap.conversion import device, pipeline
from normswap.conversion.request import Request
from normswap.errors import ModelError, OptionError
from normswap.targets.options import Options
from normswap.targets.target import TARGETS

X = torch.randn(12, 3, 8, 8)


@pytest.mark.parametrize("wrong", ["nowhere", "cuda:99", "meta", 3.5, "cpu:x"])
def test_a_wrong_device_is_one_line(wrong: Any, tmp_path: Any) -> None:
    with pytest.raises(OptionError, match=r"^device: .* cannot be used here \(.*\); give cpu") as caught:
        normswap.convert(chain(8), "gn", calibrate=X, device=wrong)
    assert "\n" not in str(caught.value)
    torch.save(chain(8), tmp_path / "net.pt")
    with pytest.raises(OptionError, match="^device: "):
        normswap.convert_file(tmp_path / "net.pt", "gn", device=wrong)


def test_models_that_are_nowhere_or_everywhere() -> None:
    there = chain(8).to("meta")
    with pytest.raises(ModelError, match="the model is on meta: "):
        normswap.convert(there, "gn", device="cpu")
    mixed = chain(8)
    mixed.register_buffer("other", torch.zeros(1, device="meta"))
    with pytest.raises(ModelError, match="the model is on cpu, meta: "):
        normswap.convert(mixed, "gn", device="cpu")


def test_the_same_comes_of_it() -> None:
    model = chain(8, 8).eval()
    wanted = normswap.convert(model, "gn", calibrate=X, calibrate_seconds=0).model
    given = normswap.convert(model, "gn", calibrate=X, calibrate_seconds=0, example_inputs=X, device="cpu").model
    assert all(map(torch.equal, wanted.state_dict().values(), given.state_dict().values()))


def test_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is moved: a copy there and its result back; the model itself where it is converted in place, and fails."""
    moves: list[tuple[nn.Module, str]] = []

    def move(model: nn.Module, where: torch.device) -> nn.Module:
        moves.append((model, str(where)))
        return model

    monkeypatch.setattr(pipeline, "move", move)
    monkeypatch.setattr(pipeline, "home_of", lambda model: torch.device("cuda", 7))
    model = chain(8, 8).eval()
    copied = normswap.convert(model, "gn", device="cpu").model
    assert [where for _, where in moves] == ["cpu", "cuda:7"]
    assert moves[0][0] is not model
    assert moves[1][0] is copied
    moves.clear()
    normswap.convert(model, "gn", device="cpu", inplace=True)
    assert [where for _, where in moves] == ["cpu", "cuda:7", "cuda:7"]
    assert all(moved is model for moved, _ in moves)
    moves.clear()
    with pytest.raises(ModelError, match="nothing to convert"):
        normswap.convert(model[0], "gn", device="cpu", inplace=True)
    assert moves == [(model[0], "cpu"), (model[0], "cuda:7")]


def test_inputs_follow() -> None:
    """Example inputs and batches are where the model is while it runs."""
    model = chain(8)
    model.get_submodule("0.1").momentum = None  # statistics of exactly these inputs
    model.train()(X.to(next(model.parameters())))
    model.eval()
    asked = Request(TARGETS["gn"], Options(calibrate=[X.double()], calibrate_seconds=0), X, device=torch.device("cpu"))
    assert pipeline.run(model, asked).report.drift is not None


def test_tied_tensors_stay_tied() -> None:
    """And parameters the same objects, their gradients with them."""
    model = chain(8, 8)
    first, second = (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    second.running_mean, second.weight = first.running_mean, first.weight
    parameters, values = list(model.parameters()), copy.deepcopy(model.state_dict())
    device.move(model, torch.device("cpu"))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(map(torch.equal, values.values(), model.state_dict().values()))
    device.move(model, torch.device("meta"))
    assert first.running_mean is second.running_mean
    assert first.running_mean is not None and first.running_mean.is_meta
    with pytest.raises(ModelError, match="the model cannot be moved to cpu: NotImplementedError: "):
        device.move(model, torch.device("cpu"))
