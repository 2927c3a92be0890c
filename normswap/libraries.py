"""The models of torchvision and timm that a spec may name: is there such a model, and has it such published weights?

The libraries are imported where they are asked, since neither is needed for a file, and timm may not be installed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from normswap.errors import OptionError


def check_torchvision_model(name: str) -> None:
    """Raises `OptionError` where torchvision has no model `name`."""
    from torchvision import models

    known = models.list_models()
    if name not in known:
        raise _unknown_model("torchvision", name, known, "torchvision.models.list_models()")


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
        raise _unknown_model("timm", name, timm.list_models(), "timm.list_models()")
    if weights is None:
        return timm, name
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if weights not in tags:
        raise _unknown_weights(f"timm:{architecture}", weights, filter(None, tags))
    return timm, f"{architecture}.{weights}"


def _unknown_model(library: str, name: str, known: list[str], all_of_them: str) -> OptionError:
    near = difflib.get_close_matches(name.partition(".")[0], known, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"{all_of_them} lists them"
    return OptionError(f"{library} has no model {name!r}; {hint}")


def _unknown_weights(model: str, weights: str, known: Iterable[str]) -> OptionError:
    return OptionError(f"{model} has no weights {weights!r}; it has {', '.join(known) or 'none'}")
