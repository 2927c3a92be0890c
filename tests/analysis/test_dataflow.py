"""How layers are connected."""

import torch
from helpers.nets import Forward, conv_norm
from helpers.quirks import QUIRKS
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.analysis.dataflow import find_flow
from normswap.analysis.flow import Flow
from normswap.analysis.sites import find_sites
from normswap.analysis.tracing import trace


def flow_of(model: nn.Module) -> Flow:
    return find_flow(model, find_sites(model))


def test_feeder() -> None:
    assert flow_of(conv_norm()).feeders("norm") == (("conv",), "")
    for name in (
        "convolution with two norms",
        "convolution beside its norm",
        "convolution used twice",
        "branches on data",
    ):
        flow = flow_of(QUIRKS[name].make())
        assert {flow.feeder(path) for path in flow.writers} == {None}, name


def test_normed_through_add_cat_activation_and_pooling() -> None:
    def run(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(torch.cat([self.a(x) + self.b(x), self.c(x)], 1)), 2)
        return self.head(self.norm(x))

    conv = lambda: nn.Conv2d(3, 4, 3)  # noqa: E731
    model = Forward(run, a=conv(), b=conv(), c=conv(), norm=nn.BatchNorm2d(8), head=nn.Conv2d(8, 2, 1))
    assert flow_of(model).normed == {"a", "b", "c"}


def test_not_normed_where_another_layer_comes_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    assert flow_of(model).normed == {"2"}


def test_order_of_registration_does_not_matter() -> None:
    model = Forward(
        lambda self, x: self.z(self.norm(self.a(x))), norm=nn.BatchNorm2d(4), z=nn.Conv2d(4, 4, 1), a=nn.Conv2d(3, 4, 1)
    )
    flow = flow_of(model)
    assert flow.normed == {"a"} and flow.feeder("norm") == "a"


def test_assertions_and_checks_of_shape_do_not_stop_the_trace() -> None:
    def run(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        assert x.dim() == 4
        if x.shape[1] != 3:
            raise ValueError("three channels")
        n, c = x.shape[:2]
        if n > 1 and c > 1:
            x = x * 2
        return self.norm(self.conv(x))

    assert flow_of(Forward(run, conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4))).feeder("norm") == "conv"


def test_loops_over_data_end() -> None:
    def run(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        while x.sum() > 0:
            x = x - 1
        return self.norm(self.conv(x))

    assert flow_of(Forward(run, conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4))).feeder("norm") == "conv"


def test_lists_of_maps() -> None:
    """The heads of detection nets: the same layers on each of some maps."""
    model = Forward(
        lambda self, xs: [self.norm(self.conv(x)) for x in xs], conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4)
    )
    assert flow_of(model).feeder("norm") == "conv"


def test_train_mode_counts() -> None:
    """A convolution whose output is used beside the norm in training alone."""

    def run(self: nn.Module, x: torch.Tensor) -> object:
        x = self.conv(x)
        return (self.norm(x), x) if self.training else self.norm(x)

    model = Forward(run, conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4)).eval()
    assert flow_of(model).feeders("norm") == ((), "the output of the layer before it is used elsewhere too")


def test_tracing_leaves_the_model_alone() -> None:
    def run(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.last = x
        return self.norm(self.conv(x))

    model = Forward(run, conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4))
    model.count, model.last = 0, None
    flow_of(model)
    assert model.count == 0 and model.last is None and model.training


def test_one_element_a_channel_is_seen() -> None:
    pooled = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    assert flow_of(pooled).single == {"2", "5"}
    assert flow_of(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4))).spatial == {"1"}
    assert flow_of(nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4))).single == {"2"}


def test_functional_norms_are_named() -> None:
    inner = Forward(lambda self, x: F.batch_norm(x, None, None, training=True), conv=nn.Conv2d(3, 3, 1))
    assert flow_of(Forward(lambda self, x: self.inner(x), inner=inner)).functional == {"inner": "batch_norm"}


class Regulated(nn.Module):
    """What timm's EfficientViT does: parts appended in the constructor, and autocast on the device of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential()
        self.parts.append(nn.Conv2d(3, 4, 1))
        self.parts.append(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "meta":
            with torch.autocast(device_type=x.device.type, enabled=False):
                return self.parts(x)
        return self.parts(x)


def test_autocast_and_constructors_hide_nothing() -> None:
    model, real = Regulated(), torch.autocast.__init__
    flow = flow_of(model)
    assert flow.parts.keys() == {"parts.0", "parts.1"} and flow.feeders("parts.1") == (("parts.0",), "")
    assert torch.autocast.__init__ is real


class ByMode(nn.Module):
    """Another path in training than in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) if self.training else self.norm(x * 2)


def test_modes_are_traced_where_a_forward_asks_for_them() -> None:
    kinds: dict[type[nn.Module], int] = {nn.Sequential: 1, ByMode: 2}
    for kind, graphs in kinds.items():
        model = ByMode() if kind is ByMode else conv_norm()
        assert len(trace(model, lambda m: type(m) in (nn.Conv2d, nn.BatchNorm2d)).graphs) == graphs
    assert flow_of(ByMode()).feeder("norm") is None
    assert "training" not in vars(nn.Module) and ByMode().training


class ByWidth(nn.Module):
    """Asks for a width twice, in two spellings, as PointNet does: an input takes both of these branches or none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.an, self.b, self.bn = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        _, wide, _ = x.size()
        if wide > 3:
            more = x[:, 3:]
            x = x[:, :3]
        y = self.an(self.a(x))
        if not wide <= 3:
            y = torch.cat([y, more], 1)[:, :8]
        return self.bn(self.b(y))


def test_a_shape_has_one_answer() -> None:
    flow = flow_of(ByWidth())
    assert not flow.problems and flow.feeders("an") == (("a",), "") and flow.feeders("bn") == (("b",), "")


def test_values_may_answer_otherwise_each_time() -> None:
    """Another value, one that was changed in place, or one of which more than the shape is asked."""

    def other_value(self: nn.Module, x: Tensor) -> Tensor:
        y = self.conv(x)
        if x.shape[1] > 3:
            y = y * 2
        x = x.flatten(1)
        return self.norm(y) if x.shape[1] > 3 else y

    def in_place(self: nn.Module, x: Tensor) -> Tensor:
        y = self.conv(x)
        if x.shape[1] > 3:
            y = y * 2
        x.transpose_(1, 2)
        return self.norm(y) if x.shape[1] > 3 else y

    def of_content(self: nn.Module, x: Tensor) -> Tensor:
        y = self.conv(x)
        if x.sum() > 3:
            y = y * 2
        x.add_(1)
        return self.norm(y) if x.sum() > 3 else y

    for run in (other_value, in_place, of_content):
        model = Forward(run, conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4))
        assert len(trace(model, lambda m: type(m) in (nn.Conv2d, nn.BatchNorm2d)).graphs) == 4, run.__name__
    assert len(trace(ByWidth(), lambda m: type(m) in (nn.Conv1d, nn.BatchNorm1d)).graphs) == 2
