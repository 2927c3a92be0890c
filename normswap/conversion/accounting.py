"""Counts and names for the report: what changed, what stayed and why, and how large the model is."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from normswap.analysis.sites import Site
from normswap.layers.recurrent import LAYER_NORMALIZED
from normswap.layers.reparametrized import LAYERS, PLAIN
from normswap.report.report import Change, Left
from normswap.targets.context import Place, Swap
from normswap.targets.options import Options
from normswap.targets.target import FOLD, PLAIN_TARGET, Target

_TOOK_IN = {
    Place.BEFORE: "took in the norm after it", Place.BEHIND: "took in the norm before it",
    Place.BESIDE: "took in the norm beside it",
}  # fmt: skip


def changes_of(swaps: Sequence[Swap], notes: Mapping[Site, str]) -> list[Change]:
    """The swaps as the report has them; a layer that takes in another has a change too, though it is no swap.

    `notes` are of such layers.
    """
    taken: dict[Site, list[tuple[str, Swap]]] = defaultdict(list)
    for swap in swaps:
        for absorption in swap.absorptions:
            taken[absorption.site].append((_TOOK_IN[absorption.place], swap))
        if swap.merger is not None:
            taken[swap.merger.site].append(("took in the convolution beside it", swap))
    changes = []
    for swap in swaps:
        site, others = swap.site, taken.pop(swap.site, [])
        into = [absorption.site.path for absorption in swap.absorptions]
        partners = [*into, *([swap.merger.site.path] if swap.merger else []), *(other.site.path for _, other in others)]
        how = "; ".join(dict.fromkeys([swap.how, *(words for words, _ in others)]))
        partner = partners[0] if partners else None
        changes.append(
            Change(
                site.paths, site.kind, site.name, swap.after, how, swap.exact, swap.note, swap.groups, swap.eps, partner
            )
        )
    for layer, others in taken.items():
        how, exact = "; ".join(dict.fromkeys(words for words, _ in others)), all(other.exact for _, other in others)
        partner, note = others[0][1].site.path, notes.get(layer, "")
        changes.append(Change(layer.paths, "weight", layer.name, layer.name, how, exact, note, partner=partner))
    return changes


def count_elements(model: nn.Module) -> tuple[int, int]:
    """How many elements the parameters and the buffers of a model have."""
    modules = list(model.modules())
    parameters = {id(p): p.numel() for module in modules for p in module._parameters.values() if p is not None}
    buffers = {id(b): b.numel() for module in modules for b in module._buffers.values() if b is not None}
    return sum(parameters.values()), sum(buffers.values())


def class_names(model: nn.Module) -> dict[str, str]:
    """The class of each module by its first path."""
    return {path: type(module).__name__ for path, module in model.named_modules()}


def is_meant(site: Site, target: Target, options: Options) -> bool:
    """Whether `target`, with the options, is to change such a layer: one that stays is reported as left."""
    if site.kind == "norm":
        return target.norm is not None
    if folds(target) and (site.base in PLAIN or site.base in LAYER_NORMALIZED.values()):
        return True
    inside = options.recurrent is not None and site.layer_kind == "rnn"
    return inside or (target.weight is not None and site.layer_kind in options.layers)


def folds(target: Target) -> bool:
    """Whether `target` is `fold`, or its second half alone: plain layers."""
    return target in (FOLD, PLAIN_TARGET)


def why_nothing_to_convert(target: Target, left: Sequence[Left], options: Options) -> str:
    """The message where no layer can be changed, with the reasons that most layers have."""
    if not left and folds(target):
        return "nothing to fold: the model has no normalization and no standardized or normalized weights"
    if not left:
        return (
            f"nothing to convert to {target.name}: the model has no {' and no '.join(_meant_layers(target, options))}"
        )
    reasons = Counter((entry.module, entry.reason) for entry in left)
    listed = "; ".join(f"{count} {module}: {reason}" for (module, reason), count in reasons.most_common(4))
    if folds(target):
        return f"nothing to fold: {listed}"
    return f"nothing to convert to {target.name}: {listed}"


def _meant_layers(target: Target, options: Options) -> list[str]:
    """What `target` is to change, in words."""
    names = {"conv": "convolution", "linear": "linear layer", "rnn": "recurrent layer"}
    meant = ["normalization"] if target.norm is not None else []
    meant += [names[kind] for kind in options.layers] if target.weight is not None else []
    return [*meant, *(["LSTM or GRU"] if options.recurrent else [])]


def unasked_layers(sites: Iterable[Site], options: Options) -> str:
    """What a model has that the options leave out, with the options that would change it, each behind a semicolon."""
    has = Counter(site.layer_kind for site in sites if site.kind == "weight")
    there = [kind for kind in LAYERS if has[kind] and kind not in options.layers]
    hints = []
    if there:
        hints.append(f"weights of other layers change with --layers {','.join(there)} (layers=)")
    if has["rnn"] and not options.recurrent:
        hints.append("--recurrent ln (recurrent=) puts layer norms into LSTM and GRU")
    return "".join(f"; {hint}" for hint in hints)
