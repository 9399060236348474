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

from accvideo.reporting.charts import Curves, binned, legend, line_chart, quality_chart
from accvideo.reporting.vbench import vbench_section, vbench_sentence
from accvideo.reporting.wording import (
    METRICS,
    Row,
    difference_text,
    interval_text,
    label,
    metric_text,
    number,
    ordered,
    row_named,
    seconds_text,
    shown_rows,
)
from accvideo.video import Frames

SPRITE_WIDTH = 192
"""Widest clip of the page in pixels; wider ones are made smaller."""
SPRITE_FRAMES = 41
"""Most frames of a clip on the page; of longer ones, evenly spaced frames are shown."""
NUM_LARGE = 4
"""Number of prompts whose clips are shown large; the others share lines."""


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
        vbench_section(report),
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


# The first screen


def title(report: Mapping[str, Any]) -> str:
    """The page's title in plain text."""
    teacher, student = row_named(report["rows"], "teacher"), row_named(report["rows"], "student")
    speedup = number(report["speedup"]["end_to_end"])
    return f"{student['denoiser_calls']} calls instead of {teacher['denoiser_calls']}, {speedup}× faster"


def headline(report: Mapping[str, Any]) -> str:
    """Title and the sentence that sums the numbers up."""
    rows = report["rows"]
    teacher, student = row_named(rows, "teacher"), row_named(rows, "student")
    equal = [row for row in rows if row["name"] == "teacher_equal_calls"]
    if student["metrics"]["all_right"] is None:
        name, verb = "latent_mse", "ends at a mean squared distance of {} from the teacher's own result"
        result = f"From the same noise, the student {verb.format(_bold(name, student))}"
        result += "".join(f"; the teacher given {row['denoiser_calls']} calls, at {_bold(name, row)}" for row in equal)
        result += "."
    else:
        result = (
            f"The student gets every property of its prompt right in {_bold('all_right', student)} of clips, the "
            f"teacher in {_bold('all_right', teacher)}, and the teacher given the student's "
            f"{student['denoiser_calls']} calls in {_bold('all_right', equal[0])}."
        )
    names = f"{escape(str(report['student']))} distilled from {escape(str(report['teacher']))}"
    return (
        f'<p class="kicker"><b>accvideo</b> · {names}</p>\n<h1>{escape(title(report))}</h1>\n'
        f'<p class="lead">{result} All rows start from the same {report["num_prompts"]} prompts and the same noise.'
        f"{vbench_sentence(report)}</p>"
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
            interval_text(last, student["metrics"][last])
            + (f", teacher {metric_text(last, teacher['metrics'][last])}" if last == "all_right" else ""),
        ),
    ]
    blocks = [
        f'<div class="tile{" main" if i == 0 else ""}"><strong>{value}</strong><span>{what}</span>'
        f"<small>{detail}</small></div>"
        for i, (value, what, detail) in enumerate(contents)
    ]
    return f'<div class="tiles">{"".join(blocks)}</div>'


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


# Numbers


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
        '<p class="note">Means, and 95 % intervals below them: Wilson for shares of clips, bootstrap otherwise. '
        "With a sign: how far above the teacher's first column, clip by clip on the same prompts and noise, and the "
        "interval of that; bold where it leaves out 0.</p>"
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
            text = f"{metric_text(metric, estimate)}<small>{interval_text(metric, estimate)}</small>"
            if metric in (differences := row.get("differences", {})):
                text += f"<small>{difference_text(metric, differences[metric])}</small>"
            return text

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


LOSSES = {
    "trajectory": "The trajectory loss pulls the student's step to the secant of the teacher's trajectory.",
    "consistency": "The consistency loss pulls the student, from noised videos, to where one step of the teacher and "
    "the student's own way on lead.",
    "correction": "The correction loss takes from the student's videos what the teacher would mend in them, and would "
    "not in its own.",
}
"""What is learned by a loss."""


def training_section(training_log: Sequence[Mapping[str, Any]]) -> str:
    """Loss curves by key point and accuracy of the discriminator's heads."""
    kinds = [name for name in LOSSES if any(f"{name}_loss" in line for line in training_log)]
    kind = kinds[-1] if kinds else "trajectory"
    losses = line_chart(
        f"{kind.capitalize()} loss",
        "mean squared error of the velocity, logarithmic; dotted: trajectory loss of held-out trajectories",
        curves(training_log, lambda line: line[f"{kind}_loss"]),
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
        '<section><h2>Training</h2><p class="note">Each curve is one key point, 0 at the noise. '
        f"{LOSSES[kind]}{adversarial}</p>"
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
