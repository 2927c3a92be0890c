"""The report in the terminal: golden files, totals recomputed, patterns of paths."""

import re
from pathlib import Path

import pytest
from helpers.checks import quiet
from helpers.quirks import QUIRKS
from helpers.terminal import printed
from hypothesis import given
from hypothesis import strategies as st

import normswap
from normswap.files import model_specs
from normswap.report.path_patterns import fold_paths

GOLDEN = Path(__file__).parent / "golden"


def report_of(name: str, target: str) -> normswap.Report:
    if name in QUIRKS:
        with quiet():
            return normswap.convert(QUIRKS[name].make(), target).report
    return normswap.convert(model_specs.build(f"torchvision:{name}"), target).report


@pytest.mark.parametrize(
    ("name", "target", "width"),
    [
        ("resnet18", "gn-ws", 100),
        ("resnet152", "gn-ws", 80),
        ("densenet121", "fold", 100),
        ("mobilenet_v3_small", "gn", 60),
        ("one norm, two parents", "gn-ws", 100),
    ],
)
def test_golden(name: str, target: str, width: int) -> None:
    """The wanted text is a file; where it is absent, the test says what would be in it."""
    text = printed(report_of(name, target), width)
    file = GOLDEN / f"{name.replace(', ', '-').replace(' ', '-')}.{target}.{width}.txt"
    assert file.exists(), f"{file.name} is missing; it would be:\n{text}"
    assert text == file.read_text()


def test_a_resnet_152_fits_on_one_screen() -> None:
    assert printed(report_of("resnet152", "gn-ws"), 80).count("\n") <= 24


@pytest.mark.parametrize("target", ["gn-ws", "fold", "frozen", "ws"])
@pytest.mark.parametrize("name", ["resnet18", "googlenet", "densenet121", "mobilenet_v3_small"])
def test_totals_are_those_of_the_printed_lines(name: str, target: str) -> None:
    report = report_of(name, target)
    text = printed(report, 200)
    body, _, left = text.partition("left as it was: ")
    counts = {"norm": 0, "weight": 0}
    for line in body.splitlines():
        match = re.search(r" (\w+) → .*×(\d+)$", line)
        if match:
            counts["norm" if "Norm" in match[1] else "weight"] += int(match[2])
    left_total = sum(int(count) for count in re.findall(r" ×(\d+)$", left.partition("\n\n")[0], re.MULTILINE))
    totals = report.totals
    assert (counts["norm"], counts["weight"], left_total) == (totals.norms_changed, totals.weights_changed, totals.left)
    assert f"{totals.norms_changed} norms, {totals.weights_changed} weights changed" in text


def test_full_has_a_line_for_each_change() -> None:
    report = report_of("resnet18", "gn-ws")
    lines = printed(report, 200, full=True).splitlines()
    for change in report.changes:
        assert sum(f"  {change.paths[0]} " in line and f"→ {change.after}" in line for line in lines) == 1


def test_a_narrow_terminal_loses_nothing() -> None:
    report = report_of("densenet121", "fold")
    narrow = re.sub(r"\s", "", printed(report, 40))
    for pattern in ("features.denseblock[1-4]", "convolution", "59norms,59weightschanged"):
        assert pattern in narrow
    assert max(len(line) for line in printed(report, 60).splitlines()) <= 60


PATHS = st.lists(
    st.lists(st.sampled_from(["a", "bn", "0", "1", "12", "x3", "y_2"]), min_size=1, max_size=4), max_size=30
)


@given(PATHS)
def test_patterns_cover_every_path_once(parts: list[list[str]]) -> None:
    paths = {".".join(part) for part in parts}
    folded = fold_paths(sorted(paths))
    assert sum(count for _, count in folded) == len(paths)
    covered = [re.compile(as_regex(pattern)) for pattern, _ in folded]
    assert all(any(regex.fullmatch(path) for regex in covered) for path in paths)


def as_regex(pattern: str) -> str:
    def numbers(match: re.Match[str]) -> str:
        first, _, last = match[1].partition("-")
        options = range(int(first), int(last) + 1) if last else match[1].split(",")
        return f"(?:{'|'.join(map(str, options))})"

    return re.sub(r"\[([\d,-]+)\]", numbers, pattern.replace(".", r"\.").replace("*", r"\d+"))


def test_the_pattern_of_the_design() -> None:
    paths = [f"layer{s}.{b}.bn{n}" for s in (1, 2, 3, 4) for b in range(3) for n in (1, 2, 3)]
    assert fold_paths(paths) == [("layer[1-4].*.bn[1-3]", 36)]
