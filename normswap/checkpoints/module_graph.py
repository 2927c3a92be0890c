"""How far a module tree reaches, told by arithmetic on who holds whom, before anybody walks along its paths.

A file of few bytes can hold a module whose parts are shared at each level, so that following all paths never ends.
"""

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from torch import nn

MOST_MODULES = 200_000
MOST_ALIASES = 20_000
"""Paths, beyond the first of each module: a module that stands in two places has one more for each of its parts."""
LONGEST_NAME = 10_000
"""Characters of a path, or of a key."""
MOST_CHARACTERS = 50_000_000
"""Of all paths together."""
DEEPEST = 100
"""Levels of modules within modules."""
MOST_TENSORS = 200_000
"""In one model: DeepSeek-V3 has 92,000."""


class _Reach(NamedTuple):
    """What lies below a module, itself with it. Numbers are cut off beyond the limits."""

    paths: int = 1
    characters: int = 0
    longest: int = 0
    levels: int = 1


def all_modules(model: nn.Module) -> Iterator[nn.Module]:
    """`model` and every module in it, once each, however they hold each other; a module comes before it is opened."""
    found: set[int] = set()
    pending = [model]
    while pending:
        module = pending.pop()
        if id(module) not in found:
            found.add(id(module))
            yield module
            pending += (child for child in module._modules.values() if child is not None)


def why_endless(model: nn.Module) -> str:
    """Why the paths to the parts of `model` cannot be walked along, as the rest of a sentence; "": they can.

    The time is linear in the number of modules, however many paths lead to them.
    """
    modules: dict[int, nn.Module] = {}
    for module in all_modules(model):
        modules[id(module)] = module
        if len(modules) > MOST_MODULES:
            return f"has more than {MOST_MODULES:,} modules"
    holders = {key: module for key, module in modules.items() if module._modules}
    held = {key: [id(m) for m in module._modules.values() if id(m) in holders] for key, module in holders.items()}
    try:
        order = list(TopologicalSorter(held).static_order())  # what is held comes before what holds it
    except CycleError:
        return "has a module that holds itself"
    reach = dict.fromkeys(modules, _Reach())
    for key in order:
        reach[key] = _reach_of(modules[key], reach)
        if reach[key].levels > DEEPEST:
            return f"has more than {DEEPEST} levels of modules within modules"
        if reach[key].longest > LONGEST_NAME:
            return f"has a path of more than {LONGEST_NAME:,} characters"
    whole = reach[id(model)]
    if whole.paths > len(modules) + MOST_ALIASES:
        return (
            f"has {len(modules):,} modules under more than {MOST_ALIASES:,} further paths, since it shares them at "
            "several levels"
        )
    if whole.characters > MOST_CHARACTERS:
        return f"has paths of more than {MOST_CHARACTERS:,} characters together"
    return ""


def _reach_of(module: nn.Module, reach: dict[int, _Reach]) -> _Reach:
    """The reach of a module by that of those which it holds."""
    paths, characters, longest, levels = _Reach()
    for name, child in module._modules.items():
        if child is not None:
            below, length = reach[id(child)], len(str(name)) + 1
            paths += below.paths
            characters += below.characters + length * below.paths
            longest = max(longest, below.longest + length)
            levels = max(levels, below.levels + 1)
    most_paths = MOST_MODULES + MOST_ALIASES + 1
    return _Reach(min(paths, most_paths), min(characters, MOST_CHARACTERS + 1), longest, levels)
