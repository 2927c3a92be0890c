"""How the layers of a model are connected, as far as its forward could be traced."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from torch import nn

from normswap.analysis.connections import Branch
from normswap.analysis.type_tests import TypeTest


def paths_around(path: str) -> list[str]:
    """The paths of the modules around the one at `path`, from the root on, and its own."""
    parts = path.split(".") if path else []
    return [".".join(parts[:end]) for end in range(len(parts) + 1)]


@dataclass
class Flow:
    """How layers are connected. Sites are named by their first path.

    A forward is traced several times, since it may go several ways (train and eval mode, branches on data), and each
    trace adds what it tells. So "a reader" is one in any of them, and `calls` the most in any of them.
    """

    readers: dict[str, list[str | None]] = field(default_factory=lambda: defaultdict(list))
    """For a weight layer, the norm after each use of its output; None for a use by anything else.

    A norm may go into the layer before it only where that norm is the sole reader.
    """
    writers: dict[str, list[tuple[str, ...] | None]] = field(default_factory=lambda: defaultdict(list))
    """For a norm, the weight layers directly before each call, several if their outputs are concatenated along the
    channels; None where something else stands there."""
    followers: dict[str, list[str | None]] = field(default_factory=lambda: defaultdict(list))
    """For a norm, the weight layer directly behind each use of its output; None for a use by anything else."""
    norms_before: dict[str, list[str | None]] = field(default_factory=lambda: defaultdict(list))
    """For a weight layer, the norm directly before each call; None where something else stands there."""
    beside: dict[str, list[frozenset[Branch]]] = field(default_factory=lambda: defaultdict(list))
    """For a norm or a weight layer, the branches parallel to each call; a layer's own is one of them."""
    normed: set[str] = field(default_factory=set)
    """Weight layers whose output reaches a norm before it reaches another weight layer: these are standardized."""
    single: set[str] = field(default_factory=set)
    """Norms whose input has one element a sample and channel, in some call: a group of one channel would erase it."""
    spatial: set[str] = field(default_factory=set)
    """Norms whose input is known to have more elements a channel, in some call."""
    ranks: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """For a norm, how many dimensions its input may have by the layers around it, in any call: 2 alone is (N, C)."""
    flattened: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """For a norm behind a flattening, how many dimensions what is flattened may have, in any call."""
    first: set[str] = field(default_factory=set)
    """Weight layers that read the model's input, with no weight layer before them: their input is no norm's output."""
    between: dict[str, set[tuple[str | None, tuple[str, ...]]]] = field(default_factory=lambda: defaultdict(set))
    """For each site, the site before it (None: none, or several), and what non-linearities and dropouts stand between.

    These by their names, from the last to the first: a norm behind the activation, or a dropout before a norm, is worth
    a word.
    """
    calls: Counter[str] = field(default_factory=Counter)
    """How often one forward calls a site: a norm that is called more than once mixes the statistics of its places."""
    touched: set[str] = field(default_factory=set)
    """Sites whose tensors some forward reads past the layer: no layer with other tensors may take its place."""
    parts: dict[str, frozenset[str]] = field(default_factory=dict)
    """Sites all of whose uses are known, and the paths of the modules whose traces tell them: "" for the whole model.
    For any other site, "no other reader" only means that none was seen."""
    doubts: dict[str, str] = field(default_factory=dict)
    """Sites of which a run has shown more than traces of parts had told, and what."""
    functional: dict[str, str] = field(default_factory=dict)
    """Norms that no module holds: by the path of the module that calls it, the name of the function."""
    mixing: set[str] = field(default_factory=set)
    """Norms that see several samples in their channels, in some call."""
    along_time: dict[str, str] = field(default_factory=dict)
    """Norms that no norm over positions can stand in for without reaching along time or into padding, and where."""
    type_tests: dict[str, tuple[TypeTest, ...]] = field(default_factory=dict)
    """By the path of a module, what its forward may ask of the classes of layers in it."""
    words: dict[str, frozenset[str]] = field(default_factory=dict)
    """By the path of a module that was traced, what its forward does; see `tracing.in_words`."""
    problems: dict[str, str] = field(default_factory=dict)
    """What stood in the way of tracing, by the path of the module."""

    def add(self, other: Flow) -> None:
        """Take in what one more trace tells."""
        for name in ("normed", "mixing", "single", "spatial", "first", "touched"):
            getattr(self, name).update(getattr(other, name))
        for name in ("readers", "writers", "followers", "norms_before", "beside"):
            for path, found in getattr(other, name).items():
                getattr(self, name)[path] += found
        for path, ways in other.between.items():
            self.between[path] |= ways
        for name in ("ranks", "flattened"):
            for path, ranks in getattr(other, name).items():
                getattr(self, name)[path] |= ranks
        self.calls |= other.calls  # the greater count of each
        self.along_time.update(other.along_time)
        self.functional.update(other.functional)
        self.parts.update(other.parts)
        self.doubts.update(other.doubts)
        self.problems.update(other.problems)

    @property
    def in_parts(self) -> dict[str, frozenset[str]]:
        """Those of `parts` that the trace of the whole model does not tell of: it failed."""
        return {path: parts for path, parts in self.parts.items() if "" not in parts}

    def doubting(self, sites: Collection[str], why: str) -> Flow:
        """The same, where of `sites` not all uses are known after all, as a run has shown."""
        parts = {path: parts for path, parts in self.parts.items() if path not in sites}
        return replace(self, parts=parts, doubts={**self.doubts, **dict.fromkeys(sites, why)})

    def who_tells_apart(self, path: str, old: type[nn.Module], new: type[nn.Module]) -> str:
        """The function around the layer at `path` that would go another way were it of the class `new`; "": none."""
        tests = (test for owner in self.asking(path) for test in self.type_tests[owner])
        return next((test.where for test in tests if test.tells_apart(old, new)), "")

    def asking(self, path: str) -> list[str]:
        """The modules around the layer at `path`, itself with them, that ask for the classes of layers in them."""
        if not self.type_tests:
            return []
        return [owner for owner in paths_around(path) if owner in self.type_tests]

    def seen(self, path: str) -> bool:
        """Whether a trace reached a site."""
        return path in self.readers or path in self.writers

    def feeders(self, norm: str) -> tuple[tuple[str, ...], str]:
        """The layers whose outputs, one behind the other along the channels, are what the norm reads, and which nothing
        else reads: in most models one. Or none, and why.
        """
        if norm in self.doubts:
            return (), self.doubts[norm]
        if norm not in self.parts:
            return (), f"what comes before it could not be traced{self._why(norm)}"
        writers = {writer for writer in self.writers[norm] if writer is not None}
        if None in self.writers[norm]:
            return (), "no convolution or linear layer directly before it"
        if len(writers) > 1:
            return (), "more than one layer before it"
        (layers,) = writers
        if any(layer not in self.parts or set(self.readers[layer]) != {norm} for layer in layers):
            return (), "the output of the layer before it is used elsewhere too"
        return layers, ""

    def feeder(self, norm: str) -> str | None:
        """The one layer whose output the norm reads and nothing else does."""
        layers, _ = self.feeders(norm)
        return layers[0] if len(layers) == 1 else None

    def behind(self, norm: str) -> set[str]:
        """The layers that read nothing but the norm's output, which nothing else reads."""
        layers = set(self.followers[norm])
        known = norm in self.parts and None not in layers and all(layer in self.parts for layer in layers)
        found = {layer for layer in layers if layer is not None}
        return found if known and all(set(self.norms_before[layer]) == {norm} for layer in found) else set()

    def parallel(self, path: str) -> frozenset[Branch]:
        """The branches that are parallel to a norm or a weight layer in each call, and whose layers are called in no
        other place.
        """
        calls = self.beside[path]
        if path not in self.parts or not calls:
            return frozenset()
        in_each = frozenset.intersection(*calls)
        return frozenset(b for b in in_each if b.layer in self.parts and len(self.norms_before[b.layer]) == len(calls))

    def _why(self, path: str) -> str:
        """What stood in the way of tracing the nearest module around `path`."""
        while path:
            path = path.rpartition(".")[0]
            if path in self.problems:
                return f" ({self.problems[path][:100]})"
        return ""
