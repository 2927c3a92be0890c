"""Paths that no file can have, that lead nowhere, or that lead to what is no file: told in one line, or they work."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from helpers.command import run
from safetensors.torch import save_file
from torch import nn

import normswap

pytestmark = pytest.mark.skipif(os.name != "posix", reason="names of other systems have other rules")
LONG, NOT_UTF8 = "x" * 300, os.fsdecode(b"n\xff")
PATHS = [
    LONG, f"{LONG}.pt", "d/" * 3000 + "a.pt", "x" * 250 + ".pt", f"{NOT_UTF8}.pt", "/", "//", "/..", "", "-", ".", "..",
    "dangling", "loop", "there", "fifo", "socket", "nowhere/a.pt", "m.pt/x.pt", "folder", "empty", "/dev/null",
    "/dev/stdin", "/dev/fd/77", "~nobody/x", "\n.pt", "a:b.pt", ":", "x.py:", ":f", f"torchvision:{LONG}", "*", "[",
    "/proc/self/mem", "https://example.com/x.pt",
]  # fmt: skip
USES: dict[str, Callable[[str], list[str]]] = {
    "input": lambda p: ["convert", p, "--to", "gn", "--overwrite"],
    "inspect": lambda p: ["inspect", p],
    "fold": lambda p: ["fold", p],
    "diff": lambda p: ["diff", "m.pt", p],
    "output": lambda p: ["convert", "m.pt", "--to", "gn", "-o", p],
    "replaced output": lambda p: ["convert", "m.pt", "--to", "gn", "-o", p, "--overwrite"],
    "folder": lambda p: ["convert", "m.pt", "--to", "gn", "-o", p, "--overwrite", "--format", "dcp"],
    "model": lambda p: ["convert", "sd.pt", "--to", "gn-ws", "--dry-run", "--model", p],
    "file of a model": lambda p: ["convert", "sd.pt", "--to", "gn-ws", "--dry-run", "--model", f"{p}.py:f"],
    "report": lambda p: ["diff", "m.pt", "sd.pt", "--report", p],
    "report below": lambda p: ["diff", "m.pt", "sd.pt", "--report", f"{p}/r.json"],
    "calibrate": lambda p: ["convert", "m.pt", "--to", "gn", "--dry-run", "--calibrate", p],
    "allow": lambda p: ["inspect", "m.pt", "--allow", p],
    "class to allow": lambda p: ["inspect", "m.pt", "--allow", f"{p}.Class"],
    "key": lambda p: ["inspect", "m.pt", "--key", p],
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()


def furnish(folder: Path) -> None:
    """Things of each kind that a path can lead to."""
    torch.save(net(), folder / "m.pt")
    torch.save(net().state_dict(), folder / "sd.pt")
    for name, leads_to in {"dangling": "nowhere/x", "loop": "loop", "there": "back", "back": "there"}.items():
        (folder / name).symlink_to(leads_to)
    (folder / "folder").mkdir()
    (folder / "folder" / "a.txt").write_text("mine")
    (folder / "empty").mkdir()
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")


def standing(folder: Path) -> dict[str, int]:
    """The inode of all that was there; an empty folder may be replaced."""
    return {str(p): p.lstat().st_ino for p in [*folder.rglob("*"), Path("/dev/null")] if p.name != "empty"}


@pytest.mark.parametrize("use", USES)
def test_any_path(use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    before, wrong = standing(tmp_path), []
    for path in PATHS:
        result = run(*USES[use](path))
        told = result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and not result.stdout
        if result.exit_code != 0 and not (isinstance(result.exception, SystemExit) and result.exit_code == 1 and told):
            wrong.append(f"{path[:40]!r}: {result.exit_code}, {result.exception!r}, {result.output[:300]}")
        now = standing(tmp_path)
        wrong += [f"{path[:40]!r}: {place} has gone" for place, inode in before.items() if now.get(place) != inode]
        wrong += [f"{path[:40]!r}: {place} stays" for place in now if place.endswith(".tmp")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("use", ["a\0b.pt", "a\0", "\0"])
def test_a_path_with_a_zero_in_it(use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system gives a command no such argument; Python does."""
    monkeypatch.chdir(tmp_path)
    torch.save(net(), "m.pt"), torch.save(net().state_dict(), "sd.pt")
    calls: list[Callable[[], object]] = [
        lambda: normswap.convert_file(use, "gn"),
        lambda: normswap.convert_file("m.pt", "gn", use),
        lambda: normswap.convert_file("m.pt", "gn", reports=[f"{use}.md"]),
        lambda: normswap.convert_file("m.pt", "gn", calibrate=use),
        lambda: normswap.convert_file("sd.pt", "gn-ws", model=f"{use}.py:f"),
        lambda: normswap.load(use),
        lambda: normswap.save(net(), use),
        lambda: normswap.diff("m.pt", use),
    ]
    for call in calls:
        with pytest.raises(normswap.NormswapError):
            call()
    assert sorted(os.listdir()) == ["m.pt", "sd.pt"]


def test_names_that_are_not_utf8_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all that is read and written, of each kind, and for the folder above it."""
    place = tmp_path / NOT_UTF8
    place.mkdir()
    files = {name: place / f"{NOT_UTF8}{name}" for name in ("m.pt", "sd.pt", "sd.safetensors", "old.pt", "net.py")}
    for name, content in {"m.pt": net(), "sd.pt": net().state_dict()}.items():
        with files[name].open("wb") as file:
            torch.save(content, file)
    with files["old.pt"].open("wb") as file:
        torch.save(net().state_dict(), file, _use_new_zipfile_serialization=False)
    save_file(net().state_dict(), tmp_path / "x")
    (tmp_path / "x").rename(files["sd.safetensors"])
    numpy.save(place / "x.npy", numpy.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype("f"))
    source = "from torch import nn\ndef f(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())"
    files["net.py"].write_text(source)
    for name in ("m.pt", "sd.pt", "sd.safetensors", "old.pt"):
        own = None if name == "m.pt" else net
        assert isinstance(normswap.load(files[name], model=own)[1], nn.BatchNorm2d)
        for form in ("pt", "safetensors", "dcp"):
            out = place / f"{name}.{form}{NOT_UTF8}"
            normswap.convert_file(files[name], "gn", out, format=form, reports=[place / f"{name}.{form}.html"])
            whole = form == "pt" and name == "m.pt"
            assert isinstance(normswap.load(out, model=None if whole else net)[1], nn.GroupNorm)
    normswap.convert_file(files["sd.pt"], "gn-ws", place / "ws.pt", model=f"{files['net.py']}:f")
    normswap.convert_file(files["m.pt"], "gn", place / "c.pt", calibrate=place / "x.npy", calibrate_seconds=0)
    assert isinstance(normswap.load(normswap.save(net(), place / "s.safetensors"), model=net)[1], nn.BatchNorm2d)
    assert run("inspect", files["m.pt"]).exit_code == 0 and run("diff", files["m.pt"], files["sd.pt"]).exit_code == 0


def test_the_longest_name_works(tmp_path: Path) -> None:
    """A name that leaves no room for what a temporary one has beside it; a killed run's is found too."""
    torch.save(net(), tmp_path / "m.pt")
    out = tmp_path / ("é" * 126 + ".pt")
    litter = tmp_path / f".{'é' * 120}.0123abcd.tmp"
    litter.write_bytes(b"of a killed run")
    normswap.convert_file(tmp_path / "m.pt", "gn", out)
    assert isinstance(normswap.load(out)[1], nn.GroupNorm) and not litter.exists()
