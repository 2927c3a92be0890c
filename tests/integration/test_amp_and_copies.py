"""What training scripts do to converted models: autocast, layouts, copies, hooks, EMA, torch.func, checkpointing."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.nets import MixedNet, randomize
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.layers.norms import EstimatedBatchNorm
from normswap.layers.reparametrized import PLAIN, normalize_weight, standardize_weight

TARGETS = ("gn", "pn", "gn-ws", "gn-wn", "bcn-ws", "est", "frozen-ws", "fold")
DTYPES = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Each with the relative error of rounding."""


X = torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 4, 0])


def trained(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = MixedNet().train()
    for _ in range(3):
        net(torch.randn(16, 3, 9, 9) + 0.5)
    return net.eval()


@functools.cache
def _converted(target: str, seed: int) -> nn.Module:
    return normswap.convert(trained(seed), target, layers=("conv", "linear")).model


def converted(target: str, seed: int = 0) -> nn.Module:
    return copy.deepcopy(_converted(target, seed))


def step(model: nn.Module, lr: float = 0.1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    optimizer.zero_grad()


def gradient(model: nn.Module) -> Tensor:
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def distance(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm())


# ---- low precision ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("target", TARGETS)
def test_autocast(target: str, train: bool, dtype: torch.dtype) -> None:
    net, model, full = trained().train(train), converted(target).train(train), converted(target).train(train)
    wanted = full(X)
    F.cross_entropy(wanted, Y).backward()
    with torch.autocast("cpu", dtype):
        output, of_batch_norm = model(X), net(X)
        loss = F.cross_entropy(output, Y)
    assert output.dtype == of_batch_norm.dtype == dtype
    loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert distance(output, wanted) < 8 * DTYPES[dtype]
    assert distance(gradient(model), gradient(full)) < 24 * DTYPES[dtype]
    for name, buffer in model.named_buffers():  # estimates have followed in full precision
        torch.testing.assert_close(buffer, full.get_buffer(name), rtol=8 * DTYPES[dtype], atol=8 * DTYPES[dtype])


def test_a_scaled_loss_trains_as_an_unscaled_one() -> None:
    model, full = converted("gn-ws").train(), converted("gn-ws").train()
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(model.parameters(), lr=0.1)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(X), Y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    step(full)
    moved, wanted = (torch.cat([p.detach().flatten() for p in m.parameters()]) - before for m in (model, full))
    assert wanted.norm() > 0 and distance(moved, wanted) < 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_another_dtype(target: str, dtype: torch.dtype) -> None:
    """Converted then cast, or cast then converted: all of it has the dtype; it runs and trains near the float32 one."""
    full = converted(target)
    wanted = full(X)
    F.cross_entropy(wanted, Y).backward()
    cast_first = normswap.convert(trained().to(dtype), target, layers=("conv", "linear")).model
    for model in (converted(target).to(dtype), cast_first):
        assert all(t.dtype == dtype for t in model.state_dict().values() if t.is_floating_point())
        output = model(X.to(dtype))
        F.cross_entropy(output.float(), Y).backward()
        assert output.dtype == dtype
        assert distance(output, wanted) < 16 * DTYPES[dtype]
        assert distance(gradient(model), gradient(full)) < 32 * DTYPES[dtype]
    for key, value in cast_first.state_dict().items():
        assert value.dtype == trained().to(dtype).state_dict().get(key, torch.empty(0, dtype=dtype)).dtype, key


# ---- layouts ----


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1, groups=2, stride=2), nn.BatchNorm2d(12), nn.SiLU(),
            nn.ConvTranspose2d(12, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("target", ["gn", "gn-ws", "gn-wn", "ln-ws", "est-ws", "bcn-ws", "frozen", "frozen-wn", "fold"])
def test_channels_last_all_the_way(target: str, inplace: bool) -> None:
    last = torch.channels_last
    torch.manual_seed(0)
    net = randomize(Maps()).eval()
    wanted = normswap.convert(net, target).model
    net = net.to(memory_format=last)
    model = normswap.convert(net, target, inplace=inplace).model
    x = torch.randn(2, 3, 10, 10)
    for training in (False, True):
        outputs: dict[str, Tensor] = {}
        model.train(training).zero_grad()
        wanted.train(training).zero_grad()

        def note(name: str, output: Tensor, outputs: dict[str, Tensor] = outputs) -> None:
            outputs[name] = output

        hooks = [
            module.register_forward_hook(lambda module, given, output, name=name: note(name, output))
            for name, module in model.named_modules()
        ]
        result, reference = model(x.to(memory_format=last)), wanted(x)
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5)
        assert len(outputs) == 13
        for name, output in outputs.items():
            assert output.is_contiguous(memory_format=last) and not output.is_contiguous(), name
        result.square().mean().backward()
        reference.square().mean().backward()
        for (name, p), q in zip(model.named_parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
            if p.dim() == 4 and not name.endswith("_g"):
                assert p.is_contiguous(memory_format=last) and not p.is_contiguous(), name
                assert p.grad.stride() == p.stride(), name
        for name, layer in model.named_modules():
            if isinstance(layer, tuple(PLAIN)):
                computed = layer.computed()
                assert computed.is_contiguous(memory_format=last) and not computed.is_contiguous(), name
    folded = normswap.fold(model.eval()).model
    weights = {name: p for name, p in folded.named_parameters() if p.dim() == 4}
    assert len(weights) == 4
    for name, p in weights.items():
        assert p.is_contiguous(memory_format=last) and not p.is_contiguous(), name
    torch.testing.assert_close(folded(x.to(memory_format=last)), wanted.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["gn-ws", "bcn-wn", "fold"])
def test_channels_last_in_three_dimensions(target: str) -> None:
    last = torch.channels_last_3d
    net = randomize(nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 2)))
    wanted = normswap.convert(net.eval(), target).model
    model = normswap.convert(net.to(memory_format=last), target).model
    x = torch.randn(2, 3, 6, 6, 6)
    output = model(x.to(memory_format=last))
    torch.testing.assert_close(output, wanted(x), rtol=1e-4, atol=1e-5)
    assert output.is_contiguous(memory_format=last) and not output.is_contiguous()
    weights = [p for p in model.parameters() if p.dim() == 5 and p.shape[1] > 1]
    assert len(weights) == 2 and all(p.is_contiguous(memory_format=last) for p in weights)


# ---- copies ----


def by_torch(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": by_torch,
    "a copy's copy": lambda module: by_torch(copy.deepcopy(pickle.loads(pickle.dumps(module)))),
}


def _count(module: nn.Module, *_: Any) -> None:
    module.calls = getattr(module, "calls", 0) + 1


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("target", TARGETS)
def test_a_copy_is_another_model_and_trains_like_it(target: str, way: str) -> None:
    model = converted(target).train()
    model.maps[1].register_forward_hook(_count)
    step(model)
    other = COPIES[way](model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert repr(other) == repr(model) and not {id(m) for m in other.modules()} & {id(m) for m in model.modules()}
    memory = {t.data_ptr() for t in other.state_dict().values()}
    assert not memory & {t.data_ptr() for t in model.state_dict().values()}
    before = copy.deepcopy(model.state_dict())
    step(other)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    step(model)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert other.maps[1].calls == model.maps[1].calls == 2
    assert (other.state_dict()["maps.0.bias"] if target == "fold" else other.head[3].weight).ne(0).any()


@pytest.mark.parametrize("target", TARGETS)
def test_a_shallow_copy_holds_the_same_tensors(target: str) -> None:
    model = converted(target)
    for layer in model.modules():
        if not list(layer.children()):
            other = copy.copy(layer)
            assert all(p is q for p, q in zip(other.parameters(), layer.parameters(), strict=True))
            assert all(p is q for p, q in zip(other.buffers(), layer.buffers(), strict=True))
    other = copy.copy(model)
    step(model)
    torch.testing.assert_close(other(X), model(X), rtol=0, atol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_a_state_dict_into_a_skeleton(target: str) -> None:
    """Converted on the meta device, and filled by assignment or after `to_empty`."""
    model, file = converted(target), io.BytesIO()
    step(model.train())
    torch.save(model.eval().state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    with torch.device("meta"):
        skeleton = normswap.convert(MixedNet(), target, layers=("conv", "linear")).model.eval()
    assert all(t.is_meta for t in skeleton.state_dict().values())
    assigned, filled = copy.deepcopy(skeleton), copy.deepcopy(skeleton).to_empty(device="cpu")
    assigned.load_state_dict(state, assign=True)
    filled.load_state_dict(state)
    for other in (assigned, filled):
        torch.testing.assert_close(other(X), model(X), rtol=0, atol=0)


# ---- hooks of state dicts ----


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_hooks_of_state_dicts_still_run(target: str, inplace: bool) -> None:
    """On the root, on a norm and on a convolution: each is called once, with the module that is in the model now."""
    seen: list[tuple[str, str, nn.Module]] = []
    net = trained()
    places = ("", "maps.1", "maps.0")
    for place in places:
        module = net.get_submodule(place)
        module.register_state_dict_pre_hook(functools.partial(_note, seen, "before saving", place))
        module.register_state_dict_post_hook(functools.partial(_note, seen, "after saving", place))
        module.register_load_state_dict_pre_hook(functools.partial(_note, seen, "before loading", place))
        module.register_load_state_dict_post_hook(functools.partial(_note, seen, "after loading", place))
    model = normswap.convert(net, target, inplace=inplace, layers=("conv", "linear")).model
    _note.seen = seen  # what the copies' hooks write to as well
    seen.clear()
    state = model.state_dict()
    model.load_state_dict(state)
    wanted = {(when, place) for when in WHEN for place in places}
    assert {(when, place) for when, place, _ in seen} == wanted and len(seen) == len(wanted)
    assert all(module is model.get_submodule(place) for _, place, module in seen)


WHEN = ("before saving", "after saving", "before loading", "after loading")


class _Note:
    """The hooks of one test. A deep copy of a model copies a list that a partial holds; this stays one object."""

    seen: list[tuple[str, str, nn.Module]]

    def __call__(self, own: list[Any], when: str, place: str, module: nn.Module, *_: Any) -> None:
        self.seen.append((when, place, module))

    def __deepcopy__(self, memo: Any) -> _Note:
        return self


_note = _Note()


def test_a_hook_that_renames_keys() -> None:
    """An old spelling is read through a hook on a norm, after the conversion as before it."""
    net = trained()

    def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}gamma")]:
            state[f"{prefix}weight"] = state.pop(key)

    net.maps[1].register_load_state_dict_pre_hook(rename)
    model = normswap.convert(net, "gn-ws").model
    state = {key.replace("maps.1.weight", "maps.1.gamma"): value + 1 for key, value in model.state_dict().items()}
    assert "maps.1.gamma" in state
    model.load_state_dict(state)
    torch.testing.assert_close(model.maps[1].weight.detach(), state["maps.1.gamma"])


# ---- averages of weights ----


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_an_average_of_a_converted_model(target: str, use_buffers: bool) -> None:
    model = converted(target).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=use_buffers)
    states: list[dict[str, Tensor]] = []
    for _ in range(4):
        step(model)
        average.update_parameters(model)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    averaged = set(model.state_dict() if use_buffers else dict(model.named_parameters()))
    for key, value in average.module.state_dict().items():
        wanted = states[-1][key]
        if not value.is_floating_point() and use_buffers:
            continue  # torch averages whole numbers, rounded down: they count batches
        if key in averaged:
            wanted = states[0][key].clone()
            for state in states[1:]:
                wanted.lerp_(state[key], 0.25)
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6)
    assert not torch.equal(average(X), model(X)) and int(average.n_averaged) == 4
    folded = normswap.fold(average.eval()).model
    torch.testing.assert_close(folded(X), average(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_an_average_is_converted_itself(target: str, use_buffers: bool) -> None:
    average = AveragedModel(trained(), use_buffers=use_buffers)
    for seed in (0, 1):
        average.update_parameters(trained(seed))
    options = {"layers": ("conv", "linear")}
    wanted = normswap.convert(average.module, target, **options).model
    model = normswap.convert(average, target, **options).model
    assert type(model) is AveragedModel and int(model.n_averaged) == 2 and model.use_buffers == use_buffers
    torch.testing.assert_close(model.module.state_dict(), wanted.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(model.eval()(X), wanted.eval()(X), rtol=0, atol=0)
    student = converted(target, seed=1)
    model.update_parameters(student)  # it goes on with the converted student
    assert int(model.n_averaged) == 3
    third = {n: p + (q - p) / 3 for (n, p), q in zip(wanted.named_parameters(), student.parameters(), strict=True)}
    torch.testing.assert_close(dict(model.module.named_parameters()), third)


@pytest.mark.parametrize("target", TARGETS)
def test_there_are_no_statistics_to_update(target: str) -> None:
    model = converted(target)
    before = copy.deepcopy(model.state_dict())
    update_bn([X, X], model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model.training
    partly = normswap.convert(trained(), target, exclude="line.1").model  # what was left is still updated
    if not any(isinstance(module, EstimatedBatchNorm) for module in partly.modules()):  # they follow in any train mode
        state = copy.deepcopy(partly.state_dict())
        update_bn([X, X], partly)
        moved = {key for key, value in partly.state_dict().items() if not torch.equal(value, state[key])}
        assert moved == {f"line.1.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")}


# ---- torch.func ----


@pytest.mark.parametrize("target", TARGETS)
def test_functional_call_computes_weights_from_the_given_parameters(target: str) -> None:
    model = converted(target)
    others = {key: value.detach() * 1.5 + 0.1 * torch.randn_like(value) for key, value in model.named_parameters()}
    untouched = model(X)
    got = functional_call(model, others, (X,))
    torch.testing.assert_close(model(X), untouched, rtol=0, atol=0)
    assert (got - untouched).abs().max() > 0.01
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(others[name])
    torch.testing.assert_close(model(X), got, rtol=0, atol=0)
    torch.testing.assert_close(normswap.fold(model).model(X), got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["gn-ws", "gn-wn"])
def test_the_given_weight_is_standardized(target: str) -> None:
    layer = converted(target).maps[0]
    weight = torch.randn(8, 3, 3, 3)
    if target == "gn-ws":
        given = {"weight": weight}
        wanted = standardize_weight(weight, layer.weight_gain, layer.weight_shift)
    else:
        given = {"weight_v": weight}
        wanted = normalize_weight(weight, layer.weight_g)
    torch.testing.assert_close(functional_call(layer, given, (X,)), F.conv2d(X, wanted, None, padding=1))


def loss_of(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x,)), y)

    return loss


def own(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("target", TARGETS)
def test_a_functional_gradient(target: str) -> None:
    model = converted(target)
    F.cross_entropy(model(X), Y).backward()
    found = grad(loss_of(model))(own(model), X, Y)
    torch.testing.assert_close(found, {name: p.grad for name, p in model.named_parameters()}, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_of_each_sample_by_vmap(target: str) -> None:
    model = converted(target)
    loss = loss_of(model)
    found = vmap(grad(lambda p, x, y: loss(p, x[None], y[None])), in_dims=(None, 0, 0))(own(model), X, Y)
    for i, (x, y) in enumerate(zip(X, Y, strict=True)):
        model.zero_grad()
        F.cross_entropy(model(x[None]), y[None]).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(
                found[name][i], p.grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("target", ["gn", "gn-ws", "gn-wn", "ln", "est", "bcn-wn", "bcn-ws", "frozen-wn", "fold"])
def test_an_ensemble_by_vmap(target: str) -> None:
    members = [converted(target, seed) for seed in range(3)]
    parameters, buffers = stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")
    found = vmap(lambda p, b: functional_call(base, (p, b), (X,)))(parameters, buffers)
    wanted = torch.stack([member(X) for member in members])
    assert (wanted[0] - wanted[1]).abs().max() > 0.05
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# ---- parametrizations and pruning ----


class Softened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.tanh()


@pytest.mark.parametrize(("target", "name"), [("gn-ws", "weight"), ("gn-wn", "weight_v"), ("gn-wn", "weight_g")])
def test_a_parametrization_on_a_computed_weight(target: str, name: str) -> None:
    """The weight is computed from the parametrized tensor; once that is taken away the layer is as it was."""
    model = converted(target)
    layer = model.maps[0]
    before, plain = model(X), getattr(layer, name).detach().clone()
    parametrize.register_parametrization(layer, name, Softened())
    soft = Softened()(plain)
    if target == "gn-ws":
        wanted = standardize_weight(soft, layer.weight_gain, layer.weight_shift)
    else:
        wanted = normalize_weight(*((soft, layer.weight_g) if name == "weight_v" else (layer.weight_v, soft)))
    torch.testing.assert_close(layer(X), F.conv2d(X, wanted, None, padding=1))
    F.cross_entropy(model(X), Y).backward()
    assert layer.parametrizations[name].original.grad.abs().sum() > 0
    torch.testing.assert_close(normswap.fold(model).model(X), model(X), rtol=1e-4, atol=1e-5)  # it is left as it is
    parametrize.remove_parametrizations(layer, name, leave_parametrized=False)
    torch.testing.assert_close(model(X), before)


@pytest.mark.parametrize("target", ["gn", "gn-ws", "frozen", "fold"])
def test_spectral_norm_on_a_converted_layer(target: str) -> None:
    model = converted(target).train()
    parametrizations.spectral_norm(model.maps[0])
    step(model)
    weight = model.maps[0].weight.detach()
    assert torch.linalg.matrix_norm(weight.flatten(1), 2) < 1.5


@pytest.mark.parametrize(
    ("target", "name"), [("gn", "weight"), ("gn-ws", "weight"), ("gn-wn", "weight_v"), ("fold", "weight")]
)
def test_pruning_a_converted_layer(target: str, name: str) -> None:
    model = converted(target).train()
    layer = model.maps[3]
    before = getattr(layer, name).detach().clone()
    prune.l1_unstructured(layer, name, 0.3)
    step(model)
    mask = getattr(layer, f"{name}_mask")
    assert 0 < (mask == 0).sum() == round(0.3 * mask.numel())
    with torch.no_grad():
        model(X)
        masked = getattr(layer, f"{name}_orig") * mask
        assert not torch.equal(masked, before * mask), "it has not been trained"
        wanted = {
            "gn-ws": lambda: standardize_weight(masked, layer.weight_gain, layer.weight_shift),
            "gn-wn": lambda: normalize_weight(masked, layer.weight_g),
        }.get(target, lambda: masked)()
        x = torch.randn(2, 8, 9, 9)
        torch.testing.assert_close(layer(x), F.conv2d(x, wanted, layer.bias, groups=4))
        if target != "gn-ws":  # standardized, a zero is a weight like another
            assert (wanted[mask == 0] == 0).all()
        output = model.eval()(X)
        prune.remove(layer, name)
        torch.testing.assert_close(model(X), output)


# ---- memory and inference ----


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("target", ["gn", "gn-ws", "gn-wn", "ln-ws", "frozen-ws", "fold-wn", "est", "bcn-ws", "est-wn"])
def test_gradient_checkpointing(target: str, reentrant: bool) -> None:
    model, other = converted(target).train(), converted(target).train()
    seen: list[nn.Module] = []
    other.maps[0].register_forward_hook(lambda module, *_: seen.append(module))
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    F.cross_entropy(model(inputs[0]), Y).backward()
    features = checkpoint(other.maps, inputs[1], use_reentrant=reentrant)
    F.cross_entropy(
        other.head(checkpoint(other.line, features.flatten(2), use_reentrant=reentrant).mean(2)), Y
    ).backward()
    assert len(seen) == 2, "it has not run again"
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=0, atol=0)
    torch.testing.assert_close(gradient(other), gradient(model), rtol=0, atol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_inference_mode(target: str) -> None:
    model = converted(target)
    wanted = model(X)
    with torch.inference_mode():
        output = model(X)
    assert output.is_inference()
    torch.testing.assert_close(output.clone(), wanted, rtol=0, atol=0)
    step(model.train())  # and nothing of it has stayed behind
    with torch.inference_mode():
        model(X)
    step(model)
    assert not any(t.is_inference() for t in model.state_dict().values())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("target", ["gn-ws", "bcn-wn", "est", "fold"])
def test_converting_in_inference_mode(target: str, inplace: bool) -> None:
    """What comes out can be trained, as if the caller had not been in it."""
    model = trained()
    with torch.inference_mode():
        made = normswap.convert(model, target, inplace=inplace).model
        plain = normswap.fold(made).model
    assert not any(t.is_inference() for t in (*made.state_dict().values(), *plain.state_dict().values()))
    step(made.train())
    step(plain.train())
