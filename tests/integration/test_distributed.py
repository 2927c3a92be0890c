"""Two processes: data parallel, sharded, filled from a distributed checkpoint after meta, calibrated together."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from on_two_processes import TARGETS, data, one_step, pictures, sharded, trained
from torch import Tensor, nn

import normswap

SCRIPT = Path(__file__).parent / "on_two_processes.py"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("two")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process writes a distributed checkpoint is meant
        dcp.save(trained().state_dict(), checkpoint_id=folder / "trained")
    for target in TARGETS:
        normswap.convert_file(folder / "trained", target, folder / f"converted.{target}", model=type(trained()))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_same(given: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: float) -> None:
    assert list(given) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(given[name], value, **tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_steps_equal_those_of_one_process(both: list[dict[str, Any]], engine: str, target: str) -> None:
    """Each process had half of the batch, and no norm but batch norm cares."""
    alone = normswap.convert(trained(), target).model
    before = {name: value.clone() for name, value in alone.state_dict().items()}
    one_step(alone, *data())
    assert any(not torch.equal(before[name], value) for name, value in alone.state_dict().items())
    for found in both:
        assert_same(found[f"{engine} {target}"], alone.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_converted_on_meta_and_filled_from_a_distributed_checkpoint(both: list[dict[str, Any]], target: str) -> None:
    wanted = normswap.convert(trained(), target).model.state_dict()
    for found in both:
        assert_same(found[f"meta {target}"], wanted)


@pytest.mark.parametrize("target", ["gn", "bn"])
def test_measured_together_as_by_one_process(both: list[dict[str, Any]], target: str) -> None:
    source: nn.Module = trained() if target == "gn" else normswap.convert(trained(), "gn", groups=2).model
    alone = normswap.convert(source, target, calibrate=pictures(), calibrate_seconds=0).model
    half = normswap.convert(source, target, calibrate=pictures()[::2], calibrate_seconds=0).model
    for found in both:
        assert_same(found[f"measured {target}"], alone.state_dict(), rtol=1e-5, atol=1e-6)
    if target == "bn":  # the check above can fail: half of the data says something else
        assert not torch.allclose(
            half.state_dict()["stem.1.running_mean"], alone.state_dict()["stem.1.running_mean"], rtol=1e-3
        )


def test_fitted_together(both: list[dict[str, Any]]) -> None:
    """All processes have the same values, and know of all the data."""
    first, second = both
    assert_same(first["fitted"], second["fitted"], rtol=0, atol=0)
    assert first["report"] == second["report"]
    assert first["report"]["samples"] == 64 and first["report"]["kept"] == "calibrated"
    options = {"ws": "strict", "calibrate": pictures(), "calibrate_seconds": 0}
    matched = normswap.convert(trained(), "gn-ws", **options).model.state_dict()
    assert not torch.allclose(first["fitted"]["block.1.weight"], matched["block.1.weight"], rtol=1e-3)


def test_a_wrapped_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(trained())
        with pytest.raises(normswap.ModelError, match="convert first, then wrap"):
            normswap.convert(wrapped, "gn")
        with pytest.raises(normswap.ModelError, match="convert first, .* then shard"):
            normswap.convert(sharded(trained()), "gn")
    finally:
        torch.distributed.destroy_process_group()
