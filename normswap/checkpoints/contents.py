"""What is in a checkpoint: the model and its copies, as modules or as state dicts."""

import copy
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import Tensor, nn

from normswap.errors import FileError, OptionError

MODEL_KEYS = (
    "state_dict", "model", "model_state_dict", "net", "ema", "state_dict_ema", "model_ema", "ema_model",
    "ema_state_dict", "module",
)  # fmt: skip
"""The names under which training scripts keep a model and its moving average."""
_AVERAGES = ("ema", "swa", "avg", "average", "averaged", "shadow")
"""Words in the names of moving averages."""
NO_WEIGHTS = ("n_averaged", "total_ops", "total_params")
"""Endings of the keys that moving averages and profilers leave among the weights."""
_DEEPEST, _MOST = 6, 10_000  # levels, and entries, that a checkpoint is searched for models
_SHOWN = 8  # names in a message


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
    note: str = ""
    """What the user should know of the choice, where nothing but the lack of others tells that this is the model."""

    @property
    def name(self) -> str:
        """The keys with dots between them, as `--key` takes them."""
        return ".".join(map(str, self.keys))


def find_entries(content: Any, key: str | None, where: object) -> list[Entry]:
    """The model in a checkpoint and its copies (moving averages), the model first.

    The model has one of the names in `MODEL_KEYS`, or there is no other where it stands. Copies stand beside it with
    such names, or have the name of an average, and the shapes of the model.

    Args:
        content: what the checkpoint holds.
        key: where the model stands, with dots between nested keys; None: it is looked for.
        where: the file, for messages.

    Raises:
        FileError: no model, or several that could be it.
        OptionError: nothing that is a model stands under `key`.
    """
    if key is None and (isinstance(content, nn.Module) or is_state(content)):
        return [Entry((), content)]
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise FileError(f"{where}: holds a {kind}, not a model, a state dict or a training checkpoint")
    models = list(models_in(content))
    if key is not None:
        first = _entry_at(models, key, where)
        return [first, *(e for e in models if e is not first and _is_copy(e, first))]
    found = [e for name in MODEL_KEYS for e in models if e.keys == (name,)]
    named = all(isinstance(name, str) for name in content)
    if not found and named and sum(isinstance(value, Tensor) for value in content.values()) * 2 > len(content):
        return [Entry((), content)]
    found = found or _likeliest(models, content, where)
    taken = {e.keys for e in found}
    return [*found, *(e for e in models if e.keys not in taken and _is_copy(e, found[0]))]


def _likeliest(models: Sequence[Entry], content: Mapping[Any, Any], where: object) -> list[Entry]:
    """The model, and what stands beside it under the name of a model, where nothing on top has such a name."""
    likely = [e for e in models if _has_weights(e.value)]
    level = min((len(e.keys) for e in likely), default=0)
    highest = [e for e in likely if len(e.keys) == level]
    named = [e for name in MODEL_KEYS for e in highest if e.keys[-1] == name]
    if named and len({e.keys[:-1] for e in named}) == 1:
        return named
    alone = [e for e in highest if not _is_average(e)] or highest
    if len(alone) == 1:
        note = f"{alone[0].name} is taken as the model, since nothing else in the file can be it; else give --key"
        return [replace(alone[0], note=note)]
    if models:
        names = [e.name for e in alone or models]
        raise FileError(f"{where}: which entry is the model? give --key {' or --key '.join(names[:_SHOWN])}")
    listed = ", ".join(str(name) for name in list(content)[:_SHOWN]) or "nothing"
    raise FileError(f"{where}: holds no model that could be found; its entries are {listed}; give another file")


def _entry_at(models: Sequence[Entry], key: str, where: object) -> Entry:
    found = next((e for e in models if e.name == key), None)
    if found is None:
        hint = f"; models stand under {', '.join(e.name for e in models[:_SHOWN])}" if models else ""
        raise OptionError(f"{where}: there is no model under --key {key}{hint}")
    return found


def models_in(content: Any) -> Iterator[Entry]:
    """Every module and every state dict in the dicts and lists of a checkpoint, those on top first; none in optimizers.

    Of a file without end, as a hostile one may be, the first part is looked at.
    """
    pending: deque[Entry] = deque([Entry((), content)])
    for _ in range(_MOST):
        if not pending:
            return
        entry = pending.popleft()
        if entry.keys and _is_model(entry.value):
            yield entry
        elif len(entry.keys) < _DEEPEST:
            inner = (Entry((*entry.keys, name), value) for name, value in _items(entry.value))
            pending.extend(islice(inner, _MOST - len(pending)))


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a dict or a list holds, where it may lead to a model; nothing of an optimizer's state."""
    if isinstance(value, list):
        yield from ((index, item) for index, item in enumerate(value) if isinstance(item, Mapping | list | nn.Module))
    elif isinstance(value, dict) and "param_groups" not in value:
        yield from ((name, item) for name, item in value.items() if isinstance(item, Mapping | list | nn.Module))


def is_state(value: Any) -> bool:
    """Whether `value` is a state dict: tensors by name, and perhaps extra states of modules."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    tensors = [name for name, entry in value.items() if isinstance(entry, Tensor)]
    others = (name for name, entry in value.items() if not isinstance(entry, Tensor | SavedBytes))
    return bool(tensors) and all(name.endswith(("_extra_state", *NO_WEIGHTS)) for name in others)


def other_models(content: Any, found: Sequence[Entry]) -> list[str]:
    """Names of what looks like a model in a training checkpoint, and is not among `found`."""
    taken = {entry.keys for entry in found}
    others = (e for e in models_in(content) if e.keys not in taken and (len(e.keys) == 1 or _has_weights(e.value)))
    return [] if () in taken else [e.name for e in others]


def _is_model(value: Any) -> bool:
    return isinstance(value, nn.Module) or is_state(value)


def _has_weights(value: Any) -> bool:
    """Whether a module or a state dict has what a layer multiplies with, as statistics and losses seldom have."""
    return any("weight" in name and tensor.dim() > 1 for name, tensor in tensors_of(value).items())


def _is_average(entry: Entry) -> bool:
    words = {word for name in entry.keys for word in re.split("[^a-z]+", str(name).lower())}
    return not words.isdisjoint(_AVERAGES)


def _is_copy(entry: Entry, model: Entry) -> bool:
    """Whether `entry` is named like a model or an average, and is one of `model`, or of most of it, by its shapes."""
    called_so = entry.keys[-1] in MODEL_KEYS or _is_average(entry)
    if not called_so or isinstance(entry.value, nn.Module) != isinstance(model.value, nn.Module):
        return False
    tensors = tensors_of(entry.value), tensors_of(model.value)
    norms = [sum(name.endswith("running_mean") for name in part) for part in tensors]
    # Numbers do not matter, such as how many batches or models went into it.
    shapes = [Counter(tuple(tensor.shape) for tensor in part.values() if tensor.dim()) for part in tensors]
    less, more = sorted(shapes, key=Counter.total)
    return norms[0] == norms[1] and less <= more and 2 * less.total() > more.total()


def tensors_of(value: Any) -> dict[str, Tensor]:
    """The tensors of a module or a dict by name; none of anything else."""
    if isinstance(value, nn.Module):
        return {**dict(value.named_parameters()), **dict(value.named_buffers())}
    pairs = value.items() if isinstance(value, Mapping) else ()
    return {name: tensor for name, tensor in pairs if isinstance(tensor, Tensor)}


def with_value_at(content: Any, entry: Entry, value: Any) -> Any:
    """`content` with `value` in the place of `entry`: dicts on the way are copied, all else stays the same objects."""
    if not entry.keys:
        return value
    first, *rest = entry.keys
    changed = copy.copy(content)
    changed[first] = with_value_at(content[first], Entry(tuple(rest), None), value)
    return changed
