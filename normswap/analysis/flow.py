"""What feeds what in a model, as far as its forward could be traced."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field, replace


@dataclass
class Flow:
    """What feeds what. Sites are named by their first path.

    A forward is traced several times, since it may go several ways (train and eval mode, branches on data), and each
    trace adds what it tells. So "a reader" is one in any of them, and `calls` the most in any of them.
    """

    readers: dict[str, list[str | None]] = field(default_factory=lambda: defaultdict(list))
    """For a weight layer, the norm behind each use of its output; None for a use by anything else.

    A norm may go into the layer before it only where that norm is the sole reader.
    """
    writers: dict[str, list[str | None]] = field(default_factory=lambda: defaultdict(list))
    """For a norm, the weight layer directly before each call; None where something else stands there."""
    normed: set[str] = field(default_factory=set)
    """Weight layers whose output reaches a norm before it reaches another weight layer: these are standardized."""
    single: set[str] = field(default_factory=set)
    """Norms whose input has one element a sample and channel, in some call: a group of one channel would erase it."""
    spatial: set[str] = field(default_factory=set)
    """Norms whose input is known to have more elements a channel, in some call."""
    ranks: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """For a norm, how many dimensions its input may have by the layers around it, in any call: 2 alone is (N, C)."""
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
    outside: set[str] = field(default_factory=set)
    """Sites that a run has called outside of these modules, which no code had told."""
    functional: dict[str, str] = field(default_factory=dict)
    """Norms that no module holds: by the path of the module that calls it, the name of the function."""
    problems: dict[str, str] = field(default_factory=dict)
    """What stood in the way of tracing, by the path of the module."""

    def add(self, other: Flow) -> None:
        """Take in what one more trace tells."""
        for name in ("normed", "single", "spatial", "first", "touched", "outside"):
            getattr(self, name).update(getattr(other, name))
        for path, readers in other.readers.items():
            self.readers[path] += readers
        for path, writers in other.writers.items():
            self.writers[path] += writers
        for path, ways in other.between.items():
            self.between[path] |= ways
        for path, ranks in other.ranks.items():
            self.ranks[path] |= ranks
        self.calls |= other.calls  # the greater count of each
        self.functional.update(other.functional)
        self.parts.update(other.parts)
        self.problems.update(other.problems)

    @property
    def complete(self) -> set[str]:
        """Sites all of whose uses are known."""
        return set(self.parts)

    @property
    def in_parts(self) -> dict[str, frozenset[str]]:
        """Those of `parts` that the trace of the whole model does not tell of: it failed."""
        return {path: parts for path, parts in self.parts.items() if "" not in parts}

    def without(self, sites: Collection[str]) -> Flow:
        """The same, where of `sites` not all uses are known after all, as a run has shown."""
        parts = {path: parts for path, parts in self.parts.items() if path not in sites}
        return replace(self, parts=parts, outside={*self.outside, *sites})

    def seen(self, path: str) -> bool:
        """Whether a trace reached a site."""
        return path in self.readers or path in self.writers

    def feeder(self, norm: str) -> tuple[str | None, str]:
        """The one layer whose output the norm reads and nothing else does; or None, and why."""
        if norm in self.outside:
            return None, "is used outside of the block that was traced, as a run shows"
        if norm not in self.parts:
            return None, f"what comes before it could not be traced{self._why(norm)}"
        writers = {writer for writer in self.writers[norm] if writer is not None}
        if None in self.writers[norm]:
            return None, "no convolution or linear layer directly before it"
        if len(writers) > 1:
            return None, "more than one layer before it"
        (writer,) = writers
        if writer not in self.parts or set(self.readers[writer]) != {norm}:
            return None, "the layer before it has other readers"
        return writer, ""

    def _why(self, path: str) -> str:
        """What stood in the way of tracing the nearest module around `path`."""
        while path:
            path = path.rpartition(".")[0]
            if path in self.problems:
                return f" ({self.problems[path][:100]})"
        return ""
