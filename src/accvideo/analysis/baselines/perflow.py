"""Knowledge distillation from forward-diffused points, the recipe of PeRFlow (Yan et al. 2024, arXiv:2405.07510)."""

from torch import Tensor

from accvideo.flow import noised, secant_velocity
from accvideo.losses import trajectory_loss
from accvideo.training.guidance import Field
from accvideo.types import Latents, PerSample


def window_loss(student: Field, teacher: Field, video: Latents, noise: Latents, levels: Tensor) -> PerSample:
    """The student's distance from the straight line that the teacher's steps through a window come down to.

    The window starts at a forward-diffused point: noise drawn for the video, not the noise that the teacher would make
    it from. But for that point, this is AccVideo's trajectory loss. PeRFlow also trains between the ends of a window,
    which sampling by whole windows never visits.

    Args:
        student: its velocity.
        teacher: its velocity, with guidance.
        video: of the distillation data.
        noise: drawn for it.
        levels: noise levels of the teacher's steps through the window, `[steps + 1]`.
    """
    start = noised(video, noise, levels[0])
    end = solve(teacher, start, levels)
    target = secant_velocity(start, end, float(levels[0]), float(levels[-1]))
    return trajectory_loss(student(start, levels[0].expand(len(start))), target)


def solve(field: Field, latents: Latents, levels: Tensor) -> Latents:
    """Euler steps through noise levels `[steps + 1]`, the same for all samples."""
    for sigma, next_sigma in zip(levels[:-1], levels[1:], strict=True):
        latents = latents + (next_sigma - sigma) * field(latents, sigma.expand(len(latents)))
    return latents
