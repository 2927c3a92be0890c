"""Checkpoints of every kind, read; nothing here knows of conversion."""

import json
import os
import stat
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normswap.checkpoints import file_kinds, module_graph, module_numbers, pickle_files, safetensors_files
from normswap.checkpoints.checkpoint import INDEX_ENDING, RECIPE, RECIPE_FILE, Checkpoint
from normswap.checkpoints.contents import SavedBytes, models_in, tensors_of
from normswap.checkpoints.stored_recipes import LARGEST_RECIPE, store_recipe
from normswap.errors import FileError, first_line, path_error

_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "model.pt")
_OPTIMIZERS = "optimizer*.bin"
_MODULE_PARTS = {"_parameters": Tensor, "_buffers": Tensor, "_modules": nn.Module}


def read_checkpoint(
    path: str | os.PathLike[str], *, trust: bool = False, allow: Iterable[str | type] = (), scratch: Path | None = None
) -> Checkpoint:
    """Read a file or a folder; tensors are on the CPU, and mapped from their files where the format allows it.

    Args:
        path: a file of `torch.save` or of safetensors, a distributed checkpoint, an index of weight files, its folder.
        trust: run whatever code a pickle names; else none runs, see `pickle_files.read_pickle`.
        allow: further classes that a pickle may hold, see `allowed_classes.parse_allowance`.
        scratch: an existing folder for nameless files with the tensors of a distributed checkpoint; None: in memory.

    Raises:
        FileError: nothing there, another kind of file, or a broken one.
        UnsafeFileError: a class that is not allowed; the message says how to allow it.
    """
    path, allow = Path(path), (allow,) if isinstance(allow, str) else tuple(allow)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise path_error(path, error) from None
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise FileError(f"{path}: is not a regular file")
    try:
        if stat.S_ISDIR(mode):
            return _read_folder(path, trust, allow, scratch)
        if path.name.endswith(INDEX_ENDING):
            return _read_shards(path, trust, allow)
        return _read_file(path, trust, allow)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None


def check_input(path: Path) -> None:
    """Raise `FileError` for a file that is of no kind that can be read, by its first bytes."""
    try:
        if path.is_file() and not path.name.endswith(INDEX_ENDING) and not _is_safetensors(path):
            file_kinds.check_kind(path)
        os.stat(path)
    except (OSError, ValueError) as error:
        raise path_error(path, error) from None


def is_distributed(path: Path) -> bool:
    """Whether a folder holds a distributed checkpoint, or weight files with an index."""
    try:
        return (path / ".metadata").is_file() or any(path.glob(f"*{INDEX_ENDING}"))
    except (OSError, ValueError):
        return False


def _is_safetensors(path: Path) -> bool:
    """By the ending and the first bytes; by these alone where a header of JSON begins there."""
    with path.open("rb") as file:
        head = file.read(16)
    return safetensors_files.is_safetensors(head) and (path.suffix == ".safetensors" or head[8:10] == b'{"')


def _read_file(path: Path, trust: bool, allow: tuple[str | type, ...]) -> Checkpoint:
    if _is_safetensors(path):
        tensors, header = safetensors_files.read_safetensors(path)
        tensors, header, aliases = _with_aliases(tensors, header)
        _check_names(tensors, path)
        beside = _recipe_beside(path) if path.name in _WEIGHTS else None
        content = _with_recipe(tensors, path, header.pop(RECIPE, beside))
        return Checkpoint(path, "safetensors", content, header, aliases)
    found = pickle_files.read_pickle(path, trust=trust, allow=allow)
    on_top = [found, *found.values()] if isinstance(found, Mapping) else [found]
    held = {id(part): part for part in (*on_top, *(entry.value for entry in models_in(found)))}
    for model in held.values():
        if isinstance(model, nn.Module):
            _check_module(model, path)
        _check_names(tensors_of(model), path)
    return Checkpoint(path, "pt", found)


def _read_folder(path: Path, trust: bool, allow: tuple[str | type, ...], scratch: Path | None) -> Checkpoint:
    if (path / ".metadata").is_file():
        # Not at the top: what it needs of torch takes longer to import than most files to read.
        from normswap.checkpoints import distributed_folders

        state, nested = distributed_folders.read_distributed(path, scratch)
        recipe = state.pop(RECIPE, None)
        text = _saved_text(recipe.data) if isinstance(recipe, SavedBytes) else None
        nested = {name: where for name, where in nested.items() if name != RECIPE}
        return Checkpoint(path, "dcp", _with_recipe(state, path, text), nested=nested)
    indices = sorted(index for index in path.glob(f"*{INDEX_ENDING}") if index.is_file())
    if indices:
        return _read_shards(indices[0], trust, allow)
    name = next((name for name in _WEIGHTS if (path / name).is_file()), None)
    if name is None:
        raise FileError(
            f"{path}: is a folder without a distributed checkpoint (.metadata), an index ({_WEIGHTS[0]}{INDEX_ENDING}) "
            f"or one of {', '.join(_WEIGHTS)}; give the name of a file"
        )
    inner = _read_file(path / name, trust, allow)
    if not isinstance(inner.content, Mapping):
        raise FileError(f"{path / name}: holds a {type(inner.content).__name__}, not a state dict")
    shards = {name: tuple(key for key in inner.content if key not in inner.aliases)}
    optimizers = _optimizers(path, trust, allow)
    return replace(inner, path=path, kind="folder", shards=shards, optimizers=optimizers)


def _read_shards(index: Path, trust: bool, allow: tuple[str | type, ...]) -> Checkpoint:
    """A model in several files with an index of which key is where, as Hugging Face's libraries write it."""
    try:
        described = json.loads(index.read_text())
        weight_map = described["weight_map"]
        names = sorted(set(weight_map.values()))
        header = dict(described.get("metadata") or {})
        safe = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{index}: is not an index of weight files ({first_line(error)})") from None
    if not safe or not names:
        raise FileError(f"{index}: names files outside its folder, or none")
    state: dict[str, Any] = {}
    shards: dict[str, tuple[str, ...]] = {}
    for name in names:
        if not (index.parent / name).is_file():
            raise FileError(f"{index}: names {name}, which is missing")
        found = _read_file(index.parent / name, trust, allow)
        if not isinstance(found.content, Mapping) or state.keys() & found.content.keys():
            raise FileError(f"{index.parent / name}: is not a state dict, or repeats keys of another file")
        header = {**found.aliases, **header}
        shards[name] = tuple(key for key in found.content if key not in found.aliases)
        state |= {key: found.content[key] for key in shards[name]}
    if state.keys() != weight_map.keys():
        odd = min(map(str, state.keys() ^ weight_map.keys()))
        raise FileError(f"{index}: does not agree with its files: {odd} stands in one of them alone")
    state, header, aliases = _with_aliases(state, header)
    content = _with_recipe(state, index, header.pop(RECIPE, _recipe_beside(index)))
    optimizers = _optimizers(index.parent, trust, allow)
    return Checkpoint(
        index.parent, "folder", content, header, aliases, shards=shards, index=index.name, optimizers=optimizers
    )


def _with_aliases(
    tensors: Mapping[str, Any], header: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """The tensors under those names too that a header tells of, the header without these, and what each stands for.

    So `save_model` of safetensors keeps a tensor that has several names in a model: once, the others in the header.
    """
    told = {name: kept for name, kept in header.items() if isinstance(kept, str) and name not in tensors}
    aliases = {name: kept for name, kept in told.items() if kept in tensors}
    all_names = {**tensors, **{name: tensors[kept] for name, kept in aliases.items()}}
    return all_names, {name: value for name, value in header.items() if name not in aliases}, aliases


def _optimizers(folder: Path, trust: bool, allow: tuple[str | type, ...]) -> dict[str, Any]:
    files = sorted(folder.glob(_OPTIMIZERS))
    return {file.name: pickle_files.read_pickle(file, trust=trust, allow=allow) for file in files}


def _with_recipe(tensors: Mapping[str, Any], path: Path, recipe: str | None) -> OrderedDict[str, Any]:
    """A state dict of `tensors` with its recipe, given as JSON, where files of torch have it."""
    state = OrderedDict(tensors)
    if recipe is not None:
        try:
            store_recipe(state, json.loads(recipe) if len(recipe) <= LARGEST_RECIPE else None)
        except (ValueError, TypeError, RecursionError) as error:
            raise FileError(f"{path}: its recipe is damaged ({first_line(error)})") from None
    return state


def _recipe_beside(path: Path) -> str | None:
    """The recipe, as JSON, that a trainer's callback has put beside weights; None where there is none."""
    file = path.with_name(RECIPE_FILE)
    if not file.is_file() or file.stat().st_size > LARGEST_RECIPE:
        return None
    return file.read_text(encoding="utf-8", errors="replace")


def _saved_text(data: bytes) -> str | None:
    """The text that `torch.save` wrote as `data`; None where it is no text."""
    try:
        found = pickle_files.read_saved_bytes(data)
    except Exception:  # a broken recipe is no recipe
        return None
    return found if isinstance(found, str) else None


def _check_module(model: nn.Module, path: Path) -> None:
    """Raise `FileError` for a module whose parts cannot be walked along, or that is not built as torch builds one."""
    for module in module_graph.all_modules(model):
        held = vars(module)
        for name, kind in _MODULE_PARTS.items():
            part = held.get(name)
            if not isinstance(part, dict) or not all(v is None or isinstance(v, kind) for v in part.values()):
                raise FileError(f"{path}: is damaged: its {type(module).__name__} lacks {name}")
        if problem := module_numbers.why_no_layer(module):
            raise FileError(f"{path}: is damaged: its {type(module).__name__} {problem}")
    if problem := module_graph.why_endless(model):
        raise FileError(f"{path}: its {type(model).__name__} {problem}")


def _check_names(tensors: Mapping[str, Any], path: Path) -> None:
    """Raise `FileError` for more tensors, or longer names of them, than are read."""
    if len(tensors) > module_graph.MOST_TENSORS:
        raise FileError(f"{path}: holds more than {module_graph.MOST_TENSORS:,} tensors, the most that is read")
    if max((len(str(name)) for name in tensors), default=0) > module_graph.LONGEST_NAME:
        raise FileError(f"{path}: holds a name of more than {module_graph.LONGEST_NAME:,} characters")
