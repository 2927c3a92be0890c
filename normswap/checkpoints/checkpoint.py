"""A checkpoint as a value: a module, a state dict, or a dict that has some of these among its values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

RECIPE = "normswap_recipe"
"""The name under which a converted model, state dict or file holds the recipe of its conversion, a plain dict."""
RECIPE_FILE = f"{RECIPE}.json"
"""Holds the recipe of the weights beside it, where a trainer writes these without."""
INDEX_ENDING = ".index.json"
"""The ending of an index: a file that says which of a folder's weight files holds which key."""

CheckpointKind = Literal["pt", "safetensors", "dcp", "folder"]
"""`pt`: a file of `torch.save`. `dcp`: a distributed checkpoint. `folder`: weight files and other files beside them."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file or a folder holds, and what is needed to write it again in its kind."""

    path: Path
    """The file or the folder."""
    kind: CheckpointKind
    content: Any
    """A module, a state dict, or a dict that has some of these among its values."""
    header: Mapping[str, Any] = field(default_factory=dict)
    """The metadata in a safetensors file's header, or in an index."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Of safetensors: names in `content` of tensors that the file holds under another name alone, and that name."""
    nested: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Of a distributed checkpoint: the nested keys behind each flat name."""
    shards: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of a folder: its weight files, and the keys in each."""
    index: str = ""
    """Of a folder: the name of its index; empty where it has one weight file and no index."""
    optimizers: Mapping[str, Any] = field(default_factory=dict)
    """Of a folder: its optimizer files by name, and what each holds."""
