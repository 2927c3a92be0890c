"""Models filled from files: every tensor that a forward reads is the file's, wherever the model holds it."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from helpers.nets import randomize
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import normswap
from normswap import FileError, ModelError, NormswapError
from normswap.analysis.copies import clone

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A convolution, a norm, and a scale that a subclass holds in another way than as a parameter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.hold()

    def hold(self) -> None: ...

    def read(self) -> Tensor:
        return self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.read()


class InContainers(Net):
    def hold(self) -> None:
        self.held = {"all": [(self.scale,)], "constant": [torch.full((4, 1, 1), 2.0)]}

    def read(self) -> Tensor:
        return self.held["all"][0][0] * self.held["constant"][0]


@dataclass
class Held:
    tensor: Tensor


class InDataclass(Net):
    def hold(self) -> None:
        self.held = Held(self.scale)

    def read(self) -> Tensor:
        return self.held.tensor


class InClosure(Net):
    def hold(self) -> None:
        scale, once = self.scale, torch.arange(4.0).view(4, 1, 1)
        self.reader = lambda: scale + once

    def read(self) -> Tensor:
        return self.reader()


class InPartial(Net):
    def hold(self) -> None:
        self.reader = partial(torch.mul, self.scale, torch.tensor(3.0))

    def read(self) -> Tensor:
        return self.reader()


class AsView(Net):
    def hold(self) -> None:
        self.flat, self.kernel = self.scale.detach().view(-1), self.conv.weight.data[:, 0, 0, 0]

    def read(self) -> Tensor:
        return (self.flat + self.kernel).view(4, 1, 1)


class ReRegistered(Net):
    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter):
            self.register_parameter(f"{name}_alias", value)

    def read(self) -> Tensor:
        return self.scale_alias


class Attributes(Net):
    of_class = torch.arange(4.0).view(4, 1, 1)

    def hold(self) -> None:
        self.plain = torch.linspace(0, 1, 4).view(4, 1, 1)
        self.register_buffer("saved", torch.ones(4, 1, 1))
        self.register_buffer("derived", self.saved * 3, persistent=False)

    def read(self) -> Tensor:
        return self.scale + self.of_class * self.plain + self.saved * self.derived


class Tied(Net):
    def hold(self) -> None:
        self.other = nn.Conv2d(3, 4, 3)
        self.other.weight = self.conv.weight

    def read(self) -> Tensor:
        return self.other.weight.mean((1, 2, 3)).view(4, 1, 1)


class Hidden(Net):
    """A module in a list, which no state dict sees, on a parameter of a module that it does see."""

    def hold(self) -> None:
        reader = nn.Module()
        reader.weight = self.scale
        self.readers = [reader]

    def read(self) -> Tensor:
        return self.readers[0].weight


HOLDING = [
    InContainers, InDataclass, InClosure, InPartial, AsView, ReRegistered, Attributes, Tied, Hidden
]  # fmt: skip


def saved(model: nn.Module, path: Path) -> Path:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(X)


@pytest.mark.parametrize("cls", HOLDING)
def test_a_copy_holds_its_own_tensors_alike(cls: type[Net], tmp_path: Path) -> None:
    """A module that is given instead of a factory is copied, with what views its parameters."""
    model, given = randomize(cls()).eval(), cls()
    before = output(given)
    path = saved(model, tmp_path / "w.pt")
    if cls is InClosure:  # a function is not copied with what it holds
        with pytest.raises(ModelError, match="would read the tensors of the original in reader.*give a factory"):
            normswap.load(path, model=given)
        return
    torch.testing.assert_close(output(normswap.load(path, model=given)), output(model))
    torch.testing.assert_close(output(given), before)


def test_a_view_around_parameters_is_copied_as_it_is() -> None:
    class Flat(Net):
        def hold(self) -> None:
            self.all = torch.rand(8)
            self.scale = nn.Parameter(self.all[:4].view(4, 1, 1))

    model = Flat()
    copied = clone(model)
    assert torch.equal(copied.all, model.all) and copied.all.data_ptr() != model.all.data_ptr()


@pytest.mark.parametrize("cls", HOLDING)
def test_whatever_holds_a_tensor_sees_the_files(cls: type[Net], tmp_path: Path) -> None:
    model = randomize(cls()).eval()
    with torch.no_grad():
        model.scale.fill_(3.0)
        model.conv.weight.mul_(2.0)
    for kind in ("pt", "safetensors"):
        path = saved(model, tmp_path / f"w.{kind}")
        report = normswap.convert_file(path, "frozen", model=cls)
        loaded = normswap.load(tmp_path / f"w.frozen.{kind}", model=cls)
        assert report.totals.norms_changed == 1
        torch.testing.assert_close(output(loaded), output(model))
    given = loaded.state_dict()
    wanted = normswap.convert(model, "frozen").model.state_dict()
    assert given.keys() == wanted.keys() and all(torch.equal(given[name], wanted[name]) for name in wanted)


def test_tensors_of_another_dtype_and_layout_keep_them(tmp_path: Path) -> None:
    model = randomize(InContainers()).eval().to(torch.float64, memory_format=torch.channels_last)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    loaded = normswap.load(tmp_path / "w.pt", model=InContainers)
    assert loaded.held["all"][0][0] is loaded.scale and loaded.scale.dtype == torch.float64
    assert loaded.conv.weight.stride() == model.conv.weight.stride() != Net().conv.weight.stride()
    for name, value in loaded.state_dict().items():
        assert value.dtype == model.state_dict()[name].dtype and torch.equal(value, model.state_dict()[name]), name


def test_a_view_of_another_dtype_is_named(tmp_path: Path) -> None:
    path = saved(randomize(AsView()).half(), tmp_path / "w.pt")
    with pytest.raises(FileError, match=r"scale is torch.float16, and the model holds views .* torch.float32"):
        normswap.load(path, model=AsView)
    loaded = normswap.load(path, model=lambda: Net().half())
    assert loaded.scale.dtype == torch.float16


def test_tied_tensors_that_differ_in_the_file_are_named(tmp_path: Path) -> None:
    state = Tied().state_dict()
    torch.save(state | {"other.weight": state["other.weight"] + 1}, tmp_path / "w.pt")
    with pytest.raises(FileError, match=r"conv\.weight is not in the model as it is in the file"):
        normswap.load(tmp_path / "w.pt", model=Tied)


def test_tied_tensors_are_saved_under_one_of_their_names(tmp_path: Path) -> None:
    model = randomize(Tied()).eval()
    for gone in ("conv.weight", "other.weight"):
        state = {name: value for name, value in model.state_dict().items() if name != gone}
        torch.save(state, tmp_path / "w.pt")
        torch.testing.assert_close(output(normswap.load(tmp_path / "w.pt", model=Tied)), output(model))
        normswap.convert_file(tmp_path / "w.pt", "frozen", model=Tied, overwrite=True)
        assert torch.load(tmp_path / "w.frozen.pt").keys() == state.keys()
    torch.save({name: value for name, value in state.items() if "weight" not in name}, tmp_path / "w.pt")
    with pytest.raises(FileError, match=r"missing: conv\.weight"):
        normswap.load(tmp_path / "w.pt", model=Tied)


def test_what_stays_on_meta_is_named(tmp_path: Path) -> None:
    def on_meta(cls: type[Net]) -> nn.Module:
        with torch.device("meta"):
            return cls()

    path = saved(randomize(Net()).eval(), tmp_path / "w.pt")
    torch.testing.assert_close(output(normswap.load(path, model=on_meta(Net))), output(normswap.load(path, model=Net)))
    for cls, name in ((InContainers, "held"), (InClosure, "reader"), (InPartial, "reader")):
        with pytest.raises(ModelError, match=f"on meta that the file does not hold: {name}"):
            normswap.load(path, model=lambda cls=cls: on_meta(cls))


# ---- what no file has ----


class Drawn(Net):
    """Reads random numbers that its state dict does not hold."""

    draw: Callable[[nn.Parameter], object]

    def hold(self) -> None:
        self.held = type(self).draw(self.scale)

    def read(self) -> Tensor:
        value = self.held() if callable(self.held) else self.held
        return torch.as_tensor(value).float().view(-1, 1, 1) * self.scale


def from_numpy() -> Tensor:
    return torch.from_numpy(numpy.random.rand(4))


DRAWS: dict[str, Callable[[nn.Parameter], object]] = {
    "a plain tensor": lambda scale: torch.randn(4),
    "an order": lambda scale: torch.randperm(4),
    "in a closure": lambda scale, drawn=None: (lambda made: lambda: made)(torch.rand(4)),
    "from first values": lambda scale: scale.detach() ** 2,
    "by numpy": lambda scale: from_numpy(),
    "an array": lambda scale: numpy.random.permutation(4),
    "a list of numbers": lambda scale: random.sample(range(1, 1000), 4),
    "numbers in an object": lambda scale: partial(list, torch.rand(4).tolist()),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_random_numbers_that_no_file_has_are_named(draw: str, tmp_path: Path) -> None:
    cls = type("Drawing", (Drawn,), {"draw": staticmethod(DRAWS[draw])})

    def seeded() -> nn.Module:
        torch.manual_seed(5)
        numpy.random.seed(5)
        random.seed(5)
        return cls()

    model = randomize(seeded()).eval()
    path = saved(model, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"random numbers that the file does not have: held; give a factory .* same"):
        normswap.load(path, model=cls)
    torch.testing.assert_close(output(normswap.load(path, model=seeded)), output(model))
    torch.testing.assert_close(output(normswap.load(path, model=model)), output(model))
    assert normswap.convert_file(path, "frozen", model=cls).totals.norms_changed == 1  # the file goes on without them


def test_numbers_of_a_generator_that_no_seed_reaches_are_named(tmp_path: Path) -> None:
    cls = type("Drawing", (Drawn,), {"draw": staticmethod(lambda scale: numpy.random.default_rng().random(4))})
    path = saved(randomize(cls()).eval(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match="random numbers that the file does not have: held"):
        normswap.load(path, model=cls)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_counter_and_a_time_are_no_random_numbers(tmp_path: Path) -> None:
    class Counting(Net):
        def hold(self) -> None:
            self.handle = self.register_forward_hook(lambda *_: None)
            self.made = [time.time_ns(), id(self)]

    path = saved(randomize(Counting()).eval(), tmp_path / "w.pt")
    assert torch.equal(normswap.load(path, model=Counting).scale, torch.load(path)["scale"])


def test_what_is_only_not_written_yet_is_no_random_number(tmp_path: Path) -> None:
    class Caching(Net):
        def hold(self) -> None:
            self.register_buffer("cache", torch.empty(1 << 16), persistent=False)
            self.other = torch.empty(100, 100)
            self.constant = torch.arange(3)

    path = saved(randomize(Caching()).eval(), tmp_path / "w.pt")
    assert torch.equal(normswap.load(path, model=Caching).scale, torch.load(path)["scale"])


# ---- the model's own loading ----


class Renaming(Net):
    """Loads what was saved when its layers had other names, and its scale was a logarithm."""

    def hold(self) -> None:
        self._register_load_state_dict_pre_hook(self.rename)

    def rename(self, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
        for name in list(state):
            if name.startswith(f"{prefix}stem."):
                state[name.replace("stem.", "conv.")] = state.pop(name)
        if f"{prefix}log_scale" in state:
            state[f"{prefix}scale"] = state.pop(f"{prefix}log_scale").exp()


class Overriding(Net):
    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
        if f"{prefix}gamma" in state:
            state[f"{prefix}scale"] = state.pop(f"{prefix}gamma")
        super()._load_from_state_dict(state, prefix, *rest)


@pytest.mark.parametrize("outer", ["", "module.model."])
def test_load_hooks_run_before_keys_are_missing(outer: str, tmp_path: Path) -> None:
    model = randomize(Renaming()).eval()
    older = {name.replace("conv.", "stem."): value for name, value in model.state_dict().items()}
    older["log_scale"] = older.pop("scale").log()
    torch.save({outer + name: value for name, value in older.items()}, tmp_path / "w.pt")
    wanted = Renaming()
    wanted.load_state_dict(older)
    normswap.convert_file(tmp_path / "w.pt", "frozen", model=Renaming)
    found = torch.load(tmp_path / "w.frozen.pt")
    assert f"{outer}stem.weight" in found and f"{outer}log_scale" not in found and f"{outer}scale" in found
    for path in ("w.pt", "w.frozen.pt"):
        torch.testing.assert_close(output(normswap.load(tmp_path / path, model=Renaming)), output(wanted))
    newer = Overriding().state_dict()
    newer["gamma"] = newer.pop("scale")
    torch.save({outer + name: value for name, value in newer.items()}, tmp_path / "o.pt")
    assert torch.equal(normswap.load(tmp_path / "o.pt", model=Overriding).scale, newer["gamma"])
    with pytest.raises(FileError, match="missing"):
        normswap.load(tmp_path / "o.pt", model=Net)


class Silent(Renaming):
    """Its own `load_state_dict` returns nothing."""

    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True) -> None:
        super().load_state_dict({name: value for name, value in state.items() if name != "step"}, strict)


def test_a_model_that_loads_by_a_method_of_its_own(tmp_path: Path) -> None:
    model = randomize(Silent()).eval()
    older = {name.replace("conv.", "stem."): value for name, value in model.state_dict().items()}
    for state in (model.state_dict(), older):
        torch.save(state, tmp_path / "w.pt")
        torch.testing.assert_close(output(normswap.load(tmp_path / "w.pt", model=Silent)), output(model))
    older.pop("scale")
    torch.save(older, tmp_path / "w.pt")
    with pytest.raises(FileError, match="missing"):
        normswap.load(tmp_path / "w.pt", model=Silent)


FORMS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "weight norm": (weight_norm, parametrizations.weight_norm),
    "spectral norm": (spectral_norm, parametrizations.spectral_norm),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_both_of_torchs_forms_meet(form: str, tmp_path: Path) -> None:
    older, newer = (
        lambda wrap=wrap: nn.Sequential(wrap(nn.Conv2d(3, 4, 3)), wrap(nn.ConvTranspose2d(4, 5, 3)), nn.BatchNorm2d(5))
        for wrap in FORMS[form]
    )
    for made, other in ((older, newer), (newer, older)):
        model = randomize(made()).eval()
        wanted = output(model)
        torch.save(model.state_dict(), tmp_path / "w.pt")
        loaded = normswap.load(tmp_path / "w.pt", model=other).eval()
        torch.testing.assert_close(loaded[0].weight, model[0].weight)  # before any forward
        torch.testing.assert_close(output(loaded), wanted)
        normswap.convert_file(tmp_path / "w.pt", "frozen", model=other, overwrite=True)
        converted = normswap.convert(made(), "frozen").model
        converted.load_state_dict(torch.load(tmp_path / "w.frozen.pt"))
        torch.testing.assert_close(output(converted), output(model))


def test_pruned_weights_are_computed_from_the_files(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(prune.random_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5), nn.BatchNorm2d(4))

    model = randomize(make()).eval()
    wanted = output(model)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    loaded = normswap.load(tmp_path / "w.pt", model=make)
    torch.testing.assert_close(loaded[0].weight, model[0].weight)
    torch.testing.assert_close(output(loaded), wanted)


def test_a_recipe_makes_no_model_that_is_far_larger_than_its_file(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict(), tmp_path / "w.pt")
    normswap.convert_file(tmp_path / "w.pt", "gn")
    state = torch.load(tmp_path / "w.gn.pt")
    state._metadata["normswap_recipe"] |= {"model": "torchvision:resnet18", "model_args": {"num_classes": 1_000_000}}
    torch.save(state, tmp_path / "w.gn.pt")
    with pytest.raises(NormswapError, match="makes a model of 524,176,512 parameters, and the file holds 120"):
        normswap.load(tmp_path / "w.gn.pt")


def test_a_lazy_model_is_told_to_run_first(tmp_path: Path) -> None:
    """Its weights have no shape to compare with the file's."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(2)
        )

    model = make().eval()
    model(torch.randn(1, 3, 4, 4))
    normswap.save(normswap.convert(model, "gn").model, tmp_path / "m.safetensors")
    torch.save(model.state_dict(), tmp_path / "m.pt")
    for path in tmp_path.iterdir():
        with pytest.raises(normswap.ModelError, match=r"4 \(LazyLinear\) is lazy.*run the model once"):
            normswap.load(path, model=make)
