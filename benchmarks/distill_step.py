"""Time of a distillation step against the same step written by hand in bare torch.

    python benchmarks/distill_step.py [--lora] [--bfloat16] [--threads 1] [--batch-size 16] [--rounds 5]

The model is the playground's size: a Wan denoiser of width 192 with 8 blocks, states [48, 5, 4, 4], random weights.
Both sides are timed in turns, a sweep of five key points each; the medians are compared. One JSON object on stdout.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

from accvideo.call import DenoiserCall
from accvideo.discriminator import Head
from accvideo.distill import DistillConfig, start_training, train
from accvideo.flow import shifted_sigmas
from accvideo.trajectory import TrajectoryBatch

SIGMAS = shifted_sigmas(5, shift=5)
RANK = 16


def denoiser() -> WanTransformer3DModel:
    """The playground's size."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=48,
        out_channels=48,
        text_dim=64,
        freq_dim=64,
        ffn_dim=768,
        num_layers=8,
    ).eval()


def make_batch(batch_size: int) -> TrajectoryBatch:
    """Random states and prompts of 32 tokens."""
    text = torch.randn(batch_size, 32, 64)
    calls = tuple(
        DenoiserCall(
            {"timestep": (1000 * sigma).expand(batch_size), "encoder_hidden_states": text}, {"return_dict": False}
        )
        for sigma in SIGMAS[:-1]
    )
    states = torch.randn(batch_size, 6, 48, 5, 4, 4)
    return TrajectoryBatch(states, calls, ("transformer",) * 5, ("",) * batch_size, tuple(range(batch_size)))


def ours(batch: TrajectoryBatch, lora: bool, bfloat16: bool) -> Callable[[], None]:
    """A function that runs one sweep of `accvideo.distill.train`."""
    config = DistillConfig(
        data=Path(), out=Path(), full=not lora, lora_rank=RANK, num_iterations=10**9, device="cpu",
        precision="bfloat16" if bfloat16 else "float32", update="alternating",
    )  # fmt: skip
    training = start_training(config, {"transformer": denoiser()}, SIGMAS, batch)

    def batches(start: int) -> Iterator[TrajectoryBatch]:
        while True:
            yield batch

    def sweep() -> None:
        class Done(Exception):
            pass

        def log(line: dict[str, Any]) -> None:
            if line["keypoint"] == 4:
                training.iteration += 1
                raise Done

        try:
            train(config, training, SIGMAS, batches, log=log)
        except Done:
            pass

    return sweep


def bare(batch: TrajectoryBatch, lora: bool, bfloat16: bool) -> Callable[[], None]:
    """The same sweep by hand: a LoRA student with a frozen teacher beside it, hooks for features, two optimizers."""
    student, teacher = denoiser(), denoiser().requires_grad_(False)
    if lora:
        student.requires_grad_(False)
        targets = sorted({n for n, m in student.blocks[0].named_modules() if isinstance(m, nn.Linear)})
        student.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    heads = nn.ModuleList(Head(192) for _ in range(5))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=True)
    head_optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-4, weight_decay=0, fused=True)
    text, timesteps = batch.calls[0].tensors["encoder_hidden_states"], [*(1000 * SIGMAS)]
    autocast: Callable[[], AbstractContextManager] = partial(torch.autocast, "cpu", torch.bfloat16, enabled=bfloat16)

    def velocity(latents: Tensor, k: int) -> Tensor:
        with autocast():
            return student(latents, timesteps[k].expand(len(latents)), text, return_dict=False)[0].float()

    def features(latents: Tensor, k: int) -> Tensor:
        """The first blocks of the teacher, inlined."""
        with autocast():
            timestep = timesteps[k].expand(len(latents))
            rotary = teacher.rope(latents)
            hidden = teacher.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
            _, projection, encoded, _ = teacher.condition_embedder(timestep, text, None)
            projection = projection.unflatten(1, (6, -1))
            for block in teacher.blocks[: 8 if k < 5 else 5]:
                hidden = block(hidden, encoded, projection, rotary)
        return hidden.float()

    def logits(hidden: Tensor, k: int) -> Tensor:
        return heads[k](hidden.reshape(-1, 4, 4, 192).permute(0, 3, 1, 2)).reshape(len(hidden), -1)

    def sweep() -> None:
        latents = torch.randn(len(batch.states), 48, 5, 4, 4)
        for k in range(5):
            gap = float(SIGMAS[k + 1] - SIGMAS[k])
            state, following = batch.states[:, k], batch.states[:, k + 1]
            mse_loss(velocity(state, k), (following - state) / gap).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

            fake = latents + gap * velocity(latents, k)
            fake_features = features(fake, k + 1)
            heads.requires_grad_(False)
            (0.1 * softplus(-logits(fake_features, k)).mean()).backward()
            heads.requires_grad_(True)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

            with torch.no_grad():
                real_features = features(following, k + 1)
            real, false = logits(torch.cat([real_features, fake_features.detach()]), k).chunk(2)
            (0.1 * (softplus(-real).mean() + softplus(false).mean())).backward()
            torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
            head_optimizer.step()
            head_optimizer.zero_grad()
            latents = fake.detach()

    return sweep


def main() -> None:
    """Time both in turns and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batch = make_batch(arguments.batch_size)
    sweeps = {side.__name__: side(batch, arguments.lora, arguments.bfloat16) for side in (ours, bare)}
    seconds: dict[str, list[float]] = {name: [] for name in sweeps}
    for name, sweep in [*sweeps.items()] * (arguments.rounds + 1):
        began = time.process_time()
        sweep()
        seconds[name].append((time.process_time() - began) / 5)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first warms up
    result = {**vars(arguments), "cpu_seconds_a_step": medians, "overhead": medians["ours"] / medians["bare"] - 1}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
