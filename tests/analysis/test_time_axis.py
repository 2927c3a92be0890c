"""Norms of causal networks and of padded sequences are found, and what would reach along time is said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.nets import Forward, randomize
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.analysis.dataflow import find_flow
from normswap.analysis.sites import find_sites
from normswap.analysis.time_axis import CAUSAL, PADDED


class CutsItself(nn.Conv1d):
    """Padded on both sides, and cut."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., : -self.padding[0]]


class SeesAhead(nn.Conv1d):
    """Cut at the other end."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., self.padding[0] :]


class CausalWrapper(nn.Module):
    """Keeps what came before, in a way that no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.kept = nn.Conv1d(4, 8, 3), torch.zeros(1, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert str(x.shape[0]).isdigit()
        x = torch.cat([self.kept.expand(int(str(x.shape[0])), -1, -1), x], 2)
        return self.conv(x)


def after(conv: nn.Module) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm1d(8), nn.ReLU())


def streamed(self: nn.Module, x: Tensor, kept: Tensor) -> Tensor:
    return self.bn(self.conv(torch.cat([kept, x], 2)))


def masked(self: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return self.bn(self.conv(x * mask))


class Masked(Forward):
    def forward(self, x: Tensor, x_lengths: Tensor) -> Tensor:  # type: ignore[override]
        return self.bn(self.conv(x)) * x_lengths.view(-1, 1, 1)


class Streamed(Forward):
    def forward(self, x: Tensor, kept: Tensor) -> Tensor:  # type: ignore[override]
        return self.bn(self.conv(torch.cat([kept, x], 2)))


def lines(conv: nn.Module | None = None) -> dict[str, nn.Module]:
    return {"conv": conv or nn.Conv1d(4, 8, 3), "bn": nn.BatchNorm1d(8)}


def maps() -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(4, 8, 3), "bn": nn.BatchNorm2d(8)}


def both(self: nn.Module, x: Tensor) -> Tensor:
    return self.bn(self.conv(F.pad(x, (1, 1))))


NETS: dict[str, tuple[nn.Module, str]] = {
    "padded before": (Forward(lambda self, x: self.bn(self.conv(F.pad(x, (2, 0)))), **lines()), CAUSAL),
    "padded by a module": (after(nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(4, 8, 3))), CAUSAL),
    "cut": (Forward(lambda self, x: self.bn(self.conv(x)[:, :, :-2]), **lines(nn.Conv1d(4, 8, 3, padding=2))), CAUSAL),
    "cut behind": (
        Forward(lambda self, x: self.bn(self.conv(x)).relu()[:, :, :-2], **lines(nn.Conv1d(4, 8, 3, padding=2))), CAUSAL
    ),
    "cut to the length": (
        Forward(lambda self, x: self.bn(self.conv(x)[..., : x.size(2)]), **lines(nn.Conv1d(4, 8, 3, padding=2))), CAUSAL
    ),
    "zeros before": (
        Forward(lambda self, x: self.bn(self.conv(torch.cat([x.new_zeros(1, 4, 2), x], -1))), **lines()), CAUSAL
    ),
    "padded by as much as is computed": (
        Forward(lambda self, x: self.bn(self.conv(F.pad(x, (2 + x.shape[-1] % 2, 0)))), **lines()), CAUSAL
    ),
    "cut by narrow": (
        Forward(lambda self, x: self.bn(self.conv(x).narrow(dim=2, start=0, length=x.shape[2])),
                **lines(nn.Conv1d(4, 8, 3, padding=2))),
        CAUSAL,
    ),
    "cut by a negative padding": (
        Forward(lambda self, x: self.bn(F.pad(self.conv(x), (0, -2))), **lines(nn.Conv1d(4, 8, 3, padding=2))), CAUSAL
    ),
    "kept before": (
        Forward(lambda self, x: self.bn(self.conv(torch.cat([self.kept.expand(x.shape[0], -1, -1), x], 2))),
                kept=nn.ParameterList([torch.zeros(1, 4, 2)])[0], **lines()),
        CAUSAL,
    ),
    "the norm first": (
        Forward(lambda self, x: self.conv(F.pad(self.bn(x), (2, 0))), conv=nn.Conv1d(8, 4, 3), bn=nn.BatchNorm1d(8)),
        CAUSAL,
    ),
    "by itself": (after(CutsItself(4, 8, 3, padding=2)), CAUSAL),
    "streamed": (Streamed(masked, **lines()), CAUSAL),
    "named so": (after(CausalWrapper()), CAUSAL),
    "along time of a spectrogram": (
        Forward(lambda self, x: self.bn(self.conv(F.pad(x, (2, 0, 1, 1)))), **maps()),
        CAUSAL,
    ),
    "lengths": (Masked(masked, **lines()), PADDED),
    "lengths of spectrograms": (Masked(masked, **maps()), PADDED),
    "padded evenly by as much as is computed": (
        Forward(lambda self, x: self.bn(self.conv(F.pad(x, (x.shape[-1] % 2, x.shape[-1] % 2)))), **lines()), ""
    ),
    "padded on both sides": (Forward(both, **lines()), ""),
    "padded by the convolution": (after(nn.Conv1d(4, 8, 3, padding=2)), ""),
    "ahead": (after(SeesAhead(4, 8, 3, padding=2)), ""),
    "maps padded for strides": (
        Forward(lambda self, x: self.bn(self.conv(F.pad(x, (1, 0, 1, 0)))), **maps()),
        "",
    ),
    "a head behind the mean": (
        Forward(lambda self, x: self.bn(self.fc(self.conv(F.pad(x, (2, 0))).mean(2))),
                conv=nn.Conv1d(4, 5, 3), fc=nn.Linear(5, 8), bn=nn.BatchNorm1d(8)),
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_where_positions_stay_apart(name: str) -> None:
    model, wanted = NETS[name]
    flow = find_flow(model, find_sites(model))
    assert set(flow.along_time.values()) == ({wanted} if wanted else set())


@pytest.mark.parametrize("target", ["gn", "ln-ws", "in", "bcn", "pn", "frozen", "est", "ws"])
def test_targets_over_positions_say_so(target: str) -> None:
    model = randomize(Forward(lambda self, x: self.bn(self.conv(F.pad(x, (2, 0)))), **lines()))
    report = normswap.convert(model, target, **({"ws_scope": "all"} if "ws" in target else {})).report
    said = [text for text in report.warnings if "later positions" in text]
    assert len(said) == (target.partition("-")[0] in ("gn", "ln", "in", "bcn"))
    assert all(text.startswith("bn: in a causal network") and "pn, frozen and est" in text for text in said)


def test_a_norm_that_reaches_along_time_already_needs_no_word() -> None:
    norm: Callable[[], nn.Module] = lambda: nn.GroupNorm(2, 8)  # noqa: E731
    model = Forward(lambda self, x: self.bn(self.conv(F.pad(x, (2, 0)))), conv=nn.Conv1d(4, 8, 3), bn=norm())
    assert not [text for text in normswap.convert(model, "ln").report.warnings if "later positions" in text]
    assert not normswap.inspect(model).findings


def test_advice_names_what_is_safe() -> None:
    model = randomize(Forward(lambda self, x: self.bn(self.conv(F.pad(x, (2, 0)))), **lines()))
    advice = {entry.situation: entry.choose for entry in normswap.inspect(model).advice}
    assert advice["causal, streamed, padded or masked sequences"] == "pn, frozen or est"
