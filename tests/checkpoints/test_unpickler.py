"""The reader of pickles goes from block to block of its file, and stops where the pickle does."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from normswap.checkpoints.allowed_calls import row_of
from normswap.checkpoints.pickle_claims import Claims
from normswap.checkpoints.pickle_files import read_pickle
from normswap.checkpoints.unpickler import Unpickler

BLOCK = 1 << 16
AFTER = b"what comes behind"


def read(stream: io.BytesIO) -> Any:
    return Unpickler(stream, Claims(1 << 30, 1 << 30), row_of).load()


def values() -> list[Any]:
    """Of each kind that has an instruction of its own, some of them met again."""
    shared = ("shared", b"bytes", "é" * 300)
    numbers = [0, 255, 256, -1, 1 << 40, 0.5, None, True, False]
    tuples = [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), shared]
    return [*numbers, *tuples, [shared], {"key": shared}, {1: 2, 3: 4}, {1, 2}, frozenset({3})]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_instructions_may_lie_across_the_ends_of_blocks(protocol: int) -> None:
    for filling in range(150):
        made = ["x" * (BLOCK - 200 - filling), *values(), *values()]
        stream = io.BytesIO(pickle.dumps(made, protocol) + AFTER)
        assert read(stream) == made
        assert stream.read() == AFTER


def test_names_may_lie_across_the_ends_of_blocks() -> None:
    for filling in range(60):
        data = b"\x80\x02(X" + (BLOCK - 30 - filling).to_bytes(4, "little") + b"x" * (BLOCK - 30 - filling)
        _, ordered = read(io.BytesIO(data + b"ccollections\nOrderedDict\n)Rt."))
        assert ordered == {}


@pytest.mark.parametrize("size", [3, BLOCK - 2, 3 * BLOCK])
def test_a_pickle_without_an_end_is_told(size: int) -> None:
    with pytest.raises(EOFError, match="has no end"):
        read(io.BytesIO(b"\x80\x02" + b"N" * size))


def test_an_old_file_of_many_blocks_comes_back(tmp_path: Path) -> None:
    state = {f"layer.{number}.weight": torch.full((2,), float(number)) for number in range(3000)}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    got = read_pickle(tmp_path / "old.pt")
    assert list(got) == list(state) and all(torch.equal(got[key], state[key]) for key in state)
