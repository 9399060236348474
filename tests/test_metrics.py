import math

import numpy as np
import pytest
import torch

from accvideo.metrics import (
    PSNR_LIMIT,
    bootstrap_interval,
    deviation_interval,
    energy_ratio,
    flicker,
    frechet_distance,
    latent_mse,
    motion_energy,
    psnr,
    resampled,
    wasserstein_distance,
    wilson_interval,
)


def test_wilson_solves_its_equation():
    """Both ends are the proportions p whose 1.96 standard errors just reach the measured one."""
    estimate = wilson_interval(460, 500)
    assert estimate.mean == 0.92
    for end in (estimate.low, estimate.high):
        assert abs(estimate.mean - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 500), rel=1e-6)


def test_wilson_stays_inside_the_unit_interval_and_is_never_empty():
    all_right, all_wrong = wilson_interval(20, 20), wilson_interval(0, 20)
    assert all_right.high == 1 and all_right.low == pytest.approx(20 / (20 + 1.959964**2))
    assert (all_wrong.low, all_wrong.high) == (0, pytest.approx(1 - all_right.low))


def test_bootstrap_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(1).normal(3, 2, 2000)
    estimate = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert estimate.mean == values.mean()
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap_interval(values) == estimate


def test_bootstrap_resamples_rows():
    """A statistic of two columns sees them paired: their difference is the same in every resample."""
    rows = np.stack([np.arange(10.0), np.arange(10.0) + 5], 1)
    estimate = bootstrap_interval(rows, lambda values: float((values[:, 1] - values[:, 0]).mean()))
    assert (estimate.mean, estimate.low, estimate.high) == (5, 5, 5)


def test_deviation_interval_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(1).normal(3, 2, 500)
    estimate = deviation_interval(resampled(500, lambda rows: float(values[rows].mean()), num_resamples=400))
    half = 1.96 * values.std() / math.sqrt(500)
    assert estimate.mean == values.mean()
    assert estimate.high - estimate.mean == pytest.approx(half, rel=0.15)
    assert estimate.mean - estimate.low == pytest.approx(estimate.high - estimate.mean)
    assert deviation_interval(np.array([0.1, -2.0, 2.0])).low == 0
    assert deviation_interval(np.array([0.1, -2.0, 2.0]), least=-math.inf).low == pytest.approx(
        0.1 - 1.96 * 8**0.5, rel=1e-3
    )


def test_psnr_of_a_constant_error():
    reference = torch.randint(0, 200, (3, 4, 8, 8, 3), dtype=torch.uint8)
    clips = torch.stack([reference[0], reference[1] + 1, reference[2] + 10])
    expected = torch.tensor([PSNR_LIMIT, 20 * math.log10(255), 20 * math.log10(25.5)])
    torch.testing.assert_close(psnr(clips, reference), expected)


def test_flicker_sees_jumps_only():
    still = torch.full((1, 9, 4, 4, 3), 90, dtype=torch.uint8)
    fading = still + torch.arange(9, dtype=torch.uint8).view(1, 9, 1, 1, 1) * 5
    jumping = still + torch.tensor([0, 6] * 4 + [0], dtype=torch.uint8).view(1, 9, 1, 1, 1)
    torch.testing.assert_close(flicker(torch.cat([still, fading, jumping])), torch.tensor([0.0, 0.0, 12.0]))


def test_latent_mse_is_a_value_a_sample():
    latents = torch.randn(3, 2, 4, 4)
    offset = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(latent_mse(latents + offset, latents), torch.tensor([0.0, 1.0, 9.0]))


def test_wasserstein_distance_against_closed_forms():
    values = torch.rand(50)
    assert wasserstein_distance(values, values[torch.randperm(50)]) == pytest.approx(0, abs=1e-12)
    assert wasserstein_distance(values, values + 2.5) == pytest.approx(2.5, rel=1e-6)
    # Quantile functions 0, 1 and 0, 1, 2 differ by 0, 1, 0, 1 on quarters [1/3, 1/2] and [2/3, 1].
    assert wasserstein_distance([0.0, 1.0], [0.0, 1.0, 2.0]) == pytest.approx(1 / 6 + 1 / 3)


def test_motion_error_is_of_motion_only():
    """Another picture that moves alike has none, a still one has 1, and one that moves the opposite way has 4."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(2, 6, 8, 8, 3, generator=generator) * 255
    still = reference[:, :1].expand(-1, 6, -1, -1, -1)
    energy = motion_energy(reference)
    assert energy.shape == (2,)
    assert motion_energy(reference + 17 - reference) == pytest.approx(torch.zeros(2), abs=1e-6)
    assert motion_energy(still - reference) == pytest.approx(energy)
    assert motion_energy(-reference - reference) == pytest.approx(4 * energy)


def test_still_references_have_little_say_in_the_ratio():
    """One clip of no motion among others changes nothing, where a mean of ratios would be infinite."""
    assert energy_ratio(np.array([[1.0, 4.0], [2.0, 4.0], [0.0, 0.0]])) == 3 / 8
    assert math.isfinite(energy_ratio(np.zeros((3, 2))))


def test_frechet_distance_of_known_gaussians():
    """|m1 - m2|^2 + sum (s1 - s2)^2 in the axes of covariances that commute, exact for samples of exact moments."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    scales, others, shift = (torch.tensor(values) for values in ([1.0, 2.0, 3.0], [2.0, 0.5, 3.0], [0.0, 1.0, -2.0]))
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q
    first, second = corners * scales @ rotation, (corners * others + shift) @ rotation
    expected = shift.square().sum().item() + (scales - others).square().sum().item()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_fewer_clips_than_features():
    """Their covariances are singular: still no distance to itself, and that of a shift is its square."""
    sample = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(sample, sample) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(sample + 0.5, sample) == pytest.approx(40 * 0.25, rel=1e-4)
