"""The files that each form of an exported student consists of."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from accvideo.command import choose_device, progress_bar
from accvideo.exporting.card import teacher_name
from accvideo.exporting.config import ExportConfig
from accvideo.exporting.layouts import comfyui_name, layout_of, original_lora, original_weights
from accvideo.exporting.lora import Extraction, Factors, extract_lora, lora_tensors, read_lora
from accvideo.exporting.source import Source, component_files, license_files, read_json
from accvideo.exporting.weights import LazyTensor, Weights, in_memory, read_weights, shard_files
from accvideo.inference.schedulers import make_scheduler
from accvideo.inference.student_config import StudentConfig
from accvideo.student import LORA_FILES

EXPORT = "accvideo.json"
"""What an exported folder holds and how to call it; `accvideo` takes its sizes from there."""

GUIDANCE = "time_text_embed.guidance_embedder.linear_1"
"""The layer by which a denoiser with embedded guidance (HunyuanVideo) takes its scale."""


@dataclass
class Output:
    """What will be written."""

    weights: dict[str, tuple[Weights, dict[str, str]]] = field(default_factory=dict)
    """By path in the folder: tensors and metadata of a safetensors file."""
    texts: dict[str, str] = field(default_factory=dict)
    copies: dict[str, Path] = field(default_factory=dict)


def plan_pipeline(output: Output, source: Source, config: ExportConfig) -> None:
    """A pipeline's folder: the student's denoisers and scheduler, all else as the teacher has it."""
    assert source.teacher is not None
    index = read_json(source.teacher / "model_index.json")
    scheduler: Any = make_scheduler(source.config.scheduler)
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    output.texts["model_index.json"] = json.dumps(index, indent=2) + "\n"
    output.texts["scheduler/scheduler_config.json"] = scheduler.to_json_string()
    for name, component in index.items():
        own = name in source.denoisers or name == "scheduler"
        if not own and isinstance(component, list) and component[0] is not None:
            output.copies |= component_files(source.teacher, name)
    output.copies |= license_files(source.teacher)
    for name in source.denoisers:
        weights = baked_guidance(source.weights(name, getattr(torch, config.dtype)), source.config.guidance_scale)
        files, shard_index = shard_files(weights, round(config.max_shard_size * 1e9))
        for file, shard in files.items():
            output.weights[f"{name}/{file}"] = shard, {"format": "pt"}
        if shard_index is not None:
            output.texts[f"{name}/diffusion_pytorch_model.safetensors.index.json"] = json.dumps(shard_index, indent=2)
        settings = {key: value for key, value in source.denoiser_config(name).items() if key != "_name_or_path"}
        output.texts[f"{name}/config.json"] = json.dumps(settings, indent=2) + "\n"


def plan_original(output: Output, source: Source, config: ExportConfig) -> None:
    """One file for each denoiser in the layout of its authors."""
    for name in source.denoisers:
        layout = layout_of(source.denoiser_config(name)["_class_name"])
        weights = original_weights(source.weights(name, getattr(torch, config.dtype)), layout)
        output.weights[weight_file(config, source, name)] = weights, metadata(config, source)
    output.copies |= license_files(source.teacher)


def plan_lora(output: Output, source: Source, config: ExportConfig) -> dict[str, Extraction]:
    """One LoRA for each denoiser; returns how it was extracted, for full weights."""
    dtype, extractions = getattr(torch, config.dtype), {}
    for name in source.denoisers:
        if source.config.lora_rank is None:
            extractions[name] = extraction(source, name, config)
            lora = extractions[name].lora
        else:
            lora = {module: each.to(dtype) for module, each in read_lora(source.folder / LORA_FILES[name]).items()}
        tensors = lora_tensors(lora, "transformer.") if config.to == "lora" else comfyui_tensors(source, name, lora)
        output.weights[weight_file(config, source, name)] = in_memory(tensors), metadata(config, source)
    output.copies |= license_files(source.teacher)
    return extractions


def comfyui_tensors(source: Source, name: str, lora: Mapping[str, Factors]) -> dict[str, Tensor]:
    """A LoRA as ComfyUI and diffusers both load it: original names, `lora_A` and `lora_B`, no alpha."""
    layout = layout_of(source.denoiser_config(name)["_class_name"])
    original = original_lora(lora, layout)
    return lora_tensors({comfyui_name(module): factors for module, factors in original.items()}, "")


def extraction(source: Source, name: str, config: ExportConfig) -> Extraction:
    """The LoRA of a denoiser with full weights."""
    assert config.rank is not None
    teacher, student = source.teacher_weights(name), read_weights(source.folder / name)
    linear = {module for module, layer in source.empty(name).named_modules() if isinstance(layer, nn.Linear)}
    with progress_bar() as progress:
        bar = progress.add_task(f"decompose {name}", total=len(student))
        return extract_lora(
            teacher,
            student,
            linear,
            config.rank,
            getattr(torch, config.dtype),
            choose_device(config.device),
            lambda: progress.advance(bar),
        )


def baked_guidance(weights: Weights, guidance_scale: float | None) -> Weights:
    """Weights of a denoiser that takes the guidance scale as an input, such that every scale acts as this one.

    So a call with `guidance_scale=1`, as for every other student, is right too: the first layer of the guidance's
    embedding no longer looks at its input, and its bias is what it made of this scale.
    """
    if f"{GUIDANCE}.weight" not in weights or guidance_scale is None:
        return weights
    weight, bias = weights[f"{GUIDANCE}.weight"], weights[f"{GUIDANCE}.bias"]

    def embedded() -> Tensor:
        matrix = weight.read()
        scale = torch.tensor([guidance_scale], dtype=matrix.dtype) * 1000
        waves = get_timestep_embedding(scale, matrix.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
        return nn.functional.linear(waves.to(matrix.dtype), matrix, bias.read())[0]

    return dict(weights) | {
        f"{GUIDANCE}.weight": LazyTensor(
            weight.shape, weight.dtype, lambda: torch.zeros(weight.shape, dtype=weight.dtype)
        ),
        f"{GUIDANCE}.bias": LazyTensor(bias.shape, bias.dtype, embedded),
    }


def weight_file(config: ExportConfig, source: Source, name: str) -> str:
    """The name of a denoiser's file: the first of two works at high noise, the second at low noise (Wan 2.2)."""
    if config.to == "lora":
        return LORA_FILES[name]
    stem = "lora" if config.to == "comfyui" else "model"
    if len(source.denoisers) == 1:
        return f"{stem}.safetensors"
    return f"{stem}_{'high' if name == 'transformer' else 'low'}_noise.safetensors"


def metadata(config: ExportConfig, source: Source) -> dict[str, str]:
    """The schedule, in the file itself."""
    return {"format": "pt", "accvideo": json.dumps(call_settings(config, source.config))}


def call_settings(config: ExportConfig, student: StudentConfig) -> dict[str, Any]:
    """How to call the student, and where it comes from."""
    names = ("num_steps", "sigmas", "timesteps", "guidance_scale", "height", "width", "num_frames", "fps")
    names += ("pipeline_args", "pipeline_class", "revision", "license")
    return {name: getattr(student, name) for name in names} | {"to": config.to, "teacher": teacher_name(student)}


def files_of(output: Output) -> list[str]:
    """Paths of all files in the folder."""
    return list({*output.weights, *output.texts, *output.copies, EXPORT})
