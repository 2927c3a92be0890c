"""Random numbers that a model draws as it is made, and that no file has: a model that is loaded would hold others."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normswap.analysis.reachable import reachable_tensors
from normswap.errors import ModelError
from normswap.files.filling import same_bits, saved_slots

_SHOWN = 3  # names in a message


def check_nothing_is_drawn(model: nn.Module, build: Callable[[], nn.Module], where: object) -> None:
    """Raise `ModelError` where `model` reads random numbers outside of its state dict; `build` makes another like it.

    Such as a random projection in a plain attribute. A factory that sets its seed draws the same each time.
    """
    if not _unsaved(model):
        return
    with _random_states_kept():
        drawn = _different(model, build())
        if drawn:  # memory that nothing was written to differs as well: what is drawn is the same by the same seed
            same_seed = []
            for _ in range(2):
                _seed()
                same_seed.append(build())
            drawn -= _different(*same_seed)
    if drawn:
        names = [name for index, (name, _) in enumerate(_unsaved(model)) if index in drawn]
        raise ModelError(
            f"{where}: the model holds random numbers that the file does not have: {', '.join(names[:_SHOWN])}; give "
            "a factory that draws the same each time (torch.manual_seed), or keep them in buffers and save it again"
        )


def _unsaved(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors in reach whose memory is not that of the state dict's, by the names of the attributes."""
    saved = {slot.untyped_storage().data_ptr() for module in model.modules() for _, slot in saved_slots(module)}
    plain = [(name, t) for name, t in reachable_tensors(model) if t.layout is torch.strided and not is_lazy(t)]
    return [(name, t) for name, t in plain if t.numel() and t.untyped_storage().data_ptr() not in saved]


def _different(a: nn.Module, b: nn.Module) -> set[int]:
    """Which of the unsaved tensors, by number, differ between two models of one factory."""
    ours, theirs = _unsaved(a), _unsaved(b)
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        return set()
    pairs = zip(ours, theirs, strict=True)
    return {number for number, ((_, mine), (_, other)) in enumerate(pairs) if not same_bits(mine, other)}


@contextmanager
def _random_states_kept() -> Iterator[None]:
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def _seed() -> None:
    torch.default_generator.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
