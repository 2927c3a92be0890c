"""Several processes of one training run: calibration on what all of them have, and one fit for all."""

from collections.abc import Callable, Collection, Sequence
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Result = TypeVar("Result")


def world_size() -> int:
    """How many processes there are: 1 where torch.distributed does not run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_batches(batches: Sequence[Any]) -> list[Any]:
    """The batches of all processes, in turns: the same list in each.

    What is measured on them is then the same everywhere, and what one process with all the data would measure.
    """
    if world_size() == 1:
        return list(batches)
    held: list[Any] = [None] * world_size()
    dist.all_gather_object(held, pytree.tree_map_only(Tensor, lambda tensor: tensor.cpu(), list(batches)))
    return [batch for batch in chain.from_iterable(zip_longest(*held)) if batch is not None]


def fit_in_first(fit: Callable[[], Result], model: nn.Module, paths: Collection[str]) -> Result:
    """Run `fit` in the first process; every other gets its result, and the parameters of the layers at `paths`.

    These are all that `fit` may change. What fits by the clock would end elsewhere in each process.
    """
    if world_size() == 1:
        return fit()
    own = {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] in paths}
    shared: list[Any] = [None, None]
    if dist.get_rank() == 0:
        shared = [fit(), {name: p.detach().cpu() for name, p in own.items()}]
    dist.broadcast_object_list(shared, src=0)
    result: Result = shared[0]
    with torch.no_grad():
        for name, value in shared[1].items():
            own[name].copy_(value)
    return result
