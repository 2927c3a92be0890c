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
import tables  # noqa: E402
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
