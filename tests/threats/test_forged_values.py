"""Layers whose tensors and numbers are forged or odd: each file is refused in one line, or converted as it computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap

EXACT = ("frozen", "fold-wn", "ws")
X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    features = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.MaxPool2d(2))
    model = nn.Sequential(*features, nn.ZeroPad2d(1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    norm: Any = model[1]
    for tensor in (norm.weight.data, norm.running_var):
        tensor.uniform_(0.5, 2)
    norm.running_mean.uniform_(-1, 1)
    norm.num_batches_tracked.fill_(7)
    return model.eval()


def negated(tensor: Tensor) -> Tensor:
    """The same values, kept as their negatives."""
    return torch.complex(tensor.float(), -tensor.float()).conj().imag


def far_apart(tensor: Tensor) -> Tensor:
    """The same values, a thousand elements from each other."""
    flat = torch.zeros(max(1, tensor.numel()) * 1000, dtype=tensor.dtype)[::1000]
    return flat.copy_(tensor.reshape(-1)).as_strided(tensor.shape, [1000 * step for step in tensor.stride()])


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "sparse": Tensor.to_sparse,
    "sparse rows": lambda tensor: tensor.reshape(1, -1).to_sparse_csr(),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor.reshape(-1).float()]),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "conjugate": lambda tensor: torch.complex(tensor.float(), tensor.float()).conj(),
    "negated": negated,
    "without elements": lambda tensor: torch.empty(0, dtype=tensor.dtype),
    "of one element": lambda tensor: tensor.reshape(-1)[:1].clone(),
    "too long": lambda tensor: torch.cat([tensor.reshape(-1)] * 2),
    "of more dimensions": lambda tensor: tensor.reshape(1, -1, 1, 1),
    "on meta": lambda tensor: tensor.to("meta"),
    "far apart": far_apart,
    "expanded": lambda tensor: tensor.reshape(-1)[:1].expand(tensor.shape or (4,)),
    "whole numbers": lambda tensor: tensor.int(),
    "float8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "double": Tensor.double,
    "NaN": lambda tensor: torch.full_like(tensor.float(), float("nan")),
    "text": lambda tensor: "text",
    "none": lambda tensor: None,
}
SLOTS = ("1.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked", "0.weight", "8.bias")
NUMBERS: dict[str, Any] = {
    "none": None, "text": "x", "NaN": float("nan"), "negative": -1, "huge": 10**400, "a list": [1], "nothing": (),
    "three": (1, 1, 1), "texts": ("1", "1"), "a tensor": torch.ones(2), "complex": 1j,
}  # fmt: skip
PLACES = (
    (0, "padding"), (0, "groups"), (1, "num_features"), (1, "eps"), (1, "momentum"), (3, "p"), (4, "kernel_size"),
    (5, "padding"), (6, "output_size"), (7, "start_dim"), (8, "in_features"),
)  # fmt: skip


def problem_with(path: Path, target: str, original: nn.Module | None, model: Any = None) -> str:
    """What is wrong with how the conversion of a file ends, whose model is `original`, if that is known."""
    out = path.with_name("out.pt")
    try:
        normswap.convert_file(path, target, out, model=model, overwrite=True)
        converted = normswap.load(out, model=model) if original is not None else nn.Identity()
    except normswap.NormswapError as error:
        return "" if str(error).isprintable() else f"{target}: the message is not one line: {error}"
    if original is None or any(isinstance(t, Tensor) and t.is_meta for t in original.state_dict().values()):
        return ""  # of values that are not there, torch makes any output
    with torch.no_grad():
        try:
            wanted = original.eval()(X)
        except Exception:  # what does not run has nothing to keep
            return ""
        given = converted.eval()(X)
    return "" if torch.allclose(given, wanted, atol=1e-3, equal_nan=True) else f"{target}: the output differs"


def put(model: nn.Module, slot: str, value: Any) -> None:
    owner, _, name = slot.rpartition(".")
    module = model.get_submodule(owner)
    if name in module._buffers:
        module._buffers[name] = value
    else:
        plain = isinstance(value, Tensor) and value.is_floating_point() and not value.is_sparse
        module._parameters[name] = nn.Parameter(value) if plain else value


def is_saved(content: Any, path: Path) -> bool:
    """Whether torch saves it: what it cannot is in no file."""
    try:
        torch.save(content, path)
    except Exception:  # whatever torch raises for odd tensors
        return False
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("slot", SLOTS)
def test_tensors(slot: str, kind: str, tmp_path: Path) -> None:
    path, plain = tmp_path / "in.pt", net().state_dict()[slot]
    try:
        value = TENSORS[kind](plain)
    except (RuntimeError, ValueError, TypeError) as error:
        pytest.skip(f"torch makes none: {error}")
    model, problems = net(), []
    put(model, slot, value)
    if is_saved(model, path):
        problems += [problem_with(path, target, model) for target in EXACT]
    state = net().state_dict()
    state[slot] = value
    if is_saved(state, path):
        problems += [problem_with(path, "frozen", None), *(problem_with(path, target, None, net) for target in EXACT)]
    assert not any(problems), problems


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}.{place[1]}")
def test_numbers(place: tuple[int, str], kind: str, tmp_path: Path) -> None:
    model, (index, name) = net(), place
    vars(model[index])[name] = NUMBERS[kind]
    torch.save(model, tmp_path / "in.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problems = [problem_with(tmp_path / "in.pt", target, model) for target in EXACT]
    assert not any(problems), problems


def test_a_sparse_count_of_batches_is_told_as_such(tmp_path: Path) -> None:
    state = net().state_dict()
    state["1.num_batches_tracked"] = state["1.num_batches_tracked"].to_sparse()
    torch.save(state, tmp_path / "in.pt")
    with pytest.raises(normswap.ModelError, match=r"num_batches_tracked that is no plain tensor \(sparse_coo\)"):
        normswap.convert_file(tmp_path / "in.pt", "gn")
