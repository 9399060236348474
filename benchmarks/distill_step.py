"""Time and memory of a distillation step against bare torch.

    python benchmarks/distill_step.py [--size playground|9m] [--against step|regression] [--memory] [--full] ...

`--against step`: the whole alternating step (trajectory loss, rollout, generator and head updates) written by hand.
`--against regression`: a full-weight regression step alone, written by hand; the ratio is what the rest costs.
`--parts`: the parts of such steps one by one, in CPU seconds and floating-point operations: where the time goes, and
the least that any implementation takes.

Models have random weights: `playground` is the embedded teacher's size (width 192, 8 blocks, 80 tokens), `9m` a Wan of
9 million parameters (width 256, 8 heads, 8 blocks, feed-forward 1024) on 480 tokens, with a text of 32x128. All sides
are timed in turns, a sweep of the five key points each; medians of CPU seconds a step are compared. With `--memory`
each side runs in a process of its own instead, and peaks are compared. One JSON object on stdout.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss, softplus
from torch.utils.flop_counter import FlopCounterMode

RANK = 16
_UNIFORM = torch.linspace(1, 0, 6)
SIGMAS = 5 * _UNIFORM / (1 + 4 * _UNIFORM)  # of 5 steps, at shift 5

SIZES: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, int]]] = {
    "playground": (
        {
            "patch_size": (1, 1, 1), "num_attention_heads": 6, "attention_head_dim": 32, "in_channels": 48,
            "out_channels": 48, "text_dim": 64, "freq_dim": 64, "ffn_dim": 768, "num_layers": 8,
        },
        (48, 5, 4, 4),
        (32, 64),
    ),
    "9m": (
        {
            "patch_size": (1, 2, 2), "num_attention_heads": 8, "attention_head_dim": 32, "in_channels": 16,
            "out_channels": 16, "text_dim": 128, "freq_dim": 256, "ffn_dim": 1024, "num_layers": 8,
        },
        (16, 5, 16, 24),
        (32, 128),
    ),
}  # fmt: skip
"""Configuration of the denoiser, shape of the state, and of the text, by the name of the size."""

Sweep = Callable[[], None]


class Setting:
    """What every side computes on."""

    def __init__(self, size: str, batch_size: int, bfloat16: bool) -> None:
        self.model, state, text = SIZES[size]
        torch.manual_seed(1)
        self.states = torch.randn(batch_size, 6, *state)
        self.text = torch.randn(batch_size, *text)
        self.autocast: Callable[[], AbstractContextManager] = partial(
            torch.autocast, "cpu", torch.bfloat16, enabled=bfloat16
        )
        self.precision = "bfloat16" if bfloat16 else "float32"

    def denoiser(self) -> WanTransformer3DModel:
        """With the same random weights each time."""
        torch.manual_seed(0)
        return WanTransformer3DModel(**self.model).eval()


def begin(setting: Setting, **settings: Any) -> tuple[Any, Any, Any]:
    """Configuration, training and batch of accvideo; settings are those of `accvideo distill`."""
    from accvideo.call import DenoiserCall
    from accvideo.distill import DistillConfig, start_training
    from accvideo.trajectory import TrajectoryBatch

    size = len(setting.states)
    calls = tuple(
        DenoiserCall(
            {"timestep": (1000 * sigma).expand(size), "encoder_hidden_states": setting.text}, {"return_dict": False}
        )
        for sigma in SIGMAS[:-1]
    )
    batch = TrajectoryBatch(setting.states, calls, ("transformer",) * 5, ("",) * size, tuple(range(size)))
    config = DistillConfig(
        data="", out=Path(), num_iterations=10**9, save_every=10**9, device="cpu", precision=setting.precision,
        lora_rank=RANK, adversarial_start=0, **settings,
    )  # fmt: skip
    return config, start_training(config, {"transformer": setting.denoiser()}, SIGMAS, [batch]), batch


def ours(setting: Setting, **settings: Any) -> Sweep:
    """One sweep of `accvideo.distill.train`; settings are those of `accvideo distill`."""
    from accvideo.distill import train
    from accvideo.trajectory import TrajectoryBatch

    config, training, batch = begin(setting, **settings)

    def batches(start: int) -> Iterator[TrajectoryBatch]:
        while True:
            yield batch

    class Swept(Exception):  # noqa: N818 - a way out of the endless loop
        pass

    def log(line: dict[str, Any]) -> None:
        if line["keypoint"] == 4:
            training.iteration += 1
            raise Swept

    def sweep() -> None:
        try:
            train(config, training, SIGMAS, batches, log=log)
        except Swept:
            pass

    return sweep


def regression(setting: Setting) -> Sweep:
    """Five full-weight regression steps by hand: mean velocity, clipping, AdamW."""
    student = setting.denoiser()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0, fused=True)

    def sweep() -> None:
        for k in range(5):
            state, following = setting.states[:, k], setting.states[:, k + 1]
            with setting.autocast():
                timestep = (1000 * SIGMAS[k]).expand(len(state))
                velocity = student(state, timestep, setting.text, return_dict=False)[0].float()
            mse_loss(velocity, (following - state) / float(SIGMAS[k + 1] - SIGMAS[k])).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return sweep


def by_hand(setting: Setting, full: bool) -> Sweep:
    """The alternating step by hand: a student with a frozen teacher beside it, its blocks inlined, two optimizers."""
    from peft import LoraConfig

    from accvideo.discriminator import Head

    student, teacher = setting.denoiser(), setting.denoiser().requires_grad_(False)
    if not full:
        student.requires_grad_(False)
        targets = sorted({n for n, m in student.blocks[0].named_modules() if isinstance(m, nn.Linear)})
        student.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    width = teacher.config["num_attention_heads"] * teacher.config["attention_head_dim"]
    heads = nn.ModuleList(Head(width) for _ in range(5))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=True)
    head_optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-4, weight_decay=0, fused=True)
    timesteps = [*(1000 * SIGMAS)]
    frames, *rows = (n // p for n, p in zip(setting.states.shape[3:], teacher.config["patch_size"], strict=True))

    def velocity(latents: Tensor, k: int) -> Tensor:
        with setting.autocast():
            return student(latents, timesteps[k].expand(len(latents)), setting.text, return_dict=False)[0].float()

    def features(latents: Tensor, k: int) -> Tensor:
        """The first blocks of the teacher, inlined."""
        with setting.autocast():
            timestep = timesteps[k].expand(len(latents))
            rotary = teacher.rope(latents)
            hidden = teacher.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
            _, projection, encoded, _ = teacher.condition_embedder(timestep, setting.text, None)
            projection = projection.unflatten(1, (6, -1))
            for block in teacher.blocks[: 8 if k < 5 else 5]:
                hidden = block(hidden, encoded, projection, rotary)
        return hidden.float()

    def logits(hidden: Tensor, k: int) -> Tensor:
        return heads[k](hidden.reshape(-1, *rows, width).permute(0, 3, 1, 2)).reshape(len(hidden), -1)

    def sweep() -> None:
        latents = torch.randn_like(setting.states[:, 0])
        for k in range(5):
            gap = float(SIGMAS[k + 1] - SIGMAS[k])
            state, following = setting.states[:, k], setting.states[:, k + 1]
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


Part = Callable[[str], AbstractContextManager[None]]


def dissect(setting: Setting, **settings: Any) -> Callable[[Part], None]:
    """A sweep that runs each part of a bare and of a distillation step in a context called by the part's name."""
    _, training, batch = begin(setting, **settings)
    student, discriminator = training.student, training.discriminator
    optimizer, head_optimizer = training.student_optimizer, training.head_optimizer
    trained, heads = list(student.trained().values()), list(discriminator.heads.parameters())
    bare = setting.denoiser()
    bare_optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-4, weight_decay=0, fused=True)

    def update(parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def sweep(part: Part) -> None:
        for k in range(5):
            state, following = setting.states[:, k], setting.states[:, k + 1]
            with part("bare forward"), setting.autocast():
                loss = bare(state, (1000 * SIGMAS[k]).expand(len(state)), setting.text, return_dict=False)[0].square()
            with part("bare backward"):
                loss.mean().backward()
            with part("bare update"):
                update(list(bare.parameters()), bare_optimizer)
            with part("student forward"):
                loss = student.velocity("transformer", batch.calls[k], state).square()
            with part("student backward"):
                loss.mean().backward(inputs=trained)
            with part("student update"):
                update(trained, optimizer)
            latents = following.clone().requires_grad_()
            with part("features forward"):
                fake = discriminator.features(latents, batch, k)
            with part("features backward"):
                fake.square().mean().backward(inputs=[latents])
            with part("features of records"), torch.no_grad():
                real = discriminator.features(following, batch, k)
            fake = fake.detach().requires_grad_()
            with part("heads"):
                softplus(-discriminator.logits(fake, k)).mean().backward(inputs=[fake])
                real_logits, fake_logits = discriminator.logits(torch.cat([real, fake.detach()]), k).chunk(2)
                (softplus(-real_logits).mean() + softplus(fake_logits).mean()).backward(inputs=heads)
                update(heads, head_optimizer)

    return sweep


def measure_parts(sweep: Callable[[Part], None], num_rounds: int) -> dict[str, dict[str, float]]:
    """CPU seconds (medians of sweeps, after one to warm up) and operations in units of 1e9 of each part, for a step."""
    seconds, operations = [dict[str, float]() for _ in range(num_rounds + 1)], dict[str, float]()

    @contextmanager
    def clock(record: dict[str, float], name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        record[name] = record.get(name, 0.0) + (time.process_time() - began) / 5

    @contextmanager
    def count(name: str) -> Iterator[None]:
        # The counter does not know the fused attention of a CPU; the backward pass of plain products has 4 of them.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            yield
        operations[name] = operations.get(name, 0.0) + counter.get_total_flops() / 5e9

    for record in seconds:
        sweep(partial(clock, record))
    sweep(count)
    return {
        name: {"seconds": statistics.median(each[name] for each in seconds[1:]), "operations": operations[name]}
        for name in operations
    }


def distill_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of `accvideo distill` that the command line sets."""
    return {
        "full": arguments.full,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "compile": arguments.compile,
        "feature_layers": tuple(arguments.feature_layers) if arguments.feature_layers else None,
    }


def sides(arguments: argparse.Namespace) -> dict[str, Callable[[Setting], Sweep]]:
    """What is compared, by name; the bare one comes last."""
    settings = distill_settings(arguments)
    mine = {update: partial(ours, update=update, **settings) for update in arguments.updates}
    bare = {"step": partial(by_hand, full=arguments.full), "regression": regression}[arguments.against]
    return {**mine, "bare": bare}


def cpu_seconds(sweeps: dict[str, Sweep], num_rounds: int) -> dict[str, float]:
    """Median CPU seconds of a step of each; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sweeps}
    for name, sweep in [*sweeps.items()] * (num_rounds + 1):
        began = time.process_time()
        sweep()
        seconds[name].append((time.process_time() - began) / 5)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def peak_megabytes(name: str) -> float:
    """Peak memory of a process that runs this very command for one side alone."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure all sides and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="playground")
    parser.add_argument("--against", choices=("step", "regression"), default="step")
    parser.add_argument("--updates", nargs="+", default=["alternating"], help="values of --update of accvideo distill")
    parser.add_argument("--full", action="store_true", help="train full weights instead of a LoRA of rank 16")
    parser.add_argument("--feature-layers", nargs=2, type=int, help="as of accvideo distill")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="accvideo's side alone, as of accvideo distill")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--parts", action="store_true", help="measure the parts of a step")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting, compared = Setting(arguments.size, arguments.batch_size, arguments.bfloat16), sides(arguments)
    if arguments.parts:
        parts = measure_parts(dissect(setting, **distill_settings(arguments)), arguments.rounds)
        print(json.dumps({**vars(arguments), "parts": parts}))
        return
    if arguments.only:
        sweep = compared[arguments.only](setting)
        for _ in range(arguments.rounds):
            sweep()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    if arguments.memory:
        measured, quantity = {name: peak_megabytes(name) for name in compared}, "peak_megabytes"
    else:
        sweeps = {name: side(setting) for name, side in compared.items()}
        measured, quantity = cpu_seconds(sweeps, arguments.rounds), "cpu_seconds_a_step"
    ratios = {name: value / measured["bare"] for name, value in measured.items() if name != "bare"}
    print(json.dumps({**vars(arguments), quantity: measured, "ratio": ratios}))


if __name__ == "__main__":
    main()
