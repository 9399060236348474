"""Stage 2: recorded trajectories in, a few-step student out. Algorithm 1 of AccVideo (arXiv:2503.19462)."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from accvideo.data.dataset import TrajectoryFolder
from accvideo.inference.acceleration import check_compiler, quantization_config
from accvideo.inference.student_config import student_config
from accvideo.losses import ADVERSARIAL_LOSSES, Logits, trajectory_loss
from accvideo.student import save_student
from accvideo.training.checkpoint import Checkpoints
from accvideo.training.consistency import consistency_lesson
from accvideo.training.correction import correction_lesson
from accvideo.training.distributed import first_ranks, gather, joined_ranks, mean, num_ranks, rank, total, wait_for_all
from accvideo.training.health import sample_health
from accvideo.training.journal import last_count, last_validation, logged
from accvideo.training.recipe import (
    PLACES,
    DistillConfig,
    claim_folder,
    kept_trajectories,
    resolved,
    rows_of_part,
    settings,
)
from accvideo.training.sharding import gathered
from accvideo.training.start import check_start, load_denoisers, start_training
from accvideo.training.steps import (
    Batches,
    Lesson,
    Sweep,
    Training,
    accumulate,
    add_means,
    every_state_lesson,
    frozen,
    gradient,
    move_average,
    paired_loss,
    recorded_lesson,
    rejoining_loss,
    restore,
    set_weights,
    step_of_iteration,
    store,
    student_step,
    student_sweeps,
    sweep_of_iteration,
    update,
    weights,
)
from accvideo.trajectory import TrajectoryBatch, collate_trajectories
from accvideo.types import Sigmas, UserError

MAX_SKIPPED = 10  # iterations in a row without a finite gradient before the run stops


def train(
    config: DistillConfig,
    training: Training,
    sigmas: Sigmas,
    batches: Batches,
    held_out: Sequence[TrajectoryBatch] = (),
    log: Callable[[dict[str, Any]], None] = lambda line: None,
    save: Callable[[], None] = lambda: None,
    lesson: Lesson = recorded_lesson,
) -> None:
    """Algorithm 1 of the paper, from `training.iteration` on.

    Args:
        config: the settings.
        training: student, heads, optimizers and queues; changed in place.
        sigmas: noise levels of the K + 1 key points.
        batches: the training data: of each batch, `config.accumulate` parts that are this rank's.
        held_out: the validation data: this rank's share, as large as any other's.
        log: takes each line of metrics.
        save: writes a checkpoint of `training`.
        lesson: gives the losses of the teacher-forced half.

    Raises:
        UserError: no finite gradient for `MAX_SKIPPED` iterations in a row.
    """
    student, discriminator, rollouts = training.student, training.discriminator, training.rollouts
    optimizer, head_optimizer = training.student_optimizer, training.head_optimizer
    adversarial = ADVERSARIAL_LOSSES[config.adversarial_loss]
    alternating, shared = config.update == "alternating", config.update == "shared"
    sweeps = student_sweeps(len(sigmas) - 1, config.num_student_steps, config.tell_size)
    clip = config.max_gradient_norm
    stream = batches(training.iteration)
    if held_out and training.iteration == 0:
        log({"iteration": 0, "start": measure(training, held_out, sigmas, sweeps)})
    while training.iteration < config.num_iterations and not out_of_patience(config, training):
        iteration, began = training.iteration, time.perf_counter()
        number, step = step_of_iteration(sweeps, iteration)  # of key points, 0 is the noise, the last the video
        keypoint = step.end - 1  # as the heads count, one for each key point that a step can end at
        parts = list(islice(stream, config.accumulate))
        set_learning_rates(config, training)

        starts = step.start == 0 or config.fresh_rollouts
        if discriminator is not None and starts and iteration >= config.first_adversarial:
            rollouts.start(parts, iteration, fresh=not shared)
            rollouts.lead(student, sigmas, sweep_of_iteration(sweeps, iteration), step)
        judged, line = bool(rollouts.queues[step.start]), dict[str, Tensor]()
        measured = partial(add_means, line, len(parts))

        # Teacher-forced: match the teacher's mean velocity between two stored states (Eq. 6), or another lesson.
        if not (judged and shared):
            with gradient(optimizer, line, "trajectory_gradient_norm"):
                for loss in lesson(training, parts, sigmas, step):
                    accumulate(loss / len(parts))
                    measured(**{f"{config.loss}_loss": loss})
        if alternating or not judged:
            line["gradient_norm"] = update(optimizer, clip)

        # Free-running: a step from latents the student made from noise, judged at their own noise level (Eq. 7).
        if judged:
            assert discriminator is not None and head_optimizer is not None
            norm = "gradient_norm" if shared else "adversarial_gradient_norm"
            features = []
            with gradient(optimizer, line, norm):
                for _ in parts:
                    rollout = rollouts.advance(student, sigmas, step)
                    fake_features = discriminator.features(rollout.latents, rollout.batch, keypoint)
                    with frozen(discriminator):
                        fake_logits = discriminator.logits(fake_features, keypoint)
                        generator_loss = adversarial.generator(fake_logits).mean()
                    loss = config.adversarial_weight * generator_loss
                    measured(generator_loss=generator_loss)
                    if shared:
                        rejoining = rejoining_loss(rollout, sigmas, step).mean()
                        loss = loss + rejoining
                        measured(trajectory_loss=rejoining)
                    accumulate(loss / len(parts))
                    real_features = discriminator.real_features(rollout.batch, keypoint)
                    features.append(torch.cat([real_features, fake_features.detach()]))
            line.setdefault("gradient_norm", update(optimizer, clip))

            for number_of_update in range(config.head_updates):
                with gradient(head_optimizer, line, "head_gradient_norm"):
                    for both in features:
                        real_logits, fake_logits = discriminator.logits(both, keypoint).chunk(2)
                        head_loss = adversarial.head(real_logits, fake_logits).mean()
                        accumulate(config.adversarial_weight * head_loss / len(parts))
                        if number_of_update == 0:
                            measured(head_loss=head_loss, **judgement(real_logits, fake_logits))
                update(head_optimizer, clip)

        move_average(config.ema_decay, training)
        values = mean(line)
        count_skipped(config, training, values)
        values |= {"num_skipped": training.num_skipped, "seconds": time.perf_counter() - began}
        log({"iteration": iteration, "keypoint": number} | values)

        training.iteration += 1
        last = training.iteration == config.num_iterations
        if held_out and (training.iteration % config.validate_every == 0 or last):
            log({"iteration": iteration} | validate(config, training, held_out, sigmas))
        if training.num_skipped_in_a_row == 0 and (training.iteration % config.save_every == 0 or last):
            save()


def set_learning_rates(config: DistillConfig, training: Training) -> None:
    """Set the learning rates of this iteration."""
    factor = min(1.0, (training.iteration + 1) / (config.warmup_iterations + 1))
    if config.schedule == "cosine":
        done = (training.iteration - config.warmup_iterations) / (config.num_iterations - config.warmup_iterations)
        factor *= 0.5 * (1 + math.cos(math.pi * max(0.0, done)))
    for optimizer, rate in (
        (training.student_optimizer, config.learning_rate),
        (training.head_optimizer, config.head_learning_rate),
    ):
        for group in optimizer.param_groups if optimizer is not None else ():
            group["lr"] = factor * rate


def judgement(real_logits: Logits, fake_logits: Logits) -> dict[str, Tensor]:
    """How well the heads tell the teacher's latents from the student's: share of tokens judged right, and the gap."""
    return {
        "real_accuracy": (real_logits > 0).float().mean(),
        "fake_accuracy": (fake_logits < 0).float().mean(),
        "logit_gap": real_logits.mean() - fake_logits.mean(),
    }


def count_skipped(config: DistillConfig, training: Training, values: dict[str, float]) -> None:
    """Count iterations in which an update was skipped.

    Args:
        config: the settings.
        training: has the counts.
        values: of the iteration's metrics.

    Raises:
        UserError: there are too many in a row.
    """
    skipped = not all(math.isfinite(value) for name, value in values.items() if name.endswith("norm"))
    training.num_skipped += skipped
    training.num_skipped_in_a_row = training.num_skipped_in_a_row + 1 if skipped else 0
    if training.num_skipped_in_a_row == MAX_SKIPPED:
        raise UserError(
            f"no finite gradient in {MAX_SKIPPED} iterations up to {training.iteration}: the training has diverged\n"
            "The last checkpoint, from before them, is kept; "
            f"distill to another --out with a learning rate below {config.learning_rate:g}"
        )


def validate(
    config: DistillConfig, training: Training, held_out: Sequence[TrajectoryBatch], sigmas: Sigmas
) -> dict[str, Any]:
    """Measure the student on trajectories it is not trained on, and remember it if it is the best so far."""
    sweeps = student_sweeps(len(sigmas) - 1, config.num_student_steps, config.tell_size)
    result = measure(training, held_out, sigmas, sweeps)
    error = result["latent_error"]
    training.num_since_best += 1
    if training.best_error is None or error < training.best_error:
        training.best_error, training.num_since_best = error, 0
        if config.keep_best:
            best = training.average or training.student.trained()
            training.best = {name: weight.detach().clone() for name, weight in best.items()}
    return result


@torch.no_grad()
def measure(
    training: Training, held_out: Sequence[TrajectoryBatch], sigmas: Sigmas, sweeps: Sequence[Sweep]
) -> dict[str, Any]:
    """What is known of the student from held-out trajectories.

    The result has the trajectory loss of each step of all sweeps ("validation_loss"), the mean squared distance between
    the student's video latents and the teacher's from the same noise ("latent_error"; of several sweeps, their mean),
    and `health.sample_health` of them (of the last sweep).
    """
    student = training.student
    losses, errors, samples = torch.zeros(sum(map(len, sweeps))), torch.zeros(()), []
    with weights(student, training.average):
        for batch in held_out:
            number, latents = 0, batch.state(0)
            for sweep in sweeps:
                latents = batch.state(0)
                for step in sweep:
                    losses[number] += paired_loss(student, batch, sigmas, step).sum().cpu()
                    latents, number = student_step(student, batch, latents, sigmas, step), number + 1
                errors += trajectory_loss(latents, batch.state(-1)).sum().cpu() / len(sweeps)
            samples.append(latents)
    *losses, error = (total(torch.cat([losses, errors[None]])) / (num_ranks() * sum(map(len, samples)))).tolist()
    health = sample_health(gather(torch.cat(samples)), gather(torch.cat([batch.state(-1) for batch in held_out])))
    return {"validation_loss": losses, "latent_error": error, **health}


def out_of_patience(config: DistillConfig, training: Training) -> bool:
    """Whether enough validations have passed without a better one."""
    return 0 < config.patience <= training.num_since_best


def distill(config: DistillConfig) -> dict[str, Any]:
    """Distill a student from the trajectories in `config.data` into `config.out`; go on where a killed run stopped.

    Under torchrun all processes do so together; the first writes.

    Returns:
        The student's folder, iterations, how many of them were skipped, seconds and last validation; nothing from
        other processes than the first.

    Raises:
        UserError: data set and teacher do not match, or the output folder holds something else or cannot be written.
    """
    config = resolved(config)
    with joined_ranks(config.device):
        summary = distill_together(config)
        return summary if rank() == 0 else {}


def distill_together(config: DistillConfig) -> dict[str, Any]:
    """`distill` on each of the joined ranks, "auto" resolved."""
    began = time.perf_counter()
    folder = TrajectoryFolder(config.data)
    manifest = folder.manifest
    console = Console(stderr=True, quiet=rank() > 0)
    if config.compile:
        check_compiler(config.device)
    if config.quantization is not None:
        quantization_config(config.quantization)
    check_start(config, manifest)
    part_size = rows_of_part(config)
    num_steps = sum(map(len, student_sweeps(manifest.num_student_steps, config.num_student_steps)))
    kept = kept_trajectories(config, len(folder))
    if rank() == 0:
        claim_folder(config, manifest, kept)
    metrics_path = config.out / "metrics.jsonl"
    if first_ranks((config.out / "student.json").exists()):
        console.print(f"{config.out} holds the finished student of these settings already")
        known = last_count(metrics_path) | last_validation(metrics_path)
        return {"folder": str(config.out), "num_iterations": config.num_iterations, **known}

    shuffled = torch.randperm(len(kept), generator=torch.Generator().manual_seed(config.seed)).tolist()
    order = [kept[place] for place in shuffled]
    held_back, indices = order[: config.num_validation], order[config.num_validation :]
    if not indices:
        raise UserError(
            f"{config.data} holds {len(kept)} trajectories to learn from and num_validation is "
            f"{config.num_validation}: none is left to train on; record more, or hold out fewer"
        )

    def batches(start: int) -> Iterator[TrajectoryBatch]:
        first = start * config.accumulate
        parts = folder.batches(part_size, config.seed, first, indices, rank(), num_ranks())
        return (part.to(config.device) for part in parts)

    own = held_back[rank() :: num_ranks()]
    chunks = [own[start : start + part_size] for start in range(0, len(own), part_size)]
    held_out = [collate_trajectories([folder[i] for i in chunk]).to(config.device) for chunk in chunks]
    sigmas = manifest.key_sigmas
    lesson = every_state_lesson if config.every_state else recorded_lesson
    if config.loss != "trajectory":
        console.print(f"looking how {manifest.teacher} is guided")
        lesson = {"consistency": consistency_lesson, "correction": correction_lesson}[config.loss](config, folder)
    denoisers = load_denoisers(manifest, config.quantization)
    training = start_training(config, denoisers, sigmas, list(islice(batches(0), config.accumulate)))
    with Checkpoints(config.out / "checkpoints") as checkpoints:
        restore(checkpoints.newest(), training, batches, config.accumulate)
        with logged(config, training, num_steps, console) as write:

            def log(line: dict[str, Any]) -> None:
                write(line)
                checkpoints.check()

            save = partial(store, checkpoints, training, config.accumulate)
            train(config, training, sigmas, batches, held_out, log, save, lesson)

    set_weights(training.student, training.best or training.average)
    if config.full:
        student: Any = training.student
        student.denoisers = nn.ModuleDict({name: gathered(each) for name, each in student.denoisers.items()})
    if rank() == 0:
        lora_rank = None if config.full else config.lora_rank
        recipe = {name: value for name, value in settings(config).items() if name not in PLACES}
        calls = next(batches(0)).calls
        made = student_config(manifest, calls, lora_rank, recipe, config.num_student_steps, config.tell_size)
        save_student(config.out, training.student, made, last_validation(metrics_path))
    wait_for_all()
    if training.num_skipped:
        console.print(
            f"{training.num_skipped} of {training.iteration} iterations were skipped: "
            "their losses or gradients were not finite"
        )
    counts = {"num_iterations": training.iteration, "num_skipped": training.num_skipped}
    seconds = time.perf_counter() - began
    return {"folder": str(config.out), **counts, "seconds": seconds, **last_validation(metrics_path)}
