"""Speed and memory at true size with random weights, beside what `accvideo plan` says.

    python benchmarks/true_size.py --out true_size.json [--gpu h100] [--size tiny] [--only generate|distill]

Two questions: how long a teacher of 50 steps and a student of 5 take for a video, denoising and end to end (Wan 1.3B at
480x832x81 and HunyuanVideo 13B at 544x960x93), and what a LoRA distillation step of HunyuanVideo 13B and Wan 14B takes
of one GPU's memory. `--size tiny` tries the script on any machine. On an H100 it takes about ten minutes.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from accvideo.call import DenoiserCall, replay
from accvideo.distill import DistillConfig, start_training, train
from accvideo.flow import euler_step, shifted_sigmas
from accvideo.plan import (
    GPUS,
    Gpu,
    PlanConfig,
    call_cost,
    count_parameters,
    count_video,
    denoiser_seconds,
    distilling_bytes,
    training_cost,
    video_seconds,
    whole,
)
from accvideo.planning.networks import Network
from accvideo.presets import PRESETS, Preset, find_preset
from accvideo.trajectory import TrajectoryBatch

GENERATED = ("wan21-t2v-1.3b", "hunyuan-544p")
DISTILLED = ("hunyuan-544p", "wan21-t2v-14b")
RANK = 16
TINY = {"num_layers": 2, "num_single_layers": 2, "num_hidden_layers": 2, "vocab_size": 1000, "pad_token_id": 0}


def tiny(preset: Preset) -> Preset:
    """The preset with shallow networks, and a clip of 64x64 pixels and 5 frames."""

    def shallow(network: Network, **changes: Any) -> Network:
        return replace(
            network, config=network.config | {n: v for n, v in TINY.items() if n in network.config} | changes
        )

    return replace(
        preset,
        height=64,
        width=64,
        num_frames=5,
        denoiser=shallow(preset.denoiser, num_attention_heads=2),
        text_encoders=tuple(map(shallow, preset.text_encoders)),
    )


def filled(call: DenoiserCall, device: str) -> DenoiserCall:
    """The call with random values."""

    def fill(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("mask"):  # all of a prompt's tokens count
            return torch.ones(tensor.shape, dtype=tensor.dtype, device=device)
        return torch.rand(tensor.shape, device=device).to(tensor.dtype)

    return replace(call, tensors={name: fill(name, tensor) for name, tensor in call.tensors.items()})


def clock(device: str, work: Callable[[], Any]) -> float:
    """Seconds of a piece of work, the device's queue drained."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def peak_bytes(device: str) -> int:
    """Peak memory of tensors on a GPU since the last reset; of the process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget(device: str) -> None:
    """Free what is no longer used and start the peak anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def build(network: Network, device: str) -> Any:
    """The network with random bfloat16 weights, made as such: float32 ones of 13 B would take 52 GB on the way."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return network.build(device)
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def seconds_of_encoding(preset: Preset, device: str) -> float:
    """Seconds of all text encoders, for the prompt and the one that guidance takes."""
    total = 0.0
    for encoder in preset.text_encoders:
        network, length = build(encoder, device), 77 if "CLIP" in encoder.class_name else preset.num_text_tokens
        run = partial(network, torch.randint(0, 100, (1, length), device=device))
        run()
        total += clock(device, run) * (1 if preset.guidance == "embedded" else 2)
    return total


@torch.no_grad()
def seconds_of_denoising(preset: Preset, num_calls: dict[str, int], device: str) -> dict[str, float]:
    """Seconds of each number of calls, with a step of the solver after each."""
    call, denoiser = filled(preset.call(), device), build(preset.denoiser, device)
    latents = torch.randn(1, *preset.state_shape, device=device)

    def denoise(number: int) -> None:
        state, sigmas = latents, shifted_sigmas(number, preset.shift or 1.0).tolist()
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            state = euler_step(state, replay(denoiser, call, state), sigma, following)

    denoise(1)  # the first call chooses kernels
    return {name: clock(device, partial(denoise, number)) for name, number in num_calls.items()}


@torch.no_grad()
def seconds_of_decoding(preset: Preset, device: str) -> float:
    """Seconds of the VAE's way to frames."""
    vae = build(preset.vae, device)
    if preset.vae_tiling:
        vae.enable_tiling()
    latents = torch.randn(1, *preset.latent_shape, device=device).to(torch.bfloat16)
    return clock(device, partial(vae.decode, latents, return_dict=False))


def generate(preset: Preset, num_student_steps: int, device: str, gpu: Gpu) -> dict[str, Any]:
    """Seconds of the parts of a video by the teacher and by a student, measured and planned."""
    num_calls = {"teacher": preset.num_steps * preset.calls_per_step, "student": num_student_steps}
    encoding = seconds_of_encoding(preset, device)
    forget(device)
    denoising = seconds_of_denoising(preset, num_calls, device)
    peaks = {"denoising": peak_bytes(device)}
    forget(device)
    decoding = seconds_of_decoding(preset, device)
    peaks["decoding"] = peak_bytes(device)
    forget(device)

    costs = count_video(preset)
    seconds = {
        "measured": {
            name: {"encoding": encoding, "denoising": denoising[name], "decoding": decoding} for name in num_calls
        },
        "planned": {
            name: asdict(video_seconds(preset, costs, GPUS[gpu], number)) for name, number in num_calls.items()
        },
    }
    speedup = {
        kind: {
            "denoising": parts["teacher"]["denoising"] / parts["student"]["denoising"],
            "end_to_end": sum(parts["teacher"].values()) / sum(parts["student"].values()),
        }
        for kind, parts in seconds.items()
    }
    return {"denoiser_calls": num_calls, "seconds": seconds, "speedup": speedup, "peak_bytes_measured": peaks}


def distill(preset: Preset, device: str, gpu: Gpu) -> dict[str, Any]:
    """Peak memory and seconds of iterations of LoRA distillation on one clip, measured and planned."""
    num_steps, call = preset.num_student_steps, filled(preset.call(), device)
    states = torch.randn(1, num_steps + 1, *preset.state_shape, device=device)
    batch = TrajectoryBatch(states, (call,) * num_steps, ("transformer",) * num_steps, ("",), (0,))
    config = DistillConfig(
        data="", out=Path(), num_iterations=3, batch_size=1, lora_rank=RANK, num_validation=0,
        feature_layers=preset.feature_layers, gradient_checkpointing=True, device=device, precision="bfloat16",
    )  # fmt: skip
    sigmas = shifted_sigmas(num_steps, preset.shift or 1.0)
    training = start_training(config, {"transformer": build(preset.denoiser, device)}, sigmas, [batch])

    def batches(start: int) -> Iterator[TrajectoryBatch]:
        while True:
            yield batch

    seconds: list[float] = []
    train(config, training, sigmas, batches, log=lambda line: seconds.append(line["seconds"]))
    peak = peak_bytes(device)
    del training
    forget(device)

    sizes, cost = count_parameters(preset), whole(preset, partial(training_cost, preset))
    plan = PlanConfig(preset="hunyuan-544p", num_gpus=1, lora_rank=RANK)  # of the preset's name nothing is used
    lora = replace(cost, matmul=cost.matmul - 2 * whole(preset, partial(call_cost, preset)).matmul)
    return {
        "peak_bytes": {"measured": peak, "planned": distilling_bytes(sizes, cost, plan, "bfloat16")["one_gpu"]},
        "seconds_an_iteration": {"measured": seconds[1:], "planned": denoiser_seconds(lora, GPUS[gpu])},
    }


def main() -> None:
    """Run what was asked for, print the results and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="what the plan is asked for")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--only", choices=("generate", "distill"))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, help="instead of the two of each part")
    parser.add_argument("--num-student-steps", type=int, default=5)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and arguments.size == "full":
        sys.exit("no GPU was found: true size takes one; try --size tiny")
    torch.manual_seed(0)

    def sized(name: str) -> Preset:
        return find_preset(name) if arguments.size == "full" else tiny(find_preset(name))

    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "size": arguments.size,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "generate": {},
        "distill": {},
    }
    parts = (
        ("generate", GENERATED, lambda preset: generate(preset, arguments.num_student_steps, device, arguments.gpu)),
        ("distill", DISTILLED, lambda preset: distill(preset, device, arguments.gpu)),
    )
    for part, names, work in parts:
        for name in () if arguments.only not in (None, part) else arguments.presets or names:
            forget(device)
            result[part][name] = work(sized(name))
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")  # a run that is cut short keeps what it has
    print(json.dumps(result))


if __name__ == "__main__":
    main()
