"""The views of a report (terminal, page, Markdown, JSON, picture): they agree, stand alone, and say what happened."""

import io
import json
import math
import re
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
import torch
from helpers.command import run
from helpers.nets import randomize
from rich.console import Console
from torch import nn

import normswap
from normswap.files import model_specs
from normswap.report import charts, formats, wording
from normswap.report.report import Calibration, Drift, LayerDrift, Written
from normswap.report.terminal import ReportView

SCHEMA = json.loads((Path(normswap.__file__).parent / "report/report.schema.json").read_text())


def small() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *blocks, nn.Dropout(), nn.LayerNorm(9))
    for _ in range(50):
        model(torch.randn(8, 3, 11, 11) * 2 + 1)
    return model.eval()


def converted(target: str = "gn-ws", **options: Any) -> normswap.Report:
    return normswap.convert(small(), target, example_inputs=torch.randn(2, 3, 11, 11), **options).report


def of(name: str, target: str) -> normswap.Report:
    return normswap.convert(model_specs.build(f"torchvision:{name}"), target).report


def compared() -> normswap.Report:
    return normswap.diff(small(), normswap.convert(small(), "gn-ws").model)


REPORTS = {
    "small": converted,
    "exact": lambda: converted("fold"),
    "calibrated": lambda: converted("gn", calibrate=torch.randn(32, 3, 11, 11) * 2 + 1, calibrate_seconds=0.5),
    "resnet50": lambda: of("resnet50", "gn-ws"),
    "densenet121": lambda: of("densenet121", "fold"),
    "diff": compared,
    "diff of tensors": lambda: normswap.diff(
        small().state_dict(), normswap.convert(small(), "fold").model.state_dict()
    ),
}


class Page(HTMLParser):
    """What a page shows: tiles, rows of the table, marked rows of the tree, text, and whatever it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tiles: dict[str, str] = {}
        self.rows: Counter[tuple[str, str]] = Counter()
        self.marked: Counter[str] = Counter()
        self.links: list[str] = []
        self.text, self._tile = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.links += [found[name] for name in ("src", "href") if name in found]
        kinds = found.get("class", "").split()
        if "tile" in kinds:
            self._tile = found["data-name"]
        if tag == "tr" and "data-kind" in found:
            self.rows[kinds[0], found["data-kind"]] += 1
        if "row" in kinds:
            self.marked.update(kind for kind in ("changed", "left") if kind in kinds)

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._tile:
            self.tiles[self._tile], self._tile = data, ""


def terminal(report: normswap.Report, width: int = 200, force_terminal: bool = False, **options: Any) -> str:
    stream = io.StringIO()
    Console(
        file=stream, width=width, force_terminal=force_terminal, color_system="standard" if force_terminal else None
    ).print(ReportView(report, "model.pt", **options))
    return stream.getvalue()


@pytest.mark.parametrize("name", REPORTS)
def test_all_views_agree(name: str) -> None:
    """Counts are read back from each view and compared with the report's."""
    report = REPORTS[name]()
    kinds = Counter(change.kind for change in report.changes)
    text, page = terminal(report), Page(formats.to_html(report, "model.pt"))
    told, data = formats.to_markdown(report, "model.pt"), json.loads(formats.to_json(report, "model.pt"))
    if report.target == "diff":
        heads = re.findall(r"^.*the same$", text, re.MULTILINE)
        assert heads and heads[0] in told and heads[0] in page.text
        assert page.tiles == {"differences": str(len(report.changes)), "the same": str(report.totals.left)}
    else:
        line = re.search(r"^(\d+) norms?, (\d+) weights? changed: (\w+); (\d+) left$", text, re.MULTILINE)
        assert line is not None and line[0] in told and line[0] not in page.text  # its tiles say that
        totals = (kinds["norm"], kinds["weight"], len(report.left))
        assert (int(line[1]), int(line[2]), int(line[4])) == totals
        tiles = [page.tiles[name] for name in ("norms changed", "weights changed", "left", "in eval mode")]
        assert tiles == [line[1], line[2], line[4], line[3]]
        assert data["exact"] == report.exact == (line[3] == "exact")
        paths = {path for change in report.changes for path in change.paths}
        assert page.marked == Counter({"changed": len(paths), "left": len({e.path for e in report.left} - paths)})
    assert Counter(change["kind"] for change in data["changes"]) == kinds
    assert sum(count for (what, _), count in page.rows.items() if what == "left") == len(report.left)
    assert {kind: count for (what, kind), count in page.rows.items() if what == "change"} == kinds
    listed, _, kept = told.partition("<details>")
    rows = [line.split(" | ") for line in listed.splitlines() if re.match(r"\| `.* \| .+ \| \d+ \| [^|]{3,}\|$", line)]
    assert sum(int(row[2]) for row in rows) == len(report.changes)
    assert sum(int(row.split(" | ")[2]) for row in kept.splitlines() if row.startswith("| `")) == len(report.left)
    if report.drift is not None and report.drift.relative_l2 is not None:
        assert all(f"relative L2 {report.drift.relative_l2:.2g}" in view for view in (text, told, page.text))
        assert data["drift"]["relative_l2"] == report.drift.relative_l2


@pytest.mark.parametrize("name", REPORTS)
def test_the_schema_holds(name: str) -> None:
    data = REPORTS[name]().to_dict()
    jsonschema.validate(json.loads(json.dumps(data)), SCHEMA)
    assert data["schema"] == SCHEMA["properties"]["schema"]["const"]


def test_the_schema_names_every_field() -> None:
    """And nothing else: what is written and what is described are one."""
    data = json.loads(json.dumps(REPORTS["calibrated"]().to_dict()))
    assert set(data) == set(SCHEMA["properties"])
    held = {"change": "changes", "left": "left", "node": "modules", "drift": "drift", "calibration": "calibration"}
    held["totals"] = "totals"
    for name, key in held.items():
        value = data[key][0] if isinstance(data[key], list) else data[key]
        assert set(value) == set(SCHEMA["$defs"][name]["properties"]), name


def test_each_changed_layer_has_its_drift() -> None:
    """Against outputs that hooks of this test saw."""
    inputs, outputs = torch.randn(2, 3, 11, 11), []
    model = small()
    made, report = normswap.convert(model, "gn", example_inputs=inputs)
    names = [change.paths[0] for change in report.changes]
    for net in (model, made):
        seen: dict[str, torch.Tensor] = {}
        for name in names:
            net.get_submodule(name).register_forward_hook(
                lambda m, a, out, name=name, seen=seen: seen.update({name: out})
            )
        with torch.no_grad():
            net(inputs)
        outputs.append({name: value.clone() for name, value in seen.items()})
    assert [layer.path for layer in report.drift.layers] == names
    for layer in report.drift.layers:
        before, after = outputs[0][layer.path], outputs[1][layer.path]
        assert layer.relative_l2 == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-5)
    furthest = max(report.drift.layers, key=lambda layer: layer.relative_l2)
    assert f"furthest: {furthest.path} {charts.percent(furthest.relative_l2)}" in terminal(report)


def test_bars_stand_for_every_changed_layer() -> None:
    model = randomize(model_specs.build("torchvision:resnet50"))
    report = normswap.convert(model, "gn", example_inputs=torch.randn(1, 3, 32, 32)).report
    text = terminal(report)
    part = text[text.index(wording.DRIFT_TITLE) :].split("\n\n")[0].splitlines()[2:]
    several = [int(match[1]) if (match := re.search(r"furthest of (\d+)", line)) else 1 for line in part]
    assert sum(several) == len(report.drift.layers) == 53 and len(part) <= 12
    assert len(terminal(report, full=True).splitlines()) > 53 * 2


@pytest.mark.parametrize(
    ("moved", "shown", "share", "severity"),
    [
        (0.004, "0.4%", 0.004, "small"),
        (0.1, "10%", 0.1, "medium"),
        (0.25, "25%", 0.25, "medium"),
        (0.5, "50%", 0.5, "large"),
        (2.27, "227%", 1.0, "large"),
    ],
)
def test_bars_are_on_one_scale(moved: float, shown: str, share: float, severity: str) -> None:
    """Whatever else moved, a drift has the same bar and the same colour in every view."""
    for others in ((), (3.0,), (0.001, 0.9)):
        layers = tuple(LayerDrift(f"l{i}", value) for i, value in enumerate((moved, *others)))
        report = replace(converted(), drift=Drift("pictures", 0.3, 0.9, 0.9, layers=layers))
        bar = charts.drift_bars(report.drift)[0]
        assert (bar.shown, bar.share, bar.severity) == (shown, share, severity)
        line = next(line for line in terminal(report).splitlines() if re.match(r"  l0 +\d", line))
        assert shown in line and line.count("█") == max(1, round(24 * share))
        assert f'<i class="{severity}" style="width:{100 * share:.1f}%">' in formats.to_html(report, "model.pt")
        colours = {"small": "32", "medium": "33", "large": "31"}
        assert f"\x1b[{colours[severity]}m█" in terminal(report, force_terminal=True).split("  l0 ")[1].splitlines()[0]
        told = next(line for line in formats.to_markdown(report, "model.pt").splitlines() if line.startswith("| `l0`"))
        assert shown in told and told.count("█") == max(1, round(20 * share))


@pytest.mark.parametrize("width", [60, 80, 140])
def test_labels_of_bars_do_not_wrap(width: int) -> None:
    layers = tuple(LayerDrift(f"backbone.{'block' * 20}.layer{i}.norm", 0.2) for i in range(3))
    text = terminal(replace(converted(), drift=Drift("pictures", 0.3, layers=layers)), width)
    part = text[text.index(wording.DRIFT_TITLE) :].split("\n\n")[0].splitlines()[2:]
    assert len(part) == 3 and all("…" in line and f"layer{i}.norm" in line for i, line in enumerate(part))
    assert all(len(line) <= width and "20%" in line for line in part)


def test_reports_tell_their_words() -> None:
    fitted = replace(converted("gn"), calibration=Calibration(32, 8, "calibrated"))
    for report, word in ((converted(), "matched"), (converted("fold"), "exact"), (fitted, "calibrated")):
        for view in (terminal(report), formats.to_markdown(report, "m.pt"), Page(formats.to_html(report, "m.pt")).text):
            assert all(meaning in view for meaning in wording.LEGEND.values())
        assert wording.kept_word(report) == word and f"changed: {word};" in terminal(report)
    assert wording.kept_word(converted("gn", transfer="reset")) == "approximate"
    assert "exact  " not in terminal(compared()), "two files are compared: nothing is matched"


def test_the_tree_has_every_module() -> None:
    model = small()
    report = normswap.convert(model, "gn-ws").report
    assert [node.path for node in report.modules] == [path for path, _ in model.named_modules()]
    assert {n.path: n.before for n in report.modules}["1"] == "BatchNorm2d"
    assert {n.path: n.after for n in report.modules}["1"] == "GroupNorm(2)"


def test_files_tell_time_and_memory(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "model.pt")
    report = normswap.convert_file(tmp_path / "model.pt", "gn")
    assert report.cost is not None and 0 < report.cost.seconds < 600
    assert report.cost.peak_memory is None or 50 << 20 < report.cost.peak_memory < 100 << 30
    assert "took " in terminal(report)


def test_every_format_is_written_by_its_ending(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "model.pt")
    for ending in formats.REPORT_FORMATS:
        file = tmp_path / f"report{ending}"
        result = run("convert", tmp_path / "model.pt", "--to", "gn", "--dry-run", "--report", file)
        assert result.exit_code == 0 and file.stat().st_size > 500, result.stderr
    again = run("convert", tmp_path / "model.pt", "--to", "gn", "--dry-run", "--report", tmp_path / "report.md")
    assert again.exit_code == 1 and "exists already" in again.stderr
    wrong = run("convert", tmp_path / "model.pt", "--to", "gn", "--report", tmp_path / "report.pdf")
    assert wrong.exit_code == 1 and ".html" in wrong.stderr and not (tmp_path / "model.gn.pt").exists()


def test_reports_tell_the_command_and_how_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is run: it gives the model that was written."""
    monkeypatch.chdir(tmp_path)
    net, (plain, state, mine) = small(), ("plain model.pt", "state.pt", "mine.safetensors")
    torch.save(net, plain), torch.save({"net": net.state_dict()}, state)
    Path("made.py").write_text("from torch import nn\n")
    for given, options, load in (
        (plain, [], "normswap.load('plain model.gn.pt')"),
        (plain, ["--format", "safetensors", "-o", mine], f"normswap.load('{mine}', model=YourModel)"),
        (state, ["--key", "net"], "normswap.load('state.gn.pt', model=YourModel, key='net')"),
        ("torchvision:resnet18", ["--format", "safetensors"], "normswap.load('resnet18.gn.safetensors')"),
    ):
        shown = run("convert", given, "--to", "gn", *options, "--report", "r.html", "--report", "r.md", "--overwrite")
        assert shown.exit_code == 0, shown.stderr
        typed = shlex.join(["normswap", "convert", given, "--to", "gn", *options, "--report", "r.html"])
        assert load in " ".join(shown.stdout.split()) and typed[:60] not in shown.stdout
        for text in (Path("r.md").read_text(), Page(Path("r.html").read_text()).text):
            assert typed in " ".join(text.split()) and load in " ".join(text.split())
        loaded = eval(load, {"normswap": normswap, "YourModel": small})
        assert any(isinstance(module, nn.GroupNorm) for module in loaded.modules())
    report = normswap.convert_file(plain, "gn", "out.pt", dry_run=True)
    assert report.written == Written() and "load it with" not in terminal(report)


def test_fold_and_diff_have_them_too(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "a.pt")
    assert run("convert", tmp_path / "a.pt", "--to", "gn-ws", "--quiet").exit_code == 0
    folded = run("fold", tmp_path / "a.gn-ws.pt", "--report", tmp_path / "fold.html")
    compared = run("diff", tmp_path / "a.pt", tmp_path / "a.gn-ws.pt", "--report", tmp_path / "diff.md")
    assert folded.exit_code == 0 and compared.exit_code == 0, folded.stderr + compared.stderr
    assert "fold" in (tmp_path / "fold.html").read_text()
    assert "modules changed" in (tmp_path / "diff.md").read_text()


def test_names_with_markup_stay_text() -> None:
    model = nn.Module()
    model.add_module("<script>alert(1)</script>|*_", nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    report = normswap.convert(model, "gn-ws").report
    page = formats.to_html(report, "<b>model</b>.pt")
    assert page.count("<script>") == 1 and "<b>model" not in page
    cells = [line for line in formats.to_markdown(report, "model.pt").splitlines() if line.startswith("| `")]
    assert cells and all(len(re.split(r"(?<!\\)\|", line)) == 6 for line in cells)


@pytest.mark.parametrize("ending", [".html", ".svg"])
def test_nothing_is_fetched(ending: str) -> None:
    text = formats.REPORT_FORMATS[ending](converted(), "model.pt")
    addresses = set(re.findall(r"https?://[^\s\"')]+", text)) - {"http://www.w3.org/2000/svg"}
    assert all("textualize" in address for address in addresses)  # a comment of rich's
    if ending == ".html":
        assert set(Page(text).links) == {"data:,"}
    else:
        assert ElementTree.fromstring(text).tag.endswith("svg")


@pytest.mark.parametrize("width", [60, 80, 140])
def test_ascii_terminals(width: int) -> None:
    """Where the encoding has no arrows, there are none, and no line is longer than the terminal."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(file=stream, width=width).print(ReportView(converted(), "model.pt"))
    stream.flush()
    text = raw.getvalue().decode("ascii")
    assert "->" in text and "#" in text and "?" not in text
    assert max(map(len, text.splitlines())) <= width


def test_the_largest_model_of_torchvision_is_a_page_at_most() -> None:
    report = normswap.convert(
        model_specs.build("torchvision:efficientnet_v2_l"), "gn", example_inputs=torch.randn(1, 3, 32, 32)
    ).report
    assert len(terminal(report, 80).splitlines()) < 60


# ---- inspections ----


def test_inspections_are_written_in_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each target, finding, piece of advice and layer is read back from each of them."""
    monkeypatch.chdir(tmp_path)
    torch.save(small(), "model.pt")
    files = [part for ending in formats.REPORT_FORMATS for part in ("--report", f"r{ending}")]
    assert run("inspect", "model.pt", *files).exit_code == 0
    found = normswap.inspect(small())
    data = json.loads(Path("r.json").read_text())
    assert len(data["layers"]) == len(found.layers) == 9
    page, told = Page(Path("r.html").read_text()), Path("r.md").read_text()
    drawn = " ".join(ElementTree.fromstring(Path("r.svg").read_text()).itertext()).replace("\xa0", " ")
    assert page.tiles == {"norms": "5", "weight layers": "4", "parameters": f"{found.parameters:,}", "findings": "1"}
    assert sum(page.rows.values()) == len(found.layers) and set(page.links) == {"data:,"}
    for layer in found.layers:
        assert layer.paths[0] in page.text and f"| `{layer.paths[0]}` |" in told
    for outcome in found.outcomes:
        assert f"| `{outcome.target}` |" in told and outcome.target in page.text
    for text in (page.text, drawn, re.sub(r"\\", "", told)):
        assert found.findings[0].problem in text and all(advice.choose in text for advice in found.advice)
    again = run("inspect", "model.pt", "--report", "r.html", "--report", "new.md")
    assert again.exit_code == 1 and "exists already" in again.stderr and not Path("new.md").exists()
    torch.save(small(), "model.json")
    assert "is read too" in run("inspect", "model.json", "--report", "model.json", "--overwrite").stderr


def test_names_with_markup_stay_text_in_inspections() -> None:
    model = nn.Module()
    model.add_module("<script>alert(1)</script>|*_", nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    found = normswap.inspect(model)
    assert formats.to_html(found, "<b>model</b>.pt").count("<script>") == 1
    cells = [line for line in formats.to_markdown(found, "model.pt").splitlines() if line.startswith("| `<")]
    assert len(cells) == 2 and all(len(re.split(r"(?<!\\)\|", line)) == 6 for line in cells)


# ---- the page in a browser ----


@pytest.fixture
def browser() -> Any:
    """Headless Chromium; `.ci/run` installs it."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver here")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = ["disable-background-networking", "disable-component-update", "disable-sync", "no-first-run"]
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "disable-dev-shm-usage", *quiet):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driven = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield driven
    driven.quit()


def test_the_page_in_a_browser(browser: Any, tmp_path: Path) -> None:
    """Searched, clicked, shown narrow and wide; no error on its console, and nothing wider than the screen."""
    file = tmp_path / "report.html"
    report = converted()
    file.write_text(formats.to_html(report, "model.pt"), encoding="utf-8")
    browser.get(file.as_uri())

    def visible(selector: str) -> int:
        return sum(element.is_displayed() for element in browser.find_elements("css selector", selector))

    lines = len(report.changes) + len(report.left)
    assert visible("#all tbody tr") == lines
    search = browser.find_element("id", "search")
    search.send_keys("batchnorm2d")
    norms = sum(change.kind == "norm" for change in report.changes)
    assert visible("#all tbody tr") == norms == visible(".tree .leaf")
    assert browser.find_element("id", "found").text == f"{norms} of {lines} lines"
    search.send_keys(" no such thing")
    assert visible("#all tbody tr") == 0 == visible(".tree .leaf")
    search.clear()
    search.send_keys(" ")
    assert visible("#all tbody tr") == lines
    folded = visible(".tree .leaf")
    browser.find_element("css selector", ".tree details details summary").click()
    assert visible(".tree .leaf") != folded
    browser.find_element("id", "fold").click()
    assert visible(".tree .leaf") == sum(1 for m in small().modules() if not list(m.children()))
    browser.find_element("id", "fold").click()
    assert visible(".tree .leaf") == 0
    for width in (390, 1400):
        browser.set_window_size(width, 900)
        wide = browser.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert wide <= 0
        assert (
            browser.save_screenshot(str(tmp_path / f"{width}.png"))
            and (tmp_path / f"{width}.png").stat().st_size > 5000
        )
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_that_are_not_finite_are_null_in_json(value: float) -> None:
    before, after = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    after.weight.data.fill_(value)
    (change,) = json.loads(formats.to_json(normswap.diff(before, after)), parse_constant=pytest.fail)["changes"]
    assert change["paths"] == ["weight"] and change["amount"] is None
