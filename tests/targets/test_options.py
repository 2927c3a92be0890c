"""An option that a target has no use for is refused, if it was given; its default never is."""

import re
from typing import Any

import pytest
import torch
from helpers.nets import conv_norm, randomize
from torch import nn
from typer.testing import CliRunner

import normswap
from normswap import TARGETS, ModelError, OptionError
from normswap.cli.commands import app
from normswap.report.report import Report

GIVEN: dict[str, tuple[Any, Any]] = {
    "groups": ("auto", 2),
    "purpose": ("training", "use"),
    "ws": ("preserve", "strict"),
    "ws_scope": ("normed", "all"),
    "transfer": ("match", "copy"),
}
USES = {
    "groups": {"gn", "bcn"},
    "purpose": {"gn", "bcn"},
    "ws": {"ws"},
    "ws_scope": {"ws"},
    "transfer": {"gn", "ln", "in", "pn", "est", "bcn", "bn", "frozen", "fold"},
}


def report(to: str, **options: Any) -> Report:
    model = randomize(nn.Sequential(conv_norm(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)))
    return normswap.convert(model, to, **options).report


@pytest.mark.parametrize("option", GIVEN)
@pytest.mark.parametrize("to", [name for name in TARGETS if name.count("-") == 0 or name.startswith(("gn", "in"))])
def test_options_of_other_targets_are_refused(to: str, option: str) -> None:
    default, other = GIVEN[option]
    try:
        report(to, **{option: default})
    except ModelError as error:  # a batch norm from batch norms, say
        assert re.search("nothing to (convert|fold)", str(error))
    if USES[option] & set(to.split("-")):
        try:
            report(to, **{option: other})
        except ModelError as error:
            assert re.search("nothing to (convert|fold)", str(error))
    else:
        with pytest.raises(OptionError, match=f"^{option}: has no effect with the target {to}"):
            report(to, **{option: other})


@pytest.mark.filterwarnings("ignore:the calibration data are")  # noise
def test_with_others_an_option_may_be_of_use() -> None:
    assert report("ws", ws="strict", transfer="copy").totals.weights_changed
    with pytest.raises(OptionError, match="calibrate_seconds: needs data"):
        report("gn", calibrate_seconds=3)
    report("gn", calibrate_seconds=0.1, calibrate=torch.randn(8, 3, 9, 9))


def test_what_changes_nothing_for_want_of_layers_is_said() -> None:
    said = report("gn", recurrent="ln", layers=("linear",)).warnings
    assert [line for line in said if line.startswith(("recurrent=ln", "layers=linear"))] == list(said)
    assert report("gn").warnings == ()


def test_the_command_refuses_in_one_line(tmp_path: Any) -> None:
    torch.save(conv_norm(), tmp_path / "m.pt")
    for options in (["--groups", "4"], ["--for", "use"], ["--ws", "strict"], ["--ws-scope", "all"]):
        refused = CliRunner().invoke(app, ["convert", str(tmp_path / "m.pt"), "--to", "in", *options])
        assert refused.exit_code == 1 and refused.stderr.count("\n") == 1 and "has no effect" in refused.stderr
    default = [
        "--groups",
        "auto",
        "--ws",
        "preserve",
        "--ws-scope",
        "normed",
        "--layers",
        "conv",
        "--transfer",
        "match",
    ]
    assert CliRunner().invoke(app, ["convert", str(tmp_path / "m.pt"), "--to", "in", *default]).exit_code == 0
