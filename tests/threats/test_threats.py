"""Hostile and broken checkpoints: no code runs, each is refused in one line that names it, and nothing is written."""

from __future__ import annotations

import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuzz_pickles import failures as composed_failures
from make import HURT, MARK, MAY_CONVERT, MAY_LOAD, THREATS, net
from mutate import failures
from sandbox import in_sandbox
from torch import nn
from torch.distributed.checkpoint.metadata import MetadataIndex
from typer.testing import CliRunner

import normswap
from normswap.checkpoints.reading import read_checkpoint
from normswap.cli.commands import app
from normswap.errors import first_line
from normswap.files.paths import default_output

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the sandbox needs Linux")
SECONDS = 10
MEMORY = 1 << 20  # kilobytes that a file of a few megabytes may take
LONGEST = 2000  # characters of a message


def listing(folder: Path) -> dict[str, int]:
    """Every file below a folder with its size; links are not followed."""
    return {
        os.path.join(place, name): os.lstat(os.path.join(place, name)).st_size
        for place, folders, names in os.walk(folder)
        for name in (*folders, *names)
        if not os.path.isdir(os.path.join(place, name))
    }


def attempt(call: Callable[[], object], path: Path, may_succeed: bool) -> str:
    """What is wrong with how `call` ended; empty where nothing is."""
    try:
        result = call()
    except normswap.NormswapError as error:
        message = str(error)
        if "\n" in message or not message.isprintable():
            return f"the message is not one printable line: {message[:300]!r}"
        if "File too large" in message:
            return "wrote a file until the sandbox stopped it"
        if len(message) > LONGEST:
            return f"the message has {len(message)} characters"
        return "" if str(path) in message else f"the message does not name {path}: {message}"
    except BaseException as error:
        return f"escaped: {first_line(error)}"
    if not may_succeed:
        return f"was not refused, but gave a {type(result).__name__}"
    return ""


def problems(name: str, path: Path, folder: Path) -> Iterator[str]:
    """Every call on a hostile file, and what is wrong with its outcome."""
    may_load, may_convert = name in MAY_LOAD, name in MAY_LOAD | MAY_CONVERT
    before = listing(folder)
    out = default_output(path, "gn")
    calls: dict[str, tuple[Callable[[], object], bool]] = {
        "load": (lambda: normswap.load(path), may_load),
        "load with a model": (lambda: normswap.load(path, model=net), may_load),
        "convert": (lambda: normswap.convert_file(path, "gn", out), may_convert),
    }
    for what, (call, may_succeed) in calls.items():
        yield from (f"{what}: {problem}" for problem in [attempt(call, path, may_succeed)] if problem)
        if os.path.lexists(folder / MARK):
            yield f"{what}: CODE OF THE FILE RAN"
            (folder / MARK).unlink()
        made = {key for key in listing(folder).keys() - before.keys() if not Path(key).is_relative_to(out)}
        if made:
            yield f"{what}: wrote {sorted(made)[:3]}"
        if hasattr(os, HURT) or hasattr(MetadataIndex, HURT):
            yield f"{what}: A MODULE OR A CLASS WAS CHANGED"
    if os.path.lexists(out):
        yield from output_problems(out, may_convert)
        return
    try:
        result = CliRunner().invoke(app, ["convert", str(path), "--to", "gn"])
    except BaseException as error:
        yield f"command line: escaped: {first_line(error)}"
        return
    if result.exit_code != 1 or result.exception is None or not isinstance(result.exception, SystemExit):
        yield f"command line: ended with {result.exit_code}, {result.exception!r:.300}"
    elif not (result.stderr.startswith("error: ") and result.stderr.count("\n") == 1) or result.stdout:
        yield f"command line: printed {(result.stderr + result.stdout)[:300]!r}"
    if listing(folder).keys() != before.keys():
        yield f"command line: wrote {sorted(listing(folder).keys() - before.keys())[:3]}"


def output_problems(out: Path, may_convert: bool) -> Iterator[str]:
    if not may_convert:
        yield f"convert: wrote {out.name}"
        return
    try:
        model = normswap.load(out, model=None if out.suffix == ".pt" and _whole(out) else net)
        if not isinstance(model, nn.Module):
            yield f"the output holds a {type(model).__name__}"
    except normswap.NormswapError:
        pass  # a lie about the model stays one
    except BaseException as error:
        yield f"load of the output: escaped: {first_line(error)}"


def _whole(path: Path) -> bool:
    return isinstance(read_checkpoint(path).content, nn.Module)


@pytest.mark.parametrize("name", THREATS)
def test_threat(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what such files are made with
        path = THREATS[name](tmp_path)

    def work(report: Callable[[object], None]) -> None:
        os.environ |= {"TORCH_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        os.chdir(tmp_path)
        sys.path.insert(0, str(tmp_path))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for problem in problems(name, path, tmp_path):
            report(problem)
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if taken > MEMORY:
            report(f"took {taken / 1024:,.0f} MB of memory")

    started = time.monotonic()
    found, end = in_sandbox(work, SECONDS)
    listed = "\n  ".join(dict.fromkeys([*map(str, found), *([end] if end else [])]))
    assert not listed, f"{name}, {time.monotonic() - started:.1f} s:\n  {listed}"
    assert not os.path.lexists(tmp_path / MARK), "code of the file ran"


def test_the_good_file_is_good(tmp_path: Path) -> None:
    """What the threats are made from converts and loads: it is not their base that is refused."""
    from make import _distributed, _safetensors, _tensors, saved, training

    for content in (net(), net().state_dict(), training()):
        path = saved(content, tmp_path / "good.pt")
        normswap.convert_file(path, "gn", overwrite=True)
        given = None if content.__class__.__name__ == "Sequential" else net
        assert isinstance(normswap.load(tmp_path / "good.gn.pt", model=given)[1], nn.GroupNorm)
    for path in (_safetensors(tmp_path / "good.safetensors", *_tensors()), _distributed(tmp_path)):
        normswap.convert_file(path, "gn")
        assert isinstance(normswap.load(path.with_name(f"{path.stem}.gn{path.suffix}"), model=net)[1], nn.GroupNorm)


@pytest.mark.parametrize("part", range(4))
def test_mutations(part: int) -> None:
    found = failures(part * 150, 150)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("part", range(3))
def test_composed_pickles(part: int) -> None:
    """The first of the programs that `python tests/threats/fuzz_pickles.py 100000` runs."""
    found, ran = composed_failures(part * 1000, 1000)
    assert not found and ran == 1000, "\n".join(found)
