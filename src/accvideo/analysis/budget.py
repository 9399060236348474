"""How many denoiser evaluations a distillation takes, for one sample each: forward 1, backward 2."""

from accvideo.training.recipe import DistillConfig

PAIRED = 3
"""Evaluations for a sample of the trajectory loss: forward and backward."""

CONSISTENT = 4
"""Of the consistency loss: that, and the student's call at the second point; the teacher's calls come on top."""

JUDGED = 6
"""Of the adversarial half: a student's step with its gradient, the teacher's features of the fake with the gradient of
its input, and of the real one."""


def judged_iterations(config: DistillConfig, num_steps: int) -> range:
    """The iterations in which the adversarial half takes part.

    Args:
        config: the settings.
        num_steps: K of the student; rollouts from the queues begin with the next sweep of so many iterations.
    """
    first = config.first_adversarial
    if not config.fresh_rollouts:
        first = -(-first // num_steps) * num_steps
    return range(first if config.adversarial_weight else config.num_iterations, config.num_iterations)


def training_evaluations(config: DistillConfig, num_steps: int) -> int:
    """Denoiser evaluations of a distillation by the trajectory loss, with or without the adversarial half.

    Args:
        config: the settings.
        num_steps: K of the student.
    """
    judged = judged_iterations(config, num_steps)
    plain = config.num_iterations - len(judged)
    together = JUDGED if config.update == "shared" else PAIRED + JUDGED
    # Before a step that is judged, fresh rollouts take those that lead to it.
    led = sum(iteration % num_steps for iteration in judged) if config.fresh_rollouts else 0
    first_look = num_steps if config.adversarial_weight else 0  # at the features of each key point
    num_validations = 1 + -(-config.num_iterations // config.validate_every)
    validation = config.num_validation * num_validations * 2 * num_steps  # each step from the record, and sampled
    return config.batch_size * (plain * PAIRED + len(judged) * together + led + first_look) + validation
