"""The formulas against what they claim, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import normswap
from normswap.layers.matching import Statistics, as_affine, filter_moments, match_groups, rescale_input, scale_filters_


def statistics(channels: int, seed: int = 0) -> Statistics:
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: torch.rand(channels, generator=g, dtype=torch.float64) * (high - low) + low  # noqa: E731
    return Statistics(draw(0.5, 2), draw(-1, 1), draw(-3, 3), draw(0.1, 4), 1e-5)


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_matching_is_exact_where_the_sample_has_the_statistics_of_the_data(groups: int, seed: int) -> None:
    stats = statistics(12, seed)
    x = torch.randn(3, 12, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = (x - x.mean(2, keepdim=True)) / x.std(2, correction=0, keepdim=True)
    x = x * stats.var.sqrt()[:, None] + stats.mean[:, None]  # every sample: exactly the channel's mean and variance
    wanted = F.batch_norm(x, stats.mean, stats.var, stats.weight, stats.bias, False, 0.0, stats.eps)
    torch.testing.assert_close(
        F.group_norm(x, groups, *match_groups(stats, groups), stats.eps), wanted, rtol=1e-10, atol=1e-10
    )


def test_one_channel_a_group_keeps_gain_and_bias() -> None:
    stats = statistics(8)
    matched = match_groups(stats, 8)
    torch.testing.assert_close(matched.scale, stats.weight)
    torch.testing.assert_close(matched.shift, stats.bias)


def test_large_means_do_not_cancel() -> None:
    stats = statistics(8)._replace(mean=torch.full((8,), 1e6, dtype=torch.float64))
    matched = match_groups(stats, 2)
    assert matched.scale.isfinite().all()
    torch.testing.assert_close(matched.shift, stats.bias)


def test_affine_is_the_batch_norm() -> None:
    stats, x = statistics(5), torch.randn(4, 5, 3, dtype=torch.float64)
    scale, shift = as_affine(stats)
    wanted = F.batch_norm(x, stats.mean, stats.var, stats.weight, stats.bias, False, 0.0, stats.eps)
    torch.testing.assert_close(x * scale[:, None] + shift[:, None], wanted)


def test_rescaled_input_keeps_the_output() -> None:
    stats, scale, bias = (
        statistics(5)._replace(eps=0.0),
        torch.rand(5, dtype=torch.float64) + 0.5,
        torch.randn(5, dtype=torch.float64),
    )
    before = torch.randn(4, 5, dtype=torch.float64)
    after = (before - bias) * scale + bias
    norm = lambda x, s: F.batch_norm(x, s.mean, s.var, s.weight, s.bias, False, 0.0, s.eps)  # noqa: E731
    torch.testing.assert_close(norm(after, rescale_input(stats, scale, bias)), norm(before, stats))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (7, 1, 1, 2), (2, 1200, 30, 30)])
def test_filter_moments(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    weight = torch.randn(shape).to(memory_format=layout) + 5
    mean, var = filter_moments(weight)
    wanted = torch.var_mean(weight.double().flatten(1), 1, correction=0)
    torch.testing.assert_close((var, mean), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_scaled_filters_scale_the_output(groups: int) -> None:
    scale, x = torch.rand(8) + 0.5, torch.randn(1, 4, 6, 6)
    weight = torch.randn(8, 4 // groups, 3, 3)
    scaled = weight.clone()
    scale_filters_(scaled, scale)
    torch.testing.assert_close(
        F.conv2d(x, scaled, groups=groups), F.conv2d(x, weight, groups=groups) * scale[:, None, None]
    )
    weight = torch.randn(4, 8 // groups, 3, 3)
    scaled = weight.clone()
    scale_filters_(scaled, scale, groups)
    wanted = F.conv_transpose2d(x, weight, groups=groups) * scale[:, None, None]
    torch.testing.assert_close(F.conv_transpose2d(x, scaled, groups=groups), wanted)


def test_a_dead_channel_does_not_drown_its_group() -> None:
    """Matched by the letter, its gain would be over a hundred, which would show how samples' statistics differ."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 16, 3).double(), nn.BatchNorm2d(16).double()
    x = torch.randn(64, 3, 12, 12).double() * (0.5 + torch.rand(64, 1, 1, 1))
    for scale in (0.0, 0.003):
        with torch.no_grad():
            conv.weight[3].mul_(scale)
            values = conv(x)
            norm.running_mean.copy_(values.mean((0, 2, 3)))
            norm.running_var.copy_(values.var((0, 2, 3)))
        model = nn.Sequential(conv, norm).eval()
        drift = {
            how: normswap.convert(model, "gn", transfer=how, example_inputs=x).report.drift.relative_l2
            for how in ("match", "copy")
        }
        assert drift["match"] < drift["copy"]
