"""How the keys of a state dict stand to those of its model: prefixes, wrappers, copies."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from normswap.checkpoints.contents import NO_WEIGHTS
from normswap.errors import FileError

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # anywhere in a key
_SHOWN = 3


@dataclass(frozen=True)
class Binding:
    """How a model's keys stand in a state dict: `names` maps each to the one there, under `prefix`."""

    names: Mapping[str, str]
    prefix: str = ""

    def outer(self, key: str) -> str:
        """The key in the state dict for a key of the model, also for a new one."""
        if key in self.names:
            return self.names[key]
        module, _, leaf = key.rpartition(".")
        return f"{self._modules[module]}{leaf}" if module in self._modules else self.prefix + key

    @cached_property
    def _modules(self) -> dict[str, str]:
        """What each module is called there, with the dot behind it: the keys that it has tell."""
        return {
            known.rpartition(".")[0]: name.removesuffix(known.rpartition(".")[2]) for known, name in self.names.items()
        }


def without_wrappers(key: str) -> str:
    """A key without what `torch.compile`, FSDP and checkpointing put into it."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def bind(state: Mapping[str, Any], model: Mapping[str, Any], where: object) -> list[Binding]:
    """The places of a model with the state dict `model` in `state`: one, or several where it holds copies of the model.

    Raises `FileError`, which says which keys are missing, unexpected or of another shape, and why that may be.
    """
    plain = {without_wrappers(name): name for name in state}
    if not any("parametrizations." in name for name in model):
        plain = {_PARAMETRIZED.sub(_as_ours, name): outer for name, outer in plain.items()}
    wanted = [name for name in model if not name.endswith("num_batches_tracked")]
    best: list[tuple[int, str]] = []
    for prefix in _prefixes(plain, wanted):
        best.append((sum(prefix + name in plain for name in wanted), prefix))
    best.sort(key=lambda item: (-item[0], len(item[1])))
    complete = [prefix for hits, prefix in best if hits == len(wanted)]
    if not complete:
        raise FileError(f"{where}: {_mismatch(plain, state, model, best[0][1] if best else '')}")
    bindings: list[Binding] = []
    taken: set[str] = set()
    for prefix in complete:
        names = {name: plain[prefix + name] for name in model if prefix + name in plain}
        if not taken & set(names.values()) and (not bindings or prefix.count(".") <= 2):
            bindings.append(Binding(names, prefix))
            taken |= set(names.values())
    first = bindings[0].prefix
    odd = [
        name for name in plain if name.startswith(first) and plain[name] not in taken and not name.endswith(NO_WEIGHTS)
    ]
    shapes = any(
        state[outer].shape != model[name].shape
        for b in bindings
        for name, outer in b.names.items()
        if _shaped(state[outer], model[name])
    )
    if odd or shapes:
        raise FileError(f"{where}: {_mismatch(plain, state, model, first, taken)}")
    return bindings


_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\.original([01])$")


def _as_ours(match: re.Match[str]) -> str:
    """`weight_g` and `weight_v`, which torch's newer weight normalization calls `parametrizations.weight.original0` and `1`."""
    return f"{match[1]}_{'gv'[int(match[2])]}"


def _shaped(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor)


def _prefixes(plain: Mapping[str, str], wanted: Sequence[str]) -> Iterable[str]:
    """What may stand before the model's keys: whatever does before the most telling of them."""
    found = Counter[str]()
    telling = sorted(wanted, key=lambda name: (-name.count("."), -len(name)))
    for name in {*telling[:3], *wanted[:3], *wanted[-3:]}:
        for key in plain:
            if key == name:
                found[""] += 1
            elif key.endswith(f".{name}"):
                found[key[: -len(name)]] += 1
    return found


def _mismatch(
    plain: Mapping[str, str], state: Mapping[str, Any], model: Mapping[str, Any], prefix: str, taken: Iterable[str] = ()
) -> str:
    taken = set(taken)
    here = {
        name.removeprefix(prefix): plain[name] for name in plain if name.startswith(prefix) and plain[name] not in taken
    }
    here |= {name: plain[prefix + name] for name in model if prefix + name in plain}
    missing = [name for name in model if name not in here and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in here if name not in model and not name.endswith(NO_WEIGHTS)]
    reshaped = [
        f"{name} is {tuple(state[here[name]].shape)}, the model's {tuple(model[name].shape)}"
        for name in model
        if name in here and _shaped(state[here[name]], model[name]) and state[here[name]].shape != model[name].shape
    ]
    parts = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    under = f" under the prefix {prefix!r}" if prefix else ""
    return f"does not fit the model{under}; {'; '.join(parts)}. {_cause(missing, unexpected, reshaped, model)}"


def _cause(missing: Sequence[str], unexpected: Sequence[str], reshaped: Sequence[str], model: Mapping[str, Any]) -> str:
    if len(missing) > len(model) // 2:
        return "Likely another architecture, or the model stands under another --key"
    if reshaped and not missing and not unexpected and len(reshaped) <= 4:
        return "Likely another number of classes: give it with --model-arg num_classes=N"
    if any(name.endswith(("weight_gain", "weight_shift")) for name in unexpected):
        return (
            "It seems to be converted already: load it with normswap.load(path, model=...); without a recipe in it, into "
            "normswap.convert(model, target).model, with the target that made it"
        )
    return "Likely another version or another size of the architecture: see --model-arg"


def rebuild(
    state: Mapping[str, Any], bindings: Sequence[Binding], states: Sequence[Mapping[str, Any]]
) -> OrderedDict[str, Any]:
    """`state` with the keys of each binding exchanged for the new state dict of its model, all others as they were."""
    result: OrderedDict[str, Any] = OrderedDict()
    owner: dict[str, tuple[int, str]] = {}
    parts: dict[tuple[int, str], dict[str, Any]] = {}  # by binding and module: a module's keys stand together
    for index, (binding, new) in enumerate(zip(bindings, states, strict=True)):
        owner |= {outer: (index, name.rpartition(".")[0]) for name, outer in binding.names.items()}
        for name, value in new.items():
            parts.setdefault((index, name.rpartition(".")[0]), {})[binding.outer(name)] = value
    for key, value in state.items():
        place = owner.get(key)
        result.update({key: value} if place is None else parts.pop(place, {}))
    for part in parts.values():
        result.update(part)
    result._metadata = _metadata(state, bindings, states)  # type: ignore[attr-defined]  # torch's own place
    return result


def _metadata(
    state: Mapping[str, Any], bindings: Sequence[Binding], states: Sequence[Mapping[str, Any]]
) -> OrderedDict[str, Any]:
    known = getattr(state, "_metadata", None)
    metadata = OrderedDict(known if isinstance(known, Mapping) else {})
    for binding, new in zip(bindings, states, strict=True):
        for module, value in (getattr(new, "_metadata", None) or {}).items():
            metadata[binding.outer(f"{module}.x" if module else "x").removesuffix("x").removesuffix(".")] = value
    return metadata
