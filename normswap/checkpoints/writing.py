"""Checkpoints of every kind, written; nothing here knows of conversion."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from normswap.checkpoints import atomic_write, mapped_memory, safetensors_files
from normswap.checkpoints.checkpoint import RECIPE, Checkpoint, stored_recipe
from normswap.checkpoints.contents import SavedBytes
from normswap.errors import FileError, OptionError, first_line

FORMATS = ("pt", "safetensors", "dcp")
_NO_MODELS = (".onnx", ".pt2", ".npz", ".json", ".pb")


def check_format(out: Path, form: str | None, overwrite: bool) -> None:
    """Raise before any work where `out` cannot be written, or its name does not fit `form`."""
    if form is not None and form not in FORMATS:
        raise OptionError(f"format: {form!r} is not one of {', '.join(FORMATS)}")
    atomic_write.check_writable(out, overwrite)
    if out.suffix in _NO_MODELS or (form == "pt" and out.suffix == ".safetensors"):
        raise FileError(f"{out}: a model is not written as {out.suffix}; give a name that ends in .pt or .safetensors")


def write_checkpoint(
    found: Checkpoint, out: Path, form: str | None = None, *, overwrite: bool = False, mapped: bool = False
) -> Path:
    """Write `found` in its own kind, or in `form`; `mapped` says that its large tensors are mapped from files.

    All or nothing, see `atomic_write.write_file`. Raises `FileError`.
    """
    kind = form or found.kind
    if kind == "pt":
        return atomic_write.write_file(out, lambda file: _save(found.content, file, out, mapped), overwrite=overwrite)
    if kind == "safetensors":
        tensors = _tensors(found.content, out)
        told = {k: v for k, v in found.header.items() if isinstance(v, str)}
        header = (told or {"format": "pt"}) | _recipe_text(
            found.content
        )  # without a format transformers refuses a file
        return atomic_write.write_file(
            out, lambda f: safetensors_files.write_safetensors(tensors, f, header, mapped=mapped), overwrite=overwrite
        )
    if kind == "dcp":
        from normswap.checkpoints import distributed_folders

        text = _recipe_text(found.content)
        extra = {name: SavedBytes(_packed(value)) for name, value in text.items()}
        state = {**_entries(found.content, out), **extra}
        return atomic_write.write_folder(
            out, lambda folder: distributed_folders.write_distributed(state, folder, found.nested), overwrite=overwrite
        )
    return atomic_write.write_folder(out, lambda folder: _write_shards(found, folder, mapped), overwrite=overwrite)


def _save(content: Any, file: BinaryIO, out: Path, mapped: bool) -> None:
    try:
        torch.save(content, mapped_memory.Releasing(file) if mapped else file)  # type: ignore[arg-type]
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise FileError(
            f"{out}: the model cannot be saved whole ({first_line(error)}); save its state dict, or name what it holds "
            "in a module that can be imported"
        ) from error


def _entries(content: Any, out: Path) -> dict[str, Any]:
    if isinstance(content, nn.Module):
        content = content.state_dict()
    for name, value in content.items():
        if not isinstance(value, Tensor | SavedBytes):
            raise FileError(f"{out}: {name} is a {type(value).__name__}, not a tensor; write it as .pt")
    return dict(content)


def _tensors(content: Any, out: Path) -> dict[str, Tensor]:
    return {name: value for name, value in _entries(content, out).items() if isinstance(value, Tensor)}


def _recipe_text(content: Any) -> dict[str, str]:
    recipe = stored_recipe(content)
    return {} if recipe is None else {RECIPE: json.dumps(recipe)}


def _packed(text: str) -> bytes:
    stream = io.BytesIO()
    torch.save(text, stream)
    return stream.getvalue()


def _write_shards(found: Checkpoint, folder: Path, mapped: bool) -> None:
    """The weight files of a folder with the keys each had, new keys beside those of their module, and all else as it was."""
    home = {key: name for name, keys in found.shards.items() for key in keys}
    place = {key.rpartition(".")[0]: name for key, name in home.items()}
    last = list(found.shards)[-1]
    parts: dict[str, OrderedDict[str, Any]] = {name: OrderedDict() for name in found.shards}
    for key, value in found.content.items():
        parts[home.get(key) or place.get(key.rpartition(".")[0]) or last][key] = value
    recipe = _recipe_text(found.content)
    for name, part in parts.items():
        with open(folder / name, "wb") as file:
            if name.endswith(".safetensors"):
                header = (
                    {"format": "pt"} if found.index else {k: v for k, v in found.header.items() if isinstance(v, str)}
                )
                safetensors_files.write_safetensors(_tensors(part, folder / name), file, header | recipe, mapped=mapped)
            else:
                part._metadata = getattr(found.content, "_metadata", None)  # type: ignore[attr-defined]
                _save(part, file, folder / name, mapped)
    if found.index:
        total = sum(value.nbytes for value in found.content.values() if isinstance(value, Tensor))
        described = {"metadata": {**found.header, "total_size": total, **recipe}}
        weight_map = {key: name for name, part in parts.items() for key in part}
        (folder / found.index).write_text(json.dumps({**described, "weight_map": weight_map}, indent=2) + "\n")
    for name, state in found.optimizers.items():
        with open(folder / name, "wb") as file:
            torch.save(state, file)
    for other in found.path.iterdir():
        if (folder / other.name).exists():
            continue
        if other.is_dir() and not other.is_symlink():
            shutil.copytree(other, folder / other.name, symlinks=True, ignore=_odd)
        elif other.is_symlink() or other.is_file():
            shutil.copy2(other, folder / other.name, follow_symlinks=False)


def _odd(place: str, names: list[str]) -> set[str]:
    """What is neither a file, a folder nor a link, and cannot be copied: a pipe, a device."""
    paths = {name: Path(place, name) for name in names}
    return {name for name, path in paths.items() if not (path.is_symlink() or path.is_file() or path.is_dir())}
