"""Stage 2: recorded trajectories in, a few-step student out. Algorithm 1 of AccVideo (arXiv:2503.19462)."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW
from tyro.conf import Positional

from accvideo.acceleration import Quantization, quantization_config, stored_fingerprint
from accvideo.checkpoint import Checkpoints, MetricsLog, read_metrics
from accvideo.dataset import TrajectoryFolder
from accvideo.discriminator import Discriminator
from accvideo.distributed import (
    first_ranks,
    gather,
    gathered,
    joined_ranks,
    mean,
    num_ranks,
    rank,
    sharder,
    total,
    wait_for_all,
)
from accvideo.health import CHANCE_LOSSES, Watch, sample_health
from accvideo.losses import ADVERSARIAL_LOSSES, Logits, trajectory_loss
from accvideo.manifest import Manifest
from accvideo.student import Student, save_student, student_config
from accvideo.teacher import fingerprint, teacher_path
from accvideo.tracking import Tracker, check_tracker, tracked
from accvideo.training import (
    Batches,
    Rollouts,
    Training,
    accumulate,
    add_means,
    frozen,
    gradient,
    move_average,
    paired_loss,
    rejoining_loss,
    restore,
    set_weights,
    store,
    student_step,
    update,
    weights,
)
from accvideo.trajectory import TrajectoryBatch, collate_trajectories, write_whole
from accvideo.types import Sigmas, UserError

MAX_SKIPPED = 10  # iterations in a row without a finite gradient before the run stops
PLACES = {"data", "out", "device", "save_every", "accumulate", "shard_base", "track"}
"""Settings that change nothing in the student but rounding."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distills a student from recorded trajectories.

    `--preset paper` starts from the settings of the paper, `--preset playground` from what suits the embedded teacher.
    """

    data: Positional[str]
    """Data set: a folder that `accvideo record` or `pack` made, or its address (https://, s3://, hf:// and others)."""
    out: Path
    """Folder for the student. The same command again goes on where a killed run stopped."""
    num_iterations: int = 400
    """Iterations; each trains one key point, from noise to video and around again, on one batch."""
    batch_size: int = 16
    """Trajectories an iteration, over all ranks together."""
    accumulate: int = 1
    """Parts in which each rank takes its share of a batch, one after the other: less memory, the same student."""
    full: bool = False
    """Train all weights of the teacher's copy instead of a LoRA."""
    lora_rank: int = 16
    """Rank of the LoRA on the attention and feed-forward layers of the blocks."""
    learning_rate: float = 2e-3
    """Of the student (AdamW). About 2e-3 suits a LoRA of a small model, 2e-4 its full weights."""
    head_learning_rate: float = 1e-3
    """Of the discriminator's heads (AdamW)."""
    weight_decay: float = 0.0
    """Of both optimizers."""
    max_gradient_norm: float = 1.0
    """Longer gradients are scaled down to this norm."""
    warmup_iterations: int = 0
    """Iterations over which both learning rates rise from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rates after the warm-up: constant, or falling to 0 along half a cosine."""
    adversarial_weight: float = 0.1
    """Weight of the adversarial loss (lambda_adv of the paper); 0 leaves that half of the method out."""
    adversarial_loss: Literal["nonsaturating", "saturating", "hinge"] = "nonsaturating"
    """Form of the adversarial loss; "saturating" is Eq. 7 of the paper read literally."""
    adversarial_start: int = 0
    """Iteration from which the adversarial half takes part; it starts with the next sweep of the key points."""
    update: Literal["alternating", "joint", "shared"] = "joint"
    """One student update for each of the two losses, as in Algorithm 1; or one for their sum; or one for the sum of
    both losses of one and the same step, whose rollout starts from the record's own noise. That is 30 % less work, and
    the student learns less from an iteration."""
    shared_head: bool = False
    """One discriminator head for all key points (ablation c of the paper) instead of one each."""
    head_kernel: Literal[1, 3] = 1
    """Size of the heads' convolutions, in tokens."""
    feature_layers: tuple[int, int] | None = None
    """Blocks (from 1) whose output the heads see: where noise is left, and at the video. None: the last block, and the
    one at two thirds of the depth."""
    ema_decay: float = 0.0
    """Decay an iteration of the running mean of the weights, which is then validated and saved; 0: off."""
    num_validation: int = 16
    """Trajectories held out for validation; 0: none."""
    validate_every: int = 50
    """Iterations between validations."""
    keep_best: bool = False
    """Save the student of the best validation (latent error) instead of the last."""
    patience: int = 0
    """Stop after this many validations without a better one; 0: never."""
    track: Tracker = "auto"
    """Where metrics go beside metrics.jsonl: tensorboard (files in `out`) or wandb (Weights & Biases, over the
    network). "auto": tensorboard where it is installed."""
    save_every: int = 100
    """Iterations between checkpoints."""
    gradient_checkpointing: bool = False
    """Keep less for the backward pass and compute it again: less memory, a third more time."""
    shard_base: bool = False
    """Spread the frozen weights under a LoRA over the ranks of torchrun: less memory, more traffic between them. Full
    weights are always spread."""
    quantization: Quantization | None = None
    """Of the frozen weights under a LoRA: int8 or float8 (one byte each, torchao), nf4 (half a byte, bitsandbytes)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the denoisers' arithmetic; weights that train are float32. "auto": bfloat16 where the hardware has it."""
    device: str = "auto"
    """Torch device; "auto": cuda where there is one."""
    seed: int = 0
    """Of the data order, the fresh noise and new weights."""

    def __post_init__(self) -> None:
        at_least = dict.fromkeys(
            ("num_iterations", "batch_size", "accumulate", "lora_rank", "validate_every", "save_every"), 1
        )
        at_least |= {"num_validation": 0, "warmup_iterations": 0, "adversarial_weight": 0, "patience": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; the least is {least}")
        check_tracker(self.track)
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay}; choose 0 (off) or a number below 1, such as 0.99")
        if (self.keep_best or self.patience) and not self.num_validation:
            raise UserError("keep_best and patience need held-out trajectories; set num_validation to 1 or more")
        if self.shard_base and (self.full or self.quantization is not None):
            raise UserError(
                "shard_base spreads the frozen weights under a LoRA, in the type they were recorded in\n"
                "Leave it out with --full, whose weights are always spread, and with --quantization"
            )
        if self.full and self.quantization is not None:
            raise UserError(
                f"quantization is {self.quantization} and full is set: quantized weights cannot be trained\n"
                "Leave out --full to train a LoRA on top of them, or leave out --quantization"
            )


def paper(data: str, out: Path) -> DistillConfig:
    """The paper's own settings (arXiv:2503.19462, section 5), for a teacher and a data set of its size."""
    return DistillConfig(
        data=data,
        out=out,
        num_iterations=1200,
        batch_size=32,
        full=True,
        learning_rate=5e-6,
        head_learning_rate=5e-6,
        adversarial_weight=0.1,
        update="alternating",
        num_validation=0,
        gradient_checkpointing=True,
    )


def playground(data: str, out: Path) -> DistillConfig:
    """What did best on the playground's teacher with one or two hundred recorded trajectories and a few minutes."""
    return DistillConfig(
        data=data,
        out=out,
        num_iterations=100,
        full=True,
        learning_rate=2e-4,
        schedule="cosine",
        adversarial_start=60,
    )


PRESETS: dict[str, Callable[..., DistillConfig]] = {"default": DistillConfig, "paper": paper, "playground": playground}
"""Configurations by the name that `--preset` knows; called with `data` and `out`."""


def train(
    config: DistillConfig,
    training: Training,
    sigmas: Sigmas,
    batches: Batches,
    held_out: Sequence[TrajectoryBatch] = (),
    log: Callable[[dict[str, Any]], None] = lambda line: None,
    save: Callable[[], None] = lambda: None,
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

    Raises:
        UserError: no finite gradient for `MAX_SKIPPED` iterations in a row.
    """
    student, discriminator, rollouts = training.student, training.discriminator, training.rollouts
    optimizer, head_optimizer = training.student_optimizer, training.head_optimizer
    adversarial = ADVERSARIAL_LOSSES[config.adversarial_loss]
    alternating, shared = config.update == "alternating", config.update == "shared"
    clip = config.max_gradient_norm
    stream = batches(training.iteration)
    if held_out and training.iteration == 0:
        log({"iteration": 0, "start": measure(training, held_out, sigmas)})
    while training.iteration < config.num_iterations and not out_of_patience(config, training):
        iteration, began = training.iteration, time.perf_counter()
        keypoint = iteration % (len(sigmas) - 1)  # 0 starts at the noise, the last ends at the video
        parts = list(islice(stream, config.accumulate))
        set_learning_rates(config, training)

        if discriminator is not None and keypoint == 0 and iteration >= config.adversarial_start:
            rollouts.start(parts, iteration, fresh=not shared)
        judged, line = bool(rollouts.queues[keypoint]), dict[str, Tensor]()
        measured = partial(add_means, line, len(parts))

        # Teacher-forced: match the teacher's mean velocity between two stored states (Eq. 6).
        if not (judged and shared):
            with gradient(optimizer, line, "trajectory_gradient_norm"):
                for part in parts:
                    loss = paired_loss(student, part, sigmas, keypoint).mean()
                    accumulate(loss / len(parts))
                    measured(trajectory_loss=loss)
        if alternating or not judged:
            line["gradient_norm"] = update(optimizer, clip)

        # Free-running: a step from latents the student made from noise, judged at their own noise level (Eq. 7).
        if judged:
            assert discriminator is not None and head_optimizer is not None
            norm = "gradient_norm" if shared else "adversarial_gradient_norm"
            with gradient(optimizer, line, norm), gradient(head_optimizer, line, "head_gradient_norm"):
                for _ in parts:
                    rollout = rollouts.advance(student, sigmas, keypoint)
                    fake_features = discriminator.features(rollout.latents, rollout.batch, keypoint)
                    with frozen(discriminator):
                        generator_loss = adversarial.generator(discriminator.logits(fake_features, keypoint)).mean()
                    loss = config.adversarial_weight * generator_loss
                    if shared:
                        rejoining = rejoining_loss(rollout, sigmas, keypoint).mean()
                        loss = loss + rejoining
                        measured(trajectory_loss=rejoining)
                    accumulate(loss / len(parts))

                    with torch.no_grad():
                        real_latents = rollout.batch.states[:, keypoint + 1]
                        real_features = discriminator.features(real_latents, rollout.batch, keypoint)
                    features = torch.cat([real_features, fake_features.detach()])
                    real_logits, fake_logits = discriminator.logits(features, keypoint).chunk(2)
                    head_loss = adversarial.head(real_logits, fake_logits).mean()
                    accumulate(config.adversarial_weight * head_loss / len(parts))
                    measured(generator_loss=generator_loss, head_loss=head_loss, **judgement(real_logits, fake_logits))
            line.setdefault("gradient_norm", update(optimizer, clip))
            update(head_optimizer, clip)

        move_average(config.ema_decay, training)
        values = mean(line)
        count_skipped(config, training, values)
        log({"iteration": iteration, "keypoint": keypoint} | values | {"seconds": time.perf_counter() - began})

        training.iteration += 1
        last = training.iteration == config.num_iterations
        if held_out and (training.iteration % config.validate_every == 0 or last):
            log({"iteration": iteration} | validate(config, training, held_out, sigmas))
        if training.num_skipped == 0 and (training.iteration % config.save_every == 0 or last):
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
    """Count iterations in a row in which an update was skipped.

    Raises:
        UserError: there are too many.
    """
    finite = all(math.isfinite(value) for name, value in values.items() if name.endswith("norm"))
    training.num_skipped = 0 if finite else training.num_skipped + 1
    if training.num_skipped == MAX_SKIPPED:
        raise UserError(
            f"no finite gradient in {MAX_SKIPPED} iterations up to {training.iteration}: the training has diverged\n"
            "The last checkpoint, from before them, is kept; "
            f"distill to another --out with a learning rate below {config.learning_rate:g}"
        )


def validate(
    config: DistillConfig, training: Training, held_out: Sequence[TrajectoryBatch], sigmas: Sigmas
) -> dict[str, Any]:
    """Measure the student on trajectories it is not trained on, and remember it if it is the best so far."""
    result = measure(training, held_out, sigmas)
    error = result["latent_error"]
    training.num_since_best += 1
    if training.best_error is None or error < training.best_error:
        training.best_error, training.num_since_best = error, 0
        if config.keep_best:
            best = training.average or training.student.trained()
            training.best = {name: weight.detach().clone() for name, weight in best.items()}
    return result


@torch.no_grad()
def measure(training: Training, held_out: Sequence[TrajectoryBatch], sigmas: Sigmas) -> dict[str, Any]:
    """What is known of the student from held-out trajectories.

    The result has the trajectory loss by key point ("validation_loss"), the mean squared distance between the
    student's video latents and the teacher's from the same noise ("latent_error"), and `health.sample_health` of them.
    """
    student, num_steps = training.student, len(sigmas) - 1
    losses, errors, samples = torch.zeros(num_steps), torch.zeros(()), []
    with weights(student, training.average):
        for batch in held_out:
            latents = batch.states[:, 0]
            for keypoint in range(num_steps):
                losses[keypoint] += paired_loss(student, batch, sigmas, keypoint).sum().cpu()
                latents = student_step(student, batch, latents, sigmas, keypoint)
            errors += trajectory_loss(latents, batch.states[:, -1]).sum().cpu()
            samples.append(latents)
    *losses, error = (total(torch.cat([losses, errors[None]])) / (num_ranks() * sum(map(len, samples)))).tolist()
    health = sample_health(gather(torch.cat(samples)), gather(torch.cat([batch.states[:, -1] for batch in held_out])))
    return {"validation_loss": losses, "latent_error": error, **health}


def out_of_patience(config: DistillConfig, training: Training) -> bool:
    """Whether enough validations have passed without a better one."""
    return 0 < config.patience <= training.num_since_best


def distill(config: DistillConfig) -> dict[str, Any]:
    """Distill a student from the trajectories in `config.data` into `config.out`; go on where a killed run stopped.

    Under torchrun all processes do so together; the first writes.

    Returns:
        The student's folder, iterations, seconds and last validation; nothing from other processes than the first.

    Raises:
        UserError: data set and teacher do not match, or the output folder holds something else.
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
    if config.quantization is not None:
        quantization_config(config.quantization)
    part_size = rows_of_part(config)
    if rank() == 0:
        claim_folder(config, manifest)
    metrics_path = config.out / "metrics.jsonl"
    if first_ranks((config.out / "student.json").exists()):
        console.print(f"{config.out} holds the finished student of these settings already")
        return {"folder": str(config.out), "num_iterations": config.num_iterations, **last_validation(metrics_path)}

    order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(config.seed)).tolist()
    kept_out, indices = order[: config.num_validation], order[config.num_validation :]
    if not indices:
        raise UserError(
            f"{config.data} holds {len(folder)} trajectories and num_validation is {config.num_validation}: "
            "none is left to train on; record more, or hold out fewer"
        )

    def batches(start: int) -> Iterator[TrajectoryBatch]:
        first = start * config.accumulate
        parts = folder.batches(part_size, config.seed, first, indices, rank(), num_ranks())
        return (to_device(part, config.device) for part in parts)

    own = kept_out[rank() :: num_ranks()]
    chunks = [own[start : start + part_size] for start in range(0, len(own), part_size)]
    held_out = [to_device(collate_trajectories([folder[i] for i in chunk]), config.device) for chunk in chunks]
    sigmas = manifest.key_sigmas
    denoisers = load_denoisers(manifest, config.quantization)
    training = start_training(config, denoisers, sigmas, next(batches(0)))
    with Checkpoints(config.out / "checkpoints") as checkpoints:
        restore(checkpoints.newest(), training, batches, config.accumulate)
        with logged(config, training, sigmas, console) as log:
            save = partial(store, checkpoints, training, config.accumulate)
            train(config, training, sigmas, batches, held_out, log, save)

    set_weights(training.student, training.best or training.average)
    if config.full:
        student: Any = training.student
        student.denoisers = nn.ModuleDict({name: gathered(each) for name, each in student.denoisers.items()})
    if rank() == 0:
        lora_rank = None if config.full else config.lora_rank
        recipe = {name: value for name, value in settings(config).items() if name not in PLACES}
        made = student_config(manifest, next(batches(0)).calls, lora_rank, recipe)
        save_student(config.out, training.student, made, last_validation(metrics_path))
    wait_for_all()
    seconds, last = time.perf_counter() - began, last_validation(metrics_path)
    return {"folder": str(config.out), "num_iterations": training.iteration, "seconds": seconds, **last}


def rows_of_part(config: DistillConfig) -> int:
    """Trajectories that a rank holds at once.

    Raises:
        UserError: the ranks cannot share a batch or the held-out trajectories evenly.
    """
    num_parts = num_ranks() * config.accumulate
    if config.batch_size % num_parts:
        raise UserError(
            f"batch_size {config.batch_size} cannot be cut into {num_parts} equal parts "
            f"({num_ranks()} ranks, accumulate {config.accumulate})\nMake it a multiple of {num_parts}"
        )
    if config.num_validation % num_ranks():
        raise UserError(
            f"num_validation {config.num_validation} cannot be shared evenly by {num_ranks()} ranks; "
            f"make it a multiple of {num_ranks()}, or 0"
        )
    return config.batch_size // num_parts


@contextmanager
def logged(
    config: DistillConfig, training: Training, sigmas: Sigmas, console: Console
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes each line of metrics, shows it, and rings alarms; on other ranks than the first, nothing.

    A resumed run goes on with the lines before `training.iteration`.
    """
    if rank() > 0:
        yield lambda line: None
        return
    path = config.out / "metrics.jsonl"
    begin = training.iteration
    with (
        tracked(config.track, config.out, settings(config), begin) as track,
        MetricsLog(path, begin) as metrics,
        progress_bar(console, config, training) as show,
    ):
        watch = Watch(len(sigmas) - 1, CHANCE_LOSSES[config.adversarial_loss])
        for line in read_metrics(path):
            watch.look(line)

        def log(line: dict[str, Any]) -> None:
            metrics.write(line)
            track(line)
            show(line)
            for alarm in watch.look(line):
                metrics.write(alarm)
                track(alarm)
                console.print(f"alarm at iteration {alarm['iteration']}: {alarm['message']}")

        yield log


def start_training(
    config: DistillConfig, denoisers: dict[str, nn.Module], sigmas: Sigmas, batch: TrajectoryBatch
) -> Training:
    """Student, heads, optimizers and empty queues before the first iteration.

    Args:
        config: the settings, resolved.
        denoisers: the teacher's, by name; they become the student's.
        sigmas: noise levels of the K + 1 key points.
        batch: any batch of the data set.
    """
    device, adversarial = torch.device(config.device), config.adversarial_weight > 0
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        sharded = num_ranks() > 1 and (config.full or config.shard_base)
        student = Student(
            {name: denoiser if sharded else denoiser.to(device) for name, denoiser in denoisers.items()},
            lora_rank=None if config.full else config.lora_rank,
            arithmetic=partial(arithmetic, device.type, config.precision),
            keep_teacher=adversarial,
            gradient_checkpointing=config.gradient_checkpointing,
            shard=sharder(config.device, config.precision) if sharded else None,
        )
        discriminator = None
        if adversarial:
            discriminator = Discriminator(
                student, sigmas, batch, config.feature_layers, config.head_kernel, config.shared_head
            ).to(device)
    trained = student.trained()
    optimizer = partial(AdamW, weight_decay=config.weight_decay, fused=True)
    return Training(
        student=student,
        student_optimizer=optimizer(trained.values(), lr=config.learning_rate),
        rollouts=Rollouts(len(sigmas) - 1, config.seed),
        discriminator=discriminator,
        head_optimizer=optimizer(discriminator.parameters(), lr=config.head_learning_rate) if discriminator else None,
        average={name: p.detach().clone() for name, p in trained.items()} if config.ema_decay else {},
    )


@contextmanager
def arithmetic(device_type: str, precision: str) -> Iterator[None]:
    """A context in which a denoiser computes in float32, or in bfloat16 from float32 weights."""
    if precision == "float32":
        yield
        return
    # On a CPU, torch 2.13's fused attention has a bfloat16 backward pass 4 to 9 times slower than plain products.
    attention = sdpa_kernel(SDPBackend.MATH) if device_type == "cpu" else nullcontext()
    with torch.autocast(device_type, torch.bfloat16), attention:
        yield


def load_denoisers(manifest: Manifest, quantization: Quantization | None = None) -> dict[str, nn.Module]:
    """The teacher's denoisers, and nothing else of its pipeline, in the type they were recorded in.

    Args:
        manifest: of the data set.
        quantization: of their linear weights; None: as recorded.

    Raises:
        UserError: the teacher cannot be loaded, or is not the recorded one; what quantization takes is missing.
    """
    dtype, found = getattr(torch, manifest.dtype), {}
    options = {} if quantization is None else {"quantization_config": quantization_config(quantization, dtype)}
    own_fingerprint = fingerprint if quantization is None else stored_fingerprint
    try:
        folder = denoisers_folder(manifest)
        components: Any = DiffusionPipeline.load_config(folder)
        for component, recorded in manifest.fingerprints.items():
            denoiser_class = getattr(diffusers, components[component][1])
            found[component] = denoiser_class.from_pretrained(
                folder / component, torch_dtype=dtype, use_safetensors=True, **options
            )
            if own_fingerprint(found[component]) != recorded:
                raise UserError(
                    f"the data set was recorded with another teacher than {manifest.teacher} is now\n"
                    f"Its {component} differs; use the data set with its own teacher, or record again"
                )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load the data set's teacher {manifest.teacher}: {reason}") from error
    return found


def denoisers_folder(manifest: Manifest) -> Path:
    """The folder of the teacher's pipeline; of one from the hub, only the denoisers are fetched."""
    if (path := teacher_path(manifest.teacher)) is not None:
        return path
    wanted = ["model_index.json", *(f"{component}/*" for component in manifest.fingerprints)]
    return Path(snapshot_download(manifest.teacher, revision=manifest.revision, allow_patterns=wanted))


def resolved(config: DistillConfig) -> DistillConfig:
    """The settings with "auto" replaced by what this machine has."""
    device, precision = config.device, config.precision
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        precision = "bfloat16" if device != "cpu" or fast else "float32"
    return replace(config, device=device, precision=precision)


def settings(config: DistillConfig) -> dict[str, Any]:
    """The configuration as JSON."""
    return json.loads(json.dumps(asdict(config), default=str))


def claim_folder(config: DistillConfig, manifest: Manifest) -> None:
    """Make `config.out` the folder of these settings, or see that it is.

    Raises:
        UserError: it holds something else.
    """
    path = config.out / "config.json"
    own = settings(config) | {"num_trajectories": manifest.num_trajectories, "fingerprints": manifest.fingerprints}
    if not path.exists():
        if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
            raise UserError(f"{config.out} exists and holds no run of accvideo distill; choose another --out")
        config.out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(own, indent=2).encode() + b"\n")
        return
    theirs = json.loads(path.read_text("utf-8"))
    differing = [name for name in own if name not in PLACES and own[name] != theirs.get(name)]
    if differing:
        changes = ", ".join(f"{name} {theirs.get(name)}, now {own[name]}" for name in differing)
        raise UserError(
            f"{config.out} holds a student of other settings ({changes})\n"
            "Give the same settings to go on with it, or another --out"
        )


def to_device(batch: TrajectoryBatch, device: str) -> TrajectoryBatch:
    """The same batch on a device."""
    return replace(batch, states=batch.states.to(device), calls=tuple(call.to(device) for call in batch.calls))


def last_validation(path: Path) -> dict[str, float]:
    """The last validation in a metrics file: loss by key point and latent error; empty if there is none."""
    for line in reversed(read_metrics(path)):
        if "latent_error" in line:
            losses = {f"validation_loss_{k}": loss for k, loss in enumerate(line["validation_loss"])}
            return losses | {"latent_error": line["latent_error"]}
    return {}


@contextmanager
def progress_bar(
    console: Console, config: DistillConfig, training: Training
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A live bar on stderr with smoothed losses and the time left; gives a function that takes each line of metrics."""
    columns = (
        TextColumn("distill"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    shown: dict[str, float] = {}
    labels = {
        "trajectory_loss": "trajectory",
        "generator_loss": "generator",
        "real_accuracy": "real right",
        "fake_accuracy": "fake right",
        "latent_error": "validation",
    }
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=config.num_iterations, completed=training.iteration)

        def show(line: dict[str, Any]) -> None:
            for name in labels.keys() & line.keys():
                share = 1.0 if name == "latent_error" else 0.1
                value = float(line[name])
                shown[name] = (1 - share) * shown.get(name, value) + share * value
            description = "  ".join(f"{labels[name]} {shown[name]:.3f}" for name in labels if name in shown)
            progress.update(task, completed=line["iteration"] + 1, description=description)

        yield show
