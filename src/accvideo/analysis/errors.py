"""Which of its steps a student goes wrong in: it takes over from the teacher's recorded states at each key point."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from tyro.conf import Positional

from accvideo.analysis.coverage import curve_panel, interval, judged
from accvideo.analysis.figure import figure, markdown_table
from accvideo.analysis.folder import open_analysis, origin, settings_of, write_results
from accvideo.call import replay
from accvideo.command import choose_device, progress_bar
from accvideo.data.dataset import TrajectoryFolder
from accvideo.flow import euler_step
from accvideo.generate import batches
from accvideo.inference.model import student_folder
from accvideo.inference.student_config import StudentConfig, read_student_config
from accvideo.student import load_student
from accvideo.teacher import PLAYGROUND_TEACHER, denoisers, teacher_path
from accvideo.trajectory import TrajectoryBatch, collate_trajectories
from accvideo.types import Latents, UserError


@dataclass(frozen=True, kw_only=True)
class ErrorsConfig:
    """Says in which of its steps a student goes wrong, and what comes of it.

    The student takes over from the teacher's recorded states: at the noise, which is what it does by itself, and at
    each later key point. What a later start gains is what the steps before it cost. Takes K (K + 1) / 2 denoiser calls
    for each trajectory and none of the teacher's. Writes errors.json, .md, .svg.
    """

    data: Positional[str]
    """Data set that `accvideo record` made, with the students' key points; best of prompts they were not trained on."""
    students: tuple[str, ...]
    """Students to look at: folders, or `playground-student`."""
    out: Path
    """Folder for numbers, table and figure."""
    num_trajectories: int = 256
    """Trajectories from the beginning of the data set."""
    batch_size: int = 16
    """Trajectories at a time."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one."""

    def __post_init__(self) -> None:
        for name in ("num_trajectories", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not self.students:
            raise UserError("students is empty; give one or more")


def errors(config: ErrorsConfig) -> dict[str, Any]:
    """Follow every student from every key point, and write errors.json, .md and .svg.

    Raises:
        UserError: a student is of another teacher, or of key points that the data set lacks.
    """
    folder = TrajectoryFolder(config.data)
    places = {name: recorded_places(name, folder) for name in config.students}
    indices = range(min(config.num_trajectories, len(folder)))
    if len(indices) < 2:
        raise UserError(f"{config.data} holds one trajectory; errors are shares of the distance of two videos")
    open_analysis(config.out, settings_of(config))
    device = choose_device(config.device)
    with progress_bar() as progress:
        students = [
            {"name": name, "rows": follow_student(name, points, folder, indices, config.batch_size, device, progress)}
            for name, points in places.items()
        ]
    results = {
        "command": f"accvideo analyze errors {config.data} --out DIR --students {' '.join(config.students)}",
        **origin(device),
        "settings": settings_of(config),
        "num_trajectories": len(indices),
        "students": students,
    }
    return write_results(config.out, "errors", results, errors_table(results), errors_figure(results))


def recorded_places(name: str, folder: TrajectoryFolder) -> list[int]:
    """Where the key points of a student lie among those of a data set.

    Raises:
        UserError: they do not, or the student is of another teacher or of several numbers of steps.
    """
    student, manifest = read_student_config(student_folder(name)), folder.manifest
    if student.fingerprints != manifest.fingerprints:
        raise UserError(f"{name} is a student of {student.teacher}, and the data set is of {manifest.teacher}")
    if student.other_num_steps:
        raise UserError(f"{name} takes several numbers of steps; give students of one")
    gaps = (torch.tensor(student.sigmas)[:, None] - manifest.key_sigmas).abs()
    if float(gaps.min(1).values.max()) > 1e-4:
        raise UserError(
            f"the data set lacks key points of {name}, whose noise levels are {levels(student)}\n"
            f"It has {', '.join(f'{sigma:.4g}' for sigma in manifest.key_sigmas)}; record with its number of steps"
        )
    return gaps.argmin(1).tolist()


def levels(student: StudentConfig) -> str:
    """The noise levels of a student in words."""
    return ", ".join(f"{sigma:.4g}" for sigma in student.sigmas)


@torch.no_grad()
def follow_student(
    name: str,
    points: Sequence[int],
    folder: TrajectoryFolder,
    indices: range,
    batch_size: int,
    device: str,
    progress: Progress,
) -> list[dict[str, Any]]:
    """One row for each key point at which the student takes over; the last one, the video, leaves it nothing to do.

    "error" is the mean squared distance of the latents it arrives at from the recorded video's, "step_error" that of
    the state after its first step from the recorded one, both as shares of the distance of two recorded videos. Where
    clips can be judged, "all_right" is the share of right ones.
    """
    pipeline, _ = load_student(student_folder(name), device=device)
    modules = denoisers(pipeline)
    bar = progress.add_task(name, total=len(indices))
    ends: list[list[Latents]] = [[] for _ in points]
    step_errors = torch.zeros(len(points) - 1)
    for block in batches(len(indices), batch_size):
        batch = collate_trajectories([folder[indices[i]] for i in block]).to(device)
        for k in range(len(points)):
            states = take_over(modules, batch, folder.manifest.key_sigmas.tolist(), points[k:])
            ends[k].append(states[-1].cpu())
            if k + 1 < len(points):
                missed = states[1] - batch.state(points[k + 1])
                step_errors[k] += missed.square().mean().cpu() * len(block) / len(indices)
        progress.advance(bar, len(block))
    reached = [torch.cat(each) for each in ends]
    videos, prompts = reached[-1], [folder[index].prompt for index in indices]
    apart = float((videos - videos.roll(1, 0)).square().mean())
    is_judged = teacher_path(folder.manifest.teacher) == PLAYGROUND_TEACHER
    return [
        {
            "sigma": float(folder.manifest.key_sigmas[point]),
            "error": float((reached[k] - videos).square().mean()) / apart,
            "step_error": float(step_errors[k]) / apart if k + 1 < len(points) else None,
            **judged(pipeline if is_judged else None, reached[k], prompts, batch_size),
        }
        for k, point in enumerate(points)
    ]


def take_over(
    modules: Mapping[str, torch.nn.Module], batch: TrajectoryBatch, sigmas: Sequence[float], points: Sequence[int]
) -> list[Latents]:
    """The states of a student that goes from the recorded state at the first of some key points to the last."""
    states = [batch.state(points[0])]
    for start, end in zip(points[:-1], points[1:], strict=True):
        velocity = replay(modules[batch.denoisers[start]], batch.call(start), states[-1])
        states.append(euler_step(states[-1], velocity, sigmas[start], sigmas[end]))
    return states


# What came out


def errors_table(results: Mapping[str, Any]) -> str:
    """Each student's rows in Markdown."""
    header = ["the student takes over at noise level", "error after one step, %", "error of the video, %", "right, %"]
    text = (
        f"From the recorded states of {results['num_trajectories']} trajectories. Errors are mean squared distances as "
        "shares of that of two videos; the last row of a student is the teacher's own videos.\n"
    )
    for student in results["students"]:
        lines = [
            [
                f"{row['sigma']:.3g}",
                "–" if row["step_error"] is None else f"{100 * row['step_error']:.3f}",
                f"{100 * row['error']:.2f}",
                interval(row["all_right"]) if "all_right" in row else "–",
            ]
            for row in student["rows"]
        ]
        text += f"\n{student['name']}:\n\n{markdown_table(header, lines)}"
    return text


def errors_figure(results: Mapping[str, Any]) -> str:
    """Errors, and right clips where they are judged, against the noise level at which the student takes over."""

    def curves(name: str, scale: float) -> dict[str, list[tuple[float, float]]]:
        def value(row: Mapping[str, Any]) -> float | None:
            found = row.get(name)
            return found["mean"] if isinstance(found, Mapping) else found

        return {
            student["name"]: [
                (row["sigma"], scale * found) for row in student["rows"] if (found := value(row)) is not None
            ]
            for student in results["students"]
        }

    note = "% of two videos' distance, by where the student takes over"
    panels = [
        curve_panel("Error of the video", note, curves("error", 100)),
        curve_panel("Error after one step", note, curves("step_error", 100)),
    ]
    right = curves("all_right", 100)
    if any(right.values()):
        panels.append(curve_panel("Right clips", "%, by where the student takes over", right))
    return figure(panels)
