"""How the keys in a saved state dict stand to those of its model.

A saved key may have a prefix (`module.` of data parallelism, `model.` of a trainer), names of wrappers within it
(`_orig_mod` of `torch.compile`), or be one of several copies of the model's key, under several prefixes.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from normswap.checkpoints.contents import NO_WEIGHTS
from normswap.errors import FileError

_State = Mapping[str, Any]
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # anywhere in a key
_SHOWN = 3


@dataclass(frozen=True)
class Binding:
    """What the keys of a model are called in a saved state dict."""

    names: Mapping[str, str]
    """The saved key of each key of the model."""
    prefix: str = ""
    """What stands before the model's keys there, with the dot behind it."""
    given: Mapping[str, str] = field(default_factory=dict)
    """Where the model's load hooks make its keys of others: those others, and the saved key of each."""

    def saved_key(self, key: str) -> str:
        """The saved key for a key of the model, also for one that the conversion has made new."""
        if key in self.names:
            return self.names[key]
        module, _, leaf = key.rpartition(".")
        return f"{self._saved_modules[module]}{leaf}" if module in self._saved_modules else self.prefix + key

    def saved_module(self, module: str) -> str:
        """What a module is called there: what stands before a key of it, here `x`."""
        return self.saved_key(f"{module}.x" if module else "x").removesuffix("x").removesuffix(".")

    def knows_module(self, module: str) -> bool:
        """Whether a tensor of this module of the model is saved."""
        return module in self._saved_modules

    @cached_property
    def _saved_modules(self) -> dict[str, str]:
        """What each module is called there, with the dot behind it, as the keys of its tensors tell."""
        pairs = ((known.rpartition("."), name) for known, name in self.names.items())
        return {module: name.removesuffix(leaf) for (module, _, leaf), name in pairs if name.endswith(leaf)}


def without_wrappers(key: str) -> str:
    """A key without the names that `torch.compile`, FSDP and activation checkpointing put into it."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def bind(state: _State, model: _State, where: object) -> list[Binding]:
    """Find a model in a saved state dict: one binding, or several where it holds copies of the model.

    Args:
        state: the saved state dict.
        model: the model's own state dict.
        where: the file, for messages.

    Raises:
        FileError: with the keys that are missing, unexpected or of another shape, and why that may be.
    """
    own = {without_wrappers(name): name for name in state}
    plain = _with_other_spellings(own)
    tied = _tied_names(model)
    wanted = [name for name in model if not name.endswith("num_batches_tracked")]
    best = _best_prefixes(plain, wanted)
    complete = [
        prefix for prefix in best if all(any(prefix + other in plain for other in tied[name]) for name in wanted)
    ]
    if not complete:
        raise FileError(f"{where}: {_mismatch(plain, state, model, best[0] if best else '')}")
    bindings: list[Binding] = []
    taken: set[str] = set()
    for prefix in complete:  # a match far down in the keys is a part of another model, not a copy
        names = {name: plain[prefix + name] for name in model if prefix + name in plain}
        if not taken & set(names.values()) and (not bindings or prefix.count(".") <= 2):
            bindings.append(Binding(names, prefix))
            taken |= set(names.values())
    first = bindings[0].prefix
    unknown = [key.removeprefix(first) for key in own if key.startswith(first) and own[key] not in taken]
    if of_another_model(unknown, model) or any(_reshaped(binding.names, state, model) for binding in bindings):
        raise FileError(f"{where}: {_mismatch(own, state, model, first, taken)}")
    return bindings


def keys_beside(state: _State, bindings: Sequence[Binding], prefix: str = "") -> list[str]:
    """The keys of a saved state dict that begin with `prefix` and belong to no copy of the model."""
    bound = {name for binding in bindings for name in (*binding.names.values(), *binding.given.values())}
    return [name for name in state if name not in bound and without_wrappers(name).startswith(prefix)]


def first_names(names: Sequence[str]) -> str:
    """A few of `names` for a message, and how many more there are."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def of_another_model(unknown: Sequence[str], model: _State) -> list[str]:
    """Those of the `unknown` keys, which `model` does not have, that belong to a layer of another architecture.

    What a training script keeps beside the layers, such as a loss's own weight or a head for training alone, has a name
    of its own at the model's root or one level below. One more of several, or a part of a block, is something else.
    """
    parents = {key.rpartition(".")[0] for key in model}
    modules = {parent[: dot.start()] for parent in parents for dot in re.finditer(r"\.|$", parent)} | {""}
    numbered = {re.sub(r"\d+$", "", module) for module in modules if module[-1:].isdecimal()}
    found = []
    for key in unknown:
        ancestors = [key[: dot.start()] for dot in re.finditer(r"\.", key)]
        inside = max((path for path in ancestors if path in modules), key=len, default="")
        child = inside + re.findall(r"\.?[^.]*", key[len(inside) :])[0]  # the outermost that the model does not have
        one_more = child[-1:].isdecimal() and re.sub(r"\d+$", "", child) in numbered
        in_layer = child == key and (bool(inside) or not {"weight", "bias"}.isdisjoint(model))
        in_block = "." in inside or inside[-1:].isdecimal()
        if (one_more or in_layer or in_block) and not key.endswith(NO_WEIGHTS):
            found.append(key)
    return found


# How torch's hooks and its parametrizations call the tensors that a normalized `weight` is made of.
_SPELLINGS = (("_g", "original0"), ("_v", "original1"), ("_orig", "original"), ("_u", "0._u"), ("_v", "0._v"))
_PARAMETRIZED = re.compile(r"(.*?)parametrizations\.(\w+)\.([\w.]+)$")


def _with_other_spellings(keys: Mapping[str, str]) -> dict[str, str]:
    """`keys` and, to the same saved keys, those that a model with the other of torch's forms has."""
    others = {other: outer for key, outer in keys.items() for other in _other_spellings(key)}
    return {**others, **keys}


def _other_spellings(key: str) -> list[str]:
    """`weight_g` as `parametrizations.weight.original0`, and the other way round; so for spectral norm."""
    match = _PARAMETRIZED.match(key)
    if match:
        return [f"{match[1]}{match[2]}{older}" for older, newer in _SPELLINGS if newer == match[3]]
    module, dot, leaf = key.rpartition(".")
    return [
        f"{module}{dot}parametrizations.{leaf.removesuffix(older)}.{newer}"
        for older, newer in _SPELLINGS
        if leaf.endswith(older)
    ]


def likely_prefix(state: _State, model: _State) -> str:
    """What stands before most of a model's keys in a saved state dict, though it may be of a model converted since."""
    plain = _with_other_spellings({without_wrappers(name): name for name in state})
    return next(iter(_best_prefixes(plain, list(model))), "")


def possible_parts(state: _State, model: _State) -> Iterator[tuple[str, dict[str, str]]]:
    """Parts of a saved state dict that could be all of a model's tensors under other names: a prefix, and the saved
    keys by what stands behind it.
    """
    plain = {without_wrappers(name): name for name in state}
    levels = zip(*(key.split(".")[:-1] for key in plain), strict=False)
    leading = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, levels)]
    shared = ["".join(f"{part}." for part in leading[:count]) for count in range(len(leading) + 1)]
    for prefix in dict.fromkeys([likely_prefix(state, model), *shared]):
        yield prefix, {key.removeprefix(prefix): outer for key, outer in plain.items() if key.startswith(prefix)}


def _tied_names(model: _State) -> dict[str, list[str]]:
    """For each key of a model, all keys that stand for the same tensor: it may be saved under one of them alone."""
    groups: dict[Any, list[str]] = {}
    for name, value in model.items():
        groups.setdefault(memory_of(value) or name, []).append(name)
    return {name: names for names in groups.values() for name in names}


def memory_of(value: Any) -> tuple[Any, ...] | None:
    """What two tensors have in common that are the same memory, read in the same way; None for what has none."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta or not value.numel():
        return None
    return value.data_ptr(), value.dtype, tuple(value.shape), value.stride()


def _reshaped(names: Mapping[str, str], state: _State, model: _State) -> list[str]:
    """The keys of the model whose tensors are saved with another shape; `names`: the saved key of each key."""
    pairs = ((name, state[outer], model[name]) for name, outer in names.items())
    return [name for name, a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape]


def _best_prefixes(plain: Mapping[str, str], wanted: Sequence[str]) -> list[str]:
    """What may stand before the model's keys: most keys found first, then the shortest.

    It is whatever stands before a few of them that seldom occur by chance.
    """
    telling = sorted(wanted, key=lambda name: (-name.count("."), -len(name)))
    some = {*telling[:3], *wanted[:3], *wanted[-3:]}
    found = [key[: -len(name)] for name in some for key in plain if key == name or key.endswith(f".{name}")]
    hits = {prefix: sum(prefix + name in plain for name in wanted) for prefix in dict.fromkeys(found)}
    return sorted(hits, key=lambda prefix: (-hits[prefix], len(prefix)))


def _mismatch(plain: Mapping[str, str], state: _State, model: _State, prefix: str, taken: Iterable[str] = ()) -> str:
    """What does not fit, and the likely cause. `taken`: saved keys that belong to some copy of the model."""
    taken = set(taken)
    others = [name for name in plain if name.startswith(prefix) and plain[name] not in taken]
    here = {name.removeprefix(prefix): plain[name] for name in others}
    here |= {name: plain[prefix + name] for name in model if prefix + name in plain}
    missing = [name for name in model if name not in here and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in here if name not in model and not name.endswith(NO_WEIGHTS)]
    shared = {name: here[name] for name in model if name in here}
    differing = _reshaped(shared, state, model)
    reads_others = any(model[n].dim() > 2 and state[here[n]].shape[:1] == model[n].shape[:1] for n in differing)
    reshaped = [
        f"{name} is {tuple(state[here[name]].shape)}, the model's {tuple(model[name].shape)}" for name in differing
    ]
    parts = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    under = f" under the prefix {prefix!r}" if prefix else ""
    cause = _cause(missing, unexpected, reshaped, model, reads_others)
    return f"does not fit the model{under}; {'; '.join(parts)}. {cause}"


def _cause(
    missing: Sequence[str], unexpected: Sequence[str], reshaped: Sequence[str], model: _State, reads_others: bool
) -> str:
    """The likely cause; `reads_others`: a convolution takes another number of channels, and gives as many."""
    if len(missing) > len(model) // 2:
        return "Likely another architecture, or the model stands under another --key"
    if reads_others and not missing and not unexpected and len(reshaped) == 1:
        return "Likely other input channels: see --model-arg (model_args)"
    if reshaped and not missing and not unexpected and len(reshaped) <= 4:
        return "Likely another number of classes: give it with --model-arg num_classes=N (model_args)"
    if any(name.endswith(("weight_gain", "weight_shift")) for name in unexpected):
        return (
            "It seems to be converted already: load it with normswap.load(path, model=...); without a recipe in it, "
            "into normswap.convert(model, target).model, with the target that made it"
        )
    if missing and all(name.endswith(("running_mean", "running_var")) for name in missing):
        return (
            "It seems to be converted already, to norms without running statistics, and holds no recipe: save it with "
            "normswap.save(model, path, report=report), or load it into normswap.convert(model, target).model"
        )
    return "Likely another version or another size of the architecture: see --model-arg (model_args)"


def rebuild(state: _State, bindings: Sequence[Binding], states: Sequence[_State]) -> OrderedDict[str, Any]:
    """A saved state dict after the conversion of its model: keys of the model are replaced, all others stay.

    Args:
        state: the saved state dict before.
        bindings: where the copies of the model stand in it.
        states: the new state dict of each copy.
    """
    result: OrderedDict[str, Any] = OrderedDict()
    owner: dict[str, tuple[int, str]] = {}
    parts: dict[tuple[int, str], dict[str, Any]] = {}  # by binding and module: a module's keys stand together
    for index, (binding, new) in enumerate(zip(bindings, states, strict=True)):
        owner |= {outer: (index, name.rpartition(".")[0]) for name, outer in binding.names.items()}
        rewritten = set(binding.given.values()) - set(binding.names.values())
        owner |= dict.fromkeys(rewritten, (index, "\n"))  # the name of no module: they go
        for name, value in _without_copies(binding, new):
            parts.setdefault((index, name.rpartition(".")[0]), {})[binding.saved_key(name)] = value
    for key, value in state.items():
        place = owner.get(key)
        # New keys of a module come where its first old key stood: readers that go by order find them together.
        result.update({key: value} if place is None else parts.pop(place, {}))
    for part in parts.values():  # modules that had no keys before
        result.update(part)
    result._metadata = _metadata(state, bindings, states)  # type: ignore[attr-defined]  # torch's own place
    return result


def _without_copies(binding: Binding, new: _State) -> Iterator[tuple[str, Any]]:
    """The new tensors by name, without those names of shared ones that were not saved before."""
    bound = {memory_of(new[name]) for name in binding.names if name in new} - {None}
    seen = set(bound)
    for name, value in new.items():
        memory = memory_of(value)
        new_module = not binding.knows_module(name.rpartition(".")[0])
        if name in binding.names or memory not in seen or not (new_module or memory in bound):
            yield name, value
            seen |= {memory} - {None}


def _metadata(state: _State, bindings: Sequence[Binding], states: Sequence[_State]) -> OrderedDict[str, Any]:
    """The versions of modules that torch keeps beside the tensors, under the saved names of the modules."""
    known = getattr(state, "_metadata", None)
    metadata = OrderedDict(known if isinstance(known, Mapping) else {})
    for binding, new in zip(bindings, states, strict=True):
        for module, value in (getattr(new, "_metadata", None) or {}).items():
            metadata[binding.saved_module(module)] = value
    return metadata
