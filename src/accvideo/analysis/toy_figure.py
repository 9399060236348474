"""The 1-D study as a figure in the shape of the paper's Figure 2 (arXiv:2503.19462)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from accvideo.analysis.figure import (
    Panel,
    color,
    diamond,
    dot,
    figure,
    mean_and_spread,
    polyline,
    spread_curves,
    whisker,
)
from accvideo.analysis.line import moved_data, off_trajectory, trajectories
from accvideo.analysis.networks import Points, VelocityNetworks, generator
from accvideo.analysis.toy_training import Study
from accvideo.reporting.charts import Plot, nice_ticks

TOLERANCE = 0.1
"""Of the points drawn as useless."""

NUM_LINES = 48
"""Trajectories that are drawn."""

NUM_POINTS = 40
"""Forward-diffused points that are drawn."""

PLANE = Plot((1, 0), (-5.5, 5.5))
"""Noise at the left, data at the right."""

BINS = torch.linspace(-5.5, 5.5, 111)
"""Edges of the histograms."""


def toy_figure(
    study: Study,
    teacher: VelocityNetworks,
    states: Float[Tensor, "seeds samples levels"],
    samples: Mapping[str, Points],
    results: Mapping[str, Any],
) -> str:
    """Panels a to f as in the paper, then the methods that it did not run (g) and all distances (h).

    Args:
        study: its settings.
        teacher: of all seeds; the first is drawn.
        states: its recorded trajectories.
        samples: of all models, by name.
        results: what `toy.json` holds.
    """
    mismatch = study.mismatches[-1]
    teacher_name = f"teacher, {study.num_steps} steps"
    perflow = [f"PeRFlow, M = {each:g}" for each in study.mismatches]
    matching = [name for name in samples if name.startswith("DMD")]
    others = ["trajectory loss", "AccVideo", *matching[:1], *matching[-1:]]
    kinds = [("teacher's trajectories", "var(--muted)"), ("on them", color(1)), ("useless", color(2))]
    teacher_row = samples[teacher_name][0]
    panels = [
        Panel("a  Knowledge distillation, M = 0", "the teacher's steps from forward-diffused points",
              knowledge_chart(study, teacher, states, 0.0), kinds),
        Panel(f"b  Knowledge distillation, M = {mismatch:g}", "the same from data that does not match (diamonds)",
              knowledge_chart(study, teacher, states, mismatch), kinds),
        Panel("c  Distribution distillation, M = 0", "the teacher's velocities at noised samples",
              distribution_chart(study, teacher, states, samples, 0.0), kinds),
        Panel(f"d  Distribution distillation, M = {mismatch:g}", "squares: a student's at the start; dots: data",
              distribution_chart(study, teacher, states, samples, mismatch), kinds),
        Panel("e  Useless data points", f"in %, farther than {TOLERANCE:g} from every trajectory",
              useless_chart(results["useless"]), [("paper", color(0)), ("here", color(2))]),
        Panel("f  PeRFlow's students", "histograms; gray: the teacher's; diamonds: distillation data",
              histogram_chart(teacher_row, {name: samples[name][0] for name in perflow}, study.mismatches)),
        Panel("g  Other students, not in the paper", "histograms; gray: the teacher's",
              histogram_chart(teacher_row, {name: samples[name][0] for name in others}, ())),
        distance_panel(results["models"], study.mismatches),
    ]  # fmt: skip
    return figure(panels)


def paths(states: Float[Tensor, "samples levels"], sigmas: Float[Tensor, " levels"]) -> str:
    """Thin lines of some trajectories."""
    every = slice(None, None, 2)
    points = [list(zip(sigmas[every].tolist(), row[every].tolist(), strict=True)) for row in states[:NUM_LINES]]
    return "".join(polyline(PLANE, line, "var(--muted)", 0.7, 0.45) for line in points)


def plane(marks: str, describe: str) -> str:
    """A chart of points against the noise level."""
    return PLANE.svg(marks, "noise level", (-3, 0, 3), (1, 0.8, 0.6, 0.4, 0.2, 0), describe)


def diffused(
    study: Study, videos: Tensor, states: Float[Tensor, "samples levels"], purpose: str
) -> list[tuple[int, float, str]]:
    """Noised videos at random levels: number of the level, place, and the color that tells whether it is useless."""
    noise = torch.randn(len(videos), generator=generator(0, f"{purpose} noise", 0))
    levels = torch.randint(3, study.num_steps - 2, (len(videos),), generator=generator(0, f"{purpose} level", 0))
    found = []
    for level, video, each in zip(levels.tolist(), videos, noise, strict=True):
        sigma = study.sigmas[level]
        place = (1 - sigma) * video + sigma * each
        off = off_trajectory(place[None], states[:2048, level], TOLERANCE)[0]
        found.append((level, float(place), color(2 if off else 1)))
    return found


@torch.no_grad()
def knowledge_chart(study: Study, teacher: VelocityNetworks, states: Tensor, mismatch: float) -> str:
    """Forward-diffused points, and where the teacher's steps lead from them."""
    marks = paths(states[0], study.sigmas)
    data = moved_data(mismatch)
    videos = torch.tensor(data).repeat(NUM_POINTS // 2)
    for level, place, tint in diffused(study, videos, states[0], "knowledge"):
        start = torch.full((len(study.seeds), 1), place)
        row = trajectories(teacher, start, study.sigmas[level:])[0, 0]
        marks += polyline(PLANE, list(zip(study.sigmas[level:].tolist(), row.tolist(), strict=True)), tint, 1.2, 0.8)
        marks += dot(PLANE, float(study.sigmas[level]), place, tint)
    marks += "".join(diamond(PLANE, 0, point, "var(--ink)") for point in data)
    return plane(marks, f"forward-diffused points at M = {mismatch:g} among the teacher's trajectories")


@torch.no_grad()
def distribution_chart(
    study: Study, teacher: VelocityNetworks, states: Tensor, samples: Mapping[str, Points], mismatch: float
) -> str:
    """Noised samples of data and student, with the velocities that the teacher gives them."""
    marks, reach = paths(states[0], study.sigmas), 0.08
    data = moved_data(mismatch)
    own = samples[f"teacher, {study.num_student_steps} steps"][0, : NUM_POINTS // 2]
    for kind, videos in (("real", torch.tensor(data).repeat(NUM_POINTS // 4)), ("fake", own)):
        for level, place, tint in diffused(study, videos, states[0], f"distribution {kind}"):
            sigma = float(study.sigmas[level])
            velocity = float(teacher(torch.full((len(study.seeds), 1), place), sigma)[0, 0])
            end = (max(0.0, sigma - reach), place - min(reach, sigma) * velocity)
            marks += polyline(PLANE, [(sigma, place), end], tint, 1.5)
            x, y = PLANE.x(sigma), PLANE.y(place)
            square = f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" fill="{tint}"/>'
            marks += square if kind == "fake" else dot(PLANE, sigma, place, tint)
    marks += "".join(diamond(PLANE, 0, point, "var(--ink)") for point in data)
    return plane(marks, f"noised samples of student and data at M = {mismatch:g} among the teacher's trajectories")


def useless_chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bars of the frequency of useless points, the paper's beside ours."""
    ours = {row["mismatch"]: [100 * share for share in row["teacher"][str(TOLERANCE)]] for row in rows}
    high = max(mean_and_spread(values)[0] for values in ours.values())
    ticks = nice_ticks(0, max(high, 30))
    plot = Plot((-0.4, max(ours) + 0.4), (0, ticks[-1]))
    marks = ""
    for row in rows:
        for shift, value, tint in (
            (-15, 100 * row["paper"], color(0)),
            (1, mean_and_spread(ours[row["mismatch"]])[0], color(2)),
        ):
            x, top = plot.x(row["mismatch"]) + shift, plot.y(value)
            marks += (
                f'<rect x="{x:.1f}" y="{top:.1f}" width="14" height="{plot.y(0) - top:.1f}" fill="{tint}">'
                f"<title>{value:.2f} %</title></rect>"
            )
        marks += whisker(plot, row["mismatch"], ours[row["mismatch"]], "var(--ink)", shift=8)
    return plot.svg(marks, "degree of mismatch M", ticks, list(ours), "share of useless data points against M")


def histogram_chart(teacher: Tensor, students: Mapping[str, Tensor], mismatches: Sequence[float]) -> str:
    """One row a student: its histogram over the teacher's, on a square-root scale so that thin tails show."""
    num_rows = len(students)
    plot = Plot((float(BINS[0]), float(BINS[-1])), (0, num_rows))
    reference, marks = heights(teacher), ""
    for number, (name, values) in enumerate(students.items()):
        floor = num_rows - 1 - number
        outline = stairs(reference, floor)
        marks += polyline(plot, outline, "none", 0).replace('fill="none"', 'fill="var(--muted)" fill-opacity="0.45"')
        marks += polyline(plot, [(float(BINS[0]), floor), (float(BINS[-1]), floor)], "var(--line)", 1)
        marks += polyline(plot, stairs(heights(values), floor), color(number + 1), 1.6)
        marks += f'<text x="236" y="{plot.y(floor + 0.72):.1f}" text-anchor="middle">{name}</text>'
        if mismatches:
            marks += "".join(diamond(plot, point, floor, "var(--ink)") for point in moved_data(mismatches[number]))
    return plot.svg(marks, "sample", (), (-4.5, -3, 0, 3, 4.5), "histograms of students and teacher")


def heights(values: Tensor) -> list[float]:
    """Square roots of the shares of a histogram's bins, the highest possible at 0.9."""
    shares = torch.histogram(values.double(), BINS.double()).hist / len(values)
    return (0.9 * (2 * shares).clamp(max=1).sqrt()).tolist()


def stairs(bins: Sequence[float], floor: float) -> list[tuple[float, float]]:
    """The outline of a histogram."""
    edges = BINS.tolist()
    inner = [(x, floor + height) for i, height in enumerate(bins) for x in (edges[i], edges[i + 1])]
    return [(edges[0], floor), *inner, (edges[-1], floor)]


def distance_panel(models: Sequence[Mapping[str, Any]], mismatches: Sequence[float]) -> Panel:
    """Distance to the teacher's samples against the degree of mismatch; a method without data is a level line."""
    by_name = {row["name"]: row["to_teacher"] for row in models}
    series = {
        method: {mismatch: by_name[f"{method}, M = {mismatch:g}"] for mismatch in mismatches}
        for method in ("PeRFlow", "DMD2")
    }
    series |= {method: dict.fromkeys(mismatches, by_name[method]) for method in ("AccVideo", "trajectory loss", "DMD")}
    high = max(sum(mean_and_spread(values)) for points in series.values() for values in points.values())
    ticks = nice_ticks(0, high)
    plot = Plot((-0.2, mismatches[-1] + 0.2), (0, ticks[-1]))
    chart = plot.svg(spread_curves(plot, series), "degree of mismatch M", ticks, mismatches, "distances against M")
    keys = [(name, color(number)) for number, name in enumerate(series)]
    return Panel("h  Distance to the teacher's samples", "1-Wasserstein; lower is better; bars: deviation of seeds",
                 chart, keys)  # fmt: skip
