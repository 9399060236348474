"""What a distillation is asked to do: its settings, presets of them, and the folder that is theirs."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tyro.conf import Positional

from accvideo.command import shorten
from accvideo.data.manifest import Manifest
from accvideo.inference.config import Quantization
from accvideo.training.checkpoint import writing
from accvideo.training.distributed import num_ranks
from accvideo.training.tracking import Tracker, check_tracker
from accvideo.trajectory import write_whole
from accvideo.types import UserError

PLACES = {"data", "out", "media_folder", "device", "save_every", "accumulate", "shard_base", "compile", "track"}
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
    keep: Path | None = None
    """Text file with the numbers of the trajectories to learn from, one a line; the others are left alone. None: all.
    See `accvideo decode`."""
    num_student_steps: tuple[int, ...] = ()
    """Steps K of the student, from key point to key point, which are spaced evenly among the recorded ones; several
    numbers: one student that takes any of them, the first unless asked. None given: all recorded key points."""
    tell_size: bool = True
    """Tell a student of several numbers of steps, by its timestep, how far each step goes."""
    start_from: str | None = None
    """Student whose weights are trained on, on further trajectories or by another recipe: a folder, or
    `playground-student`. LoRA rank, or `--full`, must be its own, and a LoRA's teacher the data set's; whole weights
    may come from another teacher with the same denoiser. None: the student starts as its teacher."""
    num_iterations: int = 400
    """Iterations; each trains one step, from noise to video and around again, on one batch."""
    batch_size: int = 16
    """Trajectories an iteration, over all ranks together."""
    accumulate: int = 1
    """Parts in which each rank takes its share of a batch, one after the other: less memory, the same student."""
    full: bool = False
    """Train all weights of the teacher's copy instead of a LoRA."""
    lora_rank: int = 32
    """Rank of the LoRA on the attention and feed-forward layers of the blocks."""
    learning_rate: float = 2e-3
    """Of the student (AdamW). About 2e-3 suits a LoRA of a small model, 2e-4 its full weights."""
    head_learning_rate: float = 1e-3
    """Of the discriminator's heads (AdamW)."""
    head_updates: int = 1
    """Updates of the heads an iteration, all on the same features: no further call of a denoiser."""
    weight_decay: float = 0.0
    """Of both optimizers."""
    max_gradient_norm: float = 1.0
    """Longer gradients are scaled down to this norm."""
    warmup_iterations: int = 0
    """Iterations over which both learning rates rise from 0."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rates after the warm-up: constant, or falling to 0 along half a cosine."""
    loss: Literal["trajectory", "consistency", "correction"] = "trajectory"
    """Of the teacher-forced half: "trajectory", the recorded steps (Eq. 6 of the paper); "consistency", which asks the
    teacher, guided as recorded, from the recorded videos with fresh noise: one step of its own, and the student's own
    way on to where its step ends (arXiv:2405.18407). That is twice the work an iteration, and needs no recorded states
    but the videos; try it from a student of the first (--start-from), with half of its learning rate. Or "correction",
    for students of one or two steps that come from the first: their whole way from the recorded noise, and what the
    teacher would correct in their video beyond what it would in the recorded one (arXiv:2304.07090)."""
    every_state: bool = False
    """Of "trajectory": set out from any recorded state within a step, drawn for each iteration, and not from its first
    alone. No more work, but more key points to record than --num-student-steps. On the playground it helps five steps,
    and not two. With update "shared", until the adversarial half takes part."""
    correction_levels: tuple[float, float] = (0.4, 0.7)
    """Of "correction": lowest and highest noise level to which videos are noised, 0 at the video and 1 at the noise;
    one of those between at which the teacher's own steps start is drawn each time."""
    media_folder: Path = Path()
    """What the names of images and videos in the prompts are relative to: the folder of the file of prompts. Needed by
    "consistency" and "correction" alone, to run the teacher's pipeline once."""
    adversarial_weight: float = 0.1
    """Weight of the adversarial loss (lambda_adv of the paper); 0 leaves that half of the method out."""
    adversarial_loss: Literal["nonsaturating", "saturating", "hinge"] = "nonsaturating"
    """Form of the adversarial loss; "saturating" is Eq. 7 of the paper read literally."""
    adversarial_start: int | None = None
    """Iteration from which the adversarial half takes part; it starts with the next sweep of the key points. None: for
    the last quarter of the iterations. From the first on is no better on the playground, for twice the work."""
    update: Literal["alternating", "joint", "shared"] = "joint"
    """One student update for each of the two losses, as in Algorithm 1; or one for their sum; or one for the sum of
    both losses of one and the same step, whose rollout starts from the record's own noise. That is 30 % less work, and
    the student learns less from an iteration."""
    fresh_rollouts: bool = False
    """Lead what is judged from noise to its key point in one iteration, by the student as it is: (K - 1) / 2
    evaluations of a sample more, on average. Otherwise an iteration takes it one step on and queues it, as in Algorithm
    1, so that weights up to a sweep older have led it."""
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
    compile: bool = False
    """Compile the denoisers' blocks by torch.compile: the first iterations wait for it, all others are faster."""
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
            ("num_iterations", "batch_size", "accumulate", "lora_rank", "head_updates", "validate_every", "save_every"),
            1,
        )
        names = ("num_validation", "warmup_iterations", "adversarial_weight", "adversarial_start", "patience")
        at_least |= dict.fromkeys(names, 0)
        for name, least in at_least.items():
            if (getattr(self, name) or 0) < least:
                raise UserError(f"{name} is {getattr(self, name)}; the least is {least}")
        check_tracker(self.track)
        if len(set(self.num_student_steps)) < len(self.num_student_steps):
            raise UserError(f"num_student_steps is {self.num_student_steps}; give each number once")
        if self.loss != "trajectory" and self.update == "shared":
            raise UserError(
                f"update is shared, which leads the student back to recorded states, and loss is {self.loss}, which "
                "does not\nLeave out one of them"
            )
        if self.loss != "trajectory" and self.every_state:
            raise UserError(
                f"every_state is of the trajectory loss, and loss is {self.loss}, which takes no recorded "
                "states but noise and videos\nLeave out one of them"
            )
        low, high = self.correction_levels
        if not 0 < low <= high < 1:
            raise UserError(f"correction_levels is {low:g} {high:g}; give two rising numbers between 0 and 1")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay}; choose 0 (off) or a number below 1, such as 0.99")
        if (self.keep_best or self.patience) and not self.num_validation:
            raise UserError("keep_best and patience need held-out trajectories; set num_validation to 1 or more")
        if (self.keep_best or self.patience) and self.loss == "correction":
            raise UserError(
                "keep_best and patience go by the distance to the teacher's own videos, and the loss correction lets "
                "that grow\nLeave them out"
            )
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

    @property
    def first_adversarial(self) -> int:
        """The first iteration in which the adversarial half may take part."""
        return round(0.75 * self.num_iterations) if self.adversarial_start is None else self.adversarial_start


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
        schedule="constant",
        adversarial_weight=0.1,
        adversarial_start=0,
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
        head_learning_rate=3e-3,
        adversarial_start=60,
    )


PRESETS: dict[str, Callable[..., DistillConfig]] = {"default": DistillConfig, "paper": paper, "playground": playground}
"""Configurations by the name that `--preset` knows; called with `data` and `out`."""


def resolved(config: DistillConfig) -> DistillConfig:
    """The settings with "auto" replaced by what this machine has."""
    device, precision = config.device, config.precision
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = fast_precision(device)
    return replace(config, device=device, precision=precision)


def fast_precision(device: str) -> Literal["float32", "bfloat16"]:
    """bfloat16 where the hardware has it."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if device != "cpu" or fast else "float32"


def settings(config: DistillConfig) -> dict[str, Any]:
    """The configuration as JSON."""
    return json.loads(json.dumps(asdict(config), default=str))


def kept_trajectories(config: DistillConfig, num_trajectories: int) -> list[int]:
    """The numbers of the trajectories to learn from, in ascending order.

    Raises:
        UserError: the file that `config.keep` names cannot be read, or holds something else than such numbers.
    """
    if config.keep is None:
        return list(range(num_trajectories))
    try:
        lines = config.keep.read_text("utf-8-sig").split()
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read {config.keep}: {error}") from error
    if bad := [line for line in lines if not (line.isdecimal() and int(line) < num_trajectories)]:
        raise UserError(
            f"{config.keep}: {shorten(bad[0])} is no number of a trajectory; {config.data} holds 0 to "
            f"{num_trajectories - 1}"
        )
    if not lines:
        raise UserError(f"{config.keep} is empty; give the numbers of the trajectories to learn from, one a line")
    return sorted({int(line) for line in lines})


def claim_folder(config: DistillConfig, manifest: Manifest, kept: Sequence[int]) -> None:
    """Make `config.out` the folder of these settings and trajectories, or see that it is.

    Raises:
        UserError: it holds something else, or cannot be written.
    """
    path = config.out / "config.json"
    own = settings(config) | {"num_trajectories": manifest.num_trajectories, "fingerprints": manifest.fingerprints}
    if config.keep is not None:
        own |= {"kept": hashlib.sha256(" ".join(map(str, kept)).encode()).hexdigest()}
    # A hidden file is what a kill leaves of a write; settings alone are those of a run that was refused.
    others = config.out.is_dir() and [each for each in config.out.iterdir() if each.name[0] != "." and each != path]
    if not path.exists() and (others or config.out.is_file()):
        raise UserError(f"{config.out} exists and holds no run of accvideo distill; choose another --out")
    if not others:
        with writing(config.out):
            config.out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(own, indent=2).encode() + b"\n")
        return
    # A run of an earlier version did what an option that it did not have does by default.
    theirs = settings(DistillConfig(data="", out=Path())) | json.loads(path.read_text("utf-8"))
    differing = [name for name in own if name not in PLACES and own[name] != theirs.get(name)]
    if differing:
        changes = ", ".join(f"{name} {theirs.get(name)}, now {own[name]}" for name in differing)
        raise UserError(
            f"{config.out} holds a student of other settings ({changes})\n"
            "Give the same settings to go on with it, or another --out"
        )


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
