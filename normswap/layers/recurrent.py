"""LSTM and GRU with layer normalization inside (Ba, Kiros & Hinton 2016), and trained plain ones turned into them.

A layer here is a subclass of torch's own and keeps its keys. It adds, for each layer and direction, the gains
`gain_ih_l0` and `gain_hh_l0`, and an LSTM `gain_c_l0` and `bias_c_l0` too; a cell has them without the `_l0`. torch's
biases serve as the biases of the norms: `bias_ih` of the one over the input's part, `bias_hh` of the one over the
state's. The further bias of the paper's LSTM would only be added to these, so it is not there. A layer without
biases has gains alone, and no `bias_c`; none comes from a trained one, see `layer_normalized`.

As with torch's own recurrent layers, `torch.compile(fullgraph=True)` wants `torch._dynamo.config.allow_rnn`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

EPS = 1e-5
"""Added to the variance of a normalized vector, as in the authors' code."""

State = tuple[Tensor, ...]  # (h, c) of an LSTM, (h,) of a GRU; each of shape (batch, size)


class Part(NamedTuple):
    """A linear map whose result is normalized by itself: `LN(W x; gain, bias)`."""

    weight: Tensor
    """(out, in)"""
    gain: Tensor
    """(out,)"""
    bias: Tensor | None
    """(out,)"""


class StepWeights(NamedTuple):
    """The tensors of one direction of one layer."""

    ih: list[Part]
    """For the input."""
    hh: list[Part]
    """For the state h."""
    gain_c: Tensor | None
    """For an LSTM's cells: (H,)"""
    bias_c: Tensor | None
    """(H,)"""
    weight_hr: Tensor | None
    """Of a projected LSTM: (projection, H)"""


# ---- one step: tensors to tensors ----


def norm_parts(width: int, gates: int) -> list[int]:
    """The sizes of the parts of a vector of `gates` gates, together `width` wide, that are normalized each by itself.

    An LSTM's four gates are normalized together; of a GRU's three, reset and update together, the candidate alone.
    """
    return [width] if gates == 4 else [width // 3 * 2, width // 3]


def normalized(x: Tensor, parts: Sequence[Part], eps: float) -> State:
    """`LN(W x; gain, bias)` of each part: one tensor (…, 4H) for an LSTM; (…, 2H) and (…, H) for a GRU."""
    return tuple(F.layer_norm(F.linear(x, weight), gain.shape, gain, bias, eps) for weight, gain, bias in parts)


def lstm_step(x: State, state: State, w: StepWeights, eps: float) -> State:
    """One step of a layer-normalized LSTM, from the input's part of the gates, and (h, c), to (h', c').

    `(i, f, g, o) = LN(W_h h; α₁, β₁) + LN(W_x x; α₂, β₂)`, `c' = σ(f)·c + σ(i)·tanh(g)`,
    `h' = σ(o)·tanh(LN(c'; α₃, β₃))`, in torch's order of the gates; a projected one has `h' = W_hr h'` last.
    Source: Ba, Kiros & Hinton 2016, "Layer Normalization", supplementary material.
    """
    assert w.gain_c is not None  # for the type checker: an LSTM has it
    h, c = state
    (gates,) = normalized(h, w.hh, eps)
    i, f, g, o = (gates + x[0]).chunk(4, 1)
    c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
    h = o.sigmoid() * F.layer_norm(c, w.gain_c.shape, w.gain_c, w.bias_c, eps).tanh()
    return h if w.weight_hr is None else F.linear(h, w.weight_hr), c


def gru_step(x: State, state: State, w: StepWeights, eps: float) -> State:
    """One step of a layer-normalized GRU, from the input's two parts, and (h,), to (h',).

    `(r, z) = LN(W_h h; α₁, β₁) + LN(W_x x; α₂, β₂)`, `n = tanh(LN(W x; α₃, β₃) + σ(r)·LN(U h; α₄, β₄))`,
    `h' = (1 − σ(z))·n + σ(z)·h`. The paper has `1 − σ(z)` and `σ(z)` the other way round;
    torch, whose trained weights these are, and the authors' code have them this way.
    """
    (h,) = state
    gates, candidate = normalized(h, w.hh, eps)
    r, z = (gates + x[0]).sigmoid().chunk(2, 1)
    n = torch.addcmul(x[1], r, candidate).tanh()
    return (torch.addcmul(n, z, h - n),)


# ---- all steps ----


def run_steps(
    step: Callable[[State, State], State], inputs: Sequence[State], start: State, reverse: bool
) -> tuple[list[Tensor], State]:
    """The outputs h of all steps, in the order of `inputs`, and each sequence's last state.

    A step's inputs may have fewer sequences than the step before, which then have ended, as in a `PackedSequence`;
    `start` has a state for each. `reverse` runs from the last step to the first: sequences begin, none ends early.
    """
    outputs: list[Tensor] = []
    if reverse:
        state = tuple(s[: inputs[-1][0].shape[0]] for s in start)
        for x in reversed(inputs):
            running, wanted = state[0].shape[0], x[0].shape[0]
            if running < wanted:
                state = tuple(torch.cat([s, new[running:wanted]]) for s, new in zip(state, start, strict=True))
            state = step(x, state)
            outputs.append(state[0])
        return outputs[::-1], state
    state, ended = start, []
    for x in inputs:
        wanted = x[0].shape[0]
        if wanted < state[0].shape[0]:
            ended.append(tuple(s[wanted:] for s in state))
            state = tuple(s[:wanted] for s in state)
        state = step(x, state)
        outputs.append(state[0])
    if ended:
        state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    return outputs, state


def split_steps(parts: State, sizes: list[int] | None) -> list[State]:
    """Tensors for all steps, (steps, batch, size) or packed (sum of `sizes`, size), as one tuple a step."""
    return list(zip(*(p.unbind(0) if sizes is None else torch.split(p, sizes) for p in parts), strict=True))


# ---- the layers ----


class _LayerNormalized:
    """Mixed into a recurrent layer's class: its forward by steps of `step`."""

    gates: int
    step: Callable[[State, State, StepWeights, float], State]

    def __init__(self, *args: Any, eps: float = EPS, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.eps = eps
        like = next(self.parameters())  # type: ignore[attr-defined]
        for name, shape in new_shapes(self).items():  # type: ignore[arg-type]
            setattr(self, name, nn.Parameter(like.new_empty(shape)))
        self.reset_parameters()

    def reset_parameters(self: Any) -> None:
        """torch's own start, and the paper's for the norms: gain 1, and for the norm of the LSTM's cells bias 0."""
        super().reset_parameters()  # type: ignore[misc]
        for name in new_shapes(self):
            if name in self._parameters:  # torch's constructor calls this before they are there
                nn.init.constant_(getattr(self, name), float(name.startswith("gain")))

    def weights(self: Any, suffix: str = "") -> StepWeights:
        """The tensors of one direction of one layer, whose names end with `suffix`: `_l0`, `_l0_reverse`."""
        alone = (getattr(self, name + suffix, None) for name in ("gain_c", "bias_c", "weight_hr"))
        return StepWeights(self._parts("ih" + suffix), self._parts("hh" + suffix), *alone)

    def _parts(self: Any, name: str) -> list[Part]:
        weight = getattr(self, f"weight_{name}")
        sizes = norm_parts(len(weight), self.gates)
        bias = getattr(self, f"bias_{name}", None)
        biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
        gains = torch.split(getattr(self, f"gain_{name}"), sizes)
        return [Part(*tensors) for tensors in zip(torch.split(weight, sizes), gains, biases, strict=True)]

    def extra_repr(self: Any) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"  # type: ignore[misc]


class _Layer(_LayerNormalized):
    def forward(self: Any, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """As the plain layer's: the output of the last layer for all steps, and the last state of each layer."""
        x, sizes, start = prepare_input(self, input, hx)
        x, last = run_layers(self, x, sizes, start, self._run, self.dropout if self.training else 0.0)
        return _in_layout_of(input, self, x, last)

    def _run(self: Any, x: Tensor, sizes: list[int] | None, start: State, suffix: str) -> tuple[list[Tensor], State]:
        w, kind = self.weights(suffix), type(self)
        inputs = split_steps(normalized(x, w.ih, self.eps), sizes)
        return run_steps(lambda x, state: kind.step(x, state, w, self.eps), inputs, start, "reverse" in suffix)

    def flatten_parameters(self) -> None:
        """Nothing: it is for cuDNN, which has no such layer."""


class _Cell(_LayerNormalized):
    def forward(self: Any, input: Tensor, hx: Any = None) -> Any:
        """As the plain cell's: (batch, input) or (input,), and the state before or None, to the state after."""
        w, (x, state) = self.weights(), prepare_cell_input(self, input, hx)
        state = type(self).step(normalized(x, w.ih, self.eps), state, w, self.eps)
        if input.dim() == 1:
            state = tuple(s.squeeze(0) for s in state)
        return state[0] if isinstance(self, nn.GRUCell) else state


class _LSTM:
    gates, step = 4, staticmethod(lstm_step)


class _GRU:
    gates, step = 3, staticmethod(gru_step)


class LayerNormLSTM(_LSTM, _Layer, nn.LSTM):
    """`torch.nn.LSTM` with layer normalization inside; see `lstm_step` for what it computes."""


class LayerNormGRU(_GRU, _Layer, nn.GRU):
    """`torch.nn.GRU` with layer normalization inside; see `gru_step` for what it computes."""


class LayerNormLSTMCell(_LSTM, _Cell, nn.LSTMCell):
    """`torch.nn.LSTMCell` with layer normalization inside; see `lstm_step` for what it computes."""


class LayerNormGRUCell(_GRU, _Cell, nn.GRUCell):
    """`torch.nn.GRUCell` with layer normalization inside; see `gru_step` for what it computes."""


LAYER_NORMALIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: LayerNormLSTM, nn.GRU: LayerNormGRU, nn.LSTMCell: LayerNormLSTMCell, nn.GRUCell: LayerNormGRUCell,
}  # fmt: skip
"""The class with layer normalization inside for each plain one."""


def suffixes(layer: nn.Module) -> list[str]:
    """How the names of a layer's parameters end, by layer and direction, in torch's order; a cell's: one empty one."""
    if not isinstance(layer, nn.RNNBase):
        return [""]
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    return [f"_l{i}{direction}" for i in range(layer.num_layers) for direction in directions]


def new_shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """The parameters that layer normalization adds to a plain layer, or has added, with their shapes."""
    hidden, lstm = int(layer.hidden_size), isinstance(layer, nn.LSTM | nn.LSTMCell)  # type: ignore[arg-type]
    wide = ((4 if lstm else 3) * hidden,)
    shapes: dict[str, tuple[int, ...]] = {}
    for suffix in suffixes(layer):
        shapes |= {f"gain_ih{suffix}": wide, f"gain_hh{suffix}": wide}
        if lstm:
            shapes |= {f"gain_c{suffix}": (hidden,)} | ({f"bias_c{suffix}": (hidden,)} if layer.bias else {})
    return shapes


# ---- input and state as a plain layer takes and gives them ----


def prepare_input(layer: Any, input: Tensor | PackedSequence, hx: Any) -> tuple[Tensor, list[int] | None, State]:
    """Input by step, the batch sizes of a packed one, and the state to start from; checked as the plain layer does.

    The input has the shape (steps, batch, size), or packed (sum of sizes, size); states (layers · directions, batch,
    size).
    """
    lstm = isinstance(layer, nn.LSTM)
    given: State | None = None if hx is None else tuple(hx) if lstm else (hx,)
    order, batch_sizes = None, None
    if isinstance(input, PackedSequence):
        x, batch_sizes, order, _ = input
    else:
        if input.dim() not in (2, 3):
            raise ValueError(f"{type(layer).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if given is not None and any(s.dim() != input.dim() for s in given):
            dims = ", ".join(f"{s.dim()}-D" for s in given)
            raise RuntimeError(f"For {input.dim()}-D input, the state should be {input.dim()}-D too, but got {dims}")
        x = input
        if x.dim() == 2:
            x = x.unsqueeze(0 if layer.batch_first else 1)
            given = None if given is None else tuple(s.unsqueeze(1) for s in given)
    if given is None:
        h_size = layer.get_expected_hidden_size(x, batch_sizes)
        h = torch.zeros(h_size, dtype=x.dtype, device=x.device)
        given = (h, torch.zeros((*h_size[:2], layer.hidden_size), dtype=x.dtype, device=x.device)) if lstm else (h,)
    layer.check_forward_args(x, given if lstm else given[0], batch_sizes)
    if order is not None:
        given = tuple(s.index_select(1, order) for s in given)
    if batch_sizes is None and layer.batch_first:
        x = x.transpose(0, 1)
    return x, None if batch_sizes is None else batch_sizes.tolist(), given


def _in_layout_of(input: Tensor | PackedSequence, layer: Any, x: Tensor, last: State) -> Any:
    """The output by step and the last states, in the layout that `input` has."""
    output: Tensor | PackedSequence
    if isinstance(input, PackedSequence):
        order = input.unsorted_indices
        output = PackedSequence(x, input.batch_sizes, input.sorted_indices, order)
        if order is not None:
            last = tuple(s.index_select(1, order) for s in last)
    else:
        output = x.transpose(0, 1) if layer.batch_first else x
        if input.dim() == 2:
            output, last = output.squeeze(0 if layer.batch_first else 1), tuple(s.squeeze(1) for s in last)
    return output, last if isinstance(layer, nn.LSTM) else last[0]


def prepare_cell_input(cell: Any, input: Tensor, hx: Any) -> tuple[Tensor, State]:
    """Input and state of a cell, (batch, size) each."""
    lstm = isinstance(cell, nn.LSTMCell)
    given: State | None = None if hx is None else tuple(hx) if lstm else (hx,)
    for name, tensor in (("input", input), *(("hidden", s) for s in given or ())):
        if tensor.dim() not in (1, 2):
            raise ValueError(f"{type(cell).__name__}: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead")
    if input.dim() == 1:
        input, given = input.unsqueeze(0), None if given is None else tuple(s.unsqueeze(0) for s in given)
    if given is None:
        given = (torch.zeros(input.shape[0], cell.hidden_size, dtype=input.dtype, device=input.device),) * (1 + lstm)
    return input, given


Run = Callable[[Tensor, "list[int] | None", State, str], "tuple[list[Tensor], State]"]


def run_layers(
    layer: Any, x: Tensor, sizes: list[int] | None, start: State, run: Run, dropout: float
) -> tuple[Tensor, State]:
    """The last layer's output and the last states of all; `run` runs one direction of a layer, named by its suffix."""
    directions = 2 if layer.bidirectional else 1
    names, ends = suffixes(layer), []
    for i in range(layer.num_layers):
        if i and dropout:
            x = F.dropout(x, dropout)
        sides = []
        for d in range(i * directions, (i + 1) * directions):
            outputs, end = run(x, sizes, tuple(s[d] for s in start), names[d])
            sides.append(torch.stack(outputs) if sizes is None else torch.cat(outputs))
            ends.append(end)
        x = sides[0] if directions == 1 else torch.cat(sides, -1)
    return x, tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
