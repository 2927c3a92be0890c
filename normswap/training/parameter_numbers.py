"""Which parameter is behind which number of an optimizer's state, where a file says only numbers.

Newer state dicts have names. For others, the orders in which training scripts are known to hand over parameters are
tried in turn, as they are or in groups by kind, and the first is taken whose groups have the right sizes and whose
parameters have the shapes of what the optimizer keeps for them.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Parameter:
    """A parameter as an optimizer sees it."""

    name: str
    shape: tuple[int, ...]
    trained: bool = True
    """Whether it requires gradients."""


Parameters = Sequence[Parameter]
"""In the order of `named_parameters()`."""
ParameterKey = Callable[[Parameter], Any]
"""Something about a parameter by which a script tells groups apart."""

_LIKE_PARAMETER = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum", "acc_delta", "grad_avg",
}  # fmt: skip
"""What torch's optimizers keep in the shape of the parameter itself."""


@dataclass(frozen=True)
class Order:
    """An order in which parameters may have been handed to an optimizer, and how they were told apart into groups."""

    names: tuple[str, ...]
    """Through all groups in turn."""
    kind: ParameterKey | None = None
    """What tells groups apart; None where a script put them together in a way of its own."""
    kinds: tuple[Any, ...] = ()
    """The kind of each group."""
    drops_empty: bool = False
    """Whether the script leaves out a group without members, so that the later groups move up."""

    def group_of(self, parameter: Parameter, groups: Mapping[str, int]) -> int:
        """The group of a new parameter, where `groups` are those of the others by name.

        That of its kind, else of what it was made of, else of a parameter called alike in another layer, else the last.
        """
        if self.kind is not None and self.kind(parameter) in self.kinds:
            return self.kinds.index(self.kind(parameter))
        module, _, leaf = parameter.name.rpartition(".")
        origin = groups.get(f"{module}.{leaf[:-2]}".lstrip("."))  # `weight` of `weight_v` and `weight_g`
        alike = (index for name, index in groups.items() if name.rpartition(".")[2] == leaf)
        return next(alike, max(groups.values(), default=0)) if origin is None else origin


def name_numbers(state: Mapping[str, Any], parameters: Parameters) -> tuple[dict[Any, str], Order] | None:
    """The name behind each number of an optimizer's state, and the order that it comes from; None where none fits."""
    groups = [group["params"] for group in state["param_groups"]]
    numbers = [number for group in groups for number in group]
    if not all(isinstance(number, int | str) for number in numbers):
        return None
    shapes = {p.name: p.shape for p in parameters}
    if groups and all("param_names" in group for group in state["param_groups"]):
        orders: Iterable[Order] = _orders_by_name(state["param_groups"], shapes)
    else:
        orders = _likely_orders([len(group) for group in groups], parameters)
    for order in orders:
        if len(order.names) == len(numbers):
            names = dict(zip(numbers, order.names, strict=True))
            if all(_fits(state["state"].get(number), shapes[name]) for number, name in names.items()):
                return names, order
    return None


def without_prefix(name: str, known: Collection[str]) -> str | None:
    """The longest end of `name` that is `known`, from a dot on: `conv.weight` of `module.conv.weight`, by a wrapper."""
    starts = (0, *(match.end() for match in re.finditer(r"\.", name)))
    return next((name[start:] for start in starts if name[start:] in known), None)


def _fits(entry: Any, shape: tuple[int, ...]) -> bool:
    """Whether what an optimizer keeps for a parameter, if anything, can be for one of this shape."""
    if not isinstance(entry, Mapping):
        return True
    kept = [value for name, value in entry.items() if isinstance(value, Tensor) and name in _LIKE_PARAMETER]
    return all(tuple(value.shape) == shape for value in kept)


def _orders_by_name(groups: Sequence[Mapping[str, Any]], known: Collection[str]) -> list[Order]:
    """The one order that the groups' `param_names` spell out; none where they are not the model's, or no names."""
    lists = [group["param_names"] for group in groups]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        return []
    plain = [without_prefix(name, known) for names in lists for name in names]
    return [Order(tuple(name for name in plain if name))] if all(plain) else []


def _likely_orders(sizes: Sequence[int], parameters: Parameters) -> Iterator[Order]:
    """The orders in which training scripts hand over parameters in groups of these sizes, likeliest first."""
    for chosen in (list(parameters), [p for p in parameters if p.trained]):
        yield Order(tuple(p.name for p in chosen))  # whatever the groups: one after the other, as the model has them
        for kind, drops_empty in _known_kinds(_norm_paths(chosen)):
            by_kind: dict[Any, list[str]] = {}
            for p in chosen:
                by_kind.setdefault(kind(p), []).append(p.name)
            if len(by_kind) != len(sizes):
                continue
            for kinds in permutations(by_kind):
                if [len(by_kind[key]) for key in kinds] == list(sizes):
                    names = tuple(name for key in kinds for name in by_kind[key])
                    # Ultralytics puts biases first, and keeps a group that has become empty.
                    yield Order(names, kind, kinds, drops_empty and kinds[0] != "bias")


def _norm_paths(parameters: Parameters) -> set[str]:
    """The modules whose weight has one dimension: norms."""
    return {p.name.rpartition(".")[0] for p in parameters if p.name.endswith("weight") and len(p.shape) == 1}


def _known_kinds(norms: set[str]) -> list[tuple[ParameterKey, bool]]:
    """How scripts tell parameters with weight decay from those without, and whether they leave empty groups out."""

    def of_norm(p: Parameter) -> bool:
        return p.name.rpartition(".")[0] in norms

    def is_bias(p: Parameter) -> bool:
        return p.name.endswith("bias")

    return [
        (lambda p: len(p.shape) <= 1, False),  # timm
        (is_bias, False),
        (of_norm, True),  # torchvision's references, in this way and the two that follow
        (lambda p: of_norm(p) or is_bias(p), True),
        (lambda p: "norm" if of_norm(p) else "bias" if is_bias(p) else "weight", True),
        (lambda p: "bias" if is_bias(p) else "norm" if of_norm(p) else "weight", True),  # these too, and Ultralytics
    ]
