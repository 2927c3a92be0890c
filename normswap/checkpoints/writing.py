"""Checkpoints of every kind, written; nothing here knows of conversion."""

import io
import json
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from normswap.checkpoints import atomic_write, mapped_memory, reading_back, safetensors_files
from normswap.checkpoints.checkpoint import RECIPE, RECIPE_FILE, Checkpoint
from normswap.checkpoints.contents import SavedBytes
from normswap.checkpoints.state_keys import memory_of
from normswap.checkpoints.stored_recipes import stored_recipe
from normswap.errors import FileError, OptionError, first_line, path_error

FORMATS = ("pt", "safetensors", "dcp")
_NO_MODELS = (".onnx", ".pt2", ".npz", ".json", ".pb")
_DISTRIBUTED = (".metadata", "*.distcp")
_PYTORCH = {"format": "pt"}  # without it in the header transformers refuses a safetensors file


def check_format(out: Path, form: str | None, overwrite: bool, *, source: Path | None = None) -> None:
    """Check before any work that a checkpoint can be written to `out`, and in the format `form`; None: any.

    Args:
        out: the file or the folder.
        form: one of `FORMATS`, or the kind of a checkpoint.
        overwrite: whether an existing output may be replaced.
        source: the folder that is read, if one is; what else is in it is copied to a folder of the kind `folder`.

    Raises:
        OptionError: no such format.
        FileError: `out` exists, or is no checkpoint; its folder cannot be written, or its ending is of another kind of
            file.
    """
    if form is not None and form not in (*FORMATS, "folder"):
        raise OptionError(f"format: {form!r} is not one of {', '.join(FORMATS)}")
    if str(out) == "-":
        raise FileError("-: a model is not written to the standard output; give the name of a file")
    atomic_write.check_writable(out, overwrite, folder=None if form is None else form in ("dcp", "folder"))
    if out.suffix in _NO_MODELS or (form == "pt" and out.suffix == ".safetensors"):
        raise FileError(f"{out}: a model is not written as {out.suffix}; give a name that ends in .pt or .safetensors")
    if form == "folder" and source is not None and source.resolve() in out.resolve().parents:
        raise FileError(
            f"{out}: is in the folder that is read, of which all is copied; give the name of another folder"
        )
    if out.is_dir() and form is not None:
        _check_replaceable(out, form, source)


def _check_replaceable(out: Path, form: str, source: Path | None) -> None:
    """Raise `FileError` for a folder that holds what the new one will not: all that goes is an older checkpoint."""
    try:
        held = sorted(os.listdir(out))
        if form == "dcp":
            others = [name for name in held if not any(fnmatchcase(name, part) for part in _DISTRIBUTED)]
        else:
            new = set(os.listdir(source)) if source is not None else set()
            others = [name for name in held if name not in new]
    except OSError as error:
        raise path_error(out, error) from None
    if others:
        raise FileError(f"{out}: holds {others[0]}, which would be lost; give the name of a new folder")


@contextmanager
def stage_checkpoint(
    found: Checkpoint, out: Path, form: str | None, *, overwrite: bool, mapped: bool = False
) -> Iterator[atomic_write.Staged]:
    """Write a checkpoint in full beside its place, see `atomic_write.stage_file`.

    Args:
        found: what to write.
        out: the file or the folder.
        form: one of `FORMATS`; None: the checkpoint's own kind.
        overwrite: replace an existing output.
        mapped: whether large tensors are mapped from files; their memory is then given back once they are written.

    Raises:
        FileError: with nothing written.
    """
    kind, content = form or found.kind, found.content
    stage: AbstractContextManager[atomic_write.Staged]
    if kind == "pt":
        write_file = partial(_save, content, out=out, mapped=mapped)
        stage = atomic_write.stage_file(out, write_file, overwrite=overwrite)
    elif kind == "safetensors":
        tensors, aliases = _stored_once(_tensors(content, out), found.aliases)
        header = (_texts(found.header) or _PYTORCH) | aliases | _recipe_as_text(content)
        write_file = partial(_save_safetensors, tensors, header=header, out=out, mapped=mapped)
        stage = atomic_write.stage_file(out, write_file, overwrite=overwrite)
    elif kind == "dcp":
        recipe = {name: SavedBytes(_saved(text)) for name, text in _recipe_as_text(content).items()}
        state = {**_flat_entries(content, out), **recipe}
        write_entries = partial(_save_distributed, state, nested=found.nested, out=out)
        stage = atomic_write.stage_folder(out, write_entries, overwrite=overwrite)
    else:
        stage = atomic_write.stage_folder(out, partial(_write_into_folder, found, mapped=mapped), overwrite=overwrite)
    with stage as staged:
        yield staged


def write_checkpoint(found: Checkpoint, out: Path, form: str | None, *, overwrite: bool, mapped: bool = False) -> Path:
    """`stage_checkpoint`, and its name given: the checkpoint appears whole or not at all. Returns where."""
    with stage_checkpoint(found, out, form, overwrite=overwrite, mapped=mapped) as staged:
        atomic_write.give_names([staged])
    return out


def _save(content: Any, file: BinaryIO, out: Path, mapped: bool) -> None:
    """Write a file of `torch.save`; like the two functions below, open it again and compare its names."""
    try:
        torch.save(content, mapped_memory.Releasing(file) if mapped else file)  # type: ignore[arg-type]
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise FileError(
            f"{out}: the model cannot be saved whole ({first_line(error)}); save its state dict, or name what it holds "
            "in a module that can be imported"
        ) from error
    file.flush()
    with reading_back.readable_again(out):
        reading_back.check_pickle(Path(file.name), content)


def _save_safetensors(
    tensors: Mapping[str, Tensor], file: BinaryIO, header: Mapping[str, str], out: Path, mapped: bool
) -> None:
    safetensors_files.write_safetensors(tensors, file, header, mapped)
    file.flush()
    with reading_back.readable_again(out):
        reading_back.check_safetensors(Path(file.name), tensors, header)


def _save_distributed(state: dict[str, Any], folder: Path, nested: Mapping[str, tuple[Any, ...]], out: Path) -> None:
    # Not at the top: what it needs of torch takes longer to import than most files to write.
    from normswap.checkpoints import distributed_folders

    distributed_folders.write_distributed(state, folder, nested)
    with reading_back.readable_again(out):
        reading_back.check_names(state, distributed_folders.read_metadata(folder).state_dict_metadata)


def _flat_entries(content: Any, out: Path) -> dict[str, Any]:
    """The tensors and saved bytes of a module or a state dict by name; raises for anything else in it."""
    if isinstance(content, nn.Module):
        content = content.state_dict()
    for name, value in content.items():
        if not isinstance(value, Tensor | SavedBytes):
            raise FileError(f"{out}: {name} is a {type(value).__name__}, not a tensor; write it as .pt")
    return dict(content)


def _tensors(content: Any, out: Path) -> dict[str, Tensor]:
    """The tensors of a module or a state dict, for safetensors."""
    tensors = {name: value for name, value in _flat_entries(content, out).items() if isinstance(value, Tensor)}
    for name in tensors:
        if not safetensors_files.can_be_named(name):
            raise FileError(f"{out}: safetensors cannot hold a tensor called {name!r}; write it as .pt (--format pt)")
    return tensors


def _stored_once(content: Mapping[str, Any], aliases: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """`content` with each tensor under one name, and the other names with that one; all, where none had `aliases`.

    Kept is a name that was kept before.
    """
    if not aliases:
        return dict(content), {}
    names: dict[Any, list[str]] = {}
    for name, value in content.items():
        names.setdefault(memory_of(value) or name, []).append(name)
    kept = {name: min(group, key=aliases.__contains__) for group in names.values() for name in group}
    others = {name: own for name, own in kept.items() if name != own}
    return {name: value for name, value in content.items() if name not in others}, others


def _texts(header: Mapping[str, Any]) -> dict[str, str]:
    """What a safetensors header can hold of some metadata."""
    return {name: value for name, value in header.items() if isinstance(value, str)}


def write_recipe_beside(folder: Path, model: nn.Module) -> None:
    """Write the recipe of a converted model into `folder`, beside weights of it that a trainer writes without.

    Raises `FileError` where it cannot be written.
    """
    for text in _recipe_as_text(model).values():
        writer = methodcaller("write", text.encode())
        with atomic_write.stage_file(folder / RECIPE_FILE, writer, overwrite=True) as staged:
            atomic_write.give_names([staged])


def _recipe_as_text(content: Any) -> dict[str, str]:
    """The recipe in `content` under its name, as JSON; empty where there is none."""
    recipe = stored_recipe(content)
    return {} if recipe is None else {RECIPE: json.dumps(recipe)}


def _saved(text: str) -> bytes:
    """What `torch.save` makes of a text: so a distributed checkpoint keeps what is no tensor."""
    stream = io.BytesIO()
    torch.save(text, stream)
    return stream.getvalue()


# ---- folders of weight files ----


def _write_into_folder(found: Checkpoint, folder: Path, mapped: bool) -> None:
    """Weight files, index and optimizers of a changed checkpoint, and all else in its folder as it was."""
    recipe = _recipe_as_text(found.content)
    content, aliases = _stored_once(found.content, found.aliases)
    recipe |= aliases
    weights = _by_file(found, content)
    for name, part in weights.items():
        with open(folder / name, "wb") as file:
            if name.endswith(".safetensors"):
                header = _PYTORCH if found.index else _texts(found.header)
                _save_safetensors(_tensors(part, folder / name), file, header | recipe, folder / name, mapped)
            else:
                part._metadata = getattr(found.content, "_metadata", None)  # type: ignore[attr-defined]
                _save(part, file, folder / name, mapped)
    if found.index:
        total = sum(value.nbytes for value in content.values() if isinstance(value, Tensor))
        metadata = {**found.header, "total_size": total, **recipe}
        index = {"metadata": metadata, "weight_map": {key: name for name, part in weights.items() for key in part}}
        (folder / found.index).write_text(json.dumps(index, indent=2) + "\n")
        with reading_back.readable_again(found.path):
            reading_back.check_index(folder / found.index, index["weight_map"])
    for name, state in found.optimizers.items():
        with open(folder / name, "wb") as file:
            _save(state, file, folder / name, mapped=False)
    _copy_others(found.path, folder)


def _by_file(found: Checkpoint, content: Mapping[str, Any]) -> dict[str, OrderedDict[str, Any]]:
    """What goes into each weight file: the keys that it had, and new keys of the modules whose keys it has."""
    file_of_key = {key: name for name, keys in found.shards.items() for key in keys}
    file_of_module = {key.rpartition(".")[0]: name for key, name in file_of_key.items()}
    last = list(found.shards)[-1]
    weights: dict[str, OrderedDict[str, Any]] = {name: OrderedDict() for name in found.shards}
    for key, value in content.items():
        weights[file_of_key.get(key) or file_of_module.get(key.rpartition(".")[0]) or last][key] = value
    return weights


def _copy_others(source: Path, folder: Path) -> None:
    """Copy what stands in `source` and not yet in `folder`; links stay links."""
    for other in source.iterdir():
        if (folder / other.name).exists():
            continue
        if other.is_dir() and not other.is_symlink():
            shutil.copytree(other, folder / other.name, symlinks=True, ignore=_not_copyable)
        elif other.is_symlink() or other.is_file():
            shutil.copy2(other, folder / other.name, follow_symlinks=False)


def _not_copyable(place: str, names: list[str]) -> set[str]:
    """What is neither a file, a folder nor a link: a pipe, a device."""
    paths = {name: Path(place, name) for name in names}
    return {name for name, path in paths.items() if not (path.is_symlink() or path.is_file() or path.is_dir())}
