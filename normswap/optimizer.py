"""Optimizer states of a training checkpoint, carried over to the parameters that a converted model has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Parameter:
    """A parameter as an optimizer sees it, in the order of `named_parameters()`."""

    name: str
    shape: tuple[int, ...]
    trained: bool = True


@dataclass(frozen=True)
class Carried:
    """An optimizer's state dict after conversion, and the names whose state was kept and dropped."""

    state: dict[str, Any]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]


def mend(
    content: Any, before: Sequence[Parameter], after: Sequence[Parameter]
) -> tuple[Any, dict[str, Carried], list[str]]:
    """A training checkpoint with its optimizers' states carried over: by name what became of each, and which were lost."""
    carried: dict[str, Carried] = {}
    lost = []
    for place, state in list(find_optimizers(content)):
        name, result = ".".join(map(str, place)), carry_over(state, before, after)
        content = _replaced(content, place, None if result is None else result.state)
        if result is None:
            lost.append(name)
        else:
            carried[name] = result
    return content, carried, lost


def mend_flat(
    content: Mapping[str, Any], before: Sequence[Parameter], after: Sequence[Parameter]
) -> tuple[Any, dict[str, Carried], list[str]]:
    """`mend` for a distributed checkpoint, whose optimizer entries have the parameter's name in their own."""
    gone = {p.name for p in before} - {p.name for p in after}
    result = type(content)(
        (key, value)
        for key, value in content.items()
        if not (".state." in key and any(f".{name}." in key for name in gone))
    )  # type: ignore[call-arg]
    result._metadata = getattr(content, "_metadata", {})  # type: ignore[attr-defined]  # torch's own place
    return result, {}, []


def _replaced(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """`content` with `value` at `place`, or without that place."""
    changed = content.copy()
    if len(place) == 2:
        items = list(content[place[0]])
        items[place[1]] = value
        changed[place[0]] = items
    elif value is None:
        del changed[place[0]]
    else:
        changed[place[0]] = value
    return changed


def find_optimizers(content: Any) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Every optimizer's state dict at the top of a training checkpoint, or in a list there, with where it stands."""
    for key, value in content.items() if isinstance(content, Mapping) else ():
        for index, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if is_optimizer(item):
                yield ((key,) if index is None else (key, index)), item


def is_optimizer(value: Any) -> bool:
    """Whether `value` is what `torch.optim.Optimizer.state_dict` returns."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("state"), Mapping)
        and isinstance(value.get("param_groups"), list)
        and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in value["param_groups"])
    )


def carry_over(state: Mapping[str, Any], before: Sequence[Parameter], after: Sequence[Parameter]) -> Carried | None:
    """`state`, which was made for the parameters `before`, for the parameters `after`.

    A parameter keeps its state under its name; a new one gets none and joins the group of its kin; groups keep
    their options and the model's order. None where it cannot be told which parameter is which.
    """
    names = _assign(state, before)
    if names is None:
        return None
    shapes = {p.name: p.shape for p in after}
    home = {
        name: index for index, group in enumerate(state["param_groups"]) for name in (names[i] for i in group["params"])
    }
    everyone = len(home) == len(before)
    new = [
        p.name
        for p in after
        if p.name not in home and (everyone or p.trained) and p.name not in {b.name for b in before}
    ]
    home |= {name: _kin(name, home, shapes) for name in new}
    groups: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    for index, group in enumerate(state["param_groups"]):
        members = [p.name for p in after if home.get(p.name) == index]
        numbers |= {name: len(numbers) + offset for offset, name in enumerate(members)}
        mended = {**group, "params": [numbers[name] for name in members]}
        if "param_names" in group:
            mended["param_names"] = members
        groups.append(mended)
    held = {names[index]: value for index, value in state["state"].items() if index in names}
    kept = {numbers[name]: value for name, value in held.items() if name in numbers}
    result = {**state, "state": kept, "param_groups": groups}
    return Carried(result, tuple(n for n in held if n in numbers), tuple(n for n in held if n not in numbers))


def _kin(name: str, home: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The group for a new parameter: that of a vanished one of its kind, else of any one, else the last."""
    leaf = name.rpartition(".")[2]
    same = [other for other in home if other.rpartition(".")[2] == leaf]
    gone = [other for other in same if other not in shapes]
    return next((home[other] for other in (*gone, *same)), max(home.values(), default=0))


# ---- which parameter is which ----


def _assign(state: Mapping[str, Any], parameters: Sequence[Parameter]) -> dict[Any, str] | None:
    """The name behind each index of an optimizer's state, where shapes bear it out."""
    groups = [group["params"] for group in state["param_groups"]]
    indices = [index for group in groups for index in group]
    if any(isinstance(index, Tensor | list | dict) for index in indices):
        return None
    shapes = {p.name: p.shape for p in parameters}
    if all("param_names" in group for group in state["param_groups"]):
        named = [_plain(name, shapes) for group in state["param_groups"] for name in group["param_names"]]
        orders: Iterator[list[str]] = iter([named] if None not in named else [])  # type: ignore[list-item]
    else:
        orders = _orders([len(group) for group in groups], parameters)
    for order in orders:
        if len(order) == len(indices):
            names = dict(zip(indices, order, strict=True))
            if all(_fits(state["state"].get(index), shapes[name]) for index, name in names.items()):
                return names
    return None


def _plain(name: str, shapes: Mapping[str, Any]) -> str | None:
    """A name without the prefixes of wrappers."""
    return next((name[at:] for at in (0, *(m.end() for m in re.finditer(r"\.", name))) if name[at:] in shapes), None)


def _fits(entry: Any, shape: tuple[int, ...]) -> bool:
    if not isinstance(entry, Mapping):
        return True
    full = [v for k, v in entry.items() if isinstance(v, Tensor) and k in _FULL_SIZE]
    return all(tuple(value.shape) == shape for value in full)


_FULL_SIZE = {
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "momentum_buffer",
    "square_avg",
    "sum",
    "acc_delta",
    "grad_avg",
}


def _orders(sizes: Sequence[int], parameters: Sequence[Parameter]) -> Iterator[list[str]]:
    """The orders in which training scripts hand over parameters: as they are, or in groups by kind."""
    for chosen in (list(parameters), [p for p in parameters if p.trained]):
        yield [p.name for p in chosen]
        norms = _norms(chosen)
        for kind in _kinds(norms):
            classes: dict[Any, list[str]] = {}
            for p in chosen:
                classes.setdefault(kind(p), []).append(p.name)
            if len(classes) == len(sizes):
                for order in permutations(classes.values()):
                    if [len(members) for members in order] == list(sizes):
                        yield [name for members in order for name in members]


def _norms(parameters: Sequence[Parameter]) -> set[str]:
    """The modules whose weight has one dimension: norms."""
    return {p.name.rpartition(".")[0] for p in parameters if p.name.endswith("weight") and len(p.shape) == 1}


def _kinds(norms: set[str]) -> list[Callable[[Parameter], Any]]:
    """How scripts tell parameters with weight decay from those without: timm, torchvision's references, Ultralytics."""

    def normed(p: Parameter) -> bool:
        return p.name.rpartition(".")[0] in norms

    def bias(p: Parameter) -> bool:
        return p.name.endswith("bias")

    return [
        lambda p: len(p.shape) <= 1,
        bias,
        normed,
        lambda p: normed(p) or bias(p),
        lambda p: "norm" if normed(p) else "bias" if bias(p) else "weight",
        lambda p: "bias" if bias(p) else "norm" if normed(p) else "weight",
    ]
