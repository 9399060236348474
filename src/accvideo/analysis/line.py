"""The flow from noise to a few points of the line, exactly; and how far a data set lies from it."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from accvideo.analysis.networks import Points
from accvideo.flow import euler_step

Velocity = Callable[[Points, Points | float], Points]
"""A velocity field: points and noise levels in, velocities out."""

DATA = (-3.0, 3.0)
"""What the teacher is trained on (Zhang et al. 2025, arXiv:2503.19462, supplement A)."""


def exact_velocity(x: Tensor, sigma: Tensor | float, points: Sequence[float] = DATA) -> Tensor:
    """The velocity that flow matching has as its limit, for data that are these points, equally often.

    `(x - E[x_0 | x]) / sigma` with `x = (1 - sigma) x_0 + sigma noise` (Lipman et al. 2023, arXiv:2210.02747).
    """
    sigma = torch.as_tensor(sigma, dtype=x.dtype).expand_as(x)[..., None]
    data = torch.tensor(points, dtype=x.dtype)
    weights = torch.softmax(-((x[..., None] - (1 - sigma) * data) ** 2) / (2 * sigma**2), dim=-1)
    return (x - (weights * data).sum(-1)) / sigma[..., 0]


def trajectories(
    velocity: Velocity, noise: Points, sigmas: Float[Tensor, " levels"]
) -> Float[Tensor, "networks samples levels"]:
    """The states of an Euler solve from noise at all levels."""
    states = [noise]
    for sigma, next_sigma in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        states.append(euler_step(states[-1], velocity(states[-1], sigma), sigma, next_sigma))
    return torch.stack(states, dim=-1)


def moved_data(mismatch: float) -> tuple[float, float]:
    """Data for distillation at a degree of mismatch M: both points moved outwards by M / 2.

    Eq. 4 of arXiv:2503.19462, the sum of the distances to the nearest point of the training data, is then M. The paper
    does not say where it moves its points.
    """
    return -3.0 - mismatch / 2, 3.0 + mismatch / 2


def off_trajectory(
    points: Float[Tensor, " samples"], states: Float[Tensor, " trajectories"], tolerance: float
) -> Bool[Tensor, " samples"]:
    """Whether points lie farther than `tolerance` from all trajectories' states at their noise level."""
    ordered = states.sort().values
    right = torch.searchsorted(ordered, points).clamp(max=len(ordered) - 1)
    left = (right - 1).clamp(min=0)
    nearest = torch.minimum((points - ordered[left]).abs(), (points - ordered[right]).abs())
    return nearest > tolerance


def useless_share(
    data: Sequence[float],
    states: Float[Tensor, "trajectories levels"],
    sigmas: Float[Tensor, " levels"],
    tolerance: float,
    generator: torch.Generator,
    num_samples: int = 2000,
) -> float:
    """Share of forward-diffused points that lie on no trajectory of the teacher ("useless data points").

    Noise is drawn anew for each point; every noise level of the grid but 0 counts the same.

    Args:
        data: the distillation data, each point equally often.
        states: the teacher's trajectories.
        sigmas: their noise levels.
        tolerance: farther than this from all of them is off.
        generator: of the noise.
        num_samples: points at each noise level.
    """
    videos = torch.tensor(data).repeat(num_samples // len(data))
    shares = []
    for level, sigma in enumerate(sigmas[:-1].tolist()):
        points = (1 - sigma) * videos + sigma * torch.randn(len(videos), generator=generator)
        shares.append(off_trajectory(points, states[:, level], tolerance).float().mean())
    return float(torch.stack(shares).mean())
