"""Standardized and normalized weights, on every kind of layer."""

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.checks import distance
from helpers.layer_kinds import all_weights
from helpers.nets import conv_norm, randomize
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import normswap
from normswap.layers.reparametrized import (
    NORMALIZED,
    PLAIN,
    STANDARDIZED,
    normalize_weight,
    standardize_weight,
    weight_names,
)

FORMS = {"ws": STANDARDIZED, "wn": NORMALIZED}
BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Layer:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


LAYERS = {
    "conv1d": Layer(lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9)),
    "conv2d": Layer(lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
    "conv3d": Layer(lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    "transposed 1d": Layer(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 9)),
    "transposed 2d": Layer(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), (2, 4, 5, 5)),
    "transposed 3d": Layer(lambda: nn.ConvTranspose3d(4, 6, 2, dilation=2), (2, 4, 3, 3, 3)),
    "linear": Layer(lambda: nn.Linear(4, 6), (2, 3, 4)),
    "rnn": Layer(lambda: nn.RNN(4, 6, nonlinearity="relu"), (5, 2, 4)),
    "lstm": Layer(lambda: nn.LSTM(4, 6, 2, bidirectional=True), (5, 2, 4)),
    "lstm, projected": Layer(lambda: nn.LSTM(4, 6, proj_size=3, batch_first=True), (5, 2, 4)),
    "gru": Layer(lambda: nn.GRU(4, 6, 2, bias=False), (5, 2, 4)),
    "rnn cell": Layer(lambda: nn.RNNCell(4, 6), (2, 4)),
    "lstm cell": Layer(lambda: nn.LSTMCell(4, 6), (2, 4)),
    "gru cell": Layer(lambda: nn.GRUCell(4, 6), (2, 4)),
}


def first(output: object) -> torch.Tensor:
    while isinstance(output, tuple):
        output = output[0]
    assert isinstance(output, torch.Tensor)
    return output


def converted(layer: nn.Module, form: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return normswap.convert(layer, form, **all_weights(form)).model


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_exact_trainable_and_portable(name: str, form: str, dtype: torch.dtype) -> None:
    """The same function; pickles and copies; an optimizer's step shows at once; folds back to the plain layer."""
    torch.manual_seed(0)
    plain = LAYERS[name].make().to(dtype)
    x = torch.randn(LAYERS[name].shape, dtype=dtype)
    before = copy.deepcopy(plain.state_dict())
    layer = converted(plain, form)
    assert type(layer) is FORMS[form][type(plain)]
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    for same in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert distance(first(plain(x)), first(same(x))) < BOUND[dtype]
    fresh = converted(LAYERS[name].make().to(dtype), form)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(first(fresh(x)), first(layer(x)))
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    first(layer(x)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    was = first(layer(x)).detach()
    optimizer.step()
    assert distance(was, first(layer(x))) > 1e-6
    folded = normswap.fold(layer).model
    assert type(folded) is type(plain) and folded.state_dict().keys() == plain.state_dict().keys()
    assert distance(first(layer(x)), first(folded(x))) < BOUND[dtype]
    assert first(layer.to(torch.float32)(x.float())).dtype == torch.float32, "nothing stale is left of the other dtype"


@pytest.mark.parametrize("form", FORMS)
def test_packed_sequences(form: str) -> None:
    lstm = nn.LSTM(4, 6, 2, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(5, 3, 4), [5, 3, 2])
    plain, ours = (pad_packed_sequence(layer(packed)[0])[0] for layer in (lstm, converted(lstm, form)))
    assert distance(plain, ours) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_keys(form: str) -> None:
    conv = set(converted(nn.Conv2d(4, 6, 3), form).state_dict())
    lstm = set(converted(nn.LSTM(4, 6, bias=False), form).state_dict())
    if form == "ws":
        assert conv == {"weight", "bias", "weight_gain", "weight_shift"}
        assert lstm == {f"weight_{k}_l0{end}" for k in ("ih", "hh") for end in ("", "_gain", "_shift")}
    else:
        assert conv == {"weight_g", "weight_v", "bias"}
        assert lstm == {f"weight_{k}_l0_{end}" for k in ("ih", "hh") for end in ("g", "v")}


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(4, 6, 3),
        lambda: nn.Linear(4, 6),
        lambda: nn.ConvTranspose2d(4, 6, 3),
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
        lambda: nn.ConvTranspose1d(4, 4, 3, groups=4),
        lambda: nn.ConvTranspose3d(1, 4, 2),
    ],
)
def test_files_in_torchs_spellings_load(make: Callable[[], nn.Module], dim: int | None, tmp_path: Path) -> None:
    """`weight_norm` of both kinds, with lengths along any dimension, also where `weight_g` has another shape here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = weight_norm(make(), dim=dim)
    new = parametrizations.weight_norm(make(), dim=dim)
    for theirs in (old, new):
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.mul_(1.5).add_(0.1)
        wanted = theirs.weight if theirs is new else torch._weight_norm(
            theirs.weight_v, theirs.weight_g, -1 if dim is None else dim
        )  # fmt: skip
        ours = converted(make(), "wn")
        torch.save({f"0.{name}": value for name, value in theirs.state_dict().items()}, tmp_path / "w.pt")
        ours.load_state_dict(theirs.state_dict(), strict=True)
        loaded = normswap.load(tmp_path / "w.pt", model=nn.Sequential(converted(make(), "wn")))[0]
        for layer in (ours, loaded):
            torch.testing.assert_close(layer.weight, wanted)
            lengths = layer.weight.detach().square().sum().sqrt()
            torch.testing.assert_close(layer.weight_g.detach().square().sum().sqrt(), lengths)


@pytest.mark.parametrize("name", LAYERS)
def test_what_writes_a_normalized_weight_by_its_plain_name(name: str) -> None:
    """`reset_parameters` of an init function, and assignment: neither is lost."""
    plain = LAYERS[name].make()
    ours = converted(plain, "wn")
    x = torch.randn(LAYERS[name].shape)
    for layer in (plain, ours):
        torch.manual_seed(3)
        layer.reset_parameters()
    if not isinstance(plain, nn.RNNBase | nn.RNNCellBase):  # these draw other numbers, of the same distribution
        torch.testing.assert_close(first(ours(x)), first(plain(x)))
    bound = max(parameter.detach().abs().max() for parameter in plain.parameters())
    for weight in weight_names(plain):
        assert 0.5 * bound < getattr(ours, weight).detach().abs().max() < 1.1 * bound
    keys = list(ours.state_dict())
    for weight in weight_names(plain):
        setattr(ours, weight, nn.Parameter(plain.get_parameter(weight) * 2))
        torch.testing.assert_close(getattr(ours, weight), plain.get_parameter(weight) * 2)
    assert list(ours.state_dict()) == keys


def test_torchs_weight_norm_is_recognized() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = conv_norm(conv=lambda: weight_norm(nn.Conv2d(3, 8, 3)))
    new = conv_norm(conv=lambda: parametrizations.weight_norm(nn.Conv2d(3, 8, 3)))
    for model in (old, new):
        report = normswap.convert(model, "gn-wn").report
        assert [left.reason.split(",")[0] for left in report.left] == ["is normalized already"]


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3, groups=2), nn.Linear(3, 4)])
def test_a_filter_of_zeros_can_train(layer: nn.Module) -> None:
    """The last layer of a residual branch often starts at zero: its length stays zero, but it gets a direction."""
    with torch.no_grad():
        layer.weight.zero_()
    ours = converted(layer, "wn")
    assert not ours.weight.any()
    shape = (2, layer.weight.shape[1], 5, 5) if isinstance(layer, nn.Conv2d) else (2, 4, 5, 5)
    x = torch.randn(2, 3) if isinstance(layer, nn.Linear) else torch.randn(shape)
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    ours(x).square().sum().backward() if layer.bias is None else (ours(x) - 1).square().sum().backward()
    optimizer.step()
    assert ours.weight.flatten(1).any(1).all()
    with pytest.raises(normswap.ModelError, match="only constant filters"):
        converted(layer, "ws")


def test_a_filter_of_zeros_gives_no_nan() -> None:
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[0] = 0
    ours = converted(layer, "wn")
    y = ours(torch.randn(1, 3, 5, 5))
    y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("groups", [None, 1, 2])
def test_gradients(groups: int | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    out = 4 if groups is None else groups * 3
    gain, shift = torch.rand(out, dtype=torch.float64) + 0.5, torch.randn(out, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w: standardize_weight(w, gain, shift, groups=groups), weight)
    shape = (4, 1, 1, 1) if groups is None else (groups, 3, 1, 1)
    g = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, g: normalize_weight(w, g, groups), (weight, g))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own forward mode
@pytest.mark.parametrize("zeros", [False, True])
def test_a_fused_kernel_or_not(zeros: bool) -> None:
    """A filter of zeros takes another way than torch's kernel: same result, gradients, second and forward ones too."""
    torch.manual_seed(0)
    v, g = torch.randn(4, 3, 2, 2, dtype=torch.float64), torch.rand(4, 1, 1, 1, dtype=torch.float64)
    if zeros:
        v[1] = 0

    def spelled_out(v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        square = v.square().sum((1, 2, 3), keepdim=True)
        return g * v / square.where(square > 0, 1.0).sqrt()

    wanted = spelled_out(v, g)
    torch.testing.assert_close(normalize_weight(v, g), wanted)
    torch.testing.assert_close(torch.vmap(normalize_weight)(torch.stack([v, v]), torch.stack([g, g]))[1], wanted)
    tangents = torch.func.jvp(normalize_weight, (v, g), (torch.zeros_like(v), g))[1]
    torch.testing.assert_close(tangents, wanted)
    with forward_ad.dual_level():
        dual = normalize_weight(forward_ad.make_dual(v, torch.zeros_like(v)), forward_ad.make_dual(g, g))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, wanted)
    v.requires_grad_(), g.requires_grad_()
    filled = (
        v[2:].detach().requires_grad_(),
        g[2:].detach().requires_grad_(),
    )  # at zero there is no derivative to compare with
    assert torch.autograd.gradcheck(normalize_weight, filled)
    assert torch.autograd.gradgradcheck(normalize_weight, filled)
    upstream = torch.randn_like(v)
    for create_graph in (False, True):
        got = torch.autograd.grad(normalize_weight(v, g), (v, g), upstream, create_graph=create_graph)
        for ours, theirs in zip(got, torch.autograd.grad(spelled_out(v, g), (v, g), upstream), strict=True):
            torch.testing.assert_close(ours, theirs)


def conventions() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """How published code standardizes a weight of shape (out, fan-in)."""

    def centred(w: torch.Tensor) -> torch.Tensor:
        return w - w.mean(1, keepdim=True)

    return {
        "unbiased std + 1e-5, outside": lambda w: centred(w) / (w.std(1, keepdim=True) + 1e-5),
        "biased variance + 1e-10, inside": lambda w: centred(w) / (w.var(1, correction=0, keepdim=True) + 1e-10).sqrt(),
        "biased variance + 1e-5, inside": lambda w: centred(w) / (w.var(1, correction=0, keepdim=True) + 1e-5).sqrt(),
    }


def test_published_conventions_on_small_filters() -> None:
    """Filters of std 1e-3 are common: an eps of 1e-5 within the root leaves 0.3 of them; ours is the paper's code."""
    torch.manual_seed(0)
    weight = torch.randn(16, 576) * 1e-3
    one, zero = torch.ones(16), torch.zeros(16)
    ours = standardize_weight(weight, one, zero)
    stds = {name: form(weight).std(1).mean().item() for name, form in conventions().items()}
    assert stds["unbiased std + 1e-5, outside"] == pytest.approx(0.99, abs=0.002)
    assert stds["biased variance + 1e-10, inside"] == pytest.approx(1.0, abs=0.002)
    assert stds["biased variance + 1e-5, inside"] == pytest.approx(0.30, abs=0.01)
    torch.testing.assert_close(ours, conventions()["biased variance + 1e-10, inside"](weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_filters_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 64, 3, 3) * 1e-3
    with torch.autocast("cpu", dtype=dtype):
        std = standardize_weight(weight, torch.ones(16), torch.zeros(16)).float().flatten(1).std(1)
    assert ((std - 1).abs() < 0.02).all()


def test_scope_and_layers() -> None:
    model = nn.Sequential(conv_norm(8), nn.Flatten(), nn.Linear(8 * 36, 5))
    assert [c.paths[0] for c in normswap.convert(model, "wn").report.changes] == ["0.conv"]
    both = normswap.convert(model, "wn", layers=("conv", "linear")).report
    assert [c.paths[0] for c in both.changes] == ["0.conv", "2"]
    assert [c.paths[0] for c in normswap.convert(model, "ws", layers=("conv", "linear")).report.changes] == ["0.conv"]
    for wrong in ("conv", (), ("convolution",)):
        with pytest.raises(normswap.OptionError, match="layers: .* give some of conv, linear, rnn"):
            normswap.convert(model, "wn", layers=wrong)


def test_attention_is_left_alone() -> None:
    """It reads its projection's weight itself."""
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    report = normswap.convert(model, "wn", layers=("linear",)).report
    assert [c.paths[0] for c in report.changes] == ["1"]
    assert "reads its weight" in next(left.reason for left in report.left if left.path == "0.out_proj")


def test_fold_wn_is_the_weight_normalization_paper() -> None:
    """No norm is left, each filter has its length as a parameter, and the trained function is intact."""
    model = randomize(nn.Sequential(conv_norm(8), conv_norm(8, lambda: nn.Conv2d(8, 8, 3, bias=False)))).double().eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    ours, report = normswap.convert(model, "fold-wn")
    assert report.exact and distance(model(x), ours(x)) < 1e-10
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ours.modules())
    assert all(type(m) in PLAIN for m in ours.modules() if weight_names(m) and isinstance(m, nn.Conv2d))
    for block in ours:
        torch.testing.assert_close(block.conv.weight.flatten(1).norm(dim=1), block.conv.weight_g.flatten().abs())


@pytest.mark.parametrize("form", ["ws", "ws strict", "wn"])
def test_a_training_step_is_that_of_the_paper(form: str) -> None:
    """SGD on a convolution and a linear layer, and the same by autograd through the papers' formulas written out."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 4)).double()
    x, y = torch.randn(8, 3, 5, 5, dtype=torch.float64), torch.randint(0, 4, (8,))
    target, _, ws = form.partition(" ")
    model = normswap.convert(plain, target, ws=ws or "preserve", **all_weights(target)).model

    def by_paper(tensors: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        if target == "wn":
            v, g = tensors[f"{index}.weight_v"], tensors[f"{index}.weight_g"]
            return torch.stack([g[i] * v[i] / v[i].square().sum().sqrt() for i in range(len(v))])
        w = tensors[f"{index}.weight"]
        filters = [(f - f.mean()) / (((f - f.mean()) ** 2).mean() + 1e-10).sqrt() for f in w]
        if ws != "strict":
            own = plain[index].weight.detach()
            filters = [f * o.std(correction=0) + o.mean() for f, o in zip(filters, own, strict=True)]
        return torch.stack(filters)

    tensors = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    h = nn.functional.conv2d(x, by_paper(tensors, 0), tensors["0.bias"]).relu().flatten(1)
    loss = nn.functional.cross_entropy(nn.functional.linear(h, by_paper(tensors, 3), tensors["3.bias"]), y)
    wanted = {
        n: t - 0.1 * g
        for (n, t), g in zip(tensors.items(), torch.autograd.grad(loss, list(tensors.values())), strict=True)
    }
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name].detach(), rtol=1e-7, atol=1e-9)


class ReadsItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(nn.functional.conv2d(x, self.conv.weight, self.conv.bias))


@pytest.mark.parametrize(
    "make", [ReadsItsWeight, lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)], ids=["own", "transformer"]
)
def test_a_weight_that_a_forward_reads_is_not_standardized(make: Callable[[], nn.Module]) -> None:
    """The forward would run past the standardization. A normalized layer computes the weight for whoever reads it."""
    model = make().eval()
    with pytest.raises(normswap.ModelError, match="reads directly"):
        normswap.convert(model, "ws", layers=("conv", "linear"), ws_scope="all")
    ours = normswap.convert(model, "wn", layers=("conv", "linear")).model
    x = torch.randn(2, 3, 8, 8) if isinstance(model, ReadsItsWeight) else torch.randn(2, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x))


def test_normalized_recurrent_weights_are_readable() -> None:
    layer, cell = converted(nn.LSTM(3, 4), "wn"), converted(nn.GRUCell(3, 4), "wn")
    torch.testing.assert_close(layer.weight_hh_l0, normalize_weight(layer.weight_hh_l0_v, layer.weight_hh_l0_g))
    assert len(layer.all_weights[0]) == 4 and cell.weight_hh.shape == (12, 4)
    assert not hasattr(layer, "weight_hh_l1")
    pickle.loads(pickle.dumps(copy.deepcopy(layer).double()))(torch.randn(2, 1, 3, dtype=torch.float64))


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).tanh())

    ours, report = normswap.convert(Tied(), "wn", layers=("linear",))
    assert ours.a.weight_g is ours.b.weight_g and ours.a.weight_v is ours.b.weight_v
    assert all("shared" in change.note for change in report.changes)
    ours(torch.randn(3, 4)).square().sum().backward()
    torch.optim.SGD(ours.parameters(), 0.1).step()
    torch.testing.assert_close(ours.a.weight, ours.b.weight)
    assert all("no longer shared" in change.note for change in normswap.fold(ours).report.changes)


def test_a_file_in_torchs_newer_spelling(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(5, 4))
    theirs = copy.deepcopy(plain)
    torch.nn.utils.parametrizations.weight_norm(theirs[0])
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    ours = normswap.load(tmp_path / "w.pt", model=normswap.convert(plain, "wn").model)
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(ours(x), theirs(x))


def test_hints_for_what_was_not_asked() -> None:
    with pytest.raises(normswap.ModelError, match=r"--layers linear,rnn .*recurrent="):
        normswap.convert(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)), "wn")
    report = normswap.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "gn-wn").report
    assert any("no weight was changed" in warning and "linear" in warning for warning in report.warnings)
