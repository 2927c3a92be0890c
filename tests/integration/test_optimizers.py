"""Optimizers made before a conversion, and groups of parameters for new ones: torch.optim itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn, optim
from torchvision import models

import normswap

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: optim.Adam(p, lr=1e-3),
    "AdamW, amsgrad": lambda p: optim.AdamW(p, lr=1e-3, amsgrad=True),
    "RMSprop": lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "Adagrad": lambda p: optim.Adagrad(p),
    "RAdam": lambda p: optim.RAdam(p),
    "Adafactor": lambda p: optim.Adafactor(p),
}
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def step(model: nn.Module, optimizer: optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def trained(make: Any = OPTIMIZERS["SGD"]) -> tuple[nn.Module, optim.Optimizer]:
    torch.manual_seed(0)
    model = models.resnet18(num_classes=5)
    optimizer = make(model.parameters())
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on(name: str, inplace: bool) -> None:
    """It trains every parameter of the converted model, and no other, from the state that each had under its name."""
    model, optimizer = trained(OPTIMIZERS[name])
    before = dict(model.named_parameters())
    states = {n: copy.deepcopy(optimizer.state[p]) for n, p in before.items()}
    converted = normswap.convert(model, "gn-ws", inplace=inplace).model
    changes = normswap.remap_optimizer(optimizer, before if inplace else model, converted)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert held == [id(p) for p in converted.parameters()]
    assert {id(p) for p in optimizer.state} == set(held)
    for n, p in converted.named_parameters():
        torch.testing.assert_close(optimizer.state[p], states[n])
    assert {c.paths[0] for c in changes} == set(before) and {c.after for c in changes} == {"carried over"}
    was = [p.detach().clone() for p in converted.parameters()]
    step(converted, optimizer)
    moved = [not torch.equal(a, b) for a, b in zip(was, converted.parameters(), strict=True)]
    assert all(moved)


def test_it_steps_as_one_made_anew_with_that_state() -> None:
    model, optimizer = trained()
    converted = normswap.convert(model, "gn").model
    fresh_model = copy.deepcopy(converted)
    fresh = OPTIMIZERS["SGD"](fresh_model.parameters())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # gn has the same parameters in the same order
    normswap.remap_optimizer(optimizer, model, converted)
    for m, o in ((converted, optimizer), (fresh_model, fresh)):
        step(m, o)
    torch.testing.assert_close(dict(converted.named_parameters()), dict(fresh_model.named_parameters()), rtol=0, atol=0)


def test_schedulers_and_groups_go_on() -> None:
    torch.manual_seed(0)
    model = models.resnet18(num_classes=5)
    groups = normswap.param_groups(model, 0.01)
    optimizer = optim.SGD([{**groups[0], "lr": 0.2}, {**groups[1], "lr": 0.1}], momentum=0.9)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    step(model, optimizer)
    scheduler.step()
    converted = normswap.convert(model, "fold").model
    changes = normswap.remap_optimizer(optimizer, model, converted)
    first, second = optimizer.param_groups
    assert (first["lr"], second["lr"], first["weight_decay"], second["weight_decay"]) == (0.1, 0.05, 0.01, 0)
    assert all(p.dim() > 1 for p in first["params"]) and all(p.dim() == 1 for p in second["params"])
    assert len(first["params"] + second["params"]) == len(list(converted.parameters()))
    dropped = {c.paths[0] for c in changes if c.after == "dropped"}
    assert dropped == {n for n, _ in model.named_parameters() if ".bn" in f".{n}" or "downsample.1" in n}
    scheduler.step()
    assert (first["lr"], second["lr"]) == (0.05, 0.025)
    step(converted, optimizer)


def test_what_a_weight_became_stays_in_its_group() -> None:
    torch.manual_seed(0)
    model = models.resnet18(num_classes=5)
    head = [p for n, p in model.named_parameters() if n.startswith("fc")]
    body = [p for n, p in model.named_parameters() if not n.startswith("fc")]
    optimizer = optim.SGD([{"params": body, "lr": 0.1}, {"params": head, "lr": 1.0}], momentum=0.9)
    step(model, optimizer)
    converted = normswap.convert(model, "gn-wn").model
    normswap.remap_optimizer(optimizer, model, converted)
    names = {id(p): n for n, p in converted.named_parameters()}
    in_first, in_second = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert in_second == {"fc.weight", "fc.bias"} and {"conv1.weight_g", "conv1.weight_v"} < in_first


def test_what_is_not_the_models_stays() -> None:
    model, _ = trained()
    temperature = nn.Parameter(torch.ones(()))
    optimizer = optim.Adam([*model.parameters(), temperature])
    model(X).mul(temperature).sum().backward()
    optimizer.step()
    state = optimizer.state[temperature]
    converted = normswap.convert(model, "gn").model
    changes = normswap.remap_optimizer(optimizer, model, converted)
    assert any(p is temperature for p in optimizer.param_groups[0]["params"]) and optimizer.state[temperature] is state
    assert all(change.paths[0] in dict(model.named_parameters()) for change in changes)


def test_an_optimizer_of_some_parameters_holds_as_many_after() -> None:
    model, _ = trained()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in model.fc.parameters():
        parameter.requires_grad_(True)
    optimizer = optim.SGD(model.fc.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    converted = normswap.convert(model, "gn").model
    normswap.remap_optimizer(optimizer, model, converted)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in converted.fc.parameters()]


def test_parameters_with_names() -> None:
    """torch has had them since 2.6: `optim.SGD(model.named_parameters())`."""
    torch.manual_seed(0)
    model = models.resnet18(num_classes=5)
    optimizer = optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    converted = normswap.convert(model, "fold").model
    normswap.remap_optimizer(optimizer, model, converted)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in converted.named_parameters()]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == [n for n, _ in converted.named_parameters()]


def test_lbfgs_goes_on_where_the_parameters_are_as_many() -> None:
    model, _ = trained()
    optimizer = optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    optimizer.step(lambda: loss(model))
    converted = normswap.convert(model, "gn").model
    normswap.remap_optimizer(optimizer, model, converted)
    was, old = ([p.detach().clone() for p in m.parameters()] for m in (converted, model))
    optimizer.step(lambda: loss(converted))
    assert any(not torch.equal(a, b) for a, b in zip(was, converted.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(old, model.parameters(), strict=True))


def test_what_cannot_be_carried_over_is_refused() -> None:
    model, optimizer = trained()
    converted = normswap.convert(model, "gn").model
    with pytest.raises(normswap.OptionError, match=r"holds no parameter of `before`; give the model"):
        normswap.remap_optimizer(optimizer, converted, model)
    normswap.convert(model, "gn", inplace=True)
    with pytest.raises(normswap.OptionError, match=r"one model; .* ahead of that"):
        normswap.remap_optimizer(optimizer, model, model)
    other = models.resnet18(num_classes=5)
    lbfgs = optim.LBFGS(other.parameters(), max_iter=2)
    lbfgs.step(lambda: loss(other))
    with pytest.raises(normswap.OptionError, match="LBFGS keeps the state of all parameters in one vector"):
        normswap.remap_optimizer(lbfgs, other, normswap.convert(other, "fold").model)


def loss(model: nn.Module) -> torch.Tensor:
    model.zero_grad()
    value = model(X).square().mean()
    value.backward()
    return value


# ---- groups for a new optimizer ----


def names_of(model: nn.Module, group: dict[str, Any]) -> set[str]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)] for p in group["params"]}


@pytest.mark.parametrize("target", ["gn", "gn-ws", "gn-wn", "ln", "bcn", "est", "frozen", "fold"])
def test_norms_gains_and_biases_go_without_weight_decay(target: str) -> None:
    model = normswap.convert(models.mobilenet_v2(), target).model
    decayed, free = normswap.param_groups(model, 1e-4)
    assert decayed["weight_decay"] == 1e-4 and free["weight_decay"] == 0
    assert names_of(model, decayed) | names_of(model, free) == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert not names_of(model, decayed) & names_of(model, free)
    weights = {n for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith("_g")}
    assert names_of(model, decayed) == weights
    optimizer = optim.SGD([decayed, free], lr=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0]


def test_it_is_what_timm_does() -> None:
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_weight_decay

    for name in ("resnet18", "vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"):
        model = timm.create_model(name)
        listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        theirs = param_groups_weight_decay(model, 0.05, no_weight_decay_list=listed)
        ours = normswap.param_groups(model, 0.05)
        assert names_of(model, ours[1]) == names_of(model, theirs[0]), name
        assert names_of(model, ours[0]) == names_of(model, theirs[1]), name


def test_what_else_goes_without() -> None:
    model = nn.Sequential(
        nn.LayerNorm((4, 8)), nn.Flatten(), nn.Linear(32, 1), nn.MultiheadAttention(2, 1), nn.Embedding(5, 3)
    )
    model[2].weight.requires_grad_(True)
    model[0].bias.requires_grad_(False)
    decayed, free = normswap.param_groups(model, 1e-4)
    assert names_of(model, free) == {"0.weight", "2.bias", "3.in_proj_bias", "3.out_proj.bias"}
    assert "2.weight" in names_of(model, decayed) and "4.weight" in names_of(model, decayed)
    _, more = normswap.param_groups(model, 1e-4, exempt=["4.*"])
    assert names_of(model, more) == names_of(model, free) | {"4.weight"}
    with pytest.raises(normswap.OptionError, match=r"no parameter is called 'head\.\*'"):
        normswap.param_groups(model, 1e-4, exempt="head.*")
    with pytest.raises(normswap.OptionError, match="weight_decay must be 0 or more"):
        normswap.param_groups(model, -1)
