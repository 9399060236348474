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


def deviation_interval(
    num_samples: int, statistic: Callable[[np.ndarray], float], num_resamples: int = 30, seed: int = 0
) -> Estimate:
    """A statistic of samples, plus and minus 1.96 bootstrap standard deviations, not below zero.

    For distances between a sample and a distribution: repeated samples raise them, so that percentiles of their
    resamples may not even hold the statistic itself.

    Args:
        num_samples: Number of samples.
        statistic: What is estimated, a function of the samples' indices.
        num_resamples: Number of resamples.
        seed: Seed of the resampling.
    """
    generator = np.random.default_rng(seed)
    resamples = [statistic(generator.integers(0, num_samples, num_samples)) for _ in range(num_resamples)]
    value, half = statistic(np.arange(num_samples)), _Z95 * float(np.std(resamples, ddof=1))
    return Estimate(value, max(0.0, value - half), value + half)


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
