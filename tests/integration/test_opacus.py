"""Differentially private training of converted models with Opacus."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from helpers.nets import MixedNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

import normswap

opacus = pytest.importorskip("opacus")
from opacus.grad_sample import GradSampleModule  # noqa: E402
from opacus.grad_sample.utils import prepare_module  # noqa: E402
from opacus.layers import DPGRU, DPLSTM  # noqa: E402
from opacus.validators import ModuleValidator  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:Full backward hook:UserWarning", "ignore:Secure RNG:UserWarning", "ignore:.*work in place:UserWarning"
)


def trained(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = MixedNet()
    for _ in range(3):
        net(torch.randn(16, 3, 9, 9) + 0.5)
    return net.train()


X = torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 4, 0])


def in_a_loop(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradient of each sample's loss, by a backward for each."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for sample, label in zip(x, y, strict=True):
        model.zero_grad()
        F.cross_entropy(model(sample[None]), label[None]).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            found[name].append(parameter.grad.clone())
    return {name: torch.stack(grads) for name, grads in found.items()}


def by_opacus(model: nn.Module, x: Tensor, y: Tensor, mode: str = "hooks") -> dict[str, Tensor]:
    private = prepare_module(copy.deepcopy(model), mode)
    F.cross_entropy(private(x), y).backward()
    return {name: p.grad_sample for name, p in private._module.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"ws": "strict"}, {"layers": ("conv", "linear"), "ws_scope": "all"}], ids=str)
@pytest.mark.parametrize(
    "target", ["gn", "ln", "in", "pn", "gn-ws", "gn-wn", "frozen", "frozen-ws", "ws-only", "fold-wn"]
)
def test_gradients_of_each_sample_are_those_of_a_loop(target: str, options: dict[str, Any]) -> None:
    if options and "ws" not in target:
        pytest.skip("an option of standardized weights")
    model = normswap.convert(trained(), "gn").model if target == "ws-only" else trained()
    model = normswap.convert(model, "ws" if target == "ws-only" else target, **options).model
    if target == "in":  # one element a channel in the head is refused by torch in training
        model = normswap.convert(trained(), "in", exclude="head*").model
        model = normswap.convert(model, "gn", include="head*").model
    for left in model.modules():
        assert not isinstance(left, nn.modules.batchnorm._BatchNorm)
    assert ModuleValidator.validate(model, strict=False) == []
    ours, wanted = by_opacus(model, X, Y), in_a_loop(model, X, Y)
    assert set(ours) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


class Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 0, 1, 0)))


@pytest.mark.parametrize("target", ["gn-ws", "gn-wn"])
def test_convolutions_with_a_forward_of_their_own(target: str) -> None:
    torch.manual_seed(0)
    layers = (Padded(3, 8, 3, 2), nn.BatchNorm2d(8), nn.SiLU(), Padded(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten())
    model = normswap.convert(nn.Sequential(*layers, nn.Linear(72, 5)), target).model
    ours, wanted = by_opacus(model, X, Y), in_a_loop(model, X, Y)
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("target", ["gn", "gn-ws"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
def test_the_validator_has_nothing_left_to_complain_of(name: str, target: str) -> None:
    model = normswap.convert(models.get_model(name, weights=None), target).model.train()
    assert ModuleValidator.validate(model, strict=True) == []
    assert GradSampleModule.validate(model, strict=True) == []


@pytest.mark.parametrize("target", ["gn", "gn-ws", "frozen-ws"])
def test_private_training_runs_and_learns(target: str) -> None:
    """`make_private` as Opacus documents it, with Poisson sampling, whose batches may be empty."""
    torch.manual_seed(0)
    y = torch.arange(64) % 2
    x = torch.randn(64, 3, 9, 9) + 2.0 * y.view(-1, 1, 1, 1)
    model = normswap.convert(trained(), target, layers=("conv", "linear")).model.train()
    first = F.cross_entropy(model(x), y).item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    engine = opacus.PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=DataLoader(TensorDataset(x, y), batch_size=16),
        noise_multiplier=0.5, max_grad_norm=1.0,
    )  # fmt: skip
    for _ in range(5):
        for some, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(private(some), labels).backward()
            optimizer.step()
    assert 0 < engine.get_epsilon(delta=1e-3) < 100
    assert F.cross_entropy(model(x), y).item() < first - 0.2
    private._module.zero_grad()


def test_an_empty_batch() -> None:
    model = normswap.convert(trained(), "gn-ws").model
    layer = model.maps[0]
    from normswap.training.opacus import sample_gradients

    found = sample_gradients(layer, [torch.zeros(0, 3, 9, 9)], torch.zeros(0, 8, 9, 9))
    assert {tuple(value.shape) for value in found.values()} == {(1, 8, 3, 3, 3)}


@pytest.mark.parametrize("target", ["est", "bcn-ws"])
def test_what_follows_its_samples_is_still_refused(target: str) -> None:
    model = normswap.convert(trained(), target).model.train()
    with pytest.raises(NotImplementedError, match="buffers"):
        GradSampleModule(model)


def test_batch_norm_is_still_refused() -> None:
    normswap.register_opacus()
    assert ModuleValidator.validate(trained()) != []
    with pytest.raises(NotImplementedError, match="buffers"):
        GradSampleModule(trained())


def test_activations_in_place_are_named() -> None:
    """Opacus's backward hooks do not allow operations in place; `normswap inspect` says so, and what to do."""
    model = normswap.convert(models.mobilenet_v2(num_classes=5), "gn-ws").model.train()
    advice = {found.situation: found for found in normswap.inspect(models.mobilenet_v2()).advice}
    assert "inplace=False" in next(found.why for name, found in advice.items() if "private" in name)
    with pytest.warns(UserWarning, match=r"features.*: work in place, .* set inplace=False"):
        private = GradSampleModule(copy.deepcopy(model))
    with pytest.raises(RuntimeError, match="inplace"):
        private(torch.randn(2, 3, 32, 32)).sum().backward()
    for module in model.modules():
        if isinstance(getattr(module, "inplace", None), bool):
            module.inplace = False
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        private = GradSampleModule(model)
    private(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad_sample.shape == (2, *p.shape) for p in model.parameters())


def test_opacus_imported_last() -> None:
    """What was converted before Opacus was there needs one call."""
    code = """
import torch, normswap
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 2))
model = normswap.convert(net, "gn-ws").model
from opacus.grad_sample import GradSampleModule
try:
    GradSampleModule(model)
except NotImplementedError:
    print("refused")
normswap.register_opacus()
normswap.register_opacus()
private = GradSampleModule(model)
private(torch.randn(4, 3, 5, 5)).sum().backward()
print(tuple(model[0].weight.grad_sample.shape), list(model[0].buffers())[0].shape)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["refused", "(4, 8, 3, 3, 3) torch.Size([8])"], done.stderr


# ---- other modes than hooks ----


class Small(nn.Module):
    """A convolution and a norm that expanded weights know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.conv(x)).tanh().mean((2, 3)))
        return y


def agree(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(ours) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("target", ["gn", "in", "pn", "frozen", "gn-ws", "gn-wn", "frozen-ws", "fold-ws"])
def test_functorch(target: str) -> None:
    model = normswap.convert(Small(), target).model.train()
    agree(by_opacus(model, X, Y, "functorch"), in_a_loop(model, X, Y))


def test_functorch_leaves_what_is_not_trained() -> None:
    model = normswap.convert(Small(), "frozen-ws").model.train()
    model.norm.requires_grad_(False)
    model.conv.bias.requires_grad_(False)
    private = prepare_module(copy.deepcopy(model), "functorch")
    F.cross_entropy(private(X), Y).backward()
    found = {name for name, p in private._module.named_parameters() if getattr(p, "grad_sample", None) is not None}
    assert found == {"conv.weight", "head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("target", "refused"),
    [
        ("gn", ""), ("ln", ""), ("in", ""), ("fold", ""), ("pn", "norm .PositionNorm"), ("gn-ws", "conv .Standardized"),
        ("gn-wn", "conv .Normalized"), ("frozen", "norm .Frozen"), ("est", "follow the samples"),
        ("bcn", "follow the samples"),
    ],
)  # fmt: skip
def test_expanded_weights(target: str, refused: str) -> None:
    """They work, or `make_private` says before training what does not."""
    model = normswap.convert(Small(), target).model.train()
    if not refused:
        agree(by_opacus(model, X, Y, "ew"), in_a_loop(model, X, Y))
        return
    loader = DataLoader(TensorDataset(X, Y), batch_size=2)
    with pytest.raises(normswap.NormswapError, match=refused):
        opacus.PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
            noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode="ew",
        )  # fmt: skip


def test_expanded_weights_take_norms_that_are_not_trained() -> None:
    model = normswap.convert(Small(), "frozen").model.train()
    model.norm.requires_grad_(False)
    wanted = {name: grad for name, grad in in_a_loop_of(model).items() if "norm" not in name}
    private = prepare_module(copy.deepcopy(model), "ew")
    F.cross_entropy(private(X), Y).backward()
    agree({name: p.grad_sample for name, p in private._module.named_parameters() if p.requires_grad}, wanted)


def in_a_loop_of(model: nn.Module) -> dict[str, Tensor]:
    trainable = copy.deepcopy(model).requires_grad_(True)
    return in_a_loop(trainable, X, Y)


class Sequence(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.rnn, self.head = layer, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x.flatten(2).transpose(1, 2))[0][:, -1])
        return y


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
@pytest.mark.parametrize(
    "options",
    [
        {"to": "ws", "layers": ("rnn",)},
        {"to": "wn", "layers": ("rnn",)},
        {"to": "gn", "recurrent": "ln"},
    ],
)
def test_recurrent_layers_are_refused_before_training(options: dict[str, Any], mode: str) -> None:
    for layer in (nn.LSTM(3, 8, batch_first=True), nn.GRUCell(3, 8)):
        model = normswap.convert(Sequence(layer), **options).model
        with pytest.raises(normswap.NormswapError, match=r"^rnn \(\w+\): Opacus has no gradients for each sample"):
            prepare_module(model, mode)


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("target", ["ws", "wn"])
@pytest.mark.parametrize("cls", [DPLSTM, DPGRU])
def test_opacus_own_recurrent_layers(cls: type[nn.Module], target: str, mode: str) -> None:
    """Their weights are linear layers: standardized or normalized, they have gradients for each sample too."""
    torch.manual_seed(0)
    model = Sequence(cls(3, 8, batch_first=True))
    options = {"ws_scope": "all"} if target == "ws" else {}
    model = normswap.convert(model, target, layers=("linear",), **options).model.train()
    agree(by_opacus(model, X[:, :, :3, :2], Y, mode), in_a_loop(model, X[:, :, :3, :2], Y))


class Holder(nn.Conv2d):
    """As detectron2's Conv2d."""

    def __init__(self, *args: int, norm: nn.Module):
        super().__init__(*args)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(super().forward(x)))


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("target", ["gn", "frozen", "gn-ws", "frozen-ws", "gn-wn"])
def test_norms_that_a_convolution_holds(target: str, mode: str) -> None:
    model = nn.Sequential(Holder(3, 8, 3, norm=nn.BatchNorm2d(8)), nn.Flatten(), nn.Linear(392, 5))
    model = normswap.convert(model, target).model.train()
    agree(by_opacus(model, X, Y, mode), in_a_loop(model, X, Y))
