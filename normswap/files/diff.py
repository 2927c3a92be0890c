"""What differs between two models or two checkpoints: keys, modules, shapes, values."""

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.analysis.drift import relative_distance
from normswap.checkpoints import contents, reading, stored_recipes
from normswap.checkpoints.mapped_memory import release
from normswap.checkpoints.steady_files import steady_files
from normswap.conversion.accounting import count_elements
from normswap.files.norms_by_keys import count_elements_by_keys
from normswap.report.report import Change, Left, Node, Report, Totals

Side = nn.Module | Mapping[str, Any] | str | os.PathLike[str]
"""What can be compared: a model, a state dict, or the path of a checkpoint that holds one."""


def diff(a: Side, b: Side, *, key: str | None = None, trust: bool = False, allow: Iterable[str | type] = ()) -> Report:
    """What differs between `a` and `b`.

    Args:
        a, b: two models, state dicts, or paths of files and folders that hold some.
        key: which entry of a training checkpoint is the model, where it has none of the usual names.
        trust, allow: which classes a file may hold; see `normswap.load`.

    Returns:
        A report whose changes are of the kind "module" (another class at a path, where both sides have modules) or
        "tensor": added, removed, renamed (another key, the same values), reshaped, of another dtype, or changed in
        value, with `amount`, the relative L2 distance ‖b − a‖ / ‖a‖. What is the same is in `left`.

    Raises:
        FileError: as `normswap.load` does.
    """
    with steady_files(a, b) as check_inputs:
        found = _compared(*(_opened(side, key, trust, allow) for side in (a, b)))
        check_inputs()
    return found


def _compared(old: Any, new: Any) -> Report:
    before, after = _tensors(old), _tensors(new)
    nodes = tuple(_module_tree(old, new))
    changes = [*_module_changes(nodes), *_tensor_changes(before, after)]
    differ = {path for change in changes if change.kind == "tensor" for path in change.paths}
    left = tuple(Left(name, "tensor", _dtype(value), "same") for name, value in before.items() if name not in differ)
    (parameters_before, buffers_before), (parameters_after, buffers_after) = map(_count_elements, (old, new))
    totals = Totals(0, 0, len(left), parameters_before, parameters_after, buffers_before, buffers_after)
    origins = (*_origin(old, "the first"), *_origin(new, "the second"))
    return Report("diff", tuple(changes), left, totals, notes=origins, modules=nodes)


def _opened(side: Side, key: str | None, trust: bool, allow: Iterable[str | type]) -> Any:
    if isinstance(side, nn.Module | Mapping):
        return side
    found = reading.read_checkpoint(side, trust=trust, allow=allow)
    return contents.find_entries(found.content, key, Path(side))[0].value


def _tensors(side: Any) -> dict[str, Tensor]:
    state = side.state_dict() if isinstance(side, nn.Module) else side
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _module_tree(old: Any, new: Any) -> Iterator[Node]:
    """The modules of both sides by path, where both have some."""
    if isinstance(old, nn.Module) and isinstance(new, nn.Module):
        before, after = (dict(side.named_modules(remove_duplicate=False)) for side in (old, new))
        for path in dict.fromkeys([*before, *after]):
            yield Node(path, *(_class_of(side[path]) if path in side else "" for side in (before, after)))


def _module_changes(nodes: Iterable[Node]) -> Iterator[Change]:
    """Paths that lead to modules of different classes, or only on one side."""
    for node in nodes:
        if node.before != node.after:
            how = "modules added" if not node.before else "modules removed" if not node.after else "modules changed"
            yield Change((node.path,), "module", node.before or "nothing", node.after or "nothing", how, False)


def _class_of(module: nn.Module) -> str:
    groups = f"({module.num_groups})" if isinstance(module, nn.GroupNorm) else ""
    return f"{type(module).__name__}{groups}"


def _tensor_changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Iterator[Change]:
    removed = {name: value for name, value in before.items() if name not in after}
    added = {name: value for name, value in after.items() if name not in before}
    renamed = _new_names(removed, added)
    for name in removed:
        if name not in renamed:
            yield Change((name,), "tensor", _shape(before[name]), "nothing", "removed", False)
            continue
        amount = _distance(before[name], after[renamed[name]])
        how = "renamed and changed in value" if amount else "renamed"
        yield Change((name,), "tensor", *_shown_names(name, renamed[name]), how, not amount, amount=amount or None)
    for name in added:
        if name not in renamed.values():
            yield Change((name,), "tensor", "nothing", _shape(after[name]), "added", False)
    for name in before:
        if name in after:
            yield from _change_of_one(name, before[name], after[name])


def _change_of_one(name: str, old: Tensor, new: Tensor) -> Iterator[Change]:
    change = partial(Change, (name,), "tensor", _shape(old), _shape(new))
    if old.shape != new.shape:
        yield change("reshaped", False)
    elif amount := _distance(old, new):
        yield change("changed in value", False, amount=amount)
    elif old.dtype != new.dtype:
        yield change("another dtype", False)
    release(old)
    release(new)


def _distance(old: Tensor, new: Tensor) -> float:
    """‖new − old‖ / ‖old‖, inf where the old one is zero; 0 where they are equal, NaN in the same places included."""
    if old.is_meta or new.is_meta or (old.dtype == new.dtype and torch.equal(old, new)):
        return 0.0
    a, b = (t.detach().cpu().to(torch.complex128 if t.is_complex() else torch.float64) for t in (old, new))
    same = (a == b) | (a.isnan() & b.isnan())
    return 0.0 if same.all() else relative_distance(a, b)


def _shown_names(old: str, new: str) -> tuple[str, str]:
    """Two names of a tensor, with what they share at the end left out where one is the other behind a prefix."""
    if new.endswith(f".{old}"):
        return "…", f"{new.removesuffix(old)}…"
    return (f"{old.removesuffix(new)}…", "…") if old.endswith(f".{new}") else (old, new)


def _new_names(removed: Mapping[str, Tensor], added: Mapping[str, Tensor]) -> dict[str, str]:
    """Old to new names, each of the new ones taken once: the same behind a prefix, or else the same values."""
    found: dict[str, str] = {}
    alike: dict[Any, list[str]] = {}
    for name, value in added.items():
        alike.setdefault((value.shape, value.dtype, name.rpartition(".")[2]), []).append(name)
    for by_name in (True, False):
        for name, value in removed.items():
            candidates = alike.get((value.shape, value.dtype, name.rpartition(".")[2]), []) if name not in found else []
            for other in candidates:
                prefixed = other.endswith(f".{name}") or name.endswith(f".{other}")
                if prefixed if by_name else value.numel() > 1 and _distance(value, added[other]) == 0:
                    found[name] = other
                    candidates.remove(other)
                    break
    return found


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return f"{_dtype(tensor)}[{', '.join(map(str, tensor.shape))}]"


def _count_elements(side: Any) -> tuple[int, int]:
    """Elements of parameters and of buffers; in a state dict their keys tell."""
    if isinstance(side, nn.Module):
        return count_elements(side)
    return count_elements_by_keys(side)


def _origin(side: Any, which: str) -> list[str]:
    recipe = stored_recipes.stored_recipe(side)
    target = recipe.get("target") if isinstance(recipe, Mapping) else None
    return [f"{which} was made by normswap: {target}"] if isinstance(target, str) else []
