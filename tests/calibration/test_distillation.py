"""Distillation on unlabelled data: what it brings, what it must not touch, and models that it cannot fit."""

from __future__ import annotations

import copy
import json
import math
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.terminal import printed
from torch import Tensor, nn

import normswap
from normswap.analysis.running import eval_mode
from normswap.calibration import distillation, paired_runs
from normswap.calibration.batches import Batches
from normswap.calibration.distillation import FitSettings, distill, split
from normswap.calibration.paired_runs import Distance, FittedPair
from normswap.conversion import calibrate, pipeline
from normswap.conversion.request import Request
from normswap.report.report import Calibration
from normswap.targets.options import Options

X = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 60).view(-1, 1, 1, 1)
DATA = list(X.split(20))
MORE = [torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(n)) * (0.5 + n / 8) for n in range(12)]
Wrap = Callable[[nn.Module, Tensor], Any]


class Net(nn.Module):
    """Two norms with in-place activations behind them, dropout, and a head; `way` is its forward."""

    def __init__(self, way: Wrap | None = None, shared: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 5)
        self.way, self.shared = way, shared
        self.requires_grad_(True)
        with torch.no_grad():
            for norm in (self.bn1, self.bn2):
                norm.weight.copy_(torch.linspace(0.5, 1.5, 8))
                norm.bias.copy_(torch.linspace(-0.5, 0.5, 8))
                norm.momentum = None
            for batch in DATA:  # in train mode: the running statistics become those of the data
                self.plain(batch)
            for norm in (self.bn1, self.bn2):
                norm.momentum = 0.1
        self.eval()

    def plain(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.bn1(self.conv1(x)))
        x = torch.relu_(self.bn2(self.conv2(x)))
        if self.shared:
            x = torch.relu_(self.bn2(self.conv2(x)))
        return self.head(self.drop(x.mean((2, 3))))

    def forward(self, x: Tensor) -> Any:
        return self.plain(x) if self.way is None else self.way(self, x)


def matched(net: nn.Module, to: str = "gn", **options: Any) -> tuple[nn.Module, list[str]]:
    """The converted net, with the paths of its new norms."""
    converted, report = normswap.convert(net, to, **options)
    return converted, [change.paths[0] for change in report.changes if change.kind == "norm"]


def fit(net: nn.Module, data: Any = DATA, steps: int = 60, **options: Any) -> tuple[nn.Module, nn.Module, Calibration]:
    """Matched, and distilled from it, with the outcome."""
    start, paths = matched(net)
    student = copy.deepcopy(start)
    return start, student, distill(net, student, data, paths, FitSettings(1e6, steps), **options)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def error(teacher: nn.Module, student: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted, given = teacher(x), student(x)
    return ((wanted - given).norm() / wanted.norm()).item()


# ---- what it brings ----


def test_it_comes_nearer_on_samples_that_it_never_saw() -> None:
    net = Net()
    start, student, outcome = fit(net, steps=150)
    assert outcome.kept == "calibrated" and outcome.steps == 150 and not outcome.note
    assert (outcome.samples, outcome.held_out, outcome.measure) == (60, 12, "output")
    assert outcome.calibrated_error < 0.95 * outcome.matched_error
    assert outcome.calibrated_top1 >= outcome.matched_top1 > 0
    fresh = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    assert error(net, student, fresh) < error(net, start, fresh)


def test_its_numbers_are_those_of_the_held_out_samples() -> None:
    net = Net()
    start, student, outcome = fit(net)
    held = torch.cat(split(DATA)[1])
    assert outcome.matched_error == pytest.approx(error(net, start, held), rel=1e-4)
    assert outcome.calibrated_error == pytest.approx(error(net, student, held), rel=1e-4)
    with torch.no_grad():
        agreed = (net(held).argmax(1) == student(held).argmax(1)).double().mean().item()
    assert outcome.calibrated_top1 == pytest.approx(agreed)


def test_strict_standardization_is_repaired_by_statistics_alone() -> None:
    net = Net()
    student, paths = matched(net, "gn-ws", ws="strict")
    outcome = distill(net, student, DATA, paths, FitSettings(1e6, 0))
    assert outcome.kept == "calibrated" and outcome.steps == 0
    assert outcome.calibrated_error < 0.8 * outcome.matched_error


def test_re_estimated_norms_have_the_original_moments() -> None:
    net = Net()
    student, paths = matched(net, "gn-ws", ws="strict")
    pair = FittedPair(net, student, paths)
    with eval_mode(net), eval_mode(student), torch.enable_grad():
        distillation._re_estimate(pair, [X], math.inf)
        wanted, given = pair.teacher_outputs(X), pair.student_outputs(X)
    for tap in wanted.taps:
        old, new = wanted.taps[tap], given.taps[tap].detach()
        torch.testing.assert_close(new.mean((0, 2, 3)), old.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(new.var((0, 2, 3)), old.var((0, 2, 3)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("to", ["gn", "ln", "in", "bcn", "gn-ws", "bcn-wn"])
def test_every_approximate_target_gains(to: str) -> None:
    net = Net()
    student, paths = matched(net, to)
    outcome = distill(net, student, MORE, paths, FitSettings(1e6, 80))
    assert outcome.kept == "calibrated" and outcome.calibrated_error < outcome.matched_error


def test_the_same_steps_give_the_same_values() -> None:
    assert same(state(fit(Net())[1]), state(fit(Net())[1]))


def test_outputs_that_are_not_kept_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = state(fit(Net(), steps=10)[1])
    monkeypatch.setattr(paired_runs, "_CACHE", 100_000)  # of some batches only
    assert same(state(fit(Net(), steps=10)[1]), kept)
    net = Net()
    pair = FittedPair(net, *matched(net))
    held = [pair.teacher_outputs(batch) for batch in X.split(5)]
    assert 0 < len(pair.cache) < len(held)
    assert sum(t.nbytes for _, o in pair.cache.values() for t in (*o.taps.values(), *o.tensors)) <= 100_000


def test_it_stops_where_nothing_improves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_RATE", 0.0)
    outcome = fit(Net(), steps=2000)[2]
    assert outcome.steps < 300


def test_it_keeps_to_the_time() -> None:
    net = Net()
    student, paths = matched(net)
    outcome = distill(net, student, DATA, paths, FitSettings(0.5, 10**9))
    assert 0 < outcome.seconds < 60  # the steps alone would take days


def stopping(after: int, times: int = 1) -> Callable[[float], None]:
    """Progress that sends Ctrl-C when it has been told so often."""
    told: list[float] = []

    def tell(share: float) -> None:
        told.append(share)
        if len(told) == after:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    return tell


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """Jobs in a script's background do not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_stopped_by_ctrl_c_it_keeps_the_best_so_far() -> None:
    net = Net()
    start, paths = matched(net)
    student = copy.deepcopy(start)
    handler = signal.getsignal(signal.SIGINT)
    outcome = distill(net, student, DATA, paths, FitSettings(1e6, 200), stopping(40))
    assert 60 < outcome.steps < 120 and outcome.note == f"stopped by Ctrl-C after {outcome.steps} steps"
    assert outcome.kept == "calibrated" and outcome.calibrated_error < outcome.matched_error
    held = torch.cat(split(DATA)[1])
    assert outcome.calibrated_error == pytest.approx(error(net, student, held), rel=1e-4)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.usefixtures("hears_ctrl_c")
def test_stopped_before_the_first_step_it_keeps_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_re_estimate", lambda *_: signal.raise_signal(signal.SIGINT))
    start, student, outcome = fit(Net())
    assert outcome.kept == "matched" and outcome.steps == 0 and "stopped by Ctrl-C" in outcome.note
    assert same(state(start), state(student))


@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_second_ctrl_c_ends_all() -> None:
    net = Net()
    student, paths = matched(net)
    before, handler = state(student), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        distill(net, student, DATA, paths, FitSettings(1e6, 100), stopping(10, times=2))
    assert same(before, state(student)) and not any(m._forward_hooks for m in student.modules())
    assert signal.getsignal(signal.SIGINT) is handler


def test_in_another_thread_it_is_fitted_too() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(fit, Net()).result()[2].kept == "calibrated"


def test_measuring_takes_its_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[FitSettings] = []

    def note(*args: Any) -> Calibration:
        given.append(args[4])
        return Calibration(60, 12, "matched", seconds=1.0)

    monkeypatch.setattr(calibrate, "distill", note)
    _, report = normswap.convert(Net(), "gn", calibrate=DATA, calibrate_seconds=50)
    spent = 50 - given[0].seconds
    assert 0 < spent < 50 and report.calibration.seconds == pytest.approx(spent + 1)
    normswap.convert(Net(), "gn", calibrate=DATA, calibrate_seconds=1e-9)
    assert given[1].seconds == 0


# ---- what the loss looks at ----


@pytest.mark.parametrize("shape", [(2, 3, 100), (2, 3, 57, 33), (2, 3, 9, 10, 11)])
def test_a_grid_covers_all_positions_evenly(shape: tuple[int, ...]) -> None:
    values = torch.arange(math.prod(shape)).view(shape)
    chosen = paired_runs.on_grid(values, 64)
    along = round(64 ** (1 / (len(shape) - 2)))
    assert chosen.shape[:2] == shape[:2] and chosen[0, 0].numel() <= 64
    assert all(along / 2 <= count <= along for count in chosen.shape[2:])
    means = values.double().mean(tuple(range(2, len(shape))))  # of a ramp: they tell where a grid's middle lies
    torch.testing.assert_close(chosen.double().mean(tuple(range(2, len(shape)))), means, rtol=0.05, atol=25)


@pytest.mark.parametrize("shape", [(4,), (4, 7), (4, 7, 8, 8)])
def test_small_outputs_are_compared_in_full(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    assert paired_runs.on_grid(values, 64) is values


def test_few_norms_are_tapped_and_the_last_is_among_them() -> None:
    paths = [f"norm{i}" for i in range(50)]
    tapped = paired_runs._spread(paths, 8)
    assert len(tapped) == 8 and tapped[-1] == paths[-1] and list(tapped) == sorted(set(tapped), key=paths.index)
    assert paired_runs._spread(paths[:3], 8) == tuple(paths[:3]) and paired_runs._spread([], 8) == ()


def test_a_norm_that_is_not_tapped_is_fitted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired_runs, "_TAPS", 1)
    start, student, outcome = fit(Net())
    assert outcome.kept == "calibrated" and outcome.calibrated_error < outcome.matched_error
    assert not torch.equal(start.bn1.weight, student.bn1.weight)


def test_the_original_is_run_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def counting(net: nn.Module, x: Tensor) -> Tensor:
        runs.append(len(x))
        return net.plain(x)

    net = Net(counting)
    student, paths = matched(net)
    student.way = None
    distill(net, student, DATA, paths, FitSettings(1e6, 40))
    assert sum(runs) == 60 + 48  # those that are fitted on mirrored too


@pytest.mark.parametrize(
    ("data", "mirrored"),
    [
        (X, True),
        (X.repeat(6, 1, 1, 1), False),  # many
        (X[:, :2], False),
        (X.flatten(2), False),
        ((X, X), False),
        (X.mul(9).long(), False),
    ],
)
def test_few_pictures_are_mirrored_too(data: Any, mirrored: bool) -> None:
    stock = distillation._Stock(FittedPair(Net(), Net(), []), split([data]))
    fitted = split([data]).fitted
    assert len(stock.batches) == (1 + mirrored) * len(fitted)
    if mirrored:
        assert torch.equal(stock.batches[-1], fitted[-1].flip(3))


def test_dense_outputs_are_fitted_on_a_grid() -> None:
    class Dense(Net):
        def plain(self, x: Tensor) -> Tensor:
            x = torch.relu_(self.bn1(self.conv1(x)))
            return nn.functional.interpolate(torch.relu_(self.bn2(self.conv2(x))), (70, 50))

    net = Dense()
    _, _, outcome = fit(net)
    assert outcome.measure == "output" and outcome.calibrated_error < outcome.matched_error


def test_progress_rises_to_the_end() -> None:
    told: list[float] = []
    fit(Net(), steps=40, progress=told.append)
    assert told == sorted(told) and told[-1] == 1.0 and len(told) > 20 and all(0 <= share <= 1 for share in told)


# ---- never worse, and nothing else touched ----


def test_what_is_worse_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_RATE", 1e3)
    monkeypatch.setattr(distillation, "_re_estimate", lambda *_: None)
    start, student, outcome = fit(Net(), steps=10)
    assert outcome.kept == "matched" and outcome.calibrated_error > outcome.matched_error
    assert same(state(start), state(student))


def test_it_goes_back_to_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that throws the values about does not undo what came before it."""
    errors: list[float] = []
    real = FittedPair.distance

    def noted(pair: FittedPair, *args: Any) -> Any:
        found = real(pair, *args)
        errors.append(found[0].relative)
        return found

    monkeypatch.setattr(FittedPair, "distance", noted)
    monkeypatch.setattr(distillation, "_RATE", 30.0)
    net = Net()
    _, student, outcome = fit(net, steps=100)
    assert len(errors) == 1 + 1 + 6 + 1 + 1  # before, re-estimated, while it runs, at the end, halfway
    before, re_estimated, *thrown, halfway = errors
    assert outcome.calibrated_error in (min(re_estimated, *thrown), halfway)
    assert max(re_estimated, outcome.calibrated_error) < before < min(thrown[:3])
    held = torch.cat(split(DATA)[1])
    wanted = outcome.calibrated_error if outcome.kept == "calibrated" else before
    assert error(net, student, held) == pytest.approx(wanted, rel=1e-4)


def distance(moved: list[float], agreed: list[float]) -> Distance:
    rows = torch.ones(len(moved), dtype=torch.float64)
    return Distance(torch.tensor(moved).double(), rows, torch.tensor(agreed).double())


@pytest.mark.parametrize(
    ("lost", "gained", "better"),
    [(0, 0, True), (2, 0, True), (3, 0, False), (6, 4, True), (12, 4, False), (20, 14, True), (0, 5, True)],
)
def test_lost_first_choices_are_weighed_against_chance(lost: int, gained: int, better: bool) -> None:
    """Of 96 samples, all of them nearer than before."""
    before = [0.0] * gained + [1.0] * (96 - gained)
    after = [1.0] * gained + [0.0] * lost + [1.0] * (96 - gained - lost)
    start, fitted = distance([1.0] * 96, before), distance([0.9] * 96, after)
    assert fitted.is_better(start) == better and not start.is_better(fitted)


def test_nearer_by_chance_is_not_better() -> None:
    around = torch.linspace(-1, 1, 20).tolist()
    start = distance([1.0] * 20, [1.0] * 20)
    assert not distance([1.0 + a - 0.2 for a in around], [1.0] * 20).is_better(start)
    assert distance([1.0 + a - 0.3 for a in around], [1.0] * 20).is_better(start)
    assert not distance([math.nan] * 20, [1.0] * 20).is_better(start)


@pytest.mark.parametrize(("samples", "kept"), [(4, 1.0), (400, 2.0)])
def test_on_few_samples_the_surer_half_of_the_way_is_kept(samples: int, kept: float) -> None:
    """A value comes from 0 to 2; each sample wants another one, 1.8 on average."""
    wanted = 1.8 + torch.linspace(-1.5, 1.5, samples, dtype=torch.float64)

    class Pair:
        value = torch.zeros(1)

        def copy_values(self) -> list[Tensor]:
            return [self.value.clone()]

        def set_values(self, copies: list[Tensor]) -> None:
            self.value = copies[0].clone()

        def distance(self, *_: Any) -> tuple[Distance, str]:
            return distance((wanted - self.value.item()).square().tolist(), [1.0] * samples), "output"

    pair: Any = Pair()
    best = distillation._Best(pair, [], "output", pair.distance()[0])
    pair.set_values([torch.tensor([2.0])])
    assert best.look()
    best.look_halfway()
    best.put_back()
    assert pair.value.item() == kept
    assert best.distance.relative == pair.distance()[0].relative


def test_values_that_are_not_finite_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = paired_runs.relative_square, []

    def broken(given: Tensor, wanted: Tensor) -> Any:
        calls.append(1)
        return real(given, wanted) * (math.nan if len(calls) > 10 else 1)

    monkeypatch.setattr(paired_runs, "relative_square", broken)
    monkeypatch.setattr(distillation, "_re_estimate", lambda *_: None)
    start, student, outcome = fit(Net())
    assert outcome.kept == "matched" and "not finite" in outcome.note and same(state(start), state(student))


def test_all_else_stays_bit_by_bit() -> None:
    """Modes, frozen parameters, gradients, random state, the teacher; only the norms' own values move."""
    net = Net()
    net.conv1.weight.requires_grad_(False)
    net.bn1.weight.requires_grad_(False)
    start, paths = matched(net)
    student = copy.deepcopy(start)
    for model in (net, student):
        model.train()
        model.bn1.eval()
    student.head.weight.grad = torch.ones_like(student.head.weight)
    before, random = state(net), torch.get_rng_state()
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    modes = [m.training for m in (*net.modules(), *student.modules())]
    identities = [id(p) for p in student.parameters()]
    assert distill(net, student, DATA, paths, FitSettings(1e6, 60)).kept == "calibrated"
    assert same(before, state(net)) and torch.equal(random, torch.get_rng_state())
    assert flags == {name: p.requires_grad for name, p in student.named_parameters()}
    assert modes == [m.training for m in (*net.modules(), *student.modules())]
    assert identities == [id(p) for p in student.parameters()]
    assert [n for n, p in (*net.named_parameters(), *student.named_parameters()) if p.grad is not None] == [
        "head.weight"
    ]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*net.modules(), *student.modules()))
    moved = {name for name, value in state(student).items() if not torch.equal(value, state(start)[name])}
    assert moved == {"bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"}


def test_a_forward_that_writes_to_its_buffers_leaves_no_trace() -> None:
    def counting(net: nn.Module, x: Tensor) -> Tensor:
        net.calls += 1
        return net.plain(x)

    net = Net(counting)
    net.register_buffer("calls", torch.zeros(()))
    _, student, outcome = fit(net)
    assert outcome.kept == "calibrated" and net.calls == 0 and student.calls == 0


# ---- any model ----


@pytest.mark.parametrize(
    "way",
    [
        lambda net, x: {"out": [net.plain(x), (x.argmax(1), None)], "mask": x > 0},
        lambda net, x: (net.plain(x)[:, :, None], net.plain(x).softmax(1)),
        lambda net, x: [net.plain(x), torch.full((len(x),), -math.inf)],
        lambda net, x: net.plain(x) + 0.01 * torch.randn(len(x), 5),
    ],
    ids=["nested", "several", "infinite beside", "random"],
)
def test_outputs_of_any_structure(way: Wrap) -> None:
    _, _, outcome = fit(Net(way))
    assert (
        outcome.kept == "calibrated"
        and outcome.measure == "output"
        and outcome.calibrated_error < outcome.matched_error
    )


@pytest.mark.parametrize(
    "way",
    [
        lambda net, x: net.plain(x).argmax(1),
        lambda net, x: net.plain(x)[net.plain(x)[:, 0] > 0.01 * net.bn1.weight.sum()][:1, :0],
        lambda net, x: None if net.plain(x) is None else (),
    ],
    ids=["labels", "empty", "nothing"],
)
def test_without_an_output_to_compare_the_norms_are(way: Wrap) -> None:
    _, _, outcome = fit(Net(way))
    assert outcome.kept == "calibrated" and outcome.measure == "norms" and outcome.calibrated_top1 is None
    assert outcome.calibrated_error < outcome.matched_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    start, student, outcome = fit(net, [batch.to(dtype) for batch in DATA])
    assert outcome.kept == "calibrated" and student.bn1.weight.dtype == dtype
    assert not torch.equal(start.bn1.weight, student.bn1.weight)


def test_a_norm_that_is_called_twice() -> None:
    _, _, outcome = fit(Net(shared=True))
    assert outcome.kept == "calibrated"


def test_a_norm_that_no_data_reach_stays() -> None:
    net = Net()
    net.unused = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).eval()
    start, student, outcome = fit(net)
    assert outcome.kept == "calibrated"
    assert same(state(start.unused), state(student.unused))


def test_tied_weights() -> None:
    net = Net()
    net.conv3 = net.conv2
    net.way = lambda net, x: net.plain(x) + net.head(net.conv3(torch.relu(net.bn1(net.conv1(x)))).mean((2, 3)))
    assert fit(net)[2].kept == "calibrated"


def test_another_norm_left_in_it() -> None:
    net = Net()
    net.left = nn.SyncBatchNorm(8).eval()
    net.way = lambda net, x: net.head(
        net.left(torch.relu(net.bn2(net.conv2(torch.relu(net.bn1(net.conv1(x))))))).mean((2, 3))
    )
    start, paths = matched(net, exclude="left")
    outcome = distill(net, start, DATA, paths, FitSettings(1e6, 60))
    assert outcome.kept == "calibrated" and paths == ["bn1", "bn2"]


def test_within_inference_mode() -> None:
    net = Net()
    converted = normswap.convert(net, "gn").model
    with torch.inference_mode():
        student = copy.deepcopy(converted)  # its tensors are made in inference mode
        assert student.bn1.weight.is_inference()
        outcome = distill(net, student, [batch.clone() for batch in DATA], ["bn1", "bn2"], FitSettings(1e6, 60))
        assert outcome.kept == "calibrated" and not outcome.note


@torch.no_grad()
def test_without_gradients_around() -> None:
    assert fit(Net())[2].kept == "calibrated" and not torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("way", "why"),
    [
        (lambda net, x: torch.no_grad()(net.plain)(x), "no gradient"),
        (lambda net, x: torch.inference_mode()(net.plain)(x), "no gradient"),
        (lambda net, x: net.plain(x) if not torch.is_grad_enabled() else 1 / 0, "ZeroDivisionError"),
        (lambda net, x: net.plain(x) if len(x) > 12 else net.plain(x.view(-1)), "not fitted"),
    ],
    ids=["no_grad", "inference_mode", "fails with gradients", "fails on few samples"],
)
def test_a_model_that_cannot_be_fitted_says_why(way: Wrap, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_re_estimate", lambda *_: None)
    start, student, outcome = fit(Net(way))
    assert outcome.kept == "matched" and why in outcome.note and same(state(start), state(student))


@pytest.mark.parametrize("count", [1, 2, 9])
def test_too_few_samples(count: int) -> None:
    start, student, outcome = fit(Net(), [X[:count]])
    assert outcome.kept == "matched" and "too few samples" in outcome.note and same(state(start), state(student))


def test_a_function_that_is_kept_needs_no_repair() -> None:
    net = Net()
    student = normswap.convert(net, "est").model
    outcome = distill(net, student, DATA, ["bn1", "bn2"], FitSettings(1e6, 20))
    assert outcome.kept == "matched" and "nothing to repair" in outcome.note and outcome.steps == 0


def test_both_models_draw_the_same_numbers() -> None:
    net = Net(lambda net, x: net.plain(x) + torch.randn(len(x), 5))
    student = normswap.convert(net, "est").model
    assert "nothing to repair" in distill(net, student, DATA, ["bn1", "bn2"], FitSettings(1e6, 20)).note


# ---- samples ----


@pytest.mark.parametrize("sizes", [[256], [10], [16] * 16, [1] * 256, [100, 7], [33] * 3])
def test_about_a_fifth_is_held_out(sizes: list[int]) -> None:
    samples = torch.arange(sum(sizes)).view(-1, 1)
    fitted, held, _ = split(list(samples.split(sizes)))
    assert sorted(torch.cat(fitted + held).flatten().tolist()) == list(range(sum(sizes)))
    assert 0.12 < len(torch.cat(held)) / sum(sizes) < 0.35
    assert all(len(part) <= 16 for part in fitted + held)


def test_arguments_are_cut_together_and_lists_stay_whole() -> None:
    x, n = torch.randn(20, 3), torch.arange(20)
    for batch in ((x, n), {"a": x, "b": n}):
        parts = [list(p.values()) if isinstance(p, dict) else p for part in split([batch]) for p in part]
        assert all(torch.equal(a[:, 0], x[b, 0]) for a, b in parts) and sum(len(a) for a, _ in parts) == 20
    pictures = [([torch.randn(3, 8, 8)] * 2,)] * 10
    fitted, held, _ = split(pictures)
    assert len(fitted) == 8 and len(held) == 2 and fitted[0] is pictures[0]


# ---- more samples than are in memory ----


def watched(batches: list[Tensor], read: list[int]) -> Iterator[Tensor]:
    for number, batch in enumerate(batches):
        read.append(number)
        yield batch


def id_of(batch: Tensor) -> float:
    return batch[0, 0, 0, 0].item()


def test_further_batches_take_the_places_of_those_that_have_served(monkeypatch: pytest.MonkeyPatch) -> None:
    first = [half for part in split(DATA).fitted for half in (part, part.flip(3))]
    later = [part for batch in MORE for part in batch.split(12)]
    names = {id_of(part): len(part) for part in later}
    seen: list[float] = []
    loss, forget = FittedPair.loss, FittedPair.forget
    monkeypatch.setattr(FittedPair, "loss", lambda pair, batch: seen.append(id_of(batch)) or loss(pair, batch))
    kept: list[int] = []
    monkeypatch.setattr(FittedPair, "forget", lambda pair, batch: forget(pair, batch) or kept.append(len(pair.cache)))
    _, _, outcome = fit(Net(), Batches(DATA, iter(MORE)), steps=60)
    served = 4 * len(first)
    assert sorted(seen[:served]) == sorted([id_of(part) for part in first] * 4)
    assert set(seen[served:]) <= names.keys()
    assert outcome.samples == 60 + sum(names[name] for name in set(seen[served:]))
    assert max(kept) < len(first) + len(split(DATA).held_out), "outputs on what is gone are kept"


def test_further_batches_that_run_out_or_break() -> None:
    read: list[int] = []
    _, _, outcome = fit(Net(), Batches(DATA, watched(MORE[:2], read)), steps=90)
    assert (outcome.samples, outcome.steps, outcome.note, read) == (100, 90, "", [0, 1])

    def broken() -> Iterator[Tensor]:
        yield MORE[0]
        raise OSError("disk is gone")

    _, _, outcome = fit(Net(), Batches(DATA, broken()), steps=90)
    assert (outcome.kept, outcome.samples, outcome.steps) == ("calibrated", 80, 90)
    assert outcome.note == "not all data could be read: OSError: disk is gone"


def test_convert_fits_on_more_samples_than_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    many = X.repeat(34, 1, 1, 1)[:2000]
    monkeypatch.setattr(calibrate, "FitSettings", lambda seconds: FitSettings(1e6, 200))
    report = normswap.convert(Net(), "gn", calibrate=(batch for batch in many.split(25))).report
    assert report.calibration is not None
    assert report.calibration.steps == 200
    assert 512 < report.calibration.samples < 1500
    assert 90 < report.calibration.held_out < 130


# ---- from convert ----


@pytest.mark.parametrize("inplace", [False, True])
def test_convert_with_data(inplace: bool) -> None:
    net = Net()
    wanted, x = copy.deepcopy(net), X[:8]
    told: list[str] = []
    options = Options(calibrate=DATA, calibrate_seconds=4.0, ws="strict")
    request = Request(normswap.TARGETS["gn-ws"], options, inplace=inplace, progress=told.append)
    converted, report = pipeline.run(net, request)
    calibration = report.calibration
    assert calibration.kept == "calibrated" and calibration.samples == 60
    assert error(wanted, converted, x) < error(wanted, normswap.convert(wanted, "gn-ws", ws="strict").model, x)
    assert (converted is net) == inplace and "calibrating: 100%" in told
    data = json.loads(json.dumps(report.to_dict()))["calibration"]
    assert data["kept"] == "calibrated" and data["calibrated_error"] == calibration.calibrated_error
    assert "calibration with 60 samples: kept the calibrated values; error" in printed(report, 200)


@pytest.mark.parametrize(
    ("to", "options"),
    [
        ("gn", {"calibrate_seconds": 0}),
        ("gn", {"transfer": "copy"}),
        ("est", {}),
        ("frozen-ws", {}),
    ],
)
def test_nothing_to_calibrate(to: str, options: dict[str, Any]) -> None:
    _, report = normswap.convert(Net(), to, calibrate=DATA, **options)
    assert report.calibration is None and report.to_dict()["calibration"] is None


@pytest.mark.parametrize("seconds", [-1, math.nan, "soon", True])
def test_a_time_that_is_none(seconds: Any) -> None:
    with pytest.raises(normswap.OptionError, match="calibrate_seconds"):
        normswap.convert(Net(), "gn", calibrate=DATA, calibrate_seconds=seconds)


def test_strict_standardization_leaves_the_stem_where_there_are_data() -> None:
    model = Net()
    kept = {}
    for scope in ("normed", "all"):
        _, report = normswap.convert(model, "gn-ws", ws="strict", ws_scope=scope, calibrate=DATA, calibrate_seconds=0)
        kept[scope] = [left.path for left in report.left if "reads the model's input" in left.reason]
    assert len(kept["normed"]) == 1 and not kept["all"]
    assert "reads the model's input" not in str(normswap.convert(model, "gn-ws", ws="strict").report.left)


def test_packed_sequences_are_fitted_on() -> None:
    """A packed sequence is one argument, though it is a tuple."""
    torch.manual_seed(0)
    packed = [nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in (5, 3, 2)]) for _ in range(12)]
    options = {"recurrent": "ln", "calibrate": packed, "calibrate_seconds": 5}
    found = normswap.convert(nn.LSTM(3, 4), "ln", **options).report.calibration
    assert found is not None and "not fitted" not in found.note
    assert found.steps > 0 and found.matched_error is not None
