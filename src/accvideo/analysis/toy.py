"""The paper's 1-D study of useless data points (arXiv:2503.19462, section 3.2 and supplement A), and what it left out.

A teacher learns the flow from N(0, 1) to the two points -3 and +3. Students are distilled from it by PeRFlow's recipe
on data that does not match, by AccVideo's losses, and by distribution matching with and without such data.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor

from accvideo.analysis.figure import markdown_table, spread_text
from accvideo.analysis.folder import open_analysis, origin, settings_of, write_results
from accvideo.analysis.line import DATA, exact_velocity, moved_data, trajectories, useless_share
from accvideo.analysis.networks import Points, VelocityNetworks, generator
from accvideo.analysis.toy_figure import toy_figure
from accvideo.analysis.toy_training import (
    Students,
    Study,
    record,
    renoised_steps,
    train_accvideo,
    train_dmd,
    train_perflow,
    train_teacher,
)
from accvideo.command import progress_bar
from accvideo.metrics import wasserstein_distance
from accvideo.types import UserError

PAPER_SHARES = {0.0: 0.0078, 0.75: 0.0679, 1.5: 0.1743, 2.25: 0.2693, 3.0: 0.2906}
"""Frequency of useless data points by degree of mismatch M, Figure 2 (e). The paper's text names M = 0, 1.5 and 3 only;
the two between are inferred."""

TOLERANCES = (0.01, 0.03, 0.1)
"""Distances from the nearest trajectory beyond which a point counts as useless. The paper gives none."""

NUM_COVERING = 2048
"""Trajectories that a point may lie on: the teacher's batch."""

NUM_SAMPLES = 16_384
"""Points drawn from each student and its teacher."""


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Repeats the paper's 1-D study, with AccVideo's own loss and distribution matching; writes toy.json, .md, .svg."""

    out: Path
    """Folder for numbers, table and figure; the same command again goes on where a killed run stopped."""
    num_seeds: int = 5
    """Teachers, each with a student of every kind."""
    teacher_iterations: int = 10_000
    """Updates of each teacher (the paper's number)."""
    iterations: int = 1500
    """Updates of each student, of 256 samples."""
    num_trajectories: int = 8192
    """Recorded trajectories for each seed."""

    def __post_init__(self) -> None:
        least = {"num_seeds": 1, "teacher_iterations": 1, "iterations": 5, "num_trajectories": 2}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise UserError(f"{name} is {getattr(self, name)}; the least is {number}")


@dataclass(frozen=True)
class Trained:
    """All networks of the study."""

    teacher: VelocityNetworks
    perflow: Students
    accvideo: Students
    dmd: Students
    seconds: dict[str, float]


def toy(config: ToyConfig) -> dict[str, Any]:
    """Run the study, or the rest of it, and write its numbers, table and figure.

    Raises:
        UserError: the folder holds something else.
    """
    study = Study(
        seeds=tuple(range(config.num_seeds)),
        teacher_iterations=config.teacher_iterations,
        iterations=config.iterations,
        num_trajectories=config.num_trajectories,
    )
    cache = open_analysis(config.out, settings_of(config))
    if not cache.exists():
        print(f"about {estimate_seconds(study) / 60:.1f} minutes on this machine", file=sys.stderr)
    with progress_bar() as progress:
        trained = train_all(study, cache, progress)
    states = record(study, trained.teacher)
    samples = draw_samples(study, trained)
    results = {
        "command": "accvideo analyze toy --out DIR",
        **origin(),
        "seeds": list(study.seeds),
        "seconds": trained.seconds,
        "settings": asdict(study),
        "teacher": teacher_numbers(study, trained.teacher),
        "useless": useless_numbers(study, states),
        "models": model_numbers(trained, samples),
    }
    figure = toy_figure(study, trained.teacher, states, samples, results)
    return write_results(config.out, "toy", results, toy_table(results), figure)


def train_all(study: Study, cache: Path, progress: Progress) -> Trained:
    """Teacher and students of all seeds."""
    teacher, seconds = train_teacher(study, cache, progress)
    perflow = train_perflow(study, teacher, cache, progress)
    accvideo = train_accvideo(study, teacher, record(study, teacher), cache, progress)
    dmd = train_dmd(study, teacher, cache, progress)
    each = {"PeRFlow": perflow.seconds, "AccVideo": accvideo.seconds, "DMD": dmd.seconds}
    return Trained(teacher, perflow, accvideo, dmd, {"teacher": seconds, **each})


def estimate_seconds(study: Study) -> float:
    """How long the study will take, from a few iterations of each part."""
    short = replace(study, teacher_iterations=10, iterations=10, num_trajectories=study.batch_size)
    with TemporaryDirectory() as folder, Progress(disable=True) as progress:
        seconds = train_all(short, Path(folder), progress).seconds
    students = sum(seconds.values()) - seconds["teacher"]
    return (seconds["teacher"] * study.teacher_iterations + students * study.iterations) / 10


@torch.no_grad()
def draw_samples(study: Study, trained: Trained) -> dict[str, Points]:
    """Samples of the teacher, the exact flow and all students from the same noise: a row a seed, by name."""
    noise = study.normal("samples", 0, NUM_SAMPLES)
    key_sigmas = torch.tensor(study.key_sigmas)
    samples = {
        "exact flow": trajectories(exact_velocity, noise, study.sigmas)[..., -1],
        f"teacher, {study.num_steps} steps": trajectories(trained.teacher, noise, study.sigmas)[..., -1],
        f"teacher, {study.num_student_steps} steps": trajectories(trained.teacher, noise, key_sigmas)[..., -1],
    }

    def add(students: Students, sample: Callable[[VelocityNetworks, Points], Points]) -> None:
        times = len(students.teacher_calls)
        rows = sample(students.networks, noise.repeat(times, 1)).chunk(times)
        samples.update(zip(students.teacher_calls, rows, strict=True))

    def renoised(student: VelocityNetworks, noise: Points) -> Points:
        times, num_fresh = len(noise) // len(study.seeds), study.num_student_steps
        fresh = [study.normal(f"samples, step {k}", 0, NUM_SAMPLES, times) for k in range(num_fresh)]
        return renoised_steps(student, noise, study.key_sigmas, fresh)[-1]

    for students in (trained.perflow, trained.accvideo):
        add(students, lambda student, noise: trajectories(student, noise, key_sigmas)[..., -1])
    add(trained.dmd, renoised)
    return samples


@torch.no_grad()
def teacher_numbers(study: Study, teacher: VelocityNetworks) -> dict[str, list[float]]:
    """How far each teacher is from the exact flow: the root mean square error of its velocity on that flow's path."""
    states = trajectories(exact_velocity, study.normal("teacher test", 0, 2048), study.sigmas)
    errors = [
        (teacher(states[..., level], sigma) - exact_velocity(states[..., level], sigma)).square().mean(1)
        for level, sigma in enumerate(study.sigmas[:-1].tolist())
    ]
    return {"velocity_error": torch.stack(errors).mean(0).sqrt().tolist()}


def useless_numbers(study: Study, states: Float[Tensor, "seeds samples levels"]) -> list[dict[str, Any]]:
    """Share of useless points by degree of mismatch and tolerance, for the trained teachers and the exact flow."""
    noise = torch.randn(1, NUM_COVERING, generator=generator(0, "covering", 0))
    exact = trajectories(exact_velocity, noise, study.sigmas)[0]
    rows = []
    for mismatch, paper in PAPER_SHARES.items():
        data = moved_data(mismatch)

        def share(covering: Tensor, tolerance: float, seed: int, data: tuple[float, float] = data) -> float:
            return useless_share(data, covering, study.sigmas, tolerance, generator(seed, "diffused", 0))

        trained = {
            str(tolerance): [share(states[i, :NUM_COVERING], tolerance, seed) for i, seed in enumerate(study.seeds)]
            for tolerance in TOLERANCES
        }
        flow = {str(tolerance): share(exact, tolerance, 0) for tolerance in TOLERANCES}
        rows.append({"mismatch": mismatch, "paper": paper, "teacher": trained, "exact_flow": flow})
    return rows


def model_numbers(trained: Trained, samples: Mapping[str, Points]) -> list[dict[str, Any]]:
    """1-Wasserstein distances of each model's samples, one value a seed, and its calls of the teacher.

    `to_teacher`: to the teacher's samples at all steps; `to_data`: to the two points; `to_moved`: to the distillation
    data, where there is some; `paired_error`: mean distance to the teacher's sample from the same noise.
    """
    calls = {**trained.perflow.teacher_calls, **trained.accvideo.teacher_calls, **trained.dmd.teacher_calls}
    teacher = next(rows for name, rows in samples.items() if name.startswith("teacher"))
    models = []
    for name, rows in samples.items():
        mismatch = float(name.partition("M = ")[2]) if "M = " in name else None
        numbers: dict[str, Any] = {"name": name, "mismatch": mismatch, "teacher_calls": calls.get(name)}
        pairs = list(zip(rows, teacher, strict=True))
        numbers["to_teacher"] = [wasserstein_distance(row, reference) for row, reference in pairs]
        numbers["to_data"] = [wasserstein_distance(row, DATA) for row in rows]
        if mismatch is not None:
            numbers["to_moved"] = [wasserstein_distance(row, moved_data(mismatch)) for row in rows]
        numbers["paired_error"] = [float((row - reference).abs().mean()) for row, reference in pairs]
        models.append(numbers)
    return models


def toy_table(results: Mapping[str, Any]) -> str:
    """The numbers as two tables in Markdown."""
    useless = [
        [f"{row['mismatch']:g}", f"{100 * row['paper']:.2f}"]
        + [spread_text([100 * value for value in row["teacher"][str(tolerance)]], 2) for tolerance in TOLERANCES]
        + [f"{100 * row['exact_flow'][str(tolerance)]:.2f}" for tolerance in TOLERANCES]
        for row in results["useless"]
    ]
    within = [f"{tolerance:g}" for tolerance in TOLERANCES]
    header = ["M", "paper", *(f"teacher, {each}" for each in within), *(f"exact flow, {each}" for each in within)]
    models = [
        [row["name"]]
        + [spread_text(row[name]) if name in row else "–" for name in ("to_teacher", "to_data", "to_moved")]
        + [spread_text(row["paired_error"]), f"{row['teacher_calls']:,}" if row["teacher_calls"] else "–"]
        for row in results["models"]
    ]
    columns = ["", "W1 to the teacher", "W1 to p", "W1 to p_d", "distance to the teacher's sample", "teacher calls"]
    num_seeds = len(results["seeds"])
    return (
        f"Useless data points in %, by the distance that counts as off; mean and deviation of {num_seeds} seeds:\n\n"
        f"{markdown_table(header, useless)}\nModels, 1-Wasserstein distances; mean and deviation of {num_seeds} "
        f"seeds:\n\n{markdown_table(columns, models)}"
    )
