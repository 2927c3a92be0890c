"""Tensors that a model has under several names and a file of safetensors once, as its `save_model` writes them."""

import json
from pathlib import Path

import pytest
import torch
from helpers.nets import X, randomize
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

import normswap


class Cameras(nn.Module):
    """One encoder for two cameras, and a head whose weight is tied to another's."""

    def __init__(self) -> None:
        super().__init__()
        encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.encoders = nn.ModuleDict({"front": encoder, "wrist": encoder})
        self.own = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.head, self.tied = nn.Linear(8, 2), nn.Linear(8, 2, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        found = [self.encoders["front"](x), self.encoders["wrist"](x.flip(-1)), self.own(x)]
        return self.head(sum(found).mean((2, 3))) + self.tied(found[0].mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    return randomize(Cameras()).eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(X)


def check(model: nn.Module, to: str, out: Path) -> None:
    """`out` has each tensor once, and fills the converted model by `load_model` and by `normswap.load`."""
    wanted = normswap.convert(model, to).model
    fresh = normswap.convert(Cameras(), to).model
    missing, unexpected = load_model(fresh, out, strict=False)  # a count is odd to it for any shared batch norm
    assert not [name for name in (*missing, *unexpected) if not name.endswith("num_batches_tracked")]
    torch.testing.assert_close(output(fresh), output(wanted))
    torch.testing.assert_close(output(normswap.load(out, model=Cameras)), output(wanted))
    stored = load_file(out)
    assert {name.split(".")[0] for name in stored if not name.startswith("encoders.front")} == {"own", "head"}
    own = {id(tensor): tensor.numel() for tensor in (*wanted.parameters(), *wanted.buffers())}
    assert sum(tensor.numel() for tensor in stored.values()) == sum(own.values())


@pytest.mark.parametrize("to", ["gn", "fold", "gn-ws", "est-wn"])
def test_with_the_model(to: str, model: nn.Module, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m.safetensors", {"author": "somebody"})
    torch.testing.assert_close(output(normswap.load(tmp_path / "m.safetensors", model=Cameras)), output(model))
    normswap.convert_file(tmp_path / "m.safetensors", to, model=Cameras)
    check(model, to, tmp_path / f"m.{to}.safetensors")
    with safe_open(tmp_path / f"m.{to}.safetensors", "pt") as file:
        assert file.metadata()["author"] == "somebody"


@pytest.mark.parametrize("to", ["gn", "frozen", "bcn"])
def test_tensors_alone(to: str, model: nn.Module, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m.safetensors")
    report = normswap.convert_file(tmp_path / "m.safetensors", to)
    check(model, to, tmp_path / f"m.{to}.safetensors")
    shared = {"encoders.front.1", "encoders.wrist.1"}
    assert report.totals.norms_changed == 2 and shared in [set(change.paths) for change in report.changes]
    torch.save(model.state_dict(), tmp_path / "m.pt")
    normswap.convert_file(tmp_path / "m.pt", to)
    state = torch.load(tmp_path / f"m.{to}.pt")
    fresh = normswap.convert(Cameras(), to).model
    fresh.load_state_dict(state)
    assert state["encoders.front.1.weight"].data_ptr() == state["encoders.wrist.1.weight"].data_ptr()


def test_in_a_folder_with_an_index(model: nn.Module, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        aliases = {name: kept for name, kept in file.metadata().items() if name != "format"}
    state, folder = load_file(tmp_path / "m.safetensors"), tmp_path / "sharded"
    folder.mkdir()
    parts = {f"model-0000{i}-of-00002.safetensors": {n: state[n] for n in sorted(state)[i - 1 :: 2]} for i in (1, 2)}
    for name, part in parts.items():
        save_file(part, folder / name, {"format": "pt"})
    weight_map = {key: name for name, part in parts.items() for key in part}
    index = {"metadata": {"total_size": 1, **aliases}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    normswap.convert_file(folder, "gn", tmp_path / "out", model=Cameras)
    wanted = normswap.convert(model, "gn").model
    torch.testing.assert_close(output(normswap.load(tmp_path / "out", model=Cameras)), output(wanted))
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert not written["weight_map"].keys() & aliases.keys()
    assert written["metadata"]["encoders.wrist.0.weight"] == "encoders.front.0.weight"
