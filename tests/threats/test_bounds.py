"""What a small file can claim is sized up before anything is made of it, and what follows is linear in its size."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import numpy
import pytest
import torch
from torch import fx, nn

import normswap
from normswap.analysis import connections
from normswap.analysis.budget import Budget, OverBudget
from normswap.analysis.dataflow import find_flow
from normswap.analysis.flow import Flow
from normswap.analysis.noise import guess_inputs
from normswap.analysis.sites import find_sites
from normswap.checkpoints import module_graph
from normswap.checkpoints.reading import read_checkpoint
from normswap.conversion import planning
from normswap.files.inspect_file import inspect_file
from normswap.inspection import examine
from normswap.targets.options import Purpose


def lattice(levels: int, width: int, leaf: nn.Module) -> nn.Module:
    """A module under `width ** levels` paths, of `levels` modules that hold one other several times."""
    for _ in range(levels):
        outer = nn.Sequential()
        outer._modules.update({str(number): leaf for number in range(width)})
        leaf = outer
    return leaf


def tower(levels: int) -> nn.Module:
    model: nn.Module = nn.BatchNorm2d(2)
    for _ in range(levels - 1):
        model = nn.Sequential(model)
    return model


def holding_itself() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential())
    model[1]._modules["up"] = model
    return model


def with_name(length: int) -> nn.Module:
    model = nn.Sequential()
    model._modules["n" * length] = nn.BatchNorm2d(2)
    return model


ENDLESS = {
    "paths": (lambda: lattice(200, 2, nn.BatchNorm2d(2)), "levels"),
    "aliases": (lambda: lattice(15, 2, nn.BatchNorm2d(2)), "further paths"),
    "levels": (lambda: tower(module_graph.DEEPEST + 1), "levels"),
    "circle": (holding_itself, "holds itself"),
    "name": (lambda: with_name(module_graph.LONGEST_NAME), "characters"),
    "names together": (lambda: lattice(1, 9_000, with_name(9_000)), "characters together"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_paths_that_cannot_be_followed_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, reason = ENDLESS[name]
    model = make()

    named_modules = nn.Module.named_modules

    def once(self: nn.Module, *args: Any, remove_duplicate: bool = True, **kwargs: Any) -> Any:
        if not remove_duplicate:
            pytest.exit("paths were walked along", 1)  # a failure would show the module, which takes as long
        return named_modules(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "named_modules", once)
        for call in (normswap.inspect, lambda model: normswap.convert(model, "gn")):
            with pytest.raises(normswap.NormswapError, match=reason):
                call(model)
    if name != "paths":  # torch's own pickler goes no deeper
        torch.save(model, path := tmp_path / "x.pt")
        with pytest.raises(normswap.FileError, match=reason):
            normswap.convert_file(path, "gn")


def test_a_module_in_a_plain_list_is_counted_too() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    model.spare = [lattice(15, 2, nn.BatchNorm2d(2))]  # type: ignore[assignment]
    with pytest.raises(normswap.ModelError, match="further paths"):
        normswap.convert(model, "gn")


def test_paths_below_the_limits_are_followed() -> None:
    shared = lattice(8, 2, nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    assert [len(layer.paths) for layer in normswap.inspect(shared).layers] == [256, 256]
    assert not module_graph.why_endless(tower(module_graph.DEEPEST))


def write_header(path: Path, header: dict[str, Any]) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


def test_too_many_tensors_are_refused_before_any_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normswap.checkpoints.safetensors_files.MOST_TENSORS", 1000)
    monkeypatch.setattr("normswap.checkpoints.safetensors_files.safe_open", None)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = write_header(tmp_path / "x.safetensors", {f"w{number}": entry for number in range(1002)})
    with pytest.raises(normswap.FileError, match="more than 1,000 tensors"):
        read_checkpoint(path)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_names_and_numbers_of_tensors_are_bounded(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"x.{ending}"
    for state, reason in (
        ({"n" * (module_graph.LONGEST_NAME + 1): torch.ones(1)}, "characters"),
        ({f"w{number}": torch.ones(1) for number in range(11)}, "more than 10 tensors"),
    ):
        if ending == "pt":
            torch.save(state, path)
        else:
            from safetensors.torch import save_file

            save_file(state, path)
        monkeypatch.setattr(module_graph, "MOST_TENSORS", 10)
        with pytest.raises(normswap.FileError, match=reason):
            read_checkpoint(path)


# ---- runs that nobody has asked for ----


def many_layers(rnn: type[nn.RNNBase]) -> nn.Module:
    layer = rnn(1, 1)
    layer.num_layers = 10**9
    return layer


GREEDY = {
    "LSTM": (lambda: many_layers(nn.LSTM), (2, 64, 1)),
    "GRU": (lambda: many_layers(nn.GRU), (2, 64, 1)),
    "adaptive pool": (lambda: nn.AdaptiveAvgPool2d(20_000), (2, 1, 8, 8)),
    "upsample": (lambda: nn.Upsample(scale_factor=1e5), (1, 1, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(1, 1, 1, stride=100_000), (1, 1, 8, 8)),
    "padded": (lambda: nn.Conv2d(1, 1, 1, padding=100_000), (1, 1, 8, 8)),
    "reflected": (lambda: nn.ReplicationPad2d(100_000), (1, 1, 8, 8)),
    "unfolded": (lambda: nn.Unfold(1, padding=50_000), (1, 1, 8, 8)),
}


@pytest.mark.parametrize("name", GREEDY)
def test_no_operation_is_run_that_is_too_large(name: str) -> None:
    make, shape = GREEDY[name]
    with torch.no_grad(), pytest.raises(OverBudget, match="memory"), Budget():
        make().eval()(torch.ones(shape))


def test_values_that_are_gone_do_not_count() -> None:
    x = torch.ones(1 << 20)
    with Budget(memory=x.nbytes * 5):
        for _ in range(20):
            x = x.sin()
        kept = [x]
        with pytest.raises(OverBudget, match="memory"):
            for _ in range(20):
                kept.append(kept[-1].sin())


def test_time_is_bounded() -> None:
    with pytest.raises(OverBudget, match="time"), Budget(seconds=-1):
        torch.ones(1) + 1


def test_a_budget_changes_no_result() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted = model(x)
        with Budget():
            assert torch.equal(model(x), wanted)


def test_a_conversion_goes_on_without_the_run(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(20_000)).eval()
    torch.save(model, path := tmp_path / "x.pt")
    report = normswap.convert_file(path, "gn")
    assert report.totals.norms_changed == 1
    assert report.drift is None
    findings = inspect_file(path).findings
    assert any("--input-shape" in finding.note for finding in findings)


@pytest.mark.parametrize("channels", [10**9, -1, "many"])
def test_no_noise_is_made_for_channels_that_cannot_be(channels: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[0].in_channels = channels
    assert guess_inputs(model) is None


# ---- linear time ----


@pytest.mark.parametrize("kind", ["one behind the other", "side by side", "added one by one"])
def test_values_are_followed_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps from a value to its only user are counted: twice the layers take twice as many."""

    class Wide(nn.Module):
        def __init__(self, size: int):
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(size))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if kind == "one behind the other":
                for norm in self.norms:
                    x = norm(x)
                return x
            total = self.norms[0](x)
            for norm in self.norms[1:]:
                total = total + (norm(x) if kind == "side by side" else norm(x.relu()))
            return total

    steps = 0
    only_user = connections.Connections._only_user

    def counted(self: connections.Connections, node: fx.Node) -> fx.Node | None:
        nonlocal steps
        steps += 1
        return only_user(self, node)

    monkeypatch.setattr(connections.Connections, "_only_user", counted)
    found = []
    for size in (60, 120):
        steps = 0
        normswap.inspect(Wide(size))
        found.append(steps)
    assert 0 < found[1] < 2.5 * found[0]


def test_many_layers_are_not_run_on_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(small_net(), path := tmp_path / "x.pt")
    monkeypatch.setattr(examine, "_MOST_LAYERS_RUN", 4)
    assert inspect_file(path).layers[0].spatial
    monkeypatch.setattr(examine, "_MOST_LAYERS_RUN", 3)
    unasked = inspect_file(path)
    (note,) = (finding.note for finding in unasked.findings if "sizes of maps" in finding.problem)
    assert "4 layers, more than 3" in note and "--input-shape" in note and not unasked.layers[0].spatial
    asked = inspect_file(path, input_shape=(1, 3, 9, 9))
    assert asked.layers[0].spatial and not any("sizes of maps" in finding.problem for finding in asked.findings)


def test_norms_of_one_kind_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacements that an inspection builds are counted: all that differ in a name or a number are one kind."""
    tried: list[tuple[str, str]] = []
    plan_norm = planning.plan_norm

    def counted(site: Any, target: Any, context: Any) -> Any:
        tried.append((target.name, site.path))
        return plan_norm(site, target, context)

    monkeypatch.setattr(planning, "plan_norm", counted)
    monkeypatch.setattr(examine, "plan_norm", counted)  # of each purpose, for the numbers of groups
    layers = [layer for _ in range(20) for layer in (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))]
    odd = [nn.BatchNorm2d(4, eps=1e-3), nn.BatchNorm2d(8), nn.BatchNorm2d(4).double(), nn.BatchNorm2d(4, affine=False)]
    odd += [nn.BatchNorm2d(4).requires_grad_(False), nn.BatchNorm2d(4), nn.BatchNorm2d(4)]
    odd[-2].register_forward_hook(lambda *_: None)
    assert isinstance(odd[-1].running_var, torch.Tensor)
    odd[-1].running_var[0] = -1
    outcomes = normswap.inspect(nn.Sequential(*layers, *odd)).outcomes
    assert len([path for target, path in tried if target == "gn"]) == (1 + len(odd)) * (1 + len(get_args(Purpose)))
    assert len([path for target, path in tried if target == "fold"]) == 2 + len(odd)  # the first is fed the input
    gn = outcomes[0]
    assert (gn.target, gn.norms, gn.left) == ("gn", 20 + len(odd) - 1, 1)
    assert gn.reasons == (("has a negative running variance", 1),)


@pytest.mark.parametrize(("kind", "size"), [("one behind the other", 1500), ("in diamonds", 12)])
def test_what_hands_values_on_is_followed_once(kind: str, size: int) -> None:
    """However long the way between two layers is, and however often it parts."""

    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)
            self.drops = nn.ModuleList(nn.Dropout() for _ in range(size))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for drop in self.drops:
                x = drop(x) if kind == "one behind the other" else torch.cat([x, drop(x)], 1)
            x = self.norm(x)
            for drop in self.drops:
                x = drop(x)
            return self.second(x)

    model = Long()
    flow = find_flow(model, find_sites(model))
    assert {*flow.readers["first"]} == {"norm"} and {*flow.followers["norm"]} == {"second"}
    assert len(flow.readers["first"]) < 10 and len(flow.followers["norm"]) < 10  # each trace adds one


# ---- numbers that no layer has ----


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)).eval()


ATTRIBUTES = [
    (0, "kernel_size"), (0, "groups"), (0, "in_channels"), (0, "out_channels"), (0, "stride"), (1, "num_features"),
    (1, "eps"), (1, "momentum"), (3, "num_groups"), (3, "num_channels"),
]  # fmt: skip


@pytest.mark.parametrize("value", ["x", [3], float("nan"), 10**30, -(2**40), (2**40, 2**40)], ids=repr)
@pytest.mark.parametrize(("layer", "name"), ATTRIBUTES)
def test_numbers_that_no_layer_has_are_refused(layer: int, name: str, value: Any, tmp_path: Path) -> None:
    model = small_net()
    vars(model[layer])[name] = value
    if name in ("eps", "momentum") and isinstance(value, int):
        return  # odd, but a number
    torch.save(model, path := tmp_path / "x.pt")
    with pytest.raises(normswap.FileError, match=f"has a {name} that cannot be|does not fit its settings"):
        normswap.convert_file(path, "gn")


def test_numbers_that_libraries_write_are_good(tmp_path: Path) -> None:
    model = small_net()
    model[0].stride, model[0].padding = [2, 2], [0, 0]
    model[0].out_channels, model[1].num_features = numpy.int64(8), numpy.int64(8)
    model[1].eps, model[1].affine = numpy.float64(1e-3), 1
    torch.save(model, path := tmp_path / "x.pt")
    assert normswap.convert_file(path, "gn-ws").changes


def test_a_weight_of_another_shape_than_its_layer_tells_is_refused(tmp_path: Path) -> None:
    model = small_net()
    model[0].in_channels = 1 << 30
    torch.save(model, path := tmp_path / "x.pt")
    with pytest.raises(normswap.FileError, match="does not fit its settings"):
        inspect_file(path)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize(
    "odd", [torch.ones(8).int(), torch.ones(8).to_sparse(), torch.tensor(1.0), torch.ones(8, 1)], ids=repr
)
def test_norms_of_odd_tensors_are_left(name: str, odd: torch.Tensor, tmp_path: Path) -> None:
    model = small_net()
    held = model[1]._parameters if name in ("weight", "bias") else model[1]._buffers
    held[name] = nn.Parameter(odd, requires_grad=False) if name in ("weight", "bias") else odd
    torch.save(model, path := tmp_path / "x.pt")
    report = normswap.convert_file(path, "ln")
    assert "1" in {entry.path for entry in report.left}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", ["num_batches_tracked", "running_mean", "running_var"])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "tensors"])
@pytest.mark.parametrize("kind", ["quantized", "sparse"])
def test_norms_without_plain_values_are_inspected(kind: str, whole: bool, name: str, tmp_path: Path) -> None:
    values = torch.ones(8)
    odd = values.to_sparse() if kind == "sparse" else torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)
    model = small_net()
    model[1]._buffers[name] = odd
    torch.save(model if whole else model.state_dict(), path := tmp_path / "x.pt")
    inspect_file(path)
    with suppress(normswap.NormswapError):
        assert normswap.convert_file(path, "gn").totals.norms_changed == (name == "num_batches_tracked")


@pytest.mark.parametrize("name", ["_modules", "_parameters", "_buffers"])
def test_parts_of_a_module_are_in_dicts(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Upsample())
    vars(model[0])[name] = nn.Sequential(nn.ReLU())  # would be iterated over when the module is restored
    torch.save(model, path := tmp_path / "x.pt")
    with pytest.raises(normswap.FileError, match="whose parts are none"):
        normswap.convert_file(path, "gn")


def test_a_fold_asks_once_what_was_traced_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    told = Flow.in_parts.fget
    assert told is not None
    monkeypatch.setattr(Flow, "in_parts", property(lambda flow: asked.append(1) or told(flow)))
    model = nn.Sequential(*(layer for _ in range(30) for layer in (nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)))).eval()
    normswap.convert(model, "fold")
    assert len(asked) < 5
