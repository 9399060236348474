"""Chooses key points from recorded trajectories that kept every state, and measures what each choice leaves to bend.

And what students make of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tyro.conf import Positional

from accvideo.analysis.figure import Panel, color, dot, figure, markdown_table, polyline, spread_curves, whisker_ticks
from accvideo.analysis.folder import PLACES, open_analysis, origin, settings_of, write_results
from accvideo.analysis.grids import Costs, best_grid, best_shift, grid_cost, secant_costs, start_costs
from accvideo.analysis.students import StudentsConfig, distill_all, metric_table, rows_beside_teacher, scaled
from accvideo.command import choose_device
from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.manifest import MANIFEST, Manifest
from accvideo.flow import even_grid
from accvideo.reporting.charts import Plot, log_ticks
from accvideo.reporting.wording import METRICS
from accvideo.training.recipe import DistillConfig
from accvideo.trajectory import Trajectory, write_trajectory, write_whole
from accvideo.types import UserError

Choice = Literal["uniform", "shift", "dynamic"]
CHOICES: tuple[Choice, ...] = ("uniform", "shift", "dynamic")

SHOWN = ("all_right", "latent_mse")
"""Metrics of students in the figure, those that there are."""


@dataclass(frozen=True, kw_only=True)
class KeypointsConfig(StudentsConfig):
    """Chooses key points from trajectories recorded in full: evenly, by a shift, or by dynamic programming.

    Record them with `accvideo record ... --num-steps 50 --num-student-steps 50`. Writes keypoints.json, .md, .svg.
    With `--distill`, students say which choice is best for clips. Finished ones are kept: the same command goes on
    where a killed run stopped.
    """

    data: Positional[Path]
    """Folder of trajectories with every state of the teacher's."""
    out: Path
    """Folder for numbers, table and figure."""
    num_student_steps: tuple[int, ...] = (1, 2, 3, 4, 5, 8, 10)
    """Numbers of steps K."""
    write: Choice | None = None
    """Also write the data set with this choice of key points alone, for `accvideo distill`, to `data-CHOICE-K` in the
    folder, for each K."""
    distill: tuple[int, ...] = ()
    """Numbers K of `num_student_steps` for which students of each choice are distilled and evaluated side by side, by
    the preset `playground`; none: no network runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.num_student_steps or min(self.num_student_steps) < 1:
            raise UserError(f"num_student_steps is {self.num_student_steps}; give numbers from 1")
        if not set(self.distill) <= set(self.num_student_steps):
            raise UserError(f"distill is {self.distill}; choose among num_student_steps, {self.num_student_steps}")


def keypoints(config: KeypointsConfig) -> dict[str, Any]:
    """Choose on the first half of the trajectories, measure on the other, and write numbers, table and figure.

    Raises:
        UserError: the data set lacks states, or has fewer steps than asked for.
    """
    folder = TrajectoryFolder(config.data)
    check_states(folder.manifest, config)
    if config.distill:
        config.evaluation(Path()).check_prompts(folder.manifest.teacher)
    cache = open_analysis(config.out, settings_of(config, (*PLACES, "write")))
    indices = range(len(folder))
    half = len(indices) // 2
    chosen_on, measured_on = (indices[:half], indices[half:]) if half else (indices, indices)
    train, test = (mean_costs(folder, part) for part in (chosen_on, measured_on))
    levels = folder.manifest.sigmas
    rows = [
        measure(choice, grid, train, test) | {"sigmas": [levels[i] for i in grid["keypoints"]]}
        for num_student_steps in config.num_student_steps
        for choice, grid in grids(train["secant"], num_student_steps).items()
    ]
    results = {
        "command": f"accvideo analyze keypoints {config.data} --out DIR",
        **origin(choose_device(config.device) if config.distill else "cpu"),
        "settings": settings_of(config, (*PLACES, "write")),
        "teacher": folder.manifest.teacher,
        "num_steps": folder.manifest.num_steps,
        "num_trajectories": {"chosen_on": len(chosen_on), "measured_on": len(measured_on)},
        "rows": rows,
        "students": [],
    }
    if config.distill:
        wanted = [row for row in rows if row["num_student_steps"] in config.distill]
        results["students"] = compare_students(config, folder, wanted, cache)
    if config.write is not None:
        for row in rows:
            if row["choice"] == config.write:
                out = config.out / f"data-{config.write}-{len(row['keypoints']) - 1}"
                write_part(folder, row["keypoints"], out)
    return write_results(config.out, "keypoints", results, keypoints_table(results), keypoints_figure(results))


def check_states(manifest: Manifest, config: KeypointsConfig) -> None:
    """Refuses a data set without all states, and student steps that it has not enough of.

    Raises:
        UserError: as said.
    """
    num_steps = manifest.num_steps
    if manifest.num_student_steps != num_steps:
        raise UserError(
            f"{config.data} keeps {len(manifest.keypoints)} of {num_steps + 1} states; choosing needs all of them\n"
            f"Record with --num-steps {num_steps} --num-student-steps {num_steps}"
        )
    if max(config.num_student_steps) > num_steps:
        raise UserError(f"num_student_steps is {config.num_student_steps}; the teacher took {num_steps} steps")


def mean_costs(folder: TrajectoryFolder, indices: Sequence[int]) -> dict[str, Costs]:
    """Costs of all steps as means over some trajectories, one read after the other: `secant` and `start`."""
    sigmas = torch.tensor(folder.manifest.sigmas, dtype=torch.float64)
    totals: dict[str, Costs] = {}
    for index in indices:
        states = folder[index].states[None]
        for name, costs in (("secant", secant_costs(states, sigmas)), ("start", start_costs(states, sigmas))):
            totals[name] = totals.get(name, torch.zeros_like(costs)) + costs / len(indices)
    return totals


def grids(costs: Costs, num_student_steps: int) -> dict[Choice, dict[str, Any]]:
    """The three choices of key points for a student, and the relative shift of the second."""
    num_steps = len(costs) - 1
    shifted = best_shift(num_steps, num_student_steps, partial(grid_cost, costs))
    return {
        "uniform": {"keypoints": even_grid(num_steps, num_student_steps)},
        "shift": asdict(shifted),
        "dynamic": {"keypoints": best_grid(costs, num_student_steps)},
    }


def measure(
    choice: Choice, grid: Mapping[str, Any], train: Mapping[str, Costs], test: Mapping[str, Costs]
) -> dict[str, Any]:
    """What a choice leaves: bend as a share of that of a single step, on both halves, and the student's first error."""
    points = grid["keypoints"]
    return {
        "choice": choice,
        "num_student_steps": len(points) - 1,
        **grid,
        "bend": grid_cost(test["secant"], points) / max(float(test["secant"][0, -1]), 1e-30),
        "bend_chosen_on": grid_cost(train["secant"], points) / max(float(train["secant"][0, -1]), 1e-30),
        "start_error": grid_cost(test["start"], points),
    }


def keep_states(trajectory: Trajectory, points: Sequence[int]) -> Trajectory:
    """A trajectory with the states and calls of these of its key points alone."""
    return replace(
        trajectory,
        states=trajectory.states[list(points)],
        calls=tuple(trajectory.calls[i] for i in points[:-1]),
        denoisers=tuple(trajectory.denoisers[i] for i in points[:-1]),
    )


def write_part(folder: TrajectoryFolder, points: Sequence[int], out: Path) -> None:
    """Write the data set with these of its key points alone.

    A student of uneven steps runs by accvideo's own scheduler, so `nested_schedule` is off.
    """
    keypoints = [folder.manifest.keypoints[point] for point in points]
    manifest = replace(folder.manifest, keypoints=keypoints, num_student_steps=len(points) - 1, nested_schedule=False)
    out.mkdir(parents=True, exist_ok=True)
    for index in range(len(folder)):
        write_trajectory(out, replace(keep_states(folder[index], points), settings=manifest.settings))
    write_whole(out / MANIFEST, manifest.to_json().encode())


# Students


def compare_students(
    config: KeypointsConfig, folder: TrajectoryFolder, rows: Sequence[Mapping[str, Any]], cache: Path
) -> list[dict[str, Any]]:
    """Distill what is missing and evaluate: a row for the teacher at all its steps, then one a choice and number."""
    plan = plan_runs(config, rows, cache)
    for row in rows:
        data = data_folder(cache, row)
        if not (data / MANIFEST).exists():
            write_part(folder, row["keypoints"], data)
    # Two choices may be of the same key points.
    runs = {run.out: run for members in plan.values() for run in members}
    distill_all(list(runs.values()))
    kinds = {f"{number}, {choice}": [run.out for run in members] for (number, choice), members in plan.items()}
    teacher, *students = rows_beside_teacher(kinds, config.evaluation(cache / "report"))
    named = zip(plan, students, strict=True)
    return [teacher, *(row | {"choice": choice, "num_student_steps": number} for (number, choice), row in named)]


def plan_runs(
    config: KeypointsConfig, rows: Sequence[Mapping[str, Any]], cache: Path
) -> dict[tuple[int, Choice], list[DistillConfig]]:
    """The configurations of all students by number of steps and choice, one a seed."""

    def run(row: Mapping[str, Any], seed: int) -> DistillConfig:
        return config.run(str(data_folder(cache, row)), cache / f"student-{grid_name(row)}-{seed}", seed=seed)

    return {
        (row["num_student_steps"], row["choice"]): [run(row, seed) for seed in range(config.num_seeds)] for row in rows
    }


def data_folder(cache: Path, row: Mapping[str, Any]) -> Path:
    """The data set with the key points of a row alone."""
    return cache / f"data-{grid_name(row)}"


def grid_name(row: Mapping[str, Any]) -> str:
    """The key points in a file's name."""
    return "-".join(map(str, row["keypoints"]))


# What came out


def keypoints_table(results: Mapping[str, Any]) -> str:
    """The choices, what they leave and what students make of them, in Markdown."""
    rows, students = results["rows"], results["students"]
    header = ["K, choice", "bend left, %", "on the half chosen on, %", "first error", "relative shift", "key points"]
    lines = [
        [
            f"{row['num_student_steps']}, {row['choice']}",
            f"{100 * row['bend']:.3g}",
            f"{100 * row['bend_chosen_on']:.3g}",
            f"{row['start_error']:.3g}",
            f"{row['shift']:.3g}" if "shift" in row else "–",
            " ".join(map(str, row["keypoints"])),
        ]
        for row in rows
    ]
    text = (
        "Bend: the squared difference of the teacher's velocity and the student's straight steps, over all noise "
        "levels, as a share of that of one straight step from noise to video; on trajectories that the key points "
        "were not chosen on.\nFirst error: mean squared distance from the teacher's states where the teacher's own "
        f"velocity leads, summed over the steps.\n\n{markdown_table(header, lines)}"
    )
    if students:
        settings = results["settings"]
        text += (
            f"\nStudents, mean and deviation of {settings['num_seeds']} of {settings['num_iterations']} iterations "
            f"each:\n\n{metric_table(students)}"
        )
    return text


def keypoints_figure(results: Mapping[str, Any]) -> str:
    """Both errors against the number of steps, where the key points are, and what students make of them."""
    rows = results["rows"]
    panels = [
        error_panel(rows, "bend", "Bend left by straight steps", "share of a single step's; lower is better"),
        error_panel(rows, "start_error", "Error before any training", "mean squared, summed over steps"),
    ]
    panels += [place_panel(rows, choice) for choice in CHOICES]
    students = [row for row in results["students"] if "choice" in row]
    panels += [student_panel(students, name) for name in SHOWN if students and name in students[0]["metrics"]]
    return figure(panels)


def error_panel(rows: Sequence[Mapping[str, Any]], name: str, title: str, note: str) -> Panel:
    """One error against the number of steps, a curve a choice."""
    points = {
        choice: [(row["num_student_steps"], row[name]) for row in rows if row["choice"] == choice and row[name] > 0]
        for choice in CHOICES
    }
    values = [y for curve in points.values() for _, y in curve] or [1.0]
    numbers = sorted({row["num_student_steps"] for row in rows})
    limits = (min(values) / 1.3, max(values) * 1.3)
    plot = Plot((numbers[0] / 1.2, numbers[-1] * 1.2), limits, x_log=True, y_log=True)
    marks = "".join(polyline(plot, curve, color(i)) for i, curve in enumerate(points.values()) if curve)
    chart = plot.svg(marks, "steps of the student (logarithmic)", log_ticks(*limits), numbers, title)
    return Panel(title, note, chart, [(choice, color(i)) for i, choice in enumerate(CHOICES)])


def student_panel(students: Sequence[Mapping[str, Any]], name: str) -> Panel:
    """A metric of the students against the number of steps, a curve a choice."""
    title, unit = METRICS[name]
    curves = {
        choice: {
            row["num_student_steps"]: scaled(name, row["metrics"][name]) for row in students if row["choice"] == choice
        }
        for choice in CHOICES
    }
    numbers = sorted({row["num_student_steps"] for row in students})
    ticks = whisker_ticks(each for curve in curves.values() for each in curve.values())
    plot = Plot((numbers[0] / 1.2, numbers[-1] * 1.2), (ticks[0], ticks[-1]), x_log=True)
    chart = plot.svg(spread_curves(plot, curves), "steps of the student (logarithmic)", ticks, numbers, title)
    return Panel(f"Students: {title.lower()}", unit, chart, [(choice, color(i)) for i, choice in enumerate(CHOICES)])


def place_panel(rows: Sequence[Mapping[str, Any]], choice: Choice) -> Panel:
    """The noise levels of the key points for each number of steps."""
    mine = [row for row in rows if row["choice"] == choice]
    numbers = [row["num_student_steps"] for row in mine]
    plot = Plot((1, 0), (0, len(mine)))
    tint, marks = color(CHOICES.index(choice)), ""
    for number, row in enumerate(mine):
        height = len(mine) - number - 0.5
        marks += f'<text x="38" y="{plot.y(height) + 4:.1f}" text-anchor="end">{numbers[number]}</text>'
        marks += "".join(dot(plot, sigma, height, tint) for sigma in row["sigmas"])
    chart = plot.svg(marks, "noise level", (), (1, 0.8, 0.6, 0.4, 0.2, 0), f"key points, {choice}")
    return Panel(f"Key points, {choice}", "one row for each number of steps", chart)
