"""What a distillation starts from: the teacher's denoisers, a student of them, heads and optimizers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW

from accvideo.call import denoiser_blocks
from accvideo.data.manifest import Manifest
from accvideo.discriminator import Discriminator
from accvideo.inference.acceleration import quantization_config, stored_fingerprint
from accvideo.inference.config import Quantization
from accvideo.inference.model import student_folder
from accvideo.inference.student_config import read_student_config
from accvideo.student import Student, saved_weights
from accvideo.teacher import fingerprint, teacher_path
from accvideo.training.distributed import num_ranks
from accvideo.training.recipe import DistillConfig
from accvideo.training.sharding import sharder, spread_as
from accvideo.training.steps import Rollouts, Training, set_weights, student_sweeps
from accvideo.trajectory import TrajectoryBatch
from accvideo.types import Sigmas, UserError


def start_training(
    config: DistillConfig, denoisers: dict[str, nn.Module], sigmas: Sigmas, parts: Sequence[TrajectoryBatch]
) -> Training:
    """Student, heads, optimizers and empty queues before the first iteration.

    Args:
        config: the settings, resolved.
        denoisers: the teacher's, by name; they become the student's.
        sigmas: noise levels of the K + 1 key points.
        parts: of the first batch, those that are this rank's.
    """
    device, adversarial = torch.device(config.device), config.adversarial_weight > 0
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        sharded = num_ranks() > 1 and (config.full or config.shard_base)
        student = Student(
            {name: denoiser if sharded else denoiser.to(device) for name, denoiser in denoisers.items()},
            lora_rank=None if config.full else config.lora_rank,
            arithmetic=partial(arithmetic, device.type, config.precision),
            keep_teacher=adversarial or config.loss != "trajectory",
            gradient_checkpointing=config.gradient_checkpointing,
            shard=sharder(config.device, config.precision) if sharded else None,
        )
        discriminator = None
        if adversarial:
            sweeps = student_sweeps(len(sigmas) - 1, config.num_student_steps)
            ends = sorted({step.end - 1 for sweep in sweeps for step in sweep})
            discriminator = Discriminator(
                student, sigmas, parts, config.feature_layers, config.head_kernel, config.shared_head, ends
            ).to(device)
    if config.compile:
        compile_blocks(student)
    trained = student.trained()
    if config.start_from is not None:
        set_weights(student, starting_weights(config.start_from, trained))
    optimizer = partial(AdamW, weight_decay=config.weight_decay, fused=True)
    return Training(
        student=student,
        student_optimizer=optimizer(trained.values(), lr=config.learning_rate),
        rollouts=Rollouts(len(sigmas) - 1, config.seed),
        discriminator=discriminator,
        head_optimizer=optimizer(discriminator.parameters(), lr=config.head_learning_rate) if discriminator else None,
        average={name: p.detach().clone() for name, p in trained.items()} if config.ema_decay else {},
    )


def check_start(config: DistillConfig, manifest: Manifest) -> None:
    """See that the data set, and the student to start from if there is one, are what the settings ask for.

    Raises:
        UserError: all recorded states begin a step of the student's, and `config.every_state` wants others too; or the
            student to start from trains other weights, or a LoRA of another teacher.
    """
    if config.every_state:
        check_states(config.data, manifest.num_student_steps, config.num_student_steps)
    if config.start_from is None:
        return
    theirs = read_student_config(student_folder(config.start_from))
    if theirs.lora_rank != (None if config.full else config.lora_rank):
        own = "--full" if theirs.lora_rank is None else f"--no-full --lora-rank {theirs.lora_rank}"
        raise UserError(f"{config.start_from} was trained with {own}\nGive the same, or leave --start-from out")
    if theirs.fingerprints != manifest.fingerprints and not config.full:
        raise UserError(
            f"{config.start_from} is a LoRA for {theirs.teacher}, and {config.data} is of {manifest.teacher}: "
            "their denoisers differ\nGive --start-from a student of this teacher, or leave it out"
        )


def check_states(data: str, num_keypoint_steps: int, num_student_steps: Sequence[int]) -> None:
    """See that some of the student's steps have recorded states within them, for `every_state` to set out from.

    Raises:
        UserError: none has.
    """
    sweeps = student_sweeps(num_keypoint_steps, num_student_steps)
    if all(step.end - step.start == 1 for sweep in sweeps for step in sweep):
        raise UserError(
            "every_state sets out from states within the student's steps, and each of the "
            f"{num_keypoint_steps} steps recorded in {data} is one of the student's\n"
            "Give fewer --num-student-steps, or record more key points"
        )


def starting_weights(name: str, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The weights of a saved student, spread over the ranks as those they are for.

    Raises:
        UserError: they are not of the same names and shapes: its denoisers are others, or its LoRA is of other layers
            than a LoRA of this version.
    """
    folder = student_folder(name)
    config = read_student_config(folder)
    saved = saved_weights(folder, config)
    theirs = {key: tuple(weight.get_shape()) for key, weight in saved.items()}
    own = {key: tuple(weight.shape) for key, weight in trained.items()}
    keys = theirs.keys() | own.keys()
    if differing := sorted(key for key in keys if theirs.get(key) != own.get(key)):
        first = differing[0]
        why = "its denoisers are built otherwise" if config.lora_rank is None else "another version of accvideo made it"
        raise UserError(
            f"the weights of {name} are not those of this training: {why} ({len(differing)} of {len(keys)} "
            f"differ; {first} is {theirs.get(first, 'missing')} there and {own.get(first, 'missing')} here)\n"
            "Leave --start-from out"
        )
    return {key: spread_as(weight, partial(rows_of, saved[key])) for key, weight in trained.items()}


def rows_of(weight: Any, start: int = 0, stop: int | None = None) -> Tensor:
    """The rows of a lazily read weight from `start` up to `stop`."""
    return weight[start:stop]


def compile_blocks(student: Student) -> None:
    """Compile the blocks of student and teacher by torch.compile, one compilation for all blocks of a kind.

    Of each, the forward pass alone: hooks, by which features are taken and sharded weights gathered, run around it.
    """
    # One for each of: adapters on or off, gradients wanted or not, of weights or latents, and for each shape.
    torch._dynamo.config.recompile_limit = 64
    for denoiser in dict.fromkeys([*student.denoisers.values(), *student.teachers.values()]):
        for block in denoiser_blocks(denoiser):
            block.forward = torch.compile(block.forward)


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
