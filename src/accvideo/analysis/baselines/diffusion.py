"""Forward diffusion, which accvideo itself never needs: what the methods compared with it have in common."""

import torch
from torch import Tensor

from accvideo.types import Latents


def noised(video: Latents, noise: Latents, sigma: Tensor | float) -> Latents:
    """A point on the straight line from a video to any noise, `(1 - sigma) video + sigma noise`.

    Lipman et al. 2023, arXiv:2210.02747. `sigma` is one level for all, or one a sample.
    """
    sigma = per_sample(sigma, video)
    return (1 - sigma) * video + sigma * noise


def predicted_video(latents: Latents, velocity: Latents, sigma: Tensor | float) -> Latents:
    """Where a velocity points at noise level 0: the mean of all videos that `latents` may be of, if it is exact."""
    return latents - per_sample(sigma, latents) * velocity


def per_sample(sigma: Tensor | float, latents: Latents) -> Tensor:
    """A noise level that multiplies a batch: a number, or one for each sample."""
    sigma = torch.as_tensor(sigma, dtype=latents.dtype, device=latents.device)
    return sigma.reshape(sigma.shape + (1,) * (latents.ndim - sigma.ndim)) if sigma.ndim else sigma
