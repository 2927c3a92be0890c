"""A checkpoint as a value, and the recipe of a conversion in what it holds.

Whatever the kind, what is inside is a module, a state dict, or a dict that holds some. A recipe is an
attribute of a module, and an item of a state dict's `_metadata`; formats without `_metadata` keep it in a place of their own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

RECIPE = "normswap_recipe"
"""Where a converted model, state dict or file holds the recipe of its conversion, a plain dict."""
INDEX_ENDING = ".index.json"
"""How the name of a file ends that tells which of a folder's weight files holds which key."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read from `path`, and what its kind needs to be written again.

    `kind` is "pt" (what `torch.save` wrote), "safetensors", "dcp" or "folder" (weight files with others beside
    them, such as Accelerate's). `content` is a module, a state dict, or a dict that holds some. `header` is a
    safetensors header's or an index's metadata, `nested` torch's map of nested keys in a distributed checkpoint, `shards` the
    weight files of a folder with their keys, `optimizers` the contents of its optimizer files by name.
    """

    path: Path
    kind: str
    content: Any
    header: Mapping[str, Any] = field(default_factory=dict)
    nested: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    shards: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    index: str = ""
    optimizers: Mapping[str, Any] = field(default_factory=dict)


def stored_recipe(content: Any) -> Any:
    """The recipe in a module or a state dict, unchecked; None where there is none."""
    if isinstance(content, nn.Module):
        return vars(content).get(RECIPE)
    metadata = getattr(content, "_metadata", None)
    return metadata.get(RECIPE) if isinstance(metadata, Mapping) else None


def store_recipe(content: Any, recipe: Any) -> None:
    """Let a module or an `OrderedDict` of tensors carry `recipe`."""
    if isinstance(content, nn.Module):
        content.__dict__[RECIPE] = recipe
    else:
        known = getattr(content, "_metadata", None)
        content._metadata = OrderedDict(known if isinstance(known, Mapping) else {})
        content._metadata[RECIPE] = recipe
