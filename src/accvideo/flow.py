"""The mathematics of a flow's denoising trajectory: noise levels, Euler steps, secant velocities, key points."""

import torch
from torch import Tensor

from accvideo.types import Latents, Sigmas, UserError


def shifted_sigmas(num_steps: int, shift: float = 1.0) -> Sigmas:
    """Noise levels of an Euler solve with `num_steps` steps, from 1 (noise) to 0 (video), computed in float64.

    A uniform grid `u` bent towards noise: `shift * u / (1 + (shift - 1) * u)` (Esser et al. 2024, arXiv:2403.03206,
    resolution-dependent shifting). It acts on each level alone: K steps are every (S / K)-th level of S steps.
    """
    uniform = torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps
    return (shift * uniform / (1 + (shift - 1) * uniform)).float()


def noised(video: Latents, noise: Latents, sigma: Tensor | float) -> Latents:
    """A point on the straight line from a video to any noise, `(1 - sigma) video + sigma noise`.

    Lipman et al. 2023, arXiv:2210.02747. `sigma` is one level for all, or one a sample.
    """
    sigma = per_sample(sigma, video)
    return (1 - sigma) * video + sigma * noise


def per_sample(sigma: Tensor | float, latents: Latents) -> Tensor:
    """A noise level that multiplies a batch: a number, or one for each sample."""
    sigma = torch.as_tensor(sigma, dtype=latents.dtype, device=latents.device)
    return sigma.reshape(sigma.shape + (1,) * (latents.ndim - sigma.ndim)) if sigma.ndim else sigma


def euler_step(latents: Latents, velocity: Latents, sigma: float, next_sigma: float) -> Latents:
    """The state at `next_sigma`, one Euler step along `velocity`; Zhang et al. 2025, Eq. 5, arXiv:2503.19462."""
    return latents + (next_sigma - sigma) * velocity


def secant_velocity(latents: Latents, next_latents: Latents, sigma: float, next_sigma: float) -> Latents:
    """Mean velocity between two states of a trajectory, in float32; Zhang et al. 2025, Eq. 6, arXiv:2503.19462.

    One Euler step along it leads from `latents` to `next_latents`: it is what the student learns.
    """
    return (next_latents.float() - latents.float()) / (next_sigma - sigma)


def even_grid(num_steps: int, num_student_steps: int) -> list[int]:
    """The K + 1 of the S + 1 states of a trajectory that lie as evenly as whole numbers allow.

    Raises:
        UserError: K is not from 1 to S.
    """
    if not 1 <= num_student_steps <= num_steps:
        raise UserError(
            f"{num_student_steps} student steps of {num_steps} recorded ones; choose from 1 to {num_steps}, "
            "or record more states"
        )
    return [round(k * num_steps / num_student_steps) for k in range(num_student_steps + 1)]


def keypoint_indices(num_steps: int, num_student_steps: int) -> list[int]:
    """The K + 1 of the S + 1 states of a trajectory that a student of K steps visits: every (S / K)-th.

    Raises:
        UserError: K does not divide S.
    """
    if num_student_steps < 1 or num_steps % num_student_steps:
        divisors = [number for number in range(1, num_steps + 1) if num_steps % number == 0]
        raise UserError(
            f"{num_student_steps} student steps do not divide the teacher's {num_steps} steps; choose one of {divisors}"
        )
    return list(range(0, num_steps + 1, num_steps // num_student_steps))
