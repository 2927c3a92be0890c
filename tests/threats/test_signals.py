"""Signals at any moment: nothing torn, nothing left but by SIGKILL, and that is swept by the next run.

A run is a fork of a process that has imported what the command needs, so that hundreds fit into a minute.
`python tests/threats/test_signals.py 200` makes as many, and says what came of them.
"""

import os
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap import signals
from normswap.checkpoints import distributed_folders, reading  # imported before the forks, as torch is
from normswap.cli import commands

SIGNALS = int(os.environ.get("NORMSWAP_SIGNALS", "24"))
pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")
KINDS = {"pt": "out.pt", "safetensors": "out.safetensors", "dcp": "out"}
REPORTS = ("report.html", "report.md")
KNOWN = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]
assert distributed_folders


def net() -> nn.Sequential:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(256) for _ in range(4)]
    for norm in norms:
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(*[nn.Sequential(nn.Conv2d(256, 256, 3), norm) for norm in norms]).eval()


def arguments(folder: Path, kind: str, target: str = "gn") -> list[str]:
    given = ["convert", folder / "m.pt", "--to", target, "--format", kind, "-o", folder / KINDS[kind], "--overwrite"]
    reports = [part for name in REPORTS for part in ("--report", folder / name)]
    return [str(part) for part in [*given, *reports, "--quiet"]]


def start(folder: Path, kind: str) -> int:
    """The command in a fork, whose output goes to the file `said`; gives its process id, once it answers signals."""
    ready, tell = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        assert os.read(ready, 1) == b"!"
        os.close(ready)
        return child
    try:
        said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(said), "w", buffering=1) for _ in range(2))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # where it is ignored, as in a background
        signals.end_on_signals()
        os.write(tell, b"!")
        sys.argv = ["normswap", *arguments(folder, kind)]
        commands.main()
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 0)
    except BaseException:
        traceback.print_exc()
    os._exit(70)


def tensors(path: Path) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in reading.read_checkpoint(path).content.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Runs:
    """Runs of one kind in a folder: what is to be there before and after each, and how long one takes."""

    def __init__(self, folder: Path, kind: str):
        folder.mkdir()
        self.folder, self.kind, self.out = folder, kind, folder / KINDS[kind]
        torch.save(net().state_dict(), folder / "m.pt")
        self.states: dict[str, dict[str, Tensor]] = {}
        for target in ("gn", "ln"):
            self.convert(target)
            self.states[target] = tensors(self.out)
        assert not equal(*self.states.values())
        self.names = {"m.pt", "said", self.out.name, *REPORTS}
        begun = time.monotonic()
        assert os.waitpid(start(folder, kind), 0)[1] == 0, (folder / "said").read_text()
        self.took = time.monotonic() - begun

    def convert(self, target: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            files = [self.folder / name for name in REPORTS]
            normswap.convert_file(
                self.folder / "m.pt", target, self.out, format=self.kind, overwrite=True, reports=files
            )

    def stop(self, number: int, after: float) -> tuple[str, list[str]]:
        """One run on the output of another, which a signal meets after so many seconds: its end, and what is wrong."""
        self.convert("ln")
        old = [(self.folder / name).read_bytes() for name in REPORTS]
        child = start(self.folder, self.kind)
        time.sleep(after)
        os.kill(child, number)
        status = os.waitpid(child, 0)[1]
        code, said = os.waitstatus_to_exitcode(status), (self.folder / "said").read_text()
        ended = -number if number == signal.SIGKILL else 128 + number
        found = tensors(self.out)
        replaced = not equal(found, self.states["ln"])
        reports = [(self.folder / name).read_bytes() != was for name, was in zip(REPORTS, old, strict=True)]
        litter = set(os.listdir(self.folder)) - self.names
        wrong = []
        if replaced and not equal(found, self.states["gn"]):
            wrong.append("the output is torn")
        if code not in (0, ended):
            wrong.append(f"ended with {code}")
        if "Traceback" in said or said.count("\n") > 1:
            wrong.append(f"said {said[-300:]!r}")
        if number != signal.SIGKILL and set(reports) != {replaced}:
            wrong.append(f"of the model and the reports some were replaced: {replaced}, {reports}")
        if number != signal.SIGKILL and litter:
            wrong.append(f"left {litter}")
        self.convert("ln")
        if stays := set(os.listdir(self.folder)) - self.names:
            wrong.append(f"the next run did not remove {stays}")
        end = "done" if code == 0 else f"{signal.Signals(number).name}{', something left' if litter else ''}"
        return end, [f"{self.kind}, {signal.Signals(number).name} after {after:.4f} s: {what}" for what in wrong]


def stop_many(folder: Path, kind: str, count: int) -> tuple[Counter[str], list[str]]:
    """`count` runs, each stopped at a random moment: how they ended, and what was wrong."""
    runs, moments = Runs(folder, kind), random.Random(kind)
    ends: Counter[str] = Counter()
    wrong = []
    for i in range(count):
        end, problems = runs.stop(KNOWN[i % len(KNOWN)], moments.uniform(0, runs.took))
        ends[end] += 1
        wrong += problems
    return ends, wrong


@pytest.mark.parametrize("kind", KINDS)
def test_signals_at_random_moments(kind: str, tmp_path: Path) -> None:
    ends, wrong = stop_many(tmp_path / kind, kind, SIGNALS // len(KINDS))
    assert not wrong, "\n".join(wrong)
    assert set(ends) - {"done"}, "no run was stopped"


@pytest.mark.parametrize("seconds", [0.1, 0.6])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_torch_is_imported(number: int, seconds: float, tmp_path: Path) -> None:
    """The whole command, from the start of Python: one line or none, and no traceback."""
    torch.save(net().state_dict(), tmp_path / "m.pt")
    marked = "import sys, runpy; from normswap import signals; r = signals.end_on_signals\n"
    marked += "def told(): r(); print('ready', flush=True)\n"
    marked += "signals.end_on_signals = told; import normswap.cli; normswap.cli.end_on_signals = told\n"
    marked += f"sys.argv = ['normswap', *{arguments(tmp_path, 'pt')!r}]; normswap.cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", marked], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and said == f"stopped by {signal.Signals(number).name}\n", said
    assert os.listdir(tmp_path) == ["m.pt"]


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As SIGHUP under nohup, and SIGINT in the background of a script; SIGTERM ends the run all the same."""
    code = "import signal; from normswap.signals import end_on_signals; end_on_signals()\n"
    code += "signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGHUP); print('goes on', flush=True)\n"
    code += "signal.raise_signal(signal.SIGTERM)"
    ignored = "trap '' INT HUP; exec \"$@\""
    done = subprocess.run(["sh", "-c", ignored, "sh", sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "goes on\n", "stopped by SIGTERM\n")


if __name__ == "__main__":
    import tempfile

    asked = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as top:
        for kind in KINDS:
            ends, wrong = stop_many(Path(top) / kind, kind, -(-asked // len(KINDS)))
            print(kind, dict(ends), *wrong, sep="\n  ", flush=True)
