"""An inspection to the terminal: the tree, what each target would do, what is wrong, what to pick."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from normswap.report.inspection import Inspection, Layer
from normswap.report.path_patterns import Branch, fold_tree, places, span
from normswap.report.terminal import columns, told
from normswap.report.wording import plural, verdict
from normswap.target_table import NORMS

_MOST_LINES = 24  # of the tree, before its deepest branches are summed up
_MOST_REASONS = 3


class InspectionView:
    """An `Inspection` for rich; with `full`, every branch of the tree and every path of a finding."""

    def __init__(self, found: Inspection, title: str = "", full: bool = False):
        self.found, self.title, self.full = found, title, full

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.options = options
        found = self.found
        norms = [layer for layer in found.layers if layer.kind == "norm"]
        counts = f"{plural(len(norms), 'norm')}, {plural(len(found.layers) - len(norms), 'weight layer')}"
        sizes = f"{plural(found.parameters, 'parameter')}, {plural(found.buffers, 'buffer element')}"
        parts: list[Text | Table | Padding] = [
            Text.assemble((self.title, "bold"), self._told(f" · {found.model}")), Text(f"{counts}, {sizes}"), Text(),
        ]  # fmt: skip
        if found.layers:
            measured = f" (maps: {found.probe})" if found.probe else ""
            parts += [self._heading("what is in it", measured), self._tree(), Text()]
        parts += [self._heading("what each target would do"), self._outcomes(), Text()]
        if found.findings:
            parts += [self._heading("what is wrong, or suspicious"), *self._findings(), Text()]
        if found.advice:
            parts += [self._heading("what to pick"), *self._advice()]
        yield Group(*parts)

    def _told(self, text: str) -> str:
        return told(text, self.options)

    def _heading(self, text: str, more: str = "") -> Text:
        return Text.assemble((text, "bold"), (self._told(more), "dim"))

    # ---- the tree ----

    def _tree(self) -> Table:
        branches = fold_tree((layer.paths[0], layer.module, layer) for layer in self.found.layers)
        if not self.full:
            branches = _shortened(branches)
        table = columns("place", "layer", "maps", "state", "count")
        for depth, branch in _walk(branches):
            held: list[Layer] = [layer for _, layer in branch.items]
            name = f"{'  ' * (depth + 1)}{branch.name}"
            if held:
                state = _state(held)
                style = "" if state in ("", "healthy", "frozen", "frozen, healthy") else "yellow"
                cells = [Text(self._told(cell)) for cell in (name, _layers(held), _maps(held))]
                table.add_row(*cells, Text(state, style=style), self._told(f"×{len(held)}"))
            else:
                several = f"×{branch.count}" if branch.count > 1 else ""
                table.add_row(Text(name, style="dim"), "", "", "", Text(self._told(several), style="dim"))
        return table

    # ---- targets, findings, advice ----

    def _outcomes(self) -> Table:
        table = columns("target", "changes", "exact", "left")
        outcomes = self.found.outcomes
        norms = [set(outcome.reasons) for outcome in outcomes if outcome.target in NORMS]
        common = set.intersection(*norms) if norms else set()  # said once
        for outcome in outcomes:
            changes = [plural(n, w) for n, w in ((outcome.norms, "norm"), (outcome.weights, "weight")) if n]
            judged = "" if outcome.exact is None else verdict(outcome.exact)
            own = [reason for reason in outcome.reasons if outcome.target not in NORMS or reason not in common]
            told = self._told(outcome.problem or _reasons(own))
            kind = "green" if outcome.exact else "yellow"
            table.add_row(f"  {outcome.target}", ", ".join(changes) or "nothing", Text(judged, style=kind), told)
        if common:
            table.add_row("  all", "of gn to fold", "", self._told(_reasons(sorted(common, key=lambda r: -r[1]))))
        return table

    def _findings(self) -> Iterator[Padding]:
        for finding in self.found.findings:
            where = places(finding.paths, len(finding.paths)) if self.full else places(finding.paths)
            yield _indented(Text.assemble((finding.problem, "yellow"), self._told(f": {where}")), 2)
            yield _indented(Text(self._told(finding.note)), 4)

    def _advice(self) -> Iterator[Padding]:
        for advice in self.found.advice:
            yield _indented(Text.assemble(f"{advice.situation}: ", (advice.choose, "bold")), 2)
            yield _indented(Text(self._told(advice.why)), 4)


def _indented(text: Text, columns: int) -> Padding:
    return Padding(text, (0, 0, 0, columns))


def _reasons(reasons: Sequence[tuple[str, int]]) -> str:
    return "; ".join(f"{count} left: {reason}" for reason, count in reasons[:_MOST_REASONS])


def _walk(branches: Sequence[Branch], depth: int = 0) -> Iterator[tuple[int, Branch]]:
    for branch in branches:
        yield depth, branch
        yield from _walk(list(branch.below.values()), depth + 1)


def _shortened(branches: list[Branch]) -> list[Branch]:
    """The tree with its deepest branches summed up, until it fits."""
    deepest = max(depth for depth, _ in _walk(branches))
    while sum(branch.lines for branch in branches) > _MOST_LINES and deepest > 0:
        deepest -= 1
        branches = [_cut(branch, deepest) for branch in branches]
    return branches


def _cut(branch: Branch, depth: int) -> Branch:
    if depth > 0:
        return replace(branch, below={name: _cut(child, depth - 1) for name, child in branch.below.items()})
    items = [item for _, part in _walk([branch]) for item in part.items]
    return replace(
        branch, items=items, below={}, stem=f"{branch.name}.*" if branch.below else branch.name, numbers=set()
    )


def _layers(layers: Sequence[Layer]) -> str:
    """What layers there are: class, channels, groups."""
    kinds = list(dict.fromkeys(layer.module for layer in layers))
    if len(kinds) > 1:
        return ", ".join(f"{sum(layer.module == kind for layer in layers)} {kind}" for kind in kinds)
    sizes = {layer.size for layer in layers}
    channels = [layer.channels for layer in layers if layer.channels is not None]
    if len(sizes) == 1 and (size := sizes.pop()):
        return f"{kinds[0]} {size}"
    tails = {layer.size.partition(", ")[2] for layer in layers}
    tail = f", {tails.pop()}" if len(tails) == 1 and any(tails) else ""
    groups = [layer.groups for layer in layers if layer.kind == "norm" and layer.groups is not None]
    told = f", {span(groups)} groups" if groups else ""
    return f"{kinds[0]} {span(channels)}{tail}{told}" if channels else kinds[0]


def _maps(layers: Sequence[Layer]) -> str:
    """The least and the greatest size of the maps that they read."""
    sizes = sorted({layer.spatial for layer in layers if layer.spatial}, key=lambda size: (len(size), size))
    written = ["×".join(map(str, size)) for size in sizes]
    return " to ".join(dict.fromkeys([written[0], written[-1]])) if written else ""


def _state(layers: Sequence[Layer]) -> str:
    """Frozen or trained, and the state of running statistics, where it is not as usual."""
    trained = {layer.trained for layer in layers} - {None}
    words = [] if trained == {True} or not trained else ["frozen"] if trained == {False} else ["partly frozen"]
    states = list(dict.fromkeys(layer.statistics for layer in layers if layer.statistics))
    words += ["dead channels" if len(states) > 1 and "dead" in state else state for state in states]
    words += ["cannot be touched"] if all(layer.obstacle for layer in layers) else []
    return ", ".join(dict.fromkeys(words))
