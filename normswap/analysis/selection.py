"""Which models and layers are converted: checks, the copy, the user's patterns, and what tensors are shared."""

import fnmatch
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normswap.analysis.copies import clone
from normswap.analysis.sites import Site, find_sites, hidden_modules
from normswap.checkpoints.module_graph import why_endless
from normswap.errors import ModelError, OptionError
from normswap.report.report import Left

Pattern = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


def check_model(model: nn.Module) -> None:
    """Raise `ModelError` for what is no module, or has layers that are TorchScript, wrapped, sharded or lazy.

    And for one with more paths to its layers than can be walked along, see `module_graph`.
    """
    if not isinstance(model, nn.Module):
        name = type(model).__name__
        raise ModelError(f"expected a torch.nn.Module, not {name}; for a file, use normswap.convert_file")
    if problem := why_endless(model):
        raise ModelError(f"the model {problem}")
    for path, module in model.named_modules():
        if reason := _unfit(module):
            raise ModelError(f"{path or 'the model'} {reason}")


def _unfit(module: nn.Module) -> str:
    """Why a model cannot be converted that has this module in it; "": it can be."""
    kind: Any = type(module)
    if reason := _unfit_class(kind):
        return reason
    for tensor, held in (*module._parameters.items(), *module._buffers.items()):
        if held is not None and is_lazy(held):
            lazy = f"({type(module).__name__}) is lazy and its {tensor} has no shape yet"
            return f"{lazy}; run the model once on an input, then convert"
    return ""


@functools.lru_cache(maxsize=1024)
def _unfit_class(cls: Any) -> str:
    """Why a model cannot be converted that has a module of this class in it; "": it can be."""
    if issubclass(cls, torch.jit.ScriptModule):
        return "is TorchScript, whose layers cannot be exchanged; convert the model that it was made from"
    if cls.__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
        return f"is wrapped in {cls.__name__}; convert first, then wrap: convert(model.module, ...)"
    if any(base.__name__ == "FSDPModule" for base in cls.__mro__):
        return "is sharded by fully_shard; convert first, on the meta device if need be, then shard"
    return ""


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy of `model`; raises `ModelError` where it, or one of its modules, cannot be copied."""
    try:
        copied = clone(model)
        if {id(module) for module in copied.modules()} & {id(module) for module in model.modules()}:
            raise TypeError("a module's own copy is itself")
        return copied
    except Exception as error:  # an attribute of the model that cannot be copied
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"the model cannot be copied ({reason}); convert with inplace=True") from error


def select(sites: Sequence[Site], include: Pattern, exclude: Pattern) -> tuple[set[Site], set[Site]]:
    """The sites to convert, and those that the user excluded.

    A pattern is a glob on paths, several, or a function of a path and a module. Raises `OptionError` where a glob
    matches no site, or a pattern is none of these.
    """
    included = set(sites) if include is None else _matching(sites, include, "include")
    excluded = set() if exclude is None else _matching(sites, exclude, "exclude")
    return included - excluded, excluded


def _matching(sites: Sequence[Site], pattern: Pattern, option: str) -> set[Site]:
    if callable(pattern):
        return {site for site in sites if any(pattern(path, site.module) for path in site.paths)}
    found: set[Site] = set()
    globs: list[Any] = [pattern] if isinstance(pattern, str) or not isinstance(pattern, Iterable) else [*pattern]
    if not all(isinstance(glob, str) for glob in globs):
        raise OptionError(f"{option}: {pattern!r} is neither a glob, a list of globs nor a function")
    for glob in globs:
        matched = {site for site in sites if any(fnmatch.fnmatchcase(path, glob) for path in site.paths)}
        if not matched:
            inside = any(path.startswith(f"{glob}.") for site in sites for path in site.paths)
            globbed = "patterns are globs on module paths, such as 'layer1.*'"
            hint = f"it holds some: write '{glob}.*'" if inside else globbed
            raise OptionError(f"{option}: {glob!r} matches no norm and no convolution; {hint}")
        found |= matched
    return found


def shared_tensors(model: nn.Module) -> frozenset[int]:
    """The ids of tensors that stand in more than one place, or share their memory with one that does."""
    places: dict[int, list[int]] = defaultdict(list)
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                strided = tensor.layout is torch.strided and _has_memory(tensor)
                places[tensor.data_ptr() if strided else id(tensor)].append(id(tensor))
    return frozenset(key for keys in places.values() if len(keys) > 1 for key in keys)


def _has_memory(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.numel() > 0 and type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def hidden_layers(model: nn.Module) -> tuple[list[Left], list[str]]:
    """Layers that torch does not see, which are left, and a notice for each module that holds some."""
    left, notices = [], []
    for where, module in hidden_modules(model):
        reason = "is not registered (a plain list or attribute): its parameters are neither saved nor trained"
        if problem := why_endless(module):
            raise ModelError(f"{where} {problem}")
        inside = find_sites(module)
        for site in inside:
            left += [Left(f"{where}.{path}".rstrip("."), site.kind, site.name, reason) for path in site.paths]
        if inside:
            notices.append(f"{where} {reason}; use nn.ModuleList or nn.ModuleDict")
    return left, notices
