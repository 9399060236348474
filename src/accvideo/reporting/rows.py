"""One row of an evaluation: a model run in one way on all prompts, made and measured batch by batch.

What is kept of each batch goes to a file, from which a killed evaluation goes on and from which the report is made.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from accvideo.command import Prompt
from accvideo.generate import ClipBatch, Seconds, batches, describe_prompt, sample_clips, with_prompts
from accvideo.inference.config import PLAIN, Acceleration
from accvideo.inference.model import Model, digest
from accvideo.metrics import (
    Estimate,
    bootstrap_interval,
    deviation_interval,
    energy_ratio,
    flicker,
    frechet_distance,
    latent_mse,
    motion_energy,
    psnr,
    resampled,
    wilson_interval,
)
from accvideo.playground.judge import Verdicts, diversity_of_samples, judge
from accvideo.playground.world import Requests, Scenes
from accvideo.reporting.fvd import VideoFeatures
from accvideo.trajectory import write_whole
from accvideo.video import Frames

PROPERTIES = ("shape", "color", "background", "motion", "count")
"""What the judge looks at."""

FIRST_ITEM = 1_000_000
"""Number of the first item of an evaluation. Recordings count from 0: no student has been trained on this noise."""

MEASURES = 2
"""Raised when a batch's file holds other measurements than before: older files are then not gone on with."""

NUM_SHOWN = 10
"""Prompts whose clips are shown side by side."""


@dataclass(frozen=True)
class Plan:
    """How a row's clips are made."""

    name: str
    num_steps: int
    guidance_scale: float | None
    is_teacher: bool


@dataclass(frozen=True)
class Task:
    """What all rows have in common."""

    prompts: list[Prompt]
    seed: int
    batch_size: int
    dtype: str
    is_judged: bool
    rows: Path
    """Folder of finished rows, a folder each."""
    acceleration: Acceleration = PLAIN
    features: VideoFeatures | None = None
    """Of FVD; None: it is not measured."""

    def batches(self) -> list[range]:
        """Numbers of the prompts of each batch."""
        return batches(len(self.prompts), self.batch_size)


@dataclass(frozen=True)
class RowData:
    """What was made and measured for a row."""

    values: dict[str, Tensor]
    """One row a clip: `latent_mse` and the like, and the judge's verdicts by the names of `flatten_verdicts`."""
    kept: dict[int, tuple[Path, int]]
    """Where the clips lie that were kept, by number of the prompt: in which file, and which of those in it."""
    seconds: list[tuple[int, Seconds]]
    """Size and seconds of each batch."""
    denoiser_calls: int
    """For each clip."""

    @cached_property
    def diversity_distances(self) -> np.ndarray:
        """Of all clips, and of resamples: the same for all rows, that their differences are of the same clips."""
        distance = diversity_of_samples(restore_verdicts(self.values))
        return resampled(len(self.values["flicker"]), lambda rows: distance(torch.from_numpy(rows)))

    def frames(self, index: int) -> Frames:
        """The frames of a clip that was kept."""
        path, row = self.kept[index]
        with safe_open(path, "pt") as file:
            return file.get_slice("frames")[row]


def row_key(model: Model, plan: Plan, task: Task, teacher_key: str | None) -> str:
    """A hash of everything that a row's clips and measurements depend on."""
    settings = {
        "identity": model.identity,
        "arguments": model.arguments,
        "num_steps": plan.num_steps,
        "guidance_scale": plan.guidance_scale,
        "prompts": [describe_prompt(prompt) for prompt in task.prompts],
        "seed": task.seed,
        "batch_size": task.batch_size,
        "dtype": task.dtype,
        "acceleration": asdict(task.acceleration),
        "is_judged": task.is_judged,
        "teacher": teacher_key,
        "measures": MEASURES,
        "features": None if task.features is None else task.features.identity,
        "version": version("accvideo"),
    }
    return digest(json.dumps(settings, sort_keys=True).encode())[:16]


def run_row(model: Model, plan: Plan, task: Task, teacher_key: str | None, progress: Progress) -> RowData:
    """Make and measure a row's clips, or the rest of them.

    Args:
        model: Teacher or student.
        plan: How its clips are made.
        task: On what.
        teacher_key: Key of the teacher's row, which clips are compared with; None for that row itself.
        progress: Where to show a bar.
    """
    folder = task.rows / row_key(model, plan, task, teacher_key)
    folder.mkdir(exist_ok=True)
    missing = [batch for batch in task.batches() if not is_whole(folder / file_name(batch))]
    bar = progress.add_task(plan.name, total=len(missing) * plan.num_steps)
    if missing:
        # The first run allocates memory and chooses kernels: it is not timed.
        warm_up = min(2, plan.num_steps) if model.student is None else plan.num_steps
        sample_batch(model, replace(plan, num_steps=warm_up), task, missing[0])
    for batch in missing:
        clips = sample_batch(model, plan, task, batch, on_step=lambda _: progress.advance(bar))
        teacher = None if teacher_key is None else task.rows / teacher_key / file_name(batch)
        write_batch(folder / file_name(batch), task, batch, clips, teacher, keep_wrong=not plan.is_teacher)
    return read_row([folder / file_name(batch) for batch in task.batches()])


def sample_batch(
    model: Model, plan: Plan, task: Task, batch: range, on_step: Callable[[int], None] | None = None
) -> ClipBatch:
    """The clips of one batch."""
    prompts, items = [task.prompts[i] for i in batch], [FIRST_ITEM + i for i in batch]
    model, texts = with_prompts(model, prompts), [prompt.text for prompt in prompts]
    [clips] = sample_clips(model, texts, items, task.seed, plan.num_steps, plan.guidance_scale, len(batch), on_step)
    return clips


def file_name(batch: range) -> str:
    """Name of a batch's file."""
    return f"{batch.start:06d}.safetensors"


def is_whole(path: Path) -> bool:
    """Whether a batch's file is there and not damaged."""
    try:
        with safe_open(path, "pt"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False


def write_batch(path: Path, task: Task, batch: range, clips: ClipBatch, teacher: Path | None, keep_wrong: bool) -> None:
    """Measure a batch and write what is kept of it.

    All of the teacher's own clips and latents are kept, since the other rows are compared with them; of other rows the
    clips to show and, where `keep_wrong`, those that the judge finds wrong.
    """
    values = {"flicker": flicker(clips.frames)}
    if task.is_judged:
        verdicts = judge(clips.frames, [task.prompts[i].text for i in batch])
        # The judge's flicker leaves out the motion that it recognized.
        values = {**flatten_verdicts(verdicts), "flicker": verdicts.flicker}
    if task.features is not None:
        values["features"] = task.features(clips.frames)
    kept = torch.tensor([i < NUM_SHOWN for i in batch])
    tensors = {}
    if teacher is None:
        kept[:] = True
        values["latent_mse"] = torch.zeros(len(batch))
        tensors["latents"] = clips.latents
    else:
        with safe_open(teacher, "pt") as reference:
            values["latent_mse"] = latent_mse(clips.latents, reference.get_tensor("latents"))
            frames = reference.get_tensor("frames")
            values["teacher_psnr_db"] = psnr(clips.frames, frames)
            moved = motion_energy(clips.frames.float() - frames.float()), motion_energy(frames.float())
            values["moved"] = torch.stack(moved, dim=1)
            if task.features is not None:
                values["teacher_features"] = reference.get_tensor("values.features")
        if keep_wrong and task.is_judged:
            kept |= ~values["all_right"]
    tensors |= {f"values.{name}": value for name, value in values.items()}
    tensors |= {"frames": clips.frames[kept], "kept": torch.tensor(batch)[kept]}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    measured = {"seconds": asdict(clips.seconds), "denoiser_calls": clips.denoiser_calls}
    write_whole(path, save(tensors, {"measured": json.dumps(measured)}))


def read_row(paths: Sequence[Path]) -> RowData:
    """What the files of a row's batches hold."""
    values: dict[str, list[Tensor]] = {}
    kept: dict[int, tuple[Path, int]] = {}
    seconds, denoiser_calls = [], 0
    for path in paths:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith("values.")]  # noqa: SIM118 - no mapping
            for name in names:
                values.setdefault(name.removeprefix("values."), []).append(file.get_tensor(name))
            kept |= {index: (path, row) for row, index in enumerate(file.get_tensor("kept").tolist())}
            measured = json.loads(file.metadata()["measured"])
        seconds.append((len(values["flicker"][-1]), Seconds(**measured["seconds"])))
        denoiser_calls = measured["denoiser_calls"]
    return RowData({name: torch.cat(parts) for name, parts in values.items()}, kept, seconds, denoiser_calls)


def make_row(model: Model, plan: Plan, task: Task, data: RowData, teacher: RowData | None = None) -> dict[str, Any]:
    """A row of `report.json`; seconds are for one clip, medians over batches of full size.

    Args:
        model: Teacher or student.
        plan: How its clips were made.
        task: On what.
        data: What was made and measured.
        teacher: The teacher's row, which this one is compared with clip by clip; None: it is not.
    """
    size = min(task.batch_size, len(task.prompts))
    full = [seconds for num_clips, seconds in data.seconds if num_clips == size]
    parts = {part.name: statistics.median(getattr(each, part.name) for each in full) / size for part in fields(Seconds)}
    return {
        "name": plan.name,
        "model": model.name,
        "num_steps": plan.num_steps,
        "guidance_scale": plan.guidance_scale,
        "denoiser_calls": data.denoiser_calls,
        "seconds": parts,
        "seconds_denoising": parts["denoising"],
        "seconds_end_to_end": sum(parts.values()),
        "metrics": {
            name: None if estimate is None else asdict(estimate)
            for name, estimate in row_metrics(data, task.is_judged).items()
        },
        "differences": {}
        if teacher is None
        else {name: asdict(estimate) for name, estimate in row_differences(data, teacher, task.is_judged).items()},
    }


def row_metrics(data: RowData, is_judged: bool) -> dict[str, Estimate | None]:
    """Each metric with its 95 % interval; None where it does not apply."""
    values = data.values
    metrics: dict[str, Estimate | None] = {
        name: wilson_interval(int(values[name].sum()), len(values[name])) if is_judged else None
        for name in ("all_right", *PROPERTIES)
    }
    for name in ("rerender_psnr_db", "flicker", "latent_mse", "teacher_psnr_db"):
        metrics[name] = bootstrap_interval(values[name].double().numpy()) if name in values else None
    metrics["motion_error"] = metrics["fvd"] = metrics["diversity_distance"] = None
    if "moved" in values:
        metrics["motion_error"] = bootstrap_interval(values["moved"].double().numpy(), energy_ratio)
    if "teacher_features" in values:
        ours, theirs = values["features"], values["teacher_features"]
        metrics["fvd"] = deviation_interval(
            resampled(len(ours), lambda rows: frechet_distance(ours[rows], theirs[rows]))
        )
    if is_judged:
        metrics["diversity_distance"] = deviation_interval(data.diversity_distances)
    return metrics


def row_differences(data: RowData, teacher: RowData, is_judged: bool) -> dict[str, Estimate]:
    """How far the metrics lie above the teacher's, with 95 % intervals.

    Both have the same prompts and noise, and differ clip by clip: what is hard about a prompt is in both and falls out.
    The interval of a difference is therefore narrower than those of the two metrics suggest.
    """
    judged = ("all_right", *PROPERTIES, "rerender_psnr_db") if is_judged else ()
    differences = {
        name: bootstrap_interval((data.values[name].double() - teacher.values[name].double()).numpy())
        for name in (*judged, "flicker")
    }
    if is_judged:
        distances = data.diversity_distances - teacher.diversity_distances
        differences["diversity_distance"] = deviation_interval(distances, least=-math.inf)
    return differences


# The judge's verdicts as plain tensors


def flatten_verdicts(verdicts: Verdicts) -> dict[str, Tensor]:
    """All tensors of the verdicts by name, so that they can be stored."""
    scenes, requests = verdicts.scenes, verdicts.scenes.requests
    columns = {field.name: getattr(verdicts, field.name) for field in fields(Verdicts) if field.name != "scenes"}
    columns |= {f"requests.{field.name}": getattr(requests, field.name) for field in fields(Requests)}
    return columns | {"scenes.objects": scenes.objects, "scenes.phase": scenes.phase}


def restore_verdicts(values: Mapping[str, Tensor]) -> Verdicts:
    """Inverse of `flatten_verdicts`; other values are ignored."""
    requests = Requests(**{field.name: values[f"requests.{field.name}"] for field in fields(Requests)})
    scenes = Scenes(requests, values["scenes.objects"], values["scenes.phase"])
    columns = {field.name: values[field.name] for field in fields(Verdicts) if field.name != "scenes"}
    return Verdicts(**columns, scenes=scenes)
