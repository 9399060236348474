"""Videos that are Gaussian, whose flow is known: closed forms for losses that ask a teacher."""

import torch
from torch import Tensor

from accvideo.types import Latents

DEVIATION = 0.5
"""Of the Gaussian videos of the closed forms below."""


def scale(sigma: Tensor) -> Tensor:
    """The exact flow of N(0, s^2) scales its noise by sqrt(((1 - sigma) s)^2 + sigma^2)."""
    return (((1 - sigma) * DEVIATION) ** 2 + sigma**2).sqrt()


def gaussian_velocity(latents: Latents, sigma: Tensor, mean: float = 0.0) -> Latents:
    """The exact velocity of videos drawn from N(mean, s^2): (x - E[video | x]) / sigma."""
    column = sigma.reshape(-1, 1)
    keep = (1 - column) * DEVIATION**2 / scale(column) ** 2
    return (latents - mean - keep * (latents - (1 - column) * mean)) / column


def leading_to(end: float, latents: Latents, sigma: Tensor) -> Latents:
    """The velocity of a perfect student of steps that end at a noise level: straight to where the exact flow goes."""
    column = sigma.reshape(-1, 1)
    return latents * (scale(torch.tensor(end)) / scale(column) - 1) / (end - column)


def draws() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    video, noise = torch.randn(2, 512, 1, dtype=torch.float64, generator=generator)
    return DEVIATION * video, noise
