"""The table that pickles are read by, and values that its makers give back as they were saved."""

import functools
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from normswap import FileError
from normswap.checkpoints.allowed_calls import DTYPE_ROW, TABLE, Row, row_of
from normswap.checkpoints.pickle_files import read_pickle

ROWS = {name: row for name in TABLE if isinstance(row := row_of(name), Row)} | {"dtypes": DTYPE_ROW}
ARRAYS = {
    "floats": numpy.arange(6.0).reshape(2, 3),
    "by columns": numpy.asfortranarray(numpy.arange(6, dtype="i4").reshape(2, 3)),
    "big-endian": numpy.arange(3, dtype=">f4"),
    "none": numpy.zeros((0, 5), "u1"),
    "without dimensions": numpy.array(2.5),
    "texts": numpy.array(["cat", "horse"]),
    "bytes": numpy.array([b"cat", b"horse"]),
    "complex": numpy.array([1j], "c16"),
    "generator": numpy.random.RandomState(0).get_state()[1],
}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_each_row_says_why_and_runs_our_own_code(name: str) -> None:
    row = ROWS[name]
    assert len(row.why) > 5
    for function in (row.call, row.new, row.build):
        made = function.func if isinstance(function, functools.partial) else function
        assert made is None or made.__module__.startswith("normswap.checkpoints.pickled_")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_come_back(tmp_path: Path, name: str, zipped: bool) -> None:
    torch.save({"x": ARRAYS[name]}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    got = read_pickle(tmp_path / "x.pt")["x"]
    assert got.dtype == ARRAYS[name].dtype.newbyteorder("=") and got.shape == ARRAYS[name].shape
    assert got.flags.f_contiguous == ARRAYS[name].flags.f_contiguous and (got == ARRAYS[name]).all()


def tensors() -> dict[str, Any]:
    """Tensors of every kind that is rebuilt in a way of its own, two of which share memory."""
    whole = torch.arange(6.0)
    with_attribute = torch.ones(2)
    with_attribute.tagged = "yes"  # type: ignore[attr-defined]
    return {
        "whole": whole, "part": whole[2:4], "turned": torch.ones(2, 3).t(), "none": torch.ones(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)), "sparse": torch.eye(3).to_sparse(),
        "rows": torch.eye(3).to_sparse_csr(), "conjugate": torch.tensor([1j]).conj(),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "attribute": with_attribute,
        "short": torch.ones(2, dtype=torch.uint16), "bytes": b"", "array": bytearray(b"ab"),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_tensors_come_back(tmp_path: Path, options: dict[str, Any]) -> None:
    held = tensors()
    if "_use_new_zipfile_serialization" in options:
        held.pop("short")  # which torch itself cannot read from its older format
    torch.save(held, tmp_path / "x.pt", **options)
    got, meant = read_pickle(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=False)
    for name, value in meant.items():
        assert type(got[name]) is type(value), name
        if isinstance(value, torch.Tensor):
            dense = [t.dequantize() if t.is_quantized else t.to_dense() for t in (got[name], value)]
            assert got[name].dtype == value.dtype and torch.equal(*dense), name
        else:
            assert got[name] == value
    assert got["attribute"].tagged == "yes"
    got["whole"][2] = 7
    assert got["part"][0] == 7


def test_bytes_that_the_file_lacks_are_missed(tmp_path: Path) -> None:
    torch.save({"x": ARRAYS["floats"]}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "x.pt").read_bytes()
    at = re.search(rb"K\x02K\x03\x86", data)
    assert at is not None
    (tmp_path / "x.pt").write_bytes(data[: at.start()] + b"K\x02K\x04\x86" + data[at.end() :])
    with pytest.raises(FileError, match="an array of numpy with other bytes than its shape says"):
        read_pickle(tmp_path / "x.pt")
