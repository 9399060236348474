"""Closed forms: a Gaussian's flow is known exactly."""

import math

import pytest
import torch

from accvideo.flow import euler_step, keypoint_indices, secant_velocity, shifted_sigmas
from accvideo.types import UserError

MEAN, DEVIATION = 1.5, 0.4


def gaussian_velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[noise - video | x] for video ~ N(MEAN, DEVIATION^2) and x = (1 - sigma) video + sigma noise."""
    variance = ((1 - sigma) * DEVIATION) ** 2 + sigma**2
    slope = (sigma - (1 - sigma) * DEVIATION**2) / variance
    return slope * (x - (1 - sigma) * MEAN) - MEAN


def gaussian_video(noise: torch.Tensor) -> torch.Tensor:
    """Where the exact flow leads from noise: Gaussians are mapped linearly onto each other."""
    return MEAN + DEVIATION * noise


def euler_solve(noise: torch.Tensor, num_steps: int, shift: float = 1.0) -> torch.Tensor:
    sigmas = shifted_sigmas(num_steps, shift).double().tolist()
    for sigma, next_sigma in zip(sigmas, sigmas[1:], strict=False):
        noise = euler_step(noise, gaussian_velocity(noise, sigma), sigma, next_sigma)
    return noise


def test_euler_is_first_order():
    """Twice the steps halve the error, measured against the exact flow."""
    noise = torch.randn(1, 4, 3, 8, 8, dtype=torch.float64)
    errors = [(euler_solve(noise, n) - gaussian_video(noise)).abs().max().item() for n in (160, 320)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("shift", [1.0, 7.0])
def test_euler_reaches_the_exact_flow(shift):
    noise = torch.randn(1, 4, dtype=torch.float64)
    assert (euler_solve(noise, 4000, shift) - gaussian_video(noise)).abs().max() < 2e-3


def test_shift_7_holds_the_sigmas_of_the_paper():
    """Every tenth of 50 levels, as in the paper's figure 5 (.9651 there is a misprint of .9655)."""
    exact = torch.tensor([1, 0.965517, 0.913043, 0.823529, 0.636364, 0])
    assert torch.allclose(shifted_sigmas(50, 7.0)[keypoint_indices(50, 5)], exact, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_few_steps_lie_on_many(shift):
    assert torch.equal(shifted_sigmas(5, shift), shifted_sigmas(50, shift)[::10])


def test_sigmas_fall_from_noise_to_video():
    sigmas = shifted_sigmas(50, 7.0)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and len(sigmas) == 51 and (sigmas.diff() < 0).all()


def test_secant_of_a_straight_trajectory_is_its_velocity():
    noise, video = torch.randn(2, 3, 4, 5, 6, 7)
    states = {sigma: (1 - sigma) * video + sigma * noise for sigma in (1.0, 0.75, 0.25)}
    for sigma, next_sigma in ((1.0, 0.75), (0.75, 0.25), (0.25, 1.0)):
        secant = secant_velocity(states[sigma], states[next_sigma], sigma, next_sigma)
        assert torch.allclose(secant, noise - video, atol=1e-5)


def test_an_euler_step_along_the_secant_leads_to_the_next_state():
    state, next_state = torch.randn(2, 2, 4, 2, 3, 3)
    secant = secant_velocity(state, next_state, 0.9655, 0.9130)
    assert torch.allclose(euler_step(state, secant, 0.9655, 0.9130), next_state, atol=1e-6)


def test_secant_is_formed_in_float32():
    state, next_state = torch.randn(2, 1, 4).bfloat16()
    assert secant_velocity(state, next_state, 1.0, 0.9655).dtype == torch.float32


def test_key_points_are_even():
    assert keypoint_indices(50, 5) == [0, 10, 20, 30, 40, 50]
    assert keypoint_indices(4, 4) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("num_student_steps", [3, 0, 100])
def test_key_points_that_do_not_divide_are_refused(num_student_steps):
    with pytest.raises(UserError, match=r"choose one of \[1, 2, 5, 10, 25, 50\]"):
        keypoint_indices(50, num_student_steps)
