"""Quality and seconds against the number of steps: a student for each, one for all, and the teacher's own few steps."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from accvideo.analysis.figure import Panel, color, figure, markdown_table, spread_curves, spread_text, whisker_ticks
from accvideo.analysis.folder import PLACES, open_analysis, origin, settings_of, write_results
from accvideo.analysis.students import (
    Evaluation,
    StudentsConfig,
    curves_of,
    curves_panel,
    distill_all,
    metric_cell,
    metric_title,
    scaled,
    student_row,
    sum_up,
    task_of,
    unipc_row,
)
from accvideo.command import choose_device, progress_bar
from accvideo.data.manifest import read_manifest
from accvideo.data.storage import open_storage
from accvideo.evaluate import load_teacher, teacher_rows
from accvideo.inference.student_config import read_student_config
from accvideo.reporting.charts import Plot, log_ticks
from accvideo.reporting.wording import METRICS
from accvideo.training.recipe import DistillConfig
from accvideo.training.steps import student_sweeps
from accvideo.types import UserError

SHOWN = ("all_right", "rerender_psnr_db", "diversity_distance", "latent_mse", "teacher_psnr_db")
"""Metrics of the table and the figure, those that there are."""

ALL_STEPS = "teacher, all steps"
ONE_EACH = "a student for each"
ONE_FOR_ALL = "one student for all"
NOT_TOLD = "one for all, not told how far"
KINDS = (ONE_EACH, ONE_FOR_ALL, NOT_TOLD, "teacher, guided", "teacher, equal calls", "teacher, UniPC")
"""What is compared at each number of steps."""


@dataclass(frozen=True, kw_only=True)
class StepsConfig(StudentsConfig):
    """Distills a student for each number of steps and one for all of them, and evaluates them beside the teacher.

    Of the one for all there are two kinds: told by its timestep how far a step goes, and not told. Either takes as many
    iterations as the students of one number together.

    From one recording, from whose key points each takes those that lie evenly; record every state for the best fit
    (`accvideo record ... --num-steps 50 --num-student-steps 50`). Starts from the preset `playground`. Finished
    students and rows are kept: the same command goes on where a killed run stopped.
    """

    data: Positional[str]
    """Data set that `accvideo record` made."""
    out: Path
    """Folder for students, numbers, table and figure."""
    num_student_steps: tuple[int, ...] = (1, 2, 3, 4, 5, 8, 10)
    """Numbers of steps K."""
    baselines: tuple[Path, ...] = ()
    """`baselines.json` files of `accvideo analyze baselines`: their methods are drawn beside, at their own steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.num_student_steps) < 2 or len(set(self.num_student_steps)) < len(self.num_student_steps):
            raise UserError(f"num_student_steps is {self.num_student_steps}; give at least two numbers, each once")


def steps(config: StepsConfig) -> dict[str, Any]:
    """Distill what is missing, evaluate, and write steps.json, .md and .svg.

    Raises:
        UserError: whatever distillation and evaluation refuse.
    """
    manifest = read_manifest(open_storage(config.data))
    student_sweeps(manifest.num_student_steps, config.num_student_steps)
    methods = [row for path in config.baselines for row in read_baselines(path)]
    config.evaluation(Path()).check_prompts(manifest.teacher)
    settings = settings_of(config, (*PLACES, "baselines"))
    cache = open_analysis(config.out, settings)
    plan = plan_runs(config, cache)
    runs = {run.out: run for kinds in plan.values() for members in kinds.values() for run in members}
    seconds = distill_all(list(runs.values()))
    evaluation = config.evaluation(cache / "report")
    rows = [row for number, kinds in plan.items() for row in evaluate_number(number, kinds, evaluation)]
    # The teacher at all its steps stands beside each number; once is enough.
    rows = [row for row in rows if row["name"] != ALL_STEPS or row["num_student_steps"] == config.num_student_steps[0]]
    results = {
        "command": f"accvideo analyze steps {config.data} --out DIR",
        **origin(choose_device(config.device)),
        "settings": settings,
        "seconds": seconds,
        "rows": rows,
        "baselines": methods,
    }
    return write_results(config.out, "steps", results, steps_table(results), steps_figure(results))


def plan_runs(config: StepsConfig, cache: Path) -> dict[int, dict[str, list[DistillConfig]]]:
    """The configurations of all students by number of steps and kind, one a seed; one for all stands at each number."""

    def runs(name: str, *numbers: int, tell_size: bool = True) -> list[DistillConfig]:
        settings = {"num_student_steps": numbers, "tell_size": tell_size}
        iterations = config.num_iterations * len(numbers)
        return [
            config.run(config.data, cache / f"{name}-{seed}", iterations, seed=seed, **settings)
            for seed in range(config.num_seeds)
        ]

    for_all = {
        ONE_FOR_ALL: runs("all", *config.num_student_steps),
        NOT_TOLD: runs("all-not-told", *config.num_student_steps, tell_size=False),
    }
    return {number: {ONE_EACH: runs(f"steps-{number}", number), **for_all} for number in config.num_student_steps}


def evaluate_number(
    number: int, students: Mapping[str, Sequence[DistillConfig]], evaluation: Evaluation
) -> list[dict[str, Any]]:
    """The rows at one number of steps: the teacher's and all kinds of students, summed up over seeds."""
    own_student = students[ONE_EACH][0].out
    config, student = evaluation.of(own_student), read_student_config(own_student)
    device, task = choose_device(config.device), task_of(config, student)
    with progress_bar() as progress:
        teacher = load_teacher(config, student.teacher, student, device)
        key, rows, _ = teacher_rows(config, task, teacher, student, progress)
        own = {
            kind: [student_row(run.out, number, task, key, device, progress) for run in runs]
            for kind, runs in students.items()
        }
    names = {ALL_STEPS: "teacher", "teacher, guided": "teacher_few", "teacher, equal calls": "teacher_equal_calls"}
    kinds = {kind: [row for row in rows if row["name"] == name] for kind, name in names.items()}
    kinds |= {"teacher, UniPC": [unipc_row(config)], **own}
    return [
        sum_up(kind, members)
        | {
            "num_student_steps": number,
            "seconds_denoising": [row["seconds_denoising"] for row in members],
            "seconds_end_to_end": [row["seconds_end_to_end"] for row in members],
        }
        for kind, members in kinds.items()
        if members  # some schedulers know no single step
    ]


def read_baselines(path: Path) -> list[dict[str, Any]]:
    """The rows of methods in a file of `accvideo analyze baselines`.

    Raises:
        UserError: it is none.
    """
    try:
        results = json.loads(path.read_text("utf-8"))
        rows = [row for row in results["rows"] if row["name"] in results["learning_rates"]]
        return [row | {"num_student_steps": row["num_steps"]} for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no baselines.json of accvideo analyze baselines ({error})") from error


def steps_table(results: Mapping[str, Any]) -> str:
    """All rows in Markdown."""
    rows = results["rows"]
    names = [name for name in SHOWN if any(name in row["metrics"] for row in rows)]
    header = ["K", "", "calls", *map(metric_title, names), "seconds a clip, denoising", "end to end"]
    lines = [
        [
            str(row["num_steps"] if row["name"] == ALL_STEPS else row["num_student_steps"]),
            row["name"],
            str(row["denoiser_calls"]),
            *(metric_cell(name, row) for name in names),
            spread_text(row["seconds_denoising"]),
            spread_text(row["seconds_end_to_end"]),
        ]
        for row in rows
    ]
    settings = results["settings"]
    return (
        f"Mean and deviation of {settings['num_seeds']} students, {settings['num_iterations']} iterations for each "
        f"number of steps; the teacher's rows are single runs.\n\n{markdown_table(header, lines)}"
    )


def steps_figure(results: Mapping[str, Any]) -> str:
    """Each metric and the seconds against the number of steps, and the first metric against the seconds."""
    rows = results["rows"]
    names = [name for name in SHOWN if any(name in row["metrics"] for row in rows)]
    panels = [panel for name in names for panel in metric_panels(name, rows, results["baselines"])]
    return figure([*panels, seconds_panel(rows), trade_panel(rows, names[0])])


def metric_panels(name: str, rows: Sequence[Mapping[str, Any]], baselines: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """A metric against the number of steps: what is compared here and, if there are any, other methods at theirs."""
    found = curves_of(name, rows)
    own = {kind: found[kind] for kind in KINDS if kind in found}
    level = next(((ALL_STEPS, values) for values in found.get(ALL_STEPS, {}).values()), None)
    panels = [curves_panel(name, own, level)]
    if methods := curves_of(name, baselines):
        numbers = {number for curve in methods.values() for number in curve}
        student = {number: values for number, values in own[ONE_EACH].items() if number in numbers}
        panel = curves_panel(name, {ONE_EACH: student} | methods, level, dodge=4)
        panels.append(replace(panel, note=f"{panel.note}; other methods"))
    return panels


def seconds_panel(rows: Sequence[Mapping[str, Any]]) -> Panel:
    """Seconds of denoising a clip against the number of steps."""
    curves = {
        kind: {row["num_student_steps"]: row["seconds_denoising"] for row in rows if row["name"] == kind}
        for kind in KINDS
    }
    values = [value for curve in curves.values() for each in curve.values() for value in each]
    numbers = sorted({row["num_student_steps"] for row in rows})
    limits = (min(values) / 1.2, max(values) * 1.2)
    plot = Plot((numbers[0] / 1.2, numbers[-1] * 1.2), limits, x_log=True, y_log=True)
    chart = plot.svg(spread_curves(plot, curves), "steps (logarithmic)", log_ticks(*limits), numbers, "seconds")
    keys = [(kind, color(number)) for number, kind in enumerate(KINDS)]
    return Panel("Seconds of denoising", "a clip (logarithmic)", chart, keys)


def trade_panel(rows: Sequence[Mapping[str, Any]], name: str) -> Panel:
    """A metric against the seconds of denoising."""
    title, unit = METRICS[name]
    series = {
        kind: [
            (sum(row["seconds_denoising"]) / len(row["seconds_denoising"]), scaled(name, row["metrics"][name]))
            for row in rows
            if row["name"] == kind and name in row["metrics"]
        ]
        for kind in (*KINDS, ALL_STEPS)
    }
    seconds = [second for points in series.values() for second, _ in points]
    limits = (min(seconds) / 1.2, max(seconds) * 1.2)
    ticks = whisker_ticks(each for points in series.values() for _, each in points)
    plot = Plot(limits, (ticks[0], ticks[-1]), x_log=True)
    curves = {kind: {second: each for second, each in sorted(points)} for kind, points in series.items()}
    tints = [*(color(number) for number in range(len(KINDS))), "var(--ink)"]
    chart = plot.svg(spread_curves(plot, curves, tints), "seconds (logarithmic)", ticks, log_ticks(*limits), title)
    keys = list(zip(series, tints, strict=True))
    return Panel(f"{title} against seconds of denoising", unit, chart, keys)
