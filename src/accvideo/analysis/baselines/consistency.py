"""Consistency distillation in phases: LCM (Luo et al. 2023, arXiv:2310.04378) within each step of the student.

With one phase the student is a latent consistency model. With K phases (phased consistency models, Wang et al. 2024,
arXiv:2405.18407) it maps every point of a phase to the phase's end, and K Euler steps sample it.
"""

import torch
from torch import Tensor

from accvideo.analysis.baselines.diffusion import noised, per_sample
from accvideo.analysis.baselines.guided import Field
from accvideo.losses import trajectory_loss
from accvideo.types import Latents, PerSample


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

    Both are led to the end of the phase, the second without a gradient by the same student (no running mean: Song and
    Dhariwal 2023, arXiv:2310.14189, section 3.2). The distance is that of the velocities, so that phases weigh alike.

    Args:
        student: its velocity.
        teacher: its velocity, with guidance.
        video: of the distillation data.
        noise: drawn for it.
        sigma: noise level of each sample's point.
        next_sigma: the teacher's next level for each; none before `end`.
        end: noise level at which the phase ends.
    """
    latents = noised(video, noise, sigma)
    stepped = latents + per_sample(next_sigma - sigma, latents) * teacher(latents, sigma)
    with torch.no_grad():
        led = stepped + per_sample(end - next_sigma, latents) * student(stepped, next_sigma)
    target = (led - latents) / per_sample(end - sigma, latents)
    return trajectory_loss(student(latents, sigma), target)
