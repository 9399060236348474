"""The teacher as an editor: the student's videos are to need the corrections that the teacher's own videos need."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from accvideo.data.dataset import TrajectoryFolder
from accvideo.flow import euler_step, noised
from accvideo.losses import trajectory_loss
from accvideo.training.consistency import teacher_levels
from accvideo.training.distributed import made_by_first
from accvideo.training.guidance import Field, Guidance, GuidedTeacher, find_practice
from accvideo.training.recipe import DistillConfig
from accvideo.training.steps import Step, Sweep, Training, drawn_rows, student_step, student_sweeps, sweep_of_iteration
from accvideo.trajectory import TrajectoryBatch
from accvideo.types import Latents, PerSample, Sigmas, UserError


def correction_loss(video: Latents, recorded: Latents, corrected: Callable[[Latents], Latents]) -> PerSample:
    """The distance between the teacher's corrections of the student's video and of its own from the same noise.

    Asked what a noised video shows, the teacher answers with another one, of what it would rather see. To learn these
    answers (score distillation, Poole et al. 2022, arXiv:2209.14988) draws all videos to the most likely ones. The
    delta denoising score (Hertz et al. 2023, arXiv:2304.07090) takes off what the teacher changes, with the same noise,
    in a video that needs no change: here the recorded one, where the loss has its zero. It weighs errors by how little
    of them the teacher keeps: much where it would mend them, little where the same things are in other places.

    Args:
        video: the student's, with a gradient.
        recorded: the teacher's, from the noise that the student set out from.
        corrected: what the teacher takes a video for that is noised, by the same noise for both.
    """
    with torch.no_grad():
        target = recorded + (corrected(video) - corrected(recorded))
    return trajectory_loss(video, target)


@dataclass(frozen=True)
class CorrectionLesson:
    """The correction losses of an iteration's parts, in place of `steps.recorded_lesson`: see `correction_loss`."""

    guidance: Guidance | None
    levels: Sequence[tuple[float, str, int]]
    """Noise levels at which the teacher is asked: who is, and the recorded key point whose call is moved there."""
    sweeps: Sequence[Sweep]

    def __call__(
        self, training: Training, parts: Sequence[TrajectoryBatch], sigmas: Sigmas, step: Step
    ) -> Iterator[Tensor]:
        """The mean loss of each part: all of the student's steps, whichever is its turn, from the recorded noise."""
        generator, shape = training.rollouts.generator, parts[0].states.shape[2:]
        noises = drawn_rows(parts, lambda rows: torch.randn(rows, *shape, generator=generator))
        level, name, keypoint = self.levels[int(torch.randint(len(self.levels), (), generator=generator))]
        teacher = GuidedTeacher(training.student, sigmas, self.guidance)
        for part, noise in zip(parts, noises, strict=True):
            video = part.state(0)
            for each in sweep_of_iteration(self.sweeps, training.iteration):
                video = student_step(training.student, part, video, sigmas, each)
            field = teacher.field(part, keypoint, name)
            corrected = partial(predicted_again, field, noise, level, upwards=bool(sigmas[0] < sigmas[-1]))
            yield correction_loss(video, part.state(-1), corrected).mean()


def predicted_again(field: Field, noise: Latents, level: float, video: Latents, upwards: bool = False) -> Latents:
    """What a teacher takes a video for that is noised: the mean of all that it may be, if the teacher is exact.

    Args:
        field: the teacher's velocity.
        noise: to mix the video with.
        level: noise level.
        video: to predict again.
        upwards: whether levels are 0 at the noise and 1 at the video, as Mochi's are.
    """
    latents = noised(noise, video, level) if upwards else noised(video, noise, level)
    velocity = field(latents, torch.full((len(latents),), level, device=latents.device))
    return euler_step(latents, velocity, level, float(upwards))


def correction_lesson(config: DistillConfig, folder: TrajectoryFolder) -> CorrectionLesson:
    """The lesson for a data set's teacher.

    Raises:
        UserError: what `find_practice` refuses, or none of the teacher's steps starts at a level that is asked for.
    """
    manifest = folder.manifest
    practice = made_by_first(partial(find_practice, manifest, folder[0], config.media_folder, config.device))
    starts = teacher_levels(manifest, practice.denoisers)
    levels = [(level, name, keypoint) for keypoint, each in enumerate(starts) for level, name in each]
    low, high = config.correction_levels
    upwards = manifest.sigmas[0] < manifest.sigmas[-1]
    chosen = [each for each in levels if low <= (1 - each[0] if upwards else each[0]) <= high]
    if not chosen:
        shown = ", ".join(f"{level:.3g}" for level, _, _ in levels)
        raise UserError(
            f"correction_levels is {low:g} to {high:g}, and no step of {manifest.teacher} starts there\n"
            f"Its steps start at {shown}"
        )
    guidance = practice.guidance and practice.guidance.to(config.device)
    sweeps = student_sweeps(manifest.num_student_steps, config.num_student_steps, config.tell_size)
    return CorrectionLesson(guidance, chosen, sweeps)
