"""The line of Python that loads what was written, for the report."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from normswap.checkpoints import contents, stored_recipes
from normswap.files import model_specs


def load_line(
    source: str | os.PathLike[str], content: Any, out: Path, *, model: object, model_args: Mapping[str, Any] | None,
    key: str | None, trust: bool, allow: Iterable[str | type],
) -> str:  # fmt: skip
    """A call of `normswap.load` that gives the model in `out`, ready to use, a checkpoint with this content.

    `source` is what was converted; the rest are the options that it was read with. A model that no file and no option
    names is written as `YourModel`.
    """
    allow = [allow] if isinstance(allow, str) else allow
    value = contents.find_entries(content, key, source)[0].value
    arguments = [repr(str(out))]
    if not isinstance(value, nn.Module) and not _names_its_model(value):
        spec = model or str(source)
        known = isinstance(spec, str) and (model is not None or model_specs.is_spec(spec))
        arguments.append(f"model={spec!r}" if known else "model=YourModel")
        arguments += [f"model_args={dict(model_args)!r}"] if model_args else []
    if key is not None:
        arguments.append(f"key={key!r}")
    names = [name if isinstance(name, str) else f"{name.__module__}.{name.__qualname__}" for name in allow]
    if names and isinstance(value, nn.Module):
        arguments.append(f"allow={names!r}")
    if trust:
        arguments.append("trust=True")
    return f"normswap.load({', '.join(arguments)}).eval()"


def _names_its_model(state: Any) -> bool:
    """Whether the recipe in a state dict names a model of a library, which `normswap.load` makes by itself."""
    recipe = stored_recipes.stored_recipe(state)
    spec = recipe.get("model") if isinstance(recipe, Mapping) else None
    return isinstance(spec, str) and model_specs.is_spec(spec)
