"""What the keys and shapes of a state dict say of its network: which it is, or what to type or install."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from normswap.checkpoints import stored_recipes
from normswap.files import architectures

_SHOWN = 6  # networks in a message


@dataclass(frozen=True)
class Recognized:
    """What a state dict was recognized as."""

    network: architectures.Architecture | None = None
    """The only one of these keys and shapes, if its library is installed."""
    said: str = ""
    """Which it is, or what else helps; "" for keys that no network of the index has."""


def recognized(state: Mapping[str, Any]) -> Recognized:
    """The network that a state dict without a recipe is of, as far as keys and shapes tell."""
    if stored_recipes.stored_recipe(state) is not None:  # the layers may be others by now
        return Recognized()
    found = architectures.recognize(state)
    if not found:
        return Recognized()
    options = [network.as_options() for network in found]
    of_torchvision = [network for network in found if network.spec.startswith("torchvision:")]
    if len(found) > 1 and len(of_torchvision) == 1:  # timm has ResNets with other pooling under the same keys
        others = f"timm has networks of the same keys: {' or '.join(options[1:])}"
        return Recognized(found[0], f"recognized by keys and shapes: {options[0]} ({others})")
    if len(found) > 1:
        more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
        return Recognized(
            said="has the keys and shapes of networks that differ in what no key shows (eps, padding, activation); "
            f"choose: {' or '.join(options[:_SHOWN])}{more}"
        )
    library = found[0].spec.partition(":")[0]
    if importlib.util.find_spec(library) is None:
        return Recognized(said=f"has the keys and shapes of {found[0].spec}: pip install {library}")
    return Recognized(found[0], f"recognized by keys and shapes: {options[0]}")
