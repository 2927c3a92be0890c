"""Vocoders under torch's weight_norm, as a hook and as a parametrization: plain for use, and the same function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import distance
from helpers.command import run as run_command
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, remove_weight_norm
from torch.nn.utils import weight_norm as hooked

import normswap

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

Normalize = Callable[[nn.Module], nn.Module]
MELS = 8
X = torch.randn(1, MELS, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
BY: dict[str, Normalize] = {"hook": hooked, "parametrization": parametrizations.weight_norm}


class Residual(nn.Module):
    """Dilated convolutions, each added to what it reads."""

    def __init__(self, width: int, kernel: int, dilations: tuple[int, ...], by: Normalize) -> None:
        super().__init__()

        def conv(dilation: int) -> nn.Module:
            return by(nn.Conv1d(width, width, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2))

        self.convs1 = nn.ModuleList(conv(dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(1) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.convs1, self.convs2, strict=True):
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, 0.1)), 0.1))
        return x


class Generator(nn.Module):
    """In the idiom of HiFi-GAN (Kong et al. 2020): upsampling steps, each with the mean of several residual blocks."""

    def __init__(self, by: Normalize) -> None:
        super().__init__()
        rates, kernels, width = (4, 2), ((3, (1, 3)), (5, (1, 2))), 16
        self.num_kernels = len(kernels)
        self.conv_pre = by(nn.Conv1d(MELS, width, 7, padding=3))
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate in rates:
            self.ups.append(by(nn.ConvTranspose1d(width, width // 2, 2 * rate, rate, padding=rate // 2)))
            width //= 2
            self.resblocks.extend(Residual(width, size, dilations, by) for size, dilations in kernels)
        self.conv_post = by(nn.Conv1d(width, 1, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_pre(x)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            blocks = self.resblocks[i * self.num_kernels : (i + 1) * self.num_kernels]
            x = sum(block(x) for block in blocks) / self.num_kernels
        return torch.tanh(self.conv_post(F.leaky_relu(x)))


def generator(by: Normalize) -> nn.Module:
    """As after training: lengths are no longer those of the directions."""
    torch.manual_seed(0)
    model = Generator(by).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter), alpha=0.1)
    return model.eval()


def hooked_generator() -> nn.Module:
    return generator(hooked)


@pytest.mark.parametrize("by", BY.values(), ids=BY)
def test_folded_it_is_what_torch_makes_of_it_too(by: Normalize) -> None:
    model = generator(by)
    wanted = model(X)
    layers = len([m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)])
    folded, report = normswap.fold(model)
    assert len(report.changes) == layers and report.exact and not report.left
    assert distance(wanted, folded(X)) < 1e-12
    for layer in [*model.modules()]:
        if isinstance(layer, nn.modules.conv._ConvNd):
            if parametrize.is_parametrized(layer):
                parametrize.remove_parametrizations(layer, "weight")
            else:
                remove_weight_norm(layer)
    assert [type(m) for m in folded.modules()] == [type(m) for m in model.modules()]
    assert folded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, folded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("by", BY.values(), ids=BY)
def test_other_targets_name_it(by: Normalize) -> None:
    with pytest.raises(normswap.ModelError, match="is normalized already, by torch's weight_norm"):
        normswap.convert(generator(by), "wn")


def test_a_file_becomes_a_plain_one(tmp_path: Path) -> None:
    model = hooked_generator()
    torch.save(model.state_dict(), tmp_path / "generator.pth")
    out = tmp_path / "plain.pth"
    done = run_command("fold", tmp_path / "generator.pth", "--model", f"{__file__}:hooked_generator", "-o", out)
    assert done.exit_code == 0, done.output
    plain = Generator(lambda layer: layer).double()
    plain.load_state_dict(torch.load(out))
    assert distance(model(X), plain(X)) < 1e-12


def speech_t5(library: Any) -> nn.Module:
    model = library.SpeechT5HifiGan(library.SpeechT5HifiGanConfig(model_in_dim=MELS, upsample_initial_channel=32))
    model.apply_weight_norm()
    return model  # type: ignore[no-any-return]


def encodec(library: Any) -> nn.Module:
    config = library.EncodecConfig(hidden_size=16, num_filters=4, codebook_size=16, codebook_dim=16)
    return library.EncodecModel(config)  # type: ignore[no-any-return]


def dac(library: Any) -> nn.Module:
    config = library.DacConfig(encoder_hidden_size=8, decoder_hidden_size=64, hidden_size=128, codebook_size=16)
    model = library.DacModel(config)
    model.apply_weight_norm()
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [speech_t5, encodec, dac])
def test_those_of_transformers(make: Callable[[Any], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make(pytest.importorskip("transformers")).double().eval()
    wave = torch.randn(1, 1, 1280, dtype=torch.float64)

    def run(m: Any) -> Tensor:
        return m(X.transpose(1, 2)) if make is speech_t5 else m.decoder(m.encoder(wave))  # type: ignore[no-any-return]

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter), alpha=0.05)
        folded, report = normswap.fold(model)
        assert report.changes and distance(run(model), run(folded)) < 1e-12
    assert any(map(parametrize.is_parametrized, model.modules()))
    assert not any(map(parametrize.is_parametrized, folded.modules()))
