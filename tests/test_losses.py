import math

import pytest
import torch

from accvideo.flow import secant_velocity
from accvideo.losses import ADVERSARIAL_LOSSES, trajectory_loss


def test_trajectory_loss_is_zero_for_a_student_that_returns_the_secant_velocity():
    states = torch.randn(3, 2, 4, 2, 5, 5)
    target = secant_velocity(states[:, 0], states[:, 1], 0.9655, 0.9130)
    assert torch.equal(trajectory_loss(target, target), torch.zeros(3))


def test_trajectory_loss_is_a_mean_over_elements_for_each_sample():
    velocity = torch.zeros(2, 4, 3)
    target = torch.stack([torch.full((4, 3), 2.0), torch.full((4, 3), -3.0)])
    assert trajectory_loss(velocity, target).tolist() == [4, 9]


def test_trajectory_loss_is_computed_in_float32():
    """The difference of two close numbers is lost in bfloat16."""
    velocity, target = torch.full((1, 8), 256.0).bfloat16(), torch.full((1, 8), 257.0)
    assert trajectory_loss(velocity, target).item() == 1


@pytest.mark.parametrize("name", ["nonsaturating", "saturating"])
def test_cross_entropy_of_heads_that_know_nothing_is_two_ln_2(name: str):
    loss = ADVERSARIAL_LOSSES[name].head(torch.zeros(3, 7), torch.zeros(3, 7))
    assert torch.allclose(loss, torch.full((3,), 2 * math.log(2)))


def test_cross_entropy_is_equation_7():
    """L_adv = log D(real) + log(1 - D(fake)), which the heads maximize and the student minimizes."""
    real, fake = torch.randn(4, 6), torch.randn(4, 6)
    value = real.sigmoid().log().mean(1) + (1 - fake.sigmoid()).log().mean(1)
    saturating = ADVERSARIAL_LOSSES["saturating"]
    assert torch.allclose(saturating.head(real, fake), -value)
    assert torch.allclose(saturating.generator(fake), (1 - fake.sigmoid()).log().mean(1), atol=1e-6)
    assert torch.allclose(ADVERSARIAL_LOSSES["nonsaturating"].generator(fake), -fake.sigmoid().log().mean(1), atol=1e-6)


def test_hinge_stops_at_the_margin():
    hinge = ADVERSARIAL_LOSSES["hinge"]
    assert hinge.head(torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 0.0]])).item() == pytest.approx(0.25 + 0.5)
    assert hinge.generator(torch.tensor([[2.0, 4.0]])).item() == -3


@pytest.mark.parametrize("name", list(ADVERSARIAL_LOSSES))
def test_student_and_heads_pull_the_logits_of_fakes_in_opposite_directions(name: str):
    loss = ADVERSARIAL_LOSSES[name]
    logits = torch.zeros(2, 5, requires_grad=True)
    (student,) = torch.autograd.grad(loss.generator(logits).sum(), logits)
    (heads,) = torch.autograd.grad(loss.head(torch.zeros(2, 5), logits).sum(), logits)
    assert (student < 0).all() and (heads > 0).all()


def test_saturating_loss_fades_where_the_heads_win():
    logits = torch.full((1, 1), -12.0, requires_grad=True)
    gradients = {
        name: torch.autograd.grad(ADVERSARIAL_LOSSES[name].generator(logits).sum(), logits)[0].abs().item()
        for name in ("nonsaturating", "saturating")
    }
    assert gradients["saturating"] < 1e-4 and gradients["nonsaturating"] > 0.99
