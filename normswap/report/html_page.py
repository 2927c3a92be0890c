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


def report_page(report: Report, source: str) -> str:
    """The report on a conversion (or a `diff`) of `source` as HTML."""
    rows = [*(_change_row(change, report) for change in report.changes), *map(_left_row, report.left)]
    tree = (
        '<section id="tree"><h2>Modules, before and after</h2><p class="dim">● changed, ○ a norm or weight layer left '
        'as it was</p><div class="row dim"><span>module</span><span>before</span><span>after</span></div>'
        f'<div class="tree">{_tree(report)}</div></section>'
    )
    body = f"{_drift_chart(report)}{_groups_chart(report)}{search_bar(len(rows), folds=True)}{tree}"
    return page(
        wording.heading(report, source), _summary(report), f"{body}{all_lines(('path', 'layer', 'what and why'), rows)}"
    )


def page(title: str, summary: str, body: str) -> str:
    """A whole page; `summary` and `body` are HTML."""
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    foot = escaped(f"normswap {version('normswap')}")
    return template.substitute(title=escaped(title), summary=summary, body=body, foot=foot)


def escaped(text: str) -> str:
    """`text` as nothing but text, within a tag's quotes too."""
    return html.escape(printable(text))


def tiles(cells: Iterable[tuple[object, str]]) -> str:
    """Numbers, or HTML, over what they are."""
    drawn = (f'<div class="tile" data-name="{name}"><b>{value}</b>{name}</div>' for value, name in cells)
    return f'<div class="tiles">{"".join(drawn)}</div>'


def search_bar(lines: int, folds: bool = False) -> str:
    """The field that searches the lines of the page; with `folds`, a button for the branches of a tree."""
    button = '<button id="fold" type="button">Unfold all</button>' if folds else ""
    field = '<input id="search" type="search" placeholder="Search paths, layers, reasons" aria-label="Search">'
    return f'<div class="search">{field}<span id="found" class="dim" role="status">{lines} lines</span>{button}</div>'


def all_lines(head: Iterable[str], rows: Iterable[str]) -> str:
    """The table that is searched; `rows` are of `searched_row`."""
    names, lines = "".join(f"<th>{name}</th>" for name in head), "\n".join(rows)
    table = f"<table><thead><tr>{names}</tr></thead>\n<tbody>{lines}</tbody></table>"
    return f'<section id="all"><h2>All lines</h2>{table}</section>'


def searched_row(kind: str, what: str, paths: Iterable[str], *words: str) -> str:
    """A line of the table: paths and layers, then plain words."""
    paths = tuple(paths)
    cells = "".join(f'<td class="path">{escaped(cell)}</td>' for cell in paths)
    cells += "".join(f"<td>{escaped(cell)}</td>" for cell in words)
    found = _searchable([*paths, *words])
    return f'<tr class="{kind}" data-kind="{escaped(what)}" data-text="{found}">{cells}</tr>'


def _summary(report: Report) -> str:
    totals = report.totals
    changed = [(totals.norms_changed, "norms changed"), (totals.weights_changed, "weights changed")]
    cells: list[tuple[object, str]] = [*changed, (totals.left, "left")]
    if report.target == "diff":
        cells = [(len(report.changes), "differences"), (totals.left, "the same")]
    else:
        kind, word = ("exact" if report.exact else "near"), wording.kept_word(report)
        cells.append((f'<span class="{kind}">{word}</span>', "in eval mode"))
    told = wording.summary(report) if report.target == "diff" else wording.details(report)  # the tiles tell the rest
    sentences = "".join(f"<li>{escaped(sentence)}</li>" for sentence in told)
    sentences += "".join(f'<li class="dim">{escaped(note)}</li>' for note in report.notes)
    warnings = "".join(f'<p class="warning">{escaped(notice)}</p>' for notice in report.warnings)
    return f"{tiles(cells)}{_legend(report)}<ul>{sentences}</ul>{warnings}{_written(report)}"


def _legend(report: Report) -> str:
    if report.target == "diff":
        return ""
    words = "".join(f"<dt>{word}</dt><dd>{escaped(meaning)}</dd>" for word, meaning in wording.LEGEND.items())
    return f'<dl class="legend dim">{words}</dl>'


def _written(report: Report) -> str:
    lines = wording.written_lines(report.written)
    shown = "".join(f"<dt>{name}</dt><dd><code>{escaped(text)}</code></dd>" for name, text in lines)
    return f'<dl class="written">{shown}</dl>' if shown else ""


# ---- charts ----


def _drift_chart(report: Report) -> str:
    bars, every = charts.drift_bars(report.drift), charts.drift_bars(report.drift, full=True)
    if not bars or report.exact:
        return ""
    drawn, each = (_bars((_several(bar), bar.share, bar.shown, bar.severity) for bar in some) for some in (bars, every))
    all_of_them = f"<details><summary>every layer</summary>{each}</details>" if len(bars) < len(every) else ""
    title = f'<h2>{escaped(wording.DRIFT_TITLE.capitalize())}</h2><p class="dim">{escaped(wording.DRIFT_SCALE)}</p>'
    return f'<section id="drift">{title}{drawn}{all_of_them}</section>'


def _several(bar: charts.Bar) -> str:
    return f"{bar.path} ({bar.several})" if bar.several else bar.path


def _groups_chart(report: Report) -> str:
    groups = charts.layers_by_groups(report.changes)
    if not groups:
        return ""
    most = max(count for _, count in groups)
    drawn = _bars(
        (wording.plural(number, "group"), count / most, wording.plural(count, "layer"), "plain")
        for number, count in groups
    )
    return f'<section id="groups"><h2>Groups of the new norms</h2>{drawn}</section>'


def _bars(bars: Iterable[tuple[str, float, str, str]]) -> str:
    """Bars on one scale, each a (name, share of the full width, value, class of its colour)."""
    lines = (
        f'<div class="bar"><span class="path" title="{escaped(name)}">{escaped(name)}</span>'
        f'<span class="track"><i class="{kind}" style="width:{100 * share:.1f}%"></i></span>'
        f"<span>{escaped(value)}</span></div>"
        for name, share, value, kind in bars
    )
    return f'<div class="bars">{"".join(lines)}</div>'


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
    spans = "".join(f"<span>{escaped(cell)}</span>" for cell in cells)
    row = f'<div class="row path{mark}" style="--depth:{depth}" title="{escaped(reason)}">{spans}</div>'
    text = f'data-text="{_searchable([path, *cells, reason])}"'
    if not branch.below:
        yield f'<div class="leaf" {text}>{row}</div>'
        return
    yield f"<details {text}{' open' if depth < _OPEN_DEPTH else ''}><summary>{row}</summary>"
    for child in branch.below.values():
        yield from _branch(child, f"{path}.{child.name}".lstrip("."), marks, depth + 1)
    yield "</details>"


# ---- all lines ----


def _change_row(change: Change, report: Report) -> str:
    names = " = ".join(path or ROOT for path in change.paths)
    verdict = f" ({word})" if (word := wording.change_word(change, report)) else ""
    amount = f"; relative L2 {change.amount:.2g}" if change.amount is not None else ""
    why = f"{change.how}{verdict}{amount}{f'; {change.note}' if change.note else ''}"
    return searched_row("change", change.kind, (names, f"{change.before} → {change.after}"), why)


def _left_row(entry: Left) -> str:
    return searched_row("left", entry.kind, (entry.path or ROOT, entry.module), f"left: {entry.reason}")


def _searchable(parts: Iterable[str]) -> str:
    return escaped(" ".join(parts).lower())
