"""Speed and memory at true size with random weights, beside what `accvideo plan` says.

    python benchmarks/true_size.py --out true_size.json [--gpu h100] [--size tiny] [--only generate|record|distill]

Three questions: how long a teacher of 50 steps and a student of 5 take for a video, denoising and end to end (Wan 1.3B
at 480x832x81 and HunyuanVideo 13B at 544x960x93); how many trajectories of Wan 1.3B an hour the recorder records; and
what a LoRA distillation step of Wan 1.3B, HunyuanVideo 13B and Wan 14B takes of time and of one GPU's memory. For
recording and distilling, the share of time outside the denoiser is told: see `denoiser_clock`. `--size tiny` tries the
script on any machine. The teacher to record is saved first: 14 GB of random weights.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

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
from accvideo.playground.networks import build_tokenizer
from accvideo.presets import PRESETS, Preset, find_preset, record_defaults
from accvideo.record import Recorder
from accvideo.recording.workers import Place
from accvideo.teacher import denoisers
from accvideo.trajectory import TrajectoryBatch

GENERATED = ("wan21-t2v-1.3b", "hunyuan-544p")
RECORDED = ("wan21-t2v-1.3b",)
DISTILLED = ("wan21-t2v-1.3b", "hunyuan-544p", "wan21-t2v-14b")
RANK = 16
NUM_ITERATIONS = 6  # the first is not counted
PROMPT = "a red star spins on a plain navy background and a blue circle moves left"
TINY = {
    "num_layers": 2, "num_single_layers": 2, "num_hidden_layers": 2, "vocab_size": 1000, "pad_token_id": 0,
    "d_ff": 64, "num_heads": 2, "ffn_dim": 512,
}  # fmt: skip
TINY_VAES = {
    "AutoencoderKLWan": {"base_dim": 8},
    "AutoencoderKLHunyuanVideo": {"block_out_channels": (32, 32, 32, 32)},
}


def tiny(preset: Preset) -> Preset:
    """The preset with shallow networks, a clip of 64x64 pixels and 5 frames, and prompts of 16 tokens."""

    def shallow(network: Network, **changes: Any) -> Network:
        return replace(
            network, config=network.config | {n: v for n, v in TINY.items() if n in network.config} | changes
        )

    return replace(
        preset,
        height=64,
        width=64,
        num_frames=5,
        num_text_tokens=16,
        denoiser=shallow(preset.denoiser, num_attention_heads=2),
        vae=preset.vae.but(**TINY_VAES.get(preset.vae.class_name, {})),
        text_encoders=tuple(map(shallow, preset.text_encoders)),
    )


def filled(call: DenoiserCall, device: str) -> DenoiserCall:
    """The call with random values."""

    def fill(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("mask"):  # all of a prompt's tokens count
            return torch.ones(tensor.shape, dtype=tensor.dtype, device=device)
        return torch.rand(tensor.shape, device=device).to(tensor.dtype)

    return replace(call, tensors={name: fill(name, tensor) for name, tensor in call.tensors.items()})


def drain(device: str) -> None:
    """Wait for all work in the device's queue."""
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str, work: Callable[[], Any]) -> float:
    """Seconds of a piece of work, the device's queue drained."""
    drain(device)
    began = time.perf_counter()
    work()
    drain(device)
    return time.perf_counter() - began


@dataclass
class Spent:
    """Time inside denoisers."""

    seconds: float = 0.0
    reached: bool = False
    """Whether the backward pass under way has come to a denoiser's weights."""
    is_inside: bool = False


@contextmanager
def denoiser_clock(networks: Sequence[nn.Module], device: str) -> Iterator[Spent]:
    """Measures the seconds of the clock inside denoisers; the device's queue is drained before and after each call.

    Inside are the forward passes of the networks, also those that end at some block for its features, and the backward
    passes that reach their trained weights, as a whole: those of the losses and of the heads on the way are in them.
    Outside is all else. In recording: text encoders, guidance, the solver, what is watched and copied to the host, and
    what of encoding, checking and writing a trajectory does not overlap with denoising. In distilling: losses, forward
    and own backward passes of the heads, noise and rollouts, gradient norms, optimizers. Reading trajectories and
    writing checkpoints are in neither: `benchmarks/reading.py` has the first.

    Args:
        networks: the denoisers, a LoRA's teacher being its student; those that train have one weight at least.
        device: torch device.
    """
    spent = Spent()

    def timed(run: Callable[..., Any], counts: Callable[[], bool]) -> Callable[..., Any]:
        @wraps(run)
        def timed_run(*args: Any, **kwargs: Any) -> Any:
            if spent.is_inside:
                return run(*args, **kwargs)
            drain(device)
            spent.is_inside, spent.reached, began = True, False, time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                drain(device)
                spent.is_inside = False
                spent.seconds += (time.perf_counter() - began) * counts()

        return timed_run

    def reach(gradient: Tensor) -> None:
        spent.reached = True

    backward: Any = torch.autograd.backward
    with ExitStack() as undo:
        for network in networks:
            network.forward = timed(network.forward, lambda: True)
            undo.callback(vars(network).pop, "forward")
            for weight in [each for each in network.parameters() if each.requires_grad][:1]:
                undo.callback(weight.register_hook(reach).remove)
        undo.callback(setattr, torch.autograd, "backward", backward)
        torch.autograd.backward = timed(backward, lambda: spent.reached)
        yield spent


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


def save_random_teacher(preset: Preset, device: str, folder: Path) -> None:
    """Save Wan's pipeline with random weights, text encoder and VAE included, as `accvideo record` takes it."""
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=preset.shift or 1.0
    )
    pipeline: Any = diffusers.WanPipeline(
        tokenizer=build_tokenizer(),  # type: ignore[arg-type]
        text_encoder=build(preset.text_encoders[0], device),
        vae=build(preset.vae, device),
        scheduler=scheduler,  # type: ignore[arg-type]
        transformer=build(preset.denoiser, device),
    )
    pipeline.save_pretrained(folder)


def record(
    preset: Preset, num_steps: int | None, num_trajectories: int, folder: Path, device: str, gpu: Gpu
) -> dict[str, Any]:
    """Trajectories an hour that the recorder records into a folder, the first not counted, measured and planned."""
    save_random_teacher(preset, device, folder / "teacher")
    forget(device)
    (folder / "prompts.txt").write_text(PROMPT)
    pipeline_args = preset.pipeline_args | {"max_sequence_length": preset.num_text_tokens}
    config = replace(
        record_defaults(replace(preset, pipeline_args=pipeline_args)),
        teacher=str(folder / "teacher"),
        prompts=folder / "prompts.txt",
        out=folder / "trajectories",
        num_steps=num_steps or preset.num_steps,
        num_trajectories=num_trajectories + 1,
        device=device,
    )
    with Recorder(config, Place()) as recorder:
        first, *others = recorder.missing()

        def run(*blocks: Any) -> None:
            for block in blocks:
                recorder.record(block)
            recorder.writer.wait()

        run(first)  # it chooses kernels
        forget(device)
        with denoiser_clock(list(denoisers(recorder.pipeline).values()), device) as spent:
            seconds = clock(device, partial(run, *others))
        peak, num_calls = peak_bytes(device), recorder.manifest.denoiser_calls
    sizes = [path.stat().st_size for path in config.out.glob("*.safetensors")]
    planned = video_seconds(preset, count_video(preset), GPUS[gpu], num_calls)
    return {
        "num_steps": config.num_steps,
        "denoiser_calls": num_calls,
        "seconds_a_trajectory": {
            "measured": seconds / num_trajectories,
            "in_denoiser": spent.seconds / num_trajectories,
            "planned": planned.encoding + planned.denoising,
        },
        "trajectories_an_hour": 3600 * num_trajectories / seconds,
        "share_outside_denoiser": 1 - spent.seconds / seconds,
        "bytes_a_trajectory": sum(sizes) / len(sizes),
        "peak_bytes_measured": peak,
    }


def distill(preset: Preset, device: str, gpu: Gpu) -> dict[str, Any]:
    """Peak memory and seconds of iterations of LoRA distillation on one clip, measured and planned."""
    num_steps, call = preset.num_student_steps, filled(preset.call(), device)
    states = torch.randn(1, num_steps + 1, *preset.state_shape, device=device)
    batch = TrajectoryBatch(states, (call,) * num_steps, ("transformer",) * num_steps, ("",), (0,), states.device)
    config = DistillConfig(
        data="", out=Path(), num_iterations=NUM_ITERATIONS, batch_size=1, lora_rank=RANK, num_validation=0,
        adversarial_start=0, feature_layers=preset.feature_layers, gradient_checkpointing=True, device=device,
        precision="bfloat16",
    )  # fmt: skip
    sigmas = shifted_sigmas(num_steps, preset.shift or 1.0)
    training = start_training(config, {"transformer": build(preset.denoiser, device)}, sigmas, [batch])

    def batches(start: int) -> Iterator[TrajectoryBatch]:
        while True:
            yield batch

    seconds, inside = list[float](), list[float]()
    with denoiser_clock(list(training.student.denoisers.values()), device) as spent:

        def log(line: dict[str, Any]) -> None:
            seconds.append(line["seconds"])
            inside.append(spent.seconds - sum(inside))

        train(config, training, sigmas, batches, log=log)
    peak = peak_bytes(device)
    del training
    forget(device)

    sizes, cost = count_parameters(preset), whole(preset, partial(training_cost, preset))
    plan = PlanConfig(preset="hunyuan-544p", num_gpus=1, lora_rank=RANK)  # of the preset's name nothing is used
    lora = replace(cost, matmul=cost.matmul - 2 * whole(preset, partial(call_cost, preset)).matmul)
    return {
        "peak_bytes": {"measured": peak, "planned": distilling_bytes(sizes, cost, plan, "bfloat16")["one_gpu"]},
        "seconds_an_iteration": {
            "measured": seconds[1:],
            "in_denoiser": inside[1:],
            "planned": denoiser_seconds(lora, GPUS[gpu]),
        },
        "iterations_an_hour": 3600 * len(seconds[1:]) / sum(seconds[1:]),
        "share_outside_denoiser": 1 - sum(inside[1:]) / sum(seconds[1:]),
    }


def main() -> None:
    """Run what was asked for, print the results and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="what the plan is asked for")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--only", choices=("generate", "record", "distill"))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, help="instead of those of each part")
    parser.add_argument("--num-steps", type=int, help="of a recording, instead of the preset's")
    parser.add_argument("--num-trajectories", type=int, default=2, help="to record, and one more that is not counted")
    parser.add_argument("--folder", type=Path, help="on the disk to record to; a temporary one in it is used")
    parser.add_argument("--num-student-steps", type=int, default=5)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and arguments.size == "full":
        sys.exit("no GPU was found: true size takes one; try --size tiny")
    if arguments.only == "record" and not all(
        "WanPipeline" == PRESETS[n].pipeline_class for n in arguments.presets or ()
    ):
        sys.exit("what is recorded is a WanPipeline: give --presets wan21-t2v-1.3b or wan21-t2v-14b")
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
        "record": {},
        "distill": {},
    }

    def recorded(preset: Preset) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            size = arguments.num_steps, arguments.num_trajectories
            return record(preset, *size, Path(folder), device, arguments.gpu)

    parts = (
        ("generate", GENERATED, lambda preset: generate(preset, arguments.num_student_steps, device, arguments.gpu)),
        ("record", RECORDED, recorded),
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
