"""The teacher asked at fresh noise: consistency within each of the student's steps, in place of recorded states."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.manifest import Manifest
from accvideo.flow import noised, per_sample
from accvideo.inference.schedulers import told_timestep
from accvideo.losses import trajectory_loss
from accvideo.student import Student
from accvideo.training.distributed import made_by_first
from accvideo.training.guidance import INSTEAD, Field, Guidance, GuidedTeacher, at_level, find_guidance
from accvideo.training.recipe import DistillConfig
from accvideo.training.steps import Step, Training, drawn_rows, is_told, student_sweeps
from accvideo.trajectory import TrajectoryBatch
from accvideo.types import Latents, PerSample, Sigmas, UserError


def consistency_loss(
    student: Field,
    teacher: Field,
    video: Latents,
    noise: Latents,
    sigma: Tensor,
    next_sigma: Tensor,
    end: float,
) -> PerSample:
    """The distance between where the student leads from a point, and from where one step of the teacher takes it.

    Latent consistency (Luo et al. 2023, arXiv:2310.04378) within each of the student's steps (phased consistency
    models, Wang et al. 2024, arXiv:2405.18407): from every point of a step the student is to lead to the step's end.
    Both points are led there, the second without a gradient by the same student (no running mean: Song and Dhariwal
    2023, arXiv:2310.14189, section 3.2). The distance is that of the velocities, so that steps weigh alike.

    Args:
        student: its velocity.
        teacher: its velocity, with guidance.
        video: of the distillation data.
        noise: drawn for it.
        sigma: noise level of each sample's point.
        next_sigma: the teacher's next level for each; none before `end`.
        end: noise level at which the student's step ends.
    """
    latents = noised(video, noise, sigma)
    stepped = latents + per_sample(next_sigma - sigma, latents) * teacher(latents, sigma)
    with torch.no_grad():
        led = stepped + per_sample(end - next_sigma, latents) * student(stepped, next_sigma)
    target = (led - latents) / per_sample(end - sigma, latents)
    return trajectory_loss(student(latents, sigma), target)


@dataclass(frozen=True)
class ConsistencyLesson:
    """The consistency losses of an iteration's parts, in place of `steps.recorded_lesson`."""

    guidance: Guidance | None
    levels: Sequence[Sequence[float]]
    """Noise levels of the teacher's steps, from each recorded key point to the next, both included."""

    def __call__(
        self, training: Training, parts: Sequence[TrajectoryBatch], sigmas: Sigmas, step: Step
    ) -> Iterator[Tensor]:
        """The mean loss of each part: noise, and a level of the teacher's within the step, are drawn for each row."""
        levels = torch.tensor([*(level for each in self.levels[step.start : step.end] for level in each[:-1])])
        following = torch.cat([levels[1:], sigmas[step.end : step.end + 1]])
        generator, shape = training.rollouts.generator, parts[0].states.shape[2:]
        noises = drawn_rows(parts, lambda rows: torch.randn(rows, *shape, generator=generator))
        places = drawn_rows(parts, lambda rows: torch.randint(len(levels), (rows,), generator=generator))
        teacher = GuidedTeacher(training.student, sigmas, self.guidance)
        upwards = bool(sigmas[0] < sigmas[-1])  # Mochi's noise levels are 0 at the noise and 1 at the video
        for part, noise, place in zip(parts, noises, places, strict=True):
            fields = student_field(training.student, part, sigmas, step), teacher.field(part, step.start)
            chosen = levels.to(place.device)[place], following.to(place.device)[place]
            video, noise = (noise, part.states[:, -1]) if upwards else (part.states[:, -1], noise)
            yield consistency_loss(*fields, video, noise, *chosen, end=float(sigmas[step.end])).mean()


def student_field(student: Student, batch: TrajectoryBatch, sigmas: Sigmas, step: Step) -> Field:
    """The student's velocity at noise levels within a step, told how far it goes where the step is."""
    recorded, end = (float(sigma) for sigma in sigmas[[step.start, step.end]])

    def velocity(latents: Latents, sigma: Tensor) -> Latents:
        call = at_level(batch.calls[step.start], recorded, sigma)
        if is_told(student, step):
            final = at_level(batch.calls[step.start], recorded, torch.full_like(sigma, end))
            told = told_timestep(call.tensors["timestep"], final.tensors["timestep"])
            call = replace(call, tensors=call.tensors | {"timestep": told})
        return student.velocity(batch.denoisers[step.start], call, latents)

    return velocity


def consistency_lesson(config: DistillConfig, folder: TrajectoryFolder) -> ConsistencyLesson:
    """The lesson for a data set's teacher; its pipeline is run for a few steps, where it is guided.

    Raises:
        UserError: the teacher changes its denoiser within one of the student's steps, or `find_guidance` refuses it.
    """
    manifest, trajectory = folder.manifest, folder[0]
    sweeps = student_sweeps(manifest.num_student_steps, config.num_student_steps)
    for step in (step for sweep in sweeps for step in sweep):
        if len(set(trajectory.denoisers[step.start : step.end + 1])) > 1:
            raise UserError(
                f"the teacher changes its denoiser somewhere between key points {step.start} and {step.end}, and the "
                f"data set does not say where\n{INSTEAD}"
            )
    find = partial(find_guidance, manifest, trajectory, config.media_folder, config.device)
    guidance = made_by_first(find)
    return ConsistencyLesson(guidance and guidance.to(config.device), teacher_levels(manifest))


def teacher_levels(manifest: Manifest) -> list[list[float]]:
    """Noise levels of the teacher's own steps, from each key point to the next, both included.

    Where another solver took fewer steps than the teacher does, each of them is cut into as many as make up for it.
    """
    cuts = math.ceil((manifest.teacher_num_steps or manifest.num_steps) / manifest.num_steps)

    def between(first: int, last: int) -> list[float]:
        pairs = pairwise(manifest.sigmas[first : last + 1])
        levels = [start + (end - start) * cut / cuts for start, end in pairs for cut in range(cuts)]
        return [*levels, manifest.sigmas[last]]

    return [between(first, last) for first, last in pairwise(manifest.keypoints)]
