"""The layers of our own against plain references."""

import pickle
from collections.abc import Callable

import pytest
import torch
from helpers.nets import randomize
from torch import nn

import normswap
from normswap.layers.norms import BatchChannelNorm, EstimatedBatchNorm, FrozenBatchNorm, PositionNorm
from normswap.layers.reparametrized import STANDARDIZED, standardize_weight

CONVS = [(nn.Conv1d, (2, 4, 9)), (nn.Conv2d, (2, 4, 9, 9)), (nn.Conv3d, (2, 4, 5, 5, 5))]


def spelled_out(weight: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Weight standardization as the paper writes it."""
    flat = weight.flatten(1)
    mean, var = flat.mean(1, keepdim=True), flat.var(1, correction=0, keepdim=True)
    return (gain[:, None] * (flat - mean) / (var + 1e-10).sqrt() + shift[:, None]).view(weight.shape)


@pytest.mark.parametrize(("conv", "shape"), CONVS)
@pytest.mark.parametrize("last", [False, True])
def test_standardized_weight(conv: type[nn.Module], shape: tuple[int, ...], last: bool) -> None:
    weight = conv(4, 6, 3).weight.detach().double()
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    if last and layout:
        weight = weight.to(memory_format=layout)
    gain, shift = torch.rand(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    ours = standardize_weight(weight, gain, shift)
    torch.testing.assert_close(ours, spelled_out(weight, gain, shift))
    assert ours.stride() == weight.stride()


@pytest.mark.parametrize(("conv", "shape"), CONVS)
def test_standardized_convolution_has_gradients_and_pickles(conv: type[nn.Module], shape: tuple[int, ...]) -> None:
    plain = conv(4, 6, 3, padding=1).double()
    layer = normswap.convert(plain, "ws", ws_scope="all").model
    assert type(layer) is STANDARDIZED[conv]
    assert layer.weight_gain.shape == layer.weight_shift.shape == (6,)
    assert set(layer.state_dict()) == {"weight", "bias", "weight_gain", "weight_shift"}
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), plain(x))

    def run(weight: torch.Tensor) -> torch.Tensor:
        return standardize_weight(weight, layer.weight_gain, layer.weight_shift)

    assert torch.autograd.gradcheck(run, layer.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_small_filters_are_standardized(dtype: torch.dtype) -> None:
    """A std of 1e-3 is common in trained nets; an eps of 1e-5 within the root would leave 0.3 of it."""
    weight = (torch.randn(8, 64, 3, 3) * 1e-3).to(dtype)
    one, zero = torch.ones(8, dtype=dtype), torch.zeros(8, dtype=dtype)
    std = standardize_weight(weight, one, zero).float().flatten(1).std(1)
    assert ((std - 1).abs() < 0.02).all()


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 6), (5, 4, 3, 3), (5, 4, 2, 2, 2)])
def test_frozen_norm_is_the_same_in_both_modes_and_trains_its_affine(shape: tuple[int, ...]) -> None:
    norm = randomize(nn.BatchNorm1d(4)).double()
    frozen = FrozenBatchNorm(4).double()
    frozen.load_state_dict(norm.state_dict(), strict=True)
    x = torch.randn(shape, dtype=torch.float64)
    wanted = norm.eval()(x.flatten(2) if x.dim() > 2 else x).view(shape)
    for mode in (True, False):
        torch.testing.assert_close(frozen.train(mode)(x), wanted)
    frozen(x).sum().backward()
    assert frozen.weight.grad is not None and frozen.bias.grad is not None
    torch.testing.assert_close(frozen.running_mean, norm.running_mean)


def by_the_paper(
    x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, rate: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimates after one step, spelled out for each channel as algorithm 1 of Qiao et al. 2019 has them."""
    for c in range(x.shape[1]):
        values = x[:, c].flatten()
        mean[c] = mean[c] + rate * (sum(values) / len(values) - mean[c])
        var[c] = var[c] + rate * (sum((v - mean[c]) ** 2 for v in values) / len(values) - var[c])
    return mean, var


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_estimates_follow_the_paper_and_take_no_part_in_the_gradient(groups: int) -> None:
    torch.manual_seed(0)
    norm = randomize(BatchChannelNorm(groups, 4) if groups else EstimatedBatchNorm(4)).double().train()
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    for _ in range(2):
        x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        y = norm(x)
        mean, var = by_the_paper(x.detach(), mean, var, 0.1)
        torch.testing.assert_close((norm.running_mean, norm.running_var), (mean, var))
        scale = (norm.weight / (var + norm.eps).sqrt()).view(1, -1, 1, 1)
        wanted = scale * (x - mean.view(1, -1, 1, 1)) + norm.bias.view(1, -1, 1, 1)
        if groups:
            each = wanted.view(1, groups, -1)
            each = (each - each.mean(2, keepdim=True)) / (each.var(2, correction=0, keepdim=True) + norm.eps).sqrt()
            each = norm.group_weight.view(1, -1, 1) * each + norm.group_bias.view(1, -1, 1)
            wanted = each.view(x.shape)
        torch.testing.assert_close(y, wanted)
        gradients = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        torch.testing.assert_close(gradients, torch.autograd.grad(wanted.square().sum(), x))
    assert norm.num_batches_tracked == 2
    seen = norm.running_mean.clone()
    norm.eval()(x)
    assert torch.equal(norm.running_mean, seen), "eval mode learns nothing"


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (0, 4, 3, 3), (0, 4, 2, 2, 2)])
@pytest.mark.parametrize("groups", [0, 2])
def test_an_empty_batch_moves_nothing(groups: int, shape: tuple[int, ...], momentum: float | None) -> None:
    norm = BatchChannelNorm(groups, 4, momentum=momentum) if groups else EstimatedBatchNorm(4, momentum=momentum)
    buffers = {name: value.clone() for name, value in randomize(norm).train().named_buffers()}
    x = torch.randn(shape, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert all(torch.equal(value, buffers[name]) for name, value in norm.named_buffers())
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in norm.parameters())


def test_a_step_between_forward_and_backward_does_no_harm() -> None:
    norm = EstimatedBatchNorm(3).train()
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    first = norm(x)
    norm(x)
    first.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda: EstimatedBatchNorm(4), lambda: BatchChannelNorm(2, 4), lambda: FrozenBatchNorm(4),
        lambda: PositionNorm(4), lambda: PositionNorm(4, affine=False),
    ],
)  # fmt: skip
def test_gradients_of_norms(make: Callable[[], nn.Module]) -> None:
    norm = randomize(make()).double().eval()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)


def test_batch_channel_norm_starts_as_the_batch_norm() -> None:
    """Where a sample has the statistics of the data, the channel half undoes its own normalization."""
    torch.manual_seed(0)
    norm = randomize(nn.BatchNorm2d(8)).double().eval()
    x = torch.randn(3, 8, 40, 40, dtype=torch.float64)
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), correction=0, keepdim=True)
    x = x * norm.running_var.sqrt().view(1, -1, 1, 1) + norm.running_mean.view(1, -1, 1, 1)
    converted = normswap.convert(norm, "bcn", groups=2).model
    assert type(converted) is BatchChannelNorm and converted.num_groups == 2
    torch.testing.assert_close(converted(x), norm(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 6), (5, 4, 3, 3), (5, 4, 2, 2, 2)])
@pytest.mark.parametrize("last", [False, True])
def test_position_norm_spelled_out(shape: tuple[int, ...], last: bool) -> None:
    torch.manual_seed(0)
    norm = randomize(PositionNorm(4, eps=1e-3)).double()
    x = torch.randn(shape, dtype=torch.float64)
    if last and len(shape) > 3:
        x = x.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    one = (1, -1, *[1] * (len(shape) - 2))
    centred = x - x.mean(1, keepdim=True)
    wanted = centred / (x.var(1, correction=0, keepdim=True) + 1e-3).sqrt() * norm.weight.view(one)
    given = norm(x)
    torch.testing.assert_close(given, wanted + norm.bias.view(one))
    assert given.stride() == x.stride(), "it lies in memory as its input does"
    assert type(norm).__module__ == "normswap.layers" and norm.state_dict().keys() == {"weight", "bias"}


def test_position_norm_is_matched_to_the_batch_norm() -> None:
    """Where a position has the statistics of the data over its channels, it is the batch norm."""
    torch.manual_seed(0)
    norm = randomize(nn.BatchNorm1d(512)).double().eval()
    x = torch.randn(3, 512, 40, dtype=torch.float64)
    x = x * norm.running_var.sqrt().view(1, -1, 1) + norm.running_mean.view(1, -1, 1)
    converted, report = normswap.convert(norm, "pn")
    assert type(converted) is PositionNorm and converted.spatial_dims == 1 and not report.exact
    assert (converted(x) - norm(x)).std() < 0.1 * norm(x).std()
