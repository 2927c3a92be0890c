"""Charts of lines and bars as SVG, side by side, legible on a light page and on a dark one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT, MARGIN = 780, 250, 48  # the width of a row; the height of a panel
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#e11d48", "#a855f7", "#ca8a04", "#06b6d4", "#84736b", "#ec4899", "#65a30d")
STYLE = """<style>
text { font-family: system-ui, "DejaVu Sans", sans-serif; font-size: 12px; fill: #24292f }
.small { font-size: 10px }
.axis { stroke: #57606a; fill: none } .grid { stroke: #57606a; opacity: 0.2 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .axis, .grid { stroke: #9da7b3 } }
</style>"""


@dataclass(frozen=True)
class Chart:
    """One panel: a value, in per cent, of each series at each place; places stand at equal distances in their order."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Mapping[str, float]]
    bars: bool = False


def draw(charts: Sequence[Chart], columns: int = 2) -> str:
    """All charts, `columns` in a row, with one legend under them: a series has one colour everywhere."""
    names = list(dict.fromkeys(name for chart in charts for name in chart.series))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    columns = min(columns, len(charts))
    panel, rows = WIDTH // columns, math.ceil(len(charts) / columns)
    parts = []
    for index, chart in enumerate(charts):
        across, down = index % columns * panel, index // columns * HEIGHT
        parts.append(f'<g transform="translate({across} {down})">{_panel(chart, colours, panel)}</g>')
    x, y = MARGIN, rows * HEIGHT + 14
    for name in names:
        needed = 30 + 8 * len(name)
        if x + needed > WIDTH:
            x, y = MARGIN, y + 20
        parts.append(
            f'<rect x="{x}" y="{y - 9}" width="14" height="10" fill="{colours[name]}"/>' + _text(x + 19, y, name)
        )
        x += needed
    box = f'viewBox="0 0 {WIDTH} {y + 12}" width="{WIDTH}" height="{y + 12}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{STYLE}\n' + "\n".join(parts) + "\n</svg>\n"


def _panel(chart: Chart, colours: Mapping[str, str], width: int) -> str:
    places = list(dict.fromkeys(place for points in chart.series.values() for place in points))
    values = [value for points in chart.series.values() for value in points.values()]
    low, high, step = _scale(min(values), max(values), from_zero=chart.bars)
    left, right, top, bottom = MARGIN, width - 12, 26, HEIGHT - 40
    pitch = (right - left) / len(places)

    def across(place: str) -> float:
        return left + (places.index(place) + 0.5) * pitch

    def up(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    parts = [_text(left, 16, chart.title, "start", "bold")]
    for tick in range(round((high - low) / step) + 1):
        value = low + tick * step
        parts.append(
            f'<path class="grid" d="M{left} {up(value):.1f}H{right}"/>'
            + _text(left - 5, up(value) + 4, f"{value:g}", "end")
        )
    small = "small" if 8 * max(map(len, places)) > pitch else ""
    parts += [_text(across(place), bottom + 15, place, "middle", name=small) for place in places]
    parts.append(f'<path class="axis" d="M{left} {top}V{bottom}H{right}"/>')
    parts.append(_text((left + right) / 2, bottom + 31, chart.x_label, "middle"))
    parts.append(
        f'<g transform="translate(13 {(top + bottom) / 2}) rotate(-90)">{_text(0, 0, chart.y_label, "middle")}</g>'
    )
    breadth = 0.84 * pitch / len(chart.series)
    for index, (name, points) in enumerate(chart.series.items()):
        colour = colours[name]
        if chart.bars:
            for place, value in points.items():
                x = across(place) - 0.42 * pitch + index * breadth
                parts.append(
                    f'<rect x="{x:.1f}" y="{up(value):.1f}" width="{breadth:.1f}" height="{bottom - up(value):.1f}" '
                    f'fill="{colour}"/>'
                )
            continue
        line = " ".join(f"{across(place):.1f},{up(points[place]):.1f}" for place in places if place in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{across(p):.1f}" cy="{up(v):.1f}" r="2.5" fill="{colour}"/>' for p, v in points.items()]
    return "".join(parts)


def _scale(low: float, high: float, from_zero: bool) -> tuple[float, float, float]:
    """Ends and step of an axis that holds `low` and `high`, with about five round steps."""
    low = 0.0 if from_zero else low
    raw = max(high - low, 1e-9) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * round_step for round_step in (1, 2, 5, 10) if power * round_step >= raw)
    return math.floor(low / step) * step, math.ceil(high / step) * step, step


def _text(x: float, y: float, words: str, anchor: str = "start", weight: str = "normal", name: str = "") -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}"' + (f' class="{name}"' if name else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'
