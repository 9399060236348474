"""Train the playground's teacher: a genuine Wan text-to-video pipeline, small enough for a laptop.

Three stages, all resumable: the autoencoder learns the world's clips; it is refined in small batches without its
latents moving far; the text encoder and the denoiser learn together to denoise these by flow matching (Lipman et al.
2023, arXiv:2210.02747). With a teacher to start from, the first stage is left out; the others go on from its weights.

The world draws as many clips as training wants, so nothing is seen twice unless the pool of encoded clips wraps around.
Batch i depends on the seed and i alone: a killed training goes on from its last checkpoint as if nothing had happened.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DPMSolverMultistepScheduler, WanPipeline, WanTransformer3DModel
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from accvideo.playground import world
from accvideo.teacher import load_pipeline
from accvideo.trajectory import write_whole
from accvideo.types import UserError

LATENT_CHANNELS = 48
TEXT_WIDTH = 128
_BATCHES_DRAWN = 16
"""Batches of the autoencoder that are drawn at once."""

_BATCHES_MEASURED = 8
"""Batches of 64 clips over which the mean and deviation of the latents are taken."""

MAX_TOKENS = 32
"""Length that prompts are padded to; the longest caption has 17 words and an end mark."""

CALL_DEFAULTS = {
    "height": world.SIZE,
    "width": world.SIZE,
    "num_frames": world.NUM_FRAMES,
    "fps": world.FPS,
    "guidance_scale": 3.0,
    "pipeline_args": {"max_sequence_length": MAX_TOKENS},
}

MODEL_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
tags:
- accvideo
---

# The playground's teacher

A tiny text-to-video pipeline (`WanPipeline`) of captioned clips of moving shapes: 64x64 pixels, 17 frames, 8 frames a
second, guidance scale 3. It is a place to try distillation in, not a model of the real world. Prompts look like
"a red star moves left and a blue ring bounces on a striped gray background". Made by `accvideo playground train`.
"""


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


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of the world's grammar; every other word is `<unk>`."""
    sentences = [*world.SHAPES, *world.COLORS, *world.MOTIONS, *world.BACKGROUNDS, *world.PATTERNS]
    words = dict.fromkeys(" ".join(["a an and on background", *sentences]).split())
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A </s>", special_tokens=[("</s>", vocab["</s>"])]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """A UMT5 encoder of two layers."""
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def build_vae() -> AutoencoderKLWan:
    """A Wan 2.2 style autoencoder: 4x4 pixels to a patch, then 4x in each axis and in time, to 48 channels."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=20,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=48,
        out_channels=48,
        patch_size=4,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def build_denoiser() -> WanTransformer3DModel:
    """A Wan denoiser of 4.7 million weights: one token a latent pixel, four times as wide as the token's numbers."""
    denoiser = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=640,
        num_layers=8,
        rope_max_seq_len=64,
    )
    nn.init.zeros_(denoiser.proj_out.weight)
    nn.init.zeros_(denoiser.proj_out.bias)
    return denoiser


def train(config: TrainConfig) -> dict[str, Any]:
    """Train all stages and save the teacher; returns what was written and how long it took."""
    started = time.perf_counter()
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(gpu if config.device == "auto" else config.device)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    start = load_start(config.start_from)
    claim_folder(config)
    vae = start.vae.to(device) if start else train_vae(config, device)
    refine_vae(config, vae, device)
    tokenizer, text_encoder, denoiser = train_denoiser(config, vae, start, device)
    save_teacher(config.out / "teacher", vae, tokenizer, text_encoder, denoiser)
    return {"teacher": str(config.out / "teacher"), "seconds": time.perf_counter() - started}


def claim_folder(config: TrainConfig) -> None:
    """Make `config.out` the folder of these settings, or see that it is: checkpoints of others would be mixed in.

    Raises:
        UserError: it holds a training of other settings.
    """
    own = {name: value for name, value in asdict(config).items() if name not in ("out", "device", "save_every")}
    path = config.out / "train.json"
    if path.exists():
        theirs = json.loads(path.read_text("utf-8"))
        if changes := [f"{name} {theirs.get(name)}, now {own[name]}" for name in own if own[name] != theirs.get(name)]:
            raise UserError(
                f"{config.out} holds a training of other settings ({', '.join(changes)})\n"
                "Give the same settings to go on with it, or another --out"
            )
        return
    config.out.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(own, indent=2).encode() + b"\n")


def load_start(name: str | None) -> WanPipeline | None:
    """The teacher to go on from.

    Raises:
        UserError: it is not one that this module has made.
    """
    if name is None:
        return None
    pipeline: Any = load_pipeline(name, torch.float32, torch.device("cpu"))
    vocab = build_tokenizer().get_vocab()
    if not isinstance(pipeline, WanPipeline) or pipeline.tokenizer.get_vocab() != vocab:  # type: ignore[union-attr]
        raise UserError(f"{name} is not a teacher of the playground's world\nGive one, or leave --start-from out")
    return pipeline


def draw_weighted(scenes: world.Scenes) -> tuple[Tensor, Tensor]:
    """Clips of scenes in [-1, 1], and the weight of each pixel's error `[batch, 1, 17, 64, 64]`.

    Weights are seven times as high on and next to objects, a tenth of the pixels, and 1 on average.
    """
    near = nn.functional.max_pool2d(world.draw_foreground(scenes), 5, stride=1, padding=2)[:, None]
    weight = 1 + 6 * near
    return world.draw(scenes) * 2 - 1, weight / weight.mean()


def hard_scenes(num: int, generator: torch.Generator) -> world.Scenes:
    """Clips of the training split, of which a third show a star or a cross that spins.

    These are what an autoencoder that packs four frames into one finds hardest; of all clips one in eighteen is such.
    """
    scenes = world.random_scenes(8 * num, generator)
    requests, stars = scenes.requests, [world.SHAPES.index(name) for name in ("star", "cross")]
    spins = (requests.motion == world.MOTIONS.index("spins")) & torch.isin(
        requests.shape, requests.shape.new_tensor(stars)
    )
    spins[:, 1] &= requests.count > 1
    order = torch.argsort(spins.any(1).int(), descending=True, stable=True)
    hard = min(num // 3, int(spins.any(1).sum()))
    return scenes[torch.cat([order[:hard], order[len(order) - num + hard :]])]


def pixel_loss(error: Tensor, weight: Tensor) -> Tensor:
    """Weighted L1 and L2 error of pixels in [-1, 1]."""
    return (weight * (error.abs() + 4 * error.square())).mean()


def train_vae(config: TrainConfig, device: torch.device) -> AutoencoderKLWan:
    """Train the autoencoder on the world's clips by pixel errors and a small KL term."""
    torch.manual_seed(config.seed)
    vae = build_vae()
    vae.to(device)  # type: ignore[arg-type]
    optimizer = _adamw(list(vae.parameters()))

    def update(clips: Tensor, weight: Tensor, noise: Tensor) -> dict[str, Tensor]:
        posterior = vae.encode(clips).latent_dist  # type: ignore[union-attr]
        error = vae.decode(posterior.mean + posterior.std * noise).sample - clips  # type: ignore[union-attr]
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        minimize(pixel_loss(error, weight) + config.kl_weight * kl, optimizer)
        return {"psnr_db": psnr(error), "kl_nats": kl.detach()}

    run_update = _Graphed(update, optimizer)

    @lru_cache(maxsize=1)
    def draw_batches(block: int) -> tuple[Tensor, Tensor]:
        generator = _generator(config.seed, "vae", block, device)
        clips, weight = draw_weighted(world.random_scenes(_BATCHES_DRAWN * config.vae_batch_size, generator))
        return clips.unflatten(0, (_BATCHES_DRAWN, -1)), weight.unflatten(0, (_BATCHES_DRAWN, -1))

    def iterate(iteration: int) -> dict[str, Tensor]:
        _set_learning_rate(optimizer, config.vae_learning_rate * _schedule(iteration, config.vae_iterations))
        clips, weight = (part[iteration % _BATCHES_DRAWN] for part in draw_batches(iteration // _BATCHES_DRAWN))
        generator = _generator(config.seed, "vae noise", iteration, device)
        noise = torch.randn(len(clips), LATENT_CHANNELS, 5, 4, 4, generator=generator, device=device)
        return run_update(clips, weight, noise)

    checkpoint = _Checkpoint(config.out / "vae", {"vae": vae}, optimizer)
    _loop("autoencoder", config.vae_iterations, config.save_every, checkpoint, iterate)
    _set_latent_statistics(vae, _generator(config.seed, "statistics", 0, device))
    return vae.eval().requires_grad_(False)


def train_denoiser(
    config: TrainConfig, vae: AutoencoderKLWan, start: WanPipeline | None, device: torch.device
) -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel, WanTransformer3DModel]:
    """Train text encoder and denoiser together by flow matching on the autoencoder's latents."""
    torch.manual_seed(config.seed + 1)
    tokenizer = build_tokenizer()
    text_encoder: Any = start.text_encoder if start else build_text_encoder(len(tokenizer))
    denoiser: Any = start.transformer if start else build_denoiser()
    text_encoder.to(device).requires_grad_(True)
    denoiser.to(device).requires_grad_(True)
    modules = {"text_encoder": text_encoder, "denoiser": denoiser}
    weights = [p for module in modules.values() for p in module.parameters()]
    averages = {name: {k: p.detach().clone() for k, p in m.named_parameters()} for name, m in modules.items()}
    averaged = [average for module in averages.values() for average in module.values()]
    matrices = [p for name, p in denoiser.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    others = [p for p in weights if all(p is not matrix for matrix in matrices)]
    optimizer = _muon(matrices, others)
    checkpoint = _Checkpoint(config.out / "denoiser", modules, optimizer, averages)
    pool = _Pool(config, vae, tokenizer, device)
    if device.type == "cuda":
        denoiser.compile_repeated_blocks(fullgraph=True, dynamic=False)

    def update(latents: Tensor, noise: Tensor, sigma: Tensor, tokens: Tensor, *, length: int) -> dict[str, Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            velocity = denoiser(
                hidden_states=torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1)),
                timestep=1000 * sigma,
                encoder_hidden_states=encode_prompts(text_encoder, tokens, length),
                return_dict=False,
            )[0]
        loss = (velocity.float() - (noise - latents)).square().mean()
        minimize(loss, optimizer)
        return {"loss": loss.detach()}

    # One update in eight sees prompts padded as far as Wan's pipeline pads them by default, so that both work.
    run_update = [_Graphed(partial(update, length=length), optimizer) for length in (MAX_TOKENS, 512)]

    def iterate(iteration: int) -> dict[str, Tensor]:
        pool.refresh(iteration)
        _set_learning_rate(optimizer, config.denoiser_learning_rate * _schedule(iteration, config.denoiser_iterations))
        generator = _generator(config.seed, "denoiser", iteration, device)
        latents, tokens = pool.sample(config.denoiser_batch_size, generator)
        dropped = torch.rand(len(tokens), 1, generator=generator, device=device) < config.caption_dropout
        noise = torch.randn(latents.shape, generator=generator, device=device)
        uniform = torch.rand(len(latents), generator=generator, device=device)
        sigma = config.train_shift * uniform / (1 + (config.train_shift - 1) * uniform)
        tokens = torch.where(dropped, pool.empty_caption, tokens)
        metrics = run_update[iteration % 8 == 7](latents, noise, sigma, tokens)
        _move_averages(averaged, weights, min(config.ema_decay, (1 + iteration) / (10 + iteration)))
        return metrics

    _loop("denoiser", config.denoiser_iterations, config.save_every, checkpoint, iterate)
    with torch.no_grad():
        for weight, average in zip(weights, averaged, strict=True):
            weight.copy_(average)
    for module in modules.values():
        module.eval().requires_grad_(False)
    return tokenizer, text_encoder, denoiser


def refine_vae(config: TrainConfig, vae: AutoencoderKLWan, device: torch.device) -> None:
    """Go on training the autoencoder by Muon in small batches, its latents held near where they were.

    So a denoiser of the old latents has little to learn anew.
    """
    old: Any = copy.deepcopy(vae).requires_grad_(False)
    vae.requires_grad_(True)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(config.refine_encoder)
    trained = {name: weight for name, weight in vae.named_parameters() if weight.requires_grad}
    weights = list(trained.values())
    averages = {"vae": {name: weight.detach().clone() for name, weight in trained.items()}}
    averaged = list(averages["vae"].values())
    optimizer = _muon([w for w in weights if w.ndim >= 4], [w for w in weights if w.ndim < 4])
    checkpoint = _Checkpoint(config.out / "refined", {"vae": vae}, optimizer, averages)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)  # type: ignore[attr-defined]

    def update(clips: Tensor, weight: Tensor, noise: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            with torch.no_grad():
                held = old.encode(clips).latent_dist.mean.float()
            latents = vae.encode(clips).latent_dist.mean.float()  # type: ignore[union-attr]
            decoded = vae.decode(latents + std * noise).sample  # type: ignore[union-attr]
        error, moved = decoded.float() - clips, ((latents - held) / std).square().mean()
        optimizer.zero_grad()
        (pixel_loss(error, weight) + config.refine_hold * moved).backward()
        optimizer.step()
        return {"psnr_db": psnr(error), "moved": moved.detach().sqrt()}

    run_update = _Graphed(update, optimizer)

    def iterate(iteration: int) -> dict[str, Tensor]:
        _set_learning_rate(optimizer, config.refine_learning_rate * _schedule(iteration, config.refine_iterations))
        generator = _generator(config.seed, "refine", iteration, device)
        clips, weight = draw_weighted(hard_scenes(config.refine_batch_size, generator))
        noise = torch.randn(len(clips), LATENT_CHANNELS, 5, 4, 4, generator=generator, device=device)
        amount = config.refine_noise * torch.rand(len(clips), 1, 1, 1, 1, generator=generator, device=device)
        metrics = run_update(clips, weight, amount * noise)
        _move_averages(averaged, weights, min(0.997, (1 + iteration) / (10 + iteration)))
        return metrics

    _loop("refinement", config.refine_iterations, config.save_every, checkpoint, iterate)
    with torch.no_grad():
        for weight, average in zip(weights, averaged, strict=True):
            weight.copy_(average)
    vae.eval().requires_grad_(False)


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pixels in [-1, 1], in dB."""
    return 10 * torch.log10(4 / error.detach().square().mean())


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal for matrices, and Adam at a tenth of the rate for all other weights.

    A convolution kernel counts as a matrix of outputs by everything else; five Newton-Schulz iterations bring the
    singular values of the momentum near 1 (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural
    networks"), those of all matrices of one shape at once. Adam's moments start at zero and are not corrected for it:
    the learning rate is to rise from zero.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], lr: float | Tensor) -> None:
        super().__init__([{"params": list(matrices)}, {"params": list(others)}], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient."""
        rate = self.param_groups[0]["lr"]
        matrices, others = ([w for w in group["params"] if w.grad is not None] for group in self.param_groups)

        momenta = self._moments(matrices, "momentum")
        torch._foreach_lerp_(momenta, [w.grad for w in matrices], 0.05)
        ahead = torch._foreach_lerp([w.grad for w in matrices], momenta, 0.95)
        by_shape: dict[torch.Size, list[int]] = {}
        for i, gradient in enumerate(ahead):
            by_shape.setdefault(gradient.flatten(1).shape, []).append(i)
        for (outputs, inputs), rows in by_shape.items():
            directions = _orthogonal(torch.stack([ahead[i].flatten(1) for i in rows]))
            directions = directions * (-rate * max(1.0, outputs / inputs) ** 0.5)
            changes = [change.view_as(matrices[i]) for i, change in zip(rows, directions.unbind(), strict=True)]
            torch._foreach_add_([matrices[i] for i in rows], changes)

        means, squares = self._moments(others, "momentum"), self._moments(others, "square")
        gradients = [w.grad for w in others]
        torch._foreach_lerp_(means, gradients, 0.1)
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 0.01)
        deviations = torch._foreach_add(torch._foreach_sqrt(squares), 1e-8)
        changes = torch._foreach_mul(torch._foreach_div(means, deviations), -0.1 * rate)
        torch._foreach_add_(others, changes)

    def _moments(self, weights: list[nn.Parameter], name: str) -> list[Tensor]:
        for weight in weights:
            if name not in self.state[weight]:
                self.state[weight][name] = torch.zeros_like(weight)
        return [self.state[weight][name] for weight in weights]


def _orthogonal(matrices: Float[Tensor, "batch rows columns"]) -> Float[Tensor, "batch rows columns"]:
    """The orthogonal matrices nearest to `matrices`, roughly: singular values come to lie between about 0.7 and 1.2."""
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        product = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * product + 2.0315 * product @ product) @ wide
    return wide.mT if tall else wide


def encode_prompts(text_encoder: UMT5EncoderModel, tokens: Tensor, length: int) -> Tensor:
    """Prompt embeddings as Wan's pipeline makes them: zeros behind the end mark, padded to `length` tokens."""
    mask = tokens != 0
    embeds = text_encoder(tokens, mask.long()).last_hidden_state * mask[..., None]
    return nn.functional.pad(embeds, (0, 0, 0, length - tokens.shape[1]))


def save_teacher(
    folder: Path,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: UMT5EncoderModel,
    denoiser: WanTransformer3DModel,
) -> None:
    """Save the pipeline in float16, with the defaults of its call beside it.

    The scheduler is the first-order DPM-Solver on flow sigmas, which is the Euler step (to rounding) on a grid whose
    every n-th level is the grid of n times fewer steps; Wan's pipeline could not ask an Euler scheduler for that.
    """
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=1, flow_shift=3.0
    )
    pipeline = WanPipeline(
        tokenizer=tokenizer,  # type: ignore[arg-type]
        text_encoder=text_encoder.cpu(),
        vae=vae.cpu(),
        scheduler=scheduler,  # type: ignore[arg-type]
        transformer=denoiser.cpu(),
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    # transformers loads a model in the type it was saved in; the others load in float32.
    text_config = folder / "text_encoder" / "config.json"
    text_config.write_text(text_config.read_text().replace('"float16"', '"float32"'))
    (folder / "README.md").write_text(MODEL_CARD)
    (folder / "accvideo.json").write_text(json.dumps(CALL_DEFAULTS, indent=2) + "\n")


class _Pool:
    """Latents and tokens of clips drawn from the world: a ring that grows by a block every 256 iterations."""

    def __init__(
        self, config: TrainConfig, vae: AutoencoderKLWan, tokenizer: PreTrainedTokenizerFast, device: torch.device
    ) -> None:
        self.config, self.vae, self.tokenizer, self.device = config, vae, tokenizer, device
        self.mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)  # type: ignore[attr-defined]
        self.std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)  # type: ignore[attr-defined]
        self.num_blocks = config.pool_size // config.pool_block
        size = self.num_blocks * config.pool_block
        self.latents = torch.zeros(size, LATENT_CHANNELS, 5, 4, 4, dtype=torch.float16, device=device)
        self.tokens = torch.zeros(size, MAX_TOKENS, dtype=torch.int64, device=device)
        self.empty_caption = self._tokenize([""])
        self.num_filled = 0

    def _tokenize(self, captions: list[str]) -> Tensor:
        encoded = self.tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
        return encoded.input_ids.to(self.device)  # type: ignore[union-attr]

    @torch.no_grad()
    def _fill(self, block: int) -> None:
        scenes = world.random_scenes(self.config.pool_block, _generator(self.config.seed, "pool", block, self.device))
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            latents = self.vae.encode(world.draw(scenes) * 2 - 1).latent_dist.mean  # type: ignore[union-attr]
        rows = slice(
            block % self.num_blocks * self.config.pool_block, (block % self.num_blocks + 1) * self.config.pool_block
        )
        self.latents[rows] = ((latents.float() - self.mean) / self.std).half()
        self.tokens[rows] = self._tokenize(world.captions_of(scenes.requests))

    def refresh(self, iteration: int) -> None:
        """Hold the blocks that belong to an iteration; the first call, also of a resumed training, fills the pool."""
        wanted = self.config.pool_start // self.config.pool_block + iteration // 256
        for block in range(max(self.num_filled, wanted - self.num_blocks), wanted):
            self._fill(block)
        self.num_filled = wanted

    def sample(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents and tokens of clips drawn with replacement."""
        filled = min(self.num_filled, self.num_blocks) * self.config.pool_block
        rows = torch.randint(filled, (num,), generator=generator, device=self.device)
        return self.latents[rows].float(), self.tokens[rows]


class _Graphed:
    """An update captured as a CUDA graph at its first call: its thousands of small kernels start with one launch.

    Inputs are copied into fixed tensors. Capture needs a few trial updates; they run at learning rate 0, and what they
    did to the optimizer's moments is undone. On a CPU the update is simply called.
    """

    def __init__(self, update: Callable[..., dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
        self.update, self.optimizer = update, optimizer
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        if inputs[0].device.type != "cuda":
            return self.update(*inputs)
        if self.graph is None:
            self._capture(inputs)
        assert self.graph is not None
        for fixed, value in zip(self.inputs, inputs, strict=True):
            fixed.copy_(value)
        self.graph.replay()
        return self.outputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(value.clone() for value in inputs)
        rate = self.optimizer.param_groups[0]["lr"].clone()
        before = {p: {k: v.clone() for k, v in state.items()} for p, state in self.optimizer.state.items()}
        _set_learning_rate(self.optimizer, 0.0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.update(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                value.copy_(before[parameter][key]) if parameter in before else value.zero_()
        _set_learning_rate(self.optimizer, rate)
        self.graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        with torch.cuda.graph(self.graph):
            self.outputs = self.update(*self.inputs)


class _Checkpoint:
    """Weights, their averages, optimizer state and the iteration, in one folder; whole or not at all."""

    def __init__(
        self,
        folder: Path,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        averages: dict[str, dict[str, Tensor]] | None = None,
    ) -> None:
        self.path = folder.with_suffix(".safetensors")
        self.modules, self.optimizer, self.averages = modules, optimizer, averages or {}
        self.iteration = 0
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        tensors = load_file(self.path)
        self.iteration = int(tensors.pop("iteration"))
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, _, key = name.partition("/")
            groups.setdefault(group, {})[key] = tensor
        for name, module in self.modules.items():
            module.load_state_dict(groups[name])
        for name, average in self.averages.items():
            for key, tensor in groups[f"average.{name}"].items():
                average[key].copy_(tensor)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in groups["optimizer"].items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        param_groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": param_groups})

    def save(self, iteration: int) -> None:
        """Write under another name, then rename."""
        tensors = {"iteration": torch.tensor(iteration)}
        for name, module in self.modules.items():
            tensors |= {f"{name}/{key}": tensor for key, tensor in module.state_dict().items()}
        for name, average in self.averages.items():
            tensors |= {f"average.{name}/{key}": tensor for key, tensor in average.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}.{key}": tensor for key, tensor in values.items()}
        partial = self.path.with_suffix(".partial")
        save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, partial)
        partial.rename(self.path)
        self.iteration = iteration


def _loop(
    name: str,
    num_iterations: int,
    save_every: int,
    checkpoint: _Checkpoint,
    update: Callable[[int], dict[str, Tensor]],
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=num_iterations, completed=checkpoint.iteration)
        for iteration in range(checkpoint.iteration, num_iterations):
            metrics = update(iteration)
            progress.advance(task)
            is_save = (iteration + 1) % save_every == 0 or iteration + 1 == num_iterations
            if not is_save and (iteration + 1) % 100:
                continue
            text = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
            progress.update(task, description=f"{name}  {text}")
            if is_save:
                checkpoint.save(iteration + 1)
                console.print(f"{name} {iteration + 1}/{num_iterations}  {text}", highlight=False)


def _set_latent_statistics(vae: AutoencoderKLWan, generator: torch.Generator) -> None:
    with torch.no_grad():
        clips = (world.draw(world.random_scenes(64, generator)) * 2 - 1 for _ in range(_BATCHES_MEASURED))
        latents = torch.cat([vae.encode(clip).latent_dist.mean for clip in clips])  # type: ignore[union-attr]
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def minimize(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One clipped step of the optimizer down the gradient of the loss."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


@torch.no_grad()
def _move_averages(averages: list[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """Move running means towards the weights.

    With gradients on, the means would join the weights' graph and keep it alive, and no CUDA graph could be captured.
    """
    torch._foreach_lerp_(averages, list(weights), 1 - decay)


def _adamw(weights: list[nn.Parameter]) -> torch.optim.AdamW:
    rate, on_gpu = _no_learning_rate(weights[0].device), weights[0].device.type == "cuda"
    return torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True, capturable=on_gpu)


def _muon(matrices: list[nn.Parameter], others: list[nn.Parameter]) -> Muon:
    return Muon(matrices, others, _no_learning_rate(matrices[0].device))


def _no_learning_rate(device: torch.device) -> float | Tensor:
    """A learning rate of zero, to be set later; a captured graph reads it from a tensor."""
    return torch.zeros((), device=device) if device.type == "cuda" else 0.0


def _set_learning_rate(optimizer: torch.optim.Optimizer, rate: float | Tensor) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].copy_(rate) if isinstance(rate, Tensor) else group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _schedule(iteration: int, num_iterations: int) -> float:
    """Learning rate as a fraction of its peak: 300 updates of warm-up, then half a cosine down to zero."""
    warmup = min(300, num_iterations // 10 + 1)
    if iteration < warmup:
        return (iteration + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / max(1, num_iterations - warmup)))


def _generator(seed: int, purpose: str, index: int, device: torch.device) -> torch.Generator:
    """A generator of its own for each purpose and iteration, so that nothing has to be saved to resume."""
    mixed = sum(ord(letter) * 31**i for i, letter in enumerate(purpose))
    return torch.Generator(device).manual_seed((seed * 1_000_003 + mixed) * 2**24 % 2**62 + index)
