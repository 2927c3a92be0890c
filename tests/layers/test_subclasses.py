"""Layers that are made of subclasses of torch's: their own forward, class and files, on weights that are computed."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path

import pytest
import torch
from helpers.checks import distance
from helpers.nets import randomize
from helpers.torch_versions import skip_where_torch_cannot
from torch import Tensor, fx, nn
from torch.nn import functional as F

import normswap
from normswap.layers.reparametrized import STANDARDIZED
from normswap.layers.subclasses import form_of_subclass


class SamePadded(nn.Conv2d):
    """Pads as much as its input needs, and has a method of its own."""

    def forward(self, x: Tensor) -> Tensor:
        short = [
            -(-n // s) * s - s + k - n for n, s, k in zip(x.shape[-2:], self.stride, self.kernel_size, strict=True)
        ]
        return F.conv2d(F.pad(x, self.sides(*short)), self.weight, self.bias, self.stride, 0, 1, self.groups)

    def sides(self, high: int, wide: int) -> list[int]:
        return [wide // 2, wide - wide // 2, high // 2, high - high // 2]


class Outer:
    class Causal(nn.Conv1d):
        """Its forward is its parent's, on a longer input."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (2, 0)))


class Transposed(nn.ConvTranspose1d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(x, output_size)[..., 1:]


class Named(nn.Linear):
    """Nothing of its own but a name."""


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        SamePadded(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.SiLU(),
        SamePadded(8, 8, 3, groups=4), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(2),
        Outer.Causal(8, 6, 3), nn.BatchNorm1d(6), Transposed(6, 4, 4, 2, groups=2), nn.BatchNorm1d(4), nn.SiLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), Named(4, 4), nn.BatchNorm1d(4),
    )  # fmt: skip
    return randomize(nn.Sequential(*layers)).double().eval()


X = torch.randn(2, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OWN = [path for path, layer in net().named_modules() if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear)]
TARGETS = ("ws", "wn", "fold", "est-ws", "frozen-wn")


def converted(target: str) -> normswap.Conversion:
    return normswap.convert(net(), target, layers=("conv", "linear"))


@pytest.mark.parametrize("target", TARGETS)
def test_exact_there_and_back(target: str) -> None:
    model, wanted = net(), net()(X)
    new, report = converted(target)
    assert not [left for left in report.left if left.kind == "weight"]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in new.modules()) or "-" not in target
    assert distance(wanted, new(X)) < 1e-12
    plain = normswap.fold(new).model
    assert distance(wanted, plain(X)) < 1e-12
    for path in OWN:
        before, there, back = (m.get_submodule(path) for m in (model, new, plain))
        assert isinstance(there, type(before)) and type(back) is type(before)
        if target.endswith("s"):
            assert isinstance(there, STANDARDIZED[type(before).__bases__[0]])
    assert new[0].sides(1, 2) == [1, 1, 0, 1]  # type: ignore[index, operator]


@pytest.mark.parametrize("target", TARGETS)
def test_files_and_copies(target: str, tmp_path: Path) -> None:
    new, report = converted(target)
    wanted = new(X)
    for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(other(X), wanted) and type(other[0]) is type(new[0])
    torch.save(new, tmp_path / "whole.pt")
    normswap.save(new, tmp_path / "tensors.safetensors", report=report)
    assert distance(wanted, torch.load(tmp_path / "whole.pt", weights_only=False)(X)) < 1e-12
    assert distance(wanted, normswap.load(tmp_path / "whole.pt", trust=True)(X)) < 1e-12
    with pytest.raises(normswap.UnsafeFileError, match=rf"--allow ({__name__}|builtins.getattr)"):
        normswap.load(tmp_path / "whole.pt")
    loaded = normswap.load(tmp_path / "tensors.safetensors", model=net)
    assert distance(wanted, loaded(X)) < 1e-12 and type(loaded[0]) is type(new[0])  # type: ignore[index]


def test_a_file_that_names_what_it_may_not(tmp_path: Path) -> None:
    """Only the class that a form is made of decides; what is none of a layer's is no form at all."""
    model = normswap.convert(nn.Sequential(SamePadded(3, 4, 3), nn.BatchNorm2d(4)), "ws").model
    torch.save(model, tmp_path / "model.pt")
    allowed = [f"{__name__}.SamePadded"]
    assert type(normswap.load(tmp_path / "model.pt", allow=allowed)[0]) is type(model[0])  # type: ignore[index]
    from normswap.layers import subclasses

    for name in ("StandardizedConv2d@os@system", "StandardizedConv2d@torch/nn@Linear", "Conv2d@torch/nn@Conv2d", "x"):
        with pytest.raises(AttributeError, match=name):
            getattr(subclasses, name)


@pytest.mark.parametrize("target", ["ws", "wn"])
def test_tools_see_through(target: str) -> None:
    new, _ = converted(target)
    wanted = new(X)
    assert torch.equal(fx.symbolic_trace(new[7:])(new[:7](X)), wanted)  # type: ignore[index]
    wanted.sum().backward()
    assert all(p.grad is not None for name, p in new.named_parameters() if "weight" in name)
    skip_where_torch_cannot("compile subclasses")
    compiled = torch.compile(new[3:5], fullgraph=True, backend="aot_eager")  # type: ignore[index]
    assert distance(new[:5](X), compiled(new[:3](X))) < 1e-12  # type: ignore[index]


def test_threads_share_a_layer() -> None:
    """No run sees the computed weight of another, or misses its own."""
    layer = converted("ws").model[0]  # type: ignore[index]
    wanted, wrong = layer(X), []

    def run() -> None:
        wrong.extend(1 for _ in range(50) if not torch.equal(layer(X), wanted))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and "weight" not in vars(layer)


def test_one_class_for_each() -> None:
    Local = type("Local", (nn.Conv2d,), {})
    forms = [form_of_subclass(STANDARDIZED[nn.Conv2d], cls) for cls in (SamePadded, SamePadded, Local)]
    assert forms[0] is forms[1] is not forms[2] and forms[0].__name__ == "StandardizedSamePadded"
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(forms[2])
