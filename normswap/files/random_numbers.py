"""Random numbers that a model draws as it is made, and that no file has: a model that is loaded would hold others."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normswap.analysis.reachable import reachable_values
from normswap.errors import ModelError
from normswap.files.filling import same_bits, saved_slots

Named = tuple[str, Any]
"""A value, with the path of the attribute that leads to it."""

_SHOWN = 3  # names in a message


def check_nothing_is_drawn(model: nn.Module, build: Callable[[], nn.Module], where: object) -> None:
    """Raise `ModelError` where `model` reads random numbers outside of its state dict; `build` makes another like it.

    Such as a random projection, or an order of channels, in a plain attribute. A factory that sets its seed draws the
    same each time.
    """
    ours = _unsaved(model)
    if not ours:
        return
    with _random_states_kept():
        drawn = _different(ours, _unsaved(build()))
        if drawn:
            drawn = _random_of(drawn, build)
    if drawn:
        names = ", ".join([*dict.fromkeys(ours[number][0] for number in sorted(drawn))][:_SHOWN])
        raise ModelError(
            f"{where}: the model holds random numbers that the file does not have: {names}; give "
            "a factory that draws the same each time (torch.manual_seed), or keep them in buffers and save it again"
        )


def _random_of(different: set[int], build: Callable[[], nn.Module]) -> set[int]:
    """Which of the unsaved values, by number, are random, and not memory as it was found, a time or a counter.

    Of tensors and arrays, what differs though all memory is written to: numpy's newer generators have no common seed.
    Numbers that are drawn are the same by the same seed.
    """
    with _memory_written():
        ours = _unsaved(build())
        seeded = []
        for _ in range(2):
            _seed()
            seeded.append(_unsaved(build()))
    arrays = {number for number, (_, value) in enumerate(ours) if isinstance(value, Tensor | numpy.ndarray)}
    return (different & arrays & _different(ours, seeded[0])) | (different - arrays - _different(*seeded))


def _unsaved(model: nn.Module) -> list[Named]:
    """What is in reach that no state dict has, by the names of the attributes: tensors, arrays, numbers in lists."""
    saved = {slot.untyped_storage().data_ptr() for module in model.modules() for _, slot in saved_slots(module)}
    found: list[Named] = []
    for name, value in reachable_values(model):
        if not isinstance(value, Tensor):
            found.append((name, value))
        elif value.layout is torch.strided and not is_lazy(value) and value.numel():
            found += [(name, value)] if value.untyped_storage().data_ptr() not in saved else []
    return found


def _different(ours: Sequence[Named], theirs: Sequence[Named]) -> set[int]:
    """Which of the unsaved values, by number, differ between two models of one factory."""
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        return set()
    pairs = zip(ours, theirs, strict=True)
    return {number for number, ((_, mine), (_, other)) in enumerate(pairs) if not _same(mine, other)}


def _same(mine: Any, other: Any) -> bool:
    if isinstance(mine, Tensor) and isinstance(other, Tensor):
        return same_bits(mine, other)
    if isinstance(mine, numpy.ndarray) and isinstance(other, numpy.ndarray):
        alike = mine.dtype == other.dtype and mine.shape == other.shape
        return alike and (mine.dtype.hasobject or mine.tobytes() == other.tobytes())
    return type(mine) is type(other) and bool(mine == other)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


@contextmanager
def _memory_written() -> Iterator[None]:
    """Meanwhile torch writes to memory that it gives without values: `torch.empty` is always the same."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def _seed() -> None:
    torch.default_generator.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
