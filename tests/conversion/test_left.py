"""What is left is what the target was to change and did not; all else is no business of the report's."""

from pathlib import Path

import pytest
import torch
from helpers.command import run
from helpers.nets import chain, randomize, resnet
from safetensors.torch import save_file
from torch import nn

import normswap


@pytest.mark.parametrize("target", ["gn", "ws", "gn-ws", "fold"])
def test_what_a_target_is_not_for_is_not_left(target: str) -> None:
    report = normswap.convert(resnet(), target).report
    assert report.left == () and report.totals.left == 0


@pytest.mark.parametrize(("target", "left"), [("gn", ["0"]), ("ws", ["4"]), ("gn-ws", ["0", "4"])])
def test_what_it_could_not_change_is(target: str, left: list[str]) -> None:
    """A layer norm over the last of three dimensions, and a convolution that no norm follows."""
    first = (nn.LayerNorm(64), nn.Unflatten(2, (8, 8)))
    model = nn.Sequential(*first, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
    report = normswap.convert(model, target, example_inputs=torch.randn(2, 3, 64)).report
    assert sorted(entry.path for entry in report.left) == left


@pytest.mark.parametrize(
    ("model", "target", "message"),
    [
        (nn.Conv2d(3, 4, 1), "gn", "nothing to convert to gn: the model has no normalization"),
        (nn.BatchNorm2d(3), "ws", "nothing to convert to ws: the model has no convolution"),
        (nn.Linear(3, 4), "gn-wn", "the model has no normalization and no convolution"),
    ],
)
def test_nothing_to_convert_says_what_is_not_there(model: nn.Module, target: str, message: str) -> None:
    with pytest.raises(normswap.ModelError, match=message):
        normswap.convert(model, target)


SAMPLE_NORMS = (nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.LayerNorm((8, 6, 6)))


@pytest.mark.parametrize("norm", SAMPLE_NORMS)
def test_a_norm_without_statistics_is_no_reason_to_warn_of_when_weights_are_baked_in(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
    standardized = normswap.convert(model, "ws").model
    for report in (normswap.fold(standardized).report, normswap.convert(standardized, "fold").report):
        assert report.totals.weights_changed == 1 and report.warnings == ()
        assert [entry.path for entry in report.left] == ["1"]
    with pytest.raises(normswap.ModelError, match=f"nothing to fold: 1 {type(norm).__name__}: ") as told:
        normswap.convert(model, "fold")
    assert "calibrate" not in str(told.value)


def test_a_batch_norm_that_cannot_go_into_a_layer_is_warned_of_by_folding() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    report = normswap.fold(normswap.convert(model, "ws").model).report
    assert [entry.path for entry in report.left] == ["0", "3"] and "no norm was changed" in report.warnings[0]


def test_what_is_folded_already_has_nothing_to_fold() -> None:
    folded = normswap.fold(normswap.convert(chain(8, 8), "fold-wn").model).model
    why = "nothing to fold: the model has no normalization and no standardized or normalized weights"
    with pytest.raises(normswap.ModelError, match=why):
        normswap.convert(folded, "fold")


def test_what_was_excluded_is_left() -> None:
    report = normswap.convert(resnet(), "gn", exclude="layer4.*").report
    assert {(left.kind, left.reason) for left in report.left} == {("norm", "not selected")}


def test_tensors_alone_leave_no_convolution(tmp_path: Path) -> None:
    torch.save(resnet().state_dict(), tmp_path / "state.pt")
    assert normswap.convert_file(tmp_path / "state.pt", "gn").left == ()


def test_auto_is_no_request() -> None:
    """What `auto` takes is told without a number that nobody has asked for."""
    model = nn.Sequential(nn.Conv2d(3, 36, 8), nn.BatchNorm2d(36), nn.Conv2d(36, 32, 1), nn.BatchNorm2d(32))
    notes = {
        c.paths[0]: c.note for c in normswap.convert(model, "gn", example_inputs=torch.randn(2, 3, 8, 8))[1].changes
    }
    assert notes == {"1": "2 groups: one element a channel", "3": "2 groups: one element a channel"}
    assert not any(c.note for c in normswap.convert(model, "gn").report.changes)  # 36 channels: 6 groups


def test_ranges_are_of_their_line(tmp_path: Path) -> None:
    """Of a diff, how far the tensors of each line moved; of a conversion, the groups of each line's norms."""
    before, after = (randomize(chain(8, 8, 8), seed=0) for _ in range(2))
    after.load_state_dict(before.state_dict())
    with torch.no_grad():
        after[0][0].weight.mul_(1.5)
        after[2][1].weight.mul_(3)
        after.register_buffer("weight", torch.ones(3))
        before.register_buffer("weight", torch.ones(3) * 4)
    for name, model in (("a", before), ("b", after)):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    lines = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors").stdout.splitlines()
    told = {words[0]: line for line in lines if (words := line.split()) and "relative L2" in line}
    assert "0.75" in told["weight"] and "to" not in told["weight"].split()
    assert "0.5 to 2" in told["*.[0-1].weight" if "*.[0-1].weight" in told else "*.*.weight"]


def test_buffers_of_tensors_are_no_parameters() -> None:
    model = resnet()
    converted = normswap.convert(model, "gn-ws").model
    modules, tensors = normswap.diff(model, converted), normswap.diff(model.state_dict(), converted.state_dict())
    for name in ("parameters_before", "parameters_after", "buffers_before", "buffers_after"):
        assert getattr(tensors.totals, name) == getattr(modules.totals, name) > 0


def test_a_note_is_no_warning(tmp_path: Path) -> None:
    torch.save(chain(8), tmp_path / "new.pt")
    result = run("convert", tmp_path / "new.pt", "--to", "gn", "--fold")
    assert "--fold had nothing to do" in " ".join(result.stdout.split()) and "warning:" not in result.stdout
