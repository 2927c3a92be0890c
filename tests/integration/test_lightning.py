"""Lightning: real checkpoints of `Trainer.fit` converted, resumed from, and converted models trained by it."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import normswap

lightning = pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer, callbacks  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*log_every_n_steps", "ignore:.*LeafSpec",
    "ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`",
)  # fmt: skip

SOURCE = """
from torch import nn


def factory():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )
"""
"""The file that `--model` names."""


def net() -> nn.Module:
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    exec(SOURCE, scope)
    made: nn.Module = scope["factory"]()
    return made


class Module(LightningModule):  # type: ignore[misc]
    """A net under the name `net`, with Adam and a scheduler, that notes its losses and learning rates."""

    def __init__(self, inner: nn.Module, lr: float = 0.01):
        super().__init__()
        self.save_hyperparameters({"lr": lr})
        self.net = inner
        self.losses: list[float] = []
        self.rates: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


def data() -> TensorDataset:
    """Three kinds of pictures that differ in one channel's mean."""
    labels = torch.arange(24) % 3
    images = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    images[torch.arange(24), labels] += 1.0
    return TensorDataset(images, labels)


DATA = data()
IMAGES, LABELS = DATA.tensors


def fit(module: Module, folder: Path, epochs: int, *, batch: int = 8, path: Path | None = None, **options: Any) -> Any:
    """`Trainer.fit` on the CPU; a checkpoint of each epoch's end is `last.ckpt` if `callbacks` has such a callback."""
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing="callbacks" in options, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(DATA, batch_size=batch), ckpt_path=path)
    return trainer


def saving(folder: Path) -> Any:
    return callbacks.ModelCheckpoint(dirpath=folder, save_last=True)


@pytest.fixture(scope="module")
def run_of_two_epochs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Module]:
    folder = tmp_path_factory.mktemp("run")
    module = Module(net())
    fit(module, folder, 2, callbacks=[saving(folder)])
    return folder / "last.ckpt", module


def converted_like(module: Module, target: str) -> nn.Module:
    return normswap.convert(module.net, target).model.eval()


def states_of(module: nn.Module, optimizer_state: Any) -> dict[str, Any]:
    """The states in an optimizer's state dict by the names of the parameters of `module`."""
    names = [name for name, _ in module.named_parameters()]
    (group,) = optimizer_state["param_groups"]
    assert len(group["params"]) == len(names)
    return {names[place]: optimizer_state["state"].get(index) for place, index in enumerate(group["params"])}


# ---- checkpoints ----


def by_command(path: Path, out: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out.parent)
    (out.parent / "net_of_lightning.py").write_text(SOURCE)
    done = run("convert", path, "--to", target, "--model", "net_of_lightning.py:factory", "-o", out)
    assert done.exit_code == 0 and done.stderr == "", done.output
    assert "3 norms" in done.stdout


def in_python(path: Path, out: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = normswap.convert_file(path, target, out, model=net)
    assert report.totals.norms_changed == 3 and report.warnings == ()


@pytest.mark.parametrize("way", [by_command, in_python])
@pytest.mark.parametrize("target", ["gn", "gn-ws", "frozen", "fold"])
def test_a_checkpoint_is_converted_and_resumed_from(
    run_of_two_epochs: tuple[Path, Module], target: str, way: Callable[..., None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path, trained = run_of_two_epochs
    out = tmp_path / "last.converted.ckpt"
    way(path, out, target, monkeypatch)
    before, after = (torch.load(p, weights_only=False) for p in (path, out))
    assert after.keys() == before.keys()
    changed = {"state_dict", "optimizer_states"}
    for key in before.keys() - changed:
        assert after[key] == before[key], key

    # Its weights go into a module whose net is converted, strictly, and give what the converted net gives.
    wanted = converted_like(trained, target)
    module = Module(normswap.convert(net(), target).model)
    module.load_state_dict(after["state_dict"], strict=True)
    with torch.no_grad():
        assert torch.equal(module.eval()(IMAGES), wanted(IMAGES))
    loaded = Module.load_from_checkpoint(out, inner=normswap.convert(net(), target).model, weights_only=False)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IMAGES), wanted(IMAGES))

    # Each parameter that still exists has the state that it had, under its new number.
    had = states_of(trained, before["optimizer_states"][0])
    has = states_of(module, after["optimizer_states"][0])
    assert set(has) == {name for name, _ in module.named_parameters()}
    kept = set(has) & set(had) if target != "fold" else {n for n in has if "." in n and n in had}
    assert kept and all(state is not None for name, state in has.items() if name in kept)
    for name in kept:
        torch.testing.assert_close(has[name], had[name], rtol=0, atol=0)

    # And training goes on from there: epoch 2, step 6, the learning rate halved twice, the states those above.
    seen: dict[str, Any] = {}

    class Watch(callbacks.Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            seen["start"] = trainer.current_epoch, trainer.global_step
            seen["states"] = copy.deepcopy(states_of(module, trainer.optimizers[0].state_dict()))
            with torch.no_grad():
                module.eval()
                seen["outputs"] = module(IMAGES)
                module.train()

    resumed = Module(normswap.convert(net(), target).model)
    trainer = fit(resumed, tmp_path, 4, path=out, callbacks=[Watch(), saving(tmp_path / "more")])
    assert seen["start"] == (2, 6) and (trainer.current_epoch, trainer.global_step) == (4, 12)
    assert resumed.rates == [0.0025] * 3 + [0.00125] * 3
    assert torch.equal(seen["outputs"], wanted(IMAGES))
    for name in kept:
        torch.testing.assert_close(seen["states"][name], had[name], rtol=0, atol=0)
    assert len(resumed.losses) == 6 and all(torch.tensor(resumed.losses).isfinite())
    end = torch.load(tmp_path / "more" / "last.ckpt", weights_only=False)
    steps = {int(s["step"]) for name, s in states_of(resumed, end["optimizer_states"][0]).items() if name in kept}
    assert steps == {12}, "Adam counts on from the six steps before"


def test_resuming_goes_as_training_without_a_file(run_of_two_epochs: tuple[Path, Module], tmp_path: Path) -> None:
    """Weights, states and numbers in the file, step for step as the same model with the same Adam goes on in memory."""
    path, trained = run_of_two_epochs
    normswap.convert_file(path, "gn-ws", tmp_path / "out.ckpt", model=net)
    resumed = Module(normswap.convert(net(), "gn-ws").model)
    fit(resumed, tmp_path, 3, path=tmp_path / "out.ckpt")

    model = normswap.convert(trained.net, "gn-ws").model.train()
    optimizer = torch.optim.Adam(trained.net.parameters(), lr=0.01)
    optimizer.load_state_dict(torch.load(path, weights_only=False)["optimizer_states"][0])
    normswap.remap_optimizer(optimizer, trained.net, model)
    losses = []
    for x, y in DataLoader(DATA, batch_size=8):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert resumed.losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(dict(resumed.net.named_parameters()), dict(model.named_parameters()))


def test_the_plain_module_does_not_take_it(run_of_two_epochs: tuple[Path, Module], tmp_path: Path) -> None:
    path, _ = run_of_two_epochs
    normswap.convert_file(path, "gn-ws", tmp_path / "out.ckpt", model=net)
    with pytest.raises(RuntimeError, match="Missing key"):
        fit(Module(net()), tmp_path, 3, path=tmp_path / "out.ckpt")


def test_the_net_alone_comes_out_of_the_checkpoint(run_of_two_epochs: tuple[Path, Module], tmp_path: Path) -> None:
    path, trained = run_of_two_epochs
    normswap.convert_file(path, "gn-ws", tmp_path / "out.ckpt", model=net)
    loaded = normswap.load(tmp_path / "out.ckpt", model=net).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), converted_like(trained, "gn-ws")(IMAGES))


# ---- training a converted model ----


@pytest.mark.parametrize("target", ["gn", "gn-ws", "frozen"])
def test_batch_1_with_accumulated_gradients(target: str, tmp_path: Path) -> None:
    module = Module(normswap.convert(net(), target).model)
    trainer = fit(module, tmp_path, 3, batch=1, accumulate_grad_batches=4)
    assert trainer.global_step == 3 * 6 and len(module.losses) == 3 * 24
    first, last = (sum(part) / 24 for part in (module.losses[:24], module.losses[-24:]))
    assert last < first - 0.1, (first, last)


def test_a_whole_lightning_module_is_converted(tmp_path: Path) -> None:
    """Before `fit`, as a user may have it: the module itself is converted, and trains."""
    module = normswap.convert(Module(net()), "gn-ws").model
    assert isinstance(module, Module) and not batch_norms(module) and module.hparams["lr"] == 0.01
    fit(module, tmp_path, 2)
    assert sum(module.losses[-3:]) < sum(module.losses[:3])
    assert {type(m).__name__ for m in module.modules()} >= {"GroupNorm", "StandardizedConv2d"}


def batch_norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_a_moving_average_of_a_converted_model(tmp_path: Path) -> None:
    """Lightning's EMA callback: the checkpoint holds the average, which is that of the parameters after each step."""
    module = Module(normswap.convert(net(), "gn-ws").model)
    decay = 0.5
    average = {name: p.detach().clone() for name, p in module.named_parameters()}
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    steps: list[int] = []

    class Watch(callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            for name, p in module.named_parameters():
                share = 1 - decay if steps else 1.0
                average[name] = torch.lerp(average[name], p.detach(), share)
            steps.append(trainer.global_step)

    ema = callbacks.EMAWeightAveraging(decay=decay)
    fit(module, tmp_path, 2, callbacks=[Watch(), ema, saving(tmp_path)])
    assert len(steps) == 6
    held = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    torch.testing.assert_close({n: held[n] for n in average}, average)
    assert buffers and all(torch.equal(held[name], value) for name, value in buffers.items())
    again = Module(normswap.convert(net(), "gn-ws").model)
    again.load_state_dict(held, strict=True)
    assert F.cross_entropy(again.eval()(IMAGES), LABELS) < 1.0


@pytest.mark.parametrize("target", ["gn", "gn-ws"])
def test_stochastic_weight_averaging_needs_no_pass_for_statistics(target: str, tmp_path: Path) -> None:
    """With a batch norm, Lightning adds an epoch that renews its statistics; a converted model has none to renew."""
    epochs: dict[str, int] = {}
    for name, made in (("batch norm", net()), (target, normswap.convert(net(), target).model)):
        module = Module(made)
        swa = callbacks.StochasticWeightAveraging(swa_lrs=0.005, swa_epoch_start=1, annealing_epochs=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(module, tmp_path / name, 3, callbacks=[swa])
        epochs[name] = -(-len(module.losses) // 3)
        assert swa.pl_module_contains_batch_norm(module) == (name == "batch norm")
    assert epochs == {"batch norm": 4, target: 3}
    assert F.cross_entropy(module.eval()(IMAGES), LABELS) < 1.0
    before = copy.deepcopy(module.state_dict())
    torch.optim.swa_utils.update_bn(DataLoader(DATA, batch_size=8), module)
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
