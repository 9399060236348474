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
from accvideo.training.guidance import Field, Guidance, GuidedTeacher, at_level, find_practice
from accvideo.training.recipe import DistillConfig
from accvideo.training.steps import Step, Training, drawn_rows, is_told
from accvideo.trajectory import TrajectoryBatch
from accvideo.types import Latents, PerSample, Sigmas


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
    levels: Sequence[Sequence[tuple[float, str]]]
    """Noise levels at which the teacher's steps start, from each recorded key point to the next, and who takes them."""

    def __call__(
        self, training: Training, parts: Sequence[TrajectoryBatch], sigmas: Sigmas, step: Step
    ) -> Iterator[Tensor]:
        """The mean loss of each part: noise, and a level of the teacher's within the step, are drawn for each row."""
        starts = [start for each in self.levels[step.start : step.end] for start in each]
        levels = torch.tensor([level for level, _ in starts] + [float(sigmas[step.end])])
        generator, shape = training.rollouts.generator, parts[0].states.shape[2:]
        # All rows at levels of one denoiser, which is drawn as often as it has levels.
        name = starts[int(torch.randint(len(starts), (), generator=generator))][1]
        among = torch.tensor([number for number, (_, denoiser) in enumerate(starts) if denoiser == name])
        noises = drawn_rows(parts, lambda rows: torch.randn(rows, *shape, generator=generator))
        places = drawn_rows(parts, lambda rows: among[torch.randint(len(among), (rows,), generator=generator)])
        teacher = GuidedTeacher(training.student, sigmas, self.guidance)
        upwards = bool(sigmas[0] < sigmas[-1])  # Mochi's noise levels are 0 at the noise and 1 at the video
        levels = levels.to(noises[0].device)
        for part, noise, place in zip(parts, noises, places, strict=True):
            fields = student_field(training.student, part, sigmas, step), teacher.field(part, step.start, name)
            video, noise = (noise, part.state(-1)) if upwards else (part.state(-1), noise)
            chosen = levels[place], levels[place + 1]
            yield consistency_loss(*fields, video, noise, *chosen, end=float(sigmas[step.end])).mean()


def student_field(student: Student, batch: TrajectoryBatch, sigmas: Sigmas, step: Step) -> Field:
    """The student's velocity at noise levels within a step, told how far it goes where the step is."""
    recorded, end = (float(sigma) for sigma in sigmas[[step.start, step.end]])

    def velocity(latents: Latents, sigma: Tensor) -> Latents:
        call = at_level(batch.call(step.start), recorded, sigma)
        if is_told(student, step):
            final = at_level(batch.call(step.start), recorded, torch.full_like(sigma, end))
            told = told_timestep(call.tensors["timestep"], final.tensors["timestep"])
            call = replace(call, tensors=call.tensors | {"timestep": told})
        return student.velocity(batch.denoisers[step.start], call, latents)

    return velocity


def consistency_lesson(config: DistillConfig, folder: TrajectoryFolder) -> ConsistencyLesson:
    """The lesson for a data set's teacher.

    Raises:
        UserError: what `find_practice` refuses.
    """
    practice = made_by_first(partial(find_practice, folder.manifest, folder[0], config.media_folder, config.device))
    guidance = practice.guidance and practice.guidance.to(config.device)
    return ConsistencyLesson(guidance, teacher_levels(folder.manifest, practice.denoisers))


def teacher_levels(manifest: Manifest, denoisers: Sequence[str]) -> list[list[tuple[float, str]]]:
    """Noise levels at which the teacher's own steps start, from each key point to the next, and who takes them.

    Where another solver took fewer steps than the teacher does, each of them is cut into as many as make up for it.

    Args:
        manifest: of the data set.
        denoisers: their names, for each of its steps.
    """
    cuts = math.ceil((manifest.teacher_num_steps or manifest.num_steps) / manifest.num_steps)
    steps = [
        [(start + (end - start) * cut / cuts, name) for cut in range(cuts)]
        for (start, end), name in zip(pairwise(manifest.sigmas), denoisers, strict=True)
    ]
    return [[level for step in steps[first:last] for level in step] for first, last in pairwise(manifest.keypoints)]
