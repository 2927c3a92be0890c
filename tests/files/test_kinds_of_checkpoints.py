"""Each kind of checkpoint, by the command line, read back by the libraries themselves, bit for bit."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.checks import listing, quiet
from helpers.nets import X, chain, conv_norm, randomize, resnet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import shufflenet_v2_x0_5
from typer.testing import CliRunner

import normswap
from normswap import FileError, OptionError
from normswap.checkpoints.checkpoint import RECIPE
from normswap.cli import commands
from normswap.files import model_specs

TARGETS = ["gn", "frozen", "fold"]
SPEC = ["--model", "torchvision:shufflenet_v2_x0_5", "--model-arg", "num_classes=10"]
State = dict[str, torch.Tensor]


def factory() -> nn.Module:
    return shufflenet_v2_x0_5(num_classes=10)


def trained() -> nn.Module:
    torch.manual_seed(0)
    return randomize(factory()).eval()


# ---- how each kind is written, and read back without normswap ----


def save_sharded(state: State, path: Path) -> Path:
    """Two weight files and an index, with a file beside them, as transformers and accelerate write them."""
    path.mkdir()
    names = list(state)
    parts = {"model-00001-of-00002.safetensors": names[:60], "model-00002-of-00002.safetensors": names[60:]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, path / file, {"format": "pt"})
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    described = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(described))
    (path / "config.json").write_text("{}")
    return path


def load_sharded(path: Path) -> State:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert (path / "config.json").read_text() == "{}"
    state = {
        name: value for file in set(index["weight_map"].values()) for name, value in load_file(path / file).items()
    }
    assert state.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    return state


def save_distributed(state: State, path: Path) -> Path:
    with quiet():
        dcp.save({"model": state, "step": 7}, checkpoint_id=path)
    return path


def load_distributed(path: Path) -> State:
    """Into the state dict of a converted model, as a training script does it."""
    target = json.loads(torch.load(_raw(path), weights_only=True))["target"]
    state = normswap.convert(factory(), target).model.state_dict()
    found = {"model": state, "step": 0}
    with quiet():
        dcp.load(found, checkpoint_id=path)
    assert found["step"] == 7
    return found["model"]


def _raw(path: Path) -> object:
    import io

    from normswap.checkpoints import distributed_folders

    return io.BytesIO(distributed_folders.read_distributed(path, None)[0][RECIPE].data)


def save_to(name: str, **how: object) -> Callable[[State, Path], Path]:
    def save(state: State, folder: Path) -> Path:
        torch.save(state, folder.with_name(name), **how)
        return folder.with_name(name)

    return save


def save_safetensors(state: State, path: Path) -> Path:
    save_file(state, path.with_name("w.safetensors"), {"author": "somebody"})
    return path.with_name("w.safetensors")


def load_safetensors(path: Path) -> State:
    with safe_open(path, "pt") as file:
        assert file.metadata()["author"] == "somebody"
    return load_file(path)


def save_training(state: State, path: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path.with_name("t.pth"))
    return path.with_name("t.pth")


def load_training(path: Path) -> State:
    found = torch.load(path, weights_only=True)
    assert found["epoch"] == 3
    return {name.removeprefix("module."): value for name, value in found["state_dict"].items()}


def load_plain(path: Path) -> State:
    return torch.load(path, weights_only=True)


KINDS: dict[str, tuple[Callable[[State, Path], Path], Callable[[Path], State]]] = {
    "pt": (save_to("w.pt"), load_plain),
    "bin": (save_to("pytorch_model.bin"), load_plain),
    "older pth": (save_to("w.pth", _use_new_zipfile_serialization=False), load_plain),
    "safetensors": (save_safetensors, load_safetensors),
    "training": (save_training, load_training),
    "sharded": (save_sharded, load_sharded),
    "distributed": (save_distributed, load_distributed),
}


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(X)


def run(*arguments: object) -> str:
    with warnings.catch_warnings():
        result = CliRunner().invoke(commands.app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(("kind", "target"), [*((kind, "gn-ws") for kind in KINDS), *(("pt", to) for to in TARGETS)])
def test_round_trip(tmp_path: Path, kind: str, target: str) -> None:
    save, load = KINDS[kind]
    model = trained()
    path = save(model.state_dict(), tmp_path / "ck")
    printed = run("convert", path, "--to", target, *SPEC)
    (out,) = (tmp_path / name for name in {p.name for p in tmp_path.iterdir()} - {path.name})
    assert str(out) in "".join(printed.split())  # however it is broken into lines
    wanted = normswap.convert(trained(), target).model
    fresh = normswap.convert(factory(), target).model
    fresh.load_state_dict(load(out), strict=True)
    assert torch.equal(outputs(fresh), outputs(wanted))
    assert torch.equal(outputs(normswap.load(out)), outputs(wanted)), "the recipe rebuilds a library's model by itself"
    assert torch.equal(outputs(normswap.load(out, model=factory)), outputs(wanted))


@pytest.mark.parametrize(
    ("kind", "target"), [*((kind, "gn") for kind in KINDS), ("pt", "ln"), ("pt", "in"), ("pt", "frozen")]
)
def test_tensors_alone(tmp_path: Path, kind: str, target: str) -> None:
    """Without the model, whose keys and shapes tell which it is: the same tensors, bit for bit."""
    save, load = KINDS[kind]
    path = save(trained().state_dict(), tmp_path / "ck")
    report = json.loads(run("convert", path, "--to", target, "--json", "-o", tmp_path / f"out{path.suffix}"))
    assert (report["totals"]["norms_changed"], report["totals"]["left"]) == (56, 0)
    assert report["recognized"]
    wanted = normswap.convert(trained(), target).model
    found = load(tmp_path / f"out{path.suffix}")
    assert found.keys() == wanted.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.state_dict().items())
    assert torch.equal(outputs(normswap.load(tmp_path / f"out{path.suffix}", model=factory)), outputs(wanted))


@pytest.mark.parametrize("target", ["ws", "fold", "gn-ws"])
def test_what_needs_the_model(tmp_path: Path, target: str) -> None:
    torch.save(conv_norm().state_dict(), tmp_path / "w.pt")  # of no network that is recognized
    with pytest.raises(OptionError, match=f"tensors without their model, which {target} needs.*--model"):
        normswap.convert_file(tmp_path / "w.pt", target)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("--calibrate", {"calibrate": torch.randn(8, 3, 32, 32)}),
        ("--calibrate", {"calibrate": "no such folder of pictures"}),
        ("--fold", {"fold": True}),
        ("--input-shape", {"input_shape": (1, 3, 32, 32)}),
        ("--recurrent", {"recurrent": "ln"}),
        ("--model-arg", {"model_args": {"num_classes": 10}}),
    ],
)
def test_options_that_need_the_model(tmp_path: Path, name: str, options: dict[str, object]) -> None:
    """Refused before any data are read."""
    torch.save({"model": conv_norm().state_dict()}, tmp_path / "w.pt")  # of no network that is recognized
    with pytest.raises(OptionError, match=f"tensors without their model, which {name} needs.*--model"):
        normswap.convert_file(tmp_path / "w.pt", "gn", **options)


def test_eps(tmp_path: Path) -> None:
    model = randomize(conv_norm(norm=nn.BatchNorm2d(8, eps=0.1))).eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    normswap.convert_file(tmp_path / "w.pt", "gn", eps=0.1)
    wanted = normswap.convert(model, "gn").model.state_dict()
    found = torch.load(tmp_path / "w.gn.pt")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for options in ({"model": lambda: model}, {"model": model}):
        with pytest.raises(OptionError, match="--eps is for files without their model"):
            normswap.convert_file(tmp_path / "w.pt", "gn", tmp_path / "x.pt", eps=0.1, **options)


def test_input_is_left_alone_and_other_formats_are_written(tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "w.pt")
    before = listing(tmp_path)
    wanted = outputs(normswap.convert(trained(), "gn-ws").model)
    for form, out in (("safetensors", "w.gn-ws.safetensors"), ("dcp", "w.gn-ws"), ("pt", "w.gn-ws.pt")):
        run("convert", tmp_path / "w.pt", "--to", "gn-ws", *SPEC, "--format", form)
        assert torch.equal(outputs(normswap.load(tmp_path / out)), wanted)
    assert before["w.pt"] == (tmp_path / "w.pt").read_bytes()
    run("convert", tmp_path / "w.pt", "--to", "gn", *SPEC, "-o", tmp_path / "named.safetensors")
    assert "fc.weight" in load_file(tmp_path / "named.safetensors")


def test_a_whole_module_as_safetensors(tmp_path: Path) -> None:
    torch.save(trained(), tmp_path / "m.pt")
    run("convert", tmp_path / "m.pt", "--to", "gn-ws", "--format", "safetensors")
    wanted = normswap.convert(trained(), "gn-ws").model
    loaded = normswap.load(tmp_path / "m.gn-ws.safetensors", model=factory)
    assert torch.equal(outputs(loaded), outputs(wanted))


def test_conversions_of_conversions(tmp_path: Path) -> None:
    """A converted state dict converts on, and its recipe holds both steps."""
    torch.save(trained().state_dict(), tmp_path / "w.pt")
    run("convert", tmp_path / "w.pt", "--to", "ws", *SPEC)
    run("convert", tmp_path / "w.ws.pt", "--to", "fold", *SPEC)
    twice = normswap.convert(normswap.convert(trained(), "ws").model, "fold").model
    assert torch.equal(outputs(normswap.load(tmp_path / "w.ws.fold.pt")), outputs(twice))
    run("convert", tmp_path / "w.pt", "--to", "gn-ws", "--fold", *SPEC, "-o", tmp_path / "plain.pt")
    plain = normswap.fold(normswap.convert(trained(), "gn-ws").model).model
    assert torch.equal(outputs(normswap.load(tmp_path / "plain.pt")), outputs(plain))
    assert torch.load(tmp_path / "plain.pt").keys() == plain.state_dict().keys()


def test_groups_that_shapes_decided_come_back(tmp_path: Path) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 32, 8), nn.BatchNorm2d(32))).eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    make = lambda: nn.Sequential(nn.Conv2d(3, 32, 8), nn.BatchNorm2d(32))  # noqa: E731
    normswap.convert_file(tmp_path / "w.pt", "gn", model=make, groups=32, input_shape=(2, 3, 8, 8))
    assert normswap.load(tmp_path / "w.gn.pt", model=make)[1].num_groups == 16


def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "from parts import block\n"
        "from torch import nn\n"
        "def make(width=8, name='x'):\n"
        "    return nn.Sequential(block(3, width), block(width, width))\n"
        "def reads_its_own_weights():\n"
        "    net = make(4)\n"
        "    assert float(net[0][0].weight.sum()) is not None\n"
        "    return net\n"
    )
    (tmp_path / "parts.py").write_text(
        "from torch import nn\ndef block(i, o):\n    return nn.Sequential(nn.Conv2d(i, o, 3), nn.BatchNorm2d(o))\n"
    )
    net = randomize(nn.Sequential(*(nn.Sequential(nn.Conv2d(i, 4, 3), nn.BatchNorm2d(4)) for i in (3, 4))))
    torch.save(net.state_dict(), "w.pt")
    for spec, arguments in (
        ("nets.py:make", ["width=4", "name=a=b"]),
        ("nets:make", ["width=4"]),
        ("nets.py:reads_its_own_weights", []),
    ):
        given = [part for argument in arguments for part in ("--model-arg", argument)]
        run("convert", "w.pt", "--to", "gn-ws", "--overwrite", "--model", spec, *given)
        wanted = normswap.convert(net, "gn-ws").model.state_dict()
        found = torch.load("w.gn-ws.pt")
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(FileError, match="give the model: load"):
        normswap.load("w.gn-ws.pt")  # a factory's code is not run because a file names it
    for spec, message in (
        ("nets.py:nothing", "no function nothing; it has block, make"),
        ("none.py:make", "no such file"),
        ("nowhere.at.all:make", "cannot be imported"),
        ("torchvision:resnet5", "did you mean torchvision:resnet50"),
        ("timm:resnet5", "did you mean|needs timm"),
        ("make", "is not a model; write"),
    ):
        with pytest.raises(normswap.NormswapError, match=message):
            normswap.convert_file("w.pt", "gn-ws", "x.pt", model=spec)
    with pytest.raises(normswap.ModelError, match="unexpected keyword argument 'depth'"):
        normswap.convert_file("w.pt", "gn-ws", "x.pt", model="nets.py:make", model_args={"depth": 1})


def test_model_arguments() -> None:
    parsed = model_specs.parse_arguments(["a=1", "b=1e-3", "c=[1, 2]", "d=True", "e=text", "f=", "g=x=y"])
    assert parsed == {"a": 1, "b": 1e-3, "c": [1, 2], "d": True, "e": "text", "f": "", "g": "x=y"}
    for wrong in ("a", "=1", "a b=1"):
        with pytest.raises(OptionError, match="write NAME=VALUE"):
            model_specs.parse_arguments([wrong])


# ---- recipes ----


def test_a_recipe_from_a_newer_version(tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "w.pt")
    normswap.convert_file(tmp_path / "w.pt", "gn", model=factory)
    state = torch.load(tmp_path / "w.gn.pt")
    state._metadata[RECIPE] |= {"format": 99, "versions": {"normswap": "12.0"}}
    torch.save(state, tmp_path / "new.pt")
    with pytest.raises(FileError, match=r"format 99, made by normswap 12\.0, newer than this one; upgrade"):
        normswap.load(tmp_path / "new.pt", model=factory)


def test_a_recipe_for_another_architecture(tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "w.pt")
    normswap.convert_file(tmp_path / "w.pt", "gn-ws", model=factory)
    why = r"its recipe is for another architecture: the model has no 'conv1.0'.*--model-arg \(model_args\)"
    with pytest.raises(FileError, match=why):
        normswap.load(tmp_path / "w.gn-ws.pt", model=lambda: chain(4, 8))


# ---- diff ----


def test_diff_counts_and_finds_everything(tmp_path: Path) -> None:
    model = resnet()
    state = model.state_dict()
    other = {name: value.clone() for name, value in state.items()}
    other["fc.weight"] *= 1.5
    other["fc.bias"] = torch.zeros(11)
    other["head.weight"] = torch.zeros(3)
    other["layer9.conv1.weight"] = other.pop("layer1.0.conv1.weight")
    other["bn1.weight"] = other["bn1.weight"].half()
    del other["bn1.bias"]
    torch.save(state, tmp_path / "a.pt")
    save_file(other, tmp_path / "b.safetensors")
    report = normswap.diff(tmp_path / "a.pt", tmp_path / "b.safetensors")
    found = {change.paths[0]: (change.how, change.amount) for change in report.changes}
    assert found["fc.weight"] == ("changed in value", pytest.approx(0.5))
    assert {path: how for path, (how, _) in found.items()} == {
        "fc.weight": "changed in value",
        "fc.bias": "reshaped",
        "head.weight": "added",
        "layer1.0.conv1.weight": "renamed",
        "bn1.weight": "changed in value",
        "bn1.bias": "removed",
    }
    assert report.totals.left == len(state) - 5
    printed = json.loads(run("diff", tmp_path / "a.pt", tmp_path / "b.safetensors", "--json"))
    assert printed["changes"] == json.loads(json.dumps(report.to_dict()))["changes"]
    assert "1 removed" in run("diff", tmp_path / "a.pt", tmp_path / "b.safetensors")


def test_diff_notes_what_normswap_made_and_says_the_same_once(tmp_path: Path) -> None:
    model = resnet()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    torch.save(normswap.convert(model, "gn-ws").model.state_dict(), tmp_path / "b.pt")
    shown = run("diff", tmp_path / "a.pt", tmp_path / "b.pt")
    assert "the second was made by normswap: gn-ws" in shown and "warning" not in shown
    assert "the same:" in shown and "  same\n" not in re.sub(" +\n", "\n", shown)


def test_diff_of_models_names_modules_and_nothing_where_there_is_nothing(tmp_path: Path) -> None:
    model = resnet()
    assert normswap.diff(model, resnet()).changes == ()
    report = normswap.diff(model, normswap.convert(model, "gn").model)
    modules = [change for change in report.changes if change.kind == "module"]
    assert len(modules) == 20 and {(c.before, c.after) for c in modules} == {
        ("BatchNorm2d", f"GroupNorm({n})") for n in (2, 4, 8)
    }
    prefixed = {f"module.{name}": value for name, value in model.state_dict().items()}
    renamed = normswap.diff(model.state_dict(), prefixed).changes
    assert len(renamed) == 122 and {(c.how, c.before, c.after) for c in renamed} == {("renamed", "…", "module.…")}
