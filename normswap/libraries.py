"""The models of torchvision and timm that a spec may name: is there such a model, and has it such published weights?

The libraries are imported where they are asked, since neither is needed for a file, and timm may not be installed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from normswap.errors import OptionError

_NEAR = 0.75  # how alike a name has to be to one that exists, from 0 to 1, to be suggested


def check_torchvision_model(name: str) -> None:
    """Raises `OptionError` where torchvision has no model `name`."""
    from torchvision import models

    if name not in models.list_models():
        raise _unknown_model("torchvision", name, "torchvision.models.list_models()")


def torchvision_weights(name: str, weights: str | None) -> Any:
    """The enumeration of the published weights of a model of torchvision; it may be empty.

    Raises `OptionError` where there are none of the name `weights`.
    """
    from torchvision import models

    published = models.get_model_weights(name)
    if weights is not None and weights not in published.__members__:
        raise _unknown_weights(f"torchvision:{name}", weights, published.__members__)
    return published


def timm_model(name: str, weights: str | None) -> tuple[Any, str]:
    """timm, and the name by which it knows a model with these weights: `resnet50.a1_in1k`.

    `name` may have the weights already. Raises `OptionError` where timm is not installed, or has no such model or
    weights.
    """
    try:
        import timm
    except ImportError:
        raise OptionError(f"timm:{name} needs timm, which is not installed: pip install timm") from None
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise _unknown_model("timm", name, "timm.list_models()")
    if weights is None:
        return timm, name
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if weights not in tags:
        raise _unknown_weights(f"timm:{architecture}", weights, filter(None, tags))
    return timm, f"{architecture}.{weights}"


def nearest_spec(text: str) -> str | None:
    """The model of a library that `text` may have meant, as `torchvision:resnet50`; None where no name is near."""
    origin, _, name = text.lower().rpartition(":")
    name = name.partition(".")[0].replace("-", "_")
    known = _known_models()
    meant = difflib.get_close_matches(origin, known, 1, _NEAR) if origin else list(known)
    for library in dict.fromkeys([*meant, *known]):  # a model of the other library, named in full, is meant more likely
        if meant and name in known[library]:
            return f"{library}:{name}"
    near = [
        (library, found) for library in meant for found in difflib.get_close_matches(name, known[library], 1, _NEAR)
    ]
    best = max(near, key=lambda pair: difflib.SequenceMatcher(None, name, pair[1]).ratio(), default=None)
    return best and ":".join(best)


def _known_models() -> dict[str, list[str]]:
    """The names of all models, by library; timm's where it is installed."""
    from torchvision import models

    known = {"torchvision": models.list_models(), "demo": ["digits"]}
    with suppress(ImportError):
        import timm

        known["timm"] = timm.list_models()
    return known


def _unknown_model(library: str, name: str, all_of_them: str) -> OptionError:
    near = nearest_spec(f"{library}:{name}")
    hint = f"did you mean {near}?" if near else f"for all: python -c 'import {library}; print({all_of_them})'"
    return OptionError(f"{library} has no model {name!r}; {hint}")


def _unknown_weights(model: str, weights: str, known: Iterable[str]) -> OptionError:
    return OptionError(f"{model} has no weights {weights!r}; it has {', '.join(known) or 'none'}")
