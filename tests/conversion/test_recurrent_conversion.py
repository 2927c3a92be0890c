"""Recurrent layers in a conversion with `recurrent="ln"`: the report, data, files, optimizers."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from helpers.checks import distance
from helpers.command import run
from torch import Tensor, nn

import normswap


class Reader(nn.Module):
    """Steps through a convolution and a norm, two recurrent layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(6, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.lstm = nn.LSTM(8, 5, 2, bidirectional=True, batch_first=True)
        self.gru, self.rnn = nn.GRU(10, 8, batch_first=True), nn.RNN(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        for layer in (self.lstm, self.gru, self.rnn):
            x = layer(x)[0]
        return self.head(x[:, -1])


def reader() -> Reader:
    torch.manual_seed(0)
    return Reader().eval()


SEQUENCES = torch.randn(16, 9, 6, generator=torch.Generator().manual_seed(1))


def test_convert() -> None:
    model = reader()
    converted, report = normswap.convert(model, "gn", recurrent="ln")
    assert [(c.paths[0], c.after) for c in report.changes if c.kind == "weight"] == [
        ("lstm", "LayerNormLSTM"),
        ("gru", "LayerNormGRU"),
    ]
    assert not any(change.exact for change in report.changes)
    assert [left.path for left in report.left if "no form with layer normalization" in left.reason] == ["rnn"]
    assert type(model.lstm) is nn.LSTM, "the caller's model was touched"
    fresh = normswap.convert(reader(), "gn", recurrent="ln").model
    fresh.load_state_dict(converted.state_dict(), strict=True)
    torch.testing.assert_close(fresh(SEQUENCES), converted(SEQUENCES))
    both = normswap.convert(model, "gn-wn", recurrent="ln", layers=("conv", "rnn")).report
    assert {c.paths[0]: c.after for c in both.changes if c.kind == "weight"}["rnn"] == "NormalizedRNN"
    again = normswap.convert(converted, "ws", recurrent="ln").report
    assert {left.path for left in again.left if "already" in left.reason} == {"lstm", "gru"}
    folded = normswap.fold(converted)
    assert {left.path for left in folded.report.left if "inside" in left.reason} == {"lstm", "gru"}


def test_data_keep_more() -> None:
    """On inputs far from what is assumed without data: the recurrent part alone, so that nothing else drifts."""
    model, x = reader(), SEQUENCES * 0.2 + 3
    far = {
        name: normswap.convert(model.lstm, "ln", recurrent="ln", **options).model(torch.cat([x, x[..., :2]], 2))[0]
        for name, options in {
            "noise": {},
            "data": {"calibrate": torch.cat([x, x[..., :2]], 2), "calibrate_seconds": 0},
            "reset": {"transfer": "reset"},
        }.items()
    }
    before = model.lstm(torch.cat([x, x[..., :2]], 2))[0]
    errors = {name: distance(before.detach(), after.detach()) for name, after in far.items()}
    assert errors["data"] < 0.5 * errors["reset"] and errors["data"] < errors["noise"]


@pytest.mark.parametrize("whole", [True, False])
def test_files(tmp_path: Path, whole: bool) -> None:
    model = reader()
    torch.save(model if whole else model.state_dict(), tmp_path / "m.pt")
    torch.save(SEQUENCES, tmp_path / "data.pt")
    source = {"trust": True} if whole else {"model": reader}
    options = {"recurrent": "ln", "calibrate_seconds": 0}  # what data show; the fit to them is tested by itself
    normswap.convert_file(tmp_path / "m.pt", "gn", calibrate=tmp_path / "data.pt", **options, **source)
    wanted = normswap.convert(model, "gn", calibrate=SEQUENCES, **options).model
    torch.testing.assert_close(normswap.load(tmp_path / "m.gn.pt", **source)(SEQUENCES), wanted(SEQUENCES))


def test_an_optimizer_goes_on() -> None:
    """In place, parameters stay the same objects; the gains are new."""
    model = reader().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    normswap.convert(model, "gn", recurrent="ln", inplace=True)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = {name for name, p in model.named_parameters() if id(p) not in held}
    assert all("gain_" in name or "bias_c_" in name for name in new)
    before = model(SEQUENCES)
    before.square().sum().backward()
    optimizer.step()
    assert not torch.allclose(model(SEQUENCES), before)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(normswap.OptionError, match="recurrent: 'gn' is not one of ln"):
        normswap.convert(reader(), "gn", recurrent="gn")
    torch.save(reader().state_dict(), tmp_path / "m.pt")
    with pytest.raises(normswap.OptionError, match="which --recurrent needs"):
        normswap.convert_file(tmp_path / "m.pt", "gn", recurrent="ln")


# ---- by itself ----


def test_recurrent_layers_alone() -> None:
    """No norm and no other weight is the business of such a conversion: neither changed nor left."""
    model = nn.ModuleDict({"read": reader(), "conv": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8)})
    converted, report = normswap.convert(model, recurrent="ln")
    assert report.target == report.recipe["target"] == "recurrent-ln"
    assert {change.paths[0] for change in report.changes} == {"read.lstm", "read.gru"}
    assert [left.path for left in report.left] == ["read.rnn"] and type(converted["norm"]) is nn.BatchNorm2d
    with pytest.raises(normswap.OptionError, match="no target"):
        normswap.convert(model)
    with pytest.raises(normswap.ModelError, match="nothing to convert to recurrent-ln: the model has no LSTM or GRU"):
        normswap.convert(nn.Linear(3, 3), recurrent="ln")


@pytest.mark.parametrize("whole", [True, False])
def test_the_command_needs_no_target(tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tagger.py").write_text(TAGGER)
    monkeypatch.syspath_prepend(tmp_path)
    tagger = importlib.import_module("tagger")
    model = tagger.make()
    torch.save(model if whole else model.state_dict(), "tagger.pt")
    source = ["--allow", "tagger.Tagger"] if whole else ["--model", "tagger.py:make"]
    result = run("convert", "tagger.pt", "--recurrent", "ln", *source)
    assert result.exit_code == 0 and result.stderr == "" and "tagger.pt → recurrent-ln" in result.stdout
    known = {"allow": [tagger.Tagger]} if whole else {"model": tagger.make}
    loaded = normswap.load("tagger.recurrent-ln.pt", **known)
    words = torch.randint(50, (2, 7))
    torch.testing.assert_close(loaded(words), normswap.convert(model, recurrent="ln").model(words))
    assert run("convert", "tagger.pt", *source).exit_code == 2
    advice = run("inspect", "tagger.pt", *source).stdout
    assert "--recurrent ln" in advice and "wn --layers rnn" in advice
    sys.modules.pop("tagger")


TAGGER = """
import torch
from torch import nn


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.lstm, self.tags = nn.Embedding(50, 12), nn.LSTM(12, 24, batch_first=True), nn.Linear(24, 5)

    def forward(self, x):
        return self.tags(self.lstm(self.words(x))[0])


def make():
    torch.manual_seed(0)
    return Tagger().eval()
"""
