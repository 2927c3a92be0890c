"""Optimizers for a converted model: one that was made before the conversion, or groups of parameters for a new one."""

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from normswap.analysis.sites import classify
from normswap.errors import OptionError
from normswap.report.report import CARRIED_OVER, Change
from normswap.training.optimizer_states import RemappedState, remap_state
from normswap.training.parameter_numbers import Parameter


def remap_optimizer(
    optimizer: torch.optim.Optimizer, before: nn.Module | Mapping[str, nn.Parameter], after: nn.Module
) -> tuple[Change, ...]:
    """Have `optimizer`, which was made for the model `before` a conversion, train the converted model `after`.

    A parameter keeps its state (momentum, moments) and its group under its name; a new one starts without state in the
    group of its kin; what the optimizer holds beyond the model stays. The optimizer is changed where it stands, so that
    schedulers that hold it go on. Where the model was converted in place, `before` is `dict(model.named_parameters())`
    taken before that. Returns a change of kind "optimizer" for each parameter whose state was carried over or dropped.

    Raises OptionError for parameters of another model, and for an optimizer that keeps all of them in one vector
    (LBFGS).
    """
    if before is after:
        raise OptionError(
            "before and after are one model; where it was converted in place, "
            "take `before = dict(model.named_parameters())` ahead of that"
        )
    old = dict(before.named_parameters() if isinstance(before, nn.Module) else before)
    names = {id(parameter): name for name, parameter in reversed(old.items())}  # the first name of a shared one counts
    held = _parameters_of(optimizer)
    if not any(id(parameter) in names for parameter in held):
        raise OptionError(
            f"{type(optimizer).__name__} holds no parameter of `before`; give the model that it was made for, or, "
            "where that was converted in place, its dict(named_parameters()) from before"
        )
    # What the optimizer holds beyond the model goes through as if the model had it before and after.
    others = {f"(not the model's) {i}": p for i, p in enumerate(held) if id(p) not in names}
    names |= {id(parameter): name for name, parameter in others.items()}
    new = dict(after.named_parameters()) | others
    remapped = remap_state(_named_state(optimizer, names), _as_seen(old | others), _as_seen(new))
    if remapped is None:
        raise OptionError(
            f"{type(optimizer).__name__} keeps the state of all parameters in one vector; "
            "make a new one for the converted model"
        )
    order = [name for group in remapped.state["param_groups"] for name in group["param_names"]]
    for group, new_group in zip(optimizer.param_groups, remapped.state["param_groups"], strict=True):
        group["params"][:] = [new[name] for name in new_group["param_names"]]  # LBFGS holds the list itself
        if "param_names" in group:
            group["param_names"] = new_group["param_names"]
    optimizer.state = defaultdict(dict, {new[order[i]]: state for i, state in remapped.state["state"].items()})
    return tuple(change for change in state_changes("optimizer", remapped) if change.paths[0] not in others)


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _named_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """What `optimizer.state_dict()` has, with every parameter's name and without its hooks."""
    held = _parameters_of(optimizer)
    numbers = {id(parameter): number for number, parameter in enumerate(held)}
    groups = []
    for group in optimizer.param_groups:
        ids = [id(parameter) for parameter in group["params"]]
        groups.append({**group, "params": [numbers[i] for i in ids], "param_names": [names[i] for i in ids]})
    return {"state": {numbers[id(p)]: optimizer.state[p] for p in held if p in optimizer.state}, "param_groups": groups}


def _as_seen(named: Mapping[str, nn.Parameter]) -> list[Parameter]:
    return [Parameter(name, tuple(p.shape), p.requires_grad) for name, p in named.items()]


def state_changes(optimizer: str, remapped: RemappedState) -> list[Change]:
    """A change for each parameter of an optimizer, which is named, whose state was kept or dropped."""

    def change(parameter: str, fate: str, which: str) -> Change:
        why = f"{optimizer}: state of parameters that {which}"
        return Change((parameter,), "optimizer", "state", fate, why, True)

    kept = [change(parameter, CARRIED_OVER, "still exist") for parameter in remapped.kept]
    return kept + [change(parameter, "dropped", "no longer exist") for parameter in remapped.dropped]


def param_groups(model: nn.Module, weight_decay: float, *, exempt: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in two groups for a torch optimizer: with `weight_decay`, and with none.

    None for the parameters of norms, for biases, and for whatever else is a vector: the lengths of normalized weights
    (`weight_g`), scales, tokens. So the recipes of torchvision and timm have it. None either for what the model names
    itself (`model.no_weight_decay()`, as timm's do) and for `exempt`: names of parameters, or glob patterns on them.
    Source: He et al. 2019, "Bag of Tricks for Image Classification with Convolutional Neural Networks", section 3.1.

    Raises OptionError for a weight decay below zero and for a name or pattern that matches nothing.
    """
    if not weight_decay >= 0:
        raise OptionError(f"weight_decay must be 0 or more, not {weight_decay!r}")
    named = dict(model.named_parameters())
    asked = getattr(model, "no_weight_decay", None)
    free = set(asked() if callable(asked) else ())
    for pattern in [exempt] if isinstance(exempt, str) else exempt:
        matched = fnmatch.filter(named, pattern)
        if not matched:
            raise OptionError(
                f"exempt: no parameter is called {pattern!r}; they are called as in model.named_parameters()"
            )
        free.update(matched)
    for path, module in model.named_modules():
        kind = (classify(module) or ("",))[0]
        for name, parameter in module.named_parameters(prefix=path, recurse=kind == "norm"):
            if kind == "norm" or _is_undecayed(name.rpartition(".")[2], parameter, kind == "weight"):
                free.add(name)
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    decayed = [parameter for name, parameter in trained.items() if name not in free]
    rest = [parameter for name, parameter in trained.items() if name in free]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def _is_undecayed(name: str, parameter: nn.Parameter, of_weight_layer: bool) -> bool:
    """Whether a parameter outside of norms goes without weight decay: a bias, or another vector.

    A layer with one output has a matrix all the same, though it looks like a vector.
    """
    if of_weight_layer:
        return name.startswith("bias") or name.endswith("_g") or parameter.dim() < 2
    return "bias" in name or parameter.numel() == max(parameter.shape, default=1)
