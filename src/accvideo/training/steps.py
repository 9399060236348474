"""What the loop of `distill.py` is made of: student steps, updates, the queues of rollouts, and all its state."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from accvideo.call import DenoiserCall
from accvideo.discriminator import Discriminator, at_final_timestep
from accvideo.flow import euler_step, even_grid, secant_velocity
from accvideo.inference.schedulers import told_timestep
from accvideo.losses import trajectory_loss
from accvideo.student import Student
from accvideo.training.checkpoint import Checkpoint, Checkpoints, optimizer_tensors, restore_optimizer
from accvideo.training.distributed import own_parts
from accvideo.training.sharding import average_gradients, own_pieces, spread_as, whole
from accvideo.trajectory import TrajectoryBatch
from accvideo.types import Latents, PerSample, Sigmas

Batches = Callable[[int], Iterator[TrajectoryBatch]]
"""The endless batches of a data set from the one of a given number on; of each, what this rank takes, part by part."""


class Step(NamedTuple):
    """A step of the student's, from one recorded key point to a later one."""

    start: int
    end: int
    is_told: bool = False
    """Whether the denoiser is told how far it goes: with several numbers of steps, steps of several sizes set out from
    the same noise level."""


Sweep = Sequence[Step]
"""The student's steps from noise to video."""


def student_sweeps(
    num_keypoint_steps: int, num_student_steps: Sequence[int] = (), tell_size: bool = True
) -> list[Sweep]:
    """The student's sweep for each of its numbers of steps.

    Args:
        num_keypoint_steps: steps from each recorded key point to the next.
        num_student_steps: the numbers of steps; none: as recorded.
        tell_size: whether, with several numbers, the denoiser is told how far a step goes.

    Raises:
        UserError: a number is not from 1 to that of the recorded steps.
    """
    grids = [even_grid(num_keypoint_steps, number) for number in num_student_steps or (num_keypoint_steps,)]
    is_told = tell_size and len(grids) > 1
    return [[Step(start, end, is_told) for start, end in pairwise(grid)] for grid in grids]


def step_of_iteration(sweeps: Sequence[Sweep], iteration: int) -> tuple[int, Step]:
    """The step that an iteration trains, and its place among all steps.

    One sweep comes after the other, so that all steps are trained equally often.
    """
    steps = [step for sweep in sweeps for step in sweep]
    return iteration % len(steps), steps[iteration % len(steps)]


def sweep_of_iteration(sweeps: Sequence[Sweep], iteration: int) -> Sweep:
    """The sweep that has the step of an iteration."""
    return [sweep for sweep in sweeps for _ in sweep][iteration % sum(map(len, sweeps))]


def student_velocity(student: Student, batch: TrajectoryBatch, latents: Latents, sigmas: Sigmas, step: Step) -> Latents:
    """The student's velocity at the start of a step."""
    call = told_call(batch, sigmas, step) if is_told(student, step) else batch.call(step.start)
    return student.velocity(batch.denoisers[step.start], call, latents)


def is_told(student: Student, step: Step) -> bool:
    """Whether the student is told how far a step goes; several denoisers have several starts to tell from."""
    return step.is_told and len(student.denoisers) == 1


def told_call(batch: TrajectoryBatch, sigmas: Sigmas, step: Step) -> DenoiserCall:
    """The call at the start of a step, told by its timestep how far the step goes: see `student.told_timestep`."""
    calls = batch.calls
    start = calls[step.start]
    end = calls[step.end] if step.end < len(calls) else at_final_timestep(calls[-1], float(sigmas[-1] / sigmas[-2]))
    moved = told_timestep(start.tensors["timestep"], end.tensors["timestep"])
    return replace(start, tensors=start.tensors | {"timestep": moved}).to(batch.device)


def paired_loss(student: Student, batch: TrajectoryBatch, sigmas: Sigmas, step: Step) -> PerSample:
    """The trajectory loss of a step from a recorded state to a later one."""
    latents, next_latents = batch.state(step.start), batch.state(step.end)
    target = secant_velocity(latents, next_latents, *levels(sigmas, step))
    return trajectory_loss(student_velocity(student, batch, latents, sigmas, step), target)


def rejoining_loss(rollout: "Rollout", sigmas: Sigmas, step: Step) -> PerSample:
    """The trajectory loss of a rollout's last step, with a target off the trajectory.

    The rollout began at its record's own noise, and has left the record's states since. The target leads from where the
    student was back to the record's state where the step ends.
    """
    sigma, next_sigma = levels(sigmas, step)
    # Two velocities from the same latents differ by the difference of where they lead to, over the gap.
    return trajectory_loss(rollout.latents, rollout.batch.state(step.end)) / (next_sigma - sigma) ** 2


def student_step(student: Student, batch: TrajectoryBatch, latents: Latents, sigmas: Sigmas, step: Step) -> Latents:
    """The student's latents where a step ends."""
    velocity = student_velocity(student, batch, latents, sigmas, step)
    return euler_step(latents, velocity, *levels(sigmas, step))


def levels(sigmas: Sigmas, step: Step) -> tuple[float, float]:
    """Noise levels of the key points that a step leads from and to."""
    return float(sigmas[step.start]), float(sigmas[step.end])


def trained_by(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextmanager
def gradient(optimizer: Optimizer, line: dict[str, Tensor], name: str) -> Iterator[None]:
    """A context whose losses give the optimizer one gradient, the mean over the ranks, on top of what it has.

    The norm of this gradient alone goes into `line`.
    """
    parameters = trained_by(optimizer)
    before = [parameter.grad for parameter in parameters]
    optimizer.zero_grad(set_to_none=True)
    yield
    average_gradients(parameters)
    line[name] = gradient_norm(parameters)
    for parameter, earlier in zip(parameters, before, strict=True):
        if earlier is not None:
            parameter.grad = earlier if parameter.grad is None else earlier.add_(parameter.grad)


def accumulate(loss: Tensor) -> None:
    """Add the gradient of a loss to the weights that it depends on; not finite where the loss is not."""
    loss.backward(torch.where(loss.isfinite(), 1.0, math.nan))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """A context in which a module passes gradients on, and takes none.

    The student's loss passes through the heads, and must leave no gradient there for their own update.
    """
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together."""
    return whole(get_total_norm([each.grad for each in parameters if each.grad is not None]))


def update(optimizer: Optimizer, max_norm: float) -> Tensor:
    """Clip the gradient, take the step, forget the gradient; its norm before clipping. Not finite: no step."""
    parameters = trained_by(optimizer)
    norm = gradient_norm(parameters)
    clip_grads_with_norm_(parameters, max_norm, norm)
    if norm.isfinite():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def add_means(line: dict[str, Tensor], num_parts: int, **values: Tensor) -> None:
    """Add what was measured on a part of the batch to the means over its parts."""
    for name, value in values.items():
        line[name] = line.get(name, 0) + value.detach() / num_parts


def drawn_rows(parts: Sequence[TrajectoryBatch], draw: Callable[[int], Tensor]) -> list[Tensor]:
    """Random rows for each of this rank's parts of a batch.

    They are drawn for the whole batch, so that a row gets the same whatever the number of ranks and parts.

    Args:
        parts: of equal size.
        draw: gives as many rows as it is asked for.
    """
    size, numbers = len(parts[0].states), own_parts(len(parts))
    drawn = draw(size * numbers.step * len(parts)).split(size)
    return [drawn[number].to(parts[0].device) for number in numbers]


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

    def __init__(self, num_keypoint_steps: int, seed: int) -> None:
        self.queues: list[deque[Rollout]] = [deque() for _ in range(num_keypoint_steps)]
        self.generator = torch.Generator().manual_seed(seed)

    def start(self, parts: Sequence[TrajectoryBatch], number: int, fresh: bool = True) -> None:
        """Queue noise for the prompts of a batch: fresh, or the records' own, from which the teacher set out.

        Those of earlier batches are dropped: of fresh rollouts each iteration leaves some that no step takes on.
        """
        for queue in self.queues:
            queue.clear()
        if fresh:
            shape = parts[0].states.shape[2:]
            noises = drawn_rows(parts, lambda rows: torch.randn(rows, *shape, generator=self.generator))
        else:
            noises = [part.state(0) for part in parts]
        self.queues[0] += [Rollout(noise, part, number) for noise, part in zip(noises, parts, strict=True)]

    @torch.no_grad()
    def lead(self, student: Student, sigmas: Sigmas, sweep: Sweep, step: Step) -> None:
        """Take what has just been started to where a step of its sweep starts."""
        for earlier in sweep[: sweep.index(step)]:
            for _ in range(len(self.queues[earlier.start])):
                self.advance(student, sigmas, earlier)

    def advance(self, student: Student, sigmas: Sigmas, step: Step) -> Rollout:
        """Take the oldest latents at a key point one student step on; only this step has a gradient."""
        before = self.queues[step.start].popleft()
        after = replace(before, latents=student_step(student, before.batch, before.latents, sigmas, step))
        if step.end < len(self.queues):
            self.queues[step.end].append(replace(after, latents=after.latents.detach()))
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
    """Iterations so far without a finite gradient."""
    num_skipped_in_a_row: int = 0
    """Up to the last one; none where a checkpoint is written."""
    iteration: int = 0


Lesson = Callable[[Training, Sequence[TrajectoryBatch], Sigmas, Step], Iterator[Tensor]]
"""What the student learns of a step that is not its own: the mean loss of each part of a batch, with its gradient."""


def recorded_lesson(
    training: Training, parts: Sequence[TrajectoryBatch], sigmas: Sigmas, step: Step
) -> Iterator[Tensor]:
    """The trajectory losses of the parts (Eq. 6 of the paper)."""
    return (paired_loss(training.student, part, sigmas, step).mean() for part in parts)


def every_state_lesson(
    training: Training, parts: Sequence[TrajectoryBatch], sigmas: Sigmas, step: Step
) -> Iterator[Tensor]:
    """The trajectory losses from a state that is drawn among all that were recorded within the step, to its end.

    Each asks for the secant from there. Of a step in which the teacher changes denoisers, the states of the one that
    takes the student's step are drawn: the other never has to take it.
    """
    denoisers = parts[0].denoisers
    starts = [state for state in range(step.start, step.end) if denoisers[state] == denoisers[step.start]]
    drawn = int(torch.randint(len(starts), (), generator=training.rollouts.generator))
    return recorded_lesson(training, parts, sigmas, step._replace(start=starts[drawn]))


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
    yield
    set_weights(student, own)  # not after an error: some may be gathered then, and the training is over


@torch.no_grad()
def set_weights(student: Student, values: dict[str, Tensor]) -> None:
    """Give the student these trained weights."""
    trained = student.trained()
    for name, value in values.items():
        trained[name].copy_(value)


def store(checkpoints: Checkpoints, training: Training, num_parts: int) -> None:
    """Begin to write a checkpoint of all that changes.

    Args:
        checkpoints: of this run.
        training: what changes.
        num_parts: parts of each batch that a rank takes.
    """
    groups = {
        "student": training.student.trained(),
        "student_optimizer": optimizer_tensors(training.student_optimizer),
        "heads": training.discriminator.state_dict() if training.discriminator else {},
        "head_optimizer": optimizer_tensors(training.head_optimizer) if training.head_optimizer else {},
        "average": training.average,
        "best": training.best,
        "random": {"generator": training.rollouts.generator.get_state()},
    }
    tensors = own_pieces({f"{group}/{name}": tensor for group, each in groups.items() for name, tensor in each.items()})
    for k, queue in enumerate(training.rollouts.queues):
        for place, rollout in enumerate(queue):
            i, part = divmod(place, num_parts)
            tensors[f"rollouts/{k}.{i}@{own_parts(num_parts)[part] * len(rollout.latents)}"] = rollout.latents
    counts = {name: getattr(training, name) for name in ("iteration", "num_skipped", "best_error", "num_since_best")}
    numbers = [[rollout.number for rollout in islice(queue, 0, None, num_parts)] for queue in training.rollouts.queues]
    checkpoints.save(training.iteration, tensors, counts | {"rollout_batches": numbers})


def restore(checkpoint: Checkpoint | None, training: Training, batches: Batches, num_parts: int) -> None:
    """Take up a checkpoint, if there is one, written by any number of ranks.

    Args:
        checkpoint: the newest of this run.
        training: what it is restored to.
        batches: the training data.
        num_parts: parts of each batch that a rank takes.
    """
    if checkpoint is None:
        return
    trained = training.student.trained()

    def weights_of(group: str) -> dict[str, Tensor]:
        return {
            name: spread_as(trained[name], partial(checkpoint.read, f"{group}/{name}"))
            for name in checkpoint.names(group)
        }

    def optimizer_state(group: str, optimizer: Optimizer) -> dict[str, Tensor]:
        parameters, state = trained_by(optimizer), {}
        for key in checkpoint.names(group):
            number, name = key.split(".")
            read = partial(checkpoint.read, f"{group}/{key}")
            state[key] = read() if name == "step" else spread_as(parameters[int(number)], read)
        return state

    set_weights(training.student, weights_of("student"))
    restore_optimizer(training.student_optimizer, optimizer_state("student_optimizer", training.student_optimizer))
    if training.discriminator is not None and training.head_optimizer is not None:
        training.discriminator.load_state_dict(checkpoint.group("heads"))
        restore_optimizer(training.head_optimizer, optimizer_state("head_optimizer", training.head_optimizer))
    training.average, training.best = weights_of("average"), weights_of("best")
    training.rollouts.generator.set_state(checkpoint.read("random/generator"))
    state = dict(checkpoint.state)
    for k, numbers in enumerate(state.pop("rollout_batches")):
        for i, number in enumerate(numbers):
            for part, batch in zip(own_parts(num_parts), batches(number), strict=False):
                start, size = part * len(batch.states), len(batch.states)
                latents = checkpoint.read(f"rollouts/{k}.{i}", start, start + size).to(batch.device)
                training.rollouts.queues[k].append(Rollout(latents, batch, number))
    for name, value in state.items():
        setattr(training, name, value)
