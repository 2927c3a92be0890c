"""Tracing exchanges parts of Python and torch for a while: other threads see nothing of it."""

import builtins
import dis
import math
import threading
from collections.abc import Callable

import torch
from helpers.nets import Forward
from torch import Tensor, fx, nn

from normswap.analysis.dataflow import find_flow
from normswap.analysis.flow import Flow
from normswap.analysis.sites import find_sites


def exchanged() -> tuple[object, ...]:
    """What tracing exchanges."""
    return (
        builtins.isinstance, torch.autocast.__init__, dis.get_instructions, nn.Module.__call__, nn.Module.__getattr__
    )  # fmt: skip


REAL = exchanged()


class Residual(nn.Module):
    """A forward that branches on data, and lets another thread do its `work` meanwhile."""

    def __init__(self, work: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Parameter(torch.ones(1))
        self.work = [work]

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        for work in filter(None, self.work):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        return self.norm(self.conv(x)) * self.scale if n > c else self.norm(self.conv(x))


def flow_of(model: nn.Module) -> Flow:
    return find_flow(model, find_sites(model))


def train(model: nn.Module) -> list[float]:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(3):
        with torch.autocast("cpu", enabled=False):
            loss = model(torch.linspace(-1, 1, 96).view(2, 3, 4, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_another_thread_trains_asks_types_and_modes_while_a_forward_is_traced() -> None:
    proxy = fx.Proxy(fx.Graph().placeholder("x"))
    first = next(dis.get_instructions(train)).opname

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Residual(), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(64, 2))

    wanted, errors, rounds = train(make()), list[BaseException](), []

    def work() -> None:
        try:
            rounds.append(train(make()))
            assert make().training and not make().eval().training and nn.BatchNorm2d(2).train(False).training is False
            assert isinstance(proxy, fx.Proxy) and not isinstance(proxy, Tensor)
            assert next(dis.get_instructions(train)).opname == first
            assert isinstance(traced.scale, nn.Parameter), "the tensors of the model that is traced"
            assert isinstance(nn.Module.__getattr__(traced, "scale"), nn.Parameter) and math.sqrt(4) == 2
        except BaseException as error:
            errors.append(error)

    traced = Residual(work)
    flow = flow_of(traced)
    assert not errors, errors[0]
    assert rounds and all(losses == wanted for losses in rounds)
    alone = flow_of(Residual())
    assert flow == alone and flow.parts.keys() == {"conv", "norm"} and not flow.problems
    assert exchanged() == REAL and "training" not in vars(nn.Module)


def test_models_are_traced_in_several_threads_at_once() -> None:
    def net() -> nn.Module:
        return nn.Sequential(*(Forward(lambda self, x: self.inner(x), inner=Residual()) for _ in range(5)))

    wanted, found = flow_of(net()), list[Flow]()

    def work() -> None:
        for _ in range(2):
            found.append(flow_of(net()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(flow == wanted for flow in found)
    assert exchanged() == REAL and "training" not in vars(nn.Module)
