"""Damages small good checkpoints at random: each must be refused by name, or give a right result, and leave no litter.

    python tests/threats/mutate.py 10000 [FIRST]

Each mutation has a number, and is the same whenever it is made: FIRST repeats one that failed.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from make import _distributed, _safetensors, _tensors, net, saved, state, training
from sandbox import in_sandbox
from tally import print_problems
from torch import nn

import normswap

Mutator = Callable[[bytearray, random.Random], None]


def flip(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 2, 8))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def overwrite(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    data[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, *b"(}]).RbuscXKJMNqrh\x85\x86\x87\x88", chance.randrange(256)))


def truncate(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def swap(data: bytearray, chance: random.Random) -> None:
    size = chance.randrange(1, 64)
    one, other = (chance.randrange(max(1, len(data) - size)) for _ in range(2))
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]


def insert(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    data[at:at] = chance.choice((chance.randbytes(chance.randrange(1, 32)), bytes(data[at : at + 32])))


def delete(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    del data[at : at + chance.randrange(1, 64)]


MUTATORS: tuple[Mutator, ...] = (flip, flip, overwrite, truncate, swap, insert, delete)


def _pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return archive.read(name)


def _with_pickle(path: Path, data: bytes) -> None:
    """Exchange the pickle in an archive, its checksum included."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, data if name.endswith("data.pkl") else part)


def _good(folder: Path, kind: str) -> tuple[Path, Path]:
    """A good checkpoint of a kind, and the file in it to damage."""
    kind = kind.removesuffix(" pickle")
    if kind == "safetensors":
        path = _safetensors(folder / "good.safetensors", *_tensors({"format": "pt"}))
    elif kind == "distributed":
        path = _distributed(folder)
        return path, path / ".metadata"
    else:
        made = {"state dict": state, "training": training, "module": net, "old": state, "old training": training}
        path = saved(made[kind](), folder / "good.pt", zipped=not kind.startswith("old"))
    return path, path


KINDS = (
    "state dict", "training", "module", "safetensors", "old", "old training", "state dict pickle", "training pickle",
    "module pickle", "distributed",
)  # fmt: skip


def _damaged(file: Path, kind: str, number: int) -> None:
    chance = random.Random(number)
    pickled = kind.endswith(" pickle")
    data = bytearray(_pickle_of(file) if pickled else file.read_bytes())
    chance.choice(MUTATORS)(data, chance)
    if pickled:
        _with_pickle(file, bytes(data))
    else:
        file.write_bytes(data)


def _listing(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*")}


def _tries(path: Path) -> Iterator[str]:
    """What is wrong with each call's answer."""
    for call in ("load", "load with model"):
        try:
            model = normswap.load(path, model=net if "model" in call else None)
        except normswap.NormswapError as error:
            if "\n" in str(error) or path.name not in str(error):
                yield f"{call}: the message is not one line that names the file: {str(error)[:200]!r}"
        except BaseException as error:
            yield f"{call}: {_last(error)}"
        else:
            if not isinstance(model, nn.Module):
                yield f"{call}: gave a {type(model).__name__}"
    before = _listing(path.parent)
    out = path.with_name(f"{path.stem}.gn{path.suffix}")
    try:
        normswap.convert_file(path, "gn")
    except normswap.NormswapError as error:
        if _listing(path.parent) != before:
            yield f"convert: left litter: {sorted(_listing(path.parent).keys() - before.keys())}"
        if "\n" in str(error) or path.name not in str(error):
            yield f"convert: the message is not one line that names the file: {str(error)[:200]!r}"
    except BaseException as error:
        yield f"convert: {_last(error)}"
        if _listing(path.parent) != before:
            yield f"convert: left litter: {sorted(_listing(path.parent).keys() - before.keys())}"
    else:
        try:
            normswap.load(out, model=net)
        except normswap.NormswapError:
            pass  # what was wrong and did not concern the conversion is wrong still
        except BaseException as error:
            yield f"load of the output: {_last(error)}"


def _last(error: BaseException) -> str:
    """An error that is not ours, with the place in normswap that it came through."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/normswap/" in frame.filename]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    return f"{type(error).__name__} at {place}: {str(error).splitlines()[0][:150] if str(error) else ''}"


def failures(first: int, count: int) -> list[str]:
    """What went wrong in the mutations `first` to `first + count`, each in a sandbox that survives a crash."""
    found: list[str] = []
    number, end = first, first + count
    with tempfile.TemporaryDirectory() as folder:
        goods = {}
        for kind in KINDS:
            place = Path(folder, kind.replace(" ", "_"))
            place.mkdir()
            goods[kind] = _good(place, kind)
        while number < end:

            def work(report: Callable[[object], None]) -> None:
                warnings.simplefilter("ignore")
                for index in range(number, end):  # noqa: B023
                    kind = KINDS[index % len(KINDS)]
                    path, file = goods[kind]
                    keep = file.read_bytes()
                    _damaged(file, kind, index)
                    report((index, [f"{index} ({kind}): {problem}" for problem in _tries(path)]))
                    file.write_bytes(keep)
                    for other in path.parent.iterdir():
                        if other != path:
                            _remove(other)

            reports, end_of_it = in_sandbox(work, seconds=20)
            found += [problem for _, problems in reports for problem in problems]
            number = max((index for index, _ in reports), default=number - 1) + 1
            if end_of_it:
                found.append(f"{number} ({KINDS[number % len(KINDS)]}): {end_of_it}")
                kind = KINDS[number % len(KINDS)]
                for left in goods[kind][0].parent.iterdir():
                    _remove(left)
                goods[kind] = _good(goods[kind][0].parent, kind)
                number += 1
    return found


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def main() -> int:
    """Run as many mutations as are asked for, and print what went wrong, like with like."""
    torch.set_num_threads(1)
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    return print_problems(failures(first, count), f"{count} mutations")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
