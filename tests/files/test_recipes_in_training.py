"""The recipe of a conversion in what training scripts save: `torch.save(model.state_dict())`, wherever the model is."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.nets import X, randomize, resnet
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typer.testing import CliRunner

import normswap
from normswap import FileError
from normswap.checkpoints.checkpoint import RECIPE
from normswap.checkpoints.stored_recipes import drop_recipes
from normswap.cli import commands


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))


class Task(nn.Module):
    """A training script's own module, as Lightning has them: the model, and a loss with a weight beside it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.loss = model, nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def trained(to: str = "gn-ws") -> nn.Module:
    model = normswap.convert(randomize(net()).eval(), to).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(X)


HOLDERS: dict[str, Callable[[nn.Module], Any]] = {
    "state dict": lambda m: m.state_dict(),
    "entry": lambda m: {"epoch": 3, "model": m.state_dict()},
    "deep": lambda m: {"state_dicts": {"model": m.state_dict()}, "optimizer": {}},
    "DataParallel": lambda m: {"state_dict": nn.DataParallel(m).state_dict()},
    "compiled": lambda m: {"state_dict": torch.compile(m).state_dict()},
    "compiled within DataParallel": lambda m: nn.DataParallel(torch.compile(m)).state_dict(),
    "task": lambda m: {"state_dict": Task(m).state_dict(), "pytorch-lightning_version": "2.5"},
    "average": lambda m: {"ema": AveragedModel(m).state_dict()},
    "deep copy": lambda m: copy.deepcopy(m).state_dict(),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).state_dict(),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.filterwarnings("ignore:.*left out what the model does not have")
def test_load_and_fold_know_the_recipe(holder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets_of_recipes.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)\n"
        "    return nn.Sequential(*layers)\n"
    )
    model = trained()
    torch.save(HOLDERS[holder](model), "ft.pt")
    loaded = normswap.load("ft.pt", model=net)
    assert torch.equal(output(loaded), output(model))
    torch.save(loaded.state_dict(), "again.pt")  # and what is loaded can be trained and saved again
    assert torch.equal(output(normswap.load("again.pt", model=net)), output(model))
    done = CliRunner().invoke(commands.app, ["fold", "ft.pt", "--model", "nets_of_recipes.py:net", "-o", "plain.pt"])
    assert done.exit_code == 0, done.output
    torch.testing.assert_close(output(normswap.load("plain.pt", model=net)), output(model))


@pytest.mark.parametrize("steps", [("ws", "gn"), ("frozen", "bn", "frozen-ws")])
def test_conversions_of_conversions(steps: tuple[str, ...], tmp_path: Path) -> None:
    model = randomize(net()).eval()
    for to in steps:
        model, report = normswap.convert(model, to)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert torch.equal(output(normswap.load(tmp_path / "w.pt", model=net)), output(model))
    normswap.save(model, tmp_path / "w.safetensors", report=report)
    assert torch.equal(output(normswap.load(tmp_path / "w.safetensors", model=net)), output(model))


class Pair(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def pair(shared: bool = False) -> Pair:
    first = net()
    return Pair(first, first if shared else net())


@pytest.mark.parametrize("shared", [False, True])
def test_parts_that_were_converted_by_themselves(shared: bool, tmp_path: Path) -> None:
    make = lambda: pair(shared)  # noqa: E731
    both = randomize(make()).eval()
    both.first = normswap.convert(both.first, "gn").model
    both.second = both.first if shared else normswap.convert(both.second, "frozen-ws").model
    torch.save(nn.DataParallel(both).state_dict(), tmp_path / "w.pt")
    assert torch.equal(output(normswap.load(tmp_path / "w.pt", model=make)), output(both))
    torch.save(both.state_dict(), tmp_path / "w.pt")
    with pytest.warns(UserWarning, match="left out what the model does not have: second"):
        assert torch.equal(output(normswap.load(tmp_path / "w.pt", model=First).first), output(both.first))
    whole = normswap.convert(both, "ws").model if not shared else both
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    assert torch.equal(output(normswap.load(tmp_path / "w.pt", model=make)), output(whole))


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = net()


def test_files_of_plain_layers_need_no_normswap(tmp_path: Path) -> None:
    model, report = normswap.convert(resnet(), "gn")
    normswap.save(model, tmp_path / "saved.pt")
    torch.save(normswap.fold(model).model, tmp_path / "folded.pt")
    for name in ("saved", "folded"):
        code = (
            "import sys, torch; sys.modules['normswap'] = None\n"
            f"print(sorted(torch.load('{name}.pt', weights_only=False).normswap_recipe))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert "'target'" in done.stdout, done.stderr
    loaded = normswap.load(tmp_path / "saved.pt")
    assert loaded.state_dict()._metadata[""][RECIPE] == report.recipe
    torch.save(model, tmp_path / "by_torch.pt")  # names the hook, which is allowed
    assert normswap.load(tmp_path / "by_torch.pt").state_dict()._metadata[""][RECIPE] == report.recipe


def test_a_strict_load_by_torch_is_undisturbed() -> None:
    model = trained()
    fresh = normswap.convert(net(), "gn-ws").model
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(output(fresh), output(model)) and list(fresh.state_dict()) == list(model.state_dict())


def test_a_file_that_has_lost_its_recipe_says_what_to_do(tmp_path: Path) -> None:
    model, report = normswap.convert(net(), "gn-ws")
    drop_recipes(model)
    with pytest.warns(UserWarning, match="holds no recipe, so that load.*give report="):
        normswap.save(model, tmp_path / "w.safetensors")
    normswap.save(model, tmp_path / "w.safetensors", report=report, overwrite=True)
    assert torch.equal(output(normswap.load(tmp_path / "w.safetensors", model=net)), output(model))
    for to, means in (("gn", "holds no recipe: save it with normswap.save"), ("gn-ws", "converted already")):
        torch.save(dict(trained(to).state_dict()), tmp_path / "w.pt")
        with pytest.raises(FileError, match=means):
            normswap.load(tmp_path / "w.pt", model=net)
