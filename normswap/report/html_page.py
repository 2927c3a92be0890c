"""A report as one HTML page that needs nothing else: no network, no files beside it."""

import html
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from string import Template

from normswap.printable import printable
from normswap.report import charts, wording
from normswap.report.module_tree import Branch, build_tree
from normswap.report.path_patterns import ROOT
from normswap.report.report import Change, Left, Node, Report

_OPEN_DEPTH = 2  # branches of the tree that are open at first


def to_html(report: Report, source: str) -> str:
    """The report on a conversion (or a `diff`) of `source` as HTML."""
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    rows = [*map(_change_row, report.changes), *map(_left_row, report.left)]
    return template.substitute(
        title=_escaped(wording.heading(report, source)),
        summary=_summary(report),
        charts=f'<div class="charts">{_drift_chart(report)}{_groups_chart(report)}</div>',
        tree=_tree(report),
        rows="\n".join(rows),
        lines=len(rows),
        foot=_escaped(f"normswap {version('normswap')}"),
    )


def _escaped(text: str) -> str:
    """`text` as nothing but text, within a tag's quotes too."""
    return html.escape(printable(text))


def _summary(report: Report) -> str:
    totals = report.totals
    changed = [(totals.norms_changed, "norms changed"), (totals.weights_changed, "weights changed")]
    tiles = [*changed, (totals.left, "left")]
    if report.target == "diff":
        tiles = [(len(report.changes), "differences"), (totals.left, "the same")]
    shown = "".join(f'<div class="tile" data-name="{name}"><b>{count}</b>{name}</div>' for count, name in tiles)
    if report.target != "diff":
        kind, word = ("exact" if report.exact else "near"), wording.verdict(report.exact)
        shown += f'<div class="tile" data-name="verdict"><b class="{kind}">{word}</b>in eval mode</div>'
    sentences = "".join(f"<li>{_escaped(sentence)}</li>" for sentence in wording.summary(report))
    warnings = "".join(f'<p class="warning">{_escaped(notice)}</p>' for notice in report.warnings)
    return f'<div class="tiles">{shown}</div><ul>{sentences}</ul>{warnings}'


# ---- charts ----


def _drift_chart(report: Report) -> str:
    bars, every = charts.drift_bars(report.drift), charts.drift_bars(report.drift, full=True)
    if not bars:
        return ""
    longest = max(max(bar.value for bar in bars), 1e-12)
    drawn, each = (
        "".join(_bar(_several(bar), bar.value / longest, f"{bar.value:.2g}") for bar in some) for some in (bars, every)
    )
    all_of_them = f"<details><summary>every layer</summary>{each}</details>" if len(bars) < len(every) else ""
    return f'<section id="drift"><h2>Drift of each layer\'s output (relative L2)</h2>{drawn}{all_of_them}</section>'


def _several(bar: charts.Bar) -> str:
    return bar.path if bar.count == 1 else f"{bar.path} (furthest of {bar.count})"


def _groups_chart(report: Report) -> str:
    groups = charts.layers_by_groups(report.changes)
    if not groups:
        return ""
    most = max(count for _, count in groups)
    drawn = "".join(
        _bar(wording.plural(number, "group"), count / most, wording.plural(count, "layer")) for number, count in groups
    )
    return f'<section id="groups"><h2>Groups of the new norms</h2>{drawn}</section>'


def _bar(name: str, share: float, value: str) -> str:
    return (
        f'<div class="bar"><span class="path">{_escaped(name)}</span><i style="width:{100 * share:.1f}%"></i>'
        f"<span>{_escaped(value)}</span></div>"
    )


# ---- the tree ----


def _tree(report: Report) -> str:
    changed = {path: change for change in report.changes if change.kind != "tensor" for path in change.paths}
    left = {entry.path: entry for entry in report.left if entry.kind != "tensor"}
    nodes = {node.path: node for node in report.modules}
    for path, entry in left.items():
        nodes.setdefault(path, Node(path, entry.module, entry.module))
    for path, change in changed.items():
        nodes.setdefault(path, Node(path, change.before, change.after))
    if not nodes:
        return '<p class="dim">tensors alone: no modules</p>'
    marks = {path: (" left", entry.reason) for path, entry in left.items()}
    marks |= {path: (" changed", change.how) for path, change in changed.items()}
    return "".join(_branch(build_tree(nodes.items()), "", marks, 0))


def _branch(branch: Branch[Node], path: str, marks: Mapping[str, tuple[str, str]], depth: int) -> Iterator[str]:
    """The lines of a branch and of all below it.

    `marks` has (class of the row, reason) of each layer that was changed or left, by path.
    """
    node = branch.items[0] if branch.items else Node(path, "", "")
    mark, reason = marks.get(path, ("", ""))
    changes = sum(marks.get(item.path, ("",))[0] == " changed" for _, inner in branch.walk() for item in inner.items)
    below = f" ({changes} changed)" if changes else ""
    cells = (branch.name or ROOT, node.before, (node.after or ("gone" if node.before else "")) + below)
    spans = "".join(f"<span>{_escaped(cell)}</span>" for cell in cells)
    row = f'<div class="row path{mark}" style="--depth:{depth}" title="{_escaped(reason)}">{spans}</div>'
    text = f'data-text="{_searchable([path, *cells, reason])}"'
    if not branch.below:
        yield f'<div class="leaf" {text}>{row}</div>'
        return
    yield f"<details {text}{' open' if depth < _OPEN_DEPTH else ''}><summary>{row}</summary>"
    for child in branch.below.values():
        yield from _branch(child, f"{path}.{child.name}".lstrip("."), marks, depth + 1)
    yield "</details>"


# ---- all lines ----


def _change_row(change: Change) -> str:
    names = " = ".join(path or ROOT for path in change.paths)
    verdict = f" ({wording.verdict(change.exact)})" if change.kind in wording.MAY_BE_EXACT else ""
    amount = f"; relative L2 {change.amount:.2g}" if change.amount is not None else ""
    why = f"{change.how}{verdict}{amount}{f'; {change.note}' if change.note else ''}"
    return _row("change", change.kind, names, f"{change.before} → {change.after}", why)


def _left_row(entry: Left) -> str:
    return _row("left", entry.kind, entry.path or ROOT, entry.module, f"left: {entry.reason}")


def _row(kind: str, what: str, path: str, layer: str, why: str) -> str:
    cells = f'<td class="path">{_escaped(path)}</td><td class="path">{_escaped(layer)}</td><td>{_escaped(why)}</td>'
    return f'<tr class="{kind}" data-kind="{_escaped(what)}" data-text="{_searchable([path, layer, why])}">{cells}</tr>'


def _searchable(parts: Iterable[str]) -> str:
    return _escaped(" ".join(parts).lower())
