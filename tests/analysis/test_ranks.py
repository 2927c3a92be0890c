"""How many dimensions the inputs of norms may have, by elimination."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers.nets import Forward
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.analysis.dataflow import find_flow
from normswap.analysis.ranks import ANY_RANK
from normswap.analysis.sites import find_sites

ANY = set(ANY_RANK)


def widths(*channels: int, layer: Callable[[int, int], nn.Module] = nn.Linear) -> nn.Sequential:
    """Layers of these widths, each but the first with a BatchNorm1d behind it."""
    pairs = itertools.pairwise(channels)
    return nn.Sequential(*(part for i, o in pairs for part in (layer(i, o), nn.BatchNorm1d(o), nn.ReLU())))


def causal(self: nn.Module, x: Tensor) -> Tensor:
    return self.second(F.pad(self.first(x), (2, 0))[:, :, :-2])


def points(self: nn.Module, x: Tensor) -> Tensor:
    return self.second(torch.max(self.first(x), 2)[0])


def conv(i: int, o: int) -> nn.Module:
    return nn.Conv1d(i, o, 3, padding=1)


def cut(i: int, o: int) -> nn.Module:
    return nn.Conv1d(i, o, 3)


NETS: dict[str, tuple[nn.Module, set[int]]] = {
    "one linear layer": (widths(4, 8), {2, 3}),
    "linear layers of one width": (widths(4, 8, 8), {2, 3}),
    "linear layers of other widths": (widths(4, 8, 9), {2}),
    "flattened": (nn.Sequential(nn.Flatten(), *widths(4, 8)), {2}),
    "flattened to tokens": (nn.Sequential(nn.Flatten(2), *widths(4, 8)), {3}),
    "in rows": (Forward(lambda self, x: self.body(x.view(-1, 4)), body=widths(4, 8)), {2}),
    "turned": (Forward(lambda self, x: self.body(x.permute(0, 2, 1)), body=widths(4, 8)), {3}),
    "the mean of maps": (
        Forward(lambda self, x: self.body(self.norm(x).mean((2, 3))), norm=nn.BatchNorm2d(4), body=widths(4, 8)), {2}
    ),
    "one convolution": (widths(4, 8, layer=conv), {2, 3}),
    "convolutions of one length": (widths(4, 8, 8, layer=conv), {2, 3}),
    "convolutions of one length, other widths": (widths(4, 8, 9, layer=conv), {3}),
    "convolutions that cut": (widths(4, 8, 8, layer=cut), {3}),
    "convolutions that cut to the next width": (widths(4, 8, 6, layer=cut), {2, 3}),
    "padded and cut": (Forward(causal, first=widths(4, 8, layer=conv), second=widths(8, 8, layer=conv)), {3}),
    "a maximum over points": (Forward(points, first=widths(4, 8, layer=conv), second=widths(8, 8)), {2, 3}),
    "maps behind a linear layer": (nn.Sequential(nn.Linear(4, 8), nn.BatchNorm2d(3)), {4}),
    "synchronized behind Conv2d": (nn.Sequential(nn.Conv2d(4, 8, 3), nn.SyncBatchNorm(8)), {3, 4}),
    "layer norm of tokens or not": (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), ANY),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_what_is_left_by_elimination(name: str) -> None:
    model, wanted = NETS[name]
    ranks = find_flow(model, find_sites(model)).ranks
    *_, last = ranks.values()
    assert last == wanted


def test_a_sum_has_the_sizes_of_both() -> None:
    """A residual sum, and a concatenation, carry what one side tells to the other."""
    net = Forward(
        lambda self, x: self.last(torch.cat([self.left(x), self.right(x)], 1)),
        left=widths(4, 8, layer=conv), right=widths(4, 9, layer=conv), last=nn.BatchNorm1d(17),
    )  # fmt: skip
    assert all(ranks == {3} for ranks in find_flow(net, find_sites(net)).ranks.values())
    net = Forward(
        lambda self, x: self.left(x) + self.right(x), left=widths(4, 8), right=widths(4, 8),
    )  # fmt: skip
    assert all(ranks == {2, 3} for ranks in find_flow(net, find_sites(net)).ranks.values())


class PadsByItself(nn.Conv1d):
    """Its output is as long as its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 2)))


def test_the_length_behind_a_subclass_is_not_known() -> None:
    net = widths(4, 8, 8, layer=lambda i, o: PadsByItself(i, o, 3))
    assert all(ranks == {2, 3} for ranks in find_flow(net, find_sites(net)).ranks.values())


def test_a_layer_with_a_hook_tells_nothing() -> None:
    net = widths(4, 8, 9)
    net[3].register_forward_hook(lambda module, args, output: output.flatten())
    assert find_flow(net, find_sites(net)).ranks["1"] == {2, 3}


def test_dimensions_that_are_counted_from_the_end() -> None:
    net = Forward(lambda self, x: self.body(x.transpose(-3, -1)), body=widths(4, 8))
    assert find_flow(net, find_sites(net)).ranks["body.1"] == {3}


def test_an_element_of_a_value_that_it_is_put_together_with() -> None:
    """Of a list of values it is; a trace cannot tell that from a tensor."""
    model = Forward(lambda self, x: self.norm(torch.cat([x[0], x], 1)), norm=nn.BatchNorm2d(8))
    assert find_flow(model, find_sites(model)).ranks == {"norm": {4}}
