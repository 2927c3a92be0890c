"""Composes pickles at random out of what the table allows, and of what it does not: none does harm.

    python tests/threats/fuzz_pickles.py 100000 [FIRST]

Each program has a number, and is the same whenever it is made: FIRST repeats one that failed. A program is harmless if
reading it ends in a `NormswapError` or in objects of known classes, calls no Python function but those of the reader
and the few that restore a module, opens nothing but its file, and takes no more memory than ten times that.
"""

from __future__ import annotations

import os
import pickle
import random
import resource
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import torch
from make import named, text
from sandbox import in_sandbox
from tally import print_problems

from normswap import NormswapError
from normswap.checkpoints.allowed_calls import TABLE
from normswap.checkpoints.pickle_files import read_pickle

STORED = 1 << 12
"""Bytes in each of the two storages of an archive."""
NOISE = 8 << 20
"""Bytes that the process may take meanwhile for itself."""
MODULES = ("torch.nn.modules.conv.Conv2d", "torch.nn.modules.batchnorm.BatchNorm2d", "torch.nn.modules.rnn.LSTM",
           "torch.nn.modules.activation.MultiheadAttention", "torch.nn.modules.upsampling.Upsample",
           "torch.nn.modules.container.Sequential", "torch.ao.nn.quantized.modules.conv.Conv2d")  # fmt: skip
FORBIDDEN = ("os.system", "builtins.eval", "builtins.getattr", "builtins.range", "torch.load", "torch.hub.load",
             "numpy.load", "torch.nn.init.ones_", "operator.attrgetter", "normswap.convert")  # fmt: skip
NAMES = (*TABLE, *MODULES)
CALLED = tuple(name for name, row in TABLE.items() if isinstance(row, tuple) or row.call or row.new)
HARMLESS_CODE = ("/normswap/checkpoints/", "/normswap/errors.py", "/pickle.py", "/zipfile", "/struct.py",
                 "/normswap/__init__.py", "/pathlib",
                 "/collections/", "/torch/storage.py", "/torch/_utils.py", "/torch/nn/parameter.py", "/uuid.py",
                 "/torch/serialization.py", "/torch/torch_version.py", "/packaging/", "/torch/sparse/", "/importlib",
                 "/enum.py", "/typing.py", "/torch/_tensor.py", "/functools.py", "/warnings.py", "/contextlib.py",
                 "/argparse.py", "/threading.py", "/codecs.py", "/decimal.py", "/fnmatch.py", "/datetime.py",
                 "/abc.py", "/_tensor_str.py", "/utf_8.py", "/torch/types.py", "/torch/_C/", "/_pydatetime.py",
                 "<frozen ", "/fuzz_pickles.py", "/pickletools.py", "<string>",
                 "/encodings/", "/shlex.py", "/_pytest/", "/pluggy/", "/normswap/printable.py",
                 "/_distutils_hack/", "/torch/_dynamo/")  # fmt: skip
RESTORING = {"__setstate__", "__getattr__", "__setattr__", "__hash__", "__delattr__", "__dir__"}
"""Functions of libraries that may run, in whatever file: they restore a module, and look at its parts."""
TRICKS = ("O8", "V9", "f8,f8")
KNOWN = ("builtins", "abc", "collections", "datetime", "decimal", "uuid", "time", "pathlib", "types", "argparse",
         "functools", "numpy", "torch", "numpy.dtypes", "torch.nn.parameter", "torch.storage", "torch.serialization",
         "torch.torch_version", "_codecs", "torch._C", "normswap.checkpoints.pickled_values",
         "normswap.checkpoints.pickled_arrays")  # fmt: skip


def number(value: int) -> bytes:
    """A whole number as a pickle holds it."""
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def global_of(name: str) -> bytes:
    """A global as a pickle holds it, by its full name."""
    module, _, attribute = name.rpartition(".")
    return named(module, attribute)


class Composer:
    """One program: a stack machine's instructions, most of which fit what is on the stack."""

    def __init__(self, seed: int):
        self.chance = random.Random(seed)
        self.memo = 0

    def program(self) -> bytes:
        """The whole pickle."""
        parts = b"".join(self.remembered(self.value(0)) for _ in range(self.chance.randrange(1, 6)))
        return self.damaged(b"\x80\x02(" + parts + b"t.")

    def damaged(self, data: bytes) -> bytes:
        """In one program of four, some instructions exchanged, cut or doubled."""
        made = bytearray(data)
        for _ in range(self.chance.choice((0, 0, 0, 1, 1, 3))):
            at, size = self.chance.randrange(2, max(len(made), 3)), self.chance.randrange(1, 12)
            how = self.chance.randrange(3)
            if how == 0 and at < len(made):
                made[at] = self.chance.choice(b"()]}tRbuesaQN0.h\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x94\x93")
            elif how == 1:
                del made[at : at + size]
            else:
                made[at:at] = made[at : at + size] * self.chance.choice((1, 2, 50))
        return bytes(made)

    def remembered(self, code: bytes) -> bytes:
        """A value that may be got again later, as `pickle` does for what is shared."""
        if self.chance.random() < 0.5:
            self.memo += 1
            return code + b"r" + struct.pack("<I", self.memo)
        return code

    def value(self, depth: int) -> bytes:
        """The code of any value."""
        if depth > 4 or self.chance.random() < 0.3:
            return self.leaf()
        makers = (self.call, self.call, self.call, self.tensor, self.array, self.container, self.shared, self.module)
        return self.remembered(self.chance.choice(makers)(depth + 1))

    def leaf(self) -> bytes:
        """A value without parts."""
        pick = self.chance.randrange(9)
        if pick == 0 and self.memo:
            return b"j" + struct.pack("<I", self.chance.randrange(1, self.memo + 1))
        if pick <= 2:
            return number(self.any_number())
        if pick == 3:
            return text(
                self.chance.choice(("latin1", "punycode", "f8", "O8", "V2000000000", "U5", "cpu", "x" * 200, "a"))
            )
        if pick == 4:
            return global_of(
                self.chance.choice(NAMES) if self.chance.random() < 0.95 else self.chance.choice(FORBIDDEN)
            )
        if pick == 5:
            return b"G" + struct.pack(">d", self.chance.choice((0.0, 1.5, -1e300, float("inf"), float("nan"))))
        return self.chance.choice((b"N", b"\x88", b"\x89", b")", b"]", b"}", b"U\x08AAAAAAAA", b"C\x04AAAA"))

    def any_number(self) -> int:
        """Small ones, and those at the ends of what machines count with."""
        return self.chance.choice(
            (0, 1, 2, 3, 8, 100, -1, 1 << 20, 1 << 31, (1 << 61) - 1, 1 << 62, 1 << 63, -(1 << 63))
        )

    def tuple_of(self, parts: list[bytes]) -> bytes:
        """A tuple of values."""
        return b"(" + b"".join(parts) + b"t"

    def call(self, depth: int) -> bytes:
        """A call of what may be called, with any arguments, and perhaps a state."""
        name = self.chance.choice(CALLED if self.chance.random() < 0.9 else NAMES)
        count = self.chance.choice((0, 1, 1, 2, 2, 3, 4, 7))
        how = self.chance.choice((b"R", b"R", b"\x81"))
        made = global_of(name) + self.tuple_of([self.value(depth) for _ in range(count)]) + how
        return made + self.value(depth) + b"b" if self.chance.random() < 0.2 else made

    def storage(self) -> bytes:
        """A persistent id: a storage of the archive, more or less right."""
        kind = global_of(self.chance.choice(("torch.FloatStorage", "torch.LongStorage", "torch.BoolStorage")))
        size = number(self.chance.choice((STORED // 8, STORED // 8, 1, 0, 1 << 40, -1)))
        parts = [text("storage"), kind, text(self.chance.choice("000000112")), text("cpu"), size]
        return self.tuple_of(parts) + b"Q"

    def sizes(self, depth: int) -> bytes:
        """A shape, most often a possible one."""
        if self.chance.random() < 0.1:
            return self.value(depth)
        count = self.chance.randrange(3)
        return self.tuple_of([number(self.chance.choice((1, 2, 4, self.any_number()))) for _ in range(count)])

    def tensor(self, depth: int) -> bytes:
        """A tensor of a storage, perhaps as a parameter, or with attributes."""
        start = number(self.chance.choice((0, 0, 0, 5, self.any_number())))
        hooks = global_of("collections.OrderedDict") + b")R"
        parts = [self.storage(), start, self.sizes(depth), self.sizes(depth), b"\x89", hooks]
        arguments, rebuild = self.tuple_of(parts), global_of("torch._utils._rebuild_tensor_v2")
        how = self.chance.randrange(4)
        if how == 0:
            made = self.tuple_of([rebuild + arguments + b"R", b"\x88", hooks])
            return global_of("torch._utils._rebuild_parameter") + made + b"R"
        if how == 1:
            function = self.chance.choice((rebuild, self.value(depth)))
            kind = global_of(self.chance.choice(("torch.Tensor", "torch.nn.parameter.Parameter", *NAMES)))
            parts = [function, kind, arguments, self.value(depth)]
            return global_of("torch._tensor._rebuild_from_type_v2") + self.tuple_of(parts) + b"R"
        return rebuild + arguments + b"R"

    def dtype(self, depth: int) -> bytes:
        """A dtype of numpy with its state."""
        name = self.chance.choice(("f8", "f8", "f4", "i8", "u1", "b1", "c16", "U5", "S3", *TRICKS))
        made = global_of("numpy.dtype") + self.tuple_of([text(name), b"\x89", b"\x88"]) + b"R"
        order = text(self.chance.choice(("<", "<", ">", "|", "=", "x")))
        inner = b"N" if self.chance.random() < 0.95 else self.tuple_of([self.leaf(), self.sizes(depth)])
        right = {"U5": (20, 4), "S3": (3, 1)}.get(name, (-1, -1)) if self.chance.random() < 0.95 else (8, 8)
        sizes = [*map(number, right), number(0 if self.chance.random() < 0.95 else 63)]
        return made + self.tuple_of([number(3), order, inner, b"N", b"N", *sizes]) + b"b"

    def array(self, depth: int) -> bytes:
        """An array or a scalar of numpy out of bytes."""
        length = self.chance.choice((1, 4, 8, 16, 80))
        data = global_of("_codecs.encode") + self.tuple_of([text("A" * length), text("latin1")]) + b"R"
        core = self.chance.choice(("core", "_core"))
        if self.chance.random() < 0.4:
            parts = self.tuple_of([self.dtype(depth), data])
            return global_of(f"numpy.{core}.multiarray.scalar") + parts + b"R"
        start = self.tuple_of([global_of("numpy.ndarray"), number(0) + b"\x85", data])
        shape = self.tuple_of([number(self.chance.choice((length, length // 8, self.any_number())))])
        state = self.tuple_of([number(1), shape, self.dtype(depth), b"\x89", data])
        return global_of(f"numpy.{core}.multiarray._reconstruct") + start + b"R" + state + b"b"

    def container(self, depth: int) -> bytes:
        """A list or a dict with entries, or entries put into what may be none."""
        values = [self.value(depth) for _ in range(2 * self.chance.randrange(3))]
        into = self.chance.choice((b"]", b"}", self.value(depth)))
        end = self.chance.choice((b"e", b"u", b"\x90"))
        return into + b"(" + b"".join(values) + end

    def shared(self, depth: int) -> bytes:
        """A value that holds itself many times over, which grows with each level."""
        code = self.value(depth)
        for _ in range(self.chance.choice((3, 30, 100))):
            self.memo += 1
            again = b"r" + struct.pack("<I", self.memo) + b"j" + struct.pack("<I", self.memo)
            code += again + b"\x86"
        how = self.chance.randrange(3)
        if how == 0:
            return b"}" + code + b"Ns"  # as a key, whose hash asks each of its parts
        return code if how == 1 else global_of(self.chance.choice(CALLED)) + code + b"\x85R"

    def module(self, depth: int) -> bytes:
        """A module without a constructor, with parts that are its own or any."""
        parts = [
            text(name) + (b"}" if self.chance.random() < 0.7 else self.value(depth))
            for name in ("_parameters", "_buffers", "_modules", "training")
        ]
        others = [
            text(name) + self.value(depth) for name in ("num_layers", "_all_weights") if self.chance.random() < 0.3
        ]
        state = b"}(" + b"".join(parts + others) + b"u"
        return global_of(self.chance.choice(MODULES)) + b")\x81" + self.chance.choice((state, self.value(depth))) + b"b"


def written(path: Path, data: bytes) -> None:
    """An archive around a pickle, with two storages."""
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/data.pkl", data)
        made.writestr("archive/byteorder", "little")
        for key in range(2):
            made.writestr(f"archive/data/{key}", bytes(STORED))


def kinds_in(value: Any) -> Iterator[type]:
    """The classes of all parts of what was read."""
    pending, seen = [value], set()
    while pending:
        part = pending.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield type(part)
        if isinstance(part, dict):
            pending += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple | set | frozenset):
            pending += list(part)
        elif isinstance(part, torch.nn.Module):
            pending += list(vars(part).values())


def harm(path: Path, size: int) -> str:
    """What is wrong with how a file was read; empty where nothing is."""
    strange: list[str] = []

    def watch(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name not in RESTORING and not any(p in code.co_filename for p in HARMLESS_CODE):
            strange.append(f"called {code.co_name} in {code.co_filename}")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.setprofile(watch)
    try:
        found = read_pickle(path)
    except NormswapError:
        found = None
    except BaseException as error:
        strange.append(f"raised {type(error).__name__}: {error}")
        found = None
    finally:
        sys.setprofile(None)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if taken > 10 * size + NOISE:
        strange.append(f"took {taken:,} bytes for a file of {size:,}")
    for kind in kinds_in(found):
        listed = f"{kind.__module__}.{kind.__qualname__}" in TABLE or kind.__module__ in KNOWN
        if not listed and not issubclass(kind, torch.nn.Module):
            strange.append(f"made a {kind.__module__}.{kind.__qualname__}")
    return "; ".join(dict.fromkeys(strange))


_EVENTS = ("os.", "subprocess.", "socket.", "exec", "compile", "shutil.", "ctypes.", "urllib.")


def run(numbers: range, report: Callable[[object], None]) -> None:
    """Read each of some programs, and report its number and what was wrong."""
    warnings.simplefilter("ignore")
    watched, events = [False], list[str]()

    def audit(event: str, arguments: Any) -> None:
        if watched[0] and event.startswith(_EVENTS) and event not in ("os.stat", "os.listdir", "os.scandir"):
            events.append(f"{event}{arguments!r:.200}")

    for name in (
        *NAMES,
        *FORBIDDEN,
        "encodings.cp437.getregentry",
    ):  # what is imported here is not imported while a program is watched
        module, _, attribute = name.rpartition(".")
        with suppress(ImportError, AttributeError):
            getattr(import_module(module), attribute)
    sys.addaudithook(audit)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.pt")
        for index in numbers:
            written(path, Composer(index).program())
            watched[0] = True
            problem = harm(path, path.stat().st_size)
            watched[0] = False
            report((index, "; ".join([problem, *events]).strip("; ") if problem or events else ""))
            events.clear()


def failures(first: int, count: int) -> tuple[list[str], int]:
    """What went wrong in the programs from `first`, and how many of them ran; a crash ends one alone."""
    found: list[str] = []
    start, end, ran = first, first + count, 0
    while start < end:
        part = range(start, min(end, start + 5000))
        reports, ended = in_sandbox(lambda report, part=part: run(part, report), seconds=20)
        done = [report for report in reports if isinstance(report, tuple)]
        found += [report for report in reports if isinstance(report, str)]
        found += [f"{index}: {problem}" for index, problem in done if problem]
        ran += len(done)
        start = (done[-1][0] + 1 if done else start) if ended or len(done) < len(part) else part.stop
        if ended:
            found.append(f"{start}: {ended}")
        if ended or len(done) < len(part):
            start += 1
    return found, ran


def main() -> int:
    """Run as many programs as are asked for, and print what went wrong, like with like."""
    torch.set_num_threads(1)
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    found, ran = failures(first, count)
    return print_problems(found, f"numpy {numpy.__version__}: {ran} programs")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
