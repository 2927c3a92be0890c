"""Where a checkpoint keeps its model and the copies of it, whatever else stands there."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap import FileError, OptionError
from normswap.checkpoints.contents import find_entries, other_models, with_value_at

State = dict[str, Tensor]


def state(width: int = 8, prefix: str = "") -> State:
    net = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
    return {prefix + name: value for name, value in net.state_dict().items()}


def parameters() -> State:
    return {name: value for name, value in state().items() if "running" not in name and "num_batches" not in name}


def optimizer() -> dict[str, Any]:
    """Its moments have the names and the shapes of a model's tensors."""
    return {"state": {"model": state()}, "param_groups": [{"params": list(state())}]}


FOUND: dict[str, tuple[dict[Any, Any], list[str]]] = {
    "diffusion_policy": (
        {"cfg": {"n": 1}, "state_dicts": {"model": state(), "ema_model": state(), "optimizer": optimizer()}},
        ["state_dicts.model", "state_dicts.ema_model"],
    ),
    "an average one level below": (
        {"model": state(), "ema": {"module": state(), "updates": 3}, "optimizer": optimizer()},
        ["model", "ema.module"],
    ),
    "an average with a count, and a loss beside the model": (
        {"state_dict": state(prefix="net.") | {"loss.weight": torch.ones(3)}, "callbacks": {"EMA": {"w": state()}}},
        ["state_dict", "callbacks.EMA.w"],
    ),
    "deep": ({"a": {"b": [{"c": {"model": state()}}]}}, ["a.b.0.c.model"]),
    "the only one": ({"step": 3, "model_state": state(), "optimizer_state": optimizer()}, ["model_state"]),
    "the only one that is no average": ({"weights": state(), "weights_ema": state()}, ["weights", "weights_ema"]),
    "beside statistics": ({"a2c": state(), "obs": {"running_mean": torch.ones(3), "count": torch.ones(())}}, ["a2c"]),
    "on top first": ({"net": state(), "deeper": {"model": state()}}, ["net", "deeper.model"]),
    "an average of parameters alone stays": ({"state_dict": state(), "old": {"ema": parameters()}}, ["state_dict"]),
    "another size stays": ({"model": state(), "teacher": {"ema_model": state(16)}}, ["model"]),
    "an average of a part stays": (
        {"model": {f"{n}.weight": torch.ones(4, 4) for n in range(5)}, "head_ema": {"weight": torch.ones(4, 4)}},
        ["model"],
    ),
    "in a dict with defaults": ({"nets": defaultdict(dict, model=state())}, ["nets.model"]),
}


@pytest.mark.parametrize("kind", FOUND)
def test_models_and_their_copies_are_found(kind: str) -> None:
    content, wanted = FOUND[kind]
    entries = find_entries(content, None, "x.pt")
    assert [entry.name for entry in entries] == wanted
    assert bool(entries[0].note) == (kind in {"the only one", "the only one that is no average", "beside statistics"})
    for entry in entries:
        content = with_value_at(content, entry, "new")
    assert [find(content, entry.keys) for entry in entries] == ["new"] * len(entries)
    assert all(find(FOUND[kind][0], entry.keys) is entry.value for entry in entries), "the content itself was changed"


def find(content: Any, keys: tuple[Any, ...]) -> Any:
    for key in keys:
        content = content[key]
    return content


def test_a_key_names_the_model_and_copies_come_along() -> None:
    content = {"state_dicts": {"model": state(), "ema_model": state(), "net": state(16)}}
    assert [e.name for e in find_entries(content, "state_dicts.model", "x")] == [
        "state_dicts.model",
        "state_dicts.ema_model",
    ]
    assert [e.name for e in find_entries(content, "state_dicts.net", "x")] == ["state_dicts.net"]
    dotted = {"a.b": state(), "a": {"c": state()}}
    assert find_entries(dotted, "a.b", "x")[0].value is dotted["a.b"]
    assert find_entries(dotted, "a.c", "x")[0].value is dotted["a"]["c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"student": state(), "teacher": state()}, "give --key student or --key teacher"),
        ({"g": {"model": state()}, "d": {"model": state(16)}}, r"give --key g\.model or --key d\.model"),
        ({"models": [state(), state()]}, r"give --key models\.0 or --key models\.1"),
        ({"optimizer": optimizer(), "epoch": 1}, "no model that could be found; its entries are optimizer, epoch"),
        ({"rng": {"cpu": torch.zeros(8, dtype=torch.uint8)}}, "which entry is the model.*--key rng"),
    ],
)
def test_what_is_not_clear_is_asked_for(content: dict[str, Any], message: str) -> None:
    with pytest.raises(FileError, match=message):
        find_entries(content, None, "x.pt")


def test_a_wrong_key_is_told_the_right_ones() -> None:
    content = {"state_dicts": {"model": state(), "optimizer": optimizer()}}
    for key in ("model", "state_dicts", "state_dicts.optimizer", ""):
        with pytest.raises(OptionError, match=r"models stand under state_dicts\.model$"):
            find_entries(content, key, "x.pt")


def test_what_else_looks_like_a_model_is_named() -> None:
    content = {"model": state(), "extra": {"critic": state(16), "losses": {"last": torch.ones(3)}}, "opt": optimizer()}
    assert other_models(content, find_entries(content, None, "x")) == ["extra.critic"]


def test_a_checkpoint_without_end() -> None:
    wide: dict[str, Any] = {str(n): {} for n in range(1000)}
    for _ in range(6):
        wide = {str(n): wide for n in range(1000)}
    wide["loop"] = wide
    with pytest.raises(FileError, match="no model that could be found"):
        find_entries(wide, None, "x")
