"""The recipe of a conversion inside a module or a state dict, unchecked: found, written, and joined to others.

A module has its recipe as an attribute, and writes it into `_metadata` of its state dict, beside its version, where a
training script's `torch.save` keeps it, whatever module holds it by then. A file's own recipe is in `_metadata` itself.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from normswap.checkpoints.checkpoint import RECIPE
from normswap.checkpoints.state_keys import without_wrappers

LARGEST_RECIPE = 1 << 26
"""Characters of a recipe as JSON."""
_MOST = 32  # conversions, one after the other, that are followed


def stored_recipe(content: Any) -> Any:
    """The recipe in a module or a state dict, by its own paths; None where there is none."""
    return _joined(_with_paths_under(recipe, path) for path, recipe in _found(content))


def recipe_under(state: Any, prefix: str, modules: Iterable[str]) -> Any:
    """The recipe of the model whose keys in `state` begin with `prefix`, by its own paths, those of its `modules`.

    Recipes of modules that the model does not have are those of other parts of what was saved.
    """
    known = {prefix + module for module in modules}
    others = [path for path, _ in _found(state) if f"{path}.".startswith(prefix) and not {path, f"{path}."} & known]
    return _joined(
        _with_paths_behind(_with_paths_under(recipe, path), path, prefix)
        for path, recipe in _found(state)
        if not path or path not in others
    )


def store_recipe(content: Any, recipe: Any) -> None:
    """Write `recipe` into a module or an `OrderedDict` of tensors, in the place of all that are in it."""
    if isinstance(content, nn.Module):
        content.__dict__[RECIPE] = recipe
        return
    known = getattr(content, "_metadata", None)
    content._metadata = OrderedDict(
        (path, {name: value for name, value in of_module.items() if name != RECIPE})
        if isinstance(of_module, Mapping) and path != RECIPE and RECIPE in of_module
        else (path, of_module)
        for path, of_module in (known.items() if isinstance(known, Mapping) else ())
    )
    content._metadata[RECIPE] = recipe


def keep_recipe(model: nn.Module, recipe: Any) -> None:
    """Let `model`, and its state dicts from now on, hold `recipe`, in the place of all that its modules held."""
    drop_recipes(model)
    store_recipe(model, recipe)
    keep_in_state_dicts(model)


def keep_in_state_dicts(model: nn.Module) -> None:
    """Let the state dicts of `model` hold the recipes that its modules have."""
    for module in model.modules():
        if RECIPE in vars(module) and recipe_into_metadata not in module._state_dict_hooks.values():
            module._register_state_dict_hook(recipe_into_metadata)  # type: ignore[no-untyped-call]


def drop_recipes(model: nn.Module) -> None:
    """Take all recipes out of the modules of `model`, and with them what normswap has to be there for."""
    for module in model.modules():
        vars(module).pop(RECIPE, None)
        keep_out_of_state_dicts(module)


def keep_out_of_state_dicts(module: nn.Module) -> bool:
    """Take out the hook of a module that writes its recipe, which a pickle would name; whether there was one."""
    hooks = [key for key, hook in module._state_dict_hooks.items() if hook is recipe_into_metadata]
    for key in hooks:
        del module._state_dict_hooks[key]
    return bool(hooks)


def recipe_into_metadata(module: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    """A hook of `state_dict`. Pickles of converted models name it: it stays under its name."""
    if RECIPE in vars(module):
        metadata[RECIPE] = vars(module)[RECIPE]


def _found(content: Any) -> list[tuple[str, Any]]:
    """Each recipe in a module or a state dict, with the path of the module whose it is, the outermost first."""
    if isinstance(content, nn.Module):
        held = [(path, vars(module).get(RECIPE)) for path, module in content.named_modules()]
    else:
        metadata = getattr(content, "_metadata", None)
        metadata = metadata if isinstance(metadata, Mapping) else {}
        if RECIPE in metadata:
            return [("", metadata[RECIPE])] if metadata[RECIPE] is not None else []
        of_modules = [(path, entry) for path, entry in metadata.items() if isinstance(entry, Mapping)]
        held = [(without_wrappers(path), entry.get(RECIPE)) for path, entry in of_modules if isinstance(path, str)]
    found: dict[int, tuple[str, Any]] = {}
    for path, recipe in held:
        if recipe is not None:  # a module that stands in two places has the same object in both
            found.setdefault(id(recipe), (path, recipe))
    return sorted(found.values(), key=lambda item: item[0].count(".") + bool(item[0]))


def _joined(recipes: Iterable[Any]) -> Any:
    """One recipe of several, each of which follows the one before it."""
    joined = None
    for recipe in recipes:
        if joined is None or not isinstance(recipe, Mapping):
            joined = recipe if joined is None else joined
            continue
        joined = _chain([*_steps(recipe), *_steps(joined)])
    return joined


def _steps(recipe: Any) -> list[dict[str, Any]]:
    """The conversions of a recipe, the last first, each without those before it."""
    steps: list[dict[str, Any]] = []
    while isinstance(recipe, Mapping) and len(steps) < _MOST:
        steps.append({name: value for name, value in recipe.items() if name != "previous"})
        recipe = recipe.get("previous")
    return steps


def _chain(steps: Iterable[dict[str, Any]]) -> Any:
    """The inverse of `_steps`."""
    made = None
    for step in reversed(list(steps)):
        made = step if made is None else {**step, "previous": made}
    return made


def _with_paths_under(recipe: Any, path: str) -> Any:
    """A recipe of a module for what holds it under `path`."""
    if not path or not isinstance(recipe, Mapping):
        return recipe
    steps = _steps(recipe)
    return _chain(_with_layers(s, {f"{path}.{at}" if at else path: at for at in _layers(s)}) for s in steps)


def _with_paths_behind(recipe: Any, path: str, prefix: str) -> Any:
    """The part of a recipe that is behind `prefix`, by the paths there; None where all of it is elsewhere.

    The recipe of a whole file that names no path behind `prefix` is by the model's own paths already.
    """
    if not prefix or not isinstance(recipe, Mapping):
        return recipe
    steps = _steps(recipe)
    inside = [{at[len(prefix) :]: at for at in _layers(step) if f"{at}.".startswith(prefix)} for step in steps]
    if not any(inside):
        return None if path else recipe
    return _chain(_with_layers(step, names) for step, names in zip(steps, inside, strict=True))


def _layers(step: Mapping[str, Any]) -> list[str]:
    layers = step.get("layers")
    return [path for path in layers if isinstance(path, str)] if isinstance(layers, Mapping) else []


def _with_layers(step: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A step with the layers at new paths, given by their old ones."""
    layers = step.get("layers")
    return {**step, "layers": {new: layers[old] for new, old in names.items()}} if isinstance(layers, Mapping) else step
