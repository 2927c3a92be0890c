"""`normswap inspect`: what is there, what would become of it, what is wrong, what to pick."""

import copy
import io
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.checks import quiet
from helpers.command import run
from helpers.quirks import QUIRKS
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap import Inspection, NormswapError
from normswap.files import model_specs
from normswap.inspection.findings import PROBLEM_RULES
from normswap.report.inspection_wording import outcome_lines
from normswap.report.module_tree import fold_tree
from normswap.report.terminal_inspection import InspectionView
from normswap.target_table import NORM_FORMS, WEIGHT_FORMS

GOLDEN = Path(__file__).parent / "golden"
TARGETS = (*NORM_FORMS, *WEIGHT_FORMS)


def printed(found: Inspection, width: int = 200, full: bool = False) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(InspectionView(found, "model.pt", full))
    return re.sub(r" +$", "", stream.getvalue(), flags=re.MULTILINE)


def model_of(name: str) -> nn.Module:
    return QUIRKS[name].make() if name in QUIRKS else model_specs.build(f"torchvision:{name}")


@cache
def inspected(name: str) -> Inspection:
    with quiet():
        return normswap.inspect(model_of(name))


@pytest.mark.parametrize("name", [*QUIRKS, "resnet18", "mobilenet_v3_small", "densenet121", "vit_b_16"])
def test_outcomes_are_what_conversions_do(name: str) -> None:
    """Each line of the table against a conversion to that target, of the same model."""
    with quiet():
        model = model_of(name)
        outcomes = {outcome.target: outcome for outcome in normswap.inspect(model).outcomes}
        recurrent = {"recurrent-ln": {"recurrent": "ln"}}
        assert tuple(outcomes) in (TARGETS, (*TARGETS, *recurrent))
        for target, outcome in outcomes.items():
            try:
                report = normswap.convert(model, **recurrent.get(target, {"to": target})).report
            except NormswapError as error:
                assert not (outcome.norms or outcome.weights), target
                assert outcome.exact is None
                assert str(error).startswith(outcome.problem)
                continue
            done = report.totals.norms_changed, report.totals.weights_changed
            assert (outcome.norms, outcome.weights, outcome.exact) == (*done, report.exact), target
            kind = "norm" if target in NORM_FORMS else "weight"
            hidden = "is not registered"  # what an inspection names among its findings
            left = [entry for entry in report.left if entry.kind == kind and hidden not in entry.reason]
            assert outcome.left == len(left) == sum(count for _, count in outcome.reasons)


@pytest.mark.parametrize("to", ["ws", "wn", "gn-ws", "gn-wn", "est-ws", "frozen-wn", "bcn-ws", "pn-ws", "fold-ws"])
@pytest.mark.parametrize("name", ["resnet18", "plain", "depthwise", "1d on (N, C)", "transposed"])
def test_a_converted_net_folds_as_its_inspection_says(name: str, to: str) -> None:
    with quiet():
        converted = normswap.convert(
            model_of(name), to, layers=("conv", "linear"), ws_scope="all" if "ws" in to else "normed"
        ).model
        (outcome,) = [o for o in normswap.inspect(converted).outcomes if o.target == "fold"]
        report = normswap.fold(converted).report
    done = report.totals.norms_changed, report.totals.weights_changed
    left = sum(entry.kind == "norm" for entry in report.left)
    assert (outcome.norms, outcome.weights, outcome.left) == (*done, left)


def test_nothing_is_changed() -> None:
    model = model_specs.build("torchvision:resnet18").train()
    model.layer1.eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    normswap.inspect(model, example_inputs=torch.zeros(2, 3, 64, 64))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [m.training for m in model.modules()] == modes and torch.equal(state, torch.get_rng_state())


def test_layers_are_described() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 5, stride=2, groups=3), nn.BatchNorm2d(12), nn.GroupNorm(4, 12), nn.Flatten(), nn.Linear(12, 7)
    ).requires_grad_(False)
    model[4].requires_grad_(True)
    conv, batch, group, linear = normswap.inspect(model, example_inputs=torch.randn(2, 3, 5, 5)).layers
    assert (conv.size, conv.channels, conv.groups, conv.spatial) == ("3 → 12, 5×5, stride 2, 3 groups", 12, 3, (5, 5))
    assert (batch.kind, batch.module, batch.spatial, batch.statistics) == (
        "norm",
        "BatchNorm2d",
        (1, 1),
        "never trained",
    )
    assert (group.groups, group.statistics, linear.size) == (4, "", "12 → 7")
    assert [layer.trained for layer in (conv, batch, group, linear)] == [False, False, False, True]


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))


ODD: dict[str, Callable[[], nn.Module]] = {
    "no layer": nn.ReLU,
    "empty": nn.Sequential,
    "a norm": lambda: nn.BatchNorm2d(4),
    "other norms": lambda: nn.Sequential(
        nn.RMSNorm(4), nn.LocalResponseNorm(2), nn.CrossMapLRN2d(2), nn.LayerNorm((3, 4))
    ),
    "recurrent": lambda: nn.Sequential(nn.LSTM(3, 4), nn.GRUCell(4, 4), nn.RNN(4, 4)),
    "meta": on_meta,
    "half": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).half(),
    "without statistics": lambda: nn.Sequential(nn.BatchNorm2d(8, affine=False, track_running_stats=False)),
    "converted": lambda: normswap.convert(Net(), "bcn-ws").model,
    "detection": lambda: model_specs.build("torchvision:ssdlite320_mobilenet_v3_large"),
    "timm": lambda: model_specs.build("timm:resnetv2_50"),
    "timm, layer norms": lambda: model_specs.build("timm:convnext_atto"),
}


@pytest.mark.parametrize("name", ODD)
def test_any_model_can_be_inspected(name: str) -> None:
    model = ODD[name]()
    found = normswap.inspect(model)
    assert json.loads(json.dumps(found.to_dict()))["model"] == type(model).__name__
    assert max(map(len, printed(found, 60).splitlines())) <= 60 and str(found)


# ---- what is wrong ----


class Net(nn.Module):
    """A healthy net of four convolutions with norms; each subclass spoils one thing."""

    problem = ""
    where: tuple[str, ...] = ()
    bias, momentum, chance = False, 0.1, 0.0

    def __init__(self) -> None:
        super().__init__()
        for name, width in zip("abcd", (3, 8, 8, 8), strict=True):
            self.add_module(name, nn.Conv2d(width, 8, 3, padding=1, bias=self.bias and name == "b"))
            self.add_module(f"{name}n", nn.BatchNorm2d(8, momentum=self.momentum if name == "c" else 0.1))
        self.drop = nn.Dropout2d(self.chance)
        self.train()
        with torch.no_grad():
            self(torch.randn(4, 3, 8, 8))
        self.eval()
        self.spoil()

    def spoil(self) -> None:
        """What is done to the trained net."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.an(self.a(x)))
        x = F.relu(self.bn(self.b(x)))
        x = F.relu(self.cn(self.c(x)))
        return self.dn(self.d(x))


class NotFinite(Net):
    problem, where = "running statistics that are not finite or negative", ("cn",)

    def spoil(self) -> None:
        self.cn.running_mean[1] = torch.nan


class Negative(NotFinite):
    def spoil(self) -> None:
        self.cn.running_var[1] = -1.0


class Untrained(Net):
    problem, where = "running statistics that were never trained", ("bn", "dn")

    def spoil(self) -> None:
        self.bn.reset_running_stats()
        self.dn.reset_running_stats()


class Dead(Net):
    problem, where = "dead channels: no variance", ("an",)

    def spoil(self) -> None:
        self.an.running_var[3:5] = 0


class Resting(Net):
    problem, where, momentum = "momentum 0", ("cn",), 0.0


class Bias(Net):
    problem, where, bias = "a bias without effect, since the norm after it subtracts it", ("b",), True


class After(Net):
    problem, where = "a norm after the non-linearity, where the others stand before it", ("bn",)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.an(self.a(x)))
        x = self.bn(F.relu(self.b(x)))
        x = F.relu(self.cn(self.c(x)))
        return self.dn(self.d(x))


class DropBefore(Net):
    problem, where, chance = "dropout between norm and convolution", ("bn",), 0.2

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.an(self.a(x)))
        x = F.relu(self.bn(self.drop(self.b(x))))
        x = F.relu(self.cn(self.c(x)))
        return self.dn(self.d(x))


class DropAfter(Net):
    problem, where = "dropout between norm and convolution", ("c",)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.an(self.a(x)))
        x = F.dropout(F.relu(self.bn(self.b(x))), 0.1, self.training)
        x = F.relu(self.cn(self.c(x)))
        return self.dn(self.d(x))


class Functional(Net):
    problem, where = "a functional batch_norm", ("",)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.batch_norm(x, None, None, training=True))


class Hidden(Net):
    problem, where = "modules that are not registered", ("extra[0]",)

    def spoil(self) -> None:
        self.extra = [nn.Conv2d(3, 3, 1)]


class Causal(Net):
    problem, where = "norms of a causal network", ("an", "bn", "cn", "dn")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (2, 0)))


class Padded(Net):
    problem, where = "norms of sequences that may be padded or masked", ("lines.1",)

    def spoil(self) -> None:
        self.lines = nn.Sequential(nn.Conv1d(8, 8, 3, bias=False), nn.BatchNorm1d(8))
        self.lines[1].num_batches_tracked += 1

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        x = super().forward(x)
        return self.lines(x.flatten(2)) if "lines" in self._modules else x


SPOILT = (
    NotFinite, Negative, Untrained, Dead, Resting, Bias, After, DropBefore, DropAfter, Causal, Padded, Functional,
    Hidden,
)  # fmt: skip


def test_a_healthy_net_has_no_findings() -> None:
    assert normswap.inspect(Net()).findings == ()


@pytest.mark.parametrize("make", SPOILT)
def test_what_is_wrong_is_found_where_it_is(make: type[Net]) -> None:
    found = normswap.inspect(make(), example_inputs=torch.randn(2, 3, 8, 8))
    assert [(finding.problem, finding.paths) for finding in found.findings] == [(make.problem, make.where)]
    text = re.sub(r"\s+", " ", printed(found, 80))
    assert make.problem in text and found.findings[0].note in text


def test_every_rule_is_tested() -> None:
    assert set(PROBLEM_RULES) <= {make.problem for make in SPOILT}


def test_dropout_that_drops_nothing_is_none() -> None:
    class Idle(DropBefore):
        chance = 0.0

    assert normswap.inspect(Idle()).findings == ()


# ---- what to pick ----


def choices(found: Inspection) -> dict[str, str]:
    return {advice.situation: advice.choose for advice in found.advice}


def test_advice() -> None:
    chosen = choices(normswap.inspect(Net()))
    assert chosen["small batches (1 to 8)"] == "gn-ws" and chosen["private or federated training"] == "gn, or gn-ws"
    assert chosen["large batches"] == "keep BatchNorm" and chosen["deployment"] == "fold"
    assert not {"recurrent layers", "many 1×1 maps"} & set(chosen)
    assert choices(normswap.inspect(nn.Sequential(nn.LSTM(4, 8))))["recurrent layers"] == "--recurrent ln"
    mobile = normswap.inspect(model_specs.build("torchvision:mobilenet_v2"))
    assert choices(mobile)["use right after the conversion"] == "gn --for use, or --calibrate"
    assert "17 depthwise layers" in " ".join(advice.why for advice in mobile.advice)
    flat = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    assert choices(normswap.inspect(flat))["small batches (1 to 8)"] == "gn"
    single = choices(normswap.inspect(Net(), example_inputs=torch.randn(2, 3, 1, 1)))
    assert single["many 1×1 maps"] == "ln, or gn --groups 1"
    assert choices(normswap.inspect(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)))) == {}


def test_recurrent_layers_have_a_line_of_their_own() -> None:
    found = normswap.inspect(nn.Sequential(nn.LSTM(4, 8)))
    line = found.outcomes[-1]
    assert (line.target, line.weights, line.exact) == ("recurrent-ln", 1, False)
    shown = printed(found)
    assert re.search(r"gn to frozen +nothing +the model has no normalization\n", shown)
    assert re.search(r"ws, wn +nothing +the model has no convolution\n", shown)
    assert re.search(r"--recurrent ln +1 weight +approximate", shown)


def test_every_line_that_changes_nothing_says_why() -> None:
    for model in (nn.ReLU(), nn.LSTM(4, 8), nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), nn.Linear(3, 4)):
        lines = outcome_lines(normswap.inspect(model))
        assert all(line.left for line in lines if line.changes == "nothing")


@pytest.mark.parametrize("to", ["gn-ws", "gn"])
def test_a_converted_net_says_what_to_pick_and_ends_with_its_last_line(to: str) -> None:
    found = normswap.inspect(normswap.convert(Net(), to).model)
    assert choices(found) == ({"deployment": "fold"} if to == "gn-ws" else {})
    assert not printed(found).endswith("\n\n")


def test_groups_for_training_and_for_use() -> None:
    found = normswap.inspect(
        nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 8, 3), nn.BatchNorm2d(8))
    )
    assert [layer.auto_groups for layer in found.layers if layer.kind == "norm"] == [
        {"training": 8, "use": 1}, {"training": 2, "use": 1}
    ]  # fmt: skip
    (why,) = [advice.why for advice in found.advice if "gn --for use" in advice.choose]
    assert "groups per norm: 1 keeps most without training, 2-8 to train on" in why
    kept = normswap.inspect(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)))
    assert all(layer.auto_groups == {} for layer in kept.layers)


def test_a_norm_that_is_used_again_and_again() -> None:
    class Recurrent(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.an(self.a(x))
            for _ in range(3):
                x = F.relu(self.bn(self.b(x)))
            return self.dn(self.d(self.cn(self.c(x))))

    assert choices(normswap.inspect(Recurrent()))["norms used again and again"] == "gn"


# ---- what is printed ----


@pytest.mark.parametrize(("name", "width"), [("resnet18", 80), ("efficientnet_v2_l", 80), ("mobilenet_v2", 140)])
def test_golden(name: str, width: int) -> None:
    text = printed(inspected(name), width)
    file = GOLDEN / f"inspect.{name}.{width}.txt"
    assert file.exists(), f"{file.name} is missing; it would be:\n{text}"
    assert text == file.read_text()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "googlenet", "efficientnet_v2_l"])
def test_counts_of_the_printed_tree(name: str, full: bool) -> None:
    """Lines that name layers add up to all of them."""
    found = inspected(name)
    tree = printed(found, full=full).split("what is in it\n")[1].split("\n\n")[0].splitlines()
    classes = {layer.module for layer in found.layers}
    named = [line for line in tree if set(re.findall(r"\w+", line)) & classes]
    counts = [int(line.rpartition("×")[2]) for line in named]
    assert sum(counts) == len(found.layers)
    assert full or len(tree) <= 26


def test_trees_fold_what_is_alike() -> None:
    paths = [f"layer{s}.{b}.{name}" for s in (1, 2) for b in (0, 1, 2) for name in ("conv1", "bn1", "conv2", "bn2")]
    tree = fold_tree([(path, path) for path in paths], kind=lambda path: path.split(".")[-1][:2])
    (layer,) = tree.below.values()
    assert (layer.name, layer.count, [*layer.below]) == ("layer[1-2]", 2, ["[0-2]"])
    (block,) = layer.below.values()
    assert [(b.name, len(b.items)) for b in block.below.values()] == [("conv[1-2]", 12), ("bn[1-2]", 12)]
    flat = fold_tree([(name, "norm") for name in ("a", "b", "norm1", "norm3")], kind=str)
    assert [*flat.below] == ["a", "b", "norm[1,3]"]


# ---- files ----


def whole(folder: Path) -> Path:
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), folder / "model.pt")
    return folder / "model.pt"


def test_inputs_of_every_kind(tmp_path: Path) -> None:
    model = model_specs.build("torchvision:resnet18")
    torch.save(model, tmp_path / "whole.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "training.pt")
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    assert run("convert", tmp_path / "whole.pt", "--to", "gn", "--quiet").exit_code == 0
    spec = ["--model", "torchvision:resnet18"]
    cases: list[tuple[object, list[str]]] = [
        ("torchvision:resnet18", []), (tmp_path / "whole.pt", []), (tmp_path / "state.pt", spec),
        (tmp_path / "training.pt", spec), (tmp_path / "state.safetensors", spec), (tmp_path / "whole.gn.pt", []),
    ]  # fmt: skip
    for source, options in cases:
        result = run("inspect", source, "--json", *options)
        assert result.exit_code == 0 and result.stderr == "", (source, result.stderr)
        found = json.loads(result.stdout)
        norms = [layer for layer in found["layers"] if layer["kind"] == "norm"]
        assert (found["schema"], len(norms), len(found["layers"])) == (1, 20, 41), source
        assert all(layer["spatial"] for layer in norms), source


def test_tensors_without_their_model(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "state.pt")
    result = run("inspect", tmp_path / "state.pt", "--json")
    found = json.loads(result.stdout)
    assert [layer["module"] for layer in found["layers"]].count("convolution") == 4
    outcomes = {outcome["target"]: outcome for outcome in found["outcomes"]}
    assert outcomes["gn"]["norms"] == 4 and outcomes["frozen"]["exact"]
    shown = run("inspect", tmp_path / "state.pt").stdout
    assert "tensors without their model" in " ".join(shown.split())


def test_tensors_alone_say_what_to_type_for_more(tmp_path: Path) -> None:
    path = tmp_path / "a state.pt"
    torch.save(Net().state_dict(), path)
    found = json.loads(run("inspect", path, "--json").stdout)
    assert found["advice"][-1]["choose"] == f"normswap inspect '{path}' --model net.py:make_model"
    problems = {outcome["target"]: outcome["problem"] for outcome in found["outcomes"] if not outcome["norms"]}
    assert dict.fromkeys(problems) == dict.fromkeys(["bn", "fold", "ws", "wn"])
    assert set(problems.values()) == {"needs the model of the tensors (--model)"}


@pytest.mark.parametrize("to", ["gn-ws", "est", "fold-wn", "bcn"])
def test_a_converted_state_dict_tells_what_its_recipe_says(tmp_path: Path, to: str) -> None:
    converted, report = normswap.convert(Net(), to)
    normswap.save(converted, tmp_path / "net.pt", report=report)
    result = run("inspect", tmp_path / "net.pt", "--json")
    found = json.loads(result.stdout)
    changed = {change.paths[0]: change.after.partition("(")[0] for change in report.changes}
    shown = {layer["paths"][0]: layer["module"] for layer in found["layers"]}
    assert result.exit_code == 0 and changed.items() <= shown.items() and len(shown) == len(found["layers"])
    assert f"{len(report.recipe['layers'])} layers converted to {to} by normswap" in found["model"]
    assert found["parameters"] == sum(p.numel() for p in converted.parameters())


def test_folding_tensors_says_what_to_type_for_folding(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    result = run("fold", tmp_path / "net.pt")
    assert result.exit_code == 1 and f"normswap fold {tmp_path / 'net.pt'} --model net.py:make_model" in result.stderr
    assert "normswap convert" not in result.stderr and "--to" not in result.stderr


def test_tensors_alone_count_all_parameters(tmp_path: Path) -> None:
    model, state, training = Net(), tmp_path / "state.pt", tmp_path / "training.pt"
    torch.save(model.state_dict(), state)
    torch.save({"model": model.state_dict(), "epoch": 3}, training)
    totals = normswap.diff(state, state).totals
    for path in (state, training):
        found = json.loads(run("inspect", path, "--json").stdout)
        assert found["parameters"] == totals.parameters_before == sum(p.numel() for p in model.parameters())
        assert found["buffers"] == totals.buffers_before


@pytest.mark.parametrize(
    ("make", "options", "told"),
    [
        (lambda folder: folder / "none.pt", [], "none.pt"),
        (lambda folder: "torchvision:resnet17", [], "did you mean"),
        (lambda folder: folder / "text.pt", [], "text.pt"),
        (whole, ["--model", "torchvision:resnet18"], "holds a Sequential"),
        (whole, ["--weights", "DEFAULT"], "has its own"),
        (lambda folder: "torchvision:resnet18", ["--key", "model"], "is a model itself"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, make: Callable[[Path], object], options: list[str], told: str) -> None:
    (tmp_path / "text.pt").write_text("no model")
    result = run("inspect", make(tmp_path), *options)
    assert result.exit_code == 1 and told in result.stderr and "Traceback" not in result.stderr


def test_inputs_that_do_not_fit(tmp_path: Path) -> None:
    result = run("inspect", "torchvision:resnet18", "--input-shape", "1,5,32,32")
    assert result.exit_code == 1 and "does not run on" in result.stderr
