"""What is written is opened again: what lacks something replaces nothing, and what is whole is no false alarm."""

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.checkpoints import distributed_folders, reading_back, safetensors_files, writing
from normswap.checkpoints.checkpoint import Checkpoint


class Colour(Enum):
    RED = 1


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.Linear(2, 2))).eval()


def without(content: Any) -> Any:
    """`content` with one name less, which a reader would only miss later."""
    if isinstance(content, nn.Module):
        content = copy.deepcopy(content)
        del content[2]._modules["0"]
        return content
    return dict(list(content.items())[:-1])


WRITERS = {
    "pt": (torch, "save"), "safetensors": (safetensors_files, "write_safetensors"),
    "dcp": (distributed_folders, "write_distributed"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("whole", [True, False], ids=["module", "state dict"])
def test_a_name_less_is_noticed(kind: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old output stays, bit by bit, and nothing else is left."""
    found, out = Checkpoint(tmp_path / "in", "pt", net() if whole else net().state_dict()), tmp_path / "out"
    writing.write_checkpoint(found, out, kind, overwrite=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    owner, name = WRITERS[kind]
    write = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda content, *rest: write(without(content), *rest))
    with pytest.raises(normswap.FileError, match="cannot be read again"):
        writing.write_checkpoint(found, out, kind, overwrite=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_shortened_file_is_noticed(kind: str, tmp_path: Path) -> None:
    content, path = net().state_dict(), tmp_path / "m"
    writing.write_checkpoint(Checkpoint(path, "pt", content), path, kind, overwrite=False)
    safetensors = partial(reading_back.check_safetensors, metadata={"format": "pt"})
    check = reading_back.check_pickle if kind == "pt" else safetensors
    check(path, content)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(normswap.FileError, match="nothing was replaced"), reading_back.readable_again(path):
        check(path, content)


def test_whatever_a_checkpoint_holds_is_no_false_alarm(tmp_path: Path) -> None:
    model = net()
    model.act, model.extra = partial(torch.relu), {"a": {1, 2}, "b": deque([1])}
    model.again = model[0]
    held = {
        "state_dict": OrderedDict(model.state_dict()), "model": model, "count": Counter("aab"), "ints": {1: {"x": 2}},
        "default": defaultdict(list, a=[1]), "enum": {Colour.RED: Colour.RED, "x": (1, [2, {"y": None}])},
        "optimizer": torch.optim.Adam(model.parameters()).state_dict(), "numbers": [torch.ones(2)] * 2, "\ud800": 1,
        "array": torch.arange(3).numpy(), "size": torch.Size([1, 2]),
        "graph": torch.fx.symbolic_trace(model), "frozen": frozenset({"a"}), "bytes": bytearray(b"x"), "big": 10**50,
    }  # fmt: skip
    held["itself"] = held["enum"]
    torch.save(held, tmp_path / "x.pt")
    reading_back.check_pickle(tmp_path / "x.pt", held)
