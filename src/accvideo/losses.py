"""Losses as pure functions: float32 in, one value a sample out."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu, softplus

from accvideo.types import Latents, PerSample

Logits = Float[Tensor, "batch tokens"]
"""One real-or-fake logit a token; above 0 is real."""


def trajectory_loss(velocity: Latents, target: Latents) -> PerSample:
    """Mean squared distance of the student's velocity and the teacher's mean velocity between two key points.

    `target` is `flow.secant_velocity` of the two stored states. Zhang et al. 2025 (arXiv:2503.19462), Eq. 6, as a mean
    over elements.
    """
    return (velocity.float() - target.float()).square().flatten(1).mean(1)


def nonsaturating_generator_loss(fake: Logits) -> PerSample:
    """`-log D(fake)`: keeps the student's gradient while the heads win (Goodfellow et al. 2014, section 3)."""
    return softplus(-fake).mean(1)


def saturating_generator_loss(fake: Logits) -> PerSample:
    """`log(1 - D(fake))`: the student's half of Zhang et al. 2025 (arXiv:2503.19462), Eq. 7, read literally."""
    return -softplus(fake).mean(1)


def cross_entropy_head_loss(real: Logits, fake: Logits) -> PerSample:
    """`-log D(real) - log(1 - D(fake))`: the heads' half of Zhang et al. 2025 (arXiv:2503.19462), Eq. 7."""
    return softplus(-real).mean(1) + softplus(fake).mean(1)


def hinge_generator_loss(fake: Logits) -> PerSample:
    """The student's half of the hinge loss (Lim and Ye 2017, arXiv:1705.02894)."""
    return -fake.mean(1)


def hinge_head_loss(real: Logits, fake: Logits) -> PerSample:
    """The heads' half of the hinge loss (Lim and Ye 2017, arXiv:1705.02894)."""
    return relu(1 - real).mean(1) + relu(1 + fake).mean(1)


@dataclass(frozen=True)
class AdversarialLoss:
    """The two halves of an adversarial loss; each is to be minimized."""

    generator: Callable[[Logits], PerSample]
    head: Callable[[Logits, Logits], PerSample]


ADVERSARIAL_LOSSES = {
    "nonsaturating": AdversarialLoss(nonsaturating_generator_loss, cross_entropy_head_loss),
    "saturating": AdversarialLoss(saturating_generator_loss, cross_entropy_head_loss),
    "hinge": AdversarialLoss(hinge_generator_loss, hinge_head_loss),
}
"""Adversarial losses by the name that the command line knows."""
