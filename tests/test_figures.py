"""The figures of the READMEs are those that the benchmarks wrote."""

import json
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from normswap import target_table

BENCH = Path(__file__).parent / "bench"
sys.path.insert(0, str(BENCH))

import neighbours  # noqa: E402
import real_networks  # noqa: E402
import sounds  # noqa: E402
import tables  # noqa: E402
import torch  # noqa: E402
from common import mean_error  # noqa: E402
from picture import Chart, draw  # noqa: E402

TEXTS = {path: path.read_text() for path in tables.DOCUMENTS}
PLACES = {found[2]: found[3] for text in TEXTS.values() for found in tables.PLACE.finditer(text)}


def test_there_is_a_place_for_every_table() -> None:
    assert set(PLACES) == set(tables.TABLES)


@pytest.mark.parametrize("name", tables.TABLES)
def test_table_is_what_the_benchmark_wrote(name: str) -> None:
    assert PLACES[name] == tables.render(name)


@pytest.mark.parametrize("path", sorted(tables.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_tell_where_they_come_from(path: Path) -> None:
    made = json.loads(path.read_text())["environment"]
    assert {"date", "machine", "python", "packages", "arguments", "minutes"} <= set(made)
    assert (BENCH / f"{path.stem.removesuffix('_calibrated')}.py").exists()
    assert path.stem in tables.TABLES


@pytest.mark.parametrize("path", sorted(tables.RESULTS.glob("*.svg")), ids=lambda path: path.stem)
def test_picture_is_drawn_beside_the_results_and_shown(path: Path) -> None:
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert path.with_suffix(".json").exists() or (BENCH / f"{path.stem}.py").exists()
    shown = [text for document, text in TEXTS.items() if f"({os.path.relpath(path, document.parent)})" in text]
    assert shown


def test_matched_keeps_more_than_reset_and_copied_in_every_net() -> None:
    rows = json.loads((tables.RESULTS / "retention.json").read_text())["rows"]
    found = [row for row in rows if row["target"] == "gn" and row["groups"] == "auto"]
    assert len({row["net"] for row in found}) >= 8
    for row in found:
        assert row["matched"]["mean"] > max(row["reset"]["mean"], row["copied"]["mean"]), row["net"]


def test_calibration_keeps_what_is_claimed() -> None:
    """98.5% of the accuracy on the average, and 97% of each net's, on pictures that it never saw."""
    rows = json.loads((tables.RESULTS / "calibrated.json").read_text())["rows"]
    kept = {(row["net"], row["task"]): row["kept"] for row in rows if row["target"] == "gn" and row["task"]}
    assert len(kept) >= 8 and sum(kept.values()) / len(kept) >= 0.985
    assert min(kept.values()) >= 0.97


def test_groups_chosen_on_data_keep_what_the_best_number_keeps() -> None:
    """Within a hundredth on each net, and on the average."""
    rows = json.loads((tables.RESULTS / "groups.json").read_text())["rows"]
    for place in {(row["task"], row["net"]) for row in rows}:
        found = {row["groups"]: row["accuracy"]["mean"] for row in rows if (row["task"], row["net"]) == place}
        best = max(score for groups, score in found.items() if isinstance(groups, int))
        assert found["auto, on data"] >= best - (0.01 if place[0] else 0.002), place


def test_a_standard_error_is_that_of_a_share() -> None:
    assert mean_error([1.0] * 90 + [0.0] * 10) == {"mean": 0.9, "error": 0.03}  # √(0.9 · 0.1 / 100)


def test_a_pitch_is_read_between_the_bins() -> None:
    bins = 1997.3794084376191 + 20 * torch.arange(360)
    cents = torch.tensor([2500.0, 4711.0, 6003.5])
    saliences = torch.exp(-((bins - cents[:, None]) ** 2) / (2 * 25**2))
    assert torch.allclose(real_networks.pitch(saliences), cents, atol=1)
    assert real_networks.right_pitch(saliences, cents + torch.tensor([40.0, 60, -60])).tolist() == [1, 0, 0]
    assert real_networks.same_pitch(saliences, saliences.flip(0)).tolist() == [0, 1, 0]


def test_made_tones_have_the_pitch_that_they_are_said_to_have() -> None:
    """By the middle half of a frame of least noise: the period at which it is most like itself."""
    frames, cents = sounds.tones(64, 0)
    right = 0
    for frame, pitch in zip(frames, cents.tolist(), strict=True):
        middle, period = frame[256:768], sounds.RATE / (10 * 2 ** (pitch / 1200))
        shifts = torch.arange(round(period * 0.7), round(period * 1.4) + 2)
        alike = torch.stack([(middle * torch.roll(frame, int(shift))[256:768]).sum() for shift in shifts])
        right += abs(int(shifts[alike.argmax()]) - period) <= max(1, 0.03 * period)
    assert right >= 58


def test_ways_are_written_as_one_would_type_them() -> None:
    ways = ["gn auto", "gn 8", "copied", "gn-ws strict", "gn calibrated 60 s", "recurrent ln on data", "original"]
    assert [tables._way(way) for way in ways] == [
        "`gn`", "`gn --groups 8`", "`gn --transfer copy`", "`gn-ws --ws strict`", "`gn` calibrated 60 s",
        "`--recurrent ln` on data", "original",
    ]  # fmt: skip


@pytest.mark.parametrize("bars", [False, True])
def test_a_chart_shows_every_value_within_its_frame(bars: bool) -> None:
    series = {"one": {"1": 0.5, "2": 99.0}, "<two>": {"2": 40.0}}
    root = ElementTree.fromstring(draw([Chart("title", "x", "y", series, bars)]))
    shapes = root.iter("{http://www.w3.org/2000/svg}" + ("rect" if bars else "circle"))
    ups = [float(shape.get("y" if bars else "cy", "")) for shape in shapes]
    assert len(ups) == (5 if bars else 3)  # with bars, two more of the legend
    assert all(0 <= up <= float(root.get("height", "")) for up in ups)
    assert "<two>" in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_report_tells_the_slowdown_that_was_measured() -> None:
    """Least and most over batch sizes and layouts: norms beside BatchNorm, weights beside the plain net."""
    steps, norms = (
        json.loads((tables.RESULTS / f"{name}.json").read_text())["rows"] for name in ("step_time", "norm_time")
    )
    measured = {
        norm: [row["times"] for row in norms if row["norm"] == norm and row["mode"] == "training"]
        for norm in ("gn", "ln", "in", "est", "bcn", "frozen", "fold")
    }
    for weight in ("ws", "wn"):
        rows = [row for row in steps if row["variant"] == f"{weight}, ours" and row["what"].startswith("step")]
        measured[weight] = [row["times"] for row in rows]
    for name, times in measured.items():
        slower = {**target_table.NORM_FORMS, **target_table.WEIGHT_FORMS}[name].slowdown
        if slower is None:
            assert max(times) < 1.05, name
        else:
            assert abs(slower.least - min(times)) < 0.051 and abs(slower.most - max(times)) < 0.051, name


def test_every_neighbour_is_in_the_table_with_its_tests() -> None:
    rows = json.loads((tables.RESULTS / "neighbours.json").read_text())["rows"]
    assert [(row["neighbour"], row["tests"], row["proven"]) for row in rows] == [
        (neighbour.name, neighbour.tests, neighbour.proven) for neighbour in neighbours.NEIGHBOURS
    ]
    assert {row["tests"] for row in rows} == {path.name for path in neighbours.TESTS.glob("test_*.py")}
    assert all(row["passed"] and row["versions"] for row in rows)
