"""Which network of torchvision or timm a state dict is of, by its keys and shapes.

`architectures.json.xz` has them all, each with any number of classes; `tests/make_index.py` writes it.
"""

import json
import lzma
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from normswap.checkpoints.contents import NO_WEIGHTS
from normswap.checkpoints.state_keys import without_wrappers

INDEX = Path(__file__).with_name("architectures.json.xz")
Shapes = Mapping[str, tuple[int, ...]]
ClassDimension = tuple[str, int, int, int]
"""A key, a dimension of its tensor, and the two numbers of `size = factor * classes + constant`."""
_UNCOUNTED = ("num_batches_tracked", *NO_WEIGHTS)  # files of older versions lack them
_DEEPEST = 3  # names that may stand before a model's own keys


@dataclass(frozen=True)
class Architecture:
    """A network as it is given to `--model`."""

    spec: str
    arguments: Mapping[str, Any]

    def as_options(self) -> str:
        """What to type: `--model timm:resnet50 --model-arg num_classes=10`."""
        return " ".join(
            (f"--model {self.spec}", *(f"--model-arg {name}={value}" for name, value in self.arguments.items()))
        )


def fingerprint(lines: Iterable[str]) -> str:
    """The same text for the same lines, and for those alone."""
    return blake2b("\n".join(sorted(lines)).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def shapes_fingerprint(shapes: Shapes, class_dimensions: Iterable[ClassDimension]) -> str:
    """The fingerprint of keys with their shapes, whatever the number of classes."""
    free = {(key, dim) for key, dim, _, _ in class_dimensions}
    sizes = {key: ["*" if (key, dim) in free else str(size) for dim, size in enumerate(shapes[key])] for key in shapes}
    return fingerprint(f"{key} {'x'.join(sizes[key])}" for key in shapes)


def told_shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a state dict that tell its network, by key."""
    return {
        key: tuple(value.shape)
        for key, value in state.items()
        if isinstance(value, Tensor) and not key.endswith(_UNCOUNTED)
    }


def recognize(state: Mapping[str, Any]) -> list[Architecture]:
    """The networks of torchvision and timm that have the keys and shapes of `state`, one for each function.

    Those that compute the same are one, torchvision's if it has it. All layers of `state` are in the network, or in
    copies of it under other prefixes; else, and for one that no index has, there are none.
    """
    shapes = {without_wrappers(key): shape for key, shape in told_shapes(state).items()}
    first: list[Architecture] = []
    rest = dict(shapes)
    for prefix, keys in _keys_by_prefix(shapes).items():
        found = _networks_of({key.removeprefix(prefix): rest[key] for key in keys if key in rest})
        if found and (not first or found == first):
            first = found
            for key in keys:
                rest.pop(key, None)
    has_layers = any(len(shape) > 2 or key.endswith("running_mean") for key, shape in rest.items())
    return [] if has_layers else first


def _keys_by_prefix(shapes: Shapes) -> dict[str, list[str]]:
    """The keys behind whatever may stand before those of a model, the shortest first: nothing, or up to three names."""
    found: dict[str, list[str]] = {"": list(shapes)}
    for key in shapes:
        for dot in islice(re.finditer(r"\.", key), _DEEPEST):
            found.setdefault(key[: dot.end()], []).append(key)
    return dict(sorted(found.items(), key=lambda entry: (entry[0].count("."), entry[0])))


def _networks_of(shapes: Shapes) -> list[Architecture]:
    """The networks whose keys are those of `shapes` and no others."""
    for known in _index().get(fingerprint(shapes), ()):
        classes = _number_of_classes(shapes, known["classes"])
        if classes is not None and shapes_fingerprint(shapes, known["classes"]) == known["shapes"]:
            counted = {} if classes in (0, known["default"]) else {"num_classes": classes}
            return [Architecture(spec, {**arguments, **counted}) for spec, arguments in known["networks"]]
    return []


def _number_of_classes(shapes: Shapes, dimensions: Iterable[ClassDimension]) -> int | None:
    """How many classes all the sizes of `dimensions` stand for; 0 where there are none, None where they disagree."""
    found = set()
    for key, dim, factor, constant in dimensions:
        classes, remainder = divmod((shapes[key][dim] if dim < len(shapes[key]) else -1) - constant, factor)
        found.add(-1 if remainder else classes)
    if not found:
        return 0
    return None if len(found) > 1 or min(found) < 1 else found.pop()


@cache
def _index() -> dict[str, list[dict[str, Any]]]:
    """The known networks by the fingerprint of their keys."""
    return dict(json.loads(lzma.decompress(INDEX.read_bytes())))
