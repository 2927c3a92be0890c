"""Converted models leave PyTorch as they are: torch.export, ONNX under onnxruntime, torch.jit.trace."""

from __future__ import annotations

import copy
import functools
import io
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.nets import randomize
from torch import Tensor, nn
from torchvision import models

import normswap
from normswap.layers.reparametrized import PLAIN

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # of the older exporters
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Various(nn.Module):
    """Every kind of convolution, with a norm of its kind behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 3, stride=2, groups=2), nn.BatchNorm2d(8), nn.ReLU(),
        )  # fmt: skip
        self.line = nn.Sequential(
            nn.Conv1d(8, 8, 3, stride=2), nn.BatchNorm1d(8), nn.ReLU(),
            nn.ConvTranspose1d(8, 8, 3), nn.BatchNorm1d(8), nn.ReLU(),
        )  # fmt: skip
        self.volume = nn.Sequential(
            nn.Conv3d(8, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(),
            nn.ConvTranspose3d(8, 8, 2, bias=False), nn.BatchNorm3d(8), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maps(x)
        y: Tensor = self.head(self.line(x.flatten(2)).mean(2) + self.volume(x.unflatten(3, (3, -1))).mean((2, 3, 4)))
        return y


NETS = {
    "various": (Various, (3, 7, 7)),
    "resnet18": (lambda: models.resnet18(num_classes=5), (3, 64, 64)),
    # The first blocks of mobilenet_v2, depthwise convolutions among them: all of it takes minutes.
    "mobilenet_v2": (
        lambda: models.MobileNetV2(num_classes=5, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]]),
        (3, 32, 32),
    ),
}
TARGETS = ("gn", "pn", "gn-ws", "gn-wn", "ln-ws", "bcn-ws", "est", "frozen", "fold")
ALL = [(name, target) for name in NETS for target in (*TARGETS, "folded gn-ws", "folded bcn-ws")]
SOME = [pair for pair in ALL if pair[0] == "various"] + [("mobilenet_v2", "bcn-ws"), ("resnet18", "gn-ws")]
"""For what takes seconds each."""
SIZES = (2, 1, 5)
"""Samples in a batch: the first is what is exported, the others must do as well."""


@functools.cache
def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(NETS[name][0]()).eval()


@functools.cache
def converted(name: str, target: str) -> nn.Module:
    """Moved a little, as by training: right after the conversion a standardized weight is what it is computed from."""
    model = normswap.convert(net(name), target.removeprefix("folded ")).model
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.8 + torch.rand(parameter.shape, generator=generator) * 0.4)
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        size = model(batches(name)[0]).abs().mean()
        for parameter in head.parameters():  # the tolerances below are meant for outputs of order 1
            parameter.div_(size)
    return normswap.fold(model).model if target.startswith("folded") else model


@functools.cache
def batches(name: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, *NETS[name][1], generator=generator) for n in SIZES]


@functools.cache
def outputs(name: str, target: str) -> list[Tensor]:
    with torch.no_grad():
        return [converted(name, target)(x) for x in batches(name)]


@pytest.mark.parametrize("form", ["ws", "wn"])
@pytest.mark.parametrize("name", NETS)
def test_the_weights_that_run_are_not_those_that_are_held(name: str, form: str) -> None:
    """So that equality below tells whether they are computed at all."""
    held = "weight" if form == "ws" else "weight_v"
    layers = [layer for layer in converted(name, f"gn-{form}").modules() if isinstance(layer, tuple(PLAIN))]
    assert len(layers) > 4
    for layer in layers:
        weight = getattr(layer, held)
        assert (layer.computed() - weight).abs().max() > 0.01 * weight.abs().max()


def exported(name: str, target: str, strict: bool) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    x = batches(name)[0]
    return torch.export.export(converted(name, target), (x,), dynamic_shapes=({0: batch},), strict=strict)


@pytest.mark.parametrize(("name", "target"), ALL)
def test_torch_export(name: str, target: str) -> None:
    program = exported(name, target, strict=False)
    assert set(program.state_dict) == set(converted(name, target).state_dict())
    module = program.module()
    for x, wanted in zip(batches(name), outputs(name, target), strict=True):
        torch.testing.assert_close(module(x), wanted)


@pytest.mark.parametrize(("name", "target"), SOME)
def test_torch_export_strict(name: str, target: str) -> None:
    torch._dynamo.reset()  # it is a limited number of graphs that strict export makes
    module = exported(name, target, strict=True).module()
    for x, wanted in zip(batches(name), outputs(name, target), strict=True):
        torch.testing.assert_close(module(x), wanted)


@pytest.mark.parametrize("target", ["gn-ws", "est"])
def test_sizes_of_maps_stay_free(target: str) -> None:
    shape = ({0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=33), 3: torch.export.Dim("w", min=33)},)
    model = converted("resnet18", target)
    module = torch.export.export(model, (batches("resnet18")[0],), dynamic_shapes=shape).module()
    x = torch.randn(3, 3, 70, 45, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x))


@pytest.mark.parametrize("target", ["est", "bcn-ws", "est-wn"])
def test_estimates_move_in_an_export_in_train_mode(target: str) -> None:
    model = normswap.convert(net("various"), target).model.train()
    x = batches("various")[2]
    module = torch.export.export(copy.deepcopy(model), (x,)).module()  # it would move the model's own estimates
    for _ in range(3):
        torch.testing.assert_close(module(x), model(x))
    state = module.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(state[key], value)
    assert int(model.maps[1].num_batches_tracked) == 3 + int(net("various").maps[1].num_batches_tracked)


def run_onnx(file: bytes, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def by_dynamo(name: str, target: str) -> bytes:
    """As an ONNX file, from an exported program."""
    x, batch, file = batches(name)[0], torch.export.Dim("batch"), io.BytesIO()
    program = torch.onnx.export(
        converted(name, target), (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )  # fmt: skip
    assert program is not None
    program.save(file)
    return file.getvalue()


def by_tracing(name: str, target: str) -> bytes:
    file, axes = io.BytesIO(), {"x": {0: "batch"}, "y": {0: "batch"}}
    torch.onnx.export(
        converted(name, target), (batches(name)[0],), file, dynamo=False,
        input_names=["x"], output_names=["y"], dynamic_axes=axes,
    )  # fmt: skip
    return file.getvalue()


@pytest.mark.parametrize(
    ("write", "name", "target"), [*((by_dynamo, *pair) for pair in SOME), *((by_tracing, *pair) for pair in ALL)]
)
def test_onnx(write: Callable[[str, str], bytes], name: str, target: str) -> None:
    file = write(name, target)
    onnx.checker.check_model(onnx.load_model_from_string(file))
    for x, wanted in zip(batches(name), outputs(name, target), strict=True):
        torch.testing.assert_close(run_onnx(file, x), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("write", [by_dynamo, by_tracing])
def test_folded_there_is_nothing_left_of_the_standardization(write: object) -> None:
    """The operators are those of the model that never had any."""

    def operators(target: str) -> Counter[str]:
        file = by_dynamo("various", target) if write is by_dynamo else by_tracing("various", target)
        return Counter(node.op_type for node in onnx.load_model_from_string(file).graph.node)

    assert operators("folded gn-ws") == operators("gn")
    assert operators("fold") < operators("gn")


@pytest.mark.parametrize(("name", "target"), ALL)
def test_torch_jit_trace(name: str, target: str) -> None:
    model, (first, *_) = converted(name, target), batches(name)
    file = io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, (first,)), file)
    file.seek(0)
    module = torch.jit.load(file)
    for x, wanted in zip(batches(name), outputs(name, target), strict=True):
        torch.testing.assert_close(module(x), wanted)
    assert set(module.state_dict()) == set(model.state_dict())


def test_they_run_where_normswap_is_not_installed(tmp_path: Path) -> None:
    x = batches("various")[0]
    for target in ("gn-ws", "bcn-ws"):
        torch.export.save(exported("various", target, strict=False), tmp_path / f"{target}.pt2")
        torch.jit.save(torch.jit.trace(converted("various", target), (x,)), tmp_path / f"{target}.ts")
        torch.save(outputs("various", target)[0], tmp_path / f"{target}.wanted")
    torch.save(x, tmp_path / "x")
    code = """
import pathlib, sys
sys.modules["normswap"] = None
import torch
here = pathlib.Path(sys.argv[1])
for target in ("gn-ws", "bcn-ws"):
    for module in (torch.export.load(here / f"{target}.pt2").module(), torch.jit.load(here / f"{target}.ts")):
        torch.testing.assert_close(module(torch.load(here / "x")), torch.load(here / f"{target}.wanted"))
        print(target)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path], capture_output=True, text=True)
    assert done.stdout.split() == ["gn-ws", "gn-ws", "bcn-ws", "bcn-ws"], done.stderr
