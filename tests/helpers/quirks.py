"""The quirk zoo: tiny models, each with one thing that converters get wrong.

A `Quirk` says how many of its layers each kind of target must change, counted by hand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from helpers.nets import chain, conv_norm, mlp, touched
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import normswap


@dataclass(frozen=True)
class Quirk:
    """A model, the shape of its input, and what must change: norms by gn, ln and in; by pn; by frozen; by fold;
    convolutions by ws, and by wn, which takes those without a norm as well; norms by bn, without data.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 3, 8, 8)
    norms: int = 1
    pn: int | None = None
    frozen: int | None = None
    fold: int | None = None
    takes_in: int | None = None  # layers that the folded norms go into, if not one for each
    ws: int = 1
    wn: int | None = None
    bn: int = 0
    dtype: torch.dtype = torch.float32
    warns: bool = False
    normalized: bool = False  # by torch, whose hooks and parametrizations a fold takes away

    def expected(self, target: str) -> tuple[int, int]:
        """(norms, weights) that `target` changes; a fold changes the layer that takes the norm in as well."""
        norm, _, weight = target.partition("-")
        if norm in ("ws", "wn"):
            norm, weight = "", norm
        frozen = self.norms if self.frozen is None else self.frozen
        fold = frozen if self.fold is None else self.fold
        counts = {"": 0, "frozen": frozen, "est": frozen, "bcn": min(frozen, self.norms), "fold": fold, "bn": self.bn}
        norms = self.pn if norm == "pn" and self.pn is not None else counts.get(norm, self.norms)
        weights = {"": 0, "ws": self.ws}.get(weight, self.ws if self.wn is None else self.wn)
        taken_in = fold if self.takes_in is None else self.takes_in
        return norms, max(weights, taken_in) if norm == "fold" else weights


class OneParent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.again = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.conv(x))


class TwoParents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(8)
        self.left = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
        self.right = nn.Sequential(nn.Conv2d(3, 8, 3), norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class OwnForward(nn.BatchNorm2d):
    """A batch norm that does more: a converter that goes by `isinstance` breaks it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class PlainSubclass(nn.BatchNorm2d):
    """A batch norm under another name; it is one."""


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return F.relu(self.last(x))


class Concatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 7, 3)
        self.norm = nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([self.a(x), self.b(x)], 1))


class ConvTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv(F.relu(self.norm1(self.conv(x)))))


class ConvThenTwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm1(x) * self.norm2(x)


class NormAndSkip(nn.Module):
    """The convolution's output is used beside its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + self.norm(x)


class OnData(nn.Module):
    """Both branches use the convolution; only one of them its norm: folding would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.norm(self.conv(x))
        return self.conv(x)


class Untraceable(nn.Module):
    """The number of rounds depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.block = conv_norm()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.shape[0])):
            x = self.norm(self.conv(x))
        return self.block(x)


class ReadsWeight(nn.Module):
    """The forward reads the convolution's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv.weight.mean()


class ReadsStatistics(nn.Module):
    """The forward reads the norm's statistics itself: it cannot do without them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.norm.running_mean, self.norm.running_var)


class Remembers(nn.Module):
    """The forward leaves its input behind: tracing must not leave a proxy in the user's model."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.seen = conv_norm(), None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape
        return self.block(x)


class PlainList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = conv_norm()
        self.hidden = [nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        for layer in self.hidden:
            x = layer(x)
        return x


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.ConvTranspose2d(4, 8, 3, groups=2, stride=2), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x))


class TiedNorms(nn.Module):
    """Two norms with one gain and bias: their matched values part."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_norm(), conv_norm()
        self.b.norm.weight, self.b.norm.bias = self.a.norm.weight, self.a.norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class TiedConvs(nn.Module):
    """Two convolutions with one weight, each with a norm of its own: no norm can go into the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_norm(), conv_norm()
        self.b.conv.weight = self.a.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def _mixed_modes(model: nn.Module) -> None:
    model.train()
    model[0].norm.eval()


def _no_bias(model: nn.Module) -> None:
    model.norm.bias = None


def _add(hook: str, function: Callable[..., None]) -> Callable[[nn.Module], object]:
    return lambda model: getattr(model.norm, hook)(function)


def _notes(module: nn.Module, *args: object) -> None:
    module.calls = getattr(module, "calls", 0) + 1


def _lazy_run() -> nn.Module:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())
    model(torch.zeros(2, 3, 8, 8))
    return model


def _set_attributes(model: nn.Module) -> None:
    model.norm.tag = "stage 1"
    model.norm.register_buffer("extra", torch.ones(3))
    model.conv.lr_scale = 0.1
    model.norm.weight.no_decay = True


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in many a checkpoint
        return weight_norm(nn.Conv2d(3, 8, 3))


def _mixed_precision(model: nn.Module) -> None:
    model.bfloat16()
    model.norm.float()


B = nn.BatchNorm2d
SINGLE_FORMS = [target for target in normswap.TARGETS if "-" not in target]
"""The targets that change norms alone or weights alone; the others are pairs of these."""
FROM_BATCH_NORM = [target for target in normswap.TARGETS if target != "bn"]
"""The targets that change a convolution with a batch norm behind it."""
QUIRKS: dict[str, Quirk] = {
    "plain": Quirk(conv_norm),
    "one norm, two names": Quirk(OneParent),
    "one norm, two parents": Quirk(TwoParents, fold=0, ws=2),
    "root is a norm": Quirk(lambda: B(3), fold=0, ws=0),
    "not affine": Quirk(lambda: conv_norm(norm=B(8, affine=False))),
    "no running statistics": Quirk(lambda: conv_norm(norm=B(8, track_running_stats=False)), frozen=0),
    "neither": Quirk(lambda: conv_norm(norm=B(8, affine=False, track_running_stats=False)), frozen=0),
    "momentum None": Quirk(lambda: conv_norm(norm=B(8, momentum=None))),
    "eps": Quirk(lambda: conv_norm(norm=B(8, eps=0.1))),
    "weight, no bias": Quirk(lambda: touched(conv_norm(), _no_bias)),
    "frozen parameters": Quirk(lambda: conv_norm().requires_grad_(False)),
    "half-frozen": Quirk(lambda: touched(conv_norm(), lambda m: m.norm.bias.requires_grad_(False))),
    "float16": Quirk(lambda: conv_norm().half(), dtype=torch.float16),
    "bfloat16": Quirk(lambda: conv_norm().bfloat16(), dtype=torch.bfloat16),
    "float64": Quirk(lambda: conv_norm().double(), dtype=torch.float64),
    "mixed dtypes": Quirk(lambda: touched(conv_norm(), _mixed_precision), dtype=torch.bfloat16),
    "mixed modes": Quirk(
        lambda: touched(nn.Sequential(conv_norm(), nn.Sequential(B(8))), _mixed_modes), norms=2, fold=1
    ),
    "channels-last": Quirk(lambda: conv_norm().to(memory_format=torch.channels_last)),
    "channels-last 3d": Quirk(
        lambda: nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8)).to(memory_format=torch.channels_last_3d),
        (2, 3, 6, 6, 6),
    ),
    "subclass with its own forward": Quirk(lambda: nn.Sequential(conv_norm(), OwnForward(8))),
    "plain subclass": Quirk(lambda: conv_norm(norm=PlainSubclass(8))),
    "forward set on the instance": Quirk(
        lambda: touched(nn.Sequential(conv_norm(), B(8)), lambda m: setattr(m[1], "forward", torch.tanh))
    ),
    "synchronized": Quirk(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(conv_norm()), bn=1),
    "1d on (N, C)": Quirk(lambda: mlp(32), (4, 6), fold=0, ws=0),
    "1d on (N, 4)": Quirk(lambda: mlp(4), (4, 6), fold=0, ws=0),
    "1d on (N, 7)": Quirk(lambda: mlp(7), (4, 6), fold=0, ws=0),
    "1d on (N, C, L)": Quirk(lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), (2, 3, 16)),
    "3d": Quirk(lambda: nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8)), (2, 3, 6, 6, 6)),
    "1×1 maps": Quirk(lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 32, 1), B(32))),
    "channel counts": Quirk(lambda: chain(1, 3, 7, 58), norms=4, pn=3, ws=4),
    "pre-activation": Quirk(PreActivation, norms=3, fold=1, ws=3),
    "concatenation": Quirk(Concatenation, takes_in=2, ws=2),
    "depthwise": Quirk(lambda: conv_norm(conv=lambda: nn.Conv2d(3, 6, 3, groups=3), norm=B(6))),
    "depthwise 1×1": Quirk(lambda: conv_norm(conv=lambda: nn.Conv2d(3, 6, 1, groups=3), norm=B(6)), ws=0, wn=1),
    "padding reflect": Quirk(lambda: conv_norm(conv=lambda: nn.Conv2d(3, 8, 3, padding=2, padding_mode="reflect"))),
    "convolution without bias": Quirk(lambda: conv_norm(conv=lambda: nn.Conv2d(3, 8, 3, bias=False))),
    "transposed": Quirk(Grouped, (2, 4, 5, 5)),
    "convolution used twice": Quirk(ConvTwice, norms=2, fold=0),
    "convolution with two norms": Quirk(ConvThenTwoNorms, norms=2, fold=0),
    "convolution beside its norm": Quirk(NormAndSkip, fold=0),
    "norm first": Quirk(lambda: nn.Sequential(B(3), nn.ReLU(), nn.Conv2d(3, 8, 3)), fold=0, ws=0, wn=1),
    "identity between": Quirk(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Identity(), B(8))),
    "forward hook": Quirk(lambda: touched(conv_norm(), _add("register_forward_hook", _notes))),
    "lambda hook": Quirk(lambda: touched(conv_norm(), _add("register_forward_hook", lambda m, i, o: None))),
    "pre-hook": Quirk(lambda: touched(conv_norm(), _add("register_forward_pre_hook", _notes)), fold=0),
    "hook on the convolution": Quirk(
        lambda: touched(conv_norm(), lambda m: m.conv.register_forward_hook(_notes)), fold=0
    ),
    "spectral_norm": Quirk(lambda: conv_norm(conv=lambda: spectral_norm(nn.Conv2d(3, 8, 3))), ws=0, normalized=True),
    "spectral_norm parametrization": Quirk(
        lambda: conv_norm(conv=lambda: parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))), ws=0, normalized=True
    ),
    "weight_norm": Quirk(lambda: conv_norm(conv=_old_weight_norm), ws=0, normalized=True),
    "weight_norm parametrization": Quirk(
        lambda: conv_norm(conv=lambda: parametrizations.weight_norm(nn.Conv2d(3, 8, 3))), ws=0, normalized=True
    ),
    "pruned": Quirk(
        lambda: conv_norm(conv=lambda: prune.l1_unstructured(nn.Conv2d(3, 8, 3), "weight", 0.3)), fold=0, ws=0
    ),
    "lazy, run once": Quirk(_lazy_run),
    "branches on data": Quirk(OnData, fold=0),
    "cannot be traced": Quirk(Untraceable, norms=2, fold=1, ws=2),
    "forward reads the weight": Quirk(ReadsWeight, fold=0, ws=0, wn=1),
    "forward reads the statistics": Quirk(ReadsStatistics, norms=0),
    "forward leaves its input": Quirk(Remembers),
    "attributes from outside": Quirk(lambda: touched(conv_norm(), _set_attributes)),
    "plain Python list": Quirk(PlainList, warns=True),
    "tied norms": Quirk(TiedNorms, norms=2, ws=2),
    "tied convolutions": Quirk(TiedConvs, norms=2, fold=0, ws=2),
    "one channel, one element": Quirk(
        lambda: nn.Sequential(nn.Linear(6, 1), nn.BatchNorm1d(1)), (4, 6), norms=0, frozen=1, fold=0, ws=0
    ),
    "zero and constant filters": Quirk(
        lambda: touched(
            conv_norm(), lambda m: m.conv.weight.data[:4].copy_(torch.tensor([0.0, 1.0, 1e-6, 1e3]).view(4, 1, 1, 1))
        )
    ),
}
