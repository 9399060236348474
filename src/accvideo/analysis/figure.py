"""Figures of several charts as one SVG file that is readable on a dark and on a light page."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from accvideo.reporting.charts import Plot, nice_ticks

WIDTH, CHART_HEIGHT, HEAD, KEY_HEIGHT, GAP = 440, 272, 40, 18, 24

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d2126; --muted: #5d6671; --line: #dedcd6;
  --row-0: #3c4653; --row-1: #2b6cb0; --row-2: #c2570c; --row-3: #0b7a55; --row-4: #8244b8; --row-5: #8a6d1a;
  --row-6: #b3366b; }
@media (prefers-color-scheme: dark) {
  :root { --page: #111417; --ink: #e9ebee; --muted: #9aa4b0; --line: #2d333b;
    --row-0: #c3ccd6; --row-1: #6cb0f2; --row-2: #f79a54; --row-3: #4fd1a1; --row-4: #c594f0; --row-5: #dcc067;
    --row-6: #f28cb4; } }
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--muted); }
text.head { font-size: 14px; font-weight: 600; fill: var(--ink); }
.axis { stroke: var(--line); stroke-width: 1; }
"""


@dataclass(frozen=True)
class Panel:
    """One chart of a figure."""

    title: str
    note: str
    """A line below the title."""
    chart: str
    """What `Plot.svg` makes."""
    keys: Sequence[tuple[str, str]] = ()
    """Names and colors."""


def color(index: int) -> str:
    """One of seven colors, of which six are the report's."""
    return f"var(--row-{index % 7})"


def figure(panels: Sequence[Panel], num_columns: int = 2) -> str:
    """One SVG document of all panels, row by row."""
    cell = (WIDTH + GAP, HEAD + CHART_HEIGHT + KEY_HEIGHT * max(len(_rows_of_keys(each.keys)) for each in panels) + GAP)
    num_rows = -(-len(panels) // num_columns)
    size = (GAP + num_columns * cell[0], GAP + num_rows * cell[1])
    parts = [f'<rect width="{size[0]}" height="{size[1]}" fill="var(--page)"/>']
    for number, panel in enumerate(panels):
        x, y = GAP + number % num_columns * cell[0], GAP + number // num_columns * cell[1]
        parts.append(f'<g transform="translate({x} {y})">{_panel(panel)}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" '
        f'height="{size[1]}"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _panel(panel: Panel) -> str:
    keys = []
    for row, names in enumerate(_rows_of_keys(panel.keys)):
        x, y = 44, HEAD + CHART_HEIGHT + KEY_HEIGHT * (row + 1) - 4
        for name, tint in names:
            keys.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{tint}"/>')
            keys.append(f'<text x="{x + 9}" y="{y}">{escape(name)}</text>')
            x += _key_width(name)
    return (
        f'<text class="head" y="12">{escape(panel.title)}</text><text y="30">{escape(panel.note)}</text>'
        f'<svg y="{HEAD}" width="{WIDTH}" height="{CHART_HEIGHT}">{panel.chart}</svg>{"".join(keys)}'
    )


def _key_width(name: str) -> int:
    return 30 + round(6.8 * len(name))


def _rows_of_keys(keys: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    rows: list[list[tuple[str, str]]] = []
    used = WIDTH
    for name, tint in keys:
        if used + _key_width(name) > WIDTH - 44:
            rows.append([])
            used = 0
        rows[-1].append((name, tint))
        used += _key_width(name)
    return rows


def polyline(
    plot: Plot, points: Sequence[tuple[float, float]], tint: str, width: float = 2, opacity: float = 1, shift: float = 0
) -> str:
    """A line through points of a plot, `shift` units to the right."""
    places = " ".join(f"{plot.x(x) + shift:.1f},{plot.y(y):.1f}" for x, y in points)
    return (
        f'<polyline fill="none" stroke="{tint}" stroke-width="{width}" stroke-opacity="{opacity}" '
        f'stroke-linejoin="round" points="{places}"/>'
    )


def dot(plot: Plot, x: float, y: float, tint: str, radius: float = 3.5) -> str:
    """A point of a plot."""
    return f'<circle cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="{radius}" fill="{tint}"/>'


def diamond(plot: Plot, x: float, y: float, tint: str) -> str:
    """A point of a plot that is no circle."""
    return f'<path transform="translate({plot.x(x):.1f} {plot.y(y):.1f})" d="M-6 0L0-6L6 0L0 6Z" fill="{tint}"/>'


def whisker(plot: Plot, x: float, values: Sequence[float], tint: str, shift: float = 0) -> str:
    """Mean of some values, with a line of one standard deviation to both sides; `shift` units to the right."""
    mean, spread = mean_and_spread(values)
    place, bottom, top = plot.x(x) + shift, plot.y(mean - spread), plot.y(mean + spread)
    return (
        f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{bottom:.1f}" y2="{top:.1f}" stroke="{tint}" stroke-width="2"/>'
        f'<circle cx="{place:.1f}" cy="{plot.y(mean):.1f}" r="3.5" fill="{tint}"/>'
    )


def whisker_ticks(series: Iterable[Sequence[float]], most: float = math.inf) -> list[float]:
    """Ticks between whose ends the whiskers of all these values lie, none above `most`."""
    spreads = [mean_and_spread(values) for values in series]
    low, high = min(mean - spread for mean, spread in spreads), max(mean + spread for mean, spread in spreads)
    high = min(high, most)
    return nice_ticks(low if low < high else high - 1, high)


def spread_curves(
    plot: Plot,
    series: Mapping[str, Mapping[float, Sequence[float]]],
    tints: Sequence[str] | None = None,
    dodge: float = 0,
) -> str:
    """Curves of means with their spread.

    Args:
        plot: where they are drawn.
        series: by name, the values of all seeds at each place.
        tints: color of each; None: the report's, in their order.
        dodge: units by which each curve stands right of the one before it, that those which coincide can be told apart.
    """
    marks = []
    for number, points in enumerate(series.values()):
        tint, shift = tints[number] if tints else color(number), dodge * (number - (len(series) - 1) / 2)
        means = [(x, statistics.fmean(values)) for x, values in points.items()]
        marks.append(polyline(plot, means, tint, 1.5, shift=shift))
        marks += [whisker(plot, x, values, tint, shift) for x, values in points.items()]
    return "".join(marks)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; 0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def spread_text(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation as text; a single value is itself."""
    mean, spread = mean_and_spread(values)
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
