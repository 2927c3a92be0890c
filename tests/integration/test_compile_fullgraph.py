"""Whole converted nets under torch.compile: one graph, equal to eager in values and gradients, and never stale."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Iterator

import pytest
import torch
from helpers.nets import randomize
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision import models

import normswap

COUNTERS = torch._dynamo.utils.counters
TARGETS = ("gn", "pn", "gn-ws", "gn-wn", "est-ws", "bcn-ws", "frozen-ws", "fold")
BACKEND = "inductor" if shutil.which("g++") else "aot_eager"


@pytest.fixture(autouse=True)
def a_fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    COUNTERS.clear()
    yield
    torch._dynamo.reset()


class Small(nn.Module):
    """Convolutions in groups, transposed and of one dimension, and a linear layer, with norms behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 3, stride=2, groups=2), nn.BatchNorm2d(8), nn.SiLU(),
        )  # fmt: skip
        self.line = nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.line(self.maps(x).flatten(2)).mean(2))
        return y


@functools.cache
def _converted(name: str, target: str) -> nn.Module:
    torch.manual_seed(0)
    net = Small() if name == "small" else models.resnet18(num_classes=5)
    model = normswap.convert(randomize(net), target).model
    generator = torch.Generator().manual_seed(3)
    with (
        torch.no_grad()
    ):  # as training does: right after the conversion a standardized weight is what it is computed from
        for parameter in model.parameters():
            parameter.mul_(0.8 + torch.rand(parameter.shape, generator=generator) * 0.4)
    return model


def converted(name: str, target: str, *, train: bool = False) -> nn.Module:
    return copy.deepcopy(_converted(name, target)).train(train)


def batch(samples: int, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(seed))


def train_alike(eager: nn.Module, compiled: nn.Module, x: Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Outputs, the input's gradient, all parameters' gradients and all buffers are equal after a step of each."""
    results = []
    for model in (eager, compiled):
        model.zero_grad()
        given = x.clone().requires_grad_()
        output = model(given)
        output.square().mean().backward()
        results.append((output.detach(), given.grad))
    torch.testing.assert_close(results[1], results[0], rtol=rtol, atol=atol)
    ours, theirs = dict(eager.named_parameters()), dict(compiled.named_parameters())
    assert len(ours) == len(theirs) > 0
    for (name, p), q in zip(ours.items(), theirs.values(), strict=True):
        assert p.grad is not None and q.grad is not None and p.grad.abs().max() > 0, name
        torch.testing.assert_close(q.grad, p.grad, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
    torch.testing.assert_close(list(compiled.buffers()), list(eager.buffers()), rtol=rtol, atol=atol)


def one_graph() -> bool:
    return COUNTERS["stats"]["unique_graphs"] == 1 and not COUNTERS["graph_break"]


@pytest.mark.parametrize(("target", "train"), [(t, True) for t in TARGETS] + [("est-ws", False), ("gn-ws", False)])
def test_a_resnet_is_one_graph(target: str, train: bool) -> None:
    model = converted("resnet18", target, train=train)
    before = copy.deepcopy(dict(model.named_buffers()))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    train_alike(model, compiled, batch(2))
    assert one_graph()
    moved = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
    follows = train and target.startswith(("est", "bcn"))
    assert bool(moved) == follows and all("running" in name or "tracked" in name for name in moved)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_small_net_is_one_graph_and_there_is_nothing_to_explain(target: str, train: bool) -> None:
    model = converted("small", target, train=train)
    train_alike(model, torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager"), batch(2, 9))
    assert one_graph()
    found = torch._dynamo.explain(model)(batch(2, 9))
    assert (found.graph_count, found.graph_break_count, found.break_reasons) == (1, 0, [])


@pytest.mark.parametrize(("target", "train"), [("gn-ws", False), ("est-ws", True)])
def test_by_inductor(target: str, train: bool) -> None:
    """The code that it writes: C++, where there is a compiler."""
    model = converted("small", target, train=train)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=BACKEND)
    for step in range(3):  # estimates go on from where they are
        train_alike(model, compiled, batch(3, 9, step))
    assert one_graph()


def test_a_cumulative_average_of_batches() -> None:
    """`momentum=None`: the rate is a number that depends on a buffer; torch's batch norm breaks the graph there."""
    torch.manual_seed(0)
    net = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None)))
    model = normswap.convert(net, "est").model.train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for step in range(3):
        train_alike(model, compiled, batch(3, 9, step) + step)
    assert int(model[1].num_batches_tracked) == 3 and one_graph()


@pytest.mark.parametrize("target", ["gn-ws", "bcn-ws", "gn-wn", "frozen-ws", "fold"])
def test_one_graph_for_all_sizes_of_batches_and_maps(target: str) -> None:
    model, counter = converted("small", target), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compiled(batch(2, 9))
    made = counter.frame_count  # with dynamic=True torch may call a backend again for the first graph, plain nets' too
    for samples, size in ((2, 9), (5, 9), (3, 12), (7, 8)):
        x = batch(samples, size)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == made


def test_another_size_recompiles_once_unless_told_to() -> None:
    model, counter = converted("small", "gn-ws", train=True), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for samples in (2, 5, 3, 7):
        torch.testing.assert_close(compiled(batch(samples, 9)), model(batch(samples, 9)))
    assert counter.frame_count == 2  # the second graph takes any


def test_another_mode_is_another_graph() -> None:
    model, counter = converted("small", "bcn-ws"), CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(model, fullgraph=True, backend=counter), batch(2, 9)
    for train in (False, True, False, True):
        eager = copy.deepcopy(model).train(train)
        model.train(train)
        torch.testing.assert_close(compiled(x), eager(x))
        torch.testing.assert_close(list(model.buffers()), list(eager.buffers()))
    assert counter.frame_count == 2


@pytest.mark.parametrize("target", ["gn-ws", "gn-wn", "est-ws", "bcn-wn", "frozen", "fold"])
def test_changed_weights_and_buffers_are_noticed(target: str) -> None:
    """Nothing computed from a weight is kept as a constant of the graph."""
    model, counter = converted("small", target), CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(model, fullgraph=True, backend=counter), batch(2, 9)
    last = compiled(x)

    def moved() -> None:
        nonlocal last
        eager = model(x)
        torch.testing.assert_close(compiled(x), eager)
        assert (eager - last).abs().max() > 1e-4, "nothing has changed, so nothing is tested"
        last = eager

    generator = torch.Generator().manual_seed(5)
    tensors = [(n, t) for n, t in model.state_dict(keep_vars=True).items() if t.is_floating_point()]
    assert len(tensors) >= 8
    for _, tensor in tensors:
        with torch.no_grad():
            tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.5)
        moved()
    other = randomize(converted("small", target), seed=9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))
    model.load_state_dict(other.state_dict())
    moved()
    torch.testing.assert_close(last, other(x))
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    moved()
    assert counter.frame_count == 1
    model.load_state_dict({k: v + 0.1 for k, v in other.state_dict().items()}, assign=True)
    moved()


@pytest.mark.parametrize("target", ["gn-ws", "frozen-wn", "fold", "est", "bcn-ws"])
def test_a_compiled_model_can_be_converted(target: str) -> None:
    """As a copy, and where it stands: the graph of what it was is not run again."""
    torch.manual_seed(0)
    net, x = randomize(Small()).eval(), batch(2, 9)
    wanted = normswap.convert(net, target).model(x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    other = normswap.convert(compiled, target).model
    torch.testing.assert_close(other(x), wanted)
    torch.testing.assert_close(compiled(x), before, rtol=0, atol=0)
    assert type(other) is type(compiled) and set(other.state_dict()) == {
        f"_orig_mod.{key}" for key in normswap.convert(net, target).model.state_dict()
    }
    normswap.convert(compiled, target, inplace=True)
    torch.testing.assert_close(compiled(x), wanted)
    torch.testing.assert_close(net(x), wanted)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.2)
    torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("target", ["gn-ws", "est-ws"])
def test_a_model_that_compiles_itself(target: str) -> None:
    """`model.compile()`, of the model and of a block: one that was converted where it stands stays compiled."""
    torch.manual_seed(0)
    net, x, counter = randomize(Small()).eval(), batch(2, 9), CompileCounterWithBackend("aot_eager")
    wanted = normswap.convert(net, target).model(x)
    net.compile(fullgraph=True, backend=counter)
    net.line[0].compile(fullgraph=True, backend="aot_eager")
    net(x)
    normswap.convert(net, target, inplace=True)
    torch.testing.assert_close(net(x), wanted)
    assert counter.frame_count == 2
