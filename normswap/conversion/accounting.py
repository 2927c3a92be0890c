"""The account of a conversion: the proof that nothing was missed, and the parts of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from normswap.analysis.drift import layer_drifts, output_drift
from normswap.analysis.running import Sketches, run_model
from normswap.analysis.sites import Site, find_sites
from normswap.errors import ModelError, NormswapError
from normswap.layers.recurrent import LAYER_NORMALIZED
from normswap.layers.reparametrized import LAYERS
from normswap.report.report import Change, Drift, Left, Node, Totals
from normswap.targets.context import Swap
from normswap.targets.target import Target

_EXACT = 1e5  # times the rounding of the coarsest parameter: more than any chain of layers adds up to


def prove(model: nn.Module, changes: Sequence[Change], left: Sequence[Left], layers: Sequence[str]) -> None:
    """A second walk: each norm and convolution that the model has now is one the report names."""
    named = {path for change in changes for path in change.paths} | {entry.path for entry in left}
    missed = [
        path
        for site in find_sites(model)
        if is_reported(site, layers)
        for path in site.paths
        if path not in named and path.rpartition(".")[0] not in named  # a norm may become two
    ]
    if missed:
        raise NormswapError(f"{missed[0]}: neither changed nor left; this is a bug in normswap, please report it")


def changes_of(swaps: Sequence[Swap]) -> list[Change]:
    taken_in = {swap.absorb.site: swap.site.path for swap in swaps if swap.absorb}
    changes = []
    for swap in swaps:
        site, partner = swap.site, swap.absorb.site.path if swap.absorb else taken_in.pop(swap.site, None)
        how = swap.how if partner is None or swap.absorb else f"{swap.how}; took in the norm after it"
        changes.append(
            Change(site.paths, site.kind, site.name, swap.after, how, swap.exact, swap.note, swap.groups, partner)
        )
    for swap in swaps:
        if swap.absorb and swap.absorb.site in taken_in:
            into, how = swap.absorb.site, "took in the norm after it"
            taken_in.pop(into)
            changes.append(Change(into.paths, "weight", into.name, into.name, how, swap.exact, partner=swap.site.path))
    return changes


def count_elements(model: nn.Module) -> tuple[int, int]:
    return sum(p.numel() for p in model.parameters()), sum(b.numel() for b in model.buffers())


def totals_of(
    changes: Sequence[Change], left: Sequence[Left], before: tuple[int, int], after: tuple[int, int]
) -> Totals:
    kinds = Counter(change.kind for change in changes)
    return Totals(kinds["norm"], kinds["weight"], len(left), before[0], after[0], before[1], after[1])


def modules_of(before: Mapping[str, str], model: nn.Module, changes: Sequence[Change]) -> tuple[Node, ...]:
    """The tree, before and after; `before` are the names of modules by path, as `names_of` has them."""
    written = {path: change for change in changes for path in change.paths}
    after = names_of(model)
    pairs = ((path, before.get(path, ""), after.get(path, "")) for path in dict.fromkeys([*before, *after]))
    return tuple(
        Node(path, written[path].before, written[path].after) if path in written else Node(path, old, new)
        for path, old, new in pairs
    )


def names_of(model: nn.Module) -> dict[str, str]:
    """The class of each module by its first path."""
    return {path: type(module).__name__ for path, module in model.named_modules()}


def drift_of(
    model: nn.Module,
    before: Any,
    inputs: Any,
    name: str,
    exact: bool,
    sketches: Sketches,
    changed: Container[str],
) -> Drift:
    """The measured drift, also that of the changed layers among the `sketches` of before; raises `ModelError` where a model does not run any more, or moved though it should not have."""
    try:
        taps = [path for path in sketches if path in changed]
        now = run_model(model, inputs, taps=taps)
        moved = output_drift(before, now.output, name)
    except ModelError as error:
        raise ModelError(f"after conversion {error}; leave what it needs with exclude=") from error
    precision = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    if exact and moved.relative_l2 is not None and moved.relative_l2 > _EXACT * precision:
        raise ModelError(
            f"this conversion should be exact, but on {name} the output moved by {moved.relative_l2:.2g} (relative L2): the "
            "forward does something that could not be seen; leave the layers concerned with exclude=, and please report it"
        )
    old = {path: sketches[path] for path in taps}
    return replace(moved, layers=tuple(layer_drifts(old, now.sketches)))


def recipe_of(target: Target, options: object, changes: Sequence[Change]) -> dict[str, Any]:
    choices = {name: "a function" if callable(value) else value for name, value in vars(options).items()}
    data, seconds, recurrent = (choices.pop(name) for name in ("calibrate", "calibrate_seconds", "recurrent"))
    choices = {k: list(v) if isinstance(v, Iterable) and not isinstance(v, str) else v for k, v in choices.items()}
    choices |= {} if data is None else {"calibrate": True, "calibrate_seconds": seconds}
    choices |= {} if recurrent is None else {"recurrent": recurrent}
    layers = {c.paths[0]: {"from": c.before, "to": c.after, "groups": c.groups} for c in changes}
    versions = {"normswap": version("normswap"), "torch": torch.__version__.split("+")[0]}
    return {"format": 1, "target": target.name, "options": choices, "versions": versions, "layers": layers}


def is_reported(site: Site, layers: Sequence[str]) -> bool:
    """Norms and convolutions always are; other layers if their weights may be changed, or have norms inside."""
    return site.kind == "norm" or site.layer_kind in ("conv", *layers) or site.base in LAYER_NORMALIZED.values()


def nothing_to_convert(target: Target, left: Sequence[Left]) -> str:
    if not left:
        return "the model has no normalization and no convolution: there is nothing to convert"
    reasons = Counter((entry.module, entry.reason) for entry in left)
    listed = "; ".join(f"{count} {module}: {reason}" for (module, reason), count in reasons.most_common(4))
    return f"nothing to convert to {target.name}: {listed}"


def left_unasked(sites: Sequence[Site], layers: Sequence[str], recurrent: str | None) -> str:
    """What the options leave out though the model has it."""
    has = Counter(site.layer_kind for site in sites if site.kind == "weight")
    there = [kind for kind in LAYERS if has[kind] and kind not in layers]
    hints = (
        [f"weights of other layers change with layers=({', '.join(repr(kind) for kind in there)},)"] if there else []
    )
    if has["rnn"] and not recurrent:
        hints.append('recurrent="ln" puts layer norms into LSTM and GRU')
    return "".join(f"; {hint}" for hint in hints)
