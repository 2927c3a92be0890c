"""An inspection to the terminal: the tree, what each target would do, what is wrong, what to pick."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from normswap.report import inspection_wording as wording
from normswap.report.inspection import Inspection, Layer
from normswap.report.module_tree import Branch, fold_tree
from normswap.report.path_patterns import MOST_PATTERNS, span, summarize_paths
from normswap.report.terminal import Terminal, plain_table

_MOST_LINES = 24  # of the tree, before its deepest branches are summed up


@dataclass(frozen=True)
class InspectionView:
    """An `Inspection` for rich."""

    inspection: Inspection
    title: str = ""  # what was inspected
    full: bool = False  # every branch of the tree, and every path of a finding

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(*self._parts(Terminal(options.max_width, options.ascii_only)))

    def _parts(self, terminal: Terminal) -> Iterator[Group | Text]:
        found = self.inspection
        yield Text.assemble((terminal.string(self.title), "bold"), terminal.string(f" · {found.model}"))
        yield Text(wording.counts(found))
        yield Text()
        if found.layers:
            probe = terminal.string(f" (maps: {found.probe})") if found.probe else ""
            title = Text.assemble((wording.WHAT_IS_IN_IT, "bold"), (probe, "dim"))
            yield Group(title, _layer_table(found.layers, self.full, terminal), Text())
        yield Group(Text(wording.OUTCOMES, style="bold"), self._outcomes(terminal))
        if found.findings:
            yield Group(Text(), Text(wording.FINDINGS, style="bold"), *self._findings(terminal))
        if found.advice:
            yield Group(Text(), Text(wording.ADVICE, style="bold"), *self._advice(terminal))

    def _outcomes(self, terminal: Terminal) -> Table:
        table = plain_table("target", "changes", "exact", "left")
        for line in wording.outcome_lines(self.inspection):
            shown = Text(line.verdict, style="green" if line.exact else "yellow")
            table.add_row(f"  {line.target}", line.changes, shown, terminal.text(line.left))
        return table

    def _findings(self, terminal: Terminal) -> Iterator[Padding]:
        for finding in self.inspection.findings:
            where = summarize_paths(finding.paths, len(finding.paths) if self.full else MOST_PATTERNS)
            problem = (terminal.string(finding.problem), "yellow")
            yield _indented(Text.assemble(problem, terminal.string(f": {where}")), 2)
            yield _indented(terminal.text(finding.note), 4)

    def _advice(self, terminal: Terminal) -> Iterator[Padding]:
        for advice in self.inspection.advice:
            situation, choose = terminal.string(advice.situation), terminal.string(advice.choose)
            yield _indented(Text.assemble(f"{situation}: ", (choose, "bold")), 2)
            yield _indented(terminal.text(advice.why), 4)


def _indented(text: Text, columns: int) -> Padding:
    return Padding(text, (0, 0, 0, columns))


# ---- the tree of layers ----


def _layer_table(layers: Sequence[Layer], full: bool, terminal: Terminal) -> Table:
    tree = fold_tree(((layer.paths[0], layer) for layer in layers), kind=lambda layer: layer.module)
    if not full:
        tree = _shortened(tree)
    table = plain_table("place", "layer", "maps", "state", "count")
    for depth, branch in tree.walk():
        name = f"{'  ' * (depth + 1)}{branch.name}"
        if members := branch.items:
            state = _state(members)
            usual = state in ("", "healthy", "frozen", "frozen, healthy")
            cells = [terminal.text(cell) for cell in (name, _classes_and_sizes(members), _map_sizes(members))]
            table.add_row(*cells, terminal.text(state, "" if usual else "yellow"), terminal.text(f"×{len(members)}"))
        else:
            several = f"×{branch.count}" if branch.count > 1 else ""
            table.add_row(terminal.text(name, "dim"), "", "", "", terminal.text(several, "dim"))
    return table


def _shortened(tree: Branch[Layer]) -> Branch[Layer]:
    """The tree with its deepest branches summed up, until it fits."""
    deepest = max(depth for depth, _ in tree.walk())
    while sum(1 for _ in tree.walk()) > _MOST_LINES and deepest > 0:
        tree = _cut_at_depth(tree, deepest)
        deepest -= 1
    return tree


def _cut_at_depth(branch: Branch[Layer], depth: int) -> Branch[Layer]:
    """The branch with at most `depth` levels below it; each of the last one sums up all below it in a line `name.*`."""
    if depth > 0:
        return replace(branch, below={name: _cut_at_depth(child, depth - 1) for name, child in branch.below.items()})
    items = [*branch.items, *(item for _, inner in branch.walk() for item in inner.items)]
    stem = f"{branch.name}.*" if branch.below else branch.name
    return replace(branch, items=items, below={}, stem=stem, numbers=set())


def _classes_and_sizes(layers: Sequence[Layer]) -> str:
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
    in_groups = f", {span(groups)} groups" if groups else ""
    return f"{kinds[0]} {span(channels)}{tail}{in_groups}" if channels else kinds[0]


def _map_sizes(layers: Sequence[Layer]) -> str:
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
