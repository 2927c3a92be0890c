"""Every quirk × every form of norms and of weights, and their pairs where it may matter."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from helpers.checks import check_named, distance, fingerprint, quiet, same
from helpers.nets import randomize
from helpers.quirks import FROM_BATCH_NORM, QUIRKS, SINGLE_FORMS, Quirk
from torch import Tensor, nn

import normswap
from normswap import ModelError
from normswap.analysis.copies import clone
from normswap.layers.norms import PositionNorm

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def build(quirk: Quirk) -> nn.Module:
    torch.manual_seed(0)
    return randomize(quirk.make())


def output(model: nn.Module, quirk: Quirk) -> torch.Tensor:
    """In eval mode, on a copy: forwards and hooks may leave things behind."""
    x = torch.randn(quirk.shape, generator=torch.Generator().manual_seed(1)).to(quirk.dtype) + 0.3
    with torch.no_grad():
        return clone(model).eval()(x)


PAIRS = ["gn-ws", "fold-ws"]
"""One pair whose parts do not meet, and one whose norms go into the weights. Others are pairs of forms that every quirk
meets alone; five quirks that concern both, below, and tests/targets/test_exactness.py cross all of them."""
OF_BOTH = ["plain", "one norm, two parents", "tied norms", "tied convolutions", "pre-activation"]
CASES = [
    (name, target)
    for name in QUIRKS
    for target in normswap.TARGETS
    if target in (*SINGLE_FORMS, *PAIRS) or name in OF_BOTH
]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_quirk(name: str, target: str) -> None:
    quirk = QUIRKS[name]
    model = build(quirk)
    before, known = fingerprint(model), output(model, quirk)
    norms, weights = quirk.expected(target)
    if norms + weights == 0:
        with pytest.raises(ModelError, match="nothing to (convert|fold)"), quiet():
            normswap.convert(model, target)
        assert same(fingerprint(model), before)
        return
    with pytest.warns(UserWarning, match="not registered") if quirk.warns else contextlib.nullcontext():
        converted, report = normswap.convert(model, target)

    assert (report.totals.norms_changed, report.totals.weights_changed) == (norms, weights)
    assert same(fingerprint(model), before), "the caller's model was touched"
    check_named(converted, report)
    if not (quirk.normalized and target.startswith("fold")):
        check_kept(model, converted)
    result = output(converted, quirk)
    assert result.dtype == known.dtype and result.shape == known.shape
    assert result.isfinite().all()
    if report.exact:
        assert distance(known, result) < TOLERANCE[quirk.dtype]

    with quiet():
        fresh = normswap.convert(quirk.make(), target).model
        folded, _ = normswap.fold(converted)
    fresh.load_state_dict(converted.state_dict(), strict=True)
    assert [type(m).__name__ for m in fresh.modules()] == [type(m).__name__ for m in converted.modules()]
    ours = [m for m in folded.modules() if type(m).__module__.startswith("normswap")]
    assert not [m for m in ours if not (target.startswith("pn") and isinstance(m, PositionNorm))]  # torch has none
    assert distance(result, output(folded, quirk)) < TOLERANCE[quirk.dtype]


def check_kept(before: nn.Module, after: nn.Module) -> None:
    """Aliases, modes, dtypes, layout, requires_grad, hooks and outside attributes."""
    old, new = (dict(m.named_modules(remove_duplicate=False)) for m in (before, after))
    assert old.keys() == new.keys()
    for path in old:
        assert [p for p in old if old[p] is old[path]] == [p for p in new if new[p] is new[path]]
        assert old[path].training == new[path].training
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            assert len(getattr(old[path], hooks)) == len(getattr(new[path], hooks))
        for outside in ("tag", "extra", "lr_scale"):
            assert hasattr(old[path], outside) == hasattr(new[path], outside)
    then = dict(before.named_parameters(remove_duplicate=False))
    for path, parameter in after.named_parameters(remove_duplicate=False):
        if path in then:
            assert parameter.dtype == then[path].dtype and parameter.stride() == then[path].stride()
            assert parameter.requires_grad == then[path].requires_grad
    assert {p.dtype for p in after.parameters()} <= {p.dtype for p in before.parameters()} | {
        b.dtype for b in before.buffers()
    }
    assert "normswap" not in str(sorted(vars(before)))


@pytest.mark.parametrize("target", FROM_BATCH_NORM)
def test_on_meta(target: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    converted, _ = normswap.convert(model, target)
    assert all(t.is_meta for t in converted.state_dict().values())


@pytest.mark.parametrize("target", FROM_BATCH_NORM)
def test_in_place_keeps_root_and_parameters(target: str) -> None:
    """An optimizer that was made before still holds every parameter that is left."""
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)))
    held = {id(p) for p in model.parameters()}
    converted, _ = normswap.convert(model, target, inplace=True)
    assert converted is model
    assert {
        id(p)
        for n, p in model.named_parameters()
        if n not in ("0.bias", "0.weight_g", "1.group_weight", "1.group_bias")
    } <= held


def test_in_place_root_norm() -> None:
    norm = randomize(nn.BatchNorm2d(8))
    alias = norm
    converted, _ = normswap.convert(norm, "gn", inplace=True)
    assert converted is alias and type(alias) is nn.GroupNorm


def test_hooks_fire_and_can_be_removed() -> None:
    calls = []
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    handle = model[1].register_forward_hook(lambda m, i, o: calls.append(type(m)))
    model[1].register_full_backward_hook(lambda m, i, o: calls.append("back"))
    normswap.convert(model, "gn", inplace=True)
    assert calls == [], "converting without example inputs runs nothing"
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert calls == [nn.GroupNorm, "back"]
    handle.remove()
    model(torch.randn(2, 3, 8, 8))
    assert calls == [nn.GroupNorm, "back"]


def test_uninitialized_lazy_module_is_refused() -> None:
    with pytest.raises(ModelError, match=r"1 \(LazyBatchNorm2d\) is lazy.*run the model once"):
        normswap.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d()), "gn")


INDEPENDENT = ["gn", "in", "pn", "frozen", "fold", "gn-ws"]
"""`ln` is `gn` with one group; weights see no samples."""


@pytest.mark.parametrize("target", INDEPENDENT)
@pytest.mark.parametrize("name", QUIRKS)
def test_samples_do_not_mix(name: str, target: str) -> None:
    """In train mode a sample's output is the same whatever else is in its batch, where no batch norm was left."""
    quirk = QUIRKS[name]
    with quiet():
        try:
            model = normswap.convert(build(quirk), target).model.train()
        except ModelError:
            pytest.skip("nothing to convert")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in every_module(model)):
        pytest.skip("a batch norm was left, and named")
    x = torch.randn(quirk.shape, generator=torch.Generator().manual_seed(1)).to(quirk.dtype)
    other = torch.cat([x[:1], torch.flip(x[1:], [-1]) * 3 + 1])
    with torch.no_grad():
        one, two = clone(model)(x)[:1], clone(model)(other)[:1]
    assert distance(one, two) < TOLERANCE[quirk.dtype]


def every_module(model: nn.Module) -> list[nn.Module]:
    """Those in plain lists as well."""
    return [*model.modules(), *(m for value in vars(model).values() if isinstance(value, list) for m in value)]


class CopiedFrozenBatchNorm2d(nn.Module):
    """As transformers' detectors have it: eps is in the code."""

    def __init__(self, n: int):
        super().__init__()
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((n,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class SquaringFrozenBatchNorm2d(CopiedFrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


@pytest.mark.parametrize("target", ["gn", "gn-ws", "fold", "frozen", "est"])
def test_copies_of_frozen_batch_norm_are_known_by_what_they_do(target: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), CopiedFrozenBatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )
    model[1].load_state_dict({k: torch.rand(8) + 0.5 for k in model[1].state_dict()})
    x = torch.randn(4, 3, 9, 9)
    wanted = model.eval()(x)
    converted, report = normswap.convert(model, target, example_inputs=x)
    changed = {path for change in report.changes for path in change.paths if change.kind == "norm"}
    if target == "frozen":  # it is that already
        assert changed == {"4"} and "fixed" in next(left.reason for left in report.left if left.path == "1")
    else:
        assert changed == {"1", "4"}
    if target in ("fold", "frozen", "est"):
        torch.testing.assert_close(converted(x), wanted, rtol=1e-4, atol=1e-5)


def test_a_copy_of_frozen_batch_norm_is_known_on_meta_too() -> None:
    class MetaFrozenBatchNorm2d(CopiedFrozenBatchNorm2d):  # of which nothing has been told yet
        pass

    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), MetaFrozenBatchNorm2d(8))
        assert [change.paths for change in normswap.convert(model, "gn").report.changes] == [("1",)]


def test_what_is_only_called_frozen_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SquaringFrozenBatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    report = normswap.convert(model, "gn").report
    assert "not a class that normswap knows" in next(left.reason for left in report.left if left.path == "1")


class Caching(nn.Module):
    """Fills a cache in eval mode that only `train()` empties, as LeViT does with its attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.bias = nn.Parameter(torch.randn(8))
        self.cache: dict[str, Tensor] = {}
        self.last: Tensor | None = None

    def train(self, mode: bool = True) -> Caching:
        if mode:
            self.cache = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.cache.setdefault("bias", self.bias * 2) if not self.training else self.bias * 2
        self.last = y = self.bn(self.conv(x)) + bias.view(-1, 1, 1)
        return y


def test_running_a_model_leaves_nothing_in_its_attributes() -> None:
    x, model = torch.randn(4, 3, 9, 9), Caching()
    for _ in range(3):
        model(x)
    model.last = None
    for options in ({"example_inputs": x}, {"calibrate": x, "calibrate_seconds": 0}):
        converted = normswap.convert(model, "gn", **options).model
        assert converted.cache == {} and converted.last is None and model.cache == {} and model.last is None
    normswap.inspect(model, example_inputs=x)
    assert model.cache == {} and model.last is None


class Carrying(nn.Module):
    """Attributes of every sort that a copy has to keep apart, or together, as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.again = nn.ModuleList([self.norm, nn.PReLU()])
        self.tied = self.again[1].weight = self.norm.weight
        self.plain = [self.conv.weight, {"a": torch.zeros(2)}, "a", None]
        self.listed = self.plain
        self.empty: dict[str, int] = {}
        self.norm.same = self.empty
        self.pair = (1, "two")
        self.keep = ([],)
        self.owner = (self,)  # not a submodule: a cycle
        self.norm.register_forward_hook(self.hook)

    def hook(self, *_: object) -> None:
        self.empty["calls"] = self.empty.get("calls", 0) + 1


class Rebuilt(Carrying):
    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self.rebuilt = len(self.again)


class CopiedByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def __deepcopy__(self, memo: dict[int, object]) -> CopiedByHand:
        made = CopiedByHand()
        made.inner = copy.deepcopy(self.inner, memo)
        made.by_hand = True
        return made


class _Structure(pickle.Pickler):
    """What refers to what, without where the tensors lie in memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.met: dict[Tensor, int] = {}

    def persistent_id(self, thing: object) -> object:
        if not isinstance(thing, Tensor):
            return None
        number = self.met.setdefault(thing, len(self.met))
        return number, type(thing).__name__, thing.requires_grad, thing.tolist()


def structure(model: nn.Module) -> bytes:
    written = io.BytesIO()
    _Structure(written).dump(model)
    return written.getvalue()


def test_a_clone_is_what_a_deep_copy_is() -> None:
    for model in (Carrying(), Rebuilt(), CopiedByHand(), torch.fx.symbolic_trace(nn.Sequential(Carrying().conv))):
        whole = nn.Sequential(model, nn.ModuleDict({"x": Carrying(), "y": model}), nn.Flatten())
        ours, theirs = clone(whole), copy.deepcopy(whole)
        assert structure(ours) == structure(theirs)
        known = {id(part) for part in whole.modules()} | {t.data_ptr() for t in whole.state_dict().values()}
        assert known.isdisjoint({id(part) for part in ours.modules()})
        assert known.isdisjoint({t.data_ptr() for t in ours.state_dict().values()})
    copied = clone(carrying := Carrying())
    copied.norm(torch.zeros(2, 4, 4, 4))
    assert copied.empty == {"calls": 1} and not carrying.empty  # the hook is the copy's


def test_a_model_that_has_run_with_gradients_can_be_copied() -> None:
    model = Caching()
    model.eval()(torch.randn(4, 3, 9, 9))
    assert model.cache["bias"].requires_grad
    assert not normswap.convert(model, "frozen").model.cache["bias"].requires_grad


class Freezing(nn.Module):
    """What a forward does not run may speak of a part's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    def freeze(self) -> None:
        for module in self.encoder.modules():
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x) * int(x.shape[-1])  # no symbolic run can answer


class Choosing(Freezing):
    """What a string chooses may be any method."""

    def forward(self, x: Tensor) -> Tensor:
        getattr(self, "freeze" if int(x.shape[-1]) else "train")()
        return self.encoder(x)


def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def outer(self: nn.Module, *args: Tensor) -> Tensor:
        return function(self, *args) if args else outer(self, torch.zeros(()))  # it holds itself, too

    return outer


class Decorated(Freezing):
    """Uses the part's parts in a method that stands behind a decorator."""

    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return self.norm_alone(x) * int(x.shape[-1])

    def norm_alone(self, x: Tensor) -> Tensor:
        return self.encoder.norm(self.encoder.conv(x) + 1)


def test_what_reaches_into_parts_is_what_a_forward_may_run() -> None:
    assert normswap.convert(Freezing(), "fold").report.totals.norms_changed == 1
    decorated = Decorated()
    decorated.encoder = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8)))
    for model in (Choosing(), decorated):
        with pytest.raises(normswap.ModelError, match="nothing to (convert|fold)"):
            normswap.convert(model, "fold")


class Asking(nn.Module):
    """Asks whether what a part gives is a list, as timm's hybrids do of their backbones."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.bn, self.conv, self.bn2 = part, nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        if isinstance(y, (list, tuple)):
            return self.bn2(self.conv(y[-1]))
        return self.bn2(self.conv(self.bn(y)))


class Listing(nn.Conv2d):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [super().forward(x)]


@pytest.mark.parametrize(("part", "changed"), [(nn.Conv2d, 2), (Listing, 0)])
def test_a_layer_of_torch_gives_no_list(part: type[nn.Conv2d], changed: int) -> None:
    model = Asking(part(3, 8, 3))
    if changed:
        assert normswap.convert(model, "fold").report.totals.norms_changed == changed
    else:
        with pytest.raises(normswap.ModelError, match="nothing to (convert|fold)"):
            normswap.convert(model, "fold")
