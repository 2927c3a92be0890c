"""The only file that touches a disk: reads and writes whole-module files, and knows nothing of conversion."""

from __future__ import annotations

import os
import pickle
import re
import stat
import tempfile
import zipfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap.errors import FileError, UnsafeFileError

_SAFE_PACKAGES = ("torch.nn.", "torch.ao.", "torchvision.", "timm.", "normswap.layers.")
_SAFE_HELPERS = {
    "torch.nn.functional.relu",
    "torch.nn.functional.relu6",
    "torch.nn.functional.silu",
    "torch.nn.functional.gelu",
    "torch.nn.functional.hardswish",
    "torch.nn.functional.hardsigmoid",
    "torch.nn.functional.sigmoid",
    "torch.sigmoid",
    "functools.partial",
    "torchvision.models.detection._utils.BoxCoder",
    "torchvision.models.detection._utils.BoxLinearCoder",
    "torchvision.models.detection._utils.Matcher",
    "torchvision.models.detection._utils.SSDMatcher",
    "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
    "torchvision.models.optical_flow.raft._pass_through_h",
    "torchvision.ops.boxes.box_iou",
}
_REFUSED = re.compile(r"GLOBAL (\S+) (?:was not an allowed global|whose module \S+ is blocked)")
_OTHER_FORMATS = (".safetensors", ".onnx", ".pt2", ".npz", ".json")


def read(path: str | os.PathLike[str], *, trust: bool = False, allow: Iterable[str] = ()) -> Any:
    """The object in a file that `torch.save` wrote, its tensors on the CPU and mapped from the file.

    Only classes of torch, torchvision, timm and normswap are loaded, and those in `allow`, by full
    name; `trust` runs whatever code the pickle names. See torch's notes on `weights_only`.

    Raises:
        FileError: no such file, another kind of file, or a broken one.
        UnsafeFileError: a class that is not allowed; the message says how to allow it.
    """
    path = Path(path)
    zipped = _check_readable(path)
    if trust:
        return _load(path, weights_only=False, mmap=zipped)
    allowed = {name: _import(name, path) for name in allow}
    if zipped:
        allowed |= {name: _safe_class(name, path) for name in _globals(path) if name not in allowed}
    while True:  # one class more a round: what the first look did not find, and torch's older format
        try:
            with torch.serialization.safe_globals([(found, name) for name, found in allowed.items()]):
                return _load(path, weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            match = _REFUSED.search(str(error))
            if match is None and "Only persistent_load of storage" in str(error):
                raise FileError(
                    f"{path}: is a whole module as torch saved it before 1.6, with source code inside; "
                    "load and save it again where you trust it, or --trust (trust=True)"
                ) from None
            if match is None:
                reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
                raise FileError(f"{path}: is damaged, or cannot be read safely ({reason[:200]})") from None
            name = match[1] if "." in match[1] else f"builtins.{match[1]}"  # torch leaves that package's name out
            if name in allowed:
                raise UnsafeFileError(f"{path}: holds {name}, which torch loads only with --trust") from None
            allowed[name] = _safe_class(name, path)


def _globals(path: Path) -> list[str]:
    """What the pickle names and torch does not allow by itself; the pickle is read, not run."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # whatever is wrong with the file, reading it says better
        return []


def _load(path: Path, *, weights_only: bool, mmap: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mmap or None)
    except pickle.UnpicklingError as error:
        if weights_only:
            raise
        raise FileError(f"{path}: is damaged ({_first_line(error)})") from None
    except (AttributeError, ImportError) as error:
        raise FileError(
            f"{path}: needs code that is not here ({_first_line(error)}); make that module importable, "
            "or save the model from a module instead of a script"
        ) from None
    except Exception as error:  # whatever a broken archive raises inside torch
        raise FileError(f"{path}: is damaged or incomplete ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _check_readable(path: Path) -> bool:
    """Whether the file is a zip archive of `torch.save`; raises for every other kind but torch's older one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}; check the name and the folder") from None
    if stat.S_ISDIR(mode):
        raise FileError(f"{path}: is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise FileError(f"{path}: is not a regular file")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    if not head:
        raise FileError(f"{path}: is empty")
    if head.startswith(b"PK\x03\x04"):
        return _check_archive(path)
    if path.suffix == ".onnx":
        raise FileError(
            f"{path}: is an ONNX file, whose layers are compiled; convert the torch model that it was exported from"
        )
    if re.match(rb".{8}\{\s*\"", head, re.DOTALL):
        raise FileError(
            f"{path}: is a safetensors file, which holds tensors without their model; give a file with a whole model"
        )
    if not head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        text = "a text file" if _is_text(head) else "of another kind"
        raise FileError(f"{path}: is {text}, not one that torch.save wrote")
    return False


def _is_text(head: bytes) -> bool:
    try:
        head[:-4].decode() if len(head) == 512 else head.decode()
    except UnicodeDecodeError:
        return False
    return b"\x00" not in head


def _check_archive(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        raise FileError(
            f"{path}: is truncated or damaged: its table of contents cannot be read; copy or save it again"
        ) from None
    if "constants.pkl" in names:
        raise FileError(
            f"{path}: is a TorchScript archive, whose code is compiled; convert the model that it was made from"
        )
    if any(name.endswith(("serialized_exported_program.json", "models/model.json")) for name in names) or (
        "archive_format" in names and "data.pkl" not in names
    ):
        raise FileError(f"{path}: is an exported program; convert the model that it was exported from")
    if "data.pkl" not in names:
        raise FileError(f"{path}: is a zip archive, but not one that torch.save wrote")
    return True


def _safe_class(name: str, path: Path) -> Any:
    """The object called `name` if it is one that may be loaded without being asked for."""
    if name in _SAFE_HELPERS:
        return _import(name, path)
    if name.startswith(_SAFE_PACKAGES) and not any(part.startswith("__") for part in name.split(".")):
        found = _import(name, path)
        if (
            isinstance(found, type)
            and issubclass(found, nn.Module)
            and not issubclass(found, torch.fx.GraphModule | torch.jit.ScriptModule)
        ):
            return found
    raise UnsafeFileError(
        f"{path}: holds {name}, which is not a class of torch, torchvision, timm or normswap. "
        f"If you trust it, allow it: --allow {name} (in Python: allow=['{name}']); "
        "--trust runs any code in the file"
    )


def _import(name: str, path: Path) -> Any:
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise FileError(f"--allow {name}: is no full class name; write package.module.Class")
    try:
        return getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError):
        raise FileError(
            f"{path}: needs {name}, which cannot be imported here; install its package, or run in the folder that holds it"
        ) from None


def check_writable(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """`path` as a file that can be written now; raises `FileError` where it exists or its folder does not serve."""
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path}: is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise FileError(f"{path}: exists already; give another name, or --overwrite (overwrite=True)")
    if path.suffix in _OTHER_FORMATS:
        raise FileError(f"{path}: a whole model is not written as {path.suffix}; give a name that ends in .pt")
    if not path.parent.is_dir():
        raise FileError(f"{path}: the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise FileError(f"{path}: the folder {path.parent} cannot be written")
    return path


def write(value: Any, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Save `value` to `path` with `torch.save`: to a temporary file beside it, synced, then renamed.

    A failed run leaves an old file as it was, and nothing else. Raises `FileError`.
    """
    path = check_writable(path, overwrite)
    target = path.resolve()  # a link stays a link
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        check_writable(path, overwrite)
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        raise FileError(f"{path}: cannot be written: {_first_line(error)}") from error
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise FileError(
            f"{path}: the model cannot be saved whole ({_first_line(error)}); save its state dict, or name what it holds "
            "in a module that can be imported"
        ) from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return path
