"""LSTM and GRU with layer normalization inside, against a plain float64 loop written from the paper."""

import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.torch_versions import skip_where_torch_cannot
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from normswap.layers.recurrent import (
    EPS,
    LAYER_NORMALIZED,
    LayerNormGRU,
    LayerNormGRUCell,
    LayerNormLSTM,
    LayerNormLSTMCell,
)
from normswap.layers.recurrent_matching import layer_normalized, measured_moments, merge_moments, typical_moments

INPUT, HIDDEN, STEPS, BATCH = 3, 4, 5, 3
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")

# ---- the paper: Ba, Kiros & Hinton 2016, supplementary material; one sequence, one vector at a time ----


def ln(a: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    mu = sum(a) / len(a)
    sigma = torch.sqrt(sum((x - mu) ** 2 for x in a) / len(a) + EPS)
    return gain * (a - mu) / sigma + (0 if bias is None else bias)


def lstm_by_paper(w: dict[str, Any], x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    gates = ln(w["weight_hh"] @ h, w["gain_hh"], w["bias_hh"]) + ln(w["weight_ih"] @ x, w["gain_ih"], w["bias_ih"])
    i, f, g, o = gates.view(4, -1)  # torch's order
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(ln(c, w["gain_c"], w["bias_c"]))
    return (h if w["weight_hr"] is None else w["weight_hr"] @ h), c


def gru_by_paper(w: dict[str, Any], x: Tensor, h: Tensor) -> tuple[Tensor]:
    def both(name: str) -> tuple[Any, Any]:
        """The tensor of the two gates, and that of the candidate."""
        return (None, None) if w[name] is None else (w[name][:-HIDDEN], w[name][-HIDDEN:])

    (w_h, u), (a1, a4), (b1, b4) = both("weight_hh"), both("gain_hh"), both("bias_hh")
    (w_x, w_c), (a2, a3), (b2, b3) = both("weight_ih"), both("gain_ih"), both("bias_ih")
    r, z = (ln(w_h @ h, a1, b1) + ln(w_x @ x, a2, b2)).view(2, -1)  # torch's order
    candidate = torch.tanh(ln(w_c @ x, a3, b3) + torch.sigmoid(r) * ln(u @ h, a4, b4))
    return (torch.sigmoid(z) * h + (1 - torch.sigmoid(z)) * candidate,)  # torch's z is the paper's 1 - z


NAMES = [
    *(f"{kind}_{of}" for kind in ("weight", "gain", "bias") for of in ("ih", "hh")),
    "gain_c",
    "bias_c",
    "weight_hr",
]


def by_paper(layer: nn.Module, sequence: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output (steps, size) and the last states, (layers · directions, size), for one sequence (steps, input)."""
    step = lstm_by_paper if isinstance(layer, nn.LSTM) else gru_by_paper
    last: list[list[Tensor]] = []
    for number in range(layer.num_layers):
        sides = []
        for direction in ("", "_reverse")[: 1 + layer.bidirectional]:
            w = {name: getattr(layer, f"{name}_l{number}{direction}", None) for name in NAMES}
            state, outputs = tuple(s[len(last)] for s in states), []
            for x in sequence.flip(0) if direction else sequence:
                state = step(w, x, *state)
                outputs.append(state[0])
            sides.append(torch.stack(outputs[::-1] if direction else outputs))
            last.append(list(state))
        sequence = torch.cat(sides, 1)
    return sequence, [torch.stack(parts) for parts in zip(*last, strict=True)]


# ---- the grid ----


def randomized(layer: nn.Module) -> nn.Module:
    """`layer` in float64, every parameter of it random."""
    with torch.no_grad():
        for parameter in layer.double().parameters():
            parameter.normal_()
    return layer


def layers() -> Iterator[Any]:
    """Every combination of options, with its name."""
    for cls in (LayerNormLSTM, LayerNormGRU):
        for number, two_ways, bias in itertools.product((1, 2), (False, True), (True, False)):
            for proj in (0, 2) if cls is LayerNormLSTM else (0,):
                options = {"num_layers": number, "bidirectional": two_ways, "bias": bias}
                options |= {"proj_size": proj} if proj else {}
                name = ", ".join([cls.__name__, *(f"{k}={v}" for k, v in options.items())])
                yield pytest.param(cls, options, id=name)


def start(layer: nn.Module) -> list[Tensor]:
    """A random state to start from, (layers · directions, batch, size) each."""
    number = layer.num_layers * (1 + layer.bidirectional)
    sizes = [layer.proj_size or HIDDEN, HIDDEN] if isinstance(layer, nn.LSTM) else [HIDDEN]
    return [torch.randn(number, BATCH, size, dtype=torch.float64) for size in sizes]


def as_hx(states: list[Tensor]) -> Any:
    """States in the form in which torch takes and gives them."""
    return tuple(states) if len(states) == 2 else states[0]


def as_list(hx: Any) -> list[Tensor]:
    return [hx] if isinstance(hx, Tensor) else list(hx)


def gradients(layer: nn.Module, outputs: list[Tensor]) -> list[Tensor]:
    """Of a sum of the outputs in which each element has another weight."""
    flat = torch.cat([y.flatten() for y in outputs])
    return list(torch.autograd.grad((flat * torch.linspace(-1, 2, len(flat))).sum(), list(layer.parameters())))


@pytest.mark.parametrize("given", [True, False], ids=["given state", "no state"])
@pytest.mark.parametrize(("cls", "options"), list(layers()))
def test_layers_are_those_of_the_paper(cls: type[nn.Module], options: dict[str, Any], given: bool) -> None:
    """Outputs, last states and gradients, for every form of input that torch's layers take."""
    torch.manual_seed(0)
    layer = randomized(cls(INPUT, HIDDEN, **options))
    first = randomized(cls(INPUT, HIDDEN, batch_first=True, **options))
    first.load_state_dict(layer.state_dict(), strict=True)
    states = start(layer) if given else [torch.zeros_like(s) for s in start(layer)]

    def expect(lengths: list[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        many = [by_paper(layer, x[:n, b], [s[:, b] for s in states]) for b, n in enumerate(lengths)]
        outputs = [output for output, _ in many]
        last = [torch.stack(parts, 1) for parts in zip(*(last for _, last in many), strict=True)]
        return outputs, last, gradients(layer, [*outputs, *last])

    x = torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64)
    hx = as_hx(states) if given else None
    outputs, last, slopes = expect([STEPS] * BATCH)
    y, end = layer(x, hx)
    torch.testing.assert_close((y, as_list(end)), (torch.stack(outputs, 1), last))
    torch.testing.assert_close(gradients(layer, [*y.unbind(1), *as_list(end)]), slopes)
    y, end = first(x.transpose(0, 1), hx)
    torch.testing.assert_close((y, as_list(end)), (torch.stack(outputs), last))
    for unbatched in (layer, first):
        y, end = unbatched(x[:, 1], as_hx([s[:, 1] for s in states]) if given else None)
        torch.testing.assert_close((y, as_list(end)), (outputs[1], [s[:, 1] for s in last]))
    for lengths in ([5, 3, 3], [2, 5, 1]):
        packed = pack_sequence([x[:n, b] for b, n in enumerate(lengths)], enforce_sorted=lengths[0] == 5)
        outputs, last, slopes = expect(lengths)
        y, end = layer(packed, hx)
        assert isinstance(y, PackedSequence) and torch.equal(y.batch_sizes, packed.batch_sizes)
        padded, found = pad_packed_sequence(y, batch_first=True)
        assert found.tolist() == lengths
        torch.testing.assert_close(
            ([p[:n] for p, n in zip(padded, lengths, strict=True)], as_list(end)), (outputs, last)
        )
        ends = [*(p[:n] for p, n in zip(padded, lengths, strict=True)), *as_list(end)]
        torch.testing.assert_close(gradients(layer, ends), slopes)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", [LayerNormLSTMCell, LayerNormGRUCell])
def test_cells_are_those_of_the_paper(cls: type[nn.Module], bias: bool) -> None:
    torch.manual_seed(0)
    cell = randomized(cls(INPUT, HIDDEN, bias=bias))
    w = {name: getattr(cell, name, None) for name in NAMES}
    step = lstm_by_paper if cls is LayerNormLSTMCell else gru_by_paper
    x = torch.randn(BATCH, INPUT, dtype=torch.float64)
    some = [torch.randn(BATCH, HIDDEN, dtype=torch.float64) for _ in range(2 if cls is LayerNormLSTMCell else 1)]
    for states in (some, [torch.zeros_like(s) for s in some]):
        wanted = [torch.stack(parts) for parts in zip(*map(lambda *r: step(w, *r), x, *states), strict=True)]
        hx = as_hx(states) if states is some else None
        torch.testing.assert_close(as_list(cell(x, hx)), wanted)
        torch.testing.assert_close(gradients(cell, as_list(cell(x, hx))), gradients(cell, wanted))
        one = cell(x[1], as_hx([s[1] for s in states]) if states is some else None)
        torch.testing.assert_close(as_list(one), [s[1] for s in wanted])


@pytest.mark.parametrize("cls", [LayerNormLSTM, LayerNormGRU])
def test_gradients(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layer = randomized(cls(2, 3, bidirectional=True))
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    tensors = dict(layer.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(tensors, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, (x, *tensors.values()))


# ---- as modules ----

PLAIN = {
    "lstm": lambda: nn.LSTM(INPUT, HIDDEN, 2, bidirectional=True),
    "lstm, projected": lambda: nn.LSTM(INPUT, HIDDEN, proj_size=2),
    "lstm, no bias": lambda: nn.LSTM(INPUT, HIDDEN, bias=False),
    "gru": lambda: nn.GRU(INPUT, HIDDEN, 2, batch_first=True, dropout=0.5),
    "gru, no bias": lambda: nn.GRU(INPUT, HIDDEN, 2, bias=False),
    "lstm cell": lambda: nn.LSTMCell(INPUT, HIDDEN),
    "gru cell": lambda: nn.GRUCell(INPUT, HIDDEN, bias=False),
}  # fmt: skip


def an_input(layer: nn.Module) -> Tensor:
    return torch.randn(BATCH, INPUT) if isinstance(layer, nn.RNNCellBase) else torch.randn(STEPS, BATCH, INPUT)


def first_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else first_of(output[0])


def nothing(module: nn.Module, args: Any, output: Any) -> None:
    """A hook."""


def converted(layer: nn.Module, *args: Any, **options: Any) -> nn.Module:
    """`layer` with layer normalization inside, its writes done."""
    new, writes = layer_normalized(layer, *args, **options)
    with torch.no_grad():
        for tensor, value in writes:
            tensor.copy_(value)
    return new


@pytest.mark.parametrize("name", PLAIN)
def test_a_trained_layer_is_carried_over(name: str) -> None:
    """Same parameters under the same keys, the old layer untouched until the writes; trains, copies and pickles."""
    torch.manual_seed(0)
    old = PLAIN[name]()
    old.note = "set from outside"
    old.register_forward_hook(nothing)
    x, before = an_input(old), copy.deepcopy(old.state_dict())
    plain_output, contents = first_of(old.eval()(x)), {k: v for k, v in vars(old).items() if k != "_flat_weights"}
    new, writes = layer_normalized(old)
    assert type(new) is LAYER_NORMALIZED[type(old)] and isinstance(new, type(old))
    assert all(torch.equal(value, before[key]) for key, value in old.state_dict().items())
    assert old.state_dict().keys() == before.keys() and vars(old).items() >= contents.items()
    assert torch.equal(first_of(old(x)), plain_output)
    assert all(dict(new.named_parameters())[key] is parameter for key, parameter in old.named_parameters())
    assert new.note is old.note and new._forward_hooks is old._forward_hooks and not new.training
    assert {id(tensor) for tensor, _ in writes} == {
        id(p) for key, p in old.named_parameters() if key.startswith("bias")
    }
    assert all(p.is_leaf and p.requires_grad for p in new.parameters())

    with torch.no_grad():
        for tensor, value in writes:
            tensor.copy_(value)
    y = first_of(new(x))
    for same in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(first_of(same(x)), y) and same.eps == new.eps
    fresh = converted(PLAIN[name]()).eval()
    fresh.load_state_dict(new.state_dict(), strict=True)
    assert torch.equal(first_of(fresh(x)), y)
    first_of(new.train()(x)).square().sum().backward()
    optimizer = torch.optim.SGD(new.parameters(), 0.1)
    alone = [key for key, p in new.named_parameters() if p.grad is None]
    assert not alone, f"no gradient: {alone}"
    optimizer.step()
    assert (first_of(new.eval()(x)) - y).abs().max() > 1e-4
    assert first_of(new.double()(x.double())).dtype == torch.float64
    assert "eps=1e-05" in repr(new)


def test_made_anew_it_starts_as_in_the_paper() -> None:
    layer = LayerNormLSTM(INPUT, HIDDEN, 2, bias=True, eps=1e-3)
    assert all((p == 1).all() for key, p in layer.named_parameters() if key.startswith("gain"))
    assert not layer.bias_c_l1.any() and layer.weight_hh_l1.any() and layer.eps == 1e-3
    without = LayerNormGRUCell(INPUT, HIDDEN, bias=False)
    assert set(without.state_dict()) == {"weight_ih", "weight_hh", "gain_ih", "gain_hh"}
    assert {k: tuple(v.shape) for k, v in LayerNormLSTMCell(INPUT, HIDDEN).state_dict().items() if "gain" in k} == {
        "gain_ih": (4 * HIDDEN,), "gain_hh": (4 * HIDDEN,), "gain_c": (HIDDEN,),
    }  # fmt: skip


def test_dropout_is_between_layers_and_in_train_mode_only() -> None:
    torch.manual_seed(0)
    layer = LayerNormGRU(INPUT, HIDDEN, 2, dropout=1.0)
    x = torch.randn(STEPS, BATCH, INPUT)
    dropped, (one, two) = layer(x)
    torch.testing.assert_close(one, layer.eval()(x)[1][0])  # what the first layer reads is not dropped
    torch.testing.assert_close(layer.train()(x)[0], layer(torch.randn_like(x))[0])  # all of the first layer is dropped
    torch.testing.assert_close(dropped[-1], two)
    assert not torch.allclose(layer.eval()(x)[0], layer(torch.randn_like(x))[0])


@pytest.mark.parametrize("cls", [LayerNormLSTM, LayerNormGRU])
def test_inputs_that_do_not_fit_are_refused_as_by_torch(cls: type[nn.Module]) -> None:
    layer = cls(INPUT, HIDDEN)
    plain = (nn.LSTM if cls is LayerNormLSTM else nn.GRU)(INPUT, HIDDEN)
    three, two = torch.zeros(1, BATCH, HIDDEN), torch.zeros(1, HIDDEN)
    wrong = [
        (torch.zeros(STEPS, BATCH, INPUT + 1), None),
        (torch.zeros(3), None),
        (torch.zeros(STEPS, BATCH, INPUT).double(), None),
    ]
    wrong += [(torch.zeros(STEPS, BATCH, INPUT), s) for s in (two, torch.zeros(1, BATCH + 1, HIDDEN))]
    wrong += [(torch.zeros(STEPS, INPUT), three)]
    for x, state in wrong:
        hx = (state, state) if cls is LayerNormLSTM and state is not None else state
        with pytest.raises((RuntimeError, ValueError)) as theirs:
            plain(x, hx)
        with pytest.raises(theirs.type):
            layer(x, hx)


@pytest.mark.parametrize("cls", [LayerNormLSTM, LayerNormGRU])
@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch's own list of weights; its own layers warn as well
def test_compiled_exported_and_under_autocast(cls: type[nn.Module]) -> None:
    skip_where_torch_cannot(cls.__name__)
    torch.manual_seed(0)
    layer = cls(INPUT, HIDDEN, 2, bidirectional=True)
    x = torch.randn(STEPS, BATCH, INPUT)
    y = layer(x)[0]
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x)[0], y)
    dynamic = torch.export.export(layer, (x,), dynamic_shapes=({1: torch.export.Dim("batch", min=2, max=64)},)).module()
    wider = torch.randn(STEPS, BATCH + 4, INPUT)
    torch.testing.assert_close(dynamic(wider)[0], layer(wider)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)[0]
        layer(pack_sequence([x[:, 0], x[:2, 1]]))
    low.float().sum().backward()
    torch.testing.assert_close(low.float(), y, rtol=0.1, atol=0.1)
    assert layer.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16


# ---- how it starts ----


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bias", [True, False])
def test_the_start_is_exact_where_statistics_do_not_vary(cls: type[nn.Module], bias: bool) -> None:
    """One sequence of one step from one state: each vector has the mean and the std that were measured."""
    torch.manual_seed(0)
    old = cls(6, 8, 2, bias=bias, bidirectional=True).double()
    x, state = torch.randn(1, 1, 6, dtype=torch.float64), torch.randn(4, 1, 8, dtype=torch.float64)
    hx = (state, torch.randn(4, 1, 8, dtype=torch.float64)) if cls is nn.LSTM else state
    wanted = old(x, hx)[0]
    torch.testing.assert_close(converted(old, measured_moments(old, x, hx))(x, hx)[0], wanted)


@pytest.mark.parametrize("cls", [nn.LSTMCell, nn.GRUCell])
def test_the_start_of_a_cell_is_exact_where_statistics_do_not_vary(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    old = cls(6, 8).double()
    x, h, c = (torch.randn(1, size, dtype=torch.float64) for size in (6, 8, 8))
    hx = (h, c) if cls is nn.LSTMCell else h
    wanted = first_of(old(x, hx))
    torch.testing.assert_close(first_of(converted(old, measured_moments(old, x, hx))(x, hx)), wanted)


def test_measured_moments_add_up_whatever_the_layout() -> None:
    torch.manual_seed(0)
    old = nn.LSTM(INPUT, HIDDEN, 2, bidirectional=True, proj_size=2).double()
    x = torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64)
    whole = measured_moments(old, x)
    apart = merge_moments(*(measured_moments(old, x[:, b]) for b in range(BATCH)))
    packed = measured_moments(old, pack_sequence(list(x.unbind(1))))
    assert set(whole) == {f"{n}_l{i}{d}" for n in ("ih", "hh", "c") for i in (0, 1) for d in ("", "_reverse")}
    for name, moments in whole.items():
        assert moments.count == STEPS * BATCH
        for other in (apart, packed):
            torch.testing.assert_close(vars(other[name]), vars(moments))
    vectors = (x @ old.weight_ih_l0.T).detach().flatten(0, 1)
    torch.testing.assert_close(whole["ih_l0"].mean, vectors.mean(1).sum()[None])
    torch.testing.assert_close(whole["ih_l0"].std, (vectors.var(1, correction=0) + EPS).sqrt().sum()[None])


@pytest.mark.parametrize("name", PLAIN)
def test_without_data_the_start_is_always_the_same(name: str) -> None:
    old = PLAIN[name]()
    one, two = typical_moments(old), typical_moments(old)
    assert all(torch.equal(one[key].mean, two[key].mean) and torch.equal(one[key].std, two[key].std) for key in one)


def test_transfer_and_shared_biases() -> None:
    old = nn.GRU(INPUT, HIDDEN)
    for transfer in ("copy", "reset"):
        new, writes = layer_normalized(old, transfer=transfer)
        assert not writes and (new.gain_ih_l0 == 1).all() and new.bias_ih_l0 is old.bias_ih_l0
    new, writes = layer_normalized(old, shared=frozenset({id(old.bias_ih_l0)}))
    assert [tensor for tensor, _ in writes] == [old.bias_hh_l0] and new.bias_ih_l0 is not old.bias_ih_l0
    assert new._flat_weights[2] is new.bias_ih_l0 and old._flat_weights[2] is old.bias_ih_l0
    old.weight_hh_l0.requires_grad_(False)
    new, _ = layer_normalized(old)
    assert not new.gain_hh_l0.requires_grad and new.gain_ih_l0.requires_grad


class Reader(nn.Module):
    """Reads a digit row by row."""

    def __init__(self, cls: type[nn.Module], **options: Any):
        super().__init__()
        self.rnn, self.head = cls(8, 48, batch_first=True, **options), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize(
    ("cls", "options", "least"), [(nn.LSTM, {}, 0.85), (nn.LSTM, {"bias": False}, 0.85), (nn.GRU, {}, 0.93)]
)
def test_a_trained_net_keeps_more_than_with_gain_1(cls: type[nn.Module], options: dict[str, Any], least: float) -> None:
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    net = Reader(cls, **options)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(12):
        for part in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()

    def accuracy(**how: Any) -> float:
        other = copy.deepcopy(net)
        if how:
            other.rnn = converted(other.rnn, **how)
        with torch.no_grad():
            return (other(x).argmax(1) == y).double().mean().item()

    before, reset, typical = accuracy(), accuracy(transfer="reset"), accuracy(moments=None)
    measured = accuracy(moments=measured_moments(net.rnn, x[:200]))
    assert before > 0.97, before
    assert measured > least and measured > reset + 0.05, (before, reset, typical, measured)
    assert typical > reset + (0.05 if options.get("bias", True) else 0), (before, reset, typical, measured)
