"""An inspection as one HTML page that needs nothing else."""

from collections.abc import Iterable

from normswap.report import html_page
from normswap.report import inspection_wording as wording
from normswap.report.html_page import escaped
from normswap.report.inspection import Inspection
from normswap.report.path_patterns import summarize_paths


def inspection_page(found: Inspection, source: str) -> str:
    """The inspection of `source` as HTML."""
    norms = sum(layer.kind == "norm" for layer in found.layers)
    cells: list[tuple[object, str]] = [(norms, "norms"), (len(found.layers) - norms, "weight layers")]
    cells += [(f"{found.parameters:,}", "parameters"), (len(found.findings), "findings")]
    rows = [
        html_page.searched_row("layer", layer.kind, (path, what), maps, state)
        for layer in found.layers
        for path, what, maps, state in [wording.layer_cells(layer)]
    ]
    probe = f'<p class="dim">maps: {escaped(found.probe)}</p>' if found.probe else ""
    layers = html_page.all_lines(("path", "layer", "maps", "state"), rows)
    body = f"{_advice(found)}{_findings(found)}{_outcomes(found)}{probe}{html_page.search_bar(len(rows))}{layers}"
    return html_page.page(f"{source} · {found.model}", html_page.tiles(cells), body)


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{escaped(title.capitalize())}</h2>{content}</section>' if content else ""


def _described(pairs: Iterable[tuple[str, str]]) -> str:
    """Each a line, and below it what it means; both are HTML."""
    return "".join(f"<p>{line}<br><span class='dim'>{below}</span></p>" for line, below in pairs)


def _outcomes(found: Inspection) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("target", "changes", "in eval mode", "what stays, and why"))
    rows = "".join(
        f'<tr><td class="path">{escaped(line.target)}</td><td>{escaped(line.changes)}</td>'
        f'<td class="{"exact" if line.exact else "near"}">{line.verdict}</td><td>{escaped(line.left)}</td></tr>'
        for line in wording.outcome_lines(found)
    )
    return _section("outcomes", wording.OUTCOMES, f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")


def _findings(found: Inspection) -> str:
    lines = (
        (f'<span class="near">{escaped(finding.problem)}</span>: {escaped(summarize_paths(finding.paths))}', note)
        for finding in found.findings
        for note in [escaped(finding.note)]
    )
    return _section("findings", wording.FINDINGS, _described(lines))


def _advice(found: Inspection) -> str:
    lines = ((f"{escaped(a.situation)}: <b>{escaped(a.choose)}</b>", escaped(a.why)) for a in found.advice)
    return _section("advice", wording.ADVICE, _described(lines))
