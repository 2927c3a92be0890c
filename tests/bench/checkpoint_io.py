"""Time and peak memory of converting a large checkpoint, beside a bare script that loads and saves it.

Run: python tests/bench/checkpoint_io.py [--json] [--megabytes 2048] [--folder FOLDER]. Each row is one process, run in
turn, in the same folder: `normswap convert` against `torch.load` and `torch.save` (or the library's pair for
safetensors and distributed checkpoints). Peaks are above the floor, the peak of a process that only imports the
libraries. For a distributed checkpoint the largest shard is the measure.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import PEAK, Row, main
from torch import nn

IMPORTS = "import torch, torchvision, safetensors.torch, torch.distributed.checkpoint as dcp\n"
BARE = {
    "pt": "torch.save(torch.load('big.pt'), 'bare.pt')",
    "safetensors": "safetensors.torch.save_file(safetensors.torch.load_file('big.safetensors'), 'bare.safetensors')",
    "dcp": (
        "sizes = dcp.FileSystemReader('big').read_metadata().state_dict_metadata.items()\n"
        "state = {k: torch.empty(m.size) for k, m in sizes}\n"
        "dcp.load(state, checkpoint_id='big'); dcp.save(state, checkpoint_id='bare')"
    ),
}
OURS = (
    "import sys; sys.path.insert(0, '.'); import normswap\n"
    "normswap.convert_file('{name}', '{target}', '{out}', model={model})"
)
BLOCK = 512  # channels: a block of a 3×3 convolution and its norm is 9.4 MB


def make(blocks: int = 200) -> nn.Module:
    """Convolutions with a norm behind each."""
    layers = [nn.Sequential(nn.Conv2d(BLOCK, BLOCK, 3, bias=False), nn.BatchNorm2d(BLOCK)) for _ in range(blocks)]
    return nn.Sequential(*layers)


def fill(folder: Path, megabytes: int) -> int:
    """Write the checkpoints; returns the size of the largest shard of the distributed one, in bytes."""
    import safetensors.torch
    import torch.distributed.checkpoint as dcp

    blocks = max(1, round(megabytes * 2**20 / (BLOCK * BLOCK * 9 * 4)))
    state = make(blocks).state_dict()
    torch.save(state, folder / "big.pt")
    safetensors.torch.save_file(state, folder / "big.safetensors")
    writer = dcp.FileSystemWriter(folder / "big", single_file_per_rank=True, thread_count=4)
    dcp.save(state, storage_writer=writer)
    (folder / "net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        f"    return nn.Sequential(*(nn.Sequential(nn.Conv2d({BLOCK}, {BLOCK}, 3, bias=False), nn.BatchNorm2d({BLOCK}))"
        f" for _ in range({blocks})))\n"
    )
    return max(file.stat().st_size for file in (folder / "big").glob("*.distcp"))


def run(code: str, folder: Path) -> tuple[float, int]:
    """Seconds and peak bytes of a process that runs `code`."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTS + code + PEAK], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - start, int(done.stdout.split()[-1]) * 1024


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        shard = fill(folder, arguments.megabytes)
        _, floor = run("", folder)
        for kind, name in (("pt", "big.pt"), ("safetensors", "big.safetensors"), ("dcp", "big")):
            bare_time, bare_peak = min(run(BARE[kind], folder) for _ in range(arguments.rounds))
            for target, model in (("gn", None), ("gn-ws", "net.py:make"), ("fold", "net.py:make")):
                out = f"out.{kind}.{target}" + Path(name).suffix
                code = OURS.format(name=name, target=target, out=out, model=repr(model))
                results = []
                for _ in range(arguments.rounds):
                    shutil.rmtree(folder / out, ignore_errors=True)
                    (folder / out).unlink(missing_ok=True)
                    results.append(run(code, folder))
                taken, peak = min(results)
                yield {
                    "kind": kind, "target": target, "bare s": bare_time, "ours s": taken, "times": taken / bare_time,
                    "bare peak MB": (bare_peak - floor) / 2**20, "ours MB": (peak - floor) / 2**20,
                    "of bare": (peak - floor) / (bare_peak - floor),
                    "of largest shard": (peak - floor) / shard if kind == "dcp" else "",
                }  # fmt: skip
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(__doc__, measure, megabytes=2048, folder=None, rounds=1)
