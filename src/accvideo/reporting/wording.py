"""What the report's page calls rows and metrics, and how it writes numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
"""One row of `report.json`."""

METRICS = {
    "all_right": ("All properties right", "%"),
    "count": ("Number of objects right", "%"),
    "shape": ("Shapes right", "%"),
    "color": ("Colors right", "%"),
    "background": ("Background right", "%"),
    "motion": ("Motions right", "%"),
    "rerender_psnr_db": ("Re-render PSNR", "dB, higher is cleaner"),
    "diversity_distance": ("Diversity distance", "to the world's own spread, lower is better"),
    "flicker": ("Flicker", "levels of 255: mean second difference in time"),
    "latent_mse": ("Latent error", "mean squared distance to the teacher's own result"),
    "teacher_psnr_db": ("PSNR to the teacher's clip", "dB"),
    "motion_error": ("Motion error", "of the teacher's motion energy; a still clip has 1"),
    "fvd": ("FVD to the teacher's clips", "I3D features; lower is better"),
}
"""Title and unit of each metric, in the order of the table."""


def row_named(rows: Sequence[Row], name: str) -> Row:
    """The row called `name`."""
    return next(row for row in rows if row["name"] == name)


def label(row: Row) -> tuple[str, str]:
    """What a row is, in two short lines."""
    steps = f"{row['num_steps']} step{'s' if row['num_steps'] != 1 else ''}"
    guided = row["guidance_scale"] is not None and row["guidance_scale"] > 1
    detail = f"{steps}{' guided' if guided else ''}, {row['denoiser_calls']} calls"
    if row["name"].startswith("teacher"):
        return "Teacher", detail
    return ("Student" if row["name"] == "student" else row["name"].replace("-", " ").capitalize()), detail


def color(index: int) -> str:
    """The color of the row at position `index`."""
    return f"var(--row-{min(index, 5)})"


def ordered(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """Rows and their colors; the same row has the same color everywhere on the page."""
    known = {"teacher": 0, "teacher_few": 1, "teacher_equal_calls": 2, "student": 3, "teacher_equal_calls_other": 5}
    return [(row, color(known.get(row["name"], 4))) for row in rows]


def shown_rows(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """The rows whose clips are shown: all but the weaker variant of the teacher at equal calls."""
    return [(row, tint) for row, tint in ordered(rows) if row["name"] != "teacher_equal_calls_other"]


def number(value: int | float) -> str:
    """Three significant digits, never in exponents for the sizes met here."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 6)}f}"


def percent(value: float) -> str:
    """A proportion as a percentage with one decimal."""
    return f"{100 * value:.1f}"


def seconds_text(value: float) -> str:
    """A duration with its unit."""
    return f"{value * 1000:.0f} ms" if value < 0.1 else f"{number(value)} s"


def metric_text(name: str, estimate: Mapping[str, float] | None, with_unit: bool = False) -> str:
    """The value of a metric as it stands in the table."""
    if estimate is None:
        return "–"
    if METRICS[name][1] == "%":
        return percent(estimate["mean"]) + (" %" if with_unit else "")
    return number(estimate["mean"])


def interval_text(metric: str, estimate: Mapping[str, float]) -> str:
    """The interval of a metric as it stands in the table."""
    form = percent if METRICS[metric][1] == "%" else number
    return f"{form(estimate['low'])} to {form(estimate['high'])}"


def difference_text(metric: str, estimate: Mapping[str, float]) -> str:
    """How far a metric lies above the teacher's, and the interval of that, as they stand in the table."""
    scale = 100 if METRICS[metric][1] == "%" else 1
    mean, low, high = (scale * estimate[name] for name in ("mean", "low", "high"))
    digits = 1 if scale == 100 else 2
    text = f"{mean:+.{digits}f} ({low:+.{digits}f}, {high:+.{digits}f})".replace("-", "−")
    return f"<b>{text}</b>" if low > 0 or high < 0 else text
