"""Checkpoints of every kind, read and written; it knows nothing of conversion.

Whatever the kind, what is inside is a module, a state dict, or a dict that holds some. A recipe is an
attribute of a module, and an item of a state dict's `_metadata`; formats without `_metadata` keep it in a place of their own.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import stat
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from normswap.checkpoints import atomic_write, pickle_files, safetensors_files
from normswap.checkpoints.contents import Raw
from normswap.errors import FileError, OptionError, first_line

RECIPE = "normswap_recipe"
"""Where a converted model, state dict or file holds the recipe of its conversion, a plain dict."""
FORMATS = ("pt", "safetensors", "dcp")
_LONGEST_RECIPE = 1 << 26  # bytes
_INDEX = ".index.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "model.pt")
_OPTIMIZERS = "optimizer*.bin"
_PARTS = {"_parameters": Tensor, "_buffers": Tensor, "_modules": nn.Module}
_MOST_SHARED = 64  # times its size that the tensors of a file may claim together: some share memory
_MOST_PATHS, _DEEPEST = 1_000_000, 100
_NO_MODELS = (".onnx", ".pt2", ".npz", ".json", ".pb")


@dataclass(frozen=True)
class Checkpoint:
    """What was read from `path`, and what its kind needs to be written again.

    `kind` is "pt" (what `torch.save` wrote), "safetensors", "dcp" or "folder" (weight files with others beside
    them, such as Accelerate's). `content` is a module, a state dict, or a dict that holds some. `header` is a
    safetensors header's or an index's metadata, `nested` torch's map of nested keys in a distributed checkpoint, `shards` the
    weight files of a folder with their keys, `optimizers` the contents of its optimizer files by name.
    """

    path: Path
    kind: str
    content: Any
    header: Mapping[str, Any] = field(default_factory=dict)
    nested: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    shards: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    index: str = ""
    optimizers: Mapping[str, Any] = field(default_factory=dict)


def read(
    path: str | os.PathLike[str], *, trust: bool = False, allow: Iterable[str] = (), scratch: Path | None = None
) -> Checkpoint:
    """Read a file or a folder, tensors mapped where that can be; those of a distributed checkpoint in files under `scratch`.

    Pickles run no code, unless `trust` says so; see `pickles.read`.

    Raises:
        FileError: nothing there, another kind of file, or a broken one.
        UnsafeFileError: a class that is not allowed; the message says how to allow it.
    """
    path, allow = Path(path), tuple(allow)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: {getattr(error, 'strerror', None) or error}; check the name and the folder") from None
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise FileError(f"{path}: is not a regular file")
    try:
        if stat.S_ISDIR(mode):
            return _read_folder(path, trust, allow, scratch)
        if path.name.endswith(_INDEX):
            return _read_shards(path, trust, allow)
        return _read_file(path, trust, allow)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None


def check_input(path: Path) -> None:
    """Raise `FileError` for a file that is none of a kind that can be read, by its first bytes."""
    try:
        if path.is_file() and not path.name.endswith(_INDEX) and not _has_tensors(path):
            pickle_files.check_kind(path)
        os.stat(path)
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: {getattr(error, 'strerror', None) or error}; check the name and the folder") from None


def _has_tensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(16)
    return safetensors_files.is_safetensors(head) and (path.suffix == ".safetensors" or head[8:10] == b'{"')


def _read_file(path: Path, trust: bool, allow: tuple[str, ...]) -> Checkpoint:
    if _has_tensors(path):
        tensors, header = safetensors_files.read(path)
        return Checkpoint(path, "safetensors", _stated(tensors, path, header.pop(RECIPE, None)), header)
    found = pickle_files.read(path, trust=trust, allow=allow)
    for model in _modules_in(found):
        if _paths(model, path, {}) > _MOST_PATHS:
            raise FileError(f"{path}: holds a {type(model).__name__} with more paths to its parts than can be followed")
    _check_sizes(path, found)
    return Checkpoint(path, "pt", found)


def _read_folder(path: Path, trust: bool, allow: tuple[str, ...], scratch: Path | None) -> Checkpoint:
    if (path / ".metadata").is_file():
        # Not at the top: what it needs of torch takes longer to import than most files to read.
        from normswap.checkpoints import distributed_folders

        state, nested = distributed_folders.read(path, scratch)
        recipe = state.pop(RECIPE, None)
        text = _unpacked(recipe.data) if isinstance(recipe, Raw) else None
        nested = {name: where for name, where in nested.items() if name != RECIPE}
        return Checkpoint(path, "dcp", _stated(state, path, text), nested=nested)
    indices = sorted(index for index in path.glob(f"*{_INDEX}") if index.is_file())
    if indices:
        return _read_shards(indices[0], trust, allow)
    name = next((name for name in _WEIGHTS if (path / name).is_file()), None)
    if name is None:
        raise FileError(
            f"{path}: is a folder without a distributed checkpoint (.metadata), an index ({_WEIGHTS[0]}{_INDEX}) "
            f"or one of {', '.join(_WEIGHTS)}; give the name of a file"
        )
    inner = _read_file(path / name, trust, allow)
    if not isinstance(inner.content, Mapping):
        raise FileError(f"{path / name}: holds a {type(inner.content).__name__}, not a state dict")
    return replace(
        inner, path=path, kind="folder", shards={name: tuple(inner.content)}, optimizers=_optimizers(path, trust, allow)
    )


def _read_shards(index: Path, trust: bool, allow: tuple[str, ...]) -> Checkpoint:
    """A model in several files with an index of which key is where, as Hugging Face's libraries write it."""
    try:
        described = json.loads(index.read_text())
        weight_map = described["weight_map"]
        names = sorted(set(weight_map.values()))
        header = dict(described.get("metadata") or {})
        safe = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{index}: is no index of weight files ({first_line(error)})") from None
    if not safe or not names:
        raise FileError(f"{index}: names files outside its folder, or none")
    state: dict[str, Any] = {}
    shards: dict[str, tuple[str, ...]] = {}
    for name in names:
        if not (index.parent / name).is_file():
            raise FileError(f"{index}: names {name}, which is missing")
        part = _read_file(index.parent / name, trust, allow).content
        if not isinstance(part, Mapping) or state.keys() & part.keys():
            raise FileError(f"{index.parent / name}: is no state dict, or repeats keys of another file")
        state |= part
        shards[name] = tuple(part)
    if state.keys() != weight_map.keys():
        odd = min(map(str, state.keys() ^ weight_map.keys()))
        raise FileError(f"{index}: does not agree with its files: {odd} stands in one of them alone")
    content = _stated(state, index, header.pop(RECIPE, None))
    optimizers = _optimizers(index.parent, trust, allow)
    return Checkpoint(index.parent, "folder", content, header, shards=shards, index=index.name, optimizers=optimizers)


def _optimizers(folder: Path, trust: bool, allow: tuple[str, ...]) -> dict[str, Any]:
    return {file.name: pickle_files.read(file, trust=trust, allow=allow) for file in sorted(folder.glob(_OPTIMIZERS))}


def _stated(tensors: Mapping[str, Any], path: Path, recipe: str | None) -> OrderedDict[str, Any]:
    """A state dict with the recipe where torch's own files have it."""
    state = OrderedDict(tensors)
    if recipe is not None:
        try:
            set_recipe(state, json.loads(recipe) if len(recipe) <= _LONGEST_RECIPE else None)
        except (ValueError, TypeError, RecursionError) as error:
            raise FileError(f"{path}: its recipe is damaged ({first_line(error)})") from None
    return state


def _unpacked(data: bytes) -> str | None:
    try:
        found = torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # a broken recipe is no recipe
        return None
    return found if isinstance(found, str) else None


def _modules_in(found: Any) -> list[nn.Module]:
    values = [found, *found.values()] if isinstance(found, Mapping) else [found]
    return [value for value in values if isinstance(value, nn.Module)]


def _paths(module: nn.Module, path: Path, known: dict[int, int | None], depth: int = 0) -> int:
    """How many paths lead into `module`. Raises for one that holds itself, or that is not built as torch builds one."""
    if id(module) not in known:
        known[id(module)] = None
        held = vars(module)
        for name, kind in _PARTS.items():
            part = held.get(name)
            if not isinstance(part, dict) or not all(v is None or isinstance(v, kind) for v in part.values()):
                raise FileError(f"{path}: is damaged: its {type(module).__name__} lacks {name}")
        children = [child for child in module._modules.values() if child is not None]
        if depth < _DEEPEST:
            known[id(module)] = 1 + sum(_paths(child, path, known, depth + 1) for child in children)
    found = known[id(module)]
    if found is None:
        raise FileError(f"{path}: holds a {type(module).__name__} that holds itself, or is nested too deep")
    return found


def _check_sizes(path: Path, found: Any) -> None:
    """No tensor may claim more than the file holds: a view that repeats one element does, to exhaust memory."""
    size, total = path.stat().st_size, 0
    parts = [found, *found.values()] if isinstance(found, Mapping) else []
    for model in _modules_in(found):
        parts += [{**dict(model.named_parameters()), **dict(model.named_buffers())}]
    for part in parts:
        for name, value in part.items() if isinstance(part, Mapping) else ():
            if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta:
                claimed = value.numel() * value.itemsize
                total += claimed
                if claimed > size or total > _MOST_SHARED * size:
                    raise FileError(f"{path}: {name} claims {claimed:,} bytes, more than the file holds")


# ---- recipes ----


def recipe_of(content: Any) -> Any:
    """The recipe in a module or a state dict, unchecked; None where there is none."""
    if isinstance(content, nn.Module):
        return vars(content).get(RECIPE)
    metadata = getattr(content, "_metadata", None)
    return metadata.get(RECIPE) if isinstance(metadata, Mapping) else None


def set_recipe(content: Any, recipe: Any) -> None:
    """Let a module or an `OrderedDict` of tensors carry `recipe`."""
    if isinstance(content, nn.Module):
        content.__dict__[RECIPE] = recipe
    else:
        known = getattr(content, "_metadata", None)
        content._metadata = OrderedDict(known if isinstance(known, Mapping) else {})
        content._metadata[RECIPE] = recipe


# ---- writing ----


def default_out(path: str | os.PathLike[str], suffix: str, form: str | None = None) -> Path:
    """`model.gn-ws.pt` beside `model.pt`; for a folder, or an index in one, `folder.gn-ws` beside that."""
    path = Path(path)
    if path.name.endswith(_INDEX) or path.is_dir():
        folder = path.parent if path.name.endswith(_INDEX) else path
        if folder.name in ("", ".", ".."):
            folder = folder.resolve()
        flat = {"pt": ".pt", "safetensors": ".safetensors"}
        return folder.with_name(f"{folder.name}.{suffix}{flat.get(form or '', '')}")
    ending = {"pt": path.suffix if path.suffix != ".safetensors" else ".pt", "safetensors": ".safetensors", "dcp": ""}
    return path.with_name(
        f"{path.stem}.{suffix}{ending.get(form or '', path.suffix) or ('' if form == 'dcp' else '.pt')}"
    )


def check_format(out: Path, form: str | None, overwrite: bool) -> None:
    """Raise before any work where `out` cannot be written, or its name does not fit `form`."""
    if form is not None and form not in FORMATS:
        raise OptionError(f"format: {form!r} is not one of {', '.join(FORMATS)}")
    atomic_write.check_writable(out, overwrite)
    if out.suffix in _NO_MODELS or (form == "pt" and out.suffix == ".safetensors"):
        raise FileError(f"{out}: a model is not written as {out.suffix}; give a name that ends in .pt or .safetensors")


def write(
    found: Checkpoint, out: Path, form: str | None = None, *, overwrite: bool = False, mapped: bool = False
) -> Path:
    """Write `found` in its own kind, or in `form`; `mapped` says that its large tensors are mapped from files.

    All or nothing, see `disk.write_file`. Raises `FileError`.
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
            out, lambda f: safetensors_files.write(tensors, f, header, mapped=mapped), overwrite=overwrite
        )
    if kind == "dcp":
        from normswap.checkpoints import distributed_folders

        text = _recipe_text(found.content)
        extra = {name: Raw(_packed(value)) for name, value in text.items()}
        state = {**_entries(found.content, out), **extra}
        return atomic_write.write_folder(
            out, lambda folder: distributed_folders.write(state, folder, found.nested), overwrite=overwrite
        )
    return atomic_write.write_folder(out, lambda folder: _write_shards(found, folder, mapped), overwrite=overwrite)


def _save(content: Any, file: BinaryIO, out: Path, mapped: bool) -> None:
    try:
        torch.save(content, atomic_write.Releasing(file) if mapped else file)  # type: ignore[arg-type]
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise FileError(
            f"{out}: the model cannot be saved whole ({first_line(error)}); save its state dict, or name what it holds "
            "in a module that can be imported"
        ) from error


def _entries(content: Any, out: Path) -> dict[str, Any]:
    if isinstance(content, nn.Module):
        content = content.state_dict()
    for name, value in content.items():
        if not isinstance(value, Tensor | Raw):
            raise FileError(f"{out}: {name} is a {type(value).__name__}, not a tensor; write it as .pt")
    return dict(content)


def _tensors(content: Any, out: Path) -> dict[str, Tensor]:
    return {name: value for name, value in _entries(content, out).items() if isinstance(value, Tensor)}


def _recipe_text(content: Any) -> dict[str, str]:
    recipe = recipe_of(content)
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
    parts: dict[str, OrderedDict[str, Any]] = {name: _stated({}, folder, None) for name in found.shards}
    for key, value in found.content.items():
        parts[home.get(key) or place.get(key.rpartition(".")[0]) or last][key] = value
    recipe = _recipe_text(found.content)
    for name, part in parts.items():
        with open(folder / name, "wb") as file:
            if name.endswith(".safetensors"):
                header = (
                    {"format": "pt"} if found.index else {k: v for k, v in found.header.items() if isinstance(v, str)}
                )
                safetensors_files.write(_tensors(part, folder / name), file, header | recipe, mapped=mapped)
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
