"""Distributed checkpoints (`torch.distributed.checkpoint`): folders of shards, read and written by one process.

Tensors are gathered in scratch files that are mapped, not in memory; torch does the reading and the writing.
"""

import dataclasses
import inspect
import io
import math
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as descriptions
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from normswap.checkpoints.allowed_calls import Row, row_of
from normswap.checkpoints.contents import SavedBytes
from normswap.checkpoints.file_kinds import HEAD, text_problem
from normswap.checkpoints.mapped_memory import release, scratch_tensor
from normswap.checkpoints.pickle_claims import Claims, shown
from normswap.checkpoints.pickled_objects import blank, restore
from normswap.checkpoints.pickled_values import of_plain
from normswap.checkpoints.unpickler import UnknownName, Unpickler
from normswap.errors import FileError, UnsafeFileError, first_line

# "No processes but this one": newer torch needs to be told.
_ALONE: dict[str, Any] = {"no_dist": True} if "no_dist" in inspect.signature(save).parameters else {}  # torch >= 2.7
_LARGEST_CLAIM = 2  # times the bytes on disk that the tensors may claim: a shard can be compressed


def _restore_index(claims: Claims, made: Any, state: Any) -> None:
    """Give an index its text and numbers: it is a key of dicts, and what it holds is in its hash."""
    restore(claims, made, state)
    kinds = (("fqn", str), ("offset", torch.Size), ("index", int))
    if not all(type(vars(made).get(name)) in (kind, type(None)) for name, kind in kinds) or made.fqn is None:
        raise FileError("it has an index that names no tensor")


def _restore_properties(claims: Claims, made: Any, state: Any) -> None:
    """Give the properties of a tensor by torch's own code, which takes its five constants apart."""
    made.__setstate__(state)


def _rows() -> Iterator[tuple[str, Row]]:
    for kind in (descriptions.Metadata, descriptions.StorageMeta, descriptions.TensorStorageMetadata,
                 descriptions.BytesStorageMetadata, descriptions.ChunkStorageMetadata, _StorageInfo):  # fmt: skip
        yield (
            _named(kind),
            Row("describes what is in the folder; has no code", kind, new=partial(blank, kind), build=restore),
        )
    for described, build in {
        descriptions.MetadataIndex: _restore_index, descriptions.TensorProperties: _restore_properties,
    }.items():  # fmt: skip
        yield _named(described), Row("describes a tensor", described, new=partial(blank, described), build=build)
    memory: Any = descriptions._MEM_FORMAT_ENCODING
    yield _named(memory), Row("is a constant", memory, call=partial(of_plain, memory))


def _named(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__name__}"


_ROWS = dict(_rows())
_SHARED = ("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict", "builtins.set",
           "pathlib.PosixPath", "pathlib._local.PosixPath", "pathlib.WindowsPath")  # fmt: skip


def _row_of(name: str) -> Row | None:
    """What the file `.metadata` may do with a name: torch's own descriptions, and constants."""
    row = _ROWS.get(name) or row_of(name)
    constant = row is not None and isinstance(row.value, torch.dtype | torch.layout | torch.memory_format)
    return row if name in _ROWS or name in _SHARED or constant else None


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> descriptions.Metadata:
        return read_metadata(Path(self.path))


class _LoadPlanner(DefaultLoadPlanner):
    """Reads tensors into the given ones, and keeps everything else as bytes."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = SavedBytes(value.getvalue())

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        release(tensor)


class _SavePlanner(DefaultSavePlanner):
    """Writes scratch tensors one by one, bytes as they were, and the mapping of nested keys that came with them."""

    def __init__(self, mappings: Mapping[str, tuple[Any, ...]]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.nested = dict(mappings)
        self._written = torch.empty(0)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], descriptions.Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        return plans, dataclasses.replace(metadata, planner_data=self.nested)

    def resolve_data(self, write_item: WriteItem) -> Any:
        release(self._written)
        found = self.state_dict[write_item.index.fqn]
        if isinstance(found, SavedBytes):
            return io.BytesIO(found.data)
        self._written = found
        return super().resolve_data(write_item)


def read_metadata(path: Path) -> descriptions.Metadata:
    """The description of a distributed checkpoint, read without running code. Raises `FileError`."""
    file = path / ".metadata"
    try:
        with file.open("rb") as stream:
            data = stream.read()
        if problem := text_problem(data[:HEAD]):
            raise FileError(f"{file}: {problem}")
        metadata = Unpickler(io.BytesIO(data), Claims(len(data), len(data)), _row_of).load()
        if not isinstance(metadata, descriptions.Metadata):
            raise FileError(f"{file}: does not describe a distributed checkpoint")
        if metadata.storage_meta is None:
            metadata.storage_meta = descriptions.StorageMeta()
        _check_claims(path, metadata)
    except UnknownName as error:
        text = f"its .metadata asks for {error}, which no distributed checkpoint needs"
        raise UnsafeFileError(f"{path}: {text}") from None
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{file}: {error}") from None
    except FileError as error:
        told = str(error)
        raise error if told.startswith(f"{path}") else FileError(f"{file}: is damaged, or misleads: {told}") from None
    except Exception as error:  # whatever a broken pickle, or attributes of other kinds, raise
        raise FileError(f"{file}: is damaged ({first_line(error)})") from None
    return metadata


def _check_claims(path: Path, metadata: descriptions.Metadata) -> None:
    """Refuse names that lead out of the folder, and tensors larger than what is there, before any memory is taken."""
    for info in metadata.storage_data.values():
        name = getattr(info, "relative_path", None)
        if not isinstance(name, str) or Path(name).name != name:
            raise FileError(f"{path}: its .metadata names the file {shown(name)}, which is outside the folder")
        if not (path / name).is_file():
            raise FileError(f"{path}: {name} is missing; the checkpoint is incomplete")
        with (path / name).open("rb") as shard:
            if problem := text_problem(shard.read(HEAD)):
                raise FileError(f"{path / name}: {problem}")
    held = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    claimed = 0
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str):
            raise FileError(f"{path}: an entry is called {shown(name)}, which is no text")
        if isinstance(entry, descriptions.TensorStorageMetadata):
            if min(entry.size, default=0) < 0 or not isinstance(entry.size, torch.Size):
                raise FileError(f"{path}: {name} has no size")
            claimed += math.prod(entry.size) * entry.properties.dtype.itemsize
            if claimed > _LARGEST_CLAIM * held:
                raise FileError(f"{path}: {name} claims {claimed:,} bytes, more than the folder holds")
            if not _is_whole(entry):
                raise FileError(f"{path}: {name} has parts that do not make a whole; the checkpoint is damaged")
        elif not isinstance(entry, descriptions.BytesStorageMetadata):
            raise FileError(f"{path}: {name} is neither a tensor nor bytes")


def _is_whole(entry: descriptions.TensorStorageMetadata) -> bool:
    """Whether the parts of a tensor lie in it and fill it: torch would leave the rest as the memory was before."""
    parts = [part for part in entry.chunks if 0 not in part.sizes]
    inside = all(
        at >= 0 and size > 0 and at + size <= end
        for part in parts
        for at, size, end in zip(part.offsets, part.sizes, entry.size, strict=True)
    )
    apart = len({tuple(part.offsets) for part in parts}) == len(parts)
    return inside and apart and sum(math.prod(part.sizes) for part in parts) == math.prod(entry.size)


def read_distributed(path: Path, scratch: Path | None) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """All entries by their flat names, and torch's map from these to the nested keys that they were saved under.

    Tensors are in nameless files in the folder `scratch` (None: in memory); other entries are `SavedBytes`.

    Raises:
        FileError: damaged or incomplete.
        UnsafeFileError: its description asks for a class that no distributed checkpoint needs.
    """
    metadata = read_metadata(path)
    state: dict[str, Any] = dict.fromkeys(metadata.state_dict_metadata, SavedBytes(b""))
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, descriptions.TensorStorageMetadata):
            state[name] = scratch_tensor(entry.size, entry.properties.dtype, scratch)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process does it all is meant
            load(state, storage_reader=_Reader(path), planner=_LoadPlanner(False, False), **_ALONE)
    except CheckpointException as error:  # no Exception: torch's own base
        raise FileError(f"{path}: is damaged or incomplete ({first_line(_first_failure(error))})") from None
    except Exception as error:  # whatever a broken shard raises
        raise FileError(f"{path}: is damaged or incomplete ({first_line(error.__cause__ or error)})") from None
    found = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    mappings = {name: tuple(place) for name, place in found.items() if isinstance(place, tuple | list)}
    return state, mappings


def _first_failure(error: CheckpointException) -> BaseException:
    """What went wrong in the one process that there is."""
    return next(iter(error.failures.values()))[0]


def write_distributed(state: dict[str, Any], folder: Path, mappings: Mapping[str, tuple[Any, ...]]) -> None:
    """Write entries, as `read_distributed` gives them, into an empty folder."""
    nested = {name: tuple(mappings.get(name, (name,))) for name in state}
    plain = {name: value.detach() if isinstance(value, Tensor) else value for name, value in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = FileSystemWriter(folder, sync_files=False)
        try:
            save(plain, storage_writer=writer, planner=_SavePlanner(nested), **_ALONE)
            return
        except CheckpointException as error:
            failure = _first_failure(error)
    raise failure  # here, so that it keeps the error behind it: a full disk
