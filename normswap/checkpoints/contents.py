"""What is in a checkpoint: the model and its copies, as modules or as state dicts."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normswap.errors import FileError, OptionError

MODEL_KEYS = (
    "state_dict", "model", "model_state_dict", "net", "ema", "state_dict_ema", "model_ema", "ema_state_dict", "module",
)  # fmt: skip
"""The names under which training scripts keep a model and its moving average."""
NO_WEIGHTS = ("n_averaged", "total_ops", "total_params")
"""Endings of the keys that moving averages and profilers leave among the weights."""


@dataclass(frozen=True)
class SavedBytes:
    """An entry of a distributed checkpoint that is no tensor: its pickle, which is copied and never run."""

    data: bytes


@dataclass(frozen=True)
class Entry:
    """A model in a checkpoint."""

    keys: tuple[str, ...]
    """The keys of the nested dicts that lead to it; none where the checkpoint is the model itself."""
    value: Any
    """Its state dict, or the module."""

    @property
    def name(self) -> str:
        """The keys with dots between them, as `--key` takes them."""
        return ".".join(map(str, self.keys))


def find_entries(content: Any, key: str | None, where: object) -> list[Entry]:
    """The model in a checkpoint and its copies (moving averages), the model first.

    Args:
        content: what the checkpoint holds.
        key: where the only model of interest stands, with dots between nested keys; None: under one of `MODEL_KEYS`.
        where: the file, for messages.

    Raises:
        FileError: no model, or several that could be it.
        OptionError: nothing that is a model stands under `key`.
    """
    if key is not None:
        return [_entry_at(content, key, where)]
    if isinstance(content, nn.Module) or is_state(content):
        return [Entry((), content)]
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise FileError(f"{where}: holds a {kind}, not a model, a state dict or a training checkpoint")
    found = [Entry((name,), content[name]) for name in MODEL_KEYS if _is_model(content.get(name))]
    if found:
        return found
    named = all(isinstance(name, str) for name in content)
    if named and sum(isinstance(value, Tensor) for value in content.values()) * 2 > len(content):
        return [Entry((), content)]
    others = [str(name) for name, value in content.items() if _is_model(value)]
    if others:
        raise FileError(f"{where}: which entry is the model? give --key {' or --key '.join(others[:5])}")
    listed = ", ".join(str(name) for name in list(content)[:8]) or "nothing"
    raise FileError(f"{where}: holds no model that could be found; its entries are {listed}")


def _entry_at(content: Any, key: str, where: object) -> Entry:
    found, keys, rest = content, [], key
    while rest and isinstance(found, Mapping):
        # A key may hold dots itself, so all of the rest is tried before its part up to the first dot; it may also be
        # a number in the file, while `key` is text.
        step: Any = rest if rest in found else rest.partition(".")[0]
        step = next((name for name in found if str(name) == step), step)
        if step not in found:
            break
        found, rest = found[step], rest[len(str(step)) + 1 :]
        keys.append(step)
    if rest or not _is_model(found):
        names = [str(n) for n, v in content.items() if _is_model(v)] if isinstance(content, Mapping) else []
        hint = f"; models stand under {', '.join(names[:8])}" if names else ""
        raise OptionError(f"{where}: nothing that is a model stands under --key {key}{hint}")
    return Entry(tuple(keys), found)


def is_state(value: Any) -> bool:
    """Whether `value` is a state dict: tensors by name, and perhaps extra states of modules."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    tensors = [name for name, entry in value.items() if isinstance(entry, Tensor)]
    others = (name for name, entry in value.items() if not isinstance(entry, Tensor | SavedBytes))
    return bool(tensors) and all(name.endswith(("_extra_state", *NO_WEIGHTS)) for name in others)


def other_models(content: Any, found: Sequence[Entry]) -> list[str]:
    """Names of what looks like a model in a training checkpoint, and is not among `found`."""
    if not isinstance(content, Mapping) or is_state(content):
        return []
    taken = {entry.keys[0] for entry in found if entry.keys}
    return [str(name) for name, value in content.items() if name not in taken and _is_model(value)] if taken else []


def _is_model(value: Any) -> bool:
    return isinstance(value, nn.Module) or is_state(value)


def with_value_at(content: Any, entry: Entry, value: Any) -> Any:
    """`content` with `value` in the place of `entry`: dicts on the way are copied, all else stays the same objects."""
    if not entry.keys:
        return value
    first, *rest = entry.keys
    changed = copy.copy(content)
    changed[first] = with_value_at(content[first], Entry(tuple(rest), None), value)
    return changed
