"""What the loop of `distill.py` is made of: student steps, updates, the queues of rollouts, and all its state."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from accvideo.checkpoint import load_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from accvideo.discriminator import Discriminator
from accvideo.flow import euler_step, secant_velocity
from accvideo.losses import trajectory_loss
from accvideo.student import Student
from accvideo.trajectory import TrajectoryBatch
from accvideo.types import Latents, PerSample, Sigmas

Batches = Callable[[int], Iterator[TrajectoryBatch]]
"""The endless batches of a data set from the one of a given number on."""


def paired_loss(student: Student, batch: TrajectoryBatch, sigmas: Sigmas, keypoint: int) -> PerSample:
    """The trajectory loss of the step from a key point to the next."""
    latents, next_latents = batch.states[:, keypoint], batch.states[:, keypoint + 1]
    target = secant_velocity(latents, next_latents, *levels(sigmas, keypoint))
    velocity = student.velocity(batch.denoisers[keypoint], batch.calls[keypoint], latents)
    return trajectory_loss(velocity, target)


def rejoining_loss(rollout: "Rollout", sigmas: Sigmas, keypoint: int) -> PerSample:
    """The trajectory loss of a rollout's last step, from a key point to the next, with a target off the trajectory.

    The rollout began at its record's own noise, and has left the record's states since. The target leads from where the
    student was back to the record's next state.
    """
    sigma, next_sigma = levels(sigmas, keypoint)
    # Two velocities from the same latents differ by the difference of where they lead to, over the gap.
    return trajectory_loss(rollout.latents, rollout.batch.states[:, keypoint + 1]) / (next_sigma - sigma) ** 2


def student_step(student: Student, batch: TrajectoryBatch, latents: Latents, sigmas: Sigmas, keypoint: int) -> Latents:
    """The student's latents at the next key point."""
    velocity = student.velocity(batch.denoisers[keypoint], batch.calls[keypoint], latents)
    return euler_step(latents, velocity, *levels(sigmas, keypoint))


def levels(sigmas: Sigmas, keypoint: int) -> tuple[float, float]:
    """Noise level of a key point, and of the next."""
    return float(sigmas[keypoint]), float(sigmas[keypoint + 1])


def trained_by(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def accumulate(loss: Tensor, optimizer: Optimizer) -> Tensor:
    """Add the gradient of a loss to the parameters of this optimizer, and to no others; the norm of what it adds.

    The student's loss passes through the heads, and must leave no gradient there for their next update.
    """
    parameters = trained_by(optimizer)
    before = [parameter.grad for parameter in parameters]
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    for parameter, gradient in zip(parameters, before, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
    return norm


def update(optimizer: Optimizer, max_norm: float) -> Tensor:
    """Clip the gradient, take the step, forget the gradient; its norm before clipping. Not finite: no step."""
    norm = clip_grad_norm_(trained_by(optimizer), max_norm)
    if norm.isfinite():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.detach()


@dataclass(frozen=True)
class Rollout:
    """Latents that the student made from noise, with the records whose prompts they follow."""

    latents: Latents
    batch: TrajectoryBatch
    number: int
    """Of the batch, by which a checkpoint remembers it."""


class Rollouts:
    """The queues of Algorithm 1: the student's own latents at each key point but the last, first in, first out.

    Queue k holds latents at key point k, counted from the noise: the paper's Q_{m-k}. Its Q_0 is never read.
    """

    def __init__(self, num_student_steps: int, seed: int) -> None:
        self.queues: list[deque[Rollout]] = [deque() for _ in range(num_student_steps)]
        self.generator = torch.Generator().manual_seed(seed)

    def start(self, batch: TrajectoryBatch, number: int, fresh: bool = True) -> None:
        """Queue noise for the prompts of a batch: fresh, or the records' own, from which the teacher set out."""
        noise = batch.states[:, 0]
        if fresh:
            noise = torch.randn(noise.shape, generator=self.generator).to(noise.device)
        self.queues[0].append(Rollout(noise, batch, number))

    def advance(self, student: Student, sigmas: Sigmas, keypoint: int) -> Rollout:
        """Take the oldest latents at a key point one student step on; only this step has a gradient."""
        before = self.queues[keypoint].popleft()
        after = replace(before, latents=student_step(student, before.batch, before.latents, sigmas, keypoint))
        if keypoint + 1 < len(self.queues):
            self.queues[keypoint + 1].append(replace(after, latents=after.latents.detach()))
        return after


@dataclass
class Training:
    """All that changes from iteration to iteration: what a checkpoint holds."""

    student: Student
    student_optimizer: Optimizer
    rollouts: Rollouts
    discriminator: Discriminator | None = None
    """None: no adversarial half."""
    head_optimizer: Optimizer | None = None
    average: dict[str, Tensor] = field(default_factory=dict)
    """Running mean of the student's trained weights; empty when off."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """Trained weights at the best validation so far; empty unless they are kept."""
    best_error: float | None = None
    num_since_best: int = 0
    """Validations since the best one."""
    num_skipped: int = 0
    """Iterations in a row without a finite gradient."""
    iteration: int = 0


def move_average(decay: float, training: Training) -> None:
    """Move the running mean of the weights towards them."""
    if training.average:
        for name, parameter in training.student.trained().items():
            training.average[name].lerp_(parameter.detach(), 1 - decay)


@contextmanager
def weights(student: Student, values: dict[str, Tensor]) -> Iterator[None]:
    """A context in which the student has other trained weights; none given: its own."""
    trained = student.trained()
    own = {name: trained[name].detach().clone() for name in values}
    set_weights(student, values)
    try:
        yield
    finally:
        set_weights(student, own)


@torch.no_grad()
def set_weights(student: Student, values: dict[str, Tensor]) -> None:
    """Give the student these trained weights."""
    trained = student.trained()
    for name, value in values.items():
        trained[name].copy_(value)


def store(folder: Path, training: Training) -> None:
    """Write a checkpoint of all that changes."""
    queues = training.rollouts.queues
    tensors = {"generator": training.rollouts.generator.get_state()}
    groups = {
        "student": training.student.trained(),
        "student_optimizer": optimizer_tensors(training.student_optimizer),
        "heads": training.discriminator.state_dict() if training.discriminator else {},
        "head_optimizer": optimizer_tensors(training.head_optimizer) if training.head_optimizer else {},
        "average": training.average,
        "best": training.best,
        "rollouts": {f"{k}.{i}": rollout.latents for k, queue in enumerate(queues) for i, rollout in enumerate(queue)},
    }
    for group, members in groups.items():
        tensors |= {f"{group}/{name}": tensor for name, tensor in members.items()}
    counts = {name: getattr(training, name) for name in ("iteration", "num_skipped", "best_error", "num_since_best")}
    numbers = [[rollout.number for rollout in queue] for queue in queues]
    save_checkpoint(folder, training.iteration, tensors, counts | {"rollout_batches": numbers})


def restore(folder: Path, training: Training, batches: Batches) -> None:
    """Take up the newest checkpoint, if there is one."""
    if (found := load_checkpoint(folder)) is None:
        return
    tensors, state = found

    def group(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}

    set_weights(training.student, group("student"))
    restore_optimizer(training.student_optimizer, group("student_optimizer"))
    if training.discriminator is not None and training.head_optimizer is not None:
        training.discriminator.load_state_dict(group("heads"))
        restore_optimizer(training.head_optimizer, group("head_optimizer"))
    device = next(iter(training.student.trained().values())).device
    training.average = {name: value.to(device) for name, value in group("average").items()}
    training.best = {name: value.to(device) for name, value in group("best").items()}
    training.rollouts.generator.set_state(tensors["generator"])
    latents = group("rollouts")
    for k, numbers in enumerate(state.pop("rollout_batches")):
        for i, number in enumerate(numbers):
            rollout = Rollout(latents[f"{k}.{i}"].to(device), next(batches(number)), number)
            training.rollouts.queues[k].append(rollout)
    for name, value in state.items():
        setattr(training, name, value)
