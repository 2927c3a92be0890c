"""Tensors alone: what their keys show to be a batch norm is converted, and everything like one stays and is named."""

import re
from pathlib import Path

import pytest
import torch
from helpers.nets import randomize, resnet
from torch import Tensor, nn

import normswap
from normswap import ModelError
from normswap.files import inspect_file, norms_by_keys

State = dict[str, Tensor]
OBSERVATIONS = {"running_mean": torch.randn(7).double(), "running_var": torch.ones(7).double()}
NO_NORMS: dict[str, tuple[State, str]] = {
    "observations": (OBSERVATIONS | {"count": torch.tensor(1e4).double()}, "lacks weight, bias"),
    "observations without a count": (OBSERVATIONS, "lacks weight, bias"),
    "rewards": ({"mean": torch.tensor(0.5), "var": torch.tensor(2.0), "count": torch.tensor(9.0)}, "lacks running_"),
    "a data set's": ({"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}, "lacks running_"),
    "empirical": ({"_mean": torch.zeros(1, 7), "_var": torch.ones(1, 7), "_std": torch.ones(1, 7)}, "lacks running_"),
    "without gain and bias": (nn.BatchNorm1d(7, affine=False).state_dict(), "lacks weight, bias.*--model"),
    "without a variance": ({"running_mean": torch.zeros(7)}, "lacks running_var, weight, bias"),
    "without a bias": (OBSERVATIONS | {"weight": torch.ones(7).double()}, "lacks bias"),
    "whole numbers": ({k: v.long() for k, v in nn.BatchNorm1d(7).state_dict().items()}, "floating point"),
    "of other lengths": (nn.BatchNorm1d(7).state_dict() | {"running_var": torch.ones(6)}, "of one length"),
    "a normalizer with a gain": (nn.BatchNorm1d(7).state_dict() | {"count": torch.ones(())}, "has count beside them"),
    "a head of values": (nn.BatchNorm1d(1).state_dict() | {"mean_sq": torch.ones(1)}, "has mean_sq beside them"),
    "a batch-channel norm": (nn.BatchNorm1d(8).state_dict() | {"group_bias": torch.ones(2)}, "has group_bias beside"),
    "a matrix": (nn.BatchNorm1d(7).state_dict() | {"weight": torch.ones(7, 7)}, "of one length"),
}


@pytest.mark.parametrize("kind", NO_NORMS)
@pytest.mark.parametrize("target", ["gn", "frozen"])
def test_statistics_that_are_no_norm_stay_and_are_named(tmp_path: Path, kind: str, target: str) -> None:
    found, reason = NO_NORMS[kind]
    beside = {f"inner.obs.{name}": value for name, value in found.items()}
    torch.save({"model": beside | {f"net.{name}": v for name, v in resnet().state_dict().items()}}, tmp_path / "x.pt")
    report = normswap.convert_file(tmp_path / "x.pt", target)
    state = torch.load(tmp_path / f"x.{target}.pt")["model"]
    assert all(torch.equal(state[name], value) and state[name].dtype == value.dtype for name, value in beside.items())
    wanted = normswap.convert(resnet(), target).model.state_dict()
    assert state.keys() == beside.keys() | {f"net.{name}" for name in wanted}
    (left,) = (entry for entry in report.left if entry.path == "inner.obs")
    assert re.search(reason, left.reason) and report.totals.left == len(report.left)


def test_nothing_but_statistics_is_an_error_that_tells_why(tmp_path: Path) -> None:
    torch.save(OBSERVATIONS, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"x\.pt: nothing to convert to gn: 1 statistics: lacks weight, bias.*--model"):
        normswap.convert_file(tmp_path / "x.pt", "gn")
    (layer,) = inspect_file.inspect_file(tmp_path / "x.pt").layers
    assert layer.module == "statistics" and "lacks weight, bias" in layer.obstacle


def test_norms_behind_linear_layers_get_the_groups_that_their_model_gives_them(tmp_path: Path) -> None:
    net = randomize(
        nn.Sequential(
            nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 48),
            nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48), nn.Dropout(), nn.BatchNorm1d(48),
        )
    ).eval()  # fmt: skip
    torch.save(net.state_dict(), tmp_path / "m.pt")
    normswap.convert_file(tmp_path / "m.pt", "gn")
    by_model = normswap.convert(net, "gn").model
    assert [by_model[at].num_groups for at in (1, 5, 9)] == [8, 3, 3]  # type: ignore[index, union-attr]
    x = torch.randn(2, 3, 8, 8)
    by_model.load_state_dict(torch.load(tmp_path / "m.gn.pt"))
    assert torch.equal(by_model(x), normswap.load(tmp_path / "m.gn.pt", model=lambda: net)(x))


def test_norms_of_older_files_do_not_count_batches(tmp_path: Path) -> None:
    state = {name: v for name, v in resnet().state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "x.pt")
    assert normswap.convert_file(tmp_path / "x.pt", "gn").totals.norms_changed == 20


def test_statistics_are_no_parameters_of_an_optimizer() -> None:
    net = randomize(nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8)))
    state = {f"obs.{name}": value for name, value in NO_NORMS["observations"][0].items()} | net.state_dict()
    found = norms_by_keys.parameters_by_keys(state)
    assert [p.name for p in found] == [name for name, _ in net.named_parameters()]
    as_parameters = norms_by_keys.parameters_by_keys(state, with_statistics=True)
    assert [p.name for p in as_parameters] == ["obs.count", *(p.name for p in found)]
    assert norms_by_keys.count_elements_by_keys(state) == (7 * 8 + 8 + 16, 15 + 17)


@pytest.mark.parametrize("target", ["gn", "frozen"])
@pytest.mark.parametrize("beside", ["a state dict", "under another prefix", "a module"])
def test_copies_on_the_same_tensors_are_converted_once(tmp_path: Path, target: str, beside: str) -> None:
    """Two calls of `state_dict` give two dicts on one memory, which `torch.save` keeps so."""
    model, prefix = resnet(), "module." if beside == "under another prefix" else ""
    wanted = normswap.convert(model, target).model.state_dict()
    other = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    content = {"model": model if beside == "a module" else other, "ema": {"shadow": model.state_dict()}}
    torch.save(content, tmp_path / "x.pt")
    report = normswap.convert_file(tmp_path / "x.pt", target)
    found = torch.load(tmp_path / f"x.{target}.pt", weights_only=False)
    first = found["model"].state_dict() if beside == "a module" else found["model"]
    stays = model.state_dict() if "ema" in str(report.warnings) else wanted
    for state, expected in ((first, wanted), (found["ema"]["shadow"], stays)):
        assert {name.removeprefix(prefix) for name in state} == {*expected}
        assert all(torch.equal(value, expected[name.removeprefix(prefix)]) for name, value in state.items())
