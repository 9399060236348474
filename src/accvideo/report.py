"""The report's page: one self-contained HTML file that opens from disk, with clips of all rows in step."""

import base64
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from accvideo.video import Frames

SPRITE_WIDTH = 192
"""Widest clip of the page in pixels; wider ones are made smaller."""
SPRITE_FRAMES = 41
"""Most frames of a clip on the page; of longer ones, evenly spaced frames are shown."""
NUM_LARGE = 4
"""Number of prompts whose clips are shown large; the others share lines."""

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
}
"""Title and unit of each metric, in the order of the table."""


@dataclass(frozen=True)
class ShownClip:
    """The clips that all rows made from one prompt and one noise."""

    index: int
    prompt: str
    frames: dict[str, Frames]
    """By name of the row."""
    wrong: dict[str, list[str]] = field(default_factory=dict)
    """By name of the row, the properties that the judge finds wrong; a row that was not judged is missing."""


def write_report(
    folder: Path,
    report: Mapping[str, Any],
    clips: Sequence[ShownClip],
    failures: Sequence[ShownClip],
    training_log: Sequence[Mapping[str, Any]],
    fps: int | float,
) -> Path:
    """Write `folder/index.html`, under another name first, and return its path.

    Args:
        folder: The report's folder.
        report: The object of `report.json`.
        clips: Clips to show side by side, chosen without looking at them.
        failures: Clips that the student got wrong, with the teacher's.
        training_log: The lines of the student's `metrics.jsonl`.
        fps: Frames a second at which the clips play.
    """
    rows = report["rows"]
    sections = [
        tiles(report),
        clips_section(rows, clips, fps),
        quality_section(rows),
        seconds_section(rows),
        training_section(training_log),
        failures_section(rows, failures),
        limits_section(report),
        provenance_section(report),
    ]
    page = files("accvideo").joinpath("report.html").read_text("utf-8")
    page = page.replace("<!-- title -->", escape(title(report)))
    page = page.replace("<!-- headline -->", headline(report)).replace("<!-- body -->", "\n".join(sections))
    path = folder / "index.html"
    partial = folder / ".index.html.partial"
    partial.write_text(page, "utf-8")
    os.replace(partial, path)
    return path


# Words and numbers


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


def title(report: Mapping[str, Any]) -> str:
    """The page's title in plain text."""
    teacher, student = row_named(report["rows"], "teacher"), row_named(report["rows"], "student")
    speedup = number(report["speedup"]["end_to_end"])
    return f"{student['denoiser_calls']} calls instead of {teacher['denoiser_calls']}, {speedup}× faster"


def headline(report: Mapping[str, Any]) -> str:
    """Title and the sentence that sums the numbers up."""
    rows = report["rows"]
    teacher, equal, student = (row_named(rows, name) for name in ("teacher", "teacher_equal_calls", "student"))
    if student["metrics"]["all_right"] is None:
        name, verb = "latent_mse", "ends at a mean squared distance of {} from the teacher's own result"
        result = f"From the same noise, the student {verb.format(_bold(name, student))}; "
        result += f"the teacher given {equal['denoiser_calls']} calls, at {_bold(name, equal)}."
    else:
        result = (
            f"The student gets every property of its prompt right in {_bold('all_right', student)} of clips, the "
            f"teacher in {_bold('all_right', teacher)}, and the teacher given the student's "
            f"{student['denoiser_calls']} calls in {_bold('all_right', equal)}."
        )
    names = f"{escape(str(report['student']))} distilled from {escape(str(report['teacher']))}"
    return (
        f'<p class="kicker"><b>accvideo</b> · {names}</p>\n<h1>{escape(title(report))}</h1>\n'
        f'<p class="lead">{result} All rows start from the same {report["num_prompts"]} prompts and the same noise.</p>'
    )


def _bold(metric: str, row: Row) -> str:
    return f"<b>{metric_text(metric, row['metrics'][metric], with_unit=True)}</b>"


def tiles(report: Mapping[str, Any]) -> str:
    """The four numbers at the top."""
    teacher, student = row_named(report["rows"], "teacher"), row_named(report["rows"], "student")
    last = "all_right" if student["metrics"]["all_right"] is not None else "latent_mse"
    contents = [
        (
            f"{number(report['speedup']['end_to_end'])}×",
            "faster, end to end",
            f"{seconds_text(student['seconds_end_to_end'])} a clip, teacher "
            f"{seconds_text(teacher['seconds_end_to_end'])}",
        ),
        (
            f"{number(report['speedup']['denoising'])}×",
            "faster denoising",
            f"{seconds_text(student['seconds_denoising'])}, teacher {seconds_text(teacher['seconds_denoising'])}",
        ),
        (
            f"{student['denoiser_calls']} <small style='display:inline;font-size:.5em'>of "
            f"{teacher['denoiser_calls']}</small>",
            "denoiser calls",
            f"{student['num_steps']} steps, guidance distilled in",
        ),
        (
            metric_text(last, student["metrics"][last], with_unit=True),
            METRICS[last][0].lower(),
            _interval_text(last, student["metrics"][last])
            + (f", teacher {metric_text(last, teacher['metrics'][last])}" if last == "all_right" else ""),
        ),
    ]
    blocks = [
        f'<div class="tile{" main" if i == 0 else ""}"><strong>{value}</strong><span>{what}</span>'
        f"<small>{detail}</small></div>"
        for i, (value, what, detail) in enumerate(contents)
    ]
    return f'<div class="tiles">{"".join(blocks)}</div>'


def _interval_text(metric: str, estimate: Mapping[str, float]) -> str:
    form = percent if METRICS[metric][1] == "%" else number
    return f"{form(estimate['low'])} to {form(estimate['high'])}"


# Clips


def sprite(frames: Frames) -> tuple[str, int, int, int]:
    """A clip as a strip of its frames in a data URI, with number, width and height of the frames in it."""
    if len(frames) > SPRITE_FRAMES:
        frames = frames[torch.linspace(0, len(frames) - 1, SPRITE_FRAMES).round().long()]
    num_frames, height, width, _ = frames.shape
    strip = Image.fromarray(frames.transpose(0, 1).reshape(height, num_frames * width, 3).contiguous().cpu().numpy())
    small = width <= SPRITE_WIDTH
    if not small:
        height, width = round(height * SPRITE_WIDTH / width), SPRITE_WIDTH
        strip = strip.resize((num_frames * width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    strip.save(buffer, "webp", quality=92 if small else 78, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", num_frames, width, height


def clip_figure(row: Row, tint: str, clip: ShownClip) -> str:
    """One clip with its caption; empty where the row has no clip of this prompt."""
    name = row["name"]
    if name not in clip.frames:
        return ""
    uri, num_frames, width, height = sprite(clip.frames[name])
    who, detail = label(row)
    verdict = ""
    if name in clip.wrong:
        wrong = ", ".join(clip.wrong[name])
        verdict = f'<span class="wrong">✗ {wrong}</span>' if wrong else '<span class="right">✓ all right</span>'
    return (
        f'<figure class="{"student" if name == "student" else "other"}">'
        f'<canvas class="{"tiny" if width <= 96 else "large"}" width="{width}" height="{height}" '
        f'data-frames="{num_frames}" data-sprite="{uri}" role="img" '
        f'aria-label="{escape(f"{who}, {detail}: {clip.prompt}")}"></canvas>'
        f'<figcaption><b><i class="dot" style="background:{tint}"></i>{escape(who)}</b>{escape(detail)}'
        f"{f'<br>{verdict}' if verdict else ''}</figcaption></figure>"
    )


def clip_card(rows: Sequence[tuple[Row, str]], clip: ShownClip) -> str:
    """All rows' clips of one prompt."""
    figures = "".join(clip_figure(row, tint, clip) for row, tint in rows)
    columns = sum(row["name"] in clip.frames for row, _ in rows)
    return (
        f'<article class="card prompt"><h3>{escape(clip.prompt)}</h3>'
        f'<div class="clips" style="--columns:{columns}">{figures}</div></article>'
    )


PLAYER = """<div class="player" data-fps="{fps}" role="group" aria-label="Playback of all clips">
<button class="play" type="button" aria-label="Pause">
<svg viewBox="0 0 18 18" aria-hidden="true"><path d=""/></svg></button>
<input type="range" min="0" max="1" value="0" step="1" aria-label="Frame"><output>1</output>
<button class="speed" type="button" aria-label="Speed">1×</button></div>"""


def clips_section(rows: Sequence[Row], clips: Sequence[ShownClip], fps: int | float) -> str:
    """Clips of all rows side by side with one player for all."""
    shown = shown_rows(rows)
    return (
        '<section><h2>Side by side</h2><p class="note">The first prompts of the evaluation, chosen before anything was '
        "seen. Each line starts from one noise.</p>"
        f"{PLAYER.format(fps=fps)}<noscript><p>The clips need JavaScript to play.</p></noscript>"
        f'<div class="prompts">{"".join(clip_card(shown, clip) for clip in clips[:NUM_LARGE])}</div>'
        f'<div class="prompts two">{"".join(clip_card(shown, clip) for clip in clips[NUM_LARGE:])}</div></section>'
    )


def failures_section(rows: Sequence[Row], failures: Sequence[ShownClip]) -> str:
    """Clips that the student got wrong, beside the teacher's."""
    if not failures:
        return ""
    pair = [(row, tint) for row, tint in shown_rows(rows) if row["name"] in ("teacher", "student")]
    return (
        '<section><h2>What goes wrong</h2><p class="note">The first clips in which the judge finds something that the '
        "prompt did not ask for, beside the teacher's clip from the same noise.</p>"
        f'<div class="prompts two">{"".join(clip_card(pair, clip) for clip in failures)}</div></section>'
    )


# Charts


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
        tip = f"{who}, {detail}: {metric_text(metric, estimate)} ({_interval_text(metric, estimate)})"
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


def quality_section(rows: Sequence[Row]) -> str:
    """Charts of quality against calls, and the table of everything."""
    judged = row_named(rows, "student")["metrics"]["all_right"] is not None
    names = ("all_right", "rerender_psnr_db") if judged else ("latent_mse", "teacher_psnr_db")
    charts = "".join(quality_chart(rows, name) for name in names)
    keys = legend([(" · ".join(label(row)), tint) for row, tint in ordered(rows)])
    return (
        '<section><h2>Quality against calls</h2><p class="note">A denoiser call is one evaluation of the network for '
        "one clip; guidance takes two a step. Circles are the teacher, diamonds students; lines are 95 % intervals.</p>"
        f'<div class="grid">{charts}</div>{keys}<h2>All numbers</h2>'
        '<p class="note">Means, and 95 % intervals below them: Wilson for shares of clips, bootstrap otherwise.</p>'
        f"{table(rows)}</section>"
    )


def table(rows: Sequence[Row]) -> str:
    """Metrics down, rows of the evaluation across."""
    columns = ordered(rows)
    head = "".join(
        f'<th scope="col"{_student_class(row)}><i class="dot" style="background:{tint}"></i>{escape(label(row)[0])}'
        f"<small>{escape(label(row)[1]).replace(', ', '<br>')}</small></th>"
        for row, tint in columns
    )

    def line(name: str, unit: str, cell: Callable[[Row], str], main: bool = False) -> str:
        cells = "".join(f"<td{_student_class(row)}>{cell(row)}</td>" for row, _ in columns)
        return f'<tr{" class=main" if main else ""}><th scope="row">{name}<small>{unit}</small></th>{cells}</tr>'

    def metric_cell(metric: str) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            estimate = row["metrics"].get(metric)
            if estimate is None:
                return "–"
            return f"{metric_text(metric, estimate)}<small>{_interval_text(metric, estimate)}</small>"

        return cell

    lines = [
        line(name, unit, metric_cell(metric), metric == "all_right")
        for metric, (name, unit) in METRICS.items()
        if any(row["metrics"].get(metric) is not None for row in rows)
    ]
    lines.append(line("Denoiser calls", "a clip", lambda row: str(row["denoiser_calls"])))
    lines.append(line("Denoising", "seconds a clip", lambda row: number(row["seconds_denoising"])))
    lines.append(line("End to end", "seconds a clip", lambda row: number(row["seconds_end_to_end"])))
    return (
        '<div class="scroll card" tabindex="0" role="region" aria-label="All numbers"><table>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _student_class(row: Row) -> str:
    return ' class="student"' if row["name"] == "student" else ""


PARTS = {"text": "text encoding", "denoising": "denoising", "decoding": "decoding"}
"""Parts of a generation, by their key in a row's `seconds`."""


def seconds_section(rows: Sequence[Row]) -> str:
    """Stacked bars of the seconds of each part."""
    longest = max(row["seconds_end_to_end"] for row in rows)
    bars = []
    for row, tint in ordered(rows):
        who, detail = label(row)
        parts = [(part, row["seconds"][part]) for part in PARTS]
        widths = "".join(
            f'<i class="{part}" style="width:{100 * value / row["seconds_end_to_end"]:.2f}%" '
            f'title="{PARTS[part]}: {seconds_text(value)}"></i>'
            for part, value in parts
        )
        share = 100 * row["seconds_end_to_end"] / longest
        bars.append(
            f'<div><i class="dot" style="background:{tint}"></i>{escape(who)} <small class="kicker">{escape(detail)}'
            f'</small></div><div class="bar"><div class="stack" style="width:calc({share / 100:.4f} * (100% - 5.5em))">'
            f"{widths}</div><span>{seconds_text(row['seconds_end_to_end'])}</span></div>"
        )
    keys = legend([("text encoding", "var(--curve-4)"), ("denoising", "var(--row-1)"), ("decoding", "var(--row-4)")])
    return (
        '<section><h2>Seconds by part</h2><p class="note">Median over batches of one size, for one clip.</p>'
        f'<div class="card"><div class="bars">{"".join(bars)}</div>{keys}</div></section>'
    )


# Training


def binned(points: Sequence[tuple[float, float]], num_bins: int = 30) -> list[tuple[float, float]]:
    """A noisy curve as the means of at most `num_bins` equal groups of neighbors."""
    size = math.ceil(len(points) / num_bins)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


Curves = dict[int, list[tuple[float, float]]]
"""Values against the iteration, by key point."""


def curves(training_log: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> Curves:
    """One value of each line that belongs to a key point and has it."""
    found: Curves = {}
    for line in training_log:
        try:
            keypoint, y = line["keypoint"], value(line)
        except KeyError:
            continue
        if math.isfinite(y):
            found.setdefault(keypoint, []).append((float(line["iteration"]), y))
    return {keypoint: binned(points) for keypoint, points in sorted(found.items())}


def validation_curves(training_log: Sequence[Mapping[str, Any]]) -> Curves:
    """The validation losses, which come as one line for all key points."""
    lines = [line for line in training_log if "validation_loss" in line]
    num_keypoints = len(lines[0]["validation_loss"]) if lines else 0
    return {k: [(float(line["iteration"]), line["validation_loss"][k]) for line in lines] for k in range(num_keypoints)}


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


def training_section(training_log: Sequence[Mapping[str, Any]]) -> str:
    """Loss curves by key point and accuracy of the discriminator's heads."""
    losses = line_chart(
        "Trajectory loss",
        "mean squared error of the velocity, logarithmic; dotted: held-out trajectories",
        curves(training_log, lambda line: line["trajectory_loss"]),
        validation_curves(training_log),
        None,
    )
    accuracy = curves(training_log, lambda line: 50 * (line["real_accuracy"] + line["fake_accuracy"]))
    heads = line_chart(
        "Accuracy of the discriminator's heads",
        "% of tokens right, teacher's and student's; 50 is a guess",
        accuracy,
        {},
        (min([40.0, *(y for points in accuracy.values() for _, y in points)]), 100.0),
    )
    if not losses + heads:
        return ""
    adversarial = (
        " The heads tell the student's latents from the teacher's, and the student learns to fool them."
        if heads
        else " No discriminator was trained."
    )
    return (
        '<section><h2>Training</h2><p class="note">Each curve is one key point, 0 at the noise. The trajectory loss '
        f"pulls the student's step to the secant of the teacher's trajectory.{adversarial}</p>"
        f'<div class="grid">{losses}{heads}</div></section>'
    )


# Words at the end


def limits_section(report: Mapping[str, Any]) -> str:
    """What the numbers do not show."""
    items = "".join(f"<li>{escape(limit)}</li>" for limit in report["limits"])
    return f'<section><h2>What these numbers do not show</h2><ul class="limits">{items}</ul></section>'


def provenance_section(report: Mapping[str, Any]) -> str:
    """Command, commit and device."""
    entries = {
        "Command": f"<code>{escape(report['command'])}</code>",
        "Commit": f"<code>{escape(report['commit'])}</code>",
        "Device": escape(report["device"]),
        "Prompts, seed": f"{report['num_prompts']}, {report['seed']}",
        "Teacher": escape(str(report["teacher"])),
        "Student": escape(str(report["student"])),
    }
    lines = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in entries.items())
    return (
        '<section><h2>How to get these numbers again</h2><p class="note">All of them, and more digits, are in '
        f'<code>report.json</code> beside this page.</p><div class="card"><dl>{lines}</dl></div></section>'
    )
