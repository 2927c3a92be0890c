"""The demo: a trained network and its pictures in the package, through every command."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.command import run
from sklearn.datasets import load_digits
from torch import nn

import normswap
from normswap import demo
from normswap.demo import digits
from normswap.report.formats import to_svg

DEMO = "demo:digits"


def accuracy(model: nn.Module) -> float:
    pictures, labels = demo.held_out()
    with torch.no_grad():
        return (model.eval()(pictures).argmax(1) == labels).double().mean().item()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def converted(*options: str) -> dict[str, object]:
    result = run("convert", DEMO, *options, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_the_pictures_are_scikit_learns_and_none_is_on_both_sides() -> None:
    pictures, labels = demo.held_out()
    digit_of = {image.tobytes(): label for image, label in zip(load_digits().images, load_digits().target, strict=True)}
    rows = (pictures[:, 0].double() * 16).numpy()
    assert [digit_of[row.tobytes()] for row in rows] == labels.tolist()
    training = {row.numpy().tobytes() for row in demo.training_pictures()}
    assert len(training) == 512 and not training & {row.numpy().tobytes() for row in pictures}


def test_it_is_small_and_knows_its_digits() -> None:
    assert digits.WEIGHTS.stat().st_size <= 300_000 and digits.PICTURES.stat().st_size <= 100_000
    model = normswap.load(DEMO)
    assert not model.training and accuracy(model) > 0.97


def test_the_first_command_shows_the_promise() -> None:
    result = run("convert", DEMO, "--to", "gn-ws")
    assert result.exit_code == 0 and result.stderr == ""
    assert "accuracy on 397 held-out digits" in result.stdout and "drift on 397 held-out digits" in result.stdout
    model = normswap.load("digits.gn-ws.pt")
    assert isinstance(model.bn, nn.GroupNorm) and f"{accuracy(model):.1%} after" in result.stdout


def test_matched_keeps_what_reset_and_copied_lose() -> None:
    report = converted("--to", "gn", "--format", "safetensors")
    found = report["accuracy"]
    assert isinstance(found, dict)
    assert found["before"] == accuracy(demo.make_network()) and found["after"] > found["before"] - 0.03
    for way, transfer in (("reset", "reset"), ("copied", "copy")):
        assert found[way] == accuracy(normswap.convert(demo.make_network(), "gn", transfer=transfer).model) < 0.3
    assert accuracy(normswap.load("digits.gn.safetensors")) == found["after"]  # the file says what it needs


def test_nothing_is_compared_where_the_function_stays() -> None:
    found = converted("--to", "fold", "--dry-run")["accuracy"]
    assert isinstance(found, dict)
    assert found["before"] == found["after"] and found["reset"] is None and found["copied"] is None


def test_it_folds() -> None:
    assert run("fold", DEMO, "--quiet").exit_code == 0
    folded = normswap.load("digits.fold.pt")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert accuracy(folded) == accuracy(demo.make_network())


def test_it_calibrates_on_what_it_was_trained_on() -> None:
    report = converted("--to", "in", "--calibrate", DEMO, "--calibrate-seconds", "3", "--dry-run")
    calibration, drift = report["calibration"], report["drift"]
    assert isinstance(calibration, dict) and isinstance(drift, dict)
    assert calibration["samples"] == 512 and drift["probe"] == "397 held-out digits"


def test_it_is_inspected_on_its_pictures() -> None:
    result = run("inspect", DEMO)
    assert result.exit_code == 0 and "397 held-out digits" in result.stdout and "never trained" not in result.stdout


def test_its_tensors_know_their_model() -> None:
    torch.save(demo.make_network().state_dict(), "mine.pt")
    report = run("convert", "mine.pt", "--to", "gn", "--model", DEMO, "--examples", DEMO, "--json")
    assert json.loads(report.stdout)["drift"]["probe"] == "397 held-out digits"
    assert accuracy(normswap.load("mine.gn.pt")) > 0.95


@pytest.mark.parametrize(
    "words",
    [["demo:letters"], [DEMO, "--weights", "BEST"], [DEMO, "--calibrate", "demo:x"], [DEMO, "--examples", "demo:x"]],
    ids=" ".join,
)
def test_there_is_one_demo(words: list[str]) -> None:
    result = run("convert", *words, "--to", "gn")
    assert result.exit_code == 1 and "there is one demo, demo:digits" in result.stderr


def test_the_readme_shows_its_first_command() -> None:
    """The picture says what the command now does; its time and memory are those of another day."""
    root = Path(__file__).parents[2]
    command, shown = "normswap convert demo:digits --to gn-ws", (root / "tests/bench/results/report.svg").read_text()
    assert (
        command in (root / "README.md").read_text()
        and "tests/bench/results/report.svg" in (root / "README.md").read_text()
    )
    drawn = texts(to_svg(normswap.convert_file(DEMO, "gn-ws", command=command), DEMO))
    assert [line for line in drawn if "took" not in line] == [line for line in texts(shown) if "took" not in line]


def texts(picture: str) -> list[str]:
    """What an SVG says, a line of text each."""
    return re.findall(r"<text [^>]*>([^<]*)</text>", picture)
