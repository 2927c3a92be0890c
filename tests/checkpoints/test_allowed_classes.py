"""Which classes a file may hold: plain data always, people's own as they are allowed, by name or by pattern."""

import argparse
import collections
import datetime
import decimal
import pathlib
import shlex
import sys
import time
import types
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers import foreign_classes as theirs
from helpers.nets import X, resnet
from helpers.torch_versions import skip_where_torch_cannot
from torch import nn

import normswap
from normswap import FileError, UnsafeFileError
from normswap.checkpoints.allowed_classes import parse_allowance, refusal
from normswap.checkpoints.pickle_files import read_pickle

DATA: dict[str, Any] = {
    "defaultdict": collections.defaultdict(list, {"loss": [0.5], "steps": [1, 2]}),
    "defaultdict of numbers": collections.defaultdict(float, a=1.0),
    "defaultdict without": collections.defaultdict(None, a=1),
    "deque": collections.deque([0.5, 0.25], maxlen=8),
    "Counter": collections.Counter("abca"),
    "OrderedDict": collections.OrderedDict(a=1),
    "datetime": datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
    "datetime with a zone": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
    "utc": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC) if sys.version_info >= (3, 11) else None,
    "date": datetime.date(2026, 1, 2),
    "time": datetime.time(3, 4),
    "timedelta": datetime.timedelta(1, 2, 3),
    "Path": Path("runs/best"),
    "PurePosixPath": pathlib.PurePosixPath("runs"),
    "PureWindowsPath": pathlib.PureWindowsPath("c:/runs"),
    "Namespace": argparse.Namespace(lr=0.1, opt=argparse.Namespace(name="sgd")),
    "SimpleNamespace": types.SimpleNamespace(lr=0.1),
    "set": {1, 2},
    "frozenset": frozenset({1, 2}),
    "Decimal": decimal.Decimal("0.1"),
    "UUID": uuid.UUID(int=7),
    "slice": slice(1, 3),
    "version of torch": torch.__version__,
    "struct_time": time.gmtime(0),
    "Ellipsis": ...,
    "complex": 1 + 2j,
    **{f"numpy {kind.__name__}": kind(1) for kind in (numpy.float64, numpy.float16, numpy.int8, numpy.uint64)},
    "numpy bool": numpy.bool_(True),
    "numpy complex64": numpy.complex64(1j),
}


@pytest.mark.parametrize("kind", DATA)
def test_plain_data_is_read_and_written_again(tmp_path: Path, kind: str) -> None:
    skip_where_torch_cannot(kind)
    value = DATA[kind]
    torch.save({"model": resnet().state_dict(), "held": value, "deeper": [{"in": (value,)}]}, tmp_path / "run.pt")
    normswap.convert_file(tmp_path / "run.pt", "gn")
    got = torch.load(tmp_path / "run.gn.pt", weights_only=False)
    for found in (got["held"], got["deeper"][0]["in"][0]):
        assert type(found) is type(value) and found == value
        assert getattr(found, "default_factory", None) is getattr(value, "default_factory", None)
        assert getattr(found, "maxlen", None) == getattr(value, "maxlen", None)


def test_a_path_of_windows_is_read_elsewhere(tmp_path: Path) -> None:
    class Elsewhere:
        def __reduce__(self) -> tuple[Any, ...]:
            return pathlib.WindowsPath, ("c:/", "runs")

    torch.save({"model": resnet().state_dict(), "path": Elsewhere()}, tmp_path / "run.pt")
    normswap.convert_file(tmp_path / "run.pt", "gn")
    got = torch.load(tmp_path / "run.gn.pt", weights_only=False)
    assert got["path"] == pathlib.PureWindowsPath("c:/runs")


def test_a_version_is_made_of_text_alone(tmp_path: Path) -> None:
    class Version:
        def __reduce__(self) -> tuple[Any, ...]:
            return type(torch.__version__), ([1, 2],)

    torch.save({"model": resnet().state_dict(), "version": Version()}, tmp_path / "run.pt")
    with pytest.raises(UnsafeFileError, match="it has a version of torch that is no text"):
        normswap.load(tmp_path / "run.pt", model=resnet)


def test_reading_changes_nothing_of_torchs(tmp_path: Path) -> None:
    from torch._weights_only_unpickler import Unpickler

    before = dict(vars(Unpickler)), nn.Module.__init__, {*torch.serialization.get_safe_globals()}
    data = {"a": DATA["Decimal"], "b": DATA["defaultdict"]}
    torch.save(data, tmp_path / "run.pt")
    assert read_pickle(tmp_path / "run.pt") == data
    torch.save({"a": argparse.ArgumentParser}, tmp_path / "no.pt")
    with pytest.raises(UnsafeFileError):
        read_pickle(tmp_path / "no.pt")
    assert (dict(vars(Unpickler)), nn.Module.__init__, {*torch.serialization.get_safe_globals()}) == before


# ---- people's own classes ----

NAMES = [f"helpers.foreign_classes.{name}" for name in ("Act", "Config", "Kind", "Net")]


@pytest.mark.parametrize("protocol", [2, 4])
def test_all_refused_classes_are_named_at_once(tmp_path: Path, protocol: int) -> None:
    """With a line to paste, which is enough; so is a pattern, and so are the classes themselves."""
    content = {"model": theirs.Net().eval(), "config": theirs.Config(1), "kind": theirs.Kind.ONE}
    torch.save(content, tmp_path / "run.pt", pickle_protocol=protocol)
    with pytest.raises(UnsafeFileError, match="holds 4 classes that are not of torch") as caught:
        normswap.load(tmp_path / "run.pt")
    line = " ".join(f"--allow {name}" for name in NAMES)
    assert f"allow it: {line} (in Python: allow={NAMES});" in str(caught.value)
    classes = [theirs.Act, theirs.Config, theirs.Kind, theirs.Net]
    for allow in (NAMES, classes, ["helpers.foreign_classes.*"], "helpers.*", ["helpers.*.[A-M]*", NAMES[3]]):
        assert torch.equal(normswap.load(tmp_path / "run.pt", allow=allow)(X), content["model"](X))
        report = normswap.convert_file(tmp_path / "run.pt", "gn", overwrite=True, allow=allow)
        assert report.totals.norms_changed == 1
    assert isinstance(normswap.load(tmp_path / "run.gn.pt", allow="helpers.*").norm, nn.GroupNorm)


def test_of_many_classes_the_packages_are_named() -> None:
    names = [f"theirs.models.block.Block{n}" for n in range(30)] + ["other.Config"]
    message = str(refusal(names, parse_allowance(["other.*"], Path()), Path("x.pt")))
    assert "holds 31 classes" in message and "; they are theirs.models.block.Block0, " in message
    assert (
        "allow it: --allow 'theirs.*' --allow other.Config (in Python: allow=['theirs.*', 'other.Config'])" in message
    )


@pytest.mark.parametrize("name", theirs.PLAIN)
def test_a_pattern_allows_plain_data(tmp_path: Path, name: str) -> None:
    torch.save({"model": theirs.Net(), "held": theirs.PLAIN[name]}, tmp_path / "run.pt")
    theirs.RAN.clear()
    normswap.convert_file(tmp_path / "run.pt", "gn", allow=["helpers.foreign_classes.*"])
    assert theirs.RAN == []
    held = torch.load(tmp_path / "run.gn.pt", weights_only=False)["held"]
    assert held == theirs.PLAIN[name] and type(held) is type(theirs.PLAIN[name])


@pytest.mark.parametrize("name", theirs.WITH_CODE)
def test_a_pattern_allows_no_code(tmp_path: Path, name: str) -> None:
    """Neither a class that runs some while it is restored nor a function: these have to be allowed by name."""
    torch.save({"model": theirs.Net(), "held": theirs.WITH_CODE[name]}, tmp_path / "run.pt")
    theirs.RAN.clear()
    with pytest.raises(UnsafeFileError, match=rf"a pattern allows modules and plain data alone: .*{name} is neither"):
        normswap.load(tmp_path / "run.pt", allow=["helpers.*"])
    assert theirs.RAN == []
    exact = f"helpers.foreign_classes.{name}"
    assert isinstance(normswap.load(tmp_path / "run.pt", allow=["helpers.*", exact]), theirs.Net)


def rewritten(path: Path, name: str) -> Path:
    """A file that asks for the object called `name`."""
    torch.save({"x": types.SimpleNamespace()}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file, data in entries.items():
            archive.writestr(file, data.replace(b"types\nSimpleNamespace", name.replace(":", "\n").encode()))
    return path


@pytest.mark.parametrize(
    "name", ["subprocess:Popen", "ArgumentParser", "Net.forward", "RAN", "nn:Module", "typing:Any", "__spec__", "Any"]
)
def test_a_pattern_allows_nothing_that_a_module_has_imported(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.rpartition(":")
    full = f"helpers.foreign_classes{'.' * bool(module)}{module}:{attribute}"
    with pytest.raises(FileError, match="is neither|cannot be imported|holds "):
        normswap.load(rewritten(tmp_path / "run.pt", full), allow=["helpers.*"])


def test_a_pattern_is_of_one_package(tmp_path: Path) -> None:
    torch.save(theirs.Net(), tmp_path / "run.pt")
    for pattern in ("*", "*.Net", "help*.foreign_classes.Net", "[a-z]*.foreign_classes.Net"):
        with pytest.raises(FileError, match="a pattern begins with the name of a package"):
            normswap.load(tmp_path / "run.pt", allow=[pattern])
    for pattern in ("helpers.other.*", "torch.*", "helpers.foreign_classes.[A]*"):
        with pytest.raises(UnsafeFileError, match="holds .*Net"):
            normswap.load(tmp_path / "run.pt", allow=[pattern])
    main = tmp_path / "theirs_with_main"
    main.mkdir()
    (main / "__init__.py").touch()
    (main / "__main__.py").write_text("raise SystemExit('it ran')")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(UnsafeFileError, match=r"holds theirs_with_main.__main__.Act"):
            normswap.load(rewritten(tmp_path / "run.pt", "theirs_with_main.__main__:Act"), allow=["theirs_with_main.*"])
    finally:
        sys.path.remove(str(tmp_path))


def test_what_is_to_be_pasted_is_quoted_and_no_command(tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError) as caught:
        normswap.load(rewritten(tmp_path / "run.pt", "a.b; rm -rf ~:C"))
    assert f"--allow {shlex.quote('a.b; rm -rf ~.C')} (in" in str(caught.value)
    with pytest.raises(UnsafeFileError, match=r"holds posix\.system, which is loaded only with --trust$"):
        normswap.load(rewritten(tmp_path / "run.pt", "posix:system"))


@pytest.mark.parametrize("name", ["builtins:str", "builtins:list", "torch:FloatTensor", "numpy:ndarray"])
def test_what_is_only_named_is_not_called(tmp_path: Path, name: str) -> None:
    call = f"it calls {name.partition(':')[2]}\\(\\.\\.\\.\\)"
    with pytest.raises(UnsafeFileError, match=f"is not what torch.save makes of a model: {call}"):
        normswap.load(rewritten(tmp_path / "run.pt", name))


@pytest.mark.parametrize("name", ["builtins:eval", "builtins:range", "builtins:getattr", "types:CodeType"])
def test_what_runs_code_or_fills_memory_is_no_plain_data(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeFileError, match=f"holds {name.replace(':', '.')}, which is not"):
        normswap.load(rewritten(tmp_path / "run.pt", name))
