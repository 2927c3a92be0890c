"""Optimizer states of a training checkpoint, carried over to the parameters that a converted model has."""

from __future__ import annotations

import copy
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
class RemappedState:
    """An optimizer's state dict after conversion, and the names whose state was kept and dropped."""

    state: dict[str, Any]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]


Parameters = Sequence[Parameter]
_DEEPEST, _MOST = 5, 10_000  # how far a checkpoint is searched: a hostile one may have no end


def remap_states(
    content: Any, ways: Sequence[tuple[Parameters, Parameters]]
) -> tuple[Any, dict[str, RemappedState], list[str]]:
    """A training checkpoint with its optimizers' states carried over: by name what became of each, and which were lost.

    `ways` are the parameters before and after, as far as each may be what the optimizer was made for, likeliest first.
    """
    carried: dict[str, RemappedState] = {}
    lost = []
    for place, state in list(find_optimizers(content)):
        name = ".".join(map(str, place))
        result = next((c for before, after in ways if (c := remap_state(state, before, after)) is not None), None)
        content = _replaced(content, place, None if result is None else result.state)
        if result is None:
            lost.append(name)
        else:
            carried[name] = result
    return content, carried, lost


def remap_flat_states(
    content: Mapping[str, Any], ways: Sequence[tuple[Parameters, Parameters]]
) -> tuple[Any, dict[str, RemappedState], list[str]]:
    """`remap_states` for a distributed checkpoint, whose optimizer entries have the parameter's name, or its number, in their own."""
    before, after = ways[0]
    names, still = {p.name for p in before}, {p.name for p in after}
    states: dict[str, dict[str, list[str]]] = {}  # by optimizer, then by parameter
    for key in content:
        optimizer, found, rest = key.partition(".state.")
        if found and (owner := _owner(rest, names)) is not None:
            states.setdefault(optimizer, {}).setdefault(owner, []).append(key)
    carried: dict[str, RemappedState] = {}
    lost, gone = [], set()
    for optimizer, owners in states.items():
        numbered = any(owner.isdecimal() for owner in owners)
        if numbered and names != still:
            lost.append(optimizer)
            gone |= {key for key in content if key.startswith(f"{optimizer}.")}
        elif not numbered:
            dropped = tuple(owner for owner in owners if owner not in still)
            gone |= {key for owner in dropped for key in owners[owner]}
            carried[optimizer] = RemappedState({}, tuple(owner for owner in owners if owner in still), dropped)
    result: Any = copy.copy(content)  # with torch's `_metadata`, which its own copy leaves behind
    for key in gone:
        del result[key]
    return result, carried, lost


def _owner(rest: str, names: set[str]) -> str | None:
    """The parameter, or its number, that an optimizer's entry is about: `layer.weight` of `layer.weight.exp_avg`."""
    inner = rest.rpartition(".")[0]
    if inner.isdecimal():
        return inner
    ends = (0, *(m.end() for m in re.finditer(r"\.", inner)))
    return next((inner[at:] for at in ends if inner[at:] in names), None)


def _replaced(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """`content` with `value` at `place`; None at the top of a dict takes the place away."""
    changed = copy.copy(content)
    if len(place) > 1:
        changed[place[0]] = _replaced(content[place[0]], place[1:], value)
    elif value is None and isinstance(changed, dict):
        del changed[place[0]]
    else:
        changed[place[0]] = value
    return changed


def find_optimizers(content: Any) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Every optimizer's state dict in the dicts and lists of a training checkpoint, with where it stands."""
    pending: list[tuple[tuple[Any, ...], Any]] = [((), content)]
    for _ in range(_MOST):
        if not pending:
            return
        place, value = pending.pop(0)
        if place and is_optimizer(value):
            yield place, value
        elif len(place) < _DEEPEST and type(value) in (dict, list, OrderedDict):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            pending += [((*place, key), item) for key, item in items if type(item) in (dict, list, OrderedDict)]


def is_optimizer(value: Any) -> bool:
    """Whether `value` is what `torch.optim.Optimizer.state_dict` returns."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("state"), Mapping)
        and isinstance(value.get("param_groups"), list)
        and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in value["param_groups"])
    )


def remap_state(
    state: Mapping[str, Any], before: Sequence[Parameter], after: Sequence[Parameter]
) -> RemappedState | None:
    """`state`, which was made for the parameters `before`, for the parameters `after`.

    A parameter keeps its state under its name; a new one gets none and joins the group of its kin; groups keep
    their options and the model's order. None where it cannot be told which parameter is which.
    """
    assigned = _assign(state, before)
    if assigned is None or (set(before) != set(after) and _is_flat(state, before)):
        return None
    names, order = assigned
    home = {
        name: index for index, group in enumerate(state["param_groups"]) for name in (names[i] for i in group["params"])
    }
    known, everyone = {p.name for p in before}, len(home) == len(before)
    for parameter in after:
        if parameter.name not in known and (everyone or parameter.trained):
            home[parameter.name] = order.group_of(parameter, home)
    groups: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    for index, group in enumerate(state["param_groups"]):
        members = [p.name for p in after if home.get(p.name) == index]
        was = [names[i] for i in group["params"]]
        if was != [p.name for p in before if p.name in set(was)]:  # in an order of its own, which torch goes by
            members.sort(key=lambda name: was.index(name) if name in was else len(was))
        numbers |= {name: len(numbers) + offset for offset, name in enumerate(members)}
        mended = {**group, "params": [numbers[name] for name in members]}
        if "param_names" in group:
            outer = dict(zip(was, group["param_names"], strict=True))
            prefix = next(iter(outer.values()), "").removesuffix(next(iter(outer), ""))
            mended["param_names"] = [outer.get(name, prefix + name) for name in members]
        if members or not was or not order.drops_empty:
            groups.append(mended)
    held = {names[index]: value for index, value in state["state"].items() if index in names}
    shapes = {p.name: p.shape for p in before}
    same = {p.name for p in after if p.name in numbers and shapes.get(p.name, p.shape) == p.shape}
    kept = {numbers[name]: value for name, value in held.items() if name in same}
    result = {**state, "state": kept, "param_groups": groups}
    return RemappedState(result, tuple(n for n in held if n in same), tuple(n for n in held if n not in same))


def _is_flat(state: Mapping[str, Any], before: Parameters) -> bool:
    """Whether an optimizer keeps all parameters in one vector, as LBFGS does."""
    total = sum(math.prod(p.shape) for p in before)
    entries = [entry for entry in state["state"].values() if isinstance(entry, Mapping)]
    vectors = [v for entry in entries for v in entry.values() if isinstance(v, Tensor) and v.dim() == 1]
    return len(before) > 1 and any(v.numel() == total for v in vectors)


# ---- which parameter is which ----


@dataclass(frozen=True)
class _Order:
    """An order in which parameters may have been handed to an optimizer, and how they were told apart into groups."""

    names: tuple[str, ...]
    kind: Callable[[Parameter], Any] | None = None
    classes: tuple[Any, ...] = ()
    drops_empty: bool = False

    def group_of(self, parameter: Parameter, home: Mapping[str, int]) -> int:
        """The group of a new parameter: that of its kind, else of what it was made of, else of one called alike, else the last."""
        if self.kind is not None and self.kind(parameter) in self.classes:
            return self.classes.index(self.kind(parameter))
        module, _, leaf = parameter.name.rpartition(".")
        origin = home.get(f"{module}.{leaf[:-2]}".lstrip("."))  # `weight` of `weight_v` and `weight_g`
        alike = (index for name, index in home.items() if name.rpartition(".")[2] == leaf)
        return next(alike, max(home.values(), default=0)) if origin is None else origin


def _assign(state: Mapping[str, Any], parameters: Parameters) -> tuple[dict[Any, str], _Order] | None:
    """The name behind each index of an optimizer's state, where shapes bear it out."""
    groups = [group["params"] for group in state["param_groups"]]
    indices = [index for group in groups for index in group]
    if not all(isinstance(index, int | str) for index in indices):
        return None
    shapes = {p.name: p.shape for p in parameters}
    if groups and all("param_names" in group for group in state["param_groups"]):
        lists = [group["param_names"] for group in state["param_groups"]]
        sound = all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)
        named = tuple(_plain(name, shapes) or "" for names in lists for name in names) if sound else ("",)
        orders: Iterable[_Order] = [_Order(named)] if all(named) else []
    else:
        orders = _orders([len(group) for group in groups], parameters)
    for order in orders:
        if len(order.names) == len(indices):
            names = dict(zip(indices, order.names, strict=True))
            if all(_fits(state["state"].get(index), shapes[name]) for index, name in names.items()):
                return names, order
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


def _orders(sizes: Sequence[int], parameters: Parameters) -> Iterator[_Order]:
    """The orders in which training scripts hand over parameters: as they are, or in groups by kind."""
    for chosen in (list(parameters), [p for p in parameters if p.trained]):
        yield _Order(tuple(p.name for p in chosen))
        for kind, drops_empty in _kinds(_norms(chosen)):
            classes: dict[Any, list[str]] = {}
            for p in chosen:
                classes.setdefault(kind(p), []).append(p.name)
            if len(classes) == len(sizes):
                for order in permutations(classes):
                    if [len(classes[key]) for key in order] == list(sizes):
                        yield _Order(
                            tuple(name for key in order for name in classes[key]),
                            kind,
                            order,
                            drops_empty and order[0] != "bias",
                        )


def _norms(parameters: Sequence[Parameter]) -> set[str]:
    """The modules whose weight has one dimension: norms."""
    return {p.name.rpartition(".")[0] for p in parameters if p.name.endswith("weight") and len(p.shape) == 1}


def _kinds(norms: set[str]) -> list[tuple[Callable[[Parameter], Any], bool]]:
    """How scripts tell parameters with weight decay from those without, and whether they leave empty groups out.

    In turn: timm; biases apart; torchvision's references, in three ways; these and Ultralytics, which keeps empty ones.
    """

    def normed(p: Parameter) -> bool:
        return p.name.rpartition(".")[0] in norms

    def bias(p: Parameter) -> bool:
        return p.name.endswith("bias")

    return [
        (lambda p: len(p.shape) <= 1, False),
        (bias, False),
        (normed, True),
        (lambda p: normed(p) or bias(p), True),
        (lambda p: "norm" if normed(p) else "bias" if bias(p) else "weight", True),
        (lambda p: "bias" if bias(p) else "norm" if normed(p) else "weight", True),  # Ultralytics puts biases first
    ]
