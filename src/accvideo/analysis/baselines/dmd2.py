"""Distribution matching distillation with an adversarial term: DMD2 (Yin et al. 2024, arXiv:2405.14867)."""

from accvideo.types import Latents, PerSample


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
