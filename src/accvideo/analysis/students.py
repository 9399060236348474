"""Several students of each kind beside their teacher: the project's own report of all of them, summed up by kind."""

import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from diffusers import UniPCMultistepScheduler
from rich.progress import Progress

from accvideo.analysis.figure import (
    Panel,
    color,
    figure,
    markdown_table,
    mean_and_spread,
    polyline,
    spread_curves,
    spread_text,
    whisker_ticks,
)
from accvideo.command import choose_device, progress_bar
from accvideo.distill import distill
from accvideo.evaluate import choose_prompts, evaluate, load_teacher, row_folder
from accvideo.inference.model import load_model, with_scheduler
from accvideo.inference.student_config import StudentConfig, read_student_config
from accvideo.reporting.charts import Plot, nice_ticks
from accvideo.reporting.config import EvaluateConfig
from accvideo.reporting.rows import Plan, Task, make_row, row_key, run_row
from accvideo.reporting.wording import METRICS
from accvideo.teacher import PLAYGROUND_TEACHER, teacher_path
from accvideo.training.checkpoint import read_metrics
from accvideo.training.recipe import DistillConfig, playground
from accvideo.types import UserError

Row = Mapping[str, Any]
"""A kind of model: name, num_steps, denoiser_calls, and by metric the values of all its students."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How students are evaluated."""

    out: Path
    """Folder of the report."""
    num_prompts: int
    prompts: Path | None
    """As for `accvideo evaluate`."""
    seed: int
    """Of prompts and noise."""
    device: str
    rows: Path | None
    """As for `accvideo evaluate`."""

    def of(self, student: Path, *also: Path) -> EvaluateConfig:
        """The settings with which `accvideo evaluate` does so."""
        return EvaluateConfig(
            student=str(student),
            also=tuple(map(str, also)),
            out=self.out,
            num_prompts=self.num_prompts,
            prompts=self.prompts,
            seed=self.seed,
            device=self.device,
            rows=self.rows,
        )

    def check_prompts(self, teacher: str) -> None:
        """Refuse before any training what the evaluation would refuse after it.

        Raises:
            UserError: the prompts cannot be read, or are needed and not given.
        """
        choose_prompts(self.of(Path()), teacher_path(teacher) == PLAYGROUND_TEACHER)


@dataclass(frozen=True, kw_only=True)
class StudentsConfig:
    """What analyses that distill students by the preset `playground` are asked for alike."""

    num_seeds: int = 3
    """Students of each kind."""
    num_iterations: int = 200
    """Iterations of each student; the adversarial half takes part from 60 % of them on."""
    batch_size: int = 16
    """Trajectories an iteration."""
    num_prompts: int = 500
    """Clips of each row."""
    prompts: Path | None = None
    """As for `accvideo evaluate`; needed where the teacher is not the playground's."""
    rows: Path | None = None
    """As for `accvideo evaluate`: analyses that share it make the teacher's clips once."""
    compile: bool = False
    """As for `accvideo distill`."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one."""

    def __post_init__(self) -> None:
        for name in ("num_seeds", "num_iterations", "batch_size", "num_prompts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")

    def run(self, data: str, out: Path, num_iterations: int | None = None, **changes: Any) -> DistillConfig:
        """The distillation of one student; the iterations, if others than `self.num_iterations`, and other changes."""
        iterations = num_iterations or self.num_iterations
        settings = {
            "num_iterations": iterations,
            "batch_size": self.batch_size,
            "adversarial_start": round(0.6 * iterations),
            "num_validation": 0,
            "compile": self.compile,
            "device": self.device,
        }
        return replace(playground(data, out), **settings | changes)

    def evaluation(self, out: Path) -> Evaluation:
        """How its students are evaluated."""
        return Evaluation(
            out=out,
            num_prompts=self.num_prompts,
            prompts=self.prompts,
            seed=0,
            device=self.device,
            rows=self.rows,
        )


def distill_all(runs: Sequence[DistillConfig]) -> dict[str, float]:
    """Distill the students that are not there yet; the seconds of each one's iterations, by the name of its folder."""
    missing = [run for run in runs if not (run.out / "student.json").exists()]
    began, done, total = time.perf_counter(), 0, sum(run.num_iterations for run in missing)
    for number, run in enumerate(missing):
        distill(run)
        done += run.num_iterations
        minutes = (time.perf_counter() - began) / done * (total - done) / 60
        print(f"{number + 1} of {len(missing)} students; about {minutes:.0f} minutes for the others", file=sys.stderr)
    lines = {run.out.name: read_metrics(run.out / "metrics.jsonl") for run in runs}
    return {name: sum(line.get("seconds", 0.0) for line in each) for name, each in lines.items()}


def evaluate_kinds(kinds: Mapping[str, Sequence[Path]], evaluation: Evaluation) -> list[dict[str, Any]]:
    """The teacher's rows, then one for each kind of student with the values of all its students.

    Args:
        kinds: folders of students by kind; all of one teacher, key points and number of steps.
        evaluation: how they are evaluated.
    """
    config = evaluation.of(*(folder for students in kinds.values() for folder in students))
    rows = evaluate(config)["rows"]
    teachers = [row for row in rows if row["name"].startswith("teacher")]
    students = iter([row for row in rows if not row["name"].startswith("teacher")])
    groups = {row["name"]: [row] for row in [*teachers, unipc_row(config)]}
    groups |= {kind: [next(students) for _ in members] for kind, members in kinds.items()}
    return [sum_up(name, members) for name, members in groups.items()]


def rows_beside_teacher(kinds: Mapping[str, Sequence[Path]], evaluation: Evaluation) -> list[dict[str, Any]]:
    """One row for each kind of student, measured beside their teacher at all its steps, whose row comes first.

    Args:
        kinds: folders of students by kind; all of one teacher, those of a kind of one number of steps.
        evaluation: how they are evaluated.
    """
    own_student = next(iter(kinds.values()))[0]
    config, student = evaluation.of(own_student), read_student_config(own_student)
    device, task = choose_device(config.device), task_of(config, student)
    with progress_bar() as progress:
        teacher = load_teacher(config, student.teacher, student, device)
        full = Plan("teacher", teacher.num_steps, teacher.guidance_scale, is_teacher=True)
        key = row_key(teacher, full, task, None)
        rows = [sum_up(full.name, [make_row(teacher, full, task, run_row(teacher, full, task, None, progress))])]
        for kind, folders in kinds.items():
            members = [student_row(folder, None, task, key, device, progress) for folder in folders]
            rows.append(sum_up(kind, members))
    return rows


def student_row(
    folder: Path, num_steps: int | None, task: Task, teacher_key: str, device: str, progress: Progress
) -> dict[str, Any]:
    """The row of a student at a number of its steps; None: its own."""
    model = load_model(str(folder), device=device)
    plan = Plan(folder.name, num_steps or model.num_steps, model.guidance_scale, is_teacher=False)
    return make_row(model, plan, task, run_row(model, plan, task, teacher_key, progress))


def sum_up(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """One row of several students of a kind."""
    metrics: dict[str, list[float]] = {}
    for row in rows:
        for metric, estimate in row["metrics"].items():
            if estimate is not None:
                metrics.setdefault(metric, []).append(estimate["mean"])
    numbers = {key: rows[0][key] for key in ("num_steps", "denoiser_calls")}
    return {"name": name, **numbers, "metrics": metrics}


def unipc_row(config: EvaluateConfig) -> dict[str, Any]:
    """The teacher with its guidance, by a second-order solver at the students' number of steps.

    UniPC (Zhao et al. 2023, arXiv:2302.04867) on the noise levels that its own scheduler makes of the teacher's
    settings; a row of the report that is in the folder already.
    """
    student, device = read_student_config(Path(config.student)), choose_device(config.device)
    teacher, task = load_teacher(config, student.teacher, student, device), task_of(config, student)
    full = Plan("teacher", teacher.num_steps, teacher.guidance_scale, is_teacher=True)
    key = row_key(teacher, full, task, None)
    settings: Any = UniPCMultistepScheduler.from_config(teacher.pipeline.scheduler.config)
    plain = {name: value for name, value in settings.config.items() if not name.startswith("_")}
    model = with_scheduler(teacher, {"class": type(settings).__name__, "config": plain})
    plan = replace(full, name="teacher_unipc", num_steps=student.num_steps)
    with progress_bar() as progress:
        return make_row(model, plan, task, run_row(model, plan, task, key, progress))


def task_of(config: EvaluateConfig, student: StudentConfig) -> Task:
    """What `accvideo evaluate` has in common for all rows of a report in a folder that is there already."""
    is_judged = teacher_path(student.teacher) == PLAYGROUND_TEACHER
    return Task(
        prompts=choose_prompts(config, is_judged),
        seed=config.seed,
        batch_size=config.batch_size or (16 if is_judged else 1),
        dtype=config.dtype,
        is_judged=is_judged,
        rows=row_folder(config),
    )


def scaled(name: str, values: Sequence[float]) -> list[float]:
    """Values of a metric in the unit of the report."""
    return [100 * value for value in values] if METRICS[name][1] == "%" else list(values)


def metric_title(name: str) -> str:
    """A metric as the head of a column."""
    title, unit = METRICS[name]
    return f"{title}, {unit[:2].strip()}" if unit.startswith(("%", "dB")) else title


def metric_cell(name: str, row: Row) -> str:
    """A metric of a row in a table, in as many digits as its spread leaves meaning to."""
    if name not in row["metrics"]:
        return "–"
    return spread_text(scaled(name, row["metrics"][name]), 1 if METRICS[name][1].startswith(("%", "dB")) else 3)


def metric_table(rows: Sequence[Row]) -> str:
    """All metrics of all rows in Markdown."""
    names = [name for name in METRICS if any(name in row["metrics"] for row in rows)]
    header = ["", "steps", "calls", *map(metric_title, names)]
    lines = [
        [row["name"], str(row["num_steps"]), str(row["denoiser_calls"]), *(metric_cell(name, row) for name in names)]
        for row in rows
    ]
    return markdown_table(header, lines)


def metric_figure(rows: Sequence[Row]) -> str:
    """A panel for each metric, in which each row has a line with its mean and spread."""
    shown = {name: [row for row in rows if name in row["metrics"]] for name in METRICS}
    return figure([metric_panel(name, each) for name, each in shown.items() if len(each) > 1])


def metric_panel(name: str, rows: Sequence[Row]) -> Panel:
    """A metric of all rows, one below the other. A row far from all students is named by its value at the edge."""
    title, unit = METRICS[name]
    values = [scaled(name, row["metrics"][name]) for row in rows]
    is_student = [not row["name"].startswith("teacher") for row in rows]
    low, high = readable_range(values, is_student)
    high = min(high, 100) if unit == "%" else high
    ticks = nice_ticks(low if low < high else low - 1, high)
    left, right, pitch = 172, 408, 234 / len(rows)

    def place(value: float) -> float:
        return left + (right - left) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    marks = "".join(
        f'<line class="axis" x1="{place(tick):.1f}" x2="{place(tick):.1f}" y1="4" y2="242"/>'
        f'<text x="{place(tick):.1f}" y="258" text-anchor="middle">{tick:g}</text>'
        for tick in ticks
    )
    for number, (row, each) in enumerate(zip(rows, values, strict=True)):
        (mean, spread), y, tint = mean_and_spread(each), 6 + pitch * (number + 0.5), color(int(is_student[number]))
        size = f'style="font-size: {min(12, pitch - 1):.1f}px"'
        marks += f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end" {size}>{escape(row["name"])}</text>'
        if ticks[0] <= mean <= ticks[-1]:
            ends = (place(max(mean - spread, ticks[0])), place(min(mean + spread, ticks[-1])))
            marks += f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{tint}"/>'
            marks += f'<circle cx="{place(mean):.1f}" cy="{y:.1f}" r="3.5" fill="{tint}"/>'
        else:
            text, x, side = (f"‹ {mean:.3g}", left, "start") if mean < ticks[0] else (f"{mean:.3g} ›", right, "end")
            marks += f'<text x="{x}" y="{y + 4:.1f}" text-anchor="{side}" fill="{tint}" {size}>{text}</text>'
    chart = f'<svg viewBox="0 0 440 272" role="img" aria-label="{escape(title)}">{marks}</svg>'
    return Panel(title, unit, chart, [("teacher", color(0)), ("students", color(1))])


def curves_of(name: str, rows: Sequence[Row]) -> dict[str, dict[float, list[float]]]:
    """A metric by the name of a row and its `num_student_steps`, which rise, in the unit of the report."""
    curves: dict[str, dict[float, list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["num_student_steps"]):
        if name in row["metrics"]:
            curves.setdefault(row["name"], {})[row["num_student_steps"]] = scaled(name, row["metrics"][name])
    return curves


def curves_panel(
    name: str,
    curves: Mapping[str, Mapping[float, Sequence[float]]],
    level: tuple[str, Sequence[float]] | None,
    dodge: float = 0,
) -> Panel:
    """A metric against the number of steps.

    Args:
        name: of the metric.
        curves: as `curves_of` makes them.
        level: name and values of what has no number of steps to stand at: a level line, unless it is further from the
            curves than they reach.
        dodge: see `spread_curves`.
    """
    title, unit = METRICS[name]
    most = 100 if unit == "%" else math.inf
    shown = [values for curve in curves.values() for values in curve.values()]
    low, high = min(map(statistics.fmean, shown)), max(map(statistics.fmean, shown))
    height = statistics.fmean(level[1]) if level else math.inf
    is_near = low - (high - low) <= height <= high + (high - low)
    ticks = whisker_ticks([*shown, [height]] if is_near else shown, most)
    numbers = sorted({number for curve in curves.values() for number in curve})
    edges = (numbers[0] / 1.2, numbers[-1] * 1.2)
    plot = Plot(edges, (ticks[0], ticks[-1]), x_log=True)
    marks = spread_curves(plot, curves, dodge=dodge)
    keys = [(kind, color(number)) for number, kind in enumerate(curves)]
    if level and is_near:
        marks += polyline(plot, [(edge, height) for edge in edges], "var(--ink)", 1, 0.6)
        keys.append((level[0], "var(--ink)"))
    return Panel(title, unit, plot.svg(marks, "steps (logarithmic)", ticks, numbers, title), keys)


def readable_range(values: Sequence[Sequence[float]], is_student: Sequence[bool]) -> tuple[float, float]:
    """A range in which students can be told apart: theirs, and all rows no further from it than twice its size."""
    ends = [(mean - spread, mean + spread) for mean, spread in map(mean_and_spread, values)]
    own = [pair for pair, student in zip(ends, is_student, strict=True) if student] or ends
    low, high = min(pair[0] for pair in own), max(pair[1] for pair in own)
    reach = 2 * (high - low)
    near = [pair for pair in ends if low - reach <= pair[0] and pair[1] <= high + reach]
    return min(pair[0] for pair in near), max(pair[1] for pair in near)
