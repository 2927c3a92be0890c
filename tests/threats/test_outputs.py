"""What may be replaced, several outputs at once, no room, and inputs that change while they are read."""

import errno
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import run
from safetensors.torch import save_file
from torch import nn

import normswap
from normswap import FileError, OptionError
from normswap.checkpoints import atomic_write, steady_files

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs pipes and links")


def net(width: int = 8, blocks: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(width, width, 3), nn.BatchNorm2d(width)) for _ in range(blocks)]
    return nn.Sequential(*layers).eval()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    torch.save(net(), "m.pt")
    return Path("m.pt")


def refused(*arguments: object) -> str:
    """What the command says, in one line."""
    result = run(*arguments)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and not result.stdout, result.output
    return result.stderr


def standing(folder: Path = Path()) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_ino, p.lstat().st_mtime_ns) for p in folder.rglob("*")}


# ---- what is replaced ----


@pytest.mark.parametrize("form", ["pt", "safetensors", "dcp"])
@pytest.mark.parametrize("linked", [False, True])
def test_only_files_and_checkpoints_are_replaced(model: Path, form: str, linked: bool) -> None:
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    for name in ("pipe", "socket", "/dev/full"):
        out = f"to {Path(name).name}" if linked else name
        if linked:
            Path(out).symlink_to(name)
        for more in ([], ["--overwrite"]):
            said = refused("convert", model, "--to", "gn", "-o", out, "--format", form, *more)
            assert "never replaced" in said
        assert not stat.S_ISREG(os.stat(out).st_mode)


@pytest.mark.parametrize("ending", ["md", "html", "json", "svg"])
def test_no_report_replaces_a_pipe_or_a_folder(model: Path, ending: str) -> None:
    os.mkfifo(f"pipe.{ending}"), os.mkdir(f"folder.{ending}")
    for name in (f"pipe.{ending}", f"folder.{ending}"):
        refused("convert", model, "--to", "gn", "--report", name, "--overwrite")
    assert stat.S_ISFIFO(os.stat(f"pipe.{ending}").st_mode) and not Path("m.gn.pt").exists()


@pytest.mark.parametrize("stream", [1, 2])
def test_what_the_command_prints_to_is_not_its_output(model: Path, stream: int) -> None:
    with open("log.pt", "wb") as log:
        kept = os.dup(stream)
        os.dup2(log.fileno(), stream)
        try:
            for out in ("log.pt", f"/dev/fd/{stream}"):
                with pytest.raises(FileError, match="prints to"):
                    normswap.convert_file(model, "gn", out, overwrite=True)
        finally:
            os.dup2(kept, stream), os.close(kept)


def test_a_folder_that_holds_more_than_a_checkpoint_is_kept(model: Path) -> None:
    for name in ("thesis.txt", "other.pt", ".git", "model.safetensors"):
        out = Path(f"in {name}")
        out.mkdir()
        (out / name).write_text("mine")
        said = refused("convert", model, "--to", "gn", "--format", "dcp", "-o", out, "--overwrite")
        assert name in said and (out / name).read_text() == "mine"
    normswap.convert_file(model, "gn", "distributed", format="dcp")
    normswap.convert_file(model, "ln", "distributed", format="dcp", overwrite=True)
    Path("distributed", "notes.md").write_text("mine")
    with pytest.raises(FileError, match=r"notes\.md"):
        normswap.convert_file(model, "gn", "distributed", format="dcp", overwrite=True)


def test_a_folder_of_weight_files_replaces_its_older_copy_alone(model: Path) -> None:
    Path("in").mkdir()
    save_file(net().state_dict(), "in/model.safetensors")
    Path("in", "config.json").write_text("{}")
    normswap.convert_file("in", "gn", "out")
    normswap.convert_file("in", "ln", "out", overwrite=True)
    Path("out", "notes.md").write_text("mine")
    before = standing()
    said = refused("convert", "in", "--to", "gn", "-o", "out", "--overwrite")
    assert "notes.md" in said and standing() == before
    with pytest.raises(FileError, match="is a file"):
        normswap.convert_file("in", "gn", model, overwrite=True)
    with pytest.raises(FileError, match="in the folder that is read"):
        normswap.convert_file("in", "gn", "in/out")
    assert standing() == before


# ---- several outputs ----


@pytest.mark.parametrize("other", ["w.md", "./w.md", "x/../w.md", "link.md", "hard.md", "linked/w.md"])
def test_two_outputs_are_two_files(model: Path, other: str) -> None:
    os.mkdir("x"), os.symlink(".", "linked"), os.symlink("w.md", "link.md")
    if other == "hard.md":
        Path("w.md").write_text("old"), os.link("w.md", other)
    before = standing()
    more = ("--overwrite",)
    assert "two outputs" in refused("convert", model, "--to", "gn", "-o", "w.md", "--report", other, *more)
    assert "two outputs" in refused("convert", model, "--to", "gn", "--report", "w.md", "--report", other, *more)
    assert "two outputs" in refused("diff", model, model, "--report", "w.md", "--report", other, *more)
    assert standing() == before


def test_a_report_is_neither_in_the_model_nor_read_too(model: Path) -> None:
    Path("net.py").write_text("from torch import nn\n")
    torch.save(torch.zeros(16, 8, 8, 8), "data.pt")
    torch.save(net(), "m.json"), os.symlink("m.json", "link.json"), os.mkdir("out"), os.mkdir("in")
    save_file(net().state_dict(), "in/model.safetensors")
    Path("in", "config.json").write_text("{}")
    before = standing()
    more = ("--to", "gn", "--overwrite")
    for report in ("m.json", "link.json"):
        assert "is read too" in refused("convert", "m.json", *more, "-o", "o.pt", "--report", report)
        assert "is read too" in refused("diff", "m.json", model, "--report", report, "--overwrite")
    assert "is read too" in refused("convert", "in", *more, "--report", "in/config.json")
    assert "two outputs" in refused("convert", model, *more, "--format", "dcp", "-o", "out", "--report", "out/r.md")
    assert "is read too" in refused("convert", model, *more, "-o", "data.pt", "--calibrate", "data.pt")
    assert "is read too" in refused("convert", model, *more, "-o", "net.py", "--model", "net.py:f")
    assert standing() == before
    with pytest.raises(OptionError, match="two outputs"):
        normswap.convert_file(model, "gn", "o.md", reports=["o.md"])


def test_all_reports_are_written(model: Path) -> None:
    names = ["r.md", "r.html", "r.json", "r.svg"]
    assert run("convert", model, "--to", "gn", *(part for name in names for part in ("--report", name))).exit_code == 0
    assert json.loads(Path("r.json").read_text())["target"] == "gn" and all(Path(name).stat().st_size for name in names)


def broken(*arguments: object) -> Any:
    raise FileError("a report that cannot be made")


@pytest.mark.parametrize("old", [False, True])
def test_a_report_that_cannot_be_made_leaves_no_model(model: Path, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if old:
        normswap.convert_file(model, "ln", "o.pt", reports=["r.md", "r.html"])
    before = standing()
    monkeypatch.setitem(normswap.files.report_file.REPORT_FORMATS, ".html", broken)
    with pytest.raises(FileError, match="cannot be made"):
        normswap.convert_file(model, "gn", "o.pt", overwrite=True, reports=["r.md", "r.html"])
    assert standing() == before


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("form", ["pt", "dcp"])
@pytest.mark.parametrize("old", [False, True])
def test_all_outputs_get_their_names_or_none(
    model: Path, old: bool, form: str, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of them fails: another program makes a folder of its name at the last moment."""
    if not exchange:
        monkeypatch.setattr(atomic_write, "_libc", None)
    if old:
        normswap.convert_file(model, "ln", "o", format=form, reports=["r.md"])
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    give_name: Callable[..., Any] = atomic_write._give_name

    def late(output: atomic_write.Staged) -> Any:
        if output.path.name == "r.html":
            Path("r.html").mkdir()
        return give_name(output)

    monkeypatch.setattr(atomic_write, "_give_name", late)
    with pytest.raises(FileError, match=r"r\.html"):
        normswap.convert_file(model, "gn", "o", format=form, overwrite=True, reports=["r.md", "r.html"])
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before


# ---- no room ----


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("form", ["pt", "safetensors", "dcp", "report"])
def test_no_room_is_told(form: str, number: int, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system says, and what to do, whatever libraries make of it on the way."""

    class Full:
        """A file that takes 1000 bytes."""

        def __init__(self, file: Any):
            self.file, self.left = file, 1000

        def write(self, block: Any) -> int:
            self.left -= memoryview(block).nbytes
            if self.left < 0:
                raise OSError(number, os.strerror(number))
            return int(self.file.write(block))

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def opened(*arguments: Any, **named: Any) -> Any:
        file = open(*arguments, **named)  # noqa: SIM115
        return Full(file) if "w" in str(arguments[1:2]) else file

    if form == "dcp":  # torch opens its files so
        original = Path.open
        monkeypatch.setattr(
            Path, "open", lambda p, *a, **n: Full(original(p, *a, **n)) if "w" in str(a) else original(p, *a, **n)
        )
    monkeypatch.setattr(atomic_write, "open", opened, raising=False)
    before = standing()
    given = {"reports": ["r.html"], "dry_run": True} if form == "report" else {"format": form}
    with pytest.raises(FileError, match=f"cannot be written: {os.strerror(number)}; ") as raised:
        normswap.convert_file(model, "gn", "o", **given)
    assert ("r.html" if form == "report" else "o:") in str(raised.value) and standing() == before


def test_a_full_disk_behind_the_report_on_stdout(model: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "normswap", "inspect", model, "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "No space left" in done.stderr


# ---- inputs that change ----


@pytest.mark.parametrize("at", ["reading", "converting", "writing"])
@pytest.mark.parametrize("kind", ["module.pt", "state.pt", "state.safetensors", "old.pt"])
def test_a_file_that_shrinks_is_an_error(kind: str, at: str, model: Path) -> None:
    """Of 9 MB, mapped or not; the signal that would end the process is met."""
    big, path = net(256, 4), Path(kind)
    if kind == "state.safetensors":
        save_file(big.state_dict(), path)
    else:
        content = big if kind == "module.pt" else big.state_dict()
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old.pt")
    before = set(os.listdir())
    cut = []

    def progress(phase: str) -> None:
        if not cut and (phase.startswith(at) or (at == "converting" and not phase.startswith("reading"))):
            cut.append(phase)
            os.truncate(path, 1 << 16)

    with pytest.raises(FileError, match=str(path)) as raised:
        normswap.convert_file(
            path, "gn-ws" if kind == "module.pt" else "gn", "o.pt", reports=["r.md"], progress=progress
        )
    assert cut and set(os.listdir()) == before and "\n" not in str(raised.value)


@pytest.mark.skipif(steady_files._libc is None, reason="SIGBUS is met on Linux alone")
def test_zeros_stand_for_lost_pages_and_the_rest_is_as_it_was(model: Path) -> None:
    size = 1 << 24
    Path("big").write_bytes(b"\1" * size)
    values = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage.from_file("big", shared=False, nbytes=size))
    with pytest.raises(FileError, match="changed by another program"), steady_files.steady_files("big") as check:
        os.truncate("big", size // 2)
        assert values.sum(dtype=torch.int64) == size // 2 and values[-1] == 0 and values[0] == 1
        check()


def test_a_file_that_is_written_to_is_an_error_and_one_that_is_exchanged_is_not(model: Path) -> None:
    def touch(phase: str) -> None:
        os.utime(model, (1, 1))

    def exchange(phase: str) -> None:
        torch.save(net(), "new"), os.replace("new", model)

    with pytest.raises(FileError, match="changed by another program"):
        normswap.convert_file(model, "gn", progress=touch)
    assert not Path("m.gn.pt").exists()
    normswap.convert_file(model, "gn", progress=exchange)


@pytest.mark.parametrize("kind", ["module.pt", "state.pt", "state.safetensors"])
def test_a_loaded_model_does_without_its_file(kind: str, model: Path) -> None:
    """As where a training script writes its checkpoint anew, in place."""
    big, path = net(256, 2), Path(kind)
    save_file(big.state_dict(), path) if kind.endswith("safetensors") else torch.save(
        big if kind == "module.pt" else big.state_dict(), path
    )
    loaded = normswap.load(path, model=None if kind == "module.pt" else lambda: net(256, 2))
    path.write_bytes(b"")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), big.state_dict().values(), strict=True))
