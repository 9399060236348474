"""Distribution matching distillation with an adversarial term: DMD2 (Yin et al. 2024, arXiv:2405.14867)."""

import torch
from torch import Tensor

from accvideo.flow import noised, per_sample
from accvideo.losses import trajectory_loss
from accvideo.training.guidance import Field
from accvideo.types import Latents, PerSample


def predicted_video(latents: Latents, velocity: Latents, sigma: Tensor | float) -> Latents:
    """Where a velocity points at noise level 0: the mean of all videos that `latents` may be of, if it is exact."""
    return latents - per_sample(sigma, latents) * velocity


def distribution_matching_gradient(video: Latents, real: Latents, fake: Latents) -> Latents:
    """The direction in which a student's video raises the reverse KL divergence to the teacher's distribution.

    Yin et al. 2023 (arXiv:2311.18828), Eq. 7 and 8: the difference of two scores at a noised video, which is that of
    the two predicted videos times a factor of the noise level; divided by the mean distance to the teacher's.

    Args:
        video: the student's.
        real: predicted by the teacher from `video` with noise.
        fake: predicted from the same by a network that follows the student's distribution.
    """
    distance = (video - real).abs().flatten(1).mean(1)
    return (fake - real) / distance.clamp(min=1e-8).reshape(-1, *[1] * (video.ndim - 1))


def distribution_matching_loss(video: Latents, real: Latents, fake: Latents) -> PerSample:
    """A loss whose gradient at `video` is `distribution_matching_gradient` over the number of elements."""
    gradient = distribution_matching_gradient(video, real, fake).detach()
    return (video * gradient).flatten(1).mean(1)


def fake_score_loss(fake: Field, video: Latents, noise: Latents, sigma: Tensor) -> PerSample:
    """Flow matching on the student's own videos, by which the fake score follows its distribution.

    Yin et al. 2023 (arXiv:2311.18828), Eq. 6.
    """
    return trajectory_loss(fake(noised(video, noise, sigma), sigma), noise - video)


def student_loss(real: Field, fake: Field, video: Latents, noise: Latents, sigma: Tensor) -> PerSample:
    """Distribution matching at a noised video: its gradient lowers the reverse KL divergence to the teacher's.

    Args:
        real: the teacher's velocity, with guidance.
        fake: the velocity that follows the student's videos.
        video: the student's, with a gradient.
        noise: drawn for it.
        sigma: one noise level a sample.
    """
    with torch.no_grad():
        latents = noised(video, noise, sigma)
        predictions = [predicted_video(latents, field(latents, sigma), sigma) for field in (real, fake)]
    return distribution_matching_loss(video, *predictions)
