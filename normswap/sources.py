"""Model specs to models: `torchvision:resnet50`."""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from typing import Any

from torch import nn

from normswap.errors import ModelError, OptionError

_SPEC = re.compile(r"(torchvision):(\w+)")


def is_spec(text: str) -> bool:
    """Whether `text` names a model of a library, rather than a file."""
    return text.partition(":")[0] in ("torchvision",)


def short_name(spec: str) -> str:
    """The model's own name in a spec: `resnet50` of `torchvision:resnet50`."""
    return spec.partition(":")[2]


def build(spec: str, weights: str | None = None) -> nn.Module:
    """The model that `spec` names, with its initial weights, or the published ones that `weights` names.

    Raises `OptionError` for an unknown model or unknown weights, `ModelError` where they cannot be fetched.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise OptionError(f"{spec!r} is no model; write torchvision:NAME, such as torchvision:resnet50")
    from torchvision import models  # here, since a conversion of a file does not need it

    name, known = match[2], models.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "torchvision.models.list_models() lists them"
        raise OptionError(f"torchvision has no model {name!r}; {hint}")
    arguments: dict[str, Any] = {"weights": _weights(name, weights)}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        arguments["weights_backbone"] = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of initializations that will change: the weights are random or replaced
            model = models.get_model(name, **arguments)
    except OSError as error:
        raise ModelError(
            f"{spec}: the weights {weights} cannot be fetched: {error}; check the network, or convert a file"
        ) from error
    assert isinstance(model, nn.Module)  # for the type checker: torchvision's registry is not typed
    return model.eval()


def _weights(name: str, weights: str | None) -> Any:
    if weights is None:
        return None
    from torchvision import models

    choices = models.get_model_weights(name)
    if weights not in choices.__members__:
        listed = ", ".join(choices.__members__) or "none"
        raise OptionError(f"torchvision:{name} has no weights {weights!r}; it has {listed}")
    return choices[weights]
