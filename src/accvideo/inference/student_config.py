"""What a student's folder says of it: its noise levels, sizes and arguments, and whose student it is."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from accvideo.call import DenoiserCall
from accvideo.data.manifest import Manifest
from accvideo.data.schema import parse
from accvideo.flow import even_grid
from accvideo.inference.schedulers import KeyPointScheduler, scheduler_timestep, student_scheduler, told_timestep
from accvideo.types import UserError


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """What a student is and how to run it: `student.json`, written last, marks a finished student folder."""

    teacher: str
    """"playground", a folder or a hub id: the pipeline that the student runs in."""
    revision: str | None
    license: str | None
    """The teacher's, which binds the student too."""
    pipeline_class: str
    fingerprints: dict[str, str]
    """Of the teacher's denoisers."""
    num_steps: int
    """K, also the number of denoiser calls."""
    sigmas: list[float]
    """The K + 1 noise levels."""
    timesteps: list[float]
    """What the denoiser is told at the first K of them."""
    guidance_scale: float | None
    """1 (off) where the teacher's guidance took a second call: it is distilled in. Where guidance is an input of the
    denoiser (HunyuanVideo), or was off, the teacher's own."""
    teacher_guidance_scale: float | None
    """None: the pipeline's own default."""
    teacher_num_steps: int
    """Of the teacher's own clips, by `teacher_scheduler`, that the student is compared with."""
    height: int | None
    width: int | None
    num_frames: int | None
    fps: float
    pipeline_args: dict[str, Any]
    """Further arguments of the pipeline's call, as recorded."""
    lora_rank: int | None
    """None: full weights."""
    scheduler: dict[str, Any]
    """"class" and "config"."""
    recipe: dict[str, Any]
    """The distillation's own configuration."""
    teacher_scheduler: dict[str, Any] | None = None
    """That the teacher was recorded with, "class" and "config"; its folder may hold another shift. None: not kept by
    the version that made this student."""
    solver: str = "own"
    """What took the recorded steps over that scheduler's noise levels: itself, or another solver."""
    recorded_num_steps: int | None = None
    """Of the recorded trajectories; None: `teacher_num_steps`."""
    other_num_steps: list[int] = field(default_factory=list)
    """Further numbers of steps that it was trained for; its scheduler knows their noise levels."""

    def __post_init__(self) -> None:
        if (len(self.sigmas), len(self.timesteps)) != (self.num_steps + 1, self.num_steps) or self.num_steps < 1:
            raise ValueError(
                f"{len(self.sigmas)} sigmas and {len(self.timesteps)} timesteps for num_steps={self.num_steps}"
            )
        if wrong := [sigma for sigma in self.sigmas if not 0 <= sigma < 1.001]:
            raise ValueError(f"a sigma of {str(wrong[0])[:20]}; a flow's are from 0 to 1")
        for name, each in (("scheduler", self.scheduler), ("teacher_scheduler", self.teacher_scheduler)):
            if each is not None and not is_scheduler(each):
                raise ValueError(f"{name} is not a `class` of diffusers and a `config`")


def is_scheduler(description: dict[str, Any]) -> bool:
    """Whether a description names the class of a scheduler and holds a configuration for it."""
    return isinstance(description.get("class"), str) and isinstance(description.get("config"), dict)


def student_config(
    manifest: Manifest,
    calls: Sequence[DenoiserCall],
    lora_rank: int | None,
    recipe: dict[str, Any],
    num_student_steps: Sequence[int] = (),
    tell_size: bool = True,
) -> StudentConfig:
    """The configuration of a student of the recorded teacher.

    Args:
        manifest: of the data set.
        calls: of any trajectory, at all recorded key points.
        lora_rank: None for full weights.
        recipe: how the student was distilled.
        num_student_steps: numbers of steps it was trained for, the usual one first; none: as recorded.
        tell_size: whether, with several numbers, its denoiser is told how far a step goes.
    """
    if num_student_steps:
        configs = []
        for number in num_student_steps:
            points = even_grid(manifest.num_student_steps, number)
            keypoints = [manifest.keypoints[point] for point in points]
            part = replace(manifest, keypoints=keypoints, num_student_steps=number)
            configs.append(student_config(part, [calls[point] for point in points[:-1]], lora_rank, recipe))
        return joined(configs, is_told=tell_size and len(manifest.fingerprints) == 1)
    timesteps = [scheduler_timestep(*pair) for pair in zip(calls, manifest.key_sigmas.tolist(), strict=False)]
    guidance_scale, pipeline_args = unguided(manifest)
    scheduler: Any = student_scheduler(manifest, timesteps)
    plain = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return StudentConfig(
        teacher=manifest.teacher,
        revision=manifest.revision,
        license=manifest.license,
        pipeline_class=manifest.pipeline_class,
        fingerprints=manifest.fingerprints,
        num_steps=manifest.num_student_steps,
        sigmas=manifest.key_sigmas.tolist(),
        timesteps=timesteps,
        guidance_scale=guidance_scale,
        teacher_guidance_scale=manifest.guidance_scale,
        teacher_num_steps=manifest.teacher_num_steps or manifest.num_steps,
        height=manifest.height,
        width=manifest.width,
        num_frames=manifest.num_frames,
        fps=manifest.fps,
        pipeline_args=pipeline_args,
        lora_rank=lora_rank,
        scheduler={"class": type(scheduler).__name__, "config": plain},
        recipe=recipe,
        teacher_scheduler=manifest.scheduler,
        solver=manifest.solver,
        recorded_num_steps=manifest.num_steps,
    )


def joined(configs: Sequence[StudentConfig], is_told: bool) -> StudentConfig:
    """The configuration of one student for all these numbers of steps, by itself that of the first.

    Args:
        configs: of each number of steps.
        is_told: whether its denoiser is told how far steps go. With two denoisers it is not, for pipelines choose
            between them by the timestep.
    """
    if len(configs) == 1:
        return configs[0]
    if is_told:
        configs = [replace(each, timesteps=told_timesteps(each.sigmas, each.timesteps)) for each in configs]
    first, *others = configs
    schedules = [{"sigmas": each.sigmas, "timesteps": each.timesteps} for each in others]
    scheduler: Any = KeyPointScheduler(first.sigmas, first.timesteps, others=schedules)
    plain = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return replace(
        first,
        scheduler={"class": KeyPointScheduler.__name__, "config": plain},
        other_num_steps=[each.num_steps for each in others],
    )


def told_timesteps(sigmas: Sequence[float], timesteps: Sequence[float]) -> list[float]:
    """What a scheduler tells a denoiser that is told how far steps go, from the timesteps of their starts."""
    ends = torch.tensor([*timesteps, timesteps[-1] * sigmas[-1] / sigmas[-2]], dtype=torch.float64)
    return told_timestep(ends[:-1], ends[1:]).tolist()


def unguided(manifest: Manifest) -> tuple[float | None, dict[str, Any]]:
    """Guidance scale and further arguments with which the recorded pipeline takes one denoiser call a step.

    Where the denoiser is told one guidance scale and a second makes two calls (HunyuanVideo), the first stays.
    """
    if manifest.denoiser_calls == manifest.num_steps:
        return manifest.guidance_scale, manifest.pipeline_args
    run = getattr(diffusers, manifest.pipeline_class).__call__
    if "true_cfg_scale" in inspect.signature(run).parameters:
        return manifest.guidance_scale, manifest.pipeline_args | {"true_cfg_scale": 1.0}
    return 1.0, manifest.pipeline_args


def read_student_config(folder: Path) -> StudentConfig:
    """The configuration of the student in `folder`.

    Raises:
        UserError: there is none, or it is not one that accvideo wrote.
    """
    try:
        return parse(StudentConfig, (folder / "student.json").read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no finished student (no student.json); make one with accvideo distill"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'student.json'} is damaged: {error}") from error
