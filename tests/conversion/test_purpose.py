"""What a conversion is for decides how many groups norms get, where a user does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import run
from helpers.nets import chain, conv_norm, mlp, randomize
from torch import nn

import normswap
from normswap import OptionError
from normswap.report.report import Report


def groups_of(model: nn.Module) -> list[int]:
    return [module.num_groups for module in model.modules() if isinstance(module, nn.GroupNorm)]


def notes(report: Report) -> set[str]:
    return {change.note for change in report.changes}


def test_one_group_where_nothing_tells_more() -> None:
    model = randomize(nn.Sequential(mlp(32), nn.BatchNorm1d(5)))
    converted, report = normswap.convert(model, "gn", purpose="use")
    assert groups_of(converted) == [1, 1]
    assert notes(report) == {"1 group for use: keeps most; 2 for training", "1 group for use: keeps most"}
    assert groups_of(normswap.convert(model, "gn").model) == [2, 1]


def test_training_is_the_default() -> None:
    model = randomize(chain(16, 64))
    given, default = normswap.convert(model, "gn-ws", purpose="training"), normswap.convert(model, "gn-ws")
    assert given.report.to_dict() == default.report.to_dict()
    assert groups_of(default.model) == [4, 8] and notes(default.report) == {""}


@pytest.mark.parametrize("groups", [4, "8c"])
def test_a_number_of_groups_is_what_was_asked(groups: int | str) -> None:
    model = randomize(chain(16, 32))
    both = [normswap.convert(model, "gn", groups=groups, purpose=purpose) for purpose in ("training", "use")]
    assert groups_of(both[0].model) == groups_of(both[1].model)
    assert notes(both[1].report) == {""}


def test_instance_norms_are_nearest_in_many_groups() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.InstanceNorm2d(32, affine=True))
    assert groups_of(normswap.convert(model, "gn", purpose="use").model) == [8]


def test_on_data_both_numbers_are_told() -> None:
    model, data = chain(32), 0.1 * torch.randn(64, 3, 8, 8) * torch.rand(64, 1, 1, 1)
    model.get_submodule("0.1").momentum = None  # statistics of exactly these data
    model.train()(data)
    found = {}
    for purpose in ("training", "use"):
        converted, report = normswap.convert(model.eval(), "gn", purpose=purpose, calibrate=data, calibrate_seconds=0)
        found[purpose] = groups_of(converted)[0], report.changes[0].note
    training, use = found["training"][0], found["use"][0]
    assert use <= training
    assert "for use: keeps most on the data" in found["use"][1]
    if use != training:
        assert f"{training} for training" in found["use"][1] and f"{use} for use" in found["training"][1]


@pytest.mark.parametrize("to", ["gn", "bcn", "gn-ws"])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_file_has_the_groups_and_nothing_runs_when_it_is_loaded(
    to: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted, report = normswap.convert(randomize(chain(16, 32)).eval(), to, purpose="use")
    assert report.recipe["options"]["purpose"] == "use"
    path = tmp_path / f"m.{ending}"
    torch.save(converted.state_dict(), path) if ending == "pt" else normswap.save(converted, path)

    def refused(*_: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(nn.Module, "__call__", refused)
    loaded = normswap.load(path, model=lambda: chain(16, 32)).eval()
    monkeypatch.undo()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x), converted(x))


def test_tensors_without_their_model_get_one_group_and_keep_eps(tmp_path: Path) -> None:
    model = randomize(chain(16, 32)).eval()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    report = normswap.convert_file(tmp_path / "m.pt", "gn", purpose="use")
    assert {change.groups for change in report.changes} == {1}
    assert {change.eps for change in report.changes} == {None}
    wanted = normswap.convert(model, "gn", groups=1).model  # as anybody writes it for the file
    for key, tensor in torch.load(tmp_path / "m.gn.pt").items():
        assert torch.equal(tensor, wanted.state_dict()[key]), key


def test_for_use_a_group_norm_divides_by_the_mean_of_both_variances() -> None:
    model = nn.Sequential(randomize(nn.BatchNorm2d(8))).eval()
    norm, data = model[0], torch.randn(64, 8, 4, 4) * torch.linspace(0.2, 3, 64)[:, None, None, None]
    norm.momentum = None
    norm.train()(data)
    converted, report = normswap.convert(model.eval(), "gn", purpose="use")
    sample, over_data = (data.var(dims, correction=0) for dims in ((1, 2, 3), None))
    mean = data.mean((1, 2, 3), keepdim=True)
    std = ((sample + over_data) / 2 + norm.eps).sqrt()[:, None, None, None]
    gain, bias, running_mean, running_std = (
        v[:, None, None] for v in (norm.weight, norm.bias, norm.running_mean, (norm.running_var + norm.eps).sqrt())
    )
    wanted = (((data - mean) / std * over_data.sqrt() + data.mean()) - running_mean) / running_std * gain + bias
    assert torch.allclose(converted(data), wanted, rtol=1e-2, atol=2e-2)
    assert report.changes[0].eps == converted[0].eps == pytest.approx(over_data.item(), rel=1e-2)
    assert "gain, bias and eps" in report.changes[0].how


@pytest.mark.parametrize("options", [{}, {"groups": 1}, {"transfer": "copy"}, {"transfer": "reset"}])
def test_eps_is_kept_unless_auto_matches_for_use(options: dict[str, Any]) -> None:
    model = randomize(chain(16, 32)).eval()
    for purpose in ("training", "use") if options else ("training",):
        converted, report = normswap.convert(model, "gn", purpose=purpose, **options)
        assert {m.eps for m in converted.modules() if isinstance(m, nn.GroupNorm)} == {1e-5}
        assert {change.eps for change in report.changes} == {None} and report.recipe["format"] == 1


@pytest.mark.parametrize("eps", ["big", -1.0, float("nan"), True])
def test_a_recipe_with_a_forged_eps_is_refused(eps: Any, tmp_path: Path) -> None:
    converted = normswap.convert(randomize(chain(16)).eval(), "gn", purpose="use").model
    for layer in converted.normswap_recipe["layers"].values():
        layer["eps"] = eps
    torch.save(converted.state_dict(), tmp_path / "m.pt")
    with pytest.raises(normswap.NormswapError, match="recipe is damaged"):
        normswap.load(tmp_path / "m.pt", model=lambda: chain(16))


def test_the_command(tmp_path: Path) -> None:
    torch.save(randomize(chain(32)), tmp_path / "m.pt")
    result = run("convert", tmp_path / "m.pt", "--to", "gn", "--for", "use")
    assert result.exit_code == 0 and "for use: keeps most" in " ".join(result.stdout.split())
    assert normswap.load(tmp_path / "m.gn.pt").normswap_recipe["options"]["purpose"] == "use"
    wrong = run("convert", tmp_path / "m.pt", "--to", "gn", "--for", "fun")
    assert wrong.exit_code == 2


def test_an_unknown_purpose_is_refused() -> None:
    with pytest.raises(OptionError, match="purpose: 'fun' is not one of training, use"):
        normswap.convert(conv_norm(), "gn", purpose="fun")  # type: ignore[arg-type]
