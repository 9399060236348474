"""How near a recording comes to the teacher's exact flow, by the solver that made it and its number of steps."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from jaxtyping import Float
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tyro.conf import Positional

from accvideo.analysis.figure import Panel, color, dot, figure, markdown_table, polyline
from accvideo.analysis.folder import open_analysis, origin, settings_of, write_results
from accvideo.command import Prompt, choose_device, parse_pipeline_args, progress_bar, read_prompt_file
from accvideo.flow import keypoint_indices
from accvideo.generate import batches, with_prompts
from accvideo.inference.config import Dtype
from accvideo.inference.model import Model, load_model, with_arguments
from accvideo.media import load_media
from accvideo.playground.world import sample_prompts
from accvideo.recording.setup import set_shift
from accvideo.recording.solvers import Solver, Step, solver_step
from accvideo.reporting.charts import Plot, log_ticks
from accvideo.reporting.rows import is_whole
from accvideo.teacher import (
    PLAYGROUND_TEACHER,
    batch_arguments,
    denoising_grid,
    guidance_arguments,
    teacher_path,
    watch,
)
from accvideo.trajectory import write_whole
from accvideo.types import Latents, UserError

OURS: dict[str, Solver] = {"euler": "euler", "adams2": "adams2"}
"""What `accvideo record --solver` knows."""

SCHEDULERS: dict[str, Any] = {"dpm2": DPMSolverMultistepScheduler, "unipc2": UniPCMultistepScheduler}
"""Second-order solvers of diffusers: DPM-Solver++ 2M (arXiv:2211.01095) and UniPC (arXiv:2302.04867)."""

EULER_STEPS = 50
"""Of the recording that the paper makes."""


@dataclass(frozen=True, kw_only=True)
class SolversConfig:
    """Measures how far the key states of short recordings are from 50 steps of Euler's and from the exact flow.

    Finished runs are kept: the same command goes on where a killed one stopped.
    """

    teacher: Positional[str]
    """`playground`, a folder that diffusers saved, or a hub id."""
    out: Path
    """Folder for states, numbers, table and figure."""
    num_steps: tuple[int, ...] = (10, 15, 20, 25, 50)
    """Numbers of steps S to try."""
    num_student_steps: int = 5
    """Key points K; must divide all numbers of steps."""
    reference_steps: int = 500
    """Steps, of second order, that stand for the exact flow."""
    num_prompts: int = 16
    """Clips."""
    prompts: Path | None = None
    """As for `accvideo record`; prompts of the world by default if the teacher is the playground's."""
    guidance_scale: float | None = None
    """The teacher's own by default."""
    shift: float | None = None
    """Of the noise levels, as for `accvideo record`."""
    pipeline_arg: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=JSON: any other argument of the pipeline's call; may be repeated."""
    batch_size: int = 8
    """Clips denoised together."""
    seed: int = 0
    """Of prompts and noise."""
    dtype: Dtype = "float32"
    """Of the pipeline."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one."""

    def __post_init__(self) -> None:
        for number in (*self.num_steps, EULER_STEPS, self.reference_steps):
            keypoint_indices(number, self.num_student_steps)
        for name in ("num_prompts", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")


@dataclass(frozen=True)
class Run:
    """All clips by one solver in one number of steps."""

    solver: str
    num_steps: int


@dataclass(frozen=True)
class KeyStates:
    """What a run leaves."""

    states: Float[Tensor, "prompts keypoints *state"]
    """At all key points after the noise."""
    sigmas: list[float]
    """Of these key points."""
    denoiser_calls: int
    """For each clip."""


def solvers(config: SolversConfig) -> dict[str, Any]:
    """Make what is missing of all runs, measure, and write solvers.json, .md and .svg.

    Raises:
        UserError: whatever the teacher refuses.
    """
    prompts = choose_prompts(config)
    model = load_teacher(config)
    for block in batches(len(prompts), config.batch_size):
        with_prompts(model, [prompts[index] for index in block])  # refuses here what it cannot do
    cache = open_analysis(config.out, settings_of(config))
    cache.mkdir(exist_ok=True)
    euler, reference = Run("euler", EULER_STEPS), Run("adams2", config.reference_steps)
    others = {"euler": euler, "reference": reference}
    tried = [Run(name, number) for name in (*OURS, *SCHEDULERS) for number in sorted(config.num_steps)]
    with progress_bar() as progress:
        runs = dict.fromkeys([euler, *tried, reference])
        bar = progress.add_task("denoising steps", total=sum(run.num_steps for run in runs) * len(prompts))
        made = {run: make(config, model, run, prompts, cache, progress, bar) for run in runs}
    rows = [
        {"solver": run.solver, "num_steps": run.num_steps, "denoiser_calls": made[run].denoiser_calls}
        | {f"to_{name}": distances(made[run], made[other]) for name, other in others.items()}
        for run in dict.fromkeys([euler, *tried])
    ]
    results = {
        "command": f"accvideo analyze solvers {config.teacher} --out DIR",
        **origin(choose_device(config.device)),
        "settings": settings_of(config),
        "model": model.identity,
        "rows": rows,
        "enough": enough(rows),
    }
    return write_results(config.out, "solvers", results, solvers_table(results), solvers_figure(rows))


def choose_prompts(config: SolversConfig) -> list[Prompt]:
    """The prompts: of a file, or of the world's part that teachers may be recorded on.

    Raises:
        UserError: there is no file, and the teacher is not the playground's.
    """
    if config.prompts is not None:
        return read_prompt_file(config.prompts)[: config.num_prompts]
    if teacher_path(config.teacher) != PLAYGROUND_TEACHER:
        raise UserError("prompts can only be drawn for the playground's teacher; give --prompts FILE")
    return [Prompt(text) for text in sample_prompts(config.num_prompts, config.seed, "train")]


def load_teacher(config: SolversConfig) -> Model:
    """The teacher, with the arguments of its calls.

    Raises:
        UserError: it does not take one of them, or is a student.
    """
    model = load_model(config.teacher, getattr(torch, config.dtype), choose_device(config.device))
    if model.student is not None:
        raise UserError(f"{config.teacher} is a student: it has no flow of its own; give its teacher")
    if config.shift is not None:
        set_shift(model.pipeline, config.shift)
    guidance = model.guidance_scale if config.guidance_scale is None else config.guidance_scale
    arguments = parse_pipeline_args(config.pipeline_arg)
    if guidance is not None:
        arguments |= guidance_arguments(model.pipeline, guidance)
    return with_arguments(model, arguments)


def step_of(name: str, sigmas: Sequence[float]) -> Step | None:
    """The steps of a solver, over these noise levels; those of diffusers are its schedulers' own."""
    if name not in SCHEDULERS:
        return solver_step(OURS[name])
    scheduler = SCHEDULERS[name](use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=2)
    scheduler.set_timesteps(len(sigmas) - 1)
    # The signal-to-noise ratio, in whose logarithm they work, is 0 at a level of 1.
    scheduler.sigmas = torch.tensor(sigmas).clamp(max=1 - 1e-6)
    scheduler.set_begin_index(0)
    timesteps = iter(scheduler.timesteps)

    def step(latents: Latents, velocity: Latents, sigma: float, next_sigma: float) -> tuple[Latents, Latents]:
        return latents, scheduler.step(velocity, next(timesteps), latents, return_dict=False)[0]

    return step


def call_arguments(model: Model, prompts: Sequence[Prompt], config: SolversConfig, items: range) -> dict[str, Any]:
    """The arguments of the pipeline's call that makes these items, with the noise that a recording gives them."""
    own = load_media(with_prompts(model, prompts).arguments)
    return own | batch_arguments([prompt.text for prompt in prompts], config.seed, items)


def make(
    config: SolversConfig,
    model: Model,
    run: Run,
    prompts: Sequence[Prompt],
    cache: Path,
    progress: Progress,
    bar: Any,
) -> KeyStates:
    """What a run leaves; clips that are there already are read.

    Args:
        config: the settings.
        model: the teacher.
        run: what to make.
        prompts: one a clip.
        cache: where states are kept.
        progress: where to show `bar`.
        bar: a bar in units of a denoising step of a clip.
    """
    pipeline: Any = model.pipeline
    keypoints, parts, measured = keypoint_indices(run.num_steps, config.num_student_steps), [], {}
    for block in batches(len(prompts), config.batch_size):
        path = cache / f"{run.solver}-{run.num_steps}-{block.start:06d}.safetensors"
        if not is_whole(path):
            arguments = call_arguments(model, [prompts[index] for index in block], config, block)
            sigmas, _ = denoising_grid(pipeline, run.num_steps, **arguments)
            with watch(pipeline, keypoints[:-1], solve=step_of(run.solver, sigmas)) as seen:
                pipeline(
                    num_inference_steps=run.num_steps,
                    output_type="latent",
                    **call_arguments(model, [prompts[index] for index in block], config, block),
                )
            assert seen.final is not None
            states = torch.stack([*(step.state for step in seen.steps[1:]), seen.final], dim=1).cpu()
            about = {"sigmas": [seen.sigmas[point] for point in keypoints[1:]], "denoiser_calls": seen.num_calls}
            write_whole(path, save({"states": states.contiguous()}, {"measured": json.dumps(about)}))
        with safe_open(path, "pt") as file:
            parts.append(file.get_tensor("states"))
            measured = json.loads(file.metadata()["measured"])
        progress.advance(bar, run.num_steps * len(block))
    return KeyStates(torch.cat(parts), **measured)


def relative_distances(
    states: Float[Tensor, "prompts keypoints *state"], reference: Float[Tensor, "prompts keypoints *state"]
) -> Float[Tensor, "prompts keypoints"]:
    """Root mean square of the difference over that of the reference, of each clip at each key point."""
    return (states - reference).flatten(2).norm(dim=2) / reference.flatten(2).norm(dim=2)


def distances(made: KeyStates, other: KeyStates) -> dict[str, list[float | None]]:
    """Mean and median over the clips at each key point: a few clips whose flow parts make up much of the mean.

    None at a key point of another noise level, where an own scheduler's levels depend on the number of steps.
    """
    columns = relative_distances(made.states, other.states).T.tolist()
    same = [abs(here - there) < 1e-4 for here, there in zip(made.sigmas, other.sigmas, strict=True)]
    return {
        name: [average(each) if known else None for each, known in zip(columns, same, strict=True)]
        for name, average in (("mean", statistics.fmean), ("median", statistics.median))
    }


def enough(rows: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """By solver, the least number of steps whose clips are as near to the exact flow as 50 steps of Euler's.

    None where no number that was tried is; the mean over the clips counts.
    """
    limit = rows[0]["to_reference"]["mean"][-1]
    found: dict[str, int | None] = {}
    for row in rows:
        found.setdefault(row["solver"], None)
        near = row["to_reference"]["mean"][-1] <= limit
        if near and (found[row["solver"]] is None or row["num_steps"] < found[row["solver"]]):
            found[row["solver"]] = row["num_steps"]
    return found


def solvers_table(results: Mapping[str, Any]) -> str:
    """All distances by key point in Markdown."""
    settings, rows = results["settings"], results["rows"]
    numbers = range(1, settings["num_student_steps"] + 1)
    header = ["solver, steps", "calls", *(f"key point {k}" for k in numbers), "median at the last"]
    text = (
        f"Relative root-mean-square distance of states, in %: mean over {settings['num_prompts']} clips; key point "
        f"{numbers[-1]} is the video. –: the teacher's own scheduler has another noise level there.\n"
    )
    names = {"reference": f"To {settings['reference_steps']} steps of adams2", "euler": f"To {EULER_STEPS} of Euler's"}
    for name, title in names.items():
        lines = [
            [f"{row['solver']}, {row['num_steps']}", str(row["denoiser_calls"])]
            + ["–" if value is None else f"{100 * value:.2f}" for value in row[f"to_{name}"]["mean"]]
            + [f"{100 * row[f'to_{name}']['median'][-1]:.2f}"]
            for row in rows
        ]
        text += f"\n{title}:\n\n{markdown_table(header, lines)}"
    said = ", ".join(f"{name} {number or 'more than tried'}" for name, number in results["enough"].items())
    return f"{text}\nSteps that come as near to the exact flow as {EULER_STEPS} of Euler's: {said}.\n"


def solvers_figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """Distances of the video against the number of steps, and of one number of steps by key point."""
    counts = sorted({row["num_steps"] for row in rows})
    middle = min(counts, key=lambda number: abs(number - 20))
    short = [row for row in rows if row["num_steps"] == middle]
    points = {
        row["solver"]: [(k, value) for k, value in enumerate(row["to_reference"]["mean"], 1) if value is not None]
        for row in [*short, {**rows[0], "solver": f"euler, {EULER_STEPS}"}]
    }
    return figure(
        [
            step_panel(rows, "reference", "mean", "To the exact flow", "of the video, mean over the clips"),
            step_panel(rows, "reference", "median", "To the exact flow", "of the video, median over the clips"),
            step_panel(rows, "euler", "mean", f"To {EULER_STEPS} steps of Euler's", "of the video, mean over clips"),
            distance_panel(points, f"{middle} steps, by key point", "to the exact flow, mean over the clips",
                           "key point (the last is the video)", logarithmic=False),
        ]
    )  # fmt: skip


def step_panel(rows: Sequence[Mapping[str, Any]], to: str, kind: str, title: str, note: str) -> Panel:
    """The distance of the video against the number of steps, a curve a solver."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: row["num_steps"]):
        if (distance := row[f"to_{to}"][kind][-1]) > 0:  # 50 steps of Euler's are nothing away from themselves
            points.setdefault(row["solver"], []).append((row["num_steps"], distance))
    return distance_panel(points, title, note, "steps (logarithmic)", logarithmic=True)


def distance_panel(
    points: Mapping[str, Sequence[tuple[float, float]]], title: str, note: str, x_title: str, logarithmic: bool
) -> Panel:
    """Curves of relative distances on a logarithmic axis."""
    places = sorted({x for curve in points.values() for x, _ in curve})
    values = [y for curve in points.values() for _, y in curve]
    limits = (min(values) / 1.3, max(values) * 1.3)
    ends = (places[0] / 1.1, places[-1] * 1.1) if logarithmic else (places[0] - 0.2, places[-1] + 0.2)
    plot = Plot(ends, limits, x_log=logarithmic, y_log=True)
    marks = ""
    for number, curve in enumerate(points.values()):
        marks += polyline(plot, curve, color(number)) + "".join(dot(plot, x, y, color(number)) for x, y in curve)
    chart = plot.svg(marks, x_title, log_ticks(*limits), places, f"{title}, {note}")
    return Panel(title, f"relative distance {note}", chart, [(name, color(i)) for i, name in enumerate(points)])
