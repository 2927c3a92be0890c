"""Made pictures: the same in every call, unlike noise, of a size that the model takes, and they choose groups."""

from __future__ import annotations

import pytest
import torch
from helpers.nets import Forward, chain
from torch import Tensor, nn

import normswap
from normswap.analysis.sites import Site, find_sites
from normswap.calibration.made_pictures import dead_leaves, errors_on_made_pictures


def norms_of(model: nn.Module) -> list[Site]:
    return [site for site in find_sites(model) if site.kind == "norm"]


def sizes_seen(model: nn.Module, inputs: object = None) -> tuple[tuple[int, ...], bool]:
    """The shape of what the model ran on last, and whether that gave errors of numbers of groups."""
    shapes: list[tuple[int, ...]] = [()]
    with_hook = model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    found = errors_on_made_pictures(model, norms_of(model), inputs)
    with_hook.remove()
    return shapes[-1][1:], bool(found)


def test_pictures_are_the_same_in_every_call_and_leave_the_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    pictures = dead_leaves(6, 3, 40, 56)
    assert pictures.shape == (6, 3, 40, 56) and torch.equal(pictures, dead_leaves(6, 3, 40, 56))
    assert torch.equal(before, torch.random.get_rng_state())


def test_pictures_are_of_flat_shapes_with_varied_contrast() -> None:
    pictures = dead_leaves(64, 3, 64, 64)
    same = (pictures[..., 1:] == pictures[..., :-1]).all(1).float().mean((1, 2))
    assert 0.7 < same.mean() < 0.98, "most neighbours lie in one shape"
    deviations = pictures.std((1, 2, 3))
    assert deviations.max() > 2 * deviations.min()
    assert 0.3 < pictures.std() < 1.5 and abs(pictures.mean()) < 0.3, "in the range of normalized pictures"
    red, green = pictures[:, 0].flatten(), pictures[:, 1].flatten()
    assert 0.5 < torch.corrcoef(torch.stack([red, green]))[0, 1] < 0.99, "colours are mostly grey"


def down(steps: int) -> nn.Sequential:
    """A network that halves the maps so many times."""
    layers = [nn.Sequential(nn.Conv2d(3, 8, 1), *[nn.Conv2d(8, 8, 3, 2, 1) for _ in range(steps)], nn.BatchNorm2d(8))]
    return nn.Sequential(*layers)


def with_classifier(side: int, channels: int = 1) -> nn.Sequential:
    """A network that takes pictures of one size alone."""
    features = nn.Sequential(nn.Conv2d(channels, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.Flatten())
    return nn.Sequential(features, nn.Linear(8 * side * side, 2))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (down(2), (3, 32, 32)),
        (down(5), (3, 224, 224)),
        (with_classifier(28), (1, 28, 28)),
        (with_classifier(32, 3), (3, 32, 32)),
        (with_classifier(224, 3), (3, 224, 224)),
    ],
    ids=["few strides", "many strides", "28", "32", "224"],
)
def test_pictures_have_a_size_that_the_model_takes(model: nn.Module, shape: tuple[int, ...]) -> None:
    assert sizes_seen(model.eval()) == (shape, True)


def test_inputs_tell_the_size() -> None:
    assert sizes_seen(down(2).eval(), torch.randn(2, 3, 48, 40)) == ((3, 48, 40), True)
    assert sizes_seen(down(2).eval(), (torch.randn(2, 3, 48, 40),)) == ((3, 48, 40), True)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)),
        nn.Sequential(nn.Conv1d(1, 8, 3), nn.BatchNorm1d(8)),
        nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)),
        nn.Sequential(nn.BatchNorm2d(8)),
        with_classifier(50),
    ],
    ids=["four channels", "sound", "vectors", "a norm alone", "a size that is not tried"],
)
def test_where_no_picture_can_be_made_nothing_is_known(model: nn.Module) -> None:
    assert errors_on_made_pictures(model.eval(), norms_of(model), None) == {}


def with_pattern() -> nn.Module:
    """A network that puts faint channels, the same for all pictures, beside its own: in one group these would vary."""
    pattern = 0.02 * torch.randn(1, 8, 1, 64, generator=torch.Generator().manual_seed(0))

    def run(self: nn.Module, x: Tensor) -> Tensor:
        beside = pattern[..., : x.shape[-1]].expand(len(x), -1, x.shape[-2], -1)
        out: Tensor = self.norm(torch.cat([self.conv(x), beside], 1))
        return out

    model = Forward(run, conv=nn.Conv2d(3, 8, 1, bias=False), norm=nn.BatchNorm2d(16, momentum=None))
    with torch.no_grad():
        model.get_submodule("conv").weight.copy_(torch.linspace(-1, 1, 24).view(8, 3, 1, 1))
        model(dead_leaves(32, 3, 32, 32))
    return model.eval()


def test_made_pictures_choose_groups_for_use() -> None:
    converted, report = normswap.convert(with_pattern(), "gn", purpose="use")
    assert converted.get_submodule("norm").num_groups == 2
    assert report.changes[0].note == "2 groups for use: keeps most on made pictures; 4 for training"
    assert normswap.convert(with_pattern(), "gn").model.get_submodule("norm").num_groups == 4


def test_pictures_unlike_what_a_network_has_learnt_choose_nothing() -> None:
    model = with_pattern()
    norm = model.get_submodule("norm")
    assert errors_on_made_pictures(model, norms_of(model), None)
    norm.running_var.mul_(255**2)
    assert errors_on_made_pictures(model, norms_of(model), None) == {}


def test_made_pictures_come_only_where_nothing_else_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("pictures were made")

    monkeypatch.setattr("normswap.conversion.evidence.errors_on_made_pictures", refused)
    model, data = chain(8, 16).eval(), torch.randn(8, 3, 16, 16)
    normswap.convert(model, "gn")
    normswap.convert(model, "gn", purpose="use", groups=2)
    normswap.convert(model, "gn", purpose="use", calibrate=data, calibrate_seconds=0)
    with pytest.raises(AssertionError, match="pictures were made"):
        normswap.convert(model, "gn", purpose="use")
