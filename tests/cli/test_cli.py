"""The command line: what is printed where, exit codes, what is written."""

import importlib
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.checks import distance, listing
from helpers.command import run
from helpers.nets import X, resnet
from torch import nn
from typer.testing import CliRunner

import normswap
from normswap.cli import commands
from normswap.cli import options as opt
from normswap.layers.reparametrized import StandardizedConv2d
from normswap.target_table import NORM_FORMS, RECURRENT_FORMS, WEIGHT_FORMS, nearest_target


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save(resnet(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_convert_writes_beside_the_input_and_reports(saved: Path) -> None:
    result = run("convert", saved, "--to", "gn-ws")
    assert result.exit_code == 0 and result.stderr == ""
    for part in ("BatchNorm2d → GroupNorm(2-8)", "×16", "20 norms, 20 weights changed", "--examples PATH"):
        assert part in result.stdout
    model, wanted = normswap.load(saved.with_name("model.gn-ws.pt")), normswap.convert(resnet(), "gn-ws").model
    with torch.no_grad():
        assert torch.equal(model(X), wanted(X))


def test_json_is_the_report_and_nothing_else(saved: Path) -> None:
    result = run("convert", saved, "--to", "gn", "--json")
    assert result.exit_code == 0 and result.stderr == ""
    printed = json.loads(result.stdout)
    wanted = json.loads(json.dumps(normswap.convert(resnet(), "gn").report.to_dict()))
    for key in ("target", "changes", "left", "totals", "recipe", "exact"):
        assert printed[key] == wanted[key]
    assert printed["drift"] is None  # nothing real was given


def test_every_option_arrives(saved: Path) -> None:
    out = saved.with_name("out.pt")
    options = ["--groups", "4c", "--transfer", "copy", "--ws", "strict", "--ws-scope", "all", "--include", "layer1.*"]
    options += ["--for", "use", "--include", "fc", "--exclude", "*.bn2", "--input-shape", "1,3,64,64", "--quiet"]
    assert run("convert", saved, "--to", "gn-ws", "-o", out, *options).stdout == ""
    recipe = normswap.load(out).normswap_recipe
    assert recipe["options"] == {
        "groups": "4c", "purpose": "use", "transfer": "copy", "ws": "strict", "ws_scope": "all", "layers": ["conv"],
        "include": ["layer1.*", "fc"], "exclude": ["*.bn2"],
    }  # fmt: skip
    assert set(recipe["layers"]) == {f"layer1.{i}.{name}" for i in (0, 1) for name in ("bn1", "conv1", "conv2")}


def test_dry_run_writes_nothing(saved: Path) -> None:
    before = listing(saved.parent)
    result = run("convert", saved, "--to", "gn", "--dry-run")
    assert result.exit_code == 0 and "written" not in result.stdout
    assert listing(saved.parent) == before


def test_overwrite(saved: Path) -> None:
    assert run("convert", saved, "--to", "gn", "--quiet").exit_code == 0
    refused = run("convert", saved, "--to", "gn", "--quiet")
    assert refused.exit_code == 1 and "exists already" in refused.stderr
    assert run("convert", saved, "--to", "gn", "--quiet", "--overwrite").exit_code == 0


def test_fold_now_or_later(saved: Path) -> None:
    assert run("convert", saved, "--to", "gn-ws", "--quiet").exit_code == 0
    assert run("fold", saved.with_name("model.gn-ws.pt")).exit_code == 0
    assert run("convert", saved, "--to", "gn-ws", "--fold", "--quiet", "-o", saved.with_name("now.pt")).exit_code == 0
    later, now = normswap.load(saved.with_name("model.gn-ws.fold.pt")), normswap.load(saved.with_name("now.pt"))
    converted = normswap.load(saved.with_name("model.gn-ws.pt"))
    assert any(isinstance(m, StandardizedConv2d) for m in converted.modules())
    with torch.no_grad():
        for folded in (later, now):
            assert not any(type(m).__module__.startswith("normswap") for m in folded.modules())
            assert distance(converted(X), folded(X)) < 1e-5


def test_full_lists_every_layer(saved: Path) -> None:
    short = run("convert", saved, "--to", "gn-ws", "--dry-run").stdout
    full = run("convert", saved, "--to", "gn-ws", "--dry-run", "--full").stdout
    for path, module in resnet().named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.Conv2d):
            assert f"  {path} " in full
    assert "layer3.1.bn2" not in short


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gnws"], "did you mean gn-ws"),
        (["--to", "gn", "--groups", "0"], "groups: '0' is not possible"),
        (["--to", "gn", "--groups", "-3"], "groups: '-3' is not possible"),
        (["--to", "gn", "--groups", "9999"], "widest layer"),
        (["--to", "gn", "--include", "nowhere.*"], "include: 'nowhere.*' matches no"),
        (["--to", "gn", "--input-shape", "1,3,x"], "--input-shape"),
        (["--to", "gn", "--input-shape", "1,5,64,64"], "does not run on the example inputs"),
        (["--to", "gn", "--input-shape", "3,64,64"], "the batch first, such as 1,3,224,224"),
        (["--to", "gn", "-o", "none/out.pt"], "does not exist"),
        (["--to", "gn", "--calibrate", "none"], "error: none: No such file"),
        (["--to", "wn", "--layers", "linear", "--include", "conv1"], "change with --layers conv"),
    ],
)
def test_an_error_is_one_message_and_exit_1(saved: Path, arguments: list[str], message: str) -> None:
    before = listing(saved.parent)
    result = run("convert", saved, *arguments)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1
    assert listing(saved.parent) == before


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("resnet50", "torchvision:resnet50"),
        ("ResNet50", "torchvision:resnet50"),
        ("torchvison:resnet50", "torchvision:resnet50"),
        ("TorchVision:resnet_50", "torchvision:resnet50"),
        ("torchvision:resnet5", "torchvision:resnet50"),
        ("mobilenet-v2", "torchvision:mobilenet_v2"),
        ("digits", "demo:digits"),
        ("modle.pt", "model.pt"),
    ],
)
def test_a_model_that_is_not_there_gets_one_suggestion(
    saved: Path, monkeypatch: pytest.MonkeyPatch, written: str, meant: str
) -> None:
    monkeypatch.chdir(saved.parent)
    for command in (["convert", written, "--to", "gn"], ["inspect", written]):
        result = run(*command)
        assert result.exit_code == 1 and result.stderr.endswith(f"; did you mean {meant}?\n")


@pytest.mark.parametrize("written", ["resnet50", "torchvison:resnet50", "torchvision:resnet5"])
def test_a_model_for_tensors_that_is_unknown_gets_one_suggestion(tmp_path: Path, written: str) -> None:
    torch.save(resnet().state_dict(), tmp_path / "w.pt")
    result = run("convert", tmp_path / "w.pt", "--to", "gn", "--model", written)
    assert result.exit_code == 1 and result.stderr.endswith("; did you mean torchvision:resnet50?\n")


@pytest.mark.parametrize(
    ("written", "meant"),
    [("one_net.Net", "one_net:Net"), ("one_net.py.Net", "one_net.py:Net"), ("one_net.py:Nett", "one_net.py:Net"),
     ("one_net:net", "one_net:Net"), ("one_net.py", "one_net.py:make_model")],
)  # fmt: skip
def test_a_factory_that_is_written_wrongly_gets_one_suggestion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("one_net.py").write_text("class Block: ...\nclass Net: ...\n")
    torch.save(resnet().state_dict(), "w.pt")
    result = run("convert", "w.pt", "--to", "gn", "--model", written)
    assert result.exit_code == 1 and result.stderr.endswith(f"did you mean {meant}?\n")


@pytest.mark.parametrize(
    ("written", "meant"),
    [("gnn", "gn"), ("lnn", "ln"), ("foldd", "fold"), ("frozenwss", "frozen-ws"), ("ws_gn", "gn-ws")],
)
def test_a_target_alone_is_meant_rather_than_a_pair(written: str, meant: str) -> None:
    assert nearest_target(written) == meant


def test_a_name_that_is_like_none_gets_no_suggestion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("banana.pt", "zzz", "tv:zzz", "folder/none.pt"):
        assert run("inspect", name).stderr == f"error: {name}: no such file or folder; check the name and the folder\n"
    assert "give a checkpoint, and --model net.py:make" in run("convert", "net.py:make", "--to", "gn").stderr


@pytest.mark.parametrize(
    "arguments", [["convert"], ["convert", "x.pt"], ["nothing"], ["convert", "x.pt", "--to", "gn", "--transfer", "no"]]
)
def test_wrong_usage_is_exit_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_targets_as_json() -> None:
    data = json.loads(run("targets", "--json").stdout)
    assert data["targets"] == list(normswap.TARGETS)
    pairs = {f"{norm['name']}-{weight['name']}" for norm in data["norms"] for weight in data["weights"]}
    assert pairs == {name for name in normswap.TARGETS if "-" in name}
    assert all(row["becomes"] and row["exactness"] for name in ("norms", "weights", "recurrent") for row in data[name])


def test_targets_shows_both_tables() -> None:
    printed = run("targets").stdout
    for name in normswap.TARGETS:
        assert name in printed


def test_a_class_beside_the_command_can_be_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user runs it: an own interpreter, the class in a file of the folder."""
    (tmp_path / "mynet.py").write_text("from torch import nn\nclass Net(nn.Sequential):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    net = importlib.import_module("mynet").Net(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    torch.save(net, tmp_path / "net.pt")
    command = [sys.executable, "-m", "normswap", "convert", "net.pt", "--to", "gn-ws"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 1 and "--allow mynet.Net" in refused.stderr and refused.stdout == ""
    done = subprocess.run([*command, "--allow", "mynet.Net"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert (tmp_path / "net.gn-ws.pt").exists()


# A short run shows no bar; this one does, however fast the machine.
IMPATIENT = """
from normswap.cli import commands, progress
progress._SECONDS_BEFORE_BAR = 0
commands.app(prog_name="normswap")
"""


def on_a_terminal(folder: Path, *arguments: str, stdout: Path | None = None, **environment: str) -> str:
    """What the command writes where a person watches: stderr is a terminal of 80 columns, stdout the same or a file."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "80", **environment}
    environment.pop("CI", None)
    command = [sys.executable, "-c", IMPATIENT, *arguments]
    with (
        nullcontext(theirs) if stdout is None else stdout.open("w") as out,
        subprocess.Popen(command, cwd=folder, stdout=out, stderr=theirs, env=environment) as process,
    ):
        os.close(theirs)
        shown = b""
        try:
            while block := os.read(ours, 4096):
                shown += block
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    return shown.decode()


CONVERT = ("convert", "model.pt", "--to", "gn-ws", "--dry-run")  # in the folder of `saved`


def test_progress_shows_on_a_terminal_alone(saved: Path) -> None:
    shown = on_a_terminal(saved.parent, *CONVERT)
    assert "finding how layers are connected" in shown and "━" in shown and "\x1b[1m" in shown
    piped = subprocess.run(
        [sys.executable, "-m", "normswap", *CONVERT], cwd=saved.parent, capture_output=True, text=True
    )
    assert piped.stderr == "" and "\x1b" not in piped.stdout and "20 norms" in piped.stdout


def test_the_report_goes_to_stdout_after_the_bar_has_shown(saved: Path) -> None:
    file = saved.with_name("report.txt")
    shown = on_a_terminal(saved.parent, *CONVERT, stdout=file)
    assert "finding how layers are connected" in shown and "20 norms" not in shown and "20 norms" in file.read_text()


def test_quiet_is_silent_on_a_terminal_too(saved: Path) -> None:
    assert on_a_terminal(saved.parent, *CONVERT, "--quiet") == ""


def test_no_color(saved: Path) -> None:
    shown = on_a_terminal(saved.parent, *CONVERT, NO_COLOR="1")
    colours = [code for code in re.findall(r"\x1b\[([\d;]*)m", shown) if re.search(r"\b(3\d|4\d|9\d)\b", code)]
    assert "20 norms" in shown and colours == []


ALL = "from normswap.cli import commands\nfor command in {}: commands.app(command, standalone_mode=False)"


@pytest.mark.parametrize("width", ["60", "80"])
def test_a_terminal_of_ascii(saved: Path, width: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii", "COLUMNS": width}
    code = ALL.format([CONVERT, ("inspect", "model.pt"), ("targets",)])
    done = subprocess.run([sys.executable, "-c", code], cwd=saved.parent, capture_output=True, env=environment)
    text = done.stdout.decode("ascii")
    assert done.returncode == 0 and done.stderr == b"" and "?" not in text
    assert "20 norms" in text and "fold-ws," in text and "fold-wn" in text
    assert max(map(len, text.splitlines())) <= int(width)


COMMANDS = ("", "convert", "inspect", "fold", "diff", "targets")


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_and_loses_no_word(command: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = run(*command.split(), "--help").stdout.splitlines()
    assert max(map(len, lines)) <= width
    shown = " ".join(re.sub("[─│╭╮╰╯]", " ", " ".join(lines)).split())
    for option in vars(opt).values() if command == "convert" else ():
        for made in getattr(option, "__metadata__", ()):
            words = set(re.sub(r"\[/?\w*\]", "", made.help).split())
            assert words and words <= set(shown.split())
    if command == "":
        assert all(f" {name} " in shown for name in COMMANDS[1:]) and "normswap convert model.pt --to gn-ws" in shown


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_of_targets_loses_no_word(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = run("targets").stdout
    for form in (*NORM_FORMS.values(), *WEIGHT_FORMS.values(), *RECURRENT_FORMS.values()):
        assert set(f"{form.becomes} {form.exactness} {form.choose_when}".split()) <= set(text.split())
        assert width == 80 or form.paper in text


def test_every_command_has_help_with_an_example() -> None:
    for command in ("convert", "inspect", "fold", "diff", "targets"):
        shown = run(command, "--help").stdout
        assert f"normswap {command} " in shown.split("Usage:")[1].split("\n", 1)[1] or command == "targets"
    panels = run("convert", "--help").stdout
    assert all(f"─ {panel} ─" in panels for panel in ("Conversion", "Reading", "Data", "Writing", "Report"))


def test_completion_knows_the_targets() -> None:
    """As bash asks for it."""
    asked = {"_NORMSWAP_COMPLETE": "complete_bash", "COMP_WORDS": "normswap convert --to gn", "COMP_CWORD": "3"}
    done = CliRunner().invoke(commands.app, [], env=asked, prog_name="normswap")
    assert done.stdout.split() == ["gn", "gn-ws", "gn-wn"]


LIGHT = """
import sys
from typer.testing import CliRunner
from normswap.cli import commands
from normswap.cli import options as opt
done = CliRunner().invoke(commands.app, {arguments!r})
assert done.exit_code == 0, done.output
heavy = {{"torch", "torchvision", "timm", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["convert", "--help"], ["targets"]], ids=" ".join)
def test_what_needs_no_torch_does_not_import_it(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-c", LIGHT.format(arguments=arguments)], check=True)


FIRST = ("conversion.convert", "files.diff", "inspection")
ANEW = """
import sys
for first in {first}:
    for name in [name for name in sys.modules if name.split(".")[0] == "normswap"]:
        del sys.modules[name]
    __import__(f"normswap.{{first}}")
    import normswap
    from normswap import convert, diff, inspect
    for function in (convert, diff, inspect, normswap.convert, normswap.diff, normswap.inspect):
        assert type(function).__name__ == "function", (first, function)
    assert set(normswap.__all__) <= set(dir(normswap))
    assert not hasattr(normswap, "nothing")
    for name in normswap.__all__:
        getattr(normswap, name)
"""


def test_functions_are_not_hidden_by_files_of_their_name() -> None:
    """Whatever is imported first; each time from nothing, but torch."""
    subprocess.run([sys.executable, "-c", ANEW.format(first=FIRST)], check=True)


@pytest.mark.parametrize("how", [["--trust"], ["--allow", "mine_of_here.Net"]])
def test_classes_in_the_current_folder_are_found(tmp_path: Path, how: list[str]) -> None:
    """In a process of its own, as the script `normswap` runs: it has the folder not in its path by itself."""
    source = "from torch import nn\n\n\nclass Net(nn.Sequential):\n    pass\n"
    (tmp_path / "mine_of_here.py").write_text(source)
    make = "import torch; from torch import nn; from mine_of_here import Net; "
    make += "torch.save(Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 'net.pt')"
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path, check=True)
    command = "import sys; sys.path = [p for p in sys.path if p]; from normswap.cli import main; main()"
    arguments = ["convert", "net.pt", "--to", "gn", "--quiet", *how]
    done = subprocess.run([sys.executable, "-c", command, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "net.gn.pt").exists()
