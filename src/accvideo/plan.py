"""What a preset takes in hours, memory and disk, before anything is downloaded.

Operations and activations are counted on the meta device (`planning/cost.py`); seconds are operations over what a GPU
achieves. docs/plan.md says what the three achieved shares were fitted on, and how far off the model is.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from accvideo.call import denoiser_blocks, replay
from accvideo.discriminator import Discriminator
from accvideo.losses import ADVERSARIAL_LOSSES
from accvideo.planning.config import Gpu, PlanConfig
from accvideo.planning.cost import Cost, at_depth, measure, metered
from accvideo.planning.networks import Network
from accvideo.presets import Preset, find_preset, meta
from accvideo.student import Student, adapted_layers
from accvideo.training.recipe import paper
from accvideo.training.steps import Step, paired_loss, student_step
from accvideo.trajectory import TrajectoryBatch


@dataclass(frozen=True)
class GpuModel:
    """A kind of GPU."""

    name: str
    peak_flops: float
    """Dense bfloat16 operations a second, by the data sheet."""
    memory: float
    """Bytes."""


GPUS: dict[Gpu, GpuModel] = {
    "a100": GpuModel("A100 80GB SXM", 312e12, 80 * 1024**3),
    "h100": GpuModel("H100 80GB SXM", 989e12, 80 * 1024**3),
    "h200": GpuModel("H200 141GB SXM", 989e12, 141 * 1000**3),
    "b200": GpuModel("B200 180GB", 2250e12, 180 * 1000**3),
    "l40s": GpuModel("L40S 48GB", 362e12, 48 * 1024**3),
    "rtx4090": GpuModel("RTX 4090 24GB", 165e12, 24 * 1024**3),
}
"""NVIDIA's data sheets."""

MATMUL_SHARE = 0.50
"""Of a GPU's peak that the denoiser's matrix products achieve, the small operations between them included."""
ATTENTION_SHARE = 0.63
"""Of the peak that the denoiser's attention achieves."""
VAE_SHARE = 0.23
"""Of the peak that the VAE achieves."""

LORA_STATE_BYTES = 16
"""A trained weight, its gradient and AdamW's two moments, float32."""
FULL_STATE_BYTES = 20
"""The same, with autocast's bfloat16 copy and the discriminator's frozen bfloat16 teacher."""
BASE_BYTES = {"bfloat16": 2.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Of a linear weight in a frozen base; nf4 has a float32 scale for 64 weights."""
KINDS: dict[str, tuple[str, str | None]] = {
    "full": ("all weights", None),
    "lora": ("LoRA", "bfloat16"),
    "lora_int8": ("LoRA on an int8 or float8 base", "int8"),
    "lora_nf4": ("LoRA on an nf4 base", "nf4"),
}
"""Ways to distill: in words, and type of the frozen base; None where all weights train."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters."""

    denoiser: int
    """Of all denoisers."""
    linear: int
    """Of them, the weights of linear layers."""
    block: int
    """Of the largest repeated block."""
    lora: int
    """Of a LoRA of rank 1."""
    encoders: int
    """Of the text encoders and the image encoder."""
    vae: int


@dataclass(frozen=True)
class VideoCosts:
    """What the parts of making one clip cost."""

    call: Cost
    """One denoiser call without gradients."""
    text: Cost
    """All prompts' encoders, once."""
    encode: Cost
    """The VAE's way of the conditions of image-to-video to latents."""
    decode: Cost
    """The VAE's way to frames."""


@dataclass(frozen=True)
class Seconds:
    """Of one video on one GPU."""

    encoding: float
    """Of prompts, and of the image where there is one."""
    denoising: float
    decoding: float

    @property
    def total(self) -> float:
        """All parts."""
        return self.encoding + self.denoising + self.decoding


def num_parameters(network: nn.Module) -> int:
    """Weights of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_parameters(preset: Preset) -> Sizes:
    """The parameters of a preset's networks."""
    denoiser = preset.denoiser.build()
    linear, number = [each for each in denoiser.modules() if isinstance(each, nn.Linear)], preset.num_denoisers
    return Sizes(
        denoiser=number * num_parameters(denoiser),
        linear=number * sum(layer.weight.numel() for layer in linear),
        block=max(map(num_parameters, denoiser_blocks(denoiser))),
        lora=number * sum(sum(layer.weight.shape) for layer in adapted_layers(denoiser).values()),
        encoders=sum(num_parameters(encoder.build()) for encoder in encoders(preset)),
        vae=num_parameters(preset.vae.build()),
    )


def encoders(preset: Preset) -> list[Network]:
    """The text encoders, and the image encoder if there is one."""
    return [*preset.text_encoders, *([] if preset.image_encoder is None else [preset.image_encoder])]


def whole(preset: Preset, cost: Callable[..., Cost]) -> Cost:
    """The cost at the denoiser's full depth, from a function of numbers of blocks."""
    return at_depth(cost, [preset.denoiser.config[entry] for entry in preset.denoiser.depth])


def count_video(preset: Preset) -> VideoCosts:
    """What the parts of making a clip of a preset cost."""

    def all_frames(cost: Callable[[Preset, int], Cost]) -> Cost:
        frames = preset.latent_shape[1]
        if not preset.vae_streams:
            return cost(preset, frames)
        return at_depth(lambda number: cost(preset, number), [frames], least=3)

    return VideoCosts(
        call=whole(preset, partial(call_cost, preset)),
        text=text_cost(preset),
        encode=Cost() if preset.image_encoder is None else all_frames(encode_cost),
        decode=all_frames(decode_cost),
    )


def shallow_denoiser(preset: Preset, depths: tuple[int, ...]) -> nn.Module:
    """The denoiser with other numbers of blocks."""
    changes: dict[str, Any] = dict(zip(preset.denoiser.depth, depths, strict=True))
    return preset.denoiser.build("meta", **changes)


@torch.no_grad()
def call_cost(preset: Preset, *depths: int) -> Cost:
    """The cost of one denoiser call with these numbers of blocks."""
    denoiser, call, latents = shallow_denoiser(preset, depths), preset.call(), meta(*preset.state_shape)
    known = [*denoiser.parameters(), *call.tensors.values(), latents]
    return measure(lambda: replay(denoiser, call, latents), known=known)


def training_cost(preset: Preset, *depths: int) -> Cost:
    """The cost of one iteration on one clip, features always taken from the last block.

    Everything is in bfloat16, as under autocast; gradients of weights are dropped as soon as they are there. The way
    back through the teacher and the one through the student are two phases: their peaks grow differently with depth.
    """
    student = Student({"transformer": shallow_denoiser(preset, depths)}, lora_rank=None, gradient_checkpointing=True)
    nn.Module.to(student, torch.bfloat16)
    call, sigmas = preset.call(), torch.linspace(1, 0, 3)
    states = meta(3, *preset.state_shape, dtype=torch.float32)
    batch = TrajectoryBatch(states, (call, call), ("transformer",) * 2, ("",), (0,), states.device)
    with torch.device("meta"), metered():
        discriminator = Discriminator(student, sigmas, [batch])
    trained, heads = list(student.parameters()), list(discriminator.heads.parameters())
    for parameter in (*trained, *heads):
        parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    loss, held = ADVERSARIAL_LOSSES["nonsaturating"], []

    def paired() -> None:
        paired_loss(student, batch, sigmas, Step(0, 1)).mean().backward(inputs=trained)

    def features() -> None:  # student's step and teacher's features, and back to the student's latents
        latents = student_step(student, batch, states[:, 0], sigmas, Step(0, 1))
        logits = discriminator.logits(discriminator.features(latents, batch, 0), 0)
        held.append((latents, *torch.autograd.grad(loss.generator(logits).mean(), latents)))

    def rollout() -> None:
        latents, gradient = held.pop()
        latents.backward(gradient, inputs=trained)

    def judge() -> None:
        with torch.no_grad():
            real = discriminator.features(states[:, 1], batch, 0)
        real_logits, fake_logits = discriminator.logits(torch.cat([real, real]), 0).chunk(2)
        loss.head(real_logits, fake_logits).mean().backward(inputs=heads)

    teacher = student.teachers["transformer"].parameters()
    return measure(paired, features, rollout, judge, known=[*trained, *teacher, *heads, states, *call.tensors.values()])


def consistency_calls(preset: Preset) -> int:
    """Calls without gradients that a sample takes more with the consistency loss: the guided teacher and the student.

    Their memory stays below that of the calls with gradients.
    """
    return preset.calls_per_step + 1


def text_cost(preset: Preset) -> Cost:
    """The cost of all encoders: two operations for each weight and token, the guidance's prompt included."""
    prompts = 1 if preset.guidance == "embedded" else 2
    total = Cost()
    for encoder in encoders(preset):
        network: Any = encoder.build()
        weights = num_parameters(network) - network.get_input_embeddings().weight.numel()
        tokens, times = (257, 1) if encoder is preset.image_encoder else (preset.num_text_tokens, prompts)
        total = total.plus(Cost(matmul=2.0 * weights * tokens), times)
    return total


@torch.no_grad()
def decode_cost(preset: Preset, num_frames: int) -> Cost:
    """The cost of decoding this many latent frames.

    Where the VAE decodes in tiles, one is counted, and taken as often as tiles cover the frame's area: their overlaps
    are decoded twice.
    """
    vae: Any = preset.vae.build()
    channels, _, height, width = preset.latent_shape
    area = 1.0
    if preset.vae_tiling:
        tile = vae.tile_sample_min_height // preset.space_stride
        stride = vae.tile_sample_stride_height // preset.space_stride
        area = covered(height, tile, stride) * covered(width, tile, stride) / tile**2
        height = width = tile
    latents = meta(channels, num_frames, height, width)
    cost = measure(lambda: vae.decode(latents, return_dict=False), known=[*vae.parameters(), latents])
    return Cost(cost.matmul * area, cost.attention * area, cost.peaks)


def covered(length: int, tile: int, stride: int) -> int:
    """The summed length of the tiles that cover a length, the last ones cut short."""
    return sum(min(tile, length - start) for start in range(0, length, stride))


@torch.no_grad()
def encode_cost(preset: Preset, num_frames: int) -> Cost:
    """The cost of encoding a clip of this many latent frames."""
    vae: Any = preset.vae.build()
    clip = meta(3, (num_frames - 1) * preset.time_stride + 1, preset.height, preset.width)
    return measure(lambda: vae.encode(clip, return_dict=False), known=[*vae.parameters(), clip])


def denoiser_seconds(cost: Cost, gpu: GpuModel) -> float:
    """Seconds of work of the denoiser on one GPU."""
    return (cost.matmul / MATMUL_SHARE + cost.attention / ATTENTION_SHARE) / gpu.peak_flops


def video_seconds(preset: Preset, costs: VideoCosts, gpu: GpuModel, num_calls: int) -> Seconds:
    """Seconds of one video with this number of denoiser calls."""
    return Seconds(
        encoding=denoiser_seconds(costs.text, gpu) + costs.encode.flops / VAE_SHARE / gpu.peak_flops,
        denoising=num_calls * denoiser_seconds(costs.call, gpu),
        decoding=costs.decode.flops / VAE_SHARE / gpu.peak_flops,
    )


def trajectory_bytes(preset: Preset) -> int:
    """Bytes of a trajectory's tensors on disk: K + 1 states, and the arguments of the K calls.

    Arguments are stored once, but for the timestep, which differs between the calls; no prompt is padded.
    """
    call = preset.call()
    arguments = call.tensors | ({} if call.condition is None else {"hidden_states": call.condition})
    stored = sum(
        tensor.nbytes * (preset.num_student_steps if name == "timestep" else 1) for name, tensor in arguments.items()
    )
    width = 2 if preset.narrow_states else 4
    return (4 + preset.num_student_steps * width) * math.prod(preset.state_shape) + stored


def distilling_bytes(sizes: Sizes, training: Cost, config: PlanConfig, base: str | None) -> dict[str, float]:
    """Peak memory of a GPU that distills one clip at a time: alone, or with all states sharded over the GPUs.

    A sharded network gathers the block it is at and the next.

    Args:
        sizes: of the networks.
        training: what an iteration costs.
        config: number of GPUs and rank.
        base: type of the frozen base's linear weights under a LoRA; None trains all weights.
    """
    if base is None:
        states = FULL_STATE_BYTES * sizes.denoiser
    else:
        frozen = BASE_BYTES[base] * sizes.linear + 2.0 * (sizes.denoiser - sizes.linear)
        states = frozen + LORA_STATE_BYTES * config.lora_rank * sizes.lora
    gathered = 2 * 2.0 * sizes.block
    sharded = states / config.num_gpus + gathered if config.num_gpus > 1 else states
    return {"one_gpu": states + training.peak, "sharded": sharded + training.peak}


def plan(config: PlanConfig) -> dict[str, Any]:
    """The plan of a preset, shown as a table on stderr.

    Returns:
        Operations, parameters, bytes, seconds, hours and speed-ups, by what they are of.
    """
    preset, gpu = find_preset(config.preset), GPUS[config.gpu]
    console = Console(stderr=True)
    with console.status("counting operations on the meta device"):
        sizes, costs = count_parameters(preset), count_video(preset)
        training = whole(preset, partial(training_cost, preset))
    recipe = paper("", Path())
    num_samples = recipe.num_iterations * recipe.batch_size
    num_trajectories = config.num_trajectories or num_samples

    teacher = video_seconds(preset, costs, gpu, preset.num_steps * preset.calls_per_step)
    student = video_seconds(preset, costs, gpu, preset.num_student_steps)
    # Two of its passes go back through the student, and need no gradients of the frozen weights.
    lora_training = replace(training, matmul=training.matmul - 2 * costs.call.matmul)
    distilling = {
        name: num_samples * denoiser_seconds(cost, gpu)
        for name, cost in (("distilling_full", training), ("distilling_lora", lora_training))
    }
    consistency = num_samples * consistency_calls(preset) * denoiser_seconds(costs.call, gpu)
    gpu_seconds = {
        "recording": num_trajectories * (teacher.encoding + teacher.denoising),
        **distilling,
        **{f"{name}_consistency": seconds + consistency for name, seconds in distilling.items()},
    }
    loaded = 2.0 * (sizes.denoiser + sizes.encoders + sizes.vae)
    doubled = 2 if preset.guidance == "doubled batch" else 1
    result = {
        "configuration": {
            "preset": config.preset,
            "teacher": preset.teacher,
            "gpu": gpu.name,
            "num_gpus": config.num_gpus,
            "num_trajectories": num_trajectories,
            "num_samples": num_samples,
            "num_steps": preset.num_steps,
            "num_student_steps": preset.num_student_steps,
        }
        | {name: getattr(preset, name) for name in ("height", "width", "num_frames", "fps")},
        "denoiser_calls": {
            "teacher": preset.num_steps * preset.calls_per_step,
            "student": preset.num_student_steps,
        },
        "parameters": {name: getattr(sizes, name) for name in ("denoiser", "encoders", "vae")}
        | {"lora": config.lora_rank * sizes.lora},
        "flops": {
            "denoiser_call": costs.call.flops,
            "denoiser_call_matmul": costs.call.matmul,
            "denoiser_call_attention": costs.call.attention,
            "training_sample": training.flops,
            "training_sample_consistency": training.flops + consistency_calls(preset) * costs.call.flops,
            "decoding": costs.decode.flops,
        },
        "bytes": {
            "gpu": gpu.memory,
            "recording": loaded + doubled * max(costs.call.peak, costs.encode.peak),
            "generating": loaded + max(doubled * costs.call.peak, costs.decode.peak),
            "distilling": {name: distilling_bytes(sizes, training, config, base) for name, (_, base) in KINDS.items()},
            "trajectory": trajectory_bytes(preset),
            "trajectories": num_trajectories * trajectory_bytes(preset),
        },
        "seconds_per_video": {"teacher": asdict(teacher), "student": asdict(student)},
        "hours": {name: value / config.num_gpus / 3600 for name, value in gpu_seconds.items()},
        "speedup": {
            "denoising": teacher.denoising / student.denoising,
            "end_to_end": teacher.total / student.total,
        },
    }
    show(console, result)
    return result


def show(console: Console, result: dict[str, Any]) -> None:
    """Draw a plan as tables."""
    of, flops, size = result["configuration"], result["flops"], result["parameters"]
    hours, memory, speedup = result["hours"], result["bytes"], result["speedup"]
    share = flops["denoiser_call_attention"] / flops["denoiser_call"]
    lines = (
        f"[bold]{of['preset']}[/bold]: {of['teacher']}",
        f"{of['width']}x{of['height']} pixels, {of['num_frames']} frames, {of['fps']} a second",
        f"parameters: denoiser {size['denoiser'] / 1e9:.2f} B, encoders {size['encoders'] / 1e9:.2f} B, "
        f"VAE {size['vae'] / 1e9:.2f} B",
        f"a denoiser call: {flops['denoiser_call'] / 1e12:,.0f} TFLOP, {share:.0%} of it attention",
    )
    for line in lines:
        console.print(line, highlight=False)

    videos = Table("seconds a video, one GPU")
    for name in ("steps", "calls", "encode", "denoise", "decode", "total"):
        videos.add_column(name, justify="right")
    steps = {"teacher": of["num_steps"], "student": of["num_student_steps"]}
    for name, parts in result["seconds_per_video"].items():
        numbers = [f"{value:,.1f}" for value in (*parts.values(), sum(parts.values()))]
        videos.add_row(name, str(steps[name]), str(result["denoiser_calls"][name]), *numbers)
    videos.add_row("speed-up", "", "", "", f"{speedup['denoising']:.1f}x", "", f"{speedup['end_to_end']:.1f}x")
    console.print(videos)

    def gib(value: float) -> str:
        color = "red" if value > memory["gpu"] else "green"
        return f"[{color}]{value / 1024**3:,.0f}[/{color}]"

    peaks = Table(f"GiB on a GPU of {memory['gpu'] / 1024**3:.0f}, one clip at a time")
    for name in ("alone", f"sharded over {of['num_gpus']}"):
        peaks.add_column(name, justify="right")
    for name in ("recording", "generating"):
        peaks.add_row(name, gib(memory[name]), "")
    for name, value in memory["distilling"].items():
        peaks.add_row(f"distilling, {KINDS[name][0]}", gib(value["one_gpu"]), gib(value["sharded"]))
    console.print(peaks)

    work = Table(f"on {of['num_gpus']} x {of['gpu']}")
    for name in ("hours", "consistency", "disk"):
        work.add_column(name, justify="right")
    disk = f"{memory['trajectories'] / 1e12:,.2f} TB ({memory['trajectory'] / 1e6:,.0f} MB each)"
    work.add_row(f"recording {of['num_trajectories']:,} trajectories", f"{hours['recording']:,.1f}", "", disk)
    samples = f"distilling {of['num_samples']:,} samples"
    for kind, name in ((f"{samples}, full", "distilling_full"), ("the same, LoRA", "distilling_lora")):
        work.add_row(kind, f"{hours[name]:,.1f}", f"{hours[f'{name}_consistency']:,.1f}", "")
    console.print(work)
    console.print("Estimates, not measurements; docs/plan.md says how far off they are.", style="dim")
