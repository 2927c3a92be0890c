"""Federated rounds on clients whose data differ, with torch alone: models that depend on no batch average well."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normswap

Client = tuple[Tensor, Tensor]
State = dict[str, Tensor]


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def samples(count: int, labels: Sequence[int], gain: float, offset: float, seed: int) -> Client:
    """Bars at four angles on noise, seen by a camera of that gain and offset."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor(labels)[torch.randint(len(labels), (count,), generator=generator)]
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    angles = torch.tensor([0.0, 45.0, 90.0, 135.0]).deg2rad()[y, None, None]
    shift = torch.rand(count, 1, 1, generator=generator) * 4 - 2
    bar = (((rows - 5.5) * angles.cos() + (columns - 5.5) * angles.sin() - shift).abs() < 1.2).float()
    x = bar + 0.35 * torch.randn(count, 12, 12, generator=generator)
    return (gain * x + offset)[:, None], y


CLIENTS: list[Client] = [samples(96, [0, 0, 1, 1, 2, 3], 2.0, 2.0, 1), samples(96, [0, 1, 2, 2, 3, 3], 0.6, -1.0, 2)]
"""Each sees two of the four kinds more often than the others, by a camera of its own."""
TESTS: list[Client] = [samples(200, [0, 1, 2, 3], 2.0, 2.0, 3), samples(200, [0, 1, 2, 3], 0.6, -1.0, 4)]


def pretrained() -> nn.Module:
    """What a server may start from: a net trained with batch norm, a little, on data between the clients'."""
    torch.manual_seed(0)
    model, (x, y) = net(), samples(128, [0, 1, 2, 3], 1.0, 0.0, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def converted(target: str) -> nn.Module:
    return normswap.convert(pretrained(), target).model.train()


def accuracy(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).double().mean().item() for x, y in TESTS]
    model.train()
    return sum(right) / len(right)


def train_locally(model: nn.Module, client: Client, steps: int = 8, batch: int = 16, seed: int = 0) -> nn.Module:
    local = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(local.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(client[0]), (batch,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(local(client[0][chosen]), client[1][chosen]).backward()
        optimizer.step()
    return local


def average(states: Sequence[State]) -> State:
    """FedAvg (McMahan et al. 2017) with clients of one size: the mean of whatever a state dict holds."""
    return {name: torch.stack([s[name].float() for s in states]).mean(0).to(v.dtype) for name, v in states[0].items()}


def rounds(model: nn.Module, count: int = 24) -> nn.Module:
    model = copy.deepcopy(model)
    for number in range(count):
        locals_ = [train_locally(model, c, seed=2 * number + i) for i, c in enumerate(CLIENTS)]
        model.load_state_dict(average([dict(local.state_dict()) for local in locals_]), strict=True)
    return model


# ---- no state that follows the batch ----


@pytest.mark.parametrize("target", ["gn", "gn-ws", "gn-wn", "ln-ws"])
def test_no_state_but_parameters_follows_the_data(target: str) -> None:
    model = converted(target)
    for statistic in ("running_mean", "running_var", "num_batches_tracked"):
        assert not any(name.endswith(statistic) for name in model.state_dict())
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    assert bool(buffers) == target.endswith("-ws")
    before = dict(model.named_parameters())
    local = train_locally(model, CLIENTS[0])
    assert all(torch.equal(value, buffers[name]) for name, value in local.named_buffers())
    assert all(not torch.equal(p, before[name]) for name, p in local.named_parameters())
    reference = pretrained()
    moved = dict(train_locally(reference, CLIENTS[0]).named_buffers())
    assert any(not torch.equal(value, moved[name]) for name, value in reference.named_buffers())


def apart_in_company(model: nn.Module) -> float:
    """How far the outputs for a sample in train mode move with who else is in the batch, relative to their size."""
    (x, _), (other, _) = CLIENTS
    model.train()
    with torch.no_grad():
        alone = torch.cat([copy.deepcopy(model)(torch.cat([x[:1], company]))[:1] for company in (x[1:8], other[1:8])])
    return ((alone[0] - alone[1]).norm() / alone[0].norm()).item()


@pytest.mark.parametrize("target", ["gn", "gn-ws", "gn-wn", "ln-ws", "in"])
def test_a_sample_does_not_see_the_others_of_its_batch(target: str) -> None:
    model = converted(target)
    assert apart_in_company(model) < 1e-5
    assert apart_in_company(pretrained()) > 0.1
    x = CLIENTS[0][0][:8]
    with torch.no_grad():
        single = torch.cat([model(x[i : i + 1]) for i in range(8)])
        torch.testing.assert_close(model(x), single, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x), model.eval()(x), rtol=0, atol=0)


def gradients(model: nn.Module, parts: Sequence[Client], total: int) -> State:
    """Gradients added up over batches, each weighted by its share of `total` samples."""
    model.zero_grad()
    for x, y in parts:
        (F.cross_entropy(model(x), y, reduction="sum") / total).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ways_to_batch(x: Tensor, y: Tensor) -> dict[str, list[Client]]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return {
        "in another order": [(x[order], y[order])],
        "at batch 1, added up": [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))],
        "in uneven parts": [(x[:3], y[:3]), (x[3:], y[3:])],
        "sorted by label": [(x[y == k], y[y == k]) for k in y.unique()],
    }


@pytest.mark.parametrize("target", ["gn", "gn-ws"])
def test_a_gradient_is_the_sum_of_those_of_its_samples(target: str) -> None:
    x, y = (torch.cat([c[part][:8] for c in CLIENTS]) for part in (0, 1))
    model, reference = converted(target), pretrained().train()
    whole, whole_reference = gradients(model, [(x, y)], 16), gradients(reference, [(x, y)], 16)
    assert set(whole) == {name for name, _ in model.named_parameters()}
    for way, parts in ways_to_batch(x, y).items():
        for name, grad in gradients(model, parts, 16).items():
            scale = whole[name].abs().max().item()
            torch.testing.assert_close(grad, whole[name], rtol=1e-3, atol=1e-4 * scale, msg=f"{way}: {name}")
    parts = ways_to_batch(x, y)["in uneven parts"]
    found = gradients(reference, parts, 16)
    apart = [(found[n] - g).norm() / g.norm() for n, g in whole_reference.items() if g.norm() > 1e-4]
    assert max(apart) > 0.1, "batch norm is what this cannot be said of"


# ---- averaging ----


@pytest.mark.parametrize("target", ["gn", "gn-ws"])
def test_one_full_batch_step_averaged_is_the_central_step(target: str) -> None:
    """FedSGD: with no statistics of a batch, the mean of both clients' steps is the step on both clients' data."""

    def step(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
        local = copy.deepcopy(model).train()
        optimizer = torch.optim.SGD(local.parameters(), lr=0.05)
        F.cross_entropy(local(x), y).backward()
        optimizer.step()
        return local

    both = tuple(torch.cat([c[part] for c in CLIENTS]) for part in (0, 1))
    distances = {}
    for name, model in ((target, converted(target)), ("batch norm", pretrained())):
        federated = average([dict(step(model, *client).named_parameters()) for client in CLIENTS])
        central = dict(step(model, *both).named_parameters())
        start = dict(model.named_parameters())
        moved = torch.cat([(central[n] - start[n]).flatten() for n in start]).norm()
        distances[name] = (torch.cat([(federated[n] - central[n]).flatten() for n in start]).norm() / moved).item()
    assert distances[target] < 1e-3 and distances["batch norm"] > 0.1


@pytest.mark.parametrize("target", ["gn", "gn-ws"])
def test_federated_averaging_learns_where_batch_norm_does_not(target: str) -> None:
    """The mean of two clients' running statistics belongs to neither client; a converted model has none to mix."""
    start = converted(target)
    before = accuracy(start)
    after = accuracy(rounds(start))
    reference = accuracy(rounds(pretrained()))
    print(f"RES {target} before {before} after {after} bn before {accuracy(pretrained())} bn {reference}")
    assert after > 0.85 and after > before + 0.3
    assert after > reference + 0.2


def test_the_same_rounds_give_the_same_model() -> None:
    first, second = (rounds(converted("gn-ws"), 2).state_dict() for _ in range(2))
    torch.testing.assert_close(dict(first), dict(second), rtol=0, atol=0)


@pytest.mark.parametrize("target", ["gn", "gn-ws"])
def test_clients_that_convert_for_themselves_agree(target: str) -> None:
    """Conversion is deterministic: clients and server may each convert, and still average what fits together."""
    states = [dict(converted(target).state_dict()) for _ in range(2)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    server = normswap.convert(net(), target).model
    server.load_state_dict(average(states), strict=True)
    x, again = CLIENTS[0][0], converted(target)
    with torch.no_grad():
        assert torch.equal(server.eval()(x), again.eval()(x))
