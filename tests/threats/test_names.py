"""Names out of files are data: no view of them acts on what shows it, and each can be read in it."""

import io
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from helpers.command import run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console
from threats.names import NAMES
from torch import nn

import normswap
from normswap.checkpoints.reading import read_checkpoint
from normswap.cli import commands, progress
from normswap.printable import printable
from normswap.report import formats
from normswap.report.inspection import Advice, Finding, Inspection, Layer, Outcome
from normswap.report.report import Calibration, Change, Cost, Drift, LayerDrift, Left, Node, Report, Totals
from normswap.report.terminal import ReportView
from normswap.report.terminal_inspection import InspectionView

MARKS = "\x1b\x00\x9b\u202e\u200b\ud800\udc00`|<>&[]()!*_~#@:$\\/.-+=0129 a\n\"'{}%"
ANY_NAME = st.sampled_from(NAMES) | st.text(MARKS, max_size=12) | st.text(st.characters(codec=None), max_size=8)
TOTALS = Totals(1, 1, 2, 10, 10, 10, 10)


def report_of(name: str, target: str = "gn") -> Report:
    """A report with `name` in the place of every text that can come out of a file or an argument."""
    changes = (
        Change((name, f"a.{name}"), "norm", name, f"{name}(8)", name, False, note=name, groups=8, partner=name),
        Change((f"b.{name}",), "tensor", name, name, name, False, amount=0.5),
    )
    return Report(
        target, changes, (Left(name, "norm", name, name), Left(f"c.{name}", "weight", name, name)), TOTALS,
        Drift(name, 0.5, note=name, layers=tuple(LayerDrift(f"{name}.{at}", 0.5) for at in range(14))),
        {name: [name]}, (name,), Calibration(4, 2, name, note=name), (Node(name, name, name),), Cost(1.0),
    )  # fmt: skip


def inspection_of(name: str) -> Inspection:
    layer = Layer((name, f"a.{name}"), "norm", name, name, 8, None, (7, 7), True, name, name)
    outcome = Outcome("gn", 1, 1, False, 1, ((name, 1),))
    problem = Outcome("fold", 0, 0, None, 0, (), name)
    return Inspection(
        name, 1, 1, (layer,), (outcome, problem), (Finding(name, (name,), name),), (Advice(name, name, name),), name
    )


def squeezed(text: str) -> str:
    """Without white space, since views break lines and cut the ends of names."""
    return re.sub(r"\s", "", text)


def is_seen(text: str) -> bool:
    return all(line == printable(line) and line.isprintable() for line in text.split("\n"))


def terminal(view: ReportView | InspectionView, width: int = 100_000, **options: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, **options).print(view)
    return stream.getvalue()


@settings(deadline=None)
@given(ANY_NAME)
def test_a_printable_name(name: str) -> None:
    shown = printable(name)
    assert is_seen(shown) and printable(shown) == shown and "\n" not in shown
    shown.encode("utf-8")
    assert str(normswap.NormswapError(name[:100])) == printable(name[:100])


@settings(deadline=None)
@given(ANY_NAME)
def test_terminals(name: str) -> None:
    shown = squeezed(printable(name))
    for view in (ReportView(report_of(name), name), InspectionView(inspection_of(name), name)):
        text = terminal(view)
        assert is_seen(text) and shown in squeezed(text)
        colours = terminal(view, 60, force_terminal=True, color_system="truecolor")
        assert is_seen(re.sub(r"\x1b\[[0-9;]*m", "", colours))


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[tuple[str, tuple[str, ...]]] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add((tag, tuple(name for name, _ in attrs)))

    def handle_comment(self, data: str) -> None:
        self.tags.add(("comment", ()))

    def handle_data(self, data: str) -> None:
        self.text += data


@settings(deadline=None)
@given(ANY_NAME)
def test_html(name: str) -> None:
    page = formats.to_html(report_of(name), name)
    assert is_seen(page)
    found, harmless = Tags(page), Tags(formats.to_html(report_of("a.b"), "a"))
    assert found.tags <= harmless.tags and squeezed(printable(name)) in squeezed(found.text)


def flat(tokens: list[Token]) -> list[Token]:
    return [inner for token in tokens for inner in [token, *flat(token.children or [])]]


@settings(deadline=None)
@given(ANY_NAME)
def test_markdown(name: str) -> None:
    """The blocks are those of a report with a harmless name; inside are text and code alone, and tags of ours."""
    renderer = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    text = formats.to_markdown(report_of(name), name)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    told = renderer.parse(text)
    assert len(rows) - 3 == [token.type for token in told].count("tr_open") >= 8
    for row in rows:  # markdown-it and GitHub's cmark differ about backslashes before a bar
        assert len(re.findall(r"(?<!\\)\|", row)) == 5 == re.sub(r"\\[!-/:-@\[-`{-~]", "", row).count("|"), row
    kinds = {token.type for token in flat(told)}
    assert kinds <= {token.type for token in flat(renderer.parse(formats.to_markdown(report_of("a"), "a")))}
    tags = {token.content.strip() for token in flat(told) if token.type.startswith("html")}
    assert tags == {"<details><summary>left as it was: 2</summary>", "</details>"}
    shown = "".join(token.content for token in flat(told) if token.type in ("text", "code_inline", "text_special"))
    assert is_seen(shown) and squeezed(printable(name)) in squeezed(shown).replace(r"\\x7c", r"\|")


@settings(deadline=None, max_examples=50)
@given(ANY_NAME)
@example("@font-face { } }")
def test_svg(name: str) -> None:
    drawn = formats.to_svg(report_of(name), name)
    found, harmless = (ElementTree.fromstring(text) for text in (drawn, formats.to_svg(report_of("a"), "a")))
    assert {element.tag for element in found.iter()} == {element.tag for element in harmless.iter()}
    assert is_seen(drawn.replace("\xa0", " ")) and "@font-face" not in found.find(".//{*}style").text  # type: ignore[union-attr]
    text = squeezed("".join(found.itertext()))
    assert squeezed(printable(name[:20])) in text


@settings(deadline=None)
@given(ANY_NAME)
def test_json(name: str) -> None:
    """The true names, a lone surrogate apart: strict readers refuse a whole file for one."""
    valid = "".join(printable(c) if "\ud800" <= c <= "\udfff" else c for c in name)
    for found in (report_of(name), inspection_of(name)):
        text = formats.to_json(found)
        assert text.isascii() and is_seen(text)
        data = json.loads(text)
        json.dumps(data, ensure_ascii=False).encode("utf-8")
        paths = [path for part in data.get("changes", data.get("layers")) for path in part["paths"]]
        assert paths[:2] == [valid, f"a.{valid}"]


def test_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    bar_on = Console(file=stream, force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda **_: bar_on)
    monkeypatch.setattr(progress, "_SECONDS_BEFORE_BAR", 0.0)
    with progress.show_progress(3, silent=False) as start_phase:
        for phase in ("reading [/]:key:\x1b]0;pwn\x07", "reading 50%.pt"):
            start_phase(phase)
            time.sleep(0.3)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]", "", stream.getvalue())
    assert r"reading [/]:key:\x1b]0;pwn\x07" in text and "reading 50%.pt" in text and is_seen(text)


def test_tracebacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise KeyError("no", type("Name", (), {"__repr__": lambda self: "\x1b[2J\u202e"})())

    monkeypatch.setattr(commands, "app", fail)
    with pytest.raises(SystemExit, match="1"):
        commands.main()
    told = capsys.readouterr()
    assert r"\x1b[2J\u202e" in told.err and is_seen(told.err) and not told.out


@pytest.mark.parametrize("whole", [True, False], ids=["module", "state dict"])
def test_recipes_are_plain_data(tmp_path: Path, whole: bool) -> None:
    """What stands in a recipe goes on into reports and files, so that it has to be what these can hold."""
    bomb: list[Any] = ["x"]
    for _ in range(30):
        bomb = [bomb] * 10
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    for odd, fine in [(torch.ones(1), False), (bomb, False), (deep, False), ({1: 2}, False), ("\x1b[2J\ud800", True)]:
        recipe = {"format": 1, "target": "gn", "layers": {}, "odd": odd}
        model = named(["a"])
        state = model.state_dict()
        if whole:
            model.normswap_recipe = recipe
        else:
            state._metadata["normswap_recipe"] = recipe
        torch.save(model if whole else state, tmp_path / "m.pt")
        result = run("convert", tmp_path / "m.pt", "--to", "gn", "--json", "--dry-run")
        assert result.exit_code == (0 if fine else 1), result.output
        assert is_seen(result.output) and (fine or "its recipe is damaged" in result.output)


# ---- through the commands ----


def named(names: list[str]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    for name in names:
        model._modules[name] = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    return model.eval()


SHORT = [name for name in NAMES if len(name) < 100 and "." not in name]


@pytest.mark.parametrize("whole", [True, False], ids=["module", "state dict"])
def test_every_command(tmp_path: Path, whole: bool) -> None:
    """No line that any command prints, or writes for a reader, has a character that acts on what shows it."""
    folder = tmp_path / "\x1b[2J[red]:key:\u202e"
    folder.mkdir()
    model = named(SHORT)
    torch.save(model if whole else model.state_dict(), folder / "m.pt")
    source, made = folder / "m.pt", folder / "made.pt"
    to = ("convert", source, "--to", "gn")
    calls = [(*to, "-o", made), (*to, "-o", folder / "d", "--format", "dcp"), ("inspect", source)]
    calls += [(*to, "--dry-run", "--report", folder / f"r{ending}") for ending in formats.REPORT_FORMATS]
    calls += [("diff", source, made, "--full"), ("inspect", source, "--full", "--json"), (*to, "--json", "--dry-run")]
    for call in calls:
        result = run(*call)
        assert result.exit_code == 0 and is_seen(result.output), (call, result.output[-500:])
    for ending in formats.REPORT_FORMATS:
        assert is_seen((folder / f"r{ending}").read_text("utf-8").replace("\xa0", " "))
    for written in (made, folder / "d"):
        content = read_checkpoint(written).content
        state = content.state_dict() if isinstance(content, nn.Module) else content
        assert state.keys() == named_keys(SHORT), written
    refused = [(*to, "-o", folder / "o.safetensors"), ("inspect", source.with_suffix(".no")), (*to, "-o", made)]
    refused += [("convert", source, "--to", "\x1b[2J"), (*to, "--include", "\x9b:key:"), (*to, "--key", "\x9b")]
    refused += [("inspect", source, "\x1b[2J"), ("inspect", "\x1b[2J"), ("\x1b[2J",), ("inspect", "--\x1b[2J", source)]
    for call in refused:
        result = run(*call)
        assert result.exit_code in (1, 2) and is_seen(result.output), (call, result.output)


def named_keys(names: list[str]) -> set[str]:
    model = named(names)
    return {key for key in model.state_dict() if ".running_" not in key and "num_batches" not in key}


def test_safetensors_hold_what_they_can(tmp_path: Path) -> None:
    possible = [name for name in SHORT if name == name.encode(errors="ignore").decode()]
    torch.save(named(possible).state_dict(), tmp_path / "m.pt")
    result = run("convert", tmp_path / "m.pt", "--to", "gn", "-o", tmp_path / "o.safetensors")
    assert result.exit_code == 0, result.output
    assert read_checkpoint(tmp_path / "o.safetensors").content.keys() == named_keys(possible)
    for name in ("\ud800", "__metadata__"):
        state = named(["a"]).state_dict() | {name: torch.ones(1)}
        torch.save(state, tmp_path / "m.pt")
        result = run("convert", tmp_path / "m.pt", "--to", "gn", "-o", tmp_path / "no.safetensors")
        assert result.exit_code == 1 and "write it as .pt" in result.output and printable(name) in result.output
    assert not (tmp_path / "no.safetensors").exists()
