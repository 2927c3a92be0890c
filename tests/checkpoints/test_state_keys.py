"""Keys of a saved state dict that its model does not have: beside it, or a sign of another architecture."""

import warnings
from pathlib import Path

import pytest
import torch
from helpers.nets import randomize
from torch import Tensor, nn

import normswap
from normswap import FileError
from normswap.checkpoints.state_keys import bind


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = (nn.Sequential(nn.Conv2d(n, 8, 3), nn.BatchNorm2d(8)) for n in (3, 8))
        self.head = nn.ModuleDict({"main": nn.Linear(8, 2, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.head["main"](self.layer2(self.layer1(x)).mean((2, 3)))


BESIDE = ["loss.weight", "similarity_weight", "aux.0.weight", "aux.1.running_mean", "head.aux.weight"]
OF_ANOTHER = ["head.main.bias", "layer1.2.weight", "layer1.0.se.weight", "layer3.0.weight", "layer1.gate.weight"]


@pytest.mark.parametrize("prefix", ["", "module.", "model.net."])
@pytest.mark.parametrize("key", [*BESIDE, *OF_ANOTHER])
def test_a_key_that_the_model_does_not_have(key: str, prefix: str) -> None:
    model = Net().state_dict()
    saved = {prefix + name: value for name, value in model.items()} | {prefix + key: torch.ones(8)}
    if key in BESIDE:
        (binding,) = bind(saved, model, "x.pt")
        assert binding.prefix == prefix and set(binding.names.values()) == saved.keys() - {prefix + key}
    else:
        with pytest.raises(FileError, match=f"1 unexpected: {key}"):
            bind(saved, model, "x.pt")


def test_a_head_for_training_alone_stays_and_is_named(tmp_path: Path) -> None:
    """What the model lacks is the same bit for bit, its norm is named as left, and a missing tensor is an error."""
    model = randomize(Net()).eval()
    aux = {f"aux.{name}": v for name, v in nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).state_dict().items()}
    beside = aux | {"temperature": torch.tensor([0.07])}
    torch.save({"model": model.state_dict() | beside}, tmp_path / "run.pt")
    report = normswap.convert_file(tmp_path / "run.pt", "gn", model=Net)
    got = torch.load(tmp_path / "run.gn.pt")["model"]
    assert all(torch.equal(got[name], value) for name, value in beside.items())
    assert ("aux.1", "the model does not have it") in {(left.path, left.reason) for left in report.left}
    assert report.totals.left == len(report.left)
    assert any("beside the model, kept as it was: aux.0.weight" in warning for warning in report.warnings)
    with pytest.warns(UserWarning, match=r"left out what the model does not have: aux\.0\.weight"):
        loaded = normswap.load(tmp_path / "run.gn.pt", model=Net).eval()
    wanted = normswap.convert(model, "gn").model.eval()
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(loaded(x), wanted(x))
    lacking = {name: value for name, value in (model.state_dict() | beside).items() if name != "layer2.1.bias"}
    torch.save(lacking, tmp_path / "lacking.pt")
    with pytest.raises(FileError, match=r"1 missing: layer2\.1\.bias"):
        normswap.convert_file(tmp_path / "lacking.pt", "gn", model=Net)


def test_nothing_is_said_of_a_file_that_fits(tmp_path: Path) -> None:
    saved = {f"module.{name}": value for name, value in randomize(Net()).state_dict().items()}
    torch.save({"state_dict": saved}, tmp_path / "run.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normswap.load(tmp_path / "run.pt", model=Net)
    assert not normswap.convert_file(tmp_path / "run.pt", "est", model=Net, input_shape=(2, 3, 9, 9)).warnings
