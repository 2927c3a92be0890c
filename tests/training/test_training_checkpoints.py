"""Checkpoints as training scripts write them: converted, nothing else touched, and training goes on."""

import argparse
import copy
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import listing
from helpers.command import run
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import normswap
from normswap import FileError, NormswapError, OptionError
from normswap.checkpoints import reading
from normswap.report.report import Report

TARGETS = ("gn", "gn-ws", "frozen", "fold")
BARE = ("gn", "ln", "in", "frozen")


class Block(nn.Module):
    """A residual block as torchvision's, of any width."""

    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, 2, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.downsample = nn.Sequential(nn.Conv2d(inner, outer, 1, 2, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.downsample(x))


class Net(nn.Module):
    """A small residual net with a biased convolution at its stem."""

    def __init__(self, num_classes: int = 3, width: int = 8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.layer1, self.layer2 = Block(width, 2 * width), Block(2 * width, 4 * width)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def net(num_classes: int = 3) -> Net:
    torch.manual_seed(0)
    return Net(num_classes)


def frozen_backbone() -> Net:
    """Only the last block and the head are trained."""
    made = net()
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name.startswith(("layer2", "fc")))
    return made


def data() -> tuple[Tensor, Tensor]:
    """Three kinds of images that differ in one channel's mean."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(24) % 3
    images = torch.randn(24, 3, 12, 12, generator=generator)
    images[torch.arange(24), labels] += 1.0
    return images, labels


IMAGES, LABELS = data()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The loss before each step."""
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(IMAGES), LABELS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---- optimizers, with groups as the scripts make them ----


def one_group(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": 1e-4}]


def every_parameter(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def timm_groups(model: nn.Module) -> list[dict[str, Any]]:
    """timm's `param_groups_weight_decay`."""
    decay, no_decay = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (no_decay if p.ndim <= 1 or name.endswith(".bias") else decay).append(p)
    return [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.05}]


def torchvision_groups(model: nn.Module) -> list[dict[str, Any]]:
    """`set_weight_decay` of torchvision's reference scripts, with its classes of norms, and ours."""
    classes = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
    params: dict[str, list[nn.Parameter]] = {"other": [], "norm": []}
    for module in model.modules():
        kind = "norm" if isinstance(module, classes) else "other"
        params[kind] += [p for p in module.parameters(recurse=False) if p.requires_grad]
    decays = {"other": 1e-4, "norm": 0.0}
    return [{"params": params[kind], "weight_decay": decays[kind]} for kind in params if params[kind]]


def torchvision_groups_with_biases(model: nn.Module) -> list[dict[str, Any]]:
    """The same with `--bias-weight-decay`: biases in a group of their own, the norms' among them."""
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
    params: dict[str, list[nn.Parameter]] = {"other": [], "norm": [], "bias": []}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                params["bias" if name == "bias" else "norm" if isinstance(module, norms) else "other"].append(p)
    return [{"params": params[kind], "weight_decay": 1e-3} for kind in params if params[kind]]


Groups = Callable[[nn.Module], list[dict[str, Any]]]


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.02, momentum=0.9)


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=2e-3)


def states_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if optimizer.state.get(p)}


def identical(a: Any, b: Any) -> bool:
    """Whether two values of a checkpoint are the same, tensors bit for bit and containers by type."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b)


# ---- the scripts ----


class Holder(nn.Module):
    """A module around the model, which so gets a prefix."""

    def __init__(self, name: str, model: nn.Module, **others: nn.Module):
        super().__init__()
        self.name = name
        for key, module in {name: model, **others}.items():
            self.add_module(key, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x)


def lightning(model: nn.Module) -> nn.Module:
    return Holder("model", model, loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])))


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)


def unchanged(model: nn.Module) -> nn.Module:
    return model


Wrap = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Script:
    """What a script keeps: `content` gets the states of the model, its average, optimizer and scheduler."""

    content: Callable[[Any, Any, Any, Any], dict[str, Any]]
    entries: Mapping[str, Wrap]  # what the state dict under each key is one of
    optimizer: tuple[Any, ...] = ("optimizer",)
    groups: Groups = one_group
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = sgd


SCRIPTS = {
    "torchvision": Script(
        lambda m, e, o, s: {
            "model": m, "optimizer": o, "lr_scheduler": s, "epoch": 7,
            "args": argparse.Namespace(lr=0.1, data_path="/data", norm_weight_decay=0.0, opt="sgd"), "model_ema": e,
            "scaler": {
                "scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
                "_growth_tracker": 3,
            },
        },
        {"model": unchanged, "model_ema": averaged},
        groups=torchvision_groups,
    ),
    "timm": Script(
        lambda m, e, o, s: {
            "epoch": 7, "arch": "net", "state_dict": m, "optimizer": o, "version": 2,
            "args": argparse.Namespace(model="net", mean=(0.5, 0.5, 0.5)), "amp_scaler": {"scale": 1.0},
            "state_dict_ema": e, "metric": 76.5,
        },
        {"state_dict": unchanged, "state_dict_ema": unchanged},
        groups=timm_groups,
        make=adamw,
    ),
    "lightning": Script(
        lambda m, e, o, s: {
            "epoch": 1, "global_step": 50, "pytorch-lightning_version": "2.5.0", "state_dict": m,
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 2}}}},
            "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "a.ckpt", "best_k_models": {}}},
            "optimizer_states": [o], "lr_schedulers": [s], "hparams_name": "kwargs", "hyper_parameters": {"lr": 0.1},
        },
        {"state_dict": lightning},
        optimizer=("optimizer_states", 0),
        make=adamw,
    ),
    "mmengine": Script(
        lambda m, e, o, s: {
            "meta": {
                "epoch": 3, "iter": 99, "cfg": "model = dict()", "seed": 0, "dataset_meta": {"classes": ["a", "b"]},
            },
            "message_hub": {"log_scalars": {}, "runtime_info": OrderedDict(epoch=2), "resumed_keys": {}},
            "state_dict": m, "optimizer": o, "param_schedulers": [s],
        },
        {"state_dict": unchanged},
    ),
    "mmengine with a backbone": Script(
        lambda m, e, o, s: {"meta": {"epoch": 3}, "state_dict": m, "optimizer": o, "message_hub": {"log_scalars": {}}},
        {"state_dict": lambda model: Holder("backbone", model)},
    ),
    "tutorial": Script(
        lambda m, e, o, s: {"epoch": 2, "model_state_dict": m, "optimizer_state_dict": o, "loss": torch.tensor(0.5)},
        {"model_state_dict": unchanged},
        optimizer=("optimizer_state_dict",),
    ),
    "compiled": Script(lambda m, e, o, s: {"model": m, "optimizer": o}, {"model": lambda m: Holder("_orig_mod", m)}),
    "parallel": Script(
        lambda m, e, o, s: {"net": m, "optimizer": o, "acc": 93.1}, {"net": lambda m: Holder("module", m)}
    ),
    "compiled, then parallel": Script(
        lambda m, e, o, s: {"state_dict": m, "optimizer": o, "best_acc1": torch.tensor(71.2)},
        {"state_dict": lambda m: Holder("module", Holder("_orig_mod", m))},
    ),
    "parallel, then compiled": Script(
        lambda m, e, o, s: {"state_dict": m, "optimizer": o},
        {"state_dict": lambda m: Holder("_orig_mod", Holder("module", m))},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a script, and what it was made from."""

    path: Path
    content: dict[str, Any]
    models: dict[str, nn.Module]  # by entry: plain, without its wrapper
    model: nn.Module  # the trained one
    states: dict[str, dict[str, Any]]  # of the optimizer, by the plain names of parameters


def trained(script: Script, folder: Path, factory: Callable[[], nn.Module] = net) -> Trained:
    """Train for a few steps with the script's wrapper, groups and optimizer, and save. The same script trains once."""
    key = id(script), factory
    if key not in _TRAINED:
        _TRAINED[key] = script, train_script(script, factory)  # the script is kept, so that its id stays its own
    found = _TRAINED[key][1]
    torch.save(found.content, folder / "run.pth")
    return replace(copy.deepcopy(found), path=folder / "run.pth")


_TRAINED: dict[tuple[int, Callable[[], nn.Module]], tuple[Script, Trained]] = {}


def train_script(script: Script, factory: Callable[[], nn.Module]) -> Trained:
    plain = factory()
    first = next(iter(script.entries))
    wrapped = script.entries[first](plain)
    optimizer = script.make(script.groups(wrapped))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    ema = averaged(copy.deepcopy(plain))
    for _ in range(3):
        train(wrapped, optimizer, 1)
        ema.update_parameters(plain)
    models: dict[str, nn.Module] = {first: plain}
    average = ema.module
    for name, wrap in script.entries.items():
        if name != first:
            models[name] = average
            state = ema.state_dict() if wrap is averaged else average.state_dict()
            break
    else:
        state = ema.state_dict()
    content = script.content(wrapped.state_dict(), state, optimizer.state_dict(), scheduler.state_dict())
    content = copy.deepcopy(content)
    return Trained(Path(), content, models, plain, states_by_name(plain, optimizer))


def at(content: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        content = content[step]
    return content


def said_of_optimizer(report: Report) -> dict[str, set[str]]:
    said: dict[str, set[str]] = {"carried over": set(), "dropped": set()}
    for change in report.changes:
        if change.kind == "optimizer":
            said[change.after] |= set(change.paths)
    return said


def check_optimizer(
    saved: Any, script: Script, run_: Trained, converted: nn.Module, report: Report, prefix: str
) -> None:
    """The states load, belong to the same parameters by name, the report tells which, and training goes on."""
    first = next(iter(script.entries))
    wrapped = script.entries[first](converted)
    optimizer = script.make(script.groups(wrapped))
    optimizer.load_state_dict(copy.deepcopy(saved))
    found = states_by_name(converted, optimizer)
    names = {name for name, _ in converted.named_parameters()}
    wanted = {name: value for name, value in run_.states.items() if name in names}
    assert wanted and found.keys() == wanted.keys()
    for name in wanted:
        assert identical(found[name], wanted[name]), f"{name} has the state of another parameter"
    said = said_of_optimizer(report)
    assert said["carried over"] == {prefix + name for name in wanted}
    assert said["dropped"] == {prefix + name for name in run_.states.keys() - wanted.keys()}
    losses = train(wrapped, optimizer, 20)
    assert sum(losses[-3:]) / 3 < 0.97 * losses[0], losses


@pytest.mark.parametrize(
    ("name", "to"),
    [
        (name, to)
        for name in SCRIPTS
        for to in TARGETS
        if to in ("gn-ws", "fold") or name in ("torchvision", "lightning")
    ],
)
def test_scripts(tmp_path: Path, name: str, to: str) -> None:
    script = SCRIPTS[name]
    run_ = trained(script, tmp_path)
    before = run_.path.read_bytes()
    report = normswap.convert_file(run_.path, to, model=net)
    assert run_.path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["run.pth", f"run.{to}.pth"])
    got = torch.load(tmp_path / f"run.{to}.pth", weights_only=False)
    assert list(got) == list(run_.content)
    for key in got.keys() - script.entries.keys() - {script.optimizer[0]}:
        assert identical(got[key], run_.content[key]), key
    for key, wrap in script.entries.items():
        converted = normswap.convert(net(), to).model
        wrapped = wrap(converted)
        wrapped.load_state_dict(got[key], strict=True)
        inner = wrapped.module if wrap is averaged else converted  # AveragedModel copies
        wanted = normswap.convert(run_.models[key].eval(), to).model.eval()
        with torch.no_grad():
            assert torch.equal(inner.eval()(IMAGES), wanted(IMAGES)), key
        loaded = normswap.load(tmp_path / f"run.{to}.pth", model=net, key=key).eval()
        with torch.no_grad():
            assert torch.equal(loaded(IMAGES), wanted(IMAGES)), key
    for key in (key for key, wrap in script.entries.items() if wrap is averaged):
        assert torch.equal(got[key]["n_averaged"], run_.content[key]["n_averaged"])
    beside = {k for k in run_.content[next(iter(script.entries))] if k.endswith("loss.weight")}
    for key in beside:
        assert torch.equal(got[next(iter(script.entries))][key], run_.content[next(iter(script.entries))][key])
        assert any(key in warning for warning in report.warnings)
    first = normswap.convert(run_.model.eval(), to).model
    check_optimizer(at(got, script.optimizer), script, run_, first, report, "")
    assert [c.paths for c in report.changes if c.kind == "copy"] == [(key,) for key in list(script.entries)[1:]]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_copy_is_folded(tmp_path: Path, name: str) -> None:
    script = SCRIPTS[name]
    run_ = trained(script, tmp_path)
    converted = tmp_path / "converted.pth"
    normswap.convert_file(run_.path, "gn-ws", converted, model=net)
    done = run("fold", converted, "--model", f"{__file__}:net", "--quiet")
    assert done.exit_code == 0, done.output
    got = torch.load(tmp_path / "converted.fold.pth", weights_only=False)
    for key, wrap in script.entries.items():
        plain = normswap.convert(net(), "gn").model  # standardized weights gone, the group norms left
        wrapped = wrap(plain)
        wrapped.load_state_dict(got[key], strict=True)
        wanted = normswap.load(converted, model=net, key=key).eval()
        with torch.no_grad():
            torch.testing.assert_close((wrapped.module if wrap is averaged else plain).eval()(IMAGES), wanted(IMAGES))
            torch.testing.assert_close(
                normswap.load(tmp_path / "converted.fold.pth", model=net, key=key).eval()(IMAGES), wanted(IMAGES)
            )


GROUPS: dict[str, tuple[Groups, Callable[[], nn.Module]]] = {
    "one": (one_group, net),
    "timm": (timm_groups, net),
    "torchvision": (torchvision_groups, net),
    "biases": (torchvision_groups_with_biases, net),
    "frozen backbone left out": (one_group, frozen_backbone),
    "frozen backbone in it": (every_parameter, frozen_backbone),
    "frozen backbone, timm": (timm_groups, frozen_backbone),
}


@cache
def script_of(rule: Groups, make: Callable[..., torch.optim.Optimizer]) -> Script:
    return Script(lambda m, e, o, s: {"model": m, "optimizer": o}, {"model": unchanged}, groups=rule, make=make)


@pytest.mark.parametrize(("make", "to"), [(sgd, "gn-ws"), (sgd, "fold"), (adamw, "gn"), (adamw, "frozen")])
@pytest.mark.parametrize("groups", GROUPS)
def test_groups(tmp_path: Path, groups: str, make: Callable[..., torch.optim.Optimizer], to: str) -> None:
    rule, factory = GROUPS[groups]
    script = script_of(rule, make)
    run_ = trained(script, tmp_path, factory)
    report = normswap.convert_file(run_.path, to, model=factory)
    got = torch.load(tmp_path / f"run.{to}.pth", weights_only=True)
    check_optimizer(got["optimizer"], script, run_, normswap.convert(run_.model, to).model, report, "")
    options = [{k: v for k, v in was.items() if k != "params"} for was in run_.content["optimizer"]["param_groups"]]
    kept = [{k: v for k, v in group.items() if k != "params"} for group in got["optimizer"]["param_groups"]]
    emptied = to == "fold" and rule in (torchvision_groups, torchvision_groups_with_biases)  # the script has none then
    assert kept == ([o for i, o in enumerate(options) if i != 1] if emptied else options)


@pytest.mark.parametrize("to", TARGETS)
def test_an_optimizer_that_knows_names(tmp_path: Path, to: str) -> None:
    """torch writes `param_names` where it was given named parameters; the prefix of a wrapper stays in them."""

    def named(model: nn.Module) -> list[dict[str, Any]]:
        found = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        return [{"params": found[::-1], "weight_decay": 1e-4}]

    script = Script(
        lambda m, e, o, s: {"model": m, "optimizer": o}, {"model": lambda m: Holder("module", m)}, groups=named
    )
    run_ = trained(script, tmp_path)
    normswap.convert_file(run_.path, to, model=net)
    got = torch.load(tmp_path / f"run.{to}.pth", weights_only=True)
    group = got["optimizer"]["param_groups"][0]
    wanted = {f"module.{name}" for name, _ in normswap.convert(net(), to).model.named_parameters()}
    if to != "fold":  # where new parameters would stand in an order of the user's own, nobody can tell
        check_optimizer_by_position(got["optimizer"], named, run_, normswap.convert(run_.model, to).model)
    assert set(group["param_names"]) == wanted and len(group["params"]) == len(wanted)
    for number, name in zip(group["params"], group["param_names"], strict=True):
        state = got["optimizer"]["state"].get(number)
        plain = name.removeprefix("module.")
        assert identical(state, run_.states.get(plain)), f"{name} has the state of another parameter"


def check_optimizer_by_position(saved: Any, groups: Groups, run_: Trained, converted: nn.Module) -> None:
    """torch loads states by position, whatever the names: an optimizer built the same way has each where it belongs."""
    optimizer = sgd(groups(Holder("module", converted)))
    optimizer.load_state_dict(copy.deepcopy(saved))
    for name, state in states_by_name(converted, optimizer).items():
        assert identical(state, run_.states[name]), f"{name} has the state of another parameter"


def test_an_optimizer_before_its_first_step(tmp_path: Path) -> None:
    model = net()
    torch.save({"model": model.state_dict(), "optimizer": sgd(one_group(model)).state_dict()}, tmp_path / "run.pth")
    normswap.convert_file(tmp_path / "run.pth", "fold", model=net)
    got = torch.load(tmp_path / "run.fold.pth", weights_only=True)
    sgd(one_group(normswap.convert(net(), "fold").model)).load_state_dict(got["optimizer"])


def test_an_optimizer_that_cannot_be_told_is_dropped_and_reported(tmp_path: Path) -> None:
    """Two of the parameters in another order: nothing says which is which."""
    model = net()
    odd = torch.optim.SGD(list(model.parameters())[3:9], lr=0.1, momentum=0.9)
    train(model, odd, 1)
    content = {"model": model.state_dict(), "optimizer": odd.state_dict(), "epoch": 1}
    torch.save(content, tmp_path / "run.pth")
    report = normswap.convert_file(tmp_path / "run.pth", "gn", model=net)
    got = torch.load(tmp_path / "run.gn.pth", weights_only=True)
    assert "optimizer" not in got and got["epoch"] == 1
    assert any("optimizer" in warning and "dropped" in warning for warning in report.warnings)


def test_several_optimizers(tmp_path: Path) -> None:
    """Lightning keeps a list; each is carried over."""
    model = net()
    whole, again = sgd(one_group(model)), adamw(timm_groups(model))
    train(model, whole, 1), train(model, again, 1)
    content = {"state_dict": model.state_dict(), "optimizer_states": [whole.state_dict(), again.state_dict()]}
    torch.save(content, tmp_path / "run.pth")
    normswap.convert_file(tmp_path / "run.pth", "gn-ws", model=net)
    got = torch.load(tmp_path / "run.gn-ws.pth", weights_only=True)
    converted = normswap.convert(net(), "gn-ws").model
    for made, state in zip(
        (sgd(one_group(converted)), adamw(timm_groups(converted))), got["optimizer_states"], strict=True
    ):
        made.load_state_dict(state)


@pytest.mark.parametrize("to", TARGETS)
def test_a_parameter_beside_the_model(tmp_path: Path, to: str) -> None:
    """A projection that is trained with the model, but is no part of it: every state is carried over."""

    def with_projection(model: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        return Holder("model", model, projection=nn.Linear(3, 2))

    script = Script(lambda m, e, o, s: {"state_dict": m, "optimizer": o}, {"state_dict": with_projection})
    run_ = trained(script, tmp_path)
    normswap.convert_file(run_.path, to, model=net)
    got = torch.load(tmp_path / f"run.{to}.pth", weights_only=True)
    assert "optimizer" in got, "the optimizer's state was dropped"
    converted = normswap.convert(run_.model, to).model
    optimizer = sgd(one_group(with_projection(converted)))
    optimizer.load_state_dict(got["optimizer"])
    for name, state in states_by_name(converted, optimizer).items():
        assert identical(state, run_.states[name]), f"{name} has the state of another parameter"


def test_a_copy_of_the_model_under_a_name_of_its_own(tmp_path: Path) -> None:
    """It is converted, or the report says that it was not."""
    model = net()
    torch.save({"state_dict": model.state_dict(), "best_weights": net().state_dict(), "epoch": 1}, tmp_path / "run.pth")
    report = normswap.convert_file(tmp_path / "run.pth", "gn", model=net)
    best = torch.load(tmp_path / "run.gn.pth", weights_only=True)["best_weights"]
    said = " ".join(report.warnings) + " ".join(path for change in report.changes for path in change.paths)
    assert "bn1.running_mean" not in best or "best_weights" in said, "a copy of the model was silently left as it was"


@pytest.mark.parametrize("entry", ["state", "number"])
def test_values_of_numpy_beside_the_model(tmp_path: Path, entry: str) -> None:
    """The state of numpy's random numbers, and a metric that it computed: plain data, read without being asked."""
    import numpy

    value = {"state": numpy.random.RandomState(0).get_state(), "number": numpy.float64(76.5)}[entry]
    torch.save({"model": net().state_dict(), "held": value, "python": random.getstate()}, tmp_path / "run.pth")
    normswap.convert_file(tmp_path / "run.pth", "gn", model=net)
    held = torch.load(tmp_path / "run.gn.pth", weights_only=False)["held"]
    assert held == value if entry == "number" else (held[1] == value[1]).all()


@pytest.mark.parametrize("keys", [("optimizers", "main"), ("trainer", "optimizer"), ("trainer", "states", 0)])
def test_an_optimizer_deeper_in_the_file(tmp_path: Path, keys: tuple[Any, ...]) -> None:
    """It is carried over, or the report names it; never left with states of parameters that are gone."""
    model = net()
    optimizer = sgd(one_group(model))
    train(model, optimizer, 2)
    held: Any = optimizer.state_dict()
    for key in keys[:0:-1]:
        held = [held] if isinstance(key, int) else {key: held}
    torch.save({"model": model.state_dict(), keys[0]: held}, tmp_path / "run.pth")
    report = normswap.convert_file(tmp_path / "run.pth", "fold", model=net)
    if not any(keys[0] in warning for warning in report.warnings):
        got = at(torch.load(tmp_path / "run.fold.pth", weights_only=True), keys)
        sgd(one_group(normswap.convert(net(), "fold").model)).load_state_dict(got)


def test_an_optimizer_without_parameters_is_no_loss(tmp_path: Path) -> None:
    empty = {"state": {}, "param_groups": [{"lr": 0.1, "params": []}]}
    torch.save({"model": net().state_dict(), "optimizer": empty, "other": None}, tmp_path / "run.pth")
    report = normswap.convert_file(tmp_path / "run.pth", "fold", model=net)
    assert torch.load(tmp_path / "run.fold.pth")["optimizer"] == empty
    assert not any("optimizer" in warning for warning in report.warnings)


def test_a_copy_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """An average of parameters alone, without statistics: which entry it is, and so what to convert instead."""
    model = net()
    average = {name: p.detach() for name, p in model.named_parameters()}
    torch.save({"state_dict": model.state_dict(), "ema": average}, tmp_path / "run.pth")
    with pytest.raises(FileError, match=r"\bema\b"):
        normswap.convert_file(tmp_path / "run.pth", "gn", model=net)


def test_a_number_as_key(tmp_path: Path) -> None:
    """What the message says to type works."""
    torch.save({0: net().state_dict(), 1: net().state_dict(), "epoch": 1}, tmp_path / "run.pth")
    with pytest.raises(FileError, match="--key 0 or --key 1"):
        normswap.convert_file(tmp_path / "run.pth", "gn", model=net)
    normswap.convert_file(tmp_path / "run.pth", "gn", model=net, key="0")


# ---- without the model ----


@pytest.mark.parametrize(("name", "to"), [*((name, "gn") for name in SCRIPTS), *(("timm", to) for to in BARE[1:])])
def test_scripts_without_the_model(tmp_path: Path, name: str, to: str) -> None:
    """On tensors alone, the same file comes out as with the model, and the optimizer's states with it."""
    script = SCRIPTS[name]
    run_ = trained(script, tmp_path)
    report = normswap.convert_file(run_.path, to)
    normswap.convert_file(run_.path, to, tmp_path / "wanted.pth", model=net)
    got, wanted = (torch.load(tmp_path / n, weights_only=False) for n in (f"run.{to}.pth", "wanted.pth"))
    for key in script.entries:
        assert got[key].keys() == wanted[key].keys()
        assert all(torch.equal(got[key][k], wanted[key][k]) for k in wanted[key]), key
    for key in got.keys() - script.entries.keys() - {script.optimizer[0]}:
        assert identical(got[key], run_.content[key]), key
    assert at(got, script.optimizer) is not None, "the optimizer's state was dropped"
    assert identical(at(got, script.optimizer), at(wanted, script.optimizer)), "states belong to other parameters"
    first = next(iter(script.entries))
    kept = said_of_optimizer(report)
    outer = {n for n, _ in script.entries[first](normswap.convert(net(), to).model).named_parameters()}
    assert kept["carried over"] == outer and not kept["dropped"]


@pytest.mark.parametrize("to", BARE)
def test_keys_keep_their_order_without_the_model(tmp_path: Path, to: str) -> None:
    """The order of keys is that of `named_parameters()`, by which an optimizer numbers its states."""
    torch.save(net().state_dict(), tmp_path / "net.pth")
    normswap.convert_file(tmp_path / "net.pth", to)
    got = torch.load(tmp_path / f"net.{to}.pth", weights_only=True)
    assert list(got) == list(normswap.convert(net(), to).model.state_dict())


def test_eps_without_the_model(tmp_path: Path) -> None:
    model = net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    train(model, sgd(one_group(model)), 2)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    report = normswap.convert_file(tmp_path / "net.pth", "gn", eps=1e-3)
    assert any("0.001 is assumed" in warning for warning in report.warnings)
    wanted = normswap.convert(model, "gn").model.state_dict()
    got = torch.load(tmp_path / "net.gn.pth", weights_only=True)
    assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)
    normswap.convert_file(tmp_path / "net.pth", "gn", tmp_path / "assumed.pth")
    assert not torch.equal(torch.load(tmp_path / "assumed.pth")["bn1.weight"], wanted["bn1.weight"])
    with pytest.raises(OptionError, match="--eps is for files without their model"):
        normswap.convert_file(tmp_path / "net.pth", "gn", tmp_path / "x.pth", eps=1e-3, model=net)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(OptionError, match="must be 0 or more"):
            normswap.convert_file(tmp_path / "net.pth", "gn", tmp_path / "x.pth", eps=wrong)


# ---- modules in the file ----


def stack() -> nn.Sequential:
    """A net of torch's own layers, which may be loaded whole."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 16, 3, 2, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(16), nn.SiLU(), nn.Flatten(), nn.Linear(16 * 4 * 4, 3))


def ultralytics_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Biases, weights with decay, weights of norms, in this order."""
    groups: tuple[list[nn.Parameter], ...] = ([], [], [])
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            groups[0 if name == "bias" else 2 if "Norm" in type(module).__name__ else 1].append(p)
    return [{"params": groups[0]}, {"params": groups[1], "weight_decay": 5e-4}, {"params": groups[2]}]


def write_ultralytics(
    path: Path, shared: bool = False, stripped: bool = False
) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    model = stack()
    optimizer = sgd(ultralytics_groups(model))
    images = IMAGES[..., :11, :11]
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images), LABELS).backward()
        optimizer.step()
    states = states_by_name(model, optimizer)
    model = model.half().eval()
    ema = model if shared else copy.deepcopy(model)
    if not shared:
        ema[0].weight.data.mul_(0.5)
    content = {
        "epoch": 5, "best_fitness": 0.4, "model": None if stripped else model, "ema": ema, "updates": 12,
        "optimizer": optimizer.state_dict(), "train_args": {"imgsz": 640}, "date": "2024-01-01", "version": "8.3",
    }  # fmt: skip
    torch.save(content, path)
    return model, ema, {"content": content, "states": states}


@pytest.mark.parametrize("to", TARGETS)
def test_modules_of_half_precision(tmp_path: Path, to: str) -> None:
    model, ema, known = write_ultralytics(tmp_path / "best.pt")
    report = normswap.convert_file(tmp_path / "best.pt", to)
    got = torch.load(tmp_path / f"best.{to}.pt", weights_only=False)
    images = IMAGES[..., :11, :11].half()
    for key, source in (("model", model), ("ema", ema)):
        wanted = normswap.convert(source, to).model
        assert {p.dtype for p in got[key].parameters()} == {torch.half}
        with torch.no_grad():
            assert torch.equal(got[key](images), wanted(images)), key
    for key in got.keys() - {"model", "ema", "optimizer"}:
        assert identical(got[key], known["content"][key])
    assert [c.paths for c in report.changes if c.kind == "copy"] == [("ema",)]
    full = got["model"].float()
    optimizer = sgd(ultralytics_groups(full))
    optimizer.load_state_dict(got["optimizer"])
    found = states_by_name(full, optimizer)
    names = {name for name, _ in full.named_parameters()}
    assert found.keys() == known["states"].keys() & names
    for name, value in found.items():
        assert identical(value, known["states"][name]), f"{name} has the state of another parameter"


def test_a_model_that_was_stripped_of_all_but_its_average(tmp_path: Path) -> None:
    _, ema, _ = write_ultralytics(tmp_path / "best.pt", stripped=True)
    normswap.convert_file(tmp_path / "best.pt", "gn")
    got = torch.load(tmp_path / "best.gn.pt", weights_only=False)
    assert got["model"] is None
    with torch.no_grad():
        images = IMAGES[..., :11, :11].half()
        assert torch.equal(got["ema"](images), normswap.convert(ema, "gn").model(images))


def test_one_module_under_two_names(tmp_path: Path) -> None:
    """It is converted once, and stays one."""
    model, _, _ = write_ultralytics(tmp_path / "best.pt", shared=True)
    normswap.convert_file(tmp_path / "best.pt", "gn-ws")
    got = torch.load(tmp_path / "best.gn-ws.pt", weights_only=False)
    assert got["model"] is got["ema"]
    with torch.no_grad():
        images = IMAGES[..., :11, :11].half()
        assert torch.equal(got["model"](images), normswap.convert(model, "gn-ws").model(images))


# ---- folders ----


@pytest.mark.parametrize("to", TARGETS)
def test_accelerate_folder(tmp_path: Path, to: str) -> None:
    script = Script(lambda m, e, o, s: {"model": m, "optimizer": o, "scheduler": s}, {"model": unchanged}, make=adamw)
    run_ = trained(script, tmp_path)
    folder = tmp_path / "checkpoint_0"
    (folder / "custom").mkdir(parents=True)
    save_file(run_.content["model"], folder / "model.safetensors", {"format": "pt"})
    torch.save(run_.content["optimizer"], folder / "optimizer.bin")
    torch.save(run_.content["scheduler"], folder / "scheduler.bin")
    torch.save({"random_state": random.getstate(), "torch": torch.get_rng_state()}, folder / "random_states_0.pkl")
    (folder / "custom" / "notes.txt").write_text("mine")
    report = normswap.convert_file(folder, to, model=net)
    out = tmp_path / f"checkpoint_0.{to}"
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in folder.iterdir())
    for name in ("scheduler.bin", "random_states_0.pkl", "custom/notes.txt"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    from safetensors.torch import load_file

    converted = normswap.convert(net(), to).model
    converted.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    wanted = normswap.convert(run_.model.eval(), to).model
    with torch.no_grad():
        assert torch.equal(converted.eval()(IMAGES), wanted(IMAGES))
    optimizer = torch.load(out / "optimizer.bin", weights_only=True)
    check_optimizer(optimizer, script, run_, converted, report, "")


def test_two_optimizers_in_a_folder(tmp_path: Path) -> None:
    """Accelerate writes optimizer.bin, optimizer_1.bin and so on: each must fit the converted model, or be named."""
    model = net()
    first, second = sgd(one_group(model)), adamw(one_group(model))
    train(model, first, 1), train(model, second, 1)
    folder = tmp_path / "checkpoint_0"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    torch.save(first.state_dict(), folder / "optimizer.bin")
    torch.save(second.state_dict(), folder / "optimizer_1.bin")
    report = normswap.convert_file(folder, "fold", model=net)
    if any("optimizer_1" in warning for warning in report.warnings):
        return
    again = adamw(one_group(normswap.convert(net(), "fold").model))
    again.load_state_dict(torch.load(tmp_path / "checkpoint_0.fold" / "optimizer_1.bin", weights_only=True))


def distributed_run(folder: Path, plain: bool) -> tuple[Path, dict[str, Tensor]]:
    """A distributed checkpoint with the optimizer's state by names, or as it is by numbers; its momenta by name."""
    from torch.distributed.checkpoint import save
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = net()
    optimizer = sgd(one_group(model))
    train(model, optimizer, 2)
    held = optimizer.state_dict() if plain else get_optimizer_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process does it is meant
        save({"model": model.state_dict(), "optimizer": held}, checkpoint_id=folder / "step")
    states = states_by_name(model, optimizer)
    return folder / "step", {name: state["momentum_buffer"].clone() for name, state in states.items()}


def test_a_distributed_optimizer_by_names(tmp_path: Path) -> None:
    """States of vanished parameters go, those of the others stay, and the report tells which."""
    path, momenta = distributed_run(tmp_path, plain=False)
    report = normswap.convert_file(path, "fold", model=net)
    got = reading.read_checkpoint(tmp_path / "step.fold").content
    names = {name for name, _ in normswap.convert(net(), "fold").model.named_parameters()}
    found = {
        k[16:-16]: v for k, v in got.items() if k.startswith("optimizer.state.") and k.endswith(".momentum_buffer")
    }
    assert found.keys() == momenta.keys() & names
    assert all(torch.equal(found[name], momenta[name]) for name in found)
    options = {key.rpartition(".")[0] for key in got if key.startswith("optimizer.param_groups.")}
    assert not any(name in option for option in options for name in momenta.keys() - names), "options of vanished ones"
    said = said_of_optimizer(report)
    assert said == {"carried over": set(found), "dropped": momenta.keys() - names}


def test_a_distributed_optimizer_by_numbers(tmp_path: Path) -> None:
    """Each state stands under the number that its parameter has now, or all are dropped and the report says so."""
    path, momenta = distributed_run(tmp_path, plain=True)
    report = normswap.convert_file(path, "fold", model=net)
    got = reading.read_checkpoint(tmp_path / "step.fold").content
    names = [name for name, _ in normswap.convert(net(), "fold").model.named_parameters()]
    held = {k: v for k, v in got.items() if k.startswith("optimizer.state.")}
    if not held:
        assert any("optimizer" in warning and "dropped" in warning for warning in report.warnings)
    for key, value in held.items():
        number = int(key.split(".")[2])
        assert number < len(names) and torch.equal(value, momenta.get(names[number], torch.empty(0))), key


# ---- what does not fit ----


def other() -> nn.Module:
    return nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), head=nn.Conv2d(4, 2, 1)))


def wider() -> nn.Module:
    return Net(width=16)


def deeper() -> nn.Module:
    made = net()
    made.layer3 = Block(32, 64)
    return made


def inside() -> nn.Module:
    return Holder("backbone", net(), head=nn.Linear(3, 2))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            lambda: net(num_classes=10),
            r"2 of another shape: fc\.weight is \(3, 32\), the model's \(10, 32\).*num_classes=N",
        ),
        (other, r"missing: .*another architecture"),
        (wider, r"of another shape: .*another size"),
        (deeper, r"missing: layer3\.conv1\.weight.*--model-arg"),
        (inside, r"missing: "),
    ],
)
def test_a_model_that_does_not_fit(
    tmp_path: Path, factory: Callable[[], nn.Module], message: str, wrapped: bool
) -> None:
    model = Holder("module", net()) if wrapped else net()
    torch.save({"model": model.state_dict(), "epoch": 1}, tmp_path / "run.pth")
    before = listing(tmp_path)
    with pytest.raises(FileError, match=message) as caught:
        normswap.convert_file(tmp_path / "run.pth", "gn-ws", model=factory)
    assert str(caught.value).startswith(str(tmp_path / "run.pth")) and "\n" not in str(caught.value)
    assert listing(tmp_path) == before


def test_a_model_of_which_the_file_holds_more(tmp_path: Path) -> None:
    torch.save(deeper().state_dict(), tmp_path / "run.pth")
    with pytest.raises(FileError, match=r"unexpected: layer3\.conv1\.weight"):
        normswap.convert_file(tmp_path / "run.pth", "gn", model=net)


def test_a_file_that_is_converted_already(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "run.pth")
    normswap.convert_file(tmp_path / "run.pth", "gn-ws", model=net)
    loaded = torch.load(tmp_path / "run.gn-ws.pth", weights_only=True)
    torch.save({"model": dict(loaded)}, tmp_path / "bare.pth")  # its recipe is lost
    with pytest.raises(FileError, match="converted already"):
        normswap.convert_file(tmp_path / "bare.pth", "gn-ws", model=net)


@pytest.mark.parametrize("key", ["weights", "optimizer", "epoch", "model.fc", ""])
def test_a_wrong_key(tmp_path: Path, key: str) -> None:
    model = net()
    content = {"model": model.state_dict(), "optimizer": sgd(one_group(model)).state_dict(), "epoch": 1}
    torch.save(content, tmp_path / "run.pth")
    with pytest.raises(OptionError, match=r"there is no model under --key.*models stand under model"):
        normswap.convert_file(tmp_path / "run.pth", "gn", model=net, key=key)
    assert list(listing(tmp_path)) == ["run.pth"]


def test_a_key_of_its_own(tmp_path: Path) -> None:
    torch.save(
        {"nets": {"student": net().state_dict(), "teacher": net().state_dict()}, "step": 1}, tmp_path / "run.pth"
    )
    with pytest.raises(FileError, match=r"which entry is the model\? give --key nets.student or --key nets.teacher"):
        normswap.convert_file(tmp_path / "run.pth", "gn", model=net)
    report = normswap.convert_file(tmp_path / "run.pth", "gn", model=net, key="nets.student")
    assert any("not converted, though it looks like a model: nets.teacher" in warning for warning in report.warnings)
    got = torch.load(tmp_path / "run.gn.pth", weights_only=True)
    assert got["step"] == 1 and "bn1.running_mean" in got["nets"]["teacher"]
    normswap.convert(net(), "gn").model.load_state_dict(got["nets"]["student"], strict=True)


@pytest.mark.parametrize("given", [True, False])
def test_a_file_without_norms(tmp_path: Path, given: bool) -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))

    torch.save({"model": plain().state_dict(), "epoch": 3}, tmp_path / "run.pth")
    with pytest.raises(NormswapError, match="nothing to convert|norm") as caught:
        normswap.convert_file(tmp_path / "run.pth", "gn", model=plain if given else None)
    assert "\n" not in str(caught.value)
    assert list(listing(tmp_path)) == ["run.pth"]


def test_a_target_that_needs_the_model(tmp_path: Path) -> None:
    torch.save({"model": net().state_dict()}, tmp_path / "run.pth")
    for to in ("gn-ws", "fold", "ws"):
        with pytest.raises(OptionError, match="give it: .*--model"):
            normswap.convert_file(tmp_path / "run.pth", to)


def test_the_command_says_it_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = "from torch import nn\n\n\ndef net(classes=2):\n"
    source += "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, classes, 1))\n"
    (tmp_path / "mine_of_training.py").write_text(source)
    sequence = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1))
    torch.save({"state_dict": sequence.state_dict(), "epoch": 1}, "run.pth")
    arguments = ["convert", "run.pth", "--to", "fold", "--model", "mine_of_training.py:net"]
    refused = run(*arguments)
    assert refused.exit_code == 1 and refused.stderr.count("\n") == 1 and "of another shape: 2.weight" in refused.stderr
    assert run(*arguments, "--model-arg", "classes=5").exit_code == 0
    assert torch.load("run.fold.pth", weights_only=True)["epoch"] == 1
