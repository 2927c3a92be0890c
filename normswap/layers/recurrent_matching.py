"""A trained LSTM or GRU turned into one with layer normalization inside, which starts close to the function it had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from normswap.layers import recurrent
from normswap.layers.matching import Affine, widen
from normswap.layers.recurrent import EPS, LAYER_NORMALIZED, State, norm_parts, run_steps, suffixes
from normswap.layers.reparametrized import retyped


@dataclass(frozen=True)
class VectorMoments:
    """Sums over the `count` vectors that a norm saw, one element for each part of `norm_parts`: (parts,)."""

    count: int
    mean: Tensor  # Σ m, where m is the mean over the part
    std: Tensor  # Σ √(s² + eps), where s² is the biased variance over the part

    def __add__(self, other: VectorMoments) -> VectorMoments:
        """The sums over the vectors of both."""
        return VectorMoments(self.count + other.count, self.mean + other.mean, self.std + other.std)


def moments_of(vectors: Tensor, parts: Sequence[int], eps: float = EPS) -> VectorMoments:
    """The moments of `vectors`, (count, size), whose `parts` are normalized each by itself."""
    split = torch.split(widen(vectors), list(parts), 1)
    means = [part.mean(1).sum() for part in split]
    stds = [(part.var(1, correction=0) + eps).sqrt().sum() for part in split]
    return VectorMoments(len(vectors), torch.stack(means), torch.stack(stds))


def match_vectors(moments: VectorMoments, parts: Sequence[int]) -> Affine:
    """The gain and bias with which a layer norm gives back, on average, the vector that it normalized.

    `LN(a) = α·(a − m)/√(s² + eps) + β` with α the mean of √(s² + eps) and β that of m, over the vectors seen; each
    (size,). Exact where every vector has the same m and s.
    """
    widths = torch.tensor(parts, device=moments.mean.device)
    scale, shift = ((total / moments.count).repeat_interleave(widths) for total in (moments.std, moments.mean))
    return Affine(scale, shift)


def merge_moments(*many: Mapping[str, VectorMoments]) -> dict[str, VectorMoments]:
    """The moments over the data of all of `many`, by name."""
    total: dict[str, VectorMoments] = {}
    for moments in many:
        for name, value in moments.items():
            total[name] = total[name] + value if name in total else value
    return total


@torch.no_grad()
def measured_moments(layer: nn.Module, input: Tensor | PackedSequence, hx: Any = None) -> dict[str, VectorMoments]:
    """The moments of each vector that layer normalization would normalize, while a plain layer runs on `input`.

    By the name of the gain without `gain_`: `ih_l0`, `hh_l0`, and of an LSTM `c_l0`; a cell's without `_l0`. There is
    no dropout; those of several inputs can be merged by `merge_moments`.
    """
    if isinstance(layer, nn.RNNBase):
        return _moments_of_steps(layer, *recurrent.prepare_input(layer, input, hx))
    assert isinstance(input, Tensor)  # for the type checker: a cell takes nothing else
    x, start = recurrent.prepare_cell_input(layer, input, hx)
    return _moments_of_steps(layer, x.unsqueeze(0), None, start)


STEPS, SEQUENCES = 16, 64
"""The noise of `typical_moments`. On nets trained on digits, 64 steps did far worse with two layers, 4 did with one."""


@torch.no_grad()
def typical_moments(layer: nn.Module) -> dict[str, VectorMoments]:
    """The moments for a plain layer of which no data is known: `measured_moments` on noise.

    The noise is independent, of unit variance, and the same noise each time. It tells how large the states become, and
    their means, with these weights and biases; on inputs whose mean is far from 0 it can be no better than gain 1, and
    `measured_moments` on true ones is.
    """
    w: Tensor = next(layer.parameters())
    generator = torch.Generator().manual_seed(0)
    size = (STEPS, SEQUENCES, int(layer.input_size))  # type: ignore[arg-type]
    x = torch.randn(size, generator=generator).to(w.device, w.dtype)
    if isinstance(layer, nn.RNNBase):
        return measured_moments(layer, x.transpose(0, 1) if layer.batch_first else x)
    _, start = recurrent.prepare_cell_input(layer, x[0], None)
    return _moments_of_steps(layer, x, None, start)


def _moments_of_steps(layer: nn.Module, x: Tensor, sizes: list[int] | None, start: State) -> dict[str, VectorMoments]:
    """`measured_moments` on what `prepare_input` gives; a cell runs on its own state, as one layer in one direction."""
    found: dict[str, VectorMoments] = {}
    gates = 4 if isinstance(layer, nn.LSTM | nn.LSTMCell) else 3
    wide = torch.promote_types(x.dtype, torch.float32)

    def run(x: Tensor, sizes: list[int] | None, start: State, suffix: str) -> tuple[list[Tensor], State]:
        tensors = {name: getattr(layer, name + suffix, None) for name in _PLAIN}
        w = {name: None if tensor is None else tensor.to(wide) for name, tensor in tensors.items()}
        x = F.linear(x, w["weight_ih"])  # type: ignore[arg-type]
        seen: dict[str, list[Tensor]] = {"ih": [x.flatten(0, -2)], "hh": [], "c": []}
        steps = recurrent.split_steps((x,), sizes)
        result = run_steps(lambda x, state: _observed_step(x[0], state, w, seen), steps, start, "reverse" in suffix)
        for name, vectors in seen.items():
            if vectors:
                found[name + suffix] = moments_of(torch.cat(vectors), norm_parts(vectors[0].shape[1], gates))
        return result

    x, start = x.to(wide), tuple(s.to(wide) for s in start)
    if isinstance(layer, nn.RNNBase):
        recurrent.run_layers(layer, x, sizes, start, run, dropout=0.0)
    else:
        run(x, sizes, start, "")
    return found


_PLAIN = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def _observed_step(x: Tensor, state: State, w: Mapping[str, Any], seen: Mapping[str, list[Tensor]]) -> State:
    """One step of a plain LSTM or GRU on `W_x x`; what layer normalization would normalize in it is added to `seen`."""
    hidden = F.linear(state[0], w["weight_hh"])
    seen["hh"].append(hidden)
    if w["bias_ih"] is not None:
        x, hidden = x + w["bias_ih"], hidden + w["bias_hh"]
    if len(state) == 1:
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, 1), hidden.chunk(3, 1)
        n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
        return (torch.lerp(n, state[0], (x_z + h_z).sigmoid()),)
    i, f, g, o = (x + hidden).chunk(4, 1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    seen["c"].append(c)
    h = o.sigmoid() * c.tanh()
    return h if w["weight_hr"] is None else F.linear(h, w["weight_hr"]), c


def layer_normalized(
    old: nn.Module,
    moments: Mapping[str, VectorMoments] | None = None,
    transfer: str = "match",
    shared: frozenset[int] = frozenset(),
) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A plain layer with layer normalization inside, on the same parameters, and the writes to these that it needs.

    `match` starts each norm by `match_vectors`, of `moments` or else of `typical_moments`: the gains are new, the
    means go into torch's biases by the writes, (tensor, new value), since `old` is left as it is. `copy` and `reset`
    leave the biases and start with gain 1, as the paper does. A layer without biases gets them: without, the means are
    lost, and an LSTM for digits kept 65% where it keeps 92% with them. A bias whose id is in `shared` gets a
    successor.
    """
    cls = next(ours for plain, ours in LAYER_NORMALIZED.items() if isinstance(old, plain))
    gates = 4 if isinstance(old, nn.LSTM | nn.LSTMCell) else 3
    if transfer != "match":
        moments = None
    elif moments is None:
        moments = typical_moments(old)
    parameters: dict[str, nn.Parameter | None] = dict(old._parameters)
    writes: list[tuple[Tensor, Tensor]] = []
    for suffix in suffixes(old):
        for name in ("ih", "hh", "c")[: gates - 1]:
            weight = getattr(old, f"weight_{'ih' if name == 'ih' else 'hh'}{suffix}")
            width = len(weight) // gates if name == "c" else len(weight)
            gain, shift = weight.new_ones(width), weight.new_zeros(width)
            if moments is not None:
                gain, shift = match_vectors(moments[name + suffix], norm_parts(width, gates))
            parameters[f"gain_{name}{suffix}"] = _as_parameter(gain, weight)
            bias = parameters.get(f"bias_{name}{suffix}")
            if bias is None:
                parameters[f"bias_{name}{suffix}"] = _as_parameter(shift, weight)
            elif moments is not None and id(bias) in shared:
                parameters[f"bias_{name}{suffix}"] = _as_parameter(widen(bias) + shift, bias)
            elif moments is not None:
                writes.append((bias, widen(bias) + shift))
    new: Any = retyped(old, cls, parameters=parameters)
    new.eps, new.bias = EPS, True
    if isinstance(new, nn.RNNBase):  # torch's own lists of the parameters, which know of no new biases yet
        names = [name for name in _PLAIN if name != "weight_hr" or new.proj_size]
        new._all_weights = [[name + suffix for name in names] for suffix in suffixes(new)]
        new._flat_weights_names = [name for names in new._all_weights for name in names]
        new._init_flat_weights()
    return new, writes


def _as_parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    """`value` in the dtype of `like`, and trained if that is."""
    return nn.Parameter(value.detach().to(like.dtype), requires_grad=like.requires_grad)
