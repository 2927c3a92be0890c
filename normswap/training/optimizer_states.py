"""Optimizer states in training checkpoints, made to fit the parameters that a converted model has.

torch's `Optimizer.state_dict()` knows no names. It has groups of parameters, each parameter a number, counted through
all groups in turn, and by number the state (momentum, moments). A conversion takes parameters away and brings new
ones, so the numbers move: which number was which parameter has to be found out first, see `parameter_numbers`.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normswap.training.parameter_numbers import Parameters, name_numbers, without_prefix


@dataclass(frozen=True)
class RemappedState:
    """An optimizer's state after conversion."""

    state: dict[str, Any]
    """Its state dict; empty where the entries of a distributed checkpoint say all."""
    kept: tuple[str, ...]
    """The names of the parameters whose state was kept."""
    dropped: tuple[str, ...]
    """The names of the parameters whose state was dropped."""


EntryPath = tuple[Any, ...]
"""Keys and indices that lead from a checkpoint's top to something in it."""
_DEEPEST, _MOST = 5, 10_000  # how far a checkpoint is searched: a hostile one may have no end


def remap_states(
    content: Any, candidates: Sequence[tuple[Parameters, Parameters]]
) -> tuple[Any, dict[str, RemappedState], list[str]]:
    """A training checkpoint with its optimizers' states remapped: by name what became of each, and which were lost.

    `candidates` are the parameters before and after conversion of each model in the checkpoint that an optimizer may
    have been made for, likeliest first.
    """
    remapped: dict[str, RemappedState] = {}
    lost = []
    for place, state in list(find_optimizers(content)):
        name = ".".join(map(str, place))
        fitting = (r for before, after in candidates if (r := remap_state(state, before, after)) is not None)
        result = next(fitting, None)
        content = _replaced(content, place, None if result is None else result.state)
        if result is None:
            lost.append(name)
        else:
            remapped[name] = result
    return content, remapped, lost


def remap_flat_states(
    content: Mapping[str, Any], candidates: Sequence[tuple[Parameters, Parameters]]
) -> tuple[Any, dict[str, RemappedState], list[str]]:
    """`remap_states` for a distributed checkpoint, where each tensor of an optimizer's state is an entry of its own.

    Its name is `OPTIMIZER.state.PARAMETER.KIND`, such as `optimizer.state.layer.weight.exp_avg`, so entries of
    parameters that still exist are right as they are. Others have the parameter's number in place of its name; the
    groups, which would tell what the numbers mean, are not read here, so these are lost unless the parameters are the
    same as before.
    """
    before, after = candidates[0]
    names, still = {p.name for p in before}, {p.name for p in after}
    entries: dict[str, dict[str, list[str]]] = {}  # by optimizer, then by parameter
    for key in content:
        optimizer, found, rest = key.partition(".state.")
        if found and (parameter := _parameter_of_entry(rest, names)) is not None:
            entries.setdefault(optimizer, {}).setdefault(parameter, []).append(key)
    remapped: dict[str, RemappedState] = {}
    lost, gone = [], set()
    for optimizer, by_parameter in entries.items():
        numbered = any(parameter.isdecimal() for parameter in by_parameter)
        if numbered and names != still:
            lost.append(optimizer)
            gone |= {key for key in content if key.startswith(f"{optimizer}.")}
        elif not numbered:
            kept = tuple(parameter for parameter in by_parameter if parameter in still)
            dropped = tuple(parameter for parameter in by_parameter if parameter not in still)
            gone |= {key for parameter in dropped for key in by_parameter[parameter]}
            remapped[optimizer] = RemappedState({}, kept, dropped)
    result: Any = copy.copy(content)  # with torch's `_metadata`, which its own copy leaves behind
    for key in gone:
        del result[key]
    return result, remapped, lost


def _parameter_of_entry(rest: str, names: set[str]) -> str | None:
    """The parameter, or its number, that an optimizer's entry is about: `layer.weight` of `layer.weight.exp_avg`."""
    inner = rest.rpartition(".")[0]
    return inner if inner.isdecimal() else without_prefix(inner, names)


def _replaced(content: Any, place: EntryPath, value: Any) -> Any:
    """`content` with `value` at `place`; None in a dict takes the key away. What is changed is copied, nothing else."""
    changed = copy.copy(content)
    if len(place) > 1:
        changed[place[0]] = _replaced(content[place[0]], place[1:], value)
    elif value is None and isinstance(changed, dict):
        del changed[place[0]]
    else:
        changed[place[0]] = value
    return changed


def find_optimizers(content: Any) -> Iterator[tuple[EntryPath, Mapping[str, Any]]]:
    """Every state dict of an optimizer with parameters in a checkpoint's dicts and lists, with its place, top first."""
    pending: list[tuple[EntryPath, Any]] = [((), content)]
    for _ in range(_MOST):
        if not pending:
            return
        place, value = pending.pop(0)
        if place and is_optimizer(value):
            if any(group["params"] for group in value["param_groups"]):  # one without parameters has nothing to lose
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


def remap_state(state: Mapping[str, Any], before: Parameters, after: Parameters) -> RemappedState | None:
    """`state`, which was made for the parameters `before`, for the parameters `after`.

    A parameter keeps its state under its name; a new one gets none and joins the group of its kin; groups keep
    their options and the model's order. None where it cannot be told which parameter is which.
    """
    named = name_numbers(state, before)
    # One vector for all parameters has no part that could be kept by itself.
    if named is None or (set(before) != set(after) and _is_flat(state, before)):
        return None
    names, order = named
    group_of = {names[number]: index for index, group in enumerate(state["param_groups"]) for number in group["params"]}
    # A script that gave its optimizer every parameter would give it the new frozen ones too; another only trained ones.
    known, has_all = {p.name for p in before}, len(group_of) == len(before)
    for parameter in after:
        if parameter.name not in known and (has_all or parameter.trained):
            group_of[parameter.name] = order.group_of(parameter, group_of)
    groups: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    for index, group in enumerate(state["param_groups"]):
        was = [names[number] for number in group["params"]]
        members = _in_order([p.name for p in after if group_of.get(p.name) == index], was, before)
        numbers |= {name: len(numbers) + offset for offset, name in enumerate(members)}
        if members or not was or not order.drops_empty:
            groups.append(_group_with(group, members, was, numbers))
    held = {names[number]: value for number, value in state["state"].items() if number in names}
    shapes = {p.name: p.shape for p in before}
    same = {p.name for p in after if p.name in numbers and shapes.get(p.name, p.shape) == p.shape}
    kept = {numbers[name]: value for name, value in held.items() if name in same}
    result = {**state, "state": kept, "param_groups": groups}
    return RemappedState(result, tuple(n for n in held if n in same), tuple(n for n in held if n not in same))


def _in_order(members: list[str], was: list[str], before: Parameters) -> list[str]:
    """`members` of a group, given in the model's order, as a script would hand them over.

    torch goes by the order alone. Where the group was not in the model's order, its old members keep the group's own,
    and new ones come last.
    """
    if was == [p.name for p in before if p.name in set(was)]:
        return members
    return sorted(members, key=lambda name: was.index(name) if name in was else len(was))


def _group_with(
    group: Mapping[str, Any], members: list[str], was: list[str], numbers: Mapping[str, int]
) -> dict[str, Any]:
    """A group with other members. New names get the prefix, of a wrapper, that the names in the group have."""
    result = {**group, "params": [numbers[name] for name in members]}
    if "param_names" in group:
        outer = dict(zip(was, group["param_names"], strict=True))
        prefix = next(iter(outer.values()), "").removesuffix(next(iter(outer), ""))
        result["param_names"] = [outer.get(name, prefix + name) for name in members]
    return result


def _is_flat(state: Mapping[str, Any], before: Parameters) -> bool:
    """Whether an optimizer keeps all parameters in one vector, as LBFGS does: it is as long as all of them together."""
    total = sum(math.prod(p.shape) for p in before)
    entries = [entry for entry in state["state"].values() if isinstance(entry, Mapping)]
    vectors = [v for entry in entries for v in entry.values() if isinstance(v, Tensor) and v.dim() == 1]
    return len(before) > 1 and any(v.numel() == total for v in vectors)
