"""Settings of the demo and of the playground's own commands."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from accvideo.training.recipe import playground
from accvideo.types import UserError


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Records the playground's teacher, distills a 5-step student of it, and compares the two on held-out prompts."""

    out: Path = Path("runs/demo")
    """Folder of the run; an interrupted demo in it goes on."""
    num_trajectories: int = 128
    """Trajectories to record, 25 guided steps of second order each."""
    num_iterations: int = 100
    """Updates of the student; the adversarial half takes part in the last two fifths."""
    num_prompts: int = 96
    """Held-out prompts that teacher and student are compared on."""
    seed: int = 0
    """Of prompts, noise and training."""

    def __post_init__(self) -> None:
        """Refuse a data set of which nothing would be left to train on."""
        if self.num_trajectories <= (held_out := playground("", self.out).num_validation):
            raise UserError(f"num_trajectories is {self.num_trajectories}: {held_out} are held out, so ask for more")


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Decodes a data set of the playground's teacher, judges its videos, and writes the numbers of the right ones.

    So a student can be distilled from what the teacher got right alone. Real worlds have no such judge: there, decode a
    data set by `accvideo decode` and score it as you see fit.
    """

    data: Positional[str]
    """Data set of the playground's teacher."""
    out: Path
    """Text file to write, for `accvideo distill --keep`."""
    batch_size: int = 16
    """Videos decoded together."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train the playground's teacher and save it as a diffusers folder."""

    out: Path
    """Folder to write: the pipeline in `teacher/`, checkpoints beside it."""
    start_from: str | None = None
    """Teacher to go on from: `playground`, or a folder that this command saved. From nothing by default."""
    vae_iterations: int = 12_000
    """Updates of the autoencoder."""
    vae_batch_size: int = 64
    """Clips in one update of the autoencoder."""
    vae_learning_rate: float = 1e-3
    """Peak learning rate of the autoencoder."""
    kl_weight: float = 1e-4
    """Weight of the mean KL divergence of a latent number (in nats) against the mean pixel error."""
    refine_iterations: int = 10_000
    """Further updates of the autoencoder, its latents held where they are."""
    refine_batch_size: int = 32
    """Clips in one of these updates."""
    refine_learning_rate: float = 3e-3
    """Peak learning rate of the kernels (Muon) in these updates; a tenth of it is that of other weights (Adam)."""
    refine_hold: float = 0.03
    """Weight of the mean squared distance of the latents from where they were, in their standard deviations."""
    refine_encoder: bool = True
    """Train the encoder in these updates too; without it the latents stay, and so do denoiser, records and students."""
    refine_noise: float = 0.2
    """Most noise on the latents that the decoder is given, in their standard deviations; drawn for each clip."""
    refine_by: str | None = None
    """Student, such as `playground-student`, whose last steps remake most of these latents, so that the decoder learns
    to read what samplers make; needs `--start-from` its teacher, and `--no-refine-encoder`. None: noise alone."""
    denoiser_iterations: int = 30_000
    """Updates of the denoiser and the text encoder."""
    denoiser_batch_size: int = 512
    """Clips in one update of the denoiser."""
    denoiser_learning_rate: float = 1e-2
    """Peak learning rate of the matrices (Muon) of the denoiser; a tenth of it is that of all other weights (Adam)."""
    ema_decay: float = 0.9995
    """Decay of the moving average of the weights, which is what is saved."""
    caption_dropout: float = 0.1
    """Fraction of clips trained without their caption, for classifier-free guidance (arXiv:2207.12598)."""
    train_shift: float = 3.0
    """Shift of the noise levels trained on towards noise; 1 draws them uniformly."""
    pool_size: int = 262_144
    """Encoded clips kept at hand; every 256 updates a block of new ones replaces the oldest."""
    pool_block: int = 1024
    """Clips drawn and encoded at once."""
    pool_start: int = 131_072
    """Clips encoded before the first update of the denoiser."""
    seed: int = 0
    """Seed of the weights, the clips and the noise."""
    save_every: int = 1_000
    """Updates between checkpoints."""
    device: str = "auto"
    """Device to train on; `auto` takes a GPU if there is one."""

    def __post_init__(self) -> None:
        """Refuse a pool that cannot start."""
        if not self.denoiser_batch_size <= self.pool_start <= self.pool_size:
            raise UserError(
                f"pool_start={self.pool_start} must lie between denoiser_batch_size={self.denoiser_batch_size} "
                f"and pool_size={self.pool_size}"
            )
        if self.refine_by is not None and (self.start_from is None or self.refine_encoder):
            raise UserError("refine_by needs latents that stay: give --start-from and --no-refine-encoder too")
