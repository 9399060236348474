"""How to run an exported student, in Markdown: code for diffusers, nodes for ComfyUI."""

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch

from accvideo.exporting.card import teacher_name
from accvideo.exporting.config import ExportConfig
from accvideo.exporting.forms import weight_file
from accvideo.exporting.lora import Extraction
from accvideo.exporting.source import Source
from accvideo.flow import shifted_sigmas
from accvideo.inference.schedulers import KeyPointScheduler
from accvideo.inference.student_config import StudentConfig
from accvideo.student import LORA_FILES

PACKAGES = (
    f"With `pip install 'diffusers>={diffusers.__version__}' transformers accelerate peft imageio imageio-ffmpeg` "
    "(the last two write the file)"
)
"""What the examples in Python need besides torch."""

SAME_LEVELS = 2e-3
"""Noise levels that differ by less count as the same where a schedule is only described."""


def what_it_is(config: ExportConfig, student: StudentConfig) -> str:
    """The kind of weights, in words."""
    if config.to == "diffusers":
        return "Pipeline with full weights"
    if config.to == "original":
        return "Full weights in the original layout"
    rank = student.lora_rank or config.rank
    extracted = ", extracted from full weights by singular value decomposition" if student.lora_rank is None else ""
    return f"LoRA of rank {rank}{extracted}" + (", in ComfyUI's layout" if config.to == "comfyui" else "")


def usage(config: ExportConfig, source: Source) -> str:
    """How to run what was written, in Markdown."""
    if config.to == "diffusers":
        return diffusers_usage(config, source)
    if config.to == "lora":
        return lora_usage(config, source)
    return comfyui_usage(config, source)


def diffusers_usage(config: ExportConfig, source: Source) -> str:
    """For a pipeline's folder."""
    lines = [
        f'pipeline = DiffusionPipeline.from_pretrained("FOLDER", torch_dtype=torch.{config.dtype}).to("cuda")',
        *call_lines(source.config),
    ]
    return f"{PACKAGES}:\n\n{python(lines, source.config)}"


def lora_usage(config: ExportConfig, source: Source) -> str:
    """For a LoRA in diffusers' layout."""
    student, lines = source.config, []
    lines.append(f'pipeline = DiffusionPipeline.from_pretrained("{teacher_name(student)}", torch_dtype=torch.bfloat16)')
    if len(source.denoisers) == 1:
        lines.append('pipeline.load_lora_weights("FOLDER")')
    else:
        for name in source.denoisers:
            second = ", load_into_transformer_2=True" if name == "transformer_2" else ""
            lines.append(f'pipeline.load_lora_weights("FOLDER", weight_name="{LORA_FILES[name]}"{second})')
    scheduler = student.scheduler["class"]
    if scheduler == KeyPointScheduler.__name__:
        lines.append(
            "# No scheduler of diffusers takes these noise levels: step by Euler's method over the sigmas below."
        )
    else:
        settings = ", ".join(f"{name}={value!r}" for name, value in changed_settings(student).items())
        lines.insert(0, f"from diffusers import {scheduler}\n")
        lines.append(f"pipeline.scheduler = {scheduler}({settings})")
    lines += ['pipeline.to("cuda")', *call_lines(student)]
    return f"{PACKAGES}:\n\n{python(lines, student)}"


def comfyui_usage(config: ExportConfig, source: Source) -> str:
    """For ComfyUI."""
    student, two = source.config, len(source.denoisers) > 1
    what = "LoRA" if config.to == "comfyui" else "model"
    place = "models/loras" if config.to == "comfyui" else "models/diffusion_models"
    node = "LoraLoaderModelOnly at strength 1" if config.to == "comfyui" else "Load Diffusion Model"
    lines = [f"In ComfyUI: put the {what} into `{place}` and load it with the node {node}."]
    if two:
        calls = f"the file `{weight_file(config, source, 'transformer')}` for the steps at high noise, "
        calls += f"`{weight_file(config, source, 'transformer_2')}` for those at low noise"
        lines.append(
            f"The teacher has two experts: {calls}, switched at the teacher's own boundary (two KSampler "
            "(Advanced) nodes)."
        )
    levels = ", ".join(f"{sigma:.6f}" for sigma in student.sigmas)
    lines.append(
        f"Then the node SamplerCustom with cfg 1, the sampler `euler`, and the student's noise levels from the node "
        f"ManualSigmas: `{levels}`."
    )
    if (shift := comfyui_shift(student)) is not None:
        lines.append(
            f"Or, within {SAME_LEVELS:g} of these levels, ModelSamplingSD3 with shift {shift:g}, and KSampler with "
            f"{student.num_steps} steps, cfg 1, sampler `euler`, scheduler `simple`."
        )
    if student.guidance_scale not in (None, 1.0):
        lines.append(
            f"The node FluxGuidance gives the guidance, {student.guidance_scale:g}: it is an input of the model."
        )
    if config.to == "comfyui":
        lines.append("diffusers loads the same file with `pipeline.load_lora_weights`.")
    return "\n\n".join(lines)


def comfyui_shift(student: StudentConfig) -> float | None:
    """The shift at which ComfyUI's `simple` schedule visits the student's noise levels; None if none is known to.

    That schedule takes every (1000 / K)-th of 1000 levels, shifted.
    """
    settings = student.scheduler["config"]
    shift = settings.get("flow_shift", settings.get("shift"))
    if shift is None:
        return None
    levels = shifted_sigmas(student.num_steps, shift)
    return shift if torch.allclose(levels, torch.tensor(student.sigmas), atol=SAME_LEVELS) else None


def changed_settings(student: StudentConfig) -> dict[str, Any]:
    """The settings of the student's scheduler that are not its class's defaults."""
    scheduler_class: Any = getattr(diffusers, student.scheduler["class"])
    defaults = scheduler_class().config
    return {name: value for name, value in student.scheduler["config"].items() if value != defaults.get(name)}


def call_lines(student: StudentConfig) -> list[str]:
    """The call of a pipeline, in Python."""
    arguments: dict[str, Any] = {"num_inference_steps": student.num_steps}
    names = ("guidance_scale", "height", "width", "num_frames")
    arguments |= {name: value for name in names if (value := getattr(student, name)) is not None}
    arguments |= student.pipeline_args
    image = ', image=load_image("first_frame.png")' if "ImageToVideo" in student.pipeline_class else ""
    return [
        "frames = pipeline(",
        f'    "a prompt"{image},',
        *(f"    {name}={value!r}," for name, value in arguments.items()),
        ").frames[0]",
        f'export_to_video(frames, "video.mp4", fps={round(student.fps)})',
    ]


def python(lines: Sequence[str], student: StudentConfig) -> str:
    """A block of Python."""
    imports = ["import torch", "from diffusers import DiffusionPipeline"]
    names = ["export_to_video"] + (["load_image"] if "ImageToVideo" in student.pipeline_class else [])
    return "\n".join(["```python", *imports, f"from diffusers.utils import {', '.join(names)}", "", *lines, "```"])


def extraction_note(config: ExportConfig, extractions: Mapping[str, Extraction]) -> str:
    """What an extracted LoRA leaves out, in a few lines."""
    lines = []
    for name, each in extractions.items():
        worst = sorted(each.errors.items(), key=lambda pair: -pair[1])[:5]
        lines.append(
            f"{name}: a LoRA of rank {config.rank} leaves out {each.total_error:.2%} of the change of "
            f"{len(each.errors)} linear layers (Frobenius norm). Most: "
            + ", ".join(f"{module} {error:.2%}" for module, error in worst)
            + "."
        )
        if each.not_covered:
            most = sorted(each.not_covered.items(), key=lambda pair: -pair[1])[:5]
            lines.append(
                f"{name}: {len(each.not_covered)} weights changed that no LoRA holds (norms, biases, convolutions, "
                "tables); they stay the teacher's. Most, relative to the weight: "
                + ", ".join(f"{weight} {change:.2%}" for weight, change in most)
                + "."
            )
    return "\n\n".join(lines)
