"""Drift is told of real inputs alone; noise checks what is exact, in silence."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers.command import run
from helpers.nets import chain, randomize
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap.analysis.noise import guess_inputs
from normswap.conversion.reporting import MEASURE

X = torch.randn(5, 3, 40, 40, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(5)


def net() -> nn.Module:
    torch.manual_seed(0)
    return randomize(nn.Sequential(*chain(8, 8), nn.Flatten(2))).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save(net(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.mark.parametrize("shape", [[], ["--input-shape", "2,3,32,32"]])
def test_nothing_is_told_of_noise(saved: Path, shape: list[str]) -> None:
    result = run("convert", saved, "--to", "gn", *shape)
    assert result.exit_code == 0 and "on noise" not in result.stdout and "drift on" not in result.stdout
    assert "--examples PATH" in " ".join(result.stdout.split())
    report = json.loads(run("convert", saved, "--to", "gn", *shape, "--dry-run", "--json").stdout)
    assert report["drift"] is None and report["notes"] == [MEASURE] and not report["warnings"]


def test_noise_checks_what_is_exact_in_silence(saved: Path) -> None:
    result = run("convert", saved, "--to", "frozen")
    assert "on noise" not in result.stdout and "drift on" not in result.stdout and "--examples" not in result.stdout
    drift = json.loads(run("convert", saved, "--to", "frozen", "--dry-run", "--json").stdout)["drift"]
    assert drift["probe"].startswith("noise") and drift["relative_l2"] < 1e-5


class Strange(nn.Module):
    """Takes what nobody guesses; the same function before a conversion and after, unless it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 40:
            raise ValueError("a message of the model's own")
        y: Tensor = self.inner(x)
        return y


@pytest.mark.parametrize("target", ["gn", "frozen"])
def test_a_wrong_guess_is_not_told(target: str, tmp_path: Path) -> None:
    torch.save(Strange(), tmp_path / "net.pt")
    allowed = ["--allow", f"{Strange.__module__}.Strange"]
    result = run("convert", tmp_path / "net.pt", "--to", target, *allowed)
    assert result.exit_code == 0 and "message of the model" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    "data",
    [X, (X, LABELS), TensorDataset(X, LABELS), DataLoader(TensorDataset(X, LABELS), 2), [X[:3], X[3:]], X.numpy()],
    ids=["tensor", "with labels", "dataset", "loader", "batches", "array"],
)
def test_examples_are_measured_and_nothing_is_fitted(data: Any) -> None:
    converted, report = normswap.convert(net(), "gn", examples=data)
    assert report.drift is not None and report.drift.probe == "5 examples" and report.calibration is None
    with torch.no_grad():
        wanted, got = net()(X), converted(X)
    assert report.drift.relative_l2 == pytest.approx(((got - wanted).norm() / wanted.norm()).item(), rel=1e-4)
    alone = normswap.convert(net(), "gn").model.state_dict()
    assert all(torch.equal(value, alone[name]) for name, value in converted.state_dict().items())


def test_examples_from_a_file(saved: Path, tmp_path: Path) -> None:
    numpy.save(tmp_path / "x.npy", X.numpy())
    result = run("convert", saved, "--to", "gn", "--examples", tmp_path / "x.npy")
    assert result.exit_code == 0 and "drift on 5 examples" in result.stdout and "--examples PATH" not in result.stdout


def test_examples_need_the_model_and_stand_alone(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "state.pt")
    numpy.save(tmp_path / "x.npy", X.numpy())
    result = run("convert", tmp_path / "state.pt", "--to", "gn", "--examples", tmp_path / "x.npy")
    assert result.exit_code == 1 and "--examples needs" in result.stderr
    with pytest.raises(normswap.OptionError, match="give one of them"):
        normswap.convert(net(), "gn", examples=X, example_inputs=X)
    torch.save(net(), tmp_path / "net.pt")
    with pytest.raises(normswap.OptionError, match="give one of them"):
        normswap.convert_file(tmp_path / "net.pt", "gn", examples=X, example_inputs=X)
    with pytest.raises(normswap.OptionError, match="examples: .* holds no inputs"):
        normswap.convert(net(), "gn", examples=3)


def test_an_untrained_network_has_one_plain_line(tmp_path: Path) -> None:
    torch.save(chain(8, 8), tmp_path / "new.pt")
    torch.save(X, tmp_path / "x.pt")
    result = run("convert", tmp_path / "new.pt", "--to", "gn", "--examples", tmp_path / "x.pt")
    assert result.stdout.count("never trained") == 1 and "drift on" not in result.stdout
    assert "warning:" not in result.stdout and "--examples PATH" not in result.stdout


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn, self.out = nn.Embedding(7, 12), nn.LSTM(12, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.rnn(self.words(x))[0])
        return y


@pytest.mark.parametrize(
    "model",
    [Reader(), nn.LSTM(40, 256), nn.GRUCell(40, 8), nn.Sequential(nn.Linear(5, 4)), nn.EmbeddingBag(9, 4), net()],
    ids=lambda model: type(model).__name__,
)
@pytest.mark.parametrize("shape", [None, (3, 4)])
def test_what_is_guessed_is_what_the_first_layer_reads(model: nn.Module, shape: tuple[int, int] | None) -> None:
    guessed = guess_inputs(model, shape)
    assert guessed is not None
    (value,), _ = guessed
    if shape is None:
        model(value)
    if isinstance(model, Reader | nn.EmbeddingBag):
        assert not value.is_floating_point() and value.max() < 9
