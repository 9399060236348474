"""Train the playground's teacher: a genuine Wan text-to-video pipeline, small enough for a laptop.

Three stages, all resumable: the autoencoder learns the world's clips; it is refined in small batches without its
latents moving far; the text encoder and the denoiser learn together to denoise these by flow matching (Lipman et al.
2023, arXiv:2210.02747). With a teacher to start from, the first stage is left out; the others go on from its weights.

The world draws as many clips as training wants, so nothing is seen twice unless the pool of encoded clips wraps around.
Batch i depends on the seed and i alone: a killed training goes on from its last checkpoint as if nothing had happened.
"""

import copy
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from accvideo.playground import world
from accvideo.playground.config import TrainConfig
from accvideo.playground.networks import (
    LATENT_CHANNELS,
    MAX_TOKENS,
    build_denoiser,
    build_text_encoder,
    build_tokenizer,
    build_vae,
    encode_prompts,
    load_start,
    save_teacher,
)
from accvideo.playground.remake import NUM_STEPS, load_remaker, remade
from accvideo.playground.updates import Graphed, adamw, minimize, move_averages, muon, schedule, set_learning_rate
from accvideo.training.recipe import fast_precision
from accvideo.training.start import arithmetic
from accvideo.trajectory import write_whole
from accvideo.types import UserError

_BATCHES_DRAWN = 16
"""Batches of the autoencoder that are drawn at once."""

_BATCHES_MEASURED = 8
"""Batches of 64 clips over which the mean and deviation of the latents are taken."""


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
    optimizer = adamw(list(vae.parameters()))

    def update(clips: Tensor, weight: Tensor, noise: Tensor) -> dict[str, Tensor]:
        posterior = vae.encode(clips).latent_dist  # type: ignore[union-attr]
        error = vae.decode(posterior.mean + posterior.std * noise).sample - clips  # type: ignore[union-attr]
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        minimize(pixel_loss(error, weight) + config.kl_weight * kl, optimizer)
        return {"psnr_db": psnr(error), "kl_nats": kl.detach()}

    run_update = Graphed(update, optimizer)

    @lru_cache(maxsize=1)
    def draw_batches(block: int) -> tuple[Tensor, Tensor]:
        generator = _generator(config.seed, "vae", block, device)
        clips, weight = draw_weighted(world.random_scenes(_BATCHES_DRAWN * config.vae_batch_size, generator))
        return clips.unflatten(0, (_BATCHES_DRAWN, -1)), weight.unflatten(0, (_BATCHES_DRAWN, -1))

    def iterate(iteration: int) -> dict[str, Tensor]:
        set_learning_rate(optimizer, config.vae_learning_rate * schedule(iteration, config.vae_iterations))
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
    optimizer = muon(matrices, others)
    checkpoint = _Checkpoint(config.out / "denoiser", modules, optimizer, averages)
    pool = _Pool(config, vae, tokenizer, device)
    if device.type == "cuda":
        denoiser.compile_repeated_blocks(fullgraph=True, dynamic=False)

    def update(latents: Tensor, noise: Tensor, sigma: Tensor, tokens: Tensor, *, length: int) -> dict[str, Tensor]:
        with _arithmetic(device):
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
    run_update = [Graphed(partial(update, length=length), optimizer) for length in (MAX_TOKENS, 512)]

    def iterate(iteration: int) -> dict[str, Tensor]:
        pool.refresh(iteration)
        set_learning_rate(optimizer, config.denoiser_learning_rate * schedule(iteration, config.denoiser_iterations))
        generator = _generator(config.seed, "denoiser", iteration, device)
        latents, tokens = pool.sample(config.denoiser_batch_size, generator)
        dropped = torch.rand(len(tokens), 1, generator=generator, device=device) < config.caption_dropout
        noise = torch.randn(latents.shape, generator=generator, device=device)
        uniform = torch.rand(len(latents), generator=generator, device=device)
        sigma = config.train_shift * uniform / (1 + (config.train_shift - 1) * uniform)
        tokens = torch.where(dropped, pool.empty_caption, tokens)
        metrics = run_update[iteration % 8 == 7](latents, noise, sigma, tokens)
        move_averages(averaged, weights, min(config.ema_decay, (1 + iteration) / (10 + iteration)))
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
    optimizer = muon([w for w in weights if w.ndim >= 4], [w for w in weights if w.ndim < 4])
    checkpoint = _Checkpoint(config.out / "refined", {"vae": vae}, optimizer, averages)
    mean, std = (
        torch.tensor(vae.config[name], device=device).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    remaker = None if config.refine_by is None else load_remaker(config.refine_by, vae, device)

    def update(clips: Tensor, weight: Tensor, error: Tensor) -> dict[str, Tensor]:
        with _arithmetic(device):
            with torch.no_grad():
                held = old.encode(clips).latent_dist.mean.float()
            latents = vae.encode(clips).latent_dist.mean.float()  # type: ignore[union-attr]
            decoded = vae.decode(latents + std * error).sample  # type: ignore[union-attr]
        missed, moved = decoded.float() - clips, ((latents - held) / std).square().mean()
        optimizer.zero_grad()
        (pixel_loss(missed, weight) + config.refine_hold * moved).backward()
        optimizer.step()
        return {"psnr_db": psnr(missed), "moved": moved.detach().sqrt()}

    run_update = Graphed(update, optimizer)

    def iterate(iteration: int) -> dict[str, Tensor]:
        set_learning_rate(optimizer, config.refine_learning_rate * schedule(iteration, config.refine_iterations))
        generator = _generator(config.seed, "refine", iteration, device)
        scenes = hard_scenes(config.refine_batch_size, generator)
        clips, weight = draw_weighted(scenes)
        noise = torch.randn(len(clips), LATENT_CHANNELS, 5, 4, 4, generator=generator, device=device)
        amount = config.refine_noise * torch.rand(len(clips), 1, 1, 1, 1, generator=generator, device=device)
        error = amount * noise
        if remaker is not None and (num_steps := NUM_STEPS[iteration % len(NUM_STEPS)]) > 0:
            with torch.no_grad(), _arithmetic(device):
                latents = (old.encode(clips).latent_dist.mean.float() - mean) / std
                error = remade(remaker, latents, world.captions_of(scenes.requests), noise, num_steps) - latents
        metrics = run_update(clips, weight, error)
        move_averages(averaged, weights, min(0.997, (1 + iteration) / (10 + iteration)))
        return metrics

    _loop("refinement", config.refine_iterations, config.save_every, checkpoint, iterate)
    with torch.no_grad():
        for weight, average in zip(weights, averaged, strict=True):
            weight.copy_(average)
    vae.eval().requires_grad_(False)


def _arithmetic(device: torch.device) -> AbstractContextManager[None]:
    """A context in which networks compute in bfloat16, where the hardware has it."""
    return arithmetic(device.type, fast_precision(device.type))


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pixels in [-1, 1], in dB."""
    return 10 * torch.log10(4 / error.detach().square().mean())


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
        with _arithmetic(self.device):
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


def _generator(seed: int, purpose: str, index: int, device: torch.device) -> torch.Generator:
    """A generator of its own for each purpose and iteration, so that nothing has to be saved to resume."""
    mixed = sum(ord(letter) * 31**i for i, letter in enumerate(purpose))
    return torch.Generator(device).manual_seed((seed * 1_000_003 + mixed) * 2**24 % 2**62 + index)
