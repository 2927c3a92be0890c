"""Runs that are killed, run out of disk or meet each other: the old file or the new one, whole, and no litter."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import run
from safetensors.torch import save_file
from torch import Tensor

import normswap
from normswap import FileError
from normswap.checkpoints import atomic_write, reading
from normswap.cli import commands

KILLS = int(os.environ.get("NORMSWAP_KILLS", "10"))
FORMS = ("pt", "safetensors", "dcp")
FORK = multiprocessing.get_context("fork") if os.name == "posix" else None
pytestmark = pytest.mark.skipif(FORK is None, reason="forks")


def state(megabytes: int = 1) -> dict[str, Tensor]:
    """A state dict of convolutions and norms; one pair a megabyte."""
    generator = torch.Generator().manual_seed(megabytes)
    made: dict[str, Tensor] = {}
    for i in range(megabytes):
        made[f"{i}.conv.weight"] = torch.randn(64, 455, 3, 3, generator=generator)
        made[f"{i}.bn.weight"], made[f"{i}.bn.bias"] = torch.rand(64, generator=generator) + 0.5, torch.randn(64)
        made[f"{i}.bn.running_mean"] = torch.randn(64, generator=generator)
        made[f"{i}.bn.running_var"] = torch.rand(64, generator=generator) + 0.5
        made[f"{i}.bn.num_batches_tracked"] = torch.tensor(7)
    return made


def write_source(folder: Path, form: str, megabytes: int = 1) -> Path:
    """A checkpoint of the kind `form` in `folder`."""
    made, path = state(megabytes), folder / ("model" if form == "dcp" else f"model.{form}")
    if form == "pt":
        torch.save(made, path)
    elif form == "safetensors":
        save_file(made, path)
    else:
        from torch.distributed.checkpoint import save

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process does it is meant
            save(made, checkpoint_id=path)
    return path


def out_of(source: Path) -> Path:
    return source.with_name("out" + source.suffix)


def tensors(path: Path) -> dict[str, Tensor]:
    """What is in a checkpoint, read in full."""
    return {name: value.clone() for name, value in reading.read_checkpoint(path).content.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def is_one_of(path: Path, *states: dict[str, Tensor]) -> bool:
    """Whether a whole checkpoint with one of these states stands there."""
    try:
        found = tensors(path)
    except FileError:
        return False
    return any(equal(found, one) for one in states)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start(work: Callable[..., object], *arguments: object) -> Any:
    """`work` in a process of its own; its exit code is 1 where it raises."""
    process = FORK.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def command(errors: Path, *arguments: object, before: Callable[[], object] = lambda: None) -> None:
    """The command line in this process, which ends with its exit code; what it prints goes to the file `errors`."""
    handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1), os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(handle), "w", buffering=1) for _ in range(2))
    code = 70
    try:
        before()
        commands.app([str(a) for a in arguments])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def old_and_new(source: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write the old output, and give what is in it and what will be in the new one."""
    out = out_of(source)
    normswap.convert_file(source, "gn", out, overwrite=True)
    new = tensors(out)
    normswap.convert_file(source, "ln", out, transfer="copy", overwrite=True)
    old = tensors(out)
    assert not equal(old, new)
    return old, new


def after_a_kill(source: Path, old: dict[str, Tensor], new: dict[str, Tensor]) -> bool:
    """Check that the output is the old one or the new one; whether something lay beside it. A next run cleans up."""
    out, folder = out_of(source), source.parent
    found = tensors(out)
    assert equal(found, old) or equal(found, new), "the output is neither the old one nor the new one"
    litter = names(folder) != sorted([source.name, out.name])
    normswap.convert_file(source, "ln", out, transfer="copy", overwrite=True)
    assert names(folder) == sorted([source.name, out.name]), "a killed run's files were not removed by the next"
    assert equal(tensors(out), old)
    return litter


# ---- kills ----


def convert_and_tell(source: Path, pipe: Any) -> None:
    """Convert again and again, and tell when a write begins."""
    while True:
        normswap.convert_file(source, "gn", out_of(source), overwrite=True, progress=lambda p: tell(pipe, p))


def tell(pipe: Any, phase: str) -> None:
    if phase.startswith("writing"):
        pipe.send_bytes(b"writing")


@pytest.mark.parametrize(("form", "megabytes"), [("pt", 40), ("dcp", 16)])
def test_killed_at_any_time(tmp_path: Path, form: str, megabytes: int) -> None:
    source = write_source(tmp_path, form, megabytes)
    old, new = old_and_new(source)
    begun = time.monotonic()
    normswap.convert_file(source, "ln", out_of(source), transfer="copy", overwrite=True)
    moments = random.Random(0)
    took = time.monotonic() - begun
    for _ in range(KILLS if form == "pt" else KILLS // 2):
        here, there = FORK.Pipe(duplex=False)
        process = start(convert_and_tell, source, there)
        there.close()
        here.recv_bytes()
        time.sleep(moments.uniform(0, took))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        after_a_kill(source, old, new)


class Fragile:
    """A file that kills its process once so many bytes are written."""

    def __init__(self, file: Any, left: int):
        self.file, self.left = file, left

    def write(self, block: Any) -> int:
        size = memoryview(block).nbytes
        if size >= self.left:
            self.file.write(memoryview(block).cast("B")[: self.left])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= size
        return self.file.write(block)

    def __enter__(self) -> "Fragile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def killed_after_bytes(source: Path, count: int) -> None:
    atomic_write.open = lambda *arguments, **named: Fragile(open(*arguments, **named), count)  # noqa: SIM115
    normswap.convert_file(source, "gn", out_of(source), overwrite=True)


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_killed_after_so_many_bytes(tmp_path: Path, form: str) -> None:
    source = write_source(tmp_path, form, 4)
    old, new = old_and_new(source)
    counts = random.Random(1)
    for _ in range(KILLS):
        process = start(killed_after_bytes, source, counts.randrange(1, out_of(source).stat().st_size - 10_000))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert after_a_kill(source, old, new), "the kill was to come in the middle of the write"


def killed_at(source: Path, place: str, name: str, after: bool, overwrite: bool) -> None:
    """Convert, and die as one function is called, or as it has returned."""
    owner = getattr(atomic_write, place) if place else atomic_write
    original = getattr(owner, name)

    def fatal(*arguments: Any, **named: Any) -> Any:
        if after:
            original(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, fatal)
    normswap.convert_file(source, "gn", out_of(source), overwrite=overwrite)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("form", "place", "name"),
    [
        ("pt", "", "_lock"),
        ("pt", "os", "fsync"),
        ("pt", "", "_exchange"),
        ("pt", "", "_sync"),
        ("pt", "", "_remove"),
        ("dcp", "", "_lock"),
        ("dcp", "", "_exchange"),
        ("dcp", "", "_remove"),
    ],
)
def test_killed_at_each_step(tmp_path: Path, form: str, place: str, name: str, after: bool) -> None:
    source = write_source(tmp_path, form)
    old, new = old_and_new(source)
    process = start(killed_at, source, place, name, after, True)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    after_a_kill(source, old, new)


CHANGES = {
    "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "tempfile.mkstemp",
    "fcntl.flock",
}  # fmt: skip


def killed_at_event(source: Path, number: int, exchange: bool, overwrite: bool) -> None:
    """Convert, and die just before change `number` of the file system; end with code 0 if there is none."""
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if opens or event in CHANGES:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if not exchange:
        atomic_write._libc = None
    sys.addaudithook(hook)
    normswap.convert_file(source, "gn", out_of(source), overwrite=overwrite)
    os._exit(0)


@pytest.mark.parametrize(
    ("form", "exchange", "overwrite"),
    [
        ("pt", True, True),
        ("pt", True, False),
        ("safetensors", True, True),
        ("dcp", True, True),
        ("dcp", True, False),
        ("dcp", False, True),
    ],
)
def test_killed_before_each_change_of_the_folder(tmp_path: Path, form: str, exchange: bool, overwrite: bool) -> None:
    """Nothing is lost at any step, and the next run removes all that is left.

    Without `exchange`, as where the system cannot swap two folders in one step, the old one may have another name.
    """
    source = write_source(tmp_path, form)
    old, new = old_and_new(source)
    atomic_write._remove(out_of(source))
    if overwrite:
        normswap.convert_file(source, "ln", out_of(source), transfer="copy")
    wrong = []
    for number in range(200):
        process = start(killed_at_event, source, number, exchange, overwrite)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if overwrite or out_of(source).exists():
            places = [out_of(source)] if exchange else [path for path in tmp_path.iterdir() if path != source]
            whole = any(is_one_of(path, old, new) for path in places)
            wrong += [] if whole else [f"{number}: neither the old nor the new one is there"]
        normswap.convert_file(source, "ln", out_of(source), transfer="copy", overwrite=True)
        litter = set(names(tmp_path)) - {source.name, out_of(source).name}
        wrong += [f"{number}: {name} stays" for name in litter]
        for path in [*(tmp_path / name for name in litter), *([] if overwrite else [out_of(source)])]:
            atomic_write._remove(path)
    assert number > 3 and process.exitcode == 0, "no kill at all, or no end"
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("after", [False, True])
def test_killed_as_a_new_file_gets_its_name(tmp_path: Path, after: bool) -> None:
    source = write_source(tmp_path, "pt")
    process = start(killed_at, source, "os", "link", after, False)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert out_of(source).exists() == after
    new = tensors(out_of(source)) if after else None
    normswap.convert_file(source, "gn", out_of(source), overwrite=True)
    assert names(tmp_path) == sorted([source.name, out_of(source).name])
    assert new is None or equal(tensors(out_of(source)), new)


# ---- no room, no right ----


def little_room(megabytes: float = 0.5) -> None:
    size = int(megabytes * 1e6)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk(tmp_path: Path, form: str, existing: bool) -> None:
    source, errors = write_source(tmp_path, form), tmp_path.with_name(f"{tmp_path.name}.txt")
    old = old_and_new(source)[0] if existing else None
    before = names(tmp_path)
    arguments = ("convert", source, "--to", "gn", "-o", out_of(source), "--overwrite")
    process = FORK.Process(target=command, args=(errors, *arguments), kwargs={"before": little_room})
    process.start(), process.join()
    said = errors.read_text()
    assert process.exitcode == 1 and said.startswith("error: ") and said.count("\n") == 1, said
    assert "too large" in said
    assert names(tmp_path) == before
    assert old is None or equal(tensors(out_of(source)), old)


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_as_another_kind_is_written(tmp_path: Path, form: str) -> None:
    """The input needs no room here, so that it is the write that fails."""
    source, errors = write_source(tmp_path, "pt"), tmp_path.with_name(f"{tmp_path.name}.txt")
    before = names(tmp_path)
    arguments = ("convert", source, "--to", "gn", "-o", tmp_path / "out", "--format", form)
    process = FORK.Process(target=command, args=(errors, *arguments), kwargs={"before": little_room})
    process.start(), process.join()
    said = errors.read_text()
    assert process.exitcode == 1 and said.startswith("error: ") and said.count("\n") == 1, said
    assert str(tmp_path / "out") in said and "cannot be written" in said
    assert names(tmp_path) == before


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_run(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the file is synced: it ends the run as always, and the old file is there alone."""
    source = write_source(tmp_path, form)
    old = old_and_new(source)[0]

    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        normswap.convert_file(source, "gn", out_of(source), overwrite=True)
    assert names(tmp_path) == sorted([source.name, out_of(source).name])
    assert equal(tensors(out_of(source)), old)


def test_a_truncated_distributed_checkpoint(tmp_path: Path) -> None:
    """What a job leaves that was killed while it saved: refused by name, with nothing written."""
    source = write_source(tmp_path, "dcp")
    for shard in source.glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:-3000])
    with pytest.raises(FileError, match="damaged or incomplete") as caught:
        normswap.convert_file(source, "gn", out_of(source))
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert names(tmp_path) == [source.name]


def can_mount() -> bool:
    """Whether a small file system can be mounted, in a namespace of one's own."""
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(mount, capture_output=True).returncode == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_disk_that_is_full_indeed(tmp_path: Path, form: str) -> None:
    """Files may be larger than what is left, and mapped ones too: no signal ends the run."""
    if not can_mount():
        pytest.skip("cannot mount a file system")
    source = write_source(tmp_path, form, 4)
    (tmp_path / "small").mkdir()
    convert = f"{sys.executable} -m normswap convert {source} --to gn -o small/{out_of(source).name}"
    script = f"mount -t tmpfs -o size=2m none small && {convert}; code=$?; ls -A small; exit $code"
    result = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == "", (result.returncode, result.stdout)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "No space left" in result.stderr


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_without_the_right_to_write(tmp_path: Path, form: str) -> None:
    (tmp_path / "locked").mkdir()
    source = write_source(tmp_path / "locked", form)
    (tmp_path / "locked").chmod(0o500)
    try:
        result = run("convert", source, "--to", "gn")
    finally:
        (tmp_path / "locked").chmod(0o700)
    assert result.exit_code == 1 and "cannot be written" in result.stderr and result.stderr.count("\n") == 1
    assert names(tmp_path / "locked") == [source.name]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write")
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_that_nobody_can_write(tmp_path: Path, form: str) -> None:
    source = write_source(tmp_path, form)
    result = run("convert", source, "--to", "gn", "-o", f"/proc/self/{out_of(source).name}", "--overwrite")
    assert result.exit_code == 1 and "cannot be written" in result.stderr and result.stderr.count("\n") == 1
    assert names(tmp_path) == [source.name]


# ---- input as output, links ----


@pytest.mark.parametrize("form", FORMS)
def test_the_input_as_output_of_every_kind(tmp_path: Path, form: str) -> None:
    source = write_source(tmp_path, form)
    before = tensors(source)
    refused = run("convert", source, "--to", "gn", "-o", source)
    assert refused.exit_code == 1 and "exists already" in refused.stderr
    assert equal(tensors(source), before)
    normswap.convert_file(source, "gn", tmp_path / ("wanted" + source.suffix))
    normswap.convert_file(source, "gn", source, overwrite=True)
    assert equal(tensors(source), tensors(tmp_path / ("wanted" + source.suffix)))
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("hard", [False, True])
def test_a_link_to_the_input_as_output(tmp_path: Path, hard: bool) -> None:
    source = write_source(tmp_path, "pt")
    before, link = tensors(source), tmp_path / "link.pt"
    os.link(source, link) if hard else link.symlink_to(source)
    with pytest.raises(FileError, match="exists already"):
        normswap.convert_file(source, "gn", link)
    normswap.convert_file(source, "gn", link, overwrite=True)
    assert not equal(tensors(link), before) and link.is_symlink() is not hard
    assert equal(tensors(source), before if hard else tensors(link))


@pytest.mark.parametrize("form", FORMS)
def test_a_symlink_as_output_stays_one(tmp_path: Path, form: str) -> None:
    """What it leads to is replaced, also in another folder, and the temporary file is made there."""
    (tmp_path / "elsewhere").mkdir()
    source = write_source(tmp_path, form)
    real, link = tmp_path / "elsewhere" / out_of(source).name, out_of(source)
    normswap.convert_file(source, "ln", real)
    old = tensors(real)
    link.symlink_to(real, target_is_directory=form == "dcp")
    refused = run("convert", source, "--to", "gn", "-o", link)
    assert refused.exit_code == 1 and "exists already" in refused.stderr and equal(tensors(real), old)
    normswap.convert_file(source, "gn", link, overwrite=True)
    assert link.is_symlink() and link.resolve() == real and not real.is_symlink()
    assert not equal(tensors(real), old)
    assert names(tmp_path / "elsewhere") == [real.name]
    assert names(tmp_path) == sorted([source.name, link.name, "elsewhere"])


@pytest.mark.parametrize("form", FORMS)
def test_a_dangling_symlink_as_output(tmp_path: Path, form: str) -> None:
    source = write_source(tmp_path, form)
    link, real = out_of(source), tmp_path / ("real" + source.suffix)
    link.symlink_to(real)
    refused = run("convert", source, "--to", "gn", "-o", link)
    assert refused.exit_code == 1 and "exists already" in refused.stderr and not real.exists()
    normswap.convert_file(source, "gn", link, overwrite=True)
    assert link.is_symlink() and not real.is_symlink() and equal(tensors(link), tensors(real))
    assert names(tmp_path) == sorted([source.name, link.name, real.name])


@pytest.mark.parametrize(("leads_to", "message"), [("none/out.pt", "does not exist"), ("out.pt", "ymlink|levels of")])
def test_a_symlink_that_leads_nowhere(tmp_path: Path, leads_to: str, message: str) -> None:
    source = write_source(tmp_path, "pt")
    out_of(source).symlink_to(leads_to)
    with pytest.raises(FileError, match=message):
        normswap.convert_file(source, "gn", out_of(source), overwrite=True)
    assert names(tmp_path) == sorted([source.name, "out.pt"]) and out_of(source).is_symlink()


# ---- several runs at once ----


def meet(barrier: Any) -> Callable[[], object]:
    return lambda: barrier.wait(60)


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("form", ["pt", "dcp"])
def test_two_runs_at_once(tmp_path: Path, form: str, overwrite: bool) -> None:
    source, logs = write_source(tmp_path, form), tmp_path.with_name(f"{tmp_path.name}.logs")
    logs.mkdir()
    normswap.convert_file(source, "gn", out_of(source))
    wanted = tensors(out_of(source))
    for _ in range(6):
        atomic_write._remove(out_of(source))
        barrier = FORK.Barrier(2)
        arguments = ["convert", source, "--to", "gn", "-o", out_of(source), *(["--overwrite"] if overwrite else [])]
        processes = [
            FORK.Process(target=command, args=(logs / str(i), *arguments), kwargs={"before": meet(barrier)})
            for i in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        said = [(logs / str(i)).read_text() for i in range(2)]
        codes = [process.exitcode for process in processes]
        assert not any("Traceback" in text for text in said), "\n".join(said)
        assert set(codes) <= {0, 1} and 0 in codes, said
        assert equal(tensors(out_of(source)), wanted)
        assert names(tmp_path) == sorted([source.name, out_of(source).name])
        if overwrite:
            assert codes == [0, 0], said
        elif codes != [0, 0]:
            refusal = said[codes.index(1)]
            assert refusal.count("\n") == 1 and ("appeared while" in refusal or "exists already" in refusal)


@pytest.mark.parametrize("form", ["pt", "dcp"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_an_output_that_appears_during_the_write(
    tmp_path: Path, form: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run finishes between the check and the rename."""
    source = write_source(tmp_path, form)
    other = tmp_path.with_name(f"{tmp_path.name}.other")
    other.mkdir()
    appearing = other / out_of(source).name
    normswap.convert_file(source, "ln", appearing)
    theirs = tensors(appearing)
    original = atomic_write._rename_new if form == "pt" else os.rename

    def late(temporary: Path, target: Path) -> None:
        if Path(target) == out_of(source) and appearing.exists():
            monkeypatch.undo()
            os.rename(appearing, target)
        original(temporary, target)

    owner, name = (atomic_write, "_rename_new") if form == "pt" else (os, "rename")
    monkeypatch.setattr(owner, name, late)
    if overwrite:
        normswap.convert_file(source, "gn", out_of(source), overwrite=True)
        assert not equal(tensors(out_of(source)), theirs)
    else:
        with pytest.raises(FileError, match="appeared while"):
            normswap.convert_file(source, "gn", out_of(source))
        assert equal(tensors(out_of(source)), theirs)
    assert names(tmp_path) == sorted([source.name, out_of(source).name])


def convert_and_wait(source: Path, begun: Any) -> None:
    """Convert, and stop for good before the new name is given."""

    def stop(*arguments: object) -> None:
        begun.send_bytes(b"written")
        time.sleep(600)

    atomic_write._exchange = stop
    normswap.convert_file(source, "gn", out_of(source), overwrite=True)


@pytest.mark.parametrize("form", ["pt", "dcp"])
def test_a_living_runs_temporary_file_is_left(tmp_path: Path, form: str) -> None:
    source = write_source(tmp_path, form)
    old, new = old_and_new(source)
    here, there = FORK.Pipe(duplex=False)
    process = start(convert_and_wait, source, there)
    there.close()
    here.recv_bytes()
    held = set(names(tmp_path)) - {source.name, out_of(source).name}
    assert len(held) == 1
    normswap.convert_file(source, "ln", out_of(source), transfer="copy", overwrite=True)
    assert set(names(tmp_path)) == held | {source.name, out_of(source).name}
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert after_a_kill(source, old, new)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("form", ["pt", "dcp"])
def test_a_temporary_file_that_another_run_takes_for_a_dead_ones(
    tmp_path: Path, form: str, opened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is removed after it was made and before it is locked, or just before the lock is had: another one is made."""
    source = write_source(tmp_path, form)
    lock, taken = atomic_write._lock, []

    def late(path: Path, wait: bool = True) -> int | None:
        first = wait and not taken
        if first:
            taken.append(path)
        if first and not opened:
            atomic_write._remove(path)
        held = lock(path, wait)
        if first and opened:
            atomic_write._remove(path)
        return held

    monkeypatch.setattr(atomic_write, "_lock", late)
    normswap.convert_file(source, "gn", out_of(source))
    assert taken and names(tmp_path) == sorted([source.name, out_of(source).name])


def test_files_of_others_are_left(tmp_path: Path) -> None:
    """Names near those of temporary files, and temporary files of another output."""
    source = write_source(tmp_path, "pt")
    strangers = [".out.pt.tmp", "out.pt.12345678.tmp", ".out.pt.123456789.tmp", ".other.pt.12345678.tmp", "tmpabcdefgh"]
    for name in strangers:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / ".out.pt.0123abcd.tmp").write_bytes(b"of a killed run")
    normswap.convert_file(source, "gn", out_of(source))
    assert names(tmp_path) == sorted([source.name, "out.pt", *strangers])


@pytest.mark.parametrize("name", ["a[b]*?.pt", "sp ace.pt", "ünïcode.pt", "-dash.pt", "line\nbreak.pt"])
def test_litter_of_odd_names_is_found(tmp_path: Path, name: str) -> None:
    source = write_source(tmp_path, "pt")
    (tmp_path / f".{name}.0123abcd.tmp").write_bytes(b"of a killed run")
    normswap.convert_file(source, "gn", tmp_path / name)
    assert names(tmp_path) == sorted([source.name, name])


# ---- modes ----


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("form", FORMS)
def test_modes_follow_the_umask(tmp_path: Path, form: str, mask: int) -> None:
    source = write_source(tmp_path, form)
    before = os.umask(mask)
    try:
        normswap.convert_file(source, "gn", out_of(source))
    finally:
        os.umask(before)
    out = out_of(source)
    for path in [out, *(out.iterdir() if form == "dcp" else [])]:
        full = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == full & ~mask, path
