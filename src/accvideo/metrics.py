"""Measures of clips and latents, and the 95 % intervals of their means. Pure functions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from accvideo.types import Latents, PerSample

Clips = UInt8[Tensor, "batch frames height width 3"]
"""A batch of clips, RGB."""

PSNR_LIMIT = 100.0
"""PSNR in dB given to clips that are equal, so that means stay finite."""

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A measured value and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def wilson_interval(successes: int, total: int) -> Estimate:
    """A proportion with its 95 % score interval (Wilson 1927, J. Am. Stat. Assoc. 22, 209-212)."""
    proportion = successes / total
    shrink = 1 + _Z95**2 / total
    center = (proportion + _Z95**2 / (2 * total)) / shrink
    half = _Z95 / shrink * math.sqrt(proportion * (1 - proportion) / total + _Z95**2 / (4 * total**2))
    return Estimate(proportion, max(0.0, center - half), min(1.0, center + half))


def mean(values: np.ndarray) -> float:
    """The arithmetic mean."""
    return float(values.mean())


def bootstrap_interval(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float] = mean,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A statistic of samples with its 95 % percentile bootstrap interval (Efron 1979, Ann. Stat. 7, 1-26).

    Args:
        values: One row a sample.
        statistic: What is estimated, a function of resampled rows.
        num_resamples: Number of resamples.
        seed: Seed of the resampling; the same seed gives the same interval.
    """
    generator = np.random.default_rng(seed)
    resamples = [statistic(values[generator.integers(0, len(values), len(values))]) for _ in range(num_resamples)]
    low, high = np.quantile(resamples, (0.025, 0.975))
    return Estimate(statistic(values), float(low), float(high))


def resampled(
    num_samples: int, statistic: Callable[[np.ndarray], float], num_resamples: int = 30, seed: int = 0
) -> np.ndarray:
    """A statistic of samples, and then of bootstrap resamples of them.

    Args:
        num_samples: Number of samples.
        statistic: What is estimated, a function of the samples' indices.
        num_resamples: Number of resamples.
        seed: Seed of the resampling; the same seed draws the same samples, so that two statistics can be subtracted.
    """
    generator = np.random.default_rng(seed)
    drawn = [generator.integers(0, num_samples, num_samples) for _ in range(num_resamples)]
    return np.array([statistic(indices) for indices in (np.arange(num_samples), *drawn)])


def deviation_interval(values: np.ndarray, least: float = 0.0) -> Estimate:
    """A statistic of samples, plus and minus 1.96 bootstrap standard deviations.

    For distances between a sample and a distribution: repeated samples raise them, so that percentiles of their
    resamples may not even hold the statistic itself.

    Args:
        values: As `resampled` gives them.
        least: The statistic is never below; nor is the interval.
    """
    value, half = float(values[0]), _Z95 * float(np.std(values[1:], ddof=1))
    return Estimate(value, max(least, value - half), value + half)


def psnr(clips: Clips, references: Clips) -> PerSample:
    """Peak signal-to-noise ratio of each clip against its reference in dB, at most `PSNR_LIMIT`."""
    mse = (clips.float() - references.float()).square().flatten(1).mean(1)
    return (20 * math.log10(255) - 10 * torch.log10(mse)).clamp(max=PSNR_LIMIT)


def flicker(clips: Clips) -> PerSample:
    """Mean absolute second difference in time of each clip, in levels of 255.

    A still clip and one that fades evenly have none; a clip whose brightness jumps back and forth by `a` has `2 a`.
    """
    values = clips.float()
    second_difference = values[:, 2:] - 2 * values[:, 1:-1] + values[:, :-2]
    return second_difference.abs().flatten(1).mean(1)


def motion_energy(clips: Float[Tensor, "batch frames height width 3"]) -> PerSample:
    """Mean squared difference of neighboring frames of each clip.

    The energy of the difference of two clips, over that of one of them, says how far the other moves differently: 0 is
    the same motion, whatever the clips look like; 1 is what a still clip has.
    """
    return clips.diff(dim=1).square().flatten(1).mean(1)


def energy_ratio(rows: np.ndarray) -> float:
    """Sum of the first column over that of the second: a ratio in which clips that hardly move have little say."""
    return float(rows[:, 0].sum() / max(rows[:, 1].sum(), 1e-12))


def frechet_distance(features: Float[Tensor, "clips width"], references: Float[Tensor, "others width"]) -> float:
    """Squared Frechet distance of the Gaussians with the mean and covariance of two samples.

    Dowson and Landau 1982, J. Multivar. Anal. 12, 450-455; of the features of a video network it is FVD (Unterthiner et
    al. 2018, arXiv:1812.01717).
    """
    means, covariances = [], []
    for sample in (features.double(), references.double()):
        means.append(sample.mean(0))
        covariances.append((sample - means[-1]).T @ (sample - means[-1]) / len(sample))
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    return float((means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * mixed)


def latent_mse(latents: Latents, references: Latents) -> PerSample:
    """Mean squared difference of each sample's latents."""
    return (latents.float() - references.float()).square().flatten(1).mean(1)


def wasserstein_distance(
    first: Float[Tensor, " n"] | Sequence[float], second: Float[Tensor, " m"] | Sequence[float]
) -> float:
    """1-Wasserstein distance of two samples on the line: the area between their distribution functions.

    The samples may differ in size; the unit is theirs.
    """
    a, b = (torch.as_tensor(values, dtype=torch.float64).sort().values for values in (first, second))
    points = torch.cat([a, b]).sort().values
    gap = torch.searchsorted(a, points[:-1], right=True) / len(a) - torch.searchsorted(
        b, points[:-1], right=True
    ) / len(b)
    return float((gap.abs() * points.diff()).sum())
