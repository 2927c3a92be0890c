"""`SwapNorms` in real trainers: converted before the first step, checkpoints that load and resume, folded at last."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import normswap

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*log_every_n_steps", "ignore:.*LeafSpec", "ignore:.*pin_memory",
    "ignore:.*Checkpoint directory .* exists", "ignore:Be aware that when using `ckpt_path`",
)  # fmt: skip

IMAGES = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % 3


def make_net() -> nn.Module:
    """A net whose batch norms have statistics of their own."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    net(IMAGES * 2 + 1)
    return net.eval()


def is_standardized(net: Any) -> bool:
    return isinstance(net[1], nn.GroupNorm) and hasattr(net[0], "weight_gain")


# ---- Lightning ----


def lightning_module(net: nn.Module) -> Any:
    lightning = pytest.importorskip("lightning.pytorch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            assert is_standardized(self.net)
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Module()


def fit(folder: Path, epochs: int, resumed: Path | None = None, **options: Any) -> tuple[Any, Any]:
    from lightning.pytorch import Trainer, callbacks

    from normswap.training.lightning import SwapNorms

    module = lightning_module(make_net())
    swap = SwapNorms("gn-ws", module="net", **options)
    saving = callbacks.ModelCheckpoint(dirpath=folder, save_last=True)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[swap, saving],
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(module, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8), ckpt_path=resumed)
    assert swap.report is not None and swap.report.totals.norms_changed == 2
    return module, trainer


def test_lightning_trains_a_converted_model_and_its_checkpoint_loads(tmp_path: Path) -> None:
    module, trainer = fit(tmp_path, 2)
    assert is_standardized(module.net)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.net.parameters()}
    loaded = normswap.load(tmp_path / "last.ckpt", model=make_net)
    torch.testing.assert_close(loaded.eval()(IMAGES), module.net.eval()(IMAGES), rtol=0, atol=0)


def test_lightning_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    fit(tmp_path / "stopped", 1)
    resumed, _ = fit(tmp_path / "stopped", 3, tmp_path / "stopped" / "last.ckpt")
    straight, _ = fit(tmp_path / "straight", 3)
    torch.testing.assert_close(resumed.net.eval()(IMAGES), straight.net.eval()(IMAGES), rtol=0, atol=0)


def test_lightning_folds_when_the_fit_is_over(tmp_path: Path) -> None:
    module, trainer = fit(tmp_path, 1, fold=True)
    assert type(module.net[0]) is nn.Conv2d and not hasattr(module.net[0], "weight_gain")
    trained = normswap.load(tmp_path / "last.ckpt", model=make_net).eval()
    torch.testing.assert_close(module.net.eval()(IMAGES), trained(IMAGES))
    trainer.save_checkpoint(tmp_path / "folded.ckpt")
    folded = normswap.load(tmp_path / "folded.ckpt", model=make_net).eval()
    assert type(folded[0]) is nn.Conv2d  # type: ignore[index]
    torch.testing.assert_close(folded(IMAGES), trained(IMAGES))
    normswap.save(module.net, tmp_path / "folded.pt")
    torch.testing.assert_close(normswap.load(tmp_path / "folded.pt").eval()(IMAGES), trained(IMAGES))


def test_a_second_fit_goes_on_with_the_converted_model(tmp_path: Path) -> None:
    from normswap.training.lightning import SwapNorms

    module, trainer = fit(tmp_path, 1)
    again = SwapNorms("gn-ws", module="net")
    again.setup(trainer, module, "fit")
    assert again.report is None and is_standardized(module.net)


# ---- transformers ----


class Samples(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": IMAGES[index], "labels": LABELS[index]}


class Classifier(nn.Module):
    """A net as the Trainer takes it: it gives its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(images)
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def trainer_of(model: nn.Module, folder: Path, epochs: int, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from normswap.training.transformers import SwapNorms

    swap = SwapNorms("gn-ws", **{name: options.pop(name) for name in ("fold",) if name in options})
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=8, save_strategy="epoch",
        use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=0.01, logging_strategy="no", seed=0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=Samples(), callbacks=[swap], **options)


def outputs_of(model: Any) -> Tensor:
    logits: Tensor = model.eval()(IMAGES)["logits"].detach()
    return logits


def test_transformers_train_a_converted_model_and_its_checkpoint_loads(tmp_path: Path) -> None:
    model = Classifier()
    trainer_of(model, tmp_path, 2).train()
    assert is_standardized(model.net)
    for folder in (tmp_path / "checkpoint-6", tmp_path / "checkpoint-6" / "model.safetensors"):
        torch.testing.assert_close(outputs_of(normswap.load(folder, model=Classifier)), outputs_of(model))


def test_transformers_resume_as_if_they_had_not_stopped(tmp_path: Path) -> None:
    trainer_of(Classifier(), tmp_path / "stopped", 1).train()
    resumed, straight = Classifier(), Classifier()
    trainer_of(resumed, tmp_path / "stopped", 3).train(resume_from_checkpoint=True)
    trainer_of(straight, tmp_path / "straight", 3).train()
    torch.testing.assert_close(outputs_of(resumed), outputs_of(straight))


def test_transformers_fold_when_training_is_over(tmp_path: Path) -> None:
    model = Classifier()
    trainer = trainer_of(model, tmp_path, 1, fold=True)
    trainer.train()
    trainer.save_model()
    assert type(model.net[0]) is nn.Conv2d and not hasattr(model.net[0], "weight_gain")
    torch.testing.assert_close(
        outputs_of(normswap.load(tmp_path / "checkpoint-3", model=Classifier)), outputs_of(model)
    )
    torch.testing.assert_close(outputs_of(normswap.load(tmp_path, model=Classifier)), outputs_of(model))


def test_an_optimizer_that_was_made_before_goes_on_with_the_converted_model(tmp_path: Path) -> None:
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer_of(model, tmp_path, 1, optimizers=(optimizer, None)).train()
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_a_callback_that_comes_too_late_says_so(tmp_path: Path) -> None:
    from normswap.training.transformers import SwapNorms

    trainer = trainer_of(Classifier(), tmp_path, 1)
    late = pytest.importorskip("transformers").Trainer(Classifier(), trainer.args, train_dataset=Samples())
    late.add_callback(SwapNorms("gn"))
    with pytest.raises(normswap.OptionError, match=r"Trainer\(callbacks=\[SwapNorms"):
        late.train()
