"""torch's own `weight_norm` and `spectral_norm`: folded away, norms behind them too, and left by other targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.checks import distance, fingerprint, same
from helpers.nets import randomize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils import weight_norm as hooked_weight_norm

import normswap

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

Normalize = Callable[[nn.Module], nn.Module]
BY: dict[str, Normalize] = {
    **{f"hook, dim {d}": partial(hooked_weight_norm, dim=d) for d in (0, 1, None)},
    **{f"parametrization, dim {d}": partial(parametrizations.weight_norm, dim=d) for d in (0, 1, None)},
    "spectral hook": hooked_spectral_norm,
    "spectral parametrization": parametrizations.spectral_norm,
    "both": lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)),
}


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (2, 0)))


def net(by: Normalize, moved: bool = True) -> nn.Module:
    """A vocoder's layers with a norm behind some; `moved` as after training, when nothing is as it was made."""
    torch.manual_seed(0)
    layers = (
        by(nn.Conv1d(3, 8, 3, bias=False)), nn.BatchNorm1d(8), nn.SiLU(),
        by(nn.ConvTranspose1d(8, 6, 4, 2, groups=2)), nn.BatchNorm1d(6), nn.SiLU(),
        by(Causal(6, 4, 3)), nn.BatchNorm1d(4), nn.SiLU(),
        by(nn.Conv1d(4, 2, 1)), nn.Tanh(), nn.Flatten(), by(nn.Linear(40, 5)), nn.BatchNorm1d(5),
    )  # fmt: skip
    model = randomize(nn.Sequential(*layers)).double()
    if moved:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.rand_like(parameter), alpha=0.3)
        model(X)
    return model


X = torch.randn(2, 3, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def plain() -> nn.Module:
    return net(lambda layer: layer, moved=False)


def has_hooks(layer: nn.Module) -> bool:
    return any(getattr(layer, f"_{kind}_hooks") for kind in ("forward_pre", "state_dict", "load_state_dict_pre"))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("by", BY.values(), ids=BY)
def test_fold_leaves_plain_layers(by: Normalize, training: bool) -> None:
    model = net(by)
    wanted = model.eval()(X)
    model.train(training)
    before = fingerprint(model)
    folded, report = normswap.fold(model)
    assert same(before, fingerprint(model))
    assert distance(wanted, folded.eval()(X)) < 1e-12
    gone = [nn.Identity if isinstance(layer, nn.BatchNorm1d) else type(layer) for layer in plain()]  # type: ignore[attr-defined]
    assert [type(layer) for layer in folded] == gone  # type: ignore[attr-defined]
    assert not any(has_hooks(layer) or parametrize.is_parametrized(layer) for layer in folded.modules())
    assert sum(change.kind == "weight" for change in report.changes) == 5


@pytest.mark.parametrize("target", ["fold", "fold-ws", "fold-wn"])
@pytest.mark.parametrize("by", BY.values(), ids=BY)
def test_norms_fold_through(by: Normalize, target: str) -> None:
    model = net(by)
    wanted = model.eval()(X)
    folded, report = normswap.convert(model, target)
    assert distance(wanted, folded(X)) < 1e-12
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in folded.modules())
    assert type(folded[3]) is nn.ConvTranspose1d and folded[0].bias is not None  # type: ignore[index]
    assert "baked in; took in" in next(change.how for change in report.changes if "6" in change.paths)


@pytest.mark.parametrize("by", BY.values(), ids=BY)
def test_other_targets_leave_it(by: Normalize) -> None:
    model = net(by).eval()
    wanted = model(X)
    for target in ("est-ws", "frozen-wn"):
        new, report = normswap.convert(model, target, layers=("conv", "linear"))
        assert distance(wanted, new(X)) < 1e-12
        reasons = [left.reason for left in report.left if left.kind == "weight"]
        assert len(reasons) == 5 and all("already, by torch's" in reason for reason in reasons)
        assert distance(wanted, normswap.fold(new).model(X)) < 1e-12


def test_only_what_is_chosen_folds() -> None:
    model = net(BY["hook, dim 0"])
    wanted = model.eval()(X)
    folded = normswap.convert(model, "fold", include="1").model
    assert distance(wanted, folded(X)) < 1e-12
    assert [has_hooks(folded[i]) for i in (0, 3, 6)] == [False, True, True]  # type: ignore[index]
    folded = normswap.convert(model, "fold", exclude="0").model
    assert distance(wanted, folded(X)) < 1e-12 and has_hooks(folded[0])  # type: ignore[index]
    assert isinstance(folded[1], nn.BatchNorm1d)  # type: ignore[index]


class Tied(nn.Module):
    """Reads the weight of its convolution once more, past it."""

    def __init__(self, by: Normalize) -> None:
        super().__init__()
        self.conv, self.norm = by(nn.Conv1d(3, 4, 1)), randomize(nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(self.norm(self.conv(x)), self.conv.weight.transpose(0, 1))


@pytest.mark.parametrize("by", BY.values(), ids=BY)
def test_a_norm_stays_where_the_weight_is_read_directly(by: Normalize) -> None:
    model = Tied(by).double().eval()
    wanted = model(X)
    folded, report = normswap.convert(model, "fold")
    assert distance(wanted, folded(X)) < 1e-12 and isinstance(folded.norm, nn.BatchNorm1d)
    assert [left.reason for left in report.left] == ["the layer before it has a weight that is also read directly"]


def test_in_place_the_direction_goes_on_as_the_weight() -> None:
    model = net(BY["hook, dim 0"]).eval()
    wanted, direction, layer = model(X), model[3].weight_v, model[3]  # type: ignore[index]
    handle = model[9].register_forward_hook(lambda *_: None)  # type: ignore[index]
    normswap.convert(model, "fold", inplace=True)
    assert distance(wanted, model(X)) < 1e-12
    assert model[3] is layer and layer.weight is direction and direction.requires_grad  # type: ignore[index]
    assert handle.id in model[9]._forward_hooks  # type: ignore[index]


def test_shared_directions_part() -> None:
    first, second = (hooked_weight_norm(nn.Conv1d(4, 4, 3, padding=1)) for _ in range(2))
    second.weight_v = first.weight_v
    with torch.no_grad():
        second.weight_g.mul_(2)
    model, x = nn.Sequential(first, second).eval(), torch.randn(2, 4, 5)
    folded, report = normswap.fold(model)
    assert distance(model(x), folded(x)) < 1e-6
    assert {change.note for change in report.changes} == {"weight no longer shared with another layer"}


def test_recurrent_layers() -> None:
    for layer in (nn.LSTM(3, 4), nn.GRUCell(3, 4)):
        model = hooked_weight_norm(layer, "weight_hh_l0" if isinstance(layer, nn.RNNBase) else "weight_hh").eval()
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if name.endswith("_g")).mul_(2)
        x = torch.randn(2, 5, 3) if isinstance(layer, nn.RNNBase) else torch.randn(2, 3)
        wanted = model(x)[0]
        folded = normswap.fold(model).model
        assert type(folded) is type(layer) and not has_hooks(folded)
        assert distance(wanted, folded(x)[0]) < 1e-6


def test_other_computed_weights_are_left() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    own = parametrizations.weight_norm(nn.Conv1d(3, 8, 3))
    parametrize.register_parametrization(own, "weight", Doubled())
    pruned = hooked_weight_norm(prune.l1_unstructured(nn.Conv1d(8, 8, 3), "bias", 2))
    model = nn.Sequential(own, nn.BatchNorm1d(8), pruned, nn.BatchNorm1d(8)).eval()
    with pytest.raises(normswap.ModelError, match="has a parametrization on it"):
        normswap.convert(model, "fold")
    assert [left.reason for left in normswap.convert(model, "est-ws").report.left if left.path == "2"] == [
        "has a bias that is computed (a pruning mask or the like)"
    ]


@pytest.mark.parametrize("fold", [normswap.fold, lambda model: normswap.convert(model, "fold")], ids=["plain", "fold"])
def test_files(fold: Callable[[nn.Module], normswap.Conversion], tmp_path: Path) -> None:
    """A folded file meets the model as it was, under either of torch's forms, and the plain one."""
    model = net(BY["parametrization, dim 0"]).eval()
    folded, report = fold(model)
    normswap.save(folded, tmp_path / "model.safetensors", report=report)
    for make in (partial(net, BY["parametrization, dim 0"]), partial(net, BY["hook, dim 0"]), plain):
        loaded = normswap.load(tmp_path / "model.safetensors", model=make)
        assert distance(model(X), loaded.eval()(X)) < 1e-12
    torch.save(folded, tmp_path / "model.pt")
    assert distance(model(X), torch.load(tmp_path / "model.pt", weights_only=False)(X)) < 1e-12


def test_a_whole_module_with_the_hook_is_read(tmp_path: Path) -> None:
    model = nn.Sequential(hooked_weight_norm(nn.Conv1d(3, 4, 3)), nn.BatchNorm1d(4)).double().eval()
    with torch.no_grad():
        wanted = model(X)
        torch.save(model, tmp_path / "model.pt")
    report = normswap.convert_file(tmp_path / "model.pt", "fold")
    assert report.exact and not report.left
    assert distance(wanted, normswap.load(tmp_path / "model.fold.pt")(X)) < 1e-12
