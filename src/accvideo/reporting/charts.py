"""Charts as SVG in the colors of the report's page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from accvideo.reporting.wording import (
    METRICS,
    Row,
    interval_text,
    label,
    metric_text,
    ordered,
)


def nice_ticks(low: int | float, high: int | float, count: int = 5) -> list[float]:
    """Round numbers, about `count`, from at or below `low` to at or above `high`."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    return [float(step * i) for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def log_ticks(low: int | float, high: int | float) -> list[float]:
    """Powers of ten inside a range, and their 2- and 5-fold where it is narrow."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < 200 * low else (1,)
    return [factor * 10.0**decade for decade in decades for factor in factors if low <= factor * 10.0**decade <= high]


@dataclass(frozen=True)
class Plot:
    """The area of a chart: ranges of both axes, each linear or logarithmic, mapped to 440 x 270 units."""

    x_range: tuple[int | float, int | float]
    y_range: tuple[int | float, int | float]
    x_log: bool = False
    y_log: bool = False

    def x(self, value: int | float) -> float:
        """Horizontal position of a value."""
        return 44 + 384 * _fraction(value, self.x_range, self.x_log)

    def y(self, value: int | float) -> float:
        """Vertical position of a value."""
        return 232 - 216 * _fraction(value, self.y_range, self.y_log)

    def svg(
        self, marks: str, x_title: str, y_ticks: Sequence[float], x_ticks: Sequence[int | float], describe: str
    ) -> str:
        """The chart with axes around `marks`."""
        lines = [
            f'<line class="axis" x1="44" x2="428" y1="{self.y(tick):.1f}" y2="{self.y(tick):.1f}"/>'
            f'<text x="38" y="{self.y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
            for tick in y_ticks
        ]
        lines += [f'<text x="{self.x(tick):.1f}" y="249" text-anchor="middle">{tick:g}</text>' for tick in x_ticks]
        lines.append(f'<text x="236" y="267" text-anchor="middle">{escape(x_title)}</text>')
        return (
            f'<svg class="chart" viewBox="0 0 440 272" role="img" aria-label="{escape(describe)}">'
            f"{''.join(lines)}{marks}</svg>"
        )


def _fraction(value: int | float, limits: tuple[int | float, int | float], logarithmic: bool) -> float:
    low, high = limits
    if logarithmic:
        low, high, value = math.log(low), math.log(high), math.log(max(value, low))
    return (value - low) / (high - low)


def quality_chart(rows: Sequence[Row], metric: str) -> str:
    """A metric against the number of denoiser calls, with intervals; nothing where the metric is missing."""
    points = [(row, tint) for row, tint in ordered(rows) if row["metrics"].get(metric) is not None]
    if len(points) < 2:
        return ""
    factor = 100 if METRICS[metric][1] == "%" else 1
    lows = [factor * row["metrics"][metric]["low"] for row, _ in points]
    highs = [factor * row["metrics"][metric]["high"] for row, _ in points]
    low, high = min(lows), max(highs)
    margin = 0.06 * (high - low or abs(high) or 1.0)
    y_ticks = nice_ticks(low - margin if low - margin > 0 else 0.0, high + margin)
    if factor == 100:
        y_ticks = [tick for tick in y_ticks if tick <= 100]
    calls = sorted({row["denoiser_calls"] for row, _ in points})
    plot = Plot((calls[0] / 1.5, calls[-1] * 1.5), (y_ticks[0], y_ticks[-1]), x_log=True)
    marks = []
    for row, tint in points:
        estimate = row["metrics"][metric]
        # Rows of equally many calls stand side by side.
        peers = [peer["name"] for peer, _ in points if peer["denoiser_calls"] == row["denoiser_calls"]]
        x = plot.x(row["denoiser_calls"]) + 12 * (peers.index(row["name"]) - (len(peers) - 1) / 2)
        y, top, bottom = (plot.y(factor * estimate[key]) for key in ("mean", "high", "low"))
        who, detail = label(row)
        tip = f"{who}, {detail}: {metric_text(metric, estimate)} ({interval_text(metric, estimate)})"
        shape = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{tint}"/>'
            if row["name"].startswith("teacher")
            else f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" rx="1.5" fill="{tint}" '
            f'transform="rotate(45 {x:.1f} {y:.1f})"/>'
        )
        marks.append(
            f'<g><title>{escape(tip)}</title><line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" '
            f'stroke="{tint}" stroke-width="2"/>{shape}</g>'
        )
    name, unit = METRICS[metric]
    chart = plot.svg("".join(marks), "denoiser calls (logarithmic)", y_ticks, calls, f"{name} against denoiser calls")
    return f'<div class="card"><h3>{name}</h3><p class="kicker">{unit}</p>{chart}</div>'


def legend(items: Sequence[tuple[str, str]]) -> str:
    """Colored dots with names."""
    entries = [f'<li><i class="dot" style="background:{tint}"></i>{escape(name)}</li>' for name, tint in items]
    return f'<ul class="legend">{"".join(entries)}</ul>'


def binned(points: Sequence[tuple[float, float]], num_bins: int = 30) -> list[tuple[float, float]]:
    """A noisy curve as the means of at most `num_bins` equal groups of neighbors."""
    size = math.ceil(len(points) / num_bins)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


Curves = dict[int, list[tuple[float, float]]]
"""Values against the iteration, by key point."""


def line_chart(title: str, unit: str, series: Curves, dashed: Curves, y_range: tuple[float, float] | None) -> str:
    """Curves by key point, on a linear axis of `y_range` if that is given, else on a logarithmic one."""
    lines = [*series.items(), *dashed.items()]
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    if not xs or min(xs) == max(xs):
        return ""
    if y_range is None:
        low, high = min(ys) / 1.15, max(ys) * 1.15
        y_ticks, limits = log_ticks(low, high), (low, high)
    else:
        y_ticks, limits = nice_ticks(*y_range), y_range
    x_ticks = [tick for tick in nice_ticks(min(xs), max(xs), 4) if min(xs) <= tick <= max(xs) * 1.02]
    plot = Plot((min(xs), max(xs)), limits, y_log=y_range is None)
    marks = "".join(
        f'<polyline fill="none" stroke="var(--curve-{keypoint % 6})" stroke-linejoin="round" {style} '
        f'points="{" ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in points)}">'
        f"<title>{kind} {keypoint}</title></polyline>"
        for kind, style, group in (
            ("key point", 'stroke-width="2"', series),
            ("validation, key point", 'stroke-width="1.5" stroke-dasharray="2 4"', dashed),
        )
        for keypoint, points in group.items()
    )
    chart = plot.svg(marks, "iteration", y_ticks, x_ticks, f"{title} by key point")
    keys = legend([(f"key point {keypoint}", f"var(--curve-{keypoint % 6})") for keypoint in series])
    return f'<div class="card"><h3>{title}</h3><p class="kicker">{unit}</p>{chart}{keys}</div>'
