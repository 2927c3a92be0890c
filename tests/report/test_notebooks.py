"""Reports in Python and notebooks: printed, shown as a page, saved; and torch's classes as targets."""

import io
from pathlib import Path

import pytest
from helpers.nets import conv_norm, randomize
from rich.console import Console
from torch import nn

import normswap


@pytest.fixture(scope="module")
def report() -> normswap.Report:
    return normswap.convert(randomize(conv_norm()), "gn").report


def test_a_report_prints_as_the_table(report: normswap.Report) -> None:
    assert "BatchNorm2d → GroupNorm" in str(report)
    shown = io.StringIO()
    Console(file=shown, width=100).print(report)
    assert shown.getvalue() == str(report)


def test_a_notebook_shows_the_page(report: normswap.Report) -> None:
    assert report._repr_html_().startswith("<iframe srcdoc=") and "&lt;!doctype html" in report._repr_html_().lower()


def test_an_inspection_prints_as_its_tables_and_shows_its_page() -> None:
    found = normswap.inspect(randomize(conv_norm()))
    shown = io.StringIO()
    Console(file=shown, width=100).print(found)
    assert "what each target would do" in str(found) and shown.getvalue() == str(found)
    assert found._repr_html_().startswith("<iframe srcdoc=")


def test_what_stands_within_other_values_is_one_short_line(report: normswap.Report) -> None:
    """`normswap.convert(...)` as the last line of a cell shows the pair that it gives."""
    assert repr(report) == "<Report gn: 1 norm, 0 weights changed, 0 left>"
    assert repr(normswap.diff(nn.ReLU(), nn.ReLU())) == "<Report diff: 0 differences, 0 the same>"
    assert repr(normswap.inspect(nn.BatchNorm2d(3))) == "<Inspection BatchNorm2d: 1 norm, 0 weight layers, 1 finding>"
    assert len(repr(normswap.convert(conv_norm(), "gn"))) < 500


@pytest.mark.parametrize("ending", ["html", "md", "json", "svg"])
def test_a_report_is_saved_by_its_ending(report: normswap.Report, tmp_path: Path, ending: str) -> None:
    assert "GroupNorm" in report.save(tmp_path / f"r.{ending}").read_text()


def test_another_ending_is_refused(report: normswap.Report, tmp_path: Path) -> None:
    with pytest.raises(normswap.OptionError, match=r"r\.docx: give a name that ends in one of \.html"):
        report.save(tmp_path / "r.docx")
    assert not list(tmp_path.iterdir())


def test_what_is_left_prints_as_a_table() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False))
    left = normswap.convert(model.eval(), "frozen").report.left
    assert str(left).split()[:3] == ["2", "BatchNorm2d", "×1"]


@pytest.mark.parametrize(
    ("cls", "name"), [(nn.GroupNorm, "gn"), (nn.LayerNorm, "ln"), (nn.InstanceNorm2d, "in"), ("GroupNorm", "gn")]
)
def test_torchs_classes_are_targets(cls: type[nn.Module] | str, name: str) -> None:
    model = randomize(conv_norm())
    assert normswap.convert(model, cls).report.target == name


def test_a_class_that_is_no_norm_is_refused() -> None:
    with pytest.raises(normswap.OptionError, match="unknown target"):
        normswap.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Linear)


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert normswap.__version__ == version("normswap")
