"""Files: whole modules in and out, and every kind of bad file, with nothing written."""

import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.checks import distance, listing, quiet
from helpers.nets import X, conv_norm, randomize, resnet
from helpers.torchvision_models import SMALL_MODELS, check_they_load_back_safely
from PIL import Image
from safetensors import safe_open
from torch import nn

import normswap
from normswap import FileError, NormswapError, UnsafeFileError
from normswap.checkpoints.checkpoint import RECIPE
from normswap.files import inspect_file, model_specs


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save(resnet(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("target", ["gn", "est", "bcn", "fold", "ws", "wn", "gn-ws", "frozen-wn"])
def test_round_trip(saved: Path, target: str) -> None:
    before = saved.read_bytes()
    report = normswap.convert_file(saved, target)
    out = saved.with_name(f"model.{target}.pt")
    assert saved.read_bytes() == before
    wanted = normswap.convert(resnet(), target).model
    with torch.no_grad():
        for model in (normswap.load(out), torch.load(out, weights_only=False)):
            assert torch.equal(model(X), wanted(X))
            assert getattr(model, RECIPE)["target"] == report.target == target
        folded = normswap.convert_file(saved, target, saved.with_name("folded.pt"), fold=True)
        assert [c.paths for c in folded.changes] == [c.paths for c in report.changes]
        assert not any(c.after.startswith(("Standardized", "Normalized", "Frozen")) for c in folded.changes)
        plain = normswap.load(saved.with_name("folded.pt"))
        assert distance(wanted(X), plain(X)) < 1e-5
    assert not any(type(m).__module__.startswith("normswap") for m in plain.modules())
    assert sorted(p.name for p in saved.parent.iterdir()) == sorted(["model.pt", out.name, "folded.pt"])


def test_the_older_format_holds_source_code(tmp_path: Path) -> None:
    torch.save(resnet(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(FileError, match="before 1.6.*--trust"):
        normswap.convert_file(tmp_path / "old.pth", "gn")
    normswap.convert_file(tmp_path / "old.pth", "gn", trust=True)
    assert isinstance(normswap.load(tmp_path / "old.gn.pth").bn1, nn.GroupNorm)


def test_models_of_torchvision_load_back_safely(tmp_path: Path) -> None:
    """Every class and helper that they hold is allowed, and pickles; tests/integration/zoo has all models."""
    check_they_load_back_safely([*SMALL_MODELS, "vit_b_32", "swin_v2_t", "convnext_tiny", "raft_small"], tmp_path)


def test_save_keeps_the_model_as_it_was(tmp_path: Path) -> None:
    model, report = normswap.convert(resnet(), "gn")
    normswap.save(model, tmp_path / "a.pt", report=report)
    assert vars(model)[RECIPE] == getattr(normswap.load(tmp_path / "a.pt"), RECIPE) == report.recipe
    for other in (resnet(), model):
        before = set(vars(other)), list(other._state_dict_hooks.values())
        normswap.save(other, tmp_path / "b.pt", report=report, overwrite=True)
        assert (set(vars(other)), list(other._state_dict_hooks.values())) == before
    assert stat.S_IMODE((tmp_path / "a.pt").stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_existing_output_is_refused_before_any_work(saved: Path) -> None:
    out = saved.with_name("model.gn.pt")
    out.write_bytes(b"precious")
    with pytest.raises(FileError, match="exists already.*overwrite"):
        normswap.convert_file(saved, "gn", progress=lambda phase: pytest.fail("work was begun"))
    assert out.read_bytes() == b"precious"
    normswap.convert_file(saved, "gn", overwrite=True)
    assert isinstance(normswap.load(out), nn.Module)


def test_the_input_as_output(saved: Path) -> None:
    with pytest.raises(FileError, match="exists already"):
        normswap.convert_file(saved, "gn", saved)
    normswap.convert_file(saved, "gn", saved, overwrite=True)
    assert isinstance(normswap.load(saved).bn1, nn.GroupNorm)


def test_a_failed_write_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(saved.parent)

    def fail(value: object, file: object) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(FileError, match="No space left"):
        normswap.convert_file(saved, "gn", saved, overwrite=True)
    assert listing(saved.parent) == before


@pytest.mark.parametrize("out", ["none/out.pt", "none/none/", "model.pt/out.pt", "out.onnx"])
def test_outputs_that_cannot_be_written(saved: Path, out: str) -> None:
    before = listing(saved.parent)
    with pytest.raises(FileError, match="does not exist|not written as|No such file"):
        normswap.convert_file(saved, "gn", f"{saved.parent}/{out}")
    assert listing(saved.parent) == before


def test_a_new_folder_is_made_for_what_comes_into_it(saved: Path) -> None:
    before = listing(saved.parent)
    with pytest.raises(NormswapError):
        normswap.convert_file(saved, "gn", f"{saved.parent}/new/", key="none")
    normswap.convert_file(saved, "gn", f"{saved.parent}/new/", dry_run=True)
    assert listing(saved.parent) == before
    normswap.convert_file(saved, "gn", f"{saved.parent}/new/")
    assert isinstance(normswap.load(saved.parent / "new" / "model.gn.pt").bn1, nn.GroupNorm)


class Own(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class Settings:
    """Of no module, and no plain data either."""


def test_a_model_of_ones_own_class_is_saved_as_its_state_dict(tmp_path: Path) -> None:
    net, report = normswap.convert(randomize(Own()), "gn-ws")
    path, x = normswap.save(net, tmp_path / "own.pt", report=report), torch.randn(2, 3, 8, 8)
    assert isinstance(torch.load(path, weights_only=True), dict)
    for options in ({"model": Own}, {"model": lambda: Own()}, {"allow": [Own]}):
        assert torch.equal(normswap.load(path, **options)(x), net(x))
    with pytest.raises(FileError, match="without their model"):
        normswap.load(path)
    with pytest.raises(FileError, match="without their model"):
        normswap.load(path, allow=[Own, nn.Linear])  # which of the two?
    wide = normswap.save(normswap.convert(Own(16), "gn").model, tmp_path / "wide.pt")
    assert normswap.load(wide, allow=[Own], model_args={"channels": 16}).norm.num_channels == 16


def test_a_model_that_holds_an_object_of_ones_own_class_is_saved_as_its_state_dict(tmp_path: Path) -> None:
    model = resnet()
    whole = normswap.save(model, tmp_path / "whole.pt")
    assert type(normswap.load(whole)) is type(model)
    model.settings = Settings()
    tensors = normswap.save(model, tmp_path / "tensors.pt")
    torch.testing.assert_close(normswap.load(tensors, model=resnet).state_dict(), model.state_dict())


@pytest.mark.parametrize("whole", [True, False])
def test_grey_pictures_are_read_for_a_model_of_one_channel(whole: bool, tmp_path: Path) -> None:
    net = randomize(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())).eval()
    torch.save(net if whole else net.state_dict(), tmp_path / "m.pt")
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.effect_noise((16, 16), 60).save(tmp_path / "pictures" / f"{number}.png")
    options = {} if whole else {"model": lambda: net}
    report = normswap.convert_file(
        tmp_path / "m.pt", "gn", dry_run=True, examples=tmp_path / "pictures", input_size=8, **options
    )
    assert report.drift is not None and report.drift.probe == "3 examples"
    assert any("ImageNet's mean and std" in note for note in report.notes)


@pytest.mark.parametrize("slash", ["/", ""])
@pytest.mark.parametrize("format", [None, "safetensors"])
def test_a_folder_is_written_into_under_the_default_name(saved: Path, slash: str, format: str | None) -> None:
    folder, name = saved.parent / "folder", "model.gn.safetensors" if format else "model.gn.pt"
    folder.mkdir()
    for _ in range(2):
        normswap.convert_file(saved, "gn", f"{folder}{slash}", format=format, overwrite=True)
        assert [path.name for path in folder.iterdir()] == [name]
    with pytest.raises(FileError, match=rf"folder/{name}: exists already"):
        normswap.convert_file(saved, "gn", f"{folder}{slash}", format=format)


def test_a_distributed_checkpoint_is_not_written_into(saved: Path) -> None:
    normswap.convert_file(saved, "gn", saved.parent / "parts", format="dcp")
    for slash in ("", "/"):
        with pytest.raises(FileError, match="parts: is a folder"):
            normswap.convert_file(saved, "ln", f"{saved.parent}/parts{slash}", overwrite=True)
        normswap.convert_file(saved, "ln", f"{saved.parent}/parts{slash}", format="dcp", overwrite=True)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write")
def test_a_folder_that_cannot_be_written(saved: Path) -> None:
    with pytest.raises(FileError, match="cannot be written"):
        normswap.convert_file(saved, "gn", "/proc/self/out.pt")


def test_a_model_that_cannot_be_pickled(tmp_path: Path) -> None:
    model = conv_norm()
    model.norm.register_forward_hook(lambda m, i, o: None)
    with pytest.raises(FileError, match="cannot be saved whole.*state dict"):
        normswap.save(model, tmp_path / "out.pt")
    assert listing(tmp_path) == {}


# ---- bad input ----


class Hostile:
    """Runs a command when it is unpickled by `pickle` itself."""

    def __init__(self, call: object, *args: object):
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call, self.args


def hostile(tmp_path: Path) -> dict[str, object]:
    mark = tmp_path / "ran"
    return {
        "os.system": Hostile(os.system, f"touch {mark}"),
        "eval": Hostile(eval, f"open({str(mark)!r}, 'w')"),
        "exec": Hostile(exec, f"open({str(mark)!r}, 'w')"),
        "getattr": Hostile(getattr, Hostile(__import__, "os"), "system"),
        "subprocess": Hostile(subprocess.check_call, ["touch", str(mark)]),
        "torch.hub": Hostile(torch.hub.load_state_dict_from_url, "http://localhost:1/x"),
        "graph": torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("attack", ["os.system", "eval", "exec", "getattr", "subprocess", "torch.hub", "graph"])
def test_hostile_pickles_never_run(tmp_path: Path, attack: str, zipped: bool) -> None:
    torch.save({"model": hostile(tmp_path)[attack]}, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileError):
        normswap.convert_file(tmp_path / "bad.pt", "gn")
    assert sorted(listing(tmp_path)) == ["bad.pt"], "code of the pickle ran, or something was written"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 102\n"


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    whole = folder / "whole.pt"
    torch.save(resnet(), whole)
    data = whole.read_bytes()
    made = {
        "empty": (b"", "is empty"),
        "truncated": (data[: len(data) // 2], "truncated or damaged"),
        "text": (("weights, honest\n" * 20).encode(), "is a text file that begins with 'weights, honest"),
        "lfs.safetensors": (POINTER, "is a pointer of git-lfs, .*git lfs pull"),
        "page.pth": (b"<!DOCTYPE html><html><title>Quota exceeded</title></html>", "is a web page"),
        "config.safetensors": (b'{"architectures": ["ResNet"], "depth": 50}', "is a text file of JSON"),
        "other kind": (bytes(range(256)) * 4, "of another kind"),
        "bare pickle": (pickle.dumps([1, 2, 3]), "damaged|cannot be read"),
    }
    files = {}
    for name, (content, message) in made.items():
        (folder / name).write_bytes(content)
        files[name] = (folder / name, message)
    torch.jit.trace(conv_norm().eval(), torch.randn(1, 3, 8, 8)).save(folder / "script")
    torch.save([1], folder / "list")
    (folder / "net.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    torch.export.save(torch.export.export(conv_norm().eval(), (torch.randn(1, 3, 8, 8),)), folder / "program.pt2")
    files |= {
        "script": (folder / "script", "is a TorchScript archive"),
        "list": (folder / "list", "a list, not a model"),
        "onnx": (folder / "net.onnx", "is an ONNX file"),
        "program": (folder / "program.pt2", "is an exported program"),
        "missing": (folder / "missing.pt", "no such file"),
        "folder": (folder, "is a folder without"),
    }
    return files


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_bad_files_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    files = broken_files(tmp_path)
    before = listing(tmp_path)
    for name, (path, message) in files.items():
        with pytest.raises(FileError, match=message) as caught:
            normswap.convert_file(path, "gn", tmp_path / "out.pt")
        assert str(path) in str(caught.value), name
        assert "\n" not in str(caught.value), name
    assert listing(tmp_path) == before


@pytest.mark.parametrize("cut", [0.01, 0.5, 0.99])
def test_truncated_older_format(tmp_path: Path, cut: float) -> None:
    torch.save(resnet().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "old.pt").write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(FileError, match="damaged"):
        normswap.load(tmp_path / "old.pt")


def test_a_class_from_elsewhere_needs_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somenet.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)\n"
        "    def forward(self, x):\n"
        "        return self.norm(self.conv(x))\n"
    )
    save = "import torch, somenet; torch.save(somenet.Net(), 'net.pt')"
    subprocess.run([sys.executable, "-c", save], cwd=tmp_path, check=True)
    with pytest.raises(UnsafeFileError, match=r"somenet\.Net.*--allow somenet\.Net"):
        normswap.load(tmp_path / "net.pt")
    with pytest.raises(FileError, match=r"needs somenet\.Net, which cannot be imported"):
        normswap.load(tmp_path / "net.pt", allow=["somenet.Net"])
    with pytest.raises(FileError, match="needs code that is not here"):
        normswap.load(tmp_path / "net.pt", trust=True)
    monkeypatch.syspath_prepend(tmp_path)
    for how in ({"allow": ["somenet.Net"]}, {"trust": True}):
        assert type(normswap.load(tmp_path / "net.pt", **how)).__name__ == "Net"
        normswap.convert_file(tmp_path / "net.pt", "gn-ws", overwrite=True, **how)
    assert isinstance(normswap.load(tmp_path / "net.gn-ws.pt", allow=["somenet.Net"]).norm, nn.GroupNorm)


# ---- sources ----


def test_torchvision_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = normswap.convert_file("torchvision:resnet18", "gn-ws")
    assert isinstance(normswap.load("resnet18.gn-ws.pt").bn1, nn.GroupNorm)
    assert "never trained" in report.notes[0] and report.drift is None


def test_unknown_models_and_weights() -> None:
    with pytest.raises(normswap.OptionError, match="did you mean torchvision:resnet50"):
        model_specs.build("torchvision:resnet5")
    with pytest.raises(normswap.OptionError, match="it has IMAGENET1K_V1"):
        model_specs.build("torchvision:resnet18", "BEST")


def test_published_weights_up_to_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published weights are asked for by their address, and what arrives is in the model."""
    from torchvision.models import _api

    asked = []

    def download(url: str, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        asked.append(url)
        return resnet_1000().state_dict()

    def resnet_1000() -> nn.Module:
        from torchvision.models import resnet18

        torch.manual_seed(7)
        return resnet18()

    monkeypatch.setattr(_api, "load_state_dict_from_url", download)
    model = model_specs.build("torchvision:resnet18", "IMAGENET1K_V1")
    assert asked and asked[0].endswith("resnet18-f37072fd.pth")
    assert torch.equal(model.fc.weight, resnet_1000().fc.weight)

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(_api, "load_state_dict_from_url", offline)
    with pytest.raises(normswap.ModelError, match="cannot be fetched: no route"):
        model_specs.build("torchvision:resnet18", "IMAGENET1K_V1")


def test_safetensors_say_what_framework_they_are_for(tmp_path: Path) -> None:
    """transformers 4 refuses a file without `format`."""
    model, report = normswap.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "gn")
    path = normswap.save(model, tmp_path / "model.safetensors", report=report)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt" and "normswap_recipe" in file.metadata()


def test_arguments_without_their_model(tmp_path: Path) -> None:
    torch.save(resnet().state_dict(), tmp_path / "w.pt")
    for call in (normswap.load, inspect_file.inspect_file, lambda path, **o: normswap.convert_file(path, "gn", **o)):
        with pytest.raises(normswap.OptionError, match="--model"):
            call(tmp_path / "w.pt", model_args={"num_classes": 10})


def test_pointers_of_git_lfs_within_folders(tmp_path: Path) -> None:
    whole, shards, single = tmp_path / "dcp", tmp_path / "shards", tmp_path / "single"
    with quiet():
        dcp.save({"model": resnet().state_dict()}, checkpoint_id=whole)
    shards.mkdir(), single.mkdir()
    (whole / "__0_0.distcp").write_bytes(POINTER)
    (shards / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    for path in (shards / "x.safetensors", single / "model.safetensors"):
        path.write_bytes(POINTER)
    for folder in (whole, shards, single):
        with pytest.raises(FileError, match=r"(distcp|safetensors): is a pointer of git-lfs"):
            normswap.load(folder, model=resnet)


def test_a_fold_that_folds_nothing(saved: Path) -> None:
    """Nothing is written, and a model in memory comes back as it is, with a word."""
    report = normswap.convert_file(saved, "gn", fold=True)
    assert any("--fold had nothing to do" in line for line in report.notes)
    with pytest.raises(normswap.ModelError, match=r"nothing to fold: .*GroupNorm"):
        normswap.convert_file(saved.with_name("model.gn.pt"), "fold", saved.with_name("plain.pt"))
    assert not saved.with_name("plain.pt").exists()
    _, report = normswap.fold(normswap.load(saved.with_name("model.gn.pt")))
    assert any("nothing to fold" in line for line in report.warnings)
    baked = normswap.convert_file(saved, "gn-ws", saved.with_name("baked.pt"), fold=True)
    assert not any("fold" in line for line in baked.warnings)


class Padded(nn.Module):
    """Its first norm goes into the convolution if it adds nothing: there are zeros around."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.second = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.conv(self.first(x)))


@pytest.mark.parametrize("adds", [True, False])
def test_what_values_decided_is_repeated(tmp_path: Path, adds: bool) -> None:
    model = randomize(Padded()).eval()
    if not adds:
        model.first.running_mean.zero_()
        nn.init.zeros_(model.first.bias)
        model.first.num_batches_tracked += 1
    folded, report = normswap.convert(model, "fold")
    assert isinstance(folded.first, nn.BatchNorm2d) is adds
    normswap.save(folded, tmp_path / "folded.safetensors", report=report)
    again = normswap.load(tmp_path / "folded.safetensors", model=Padded).eval()
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(again(x), folded(x))
