"""What is measured of norms is what normalizing their inputs would show, in one forward that keeps nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.analysis.sites import find_sites
from normswap.calibration import measuring
from normswap.calibration.measuring import Measured, measure_norms, running_statistics
from normswap.calibration.sample_moments import SampleMoments, sample_moments
from normswap.layers.matching import as_affine, match_groups
from normswap.layers.norms import BatchChannelNorm, PositionNorm

SHAPES = [(6, 16), (6, 16, 9), (6, 16, 5, 7), (6, 16, 3, 4, 5), (6, 16, 1, 1)]
BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def values_of(shape: tuple[int, ...], seed: int = 0, offset: float = 0.0) -> Tensor:
    """Values whose samples and channels have means and variances of their own."""
    drawn = torch.Generator().manual_seed(seed)
    around = torch.randn(*shape[:2], *[1] * (len(shape) - 2), generator=drawn)
    spread = torch.rand(*shape[:2], *[1] * (len(shape) - 2), generator=drawn) + 0.3
    return torch.randn(shape, generator=drawn) * spread + around + offset


def trained(norm: nn.Module, offset: float = 0.0) -> nn.Module:
    """A norm with gain, bias and statistics that differ by channel."""
    channels = len(norm.weight)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.5, 1.5, channels))
        norm.bias.copy_(torch.linspace(-1, 1, channels))
        if isinstance(getattr(norm, "running_mean", None), Tensor):
            norm.running_mean.copy_(torch.linspace(-0.7, 0.7, channels) + offset)
            norm.running_var.copy_(torch.linspace(0.4, 2, channels))
    return norm.eval()


def measure(norm: nn.Module, batches: list[Tensor]) -> Measured:
    model = nn.Sequential(norm).eval()
    return measure_norms(model, batches, find_sites(model))["0"]


def spelled_out(norm: Any, batches: list[Tensor]) -> dict[int, float]:
    """By number of groups, the square error of the matched group norm, both norms applied to each value."""
    stats = running_statistics(norm)
    numbers = [n for n in range(1, 9) if norm.num_features % n == 0 and norm.num_features // n >= 4]
    errors = dict.fromkeys(numbers, 0.0)
    for batch in batches:
        x = batch.double()
        scale, shift = (v.view(-1, *[1] * (x.dim() - 2)) for v in as_affine(stats))
        for groups in numbers:
            gain, bias = match_groups(stats, groups)
            given = F.group_norm(x, groups, gain, bias, stats.eps)
            errors[groups] += (given - (x * scale + shift)).square().sum().item()
    return errors


def assert_errors(found: Measured, wanted: dict[int, float], rel: float = 1e-5) -> None:
    assert found.errors.keys() == wanted.keys()
    assert {n: found.errors[n] for n in wanted} == pytest.approx(wanted, rel=rel)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_of_groups_are_those_of_normalizing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = trained(BATCH_NORMS[len(shape)](16)).to(dtype)
    batches = [values_of(shape, seed).to(dtype) for seed in range(3)]
    assert_errors(measure(norm, batches), spelled_out(norm, batches))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gains_make_the_mean_over_samples_the_data_s(shape: tuple[int, ...]) -> None:
    """A group norm divides by each sample's deviation; on average by the data's, once the gain has its factor."""
    norm = trained(BATCH_NORMS[len(shape)](16))
    batches = [values_of(shape, seed) for seed in range(3)]
    x, stats = torch.cat(batches).double(), running_statistics(norm)
    found = measure(norm, batches)
    assert found.gains.keys() == found.errors.keys()
    for groups, gain in found.gains.items():
        mean, var = (v.view(groups, -1) for v in (stats.mean, stats.var))
        wanted = (var.mean(1) + mean.var(1, correction=0) + stats.eps).sqrt()
        given = (x.view(len(x), groups, -1).var(2, correction=0) + stats.eps).sqrt()
        assert gain == pytest.approx(1 / (wanted / given).clamp(max=4).mean().item(), rel=1e-5)
        assert gain < 1.2 or shape[-1] == 16


def test_a_black_sample_hardly_moves_the_gains() -> None:
    norm, x = trained(nn.BatchNorm2d(16)), values_of((32, 16, 9, 9))
    black = torch.cat([x, torch.zeros(1, 16, 9, 9)])
    plain, moved = (measure(norm, [batch]).gains for batch in (x, black))
    assert moved == pytest.approx(plain, rel=0.15)


@pytest.mark.parametrize(("to", "options"), [("ln", {}), *(("gn", {"groups": groups}) for groups in (2, 4, "8c"))])
def test_matched_gains_are_scaled_on_data(to: str, options: dict[str, Any]) -> None:
    """Where samples differ, the outputs of a matched norm are too large by the same factor in all channels."""
    torch.manual_seed(0)
    x = values_of((64, 16, 6, 6)) * torch.rand(64, 1, 1, 1).add(0.2)
    model = nn.Sequential(nn.BatchNorm2d(16, momentum=None))
    model(x)
    model.eval()
    options = {**options, "calibrate": [x], "calibrate_seconds": 0}
    scaled, report = normswap.convert(model, to, **options)
    plain, plain_report = normswap.convert(model, to, **({"groups": report.changes[0].groups} if to == "gn" else {}))
    ratio = scaled[0].weight / plain[0].weight
    assert torch.allclose(ratio, ratio[:1].expand(16)) and 0.4 < ratio[0] < 0.95
    assert "scaled on the data" in report.changes[0].how and "scaled" not in plain_report.changes[0].how


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    norm = trained(nn.BatchNorm2d(16)).to(dtype)
    batches = [(values_of((6, 16, 40, 40), seed) * 30).to(dtype) for seed in range(2)]
    found = measure(norm, batches)
    assert_errors(found, spelled_out(norm, batches))
    assert found.like.dtype == dtype


def test_channels_last_and_transposed_inputs() -> None:
    norm = trained(nn.BatchNorm2d(16))
    x = values_of((6, 16, 5, 7))
    for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert_errors(measure(norm, [other]), spelled_out(norm, [x]))


@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_a_large_mean_costs_no_digits(offset: float) -> None:
    norm = trained(nn.BatchNorm2d(16), offset)
    x = values_of((6, 16, 12, 12), offset=offset)
    assert_errors(measure(norm, [x]), spelled_out(norm, [x]), rel=1e-4)  # the input itself has seven digits
    exact = torch.var(x.double(), (2, 3), correction=0)
    torch.testing.assert_close(sample_moments(x).var, exact, rtol=1e-4, atol=0)


def test_constant_channels_have_no_variance() -> None:
    x = values_of((4, 8, 6, 6))
    x[:, ::2] = 3.7
    assert torch.all(sample_moments(x).var[:, ::2] < 1e-12)


def test_batches_of_several_sizes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = trained(nn.BatchNorm2d(16))
    batches = [values_of((n, 16, size, 4), n) for n, size in ((3, 5), (2, 5), (4, 6), (1, 6))]
    whole = measure(norm, batches)
    assert_errors(whole, spelled_out(norm, batches))
    values = torch.cat([batch.movedim(1, 0).flatten(1) for batch in batches], 1).double()
    torch.testing.assert_close(whole.moments.mean, values.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.moments.var, values.var(1, correction=0), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(measuring, "_WAITING", 0)
    assert_errors(measure(norm, batches), whole.errors, rel=1e-10)


def test_many_samples_are_worked_on_in_parts() -> None:
    moments = SampleMoments(torch.randn(70_000, 8), torch.zeros(70_000, 8), 1)
    parts = list(moments.parts())
    assert len(parts) > 2 and torch.equal(torch.cat([part.mean for part in parts]), moments.mean)


def test_a_norm_called_twice_with_writing_activations_behind_it() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = trained(nn.BatchNorm2d(16))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu_(self.norm(F.relu_(self.norm(x))))

    model, x = Twice().eval(), values_of((6, 16, 5, 5))
    with torch.no_grad():
        inner = torch.relu(model.norm(x))
    assert_errors(measure_norms(model, [x], find_sites(model))["norm"], spelled_out(model.norm, [x, inner]))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.GroupNorm(2, 8),
        nn.InstanceNorm2d(8, affine=True),
        BatchChannelNorm(4, 8, spatial_dims=2),
        PositionNorm(8, spatial_dims=2),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_moments_behind_a_norm_are_those_of_its_output(norm: nn.Module) -> None:
    trained(norm)
    batches = [values_of((5, 8, 4, 6), seed) for seed in range(3)]
    found = measure(norm, batches).moments
    last = ("group_weight", "group_bias") if isinstance(norm, BatchChannelNorm) else ("weight", "bias")
    with torch.no_grad():
        for name, value in zip(last, (1.0, 0.0), strict=True):
            norm.get_parameter(name).fill_(value)
        given = torch.cat([norm(batch) for batch in batches]).double()
    before = torch.cat(batches).double()
    for mean, var, values in ((found.mean, found.var, before), (found.normed_mean, found.normed_var, given)):
        torch.testing.assert_close(mean, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(var, values.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(bad: float) -> None:
    x = values_of((4, 16, 5, 5))
    x[1, 3, 2, 2] = bad
    with pytest.raises(normswap.ModelError, match="0: its input on the calibration data is not finite"):
        measure(trained(nn.BatchNorm2d(16)), [x])


def test_nothing_as_large_as_an_input_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x = trained(nn.BatchNorm2d(16)), values_of((8, 16, 64, 64))
    gatherer = measuring._NormGatherer(find_sites(nn.Sequential(norm))[0], [1, 2, 4], False)
    with torch.profiler.profile(profile_memory=True) as profile:
        gatherer.add(x)
    assert max(event.self_cpu_memory_usage for event in profile.key_averages()) < x.nbytes / 10
