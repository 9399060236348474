"""A student for those who do not have accvideo: a plain diffusers folder, a LoRA, or the layout of its authors."""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import get_timestep_embedding
from huggingface_hub import snapshot_download
from rich.console import Console
from torch import Tensor, nn
from tyro.conf import Positional

from accvideo.card import license_warning, model_card, teacher_name
from accvideo.command import choose_device, progress_bar
from accvideo.distill import last_validation
from accvideo.flow import shifted_sigmas
from accvideo.layouts import comfyui_name, layout_of, original_lora, original_weights
from accvideo.lora import Extraction, Factors, extract_lora, lora_tensors, merge_lora, read_lora
from accvideo.model import Dtype, student_folder
from accvideo.student import LORA_FILES, KeyPointScheduler, StudentConfig, make_scheduler, read_student_config
from accvideo.teacher import teacher_path, weights_fingerprint
from accvideo.types import UserError
from accvideo.weights import LazyTensor, Weights, in_memory, read_weights, shard_files, write_weights

EXPORT = "accvideo.json"
"""What an exported folder holds and how to call it; `accvideo` takes its sizes from there."""

FOREIGN_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.onnx")
"""Not copied: the same weights in formats that run code, or for other libraries."""

SAME_LEVELS = 2e-3
"""Noise levels that differ by less count as the same where a schedule is only described."""

GUIDANCE = "time_text_embed.guidance_embedder.linear_1"
"""The layer by which a denoiser with embedded guidance (HunyuanVideo) takes its scale."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Writes a student in a form that runs without accvideo.

    `diffusers`: a whole pipeline's folder for `DiffusionPipeline.from_pretrained`. `lora`: for `load_lora_weights`.
    `comfyui`: a LoRA for ComfyUI (Wan, HunyuanVideo). `original`: one file as the authors of Wan or HunyuanVideo
    published theirs, which ComfyUI loads too.
    """

    student: Positional[str]
    """Folder of a student that `accvideo distill` made, or `playground-student`."""
    to: Literal["diffusers", "lora", "comfyui", "original"]
    """What to write."""
    out: Path
    """A new folder; for one file of weights also a path that ends in .safetensors."""
    rank: int | None = None
    """Rank of the LoRA that is extracted from a student of full weights, for `lora` and `comfyui`."""
    dtype: Dtype = "float32"
    """Of the denoisers' weights. What diffusers keeps in float32 stays so."""
    max_shard_size: float = 10.0
    """Size in GB from which a denoiser's weights are split into several files, for `diffusers`."""
    report: Path | None = None
    """`report.json` of `accvideo evaluate`, for the model card."""
    device: str = "auto"
    """Where singular value decompositions run; `auto` takes the accelerator if there is one."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank is {self.rank}; the least is 1")
        if self.rank is not None and self.to in ("diffusers", "original"):
            raise UserError(f"--to {self.to} writes full weights and takes no --rank; use --to lora or comfyui")
        if not self.max_shard_size > 0:
            raise UserError(f"max_shard_size is {self.max_shard_size} GB; choose a size above 0")
        if self.to == "diffusers" and self.out.suffix == ".safetensors":
            raise UserError(f"--to diffusers writes a folder; {self.out} is the name of a file")


@dataclass(frozen=True)
class Source:
    """A student and the teacher it needs."""

    folder: Path
    config: StudentConfig
    teacher: Path | None
    """The teacher's folder on this machine, as far as it is needed."""

    @property
    def denoisers(self) -> list[str]:
        """Component names."""
        return list(self.config.fingerprints)

    def denoiser_config(self, name: str) -> dict[str, Any]:
        """Class and configuration of a denoiser."""
        owner = self.folder if self.config.lora_rank is None else self.teacher
        assert owner is not None
        return read_json(owner / name / "config.json")

    def empty(self, name: str) -> Any:
        """A denoiser without weights."""
        settings = self.denoiser_config(name)
        with torch.device("meta"):
            return getattr(diffusers, settings["_class_name"]).from_config(settings)

    def teacher_weights(self, name: str) -> Weights:
        """The teacher's weights of a denoiser.

        Raises:
            UserError: they are not those that the student was distilled from.
        """
        assert self.teacher is not None
        weights, denoiser = read_weights(self.teacher / name), self.empty(name)
        names = [parameter for parameter, _ in denoiser.named_parameters()]
        parameters = {parameter: weights[parameter].read for parameter in names if parameter in weights}
        found = weights_fingerprint(type(denoiser).__name__, denoiser.config, parameters)
        if found != self.config.fingerprints[name]:
            raise UserError(f"{self.folder} is a student of another teacher than {self.config.teacher} is now")
        return weights

    def weights(self, name: str, dtype: torch.dtype) -> Weights:
        """The student's full weights of a denoiser; a LoRA is merged in float32, then rounded once."""
        if self.config.lora_rank is None:
            weights = read_weights(self.folder / name)
        else:
            weights = merge_lora(self.teacher_weights(name), read_lora(self.folder / LORA_FILES[name]))
        kept = set(self.empty(name)._keep_in_fp32_modules or ())

        def stored(parameter: str, weight: LazyTensor) -> LazyTensor:
            if not weight.dtype.is_floating_point:
                return weight
            return weight.to(torch.float32 if kept & set(parameter.split(".")) else dtype)

        return {parameter: stored(parameter, weight) for parameter, weight in weights.items()}


@dataclass
class Output:
    """What will be written."""

    weights: dict[str, tuple[Weights, dict[str, str]]] = field(default_factory=dict)
    """By path in the folder: tensors and metadata of a safetensors file."""
    texts: dict[str, str] = field(default_factory=dict)
    copies: dict[str, Path] = field(default_factory=dict)


def export(config: ExportConfig) -> dict[str, Any]:
    """Write a student in another form; returns where, what, and for an extracted LoRA the error of every layer.

    Raises:
        UserError: the student cannot take this form, or something else is in the way.
    """
    began = time.perf_counter()
    folder = student_folder(config.student)
    student = read_student_config(folder)
    check_target(config, student)
    check_out(config)
    report = None if config.report is None else read_report(config.report)
    source = Source(folder, student, teacher_files(config, student))
    if config.to in ("comfyui", "original"):
        for name in source.denoisers:
            layout_of(source.denoiser_config(name)["_class_name"])
    if config.out.suffix == ".safetensors" and len(source.denoisers) > 1:
        raise UserError(f"{student.pipeline_class} has {len(source.denoisers)} denoisers; give a folder as --out")
    if warning := license_warning(student):
        print(f"warning: {warning}", file=sys.stderr)

    output, extractions = Output(), {}
    if config.to == "diffusers":
        plan_pipeline(output, source, config)
    elif config.to == "original":
        plan_original(output, source, config)
    else:
        extractions = plan_lora(output, source, config)
    notes = [extraction_note(config, extractions)] if extractions else []
    lora = config.to in ("lora", "comfyui")
    output.texts["README.md"] = model_card(
        student,
        f"{what_it_is(config, student)} ({config.dtype})",
        usage(config, source),
        last_validation(folder / "metrics.jsonl"),
        report,
        notes,
        lora,
    )
    output.texts[EXPORT] = json.dumps(call_settings(config, student) | {"files": sorted(files_of(output))}, indent=2)
    out = write(config, output)
    for line in notes:
        Console(stderr=True).print(line, highlight=False, markup=False)
    return {
        "out": str(config.out),
        "to": config.to,
        "files": sorted(str(path) for path in out),
        "bytes": sum(path.stat().st_size for path in out),
        "num_steps": student.num_steps,
        "guidance_scale": student.guidance_scale,
        "sigmas": student.sigmas,
        "seconds": time.perf_counter() - began,
        **extraction_summary(extractions),
    }


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_report(path: Path) -> dict[str, Any]:
    """The `report.json` of `accvideo evaluate`.

    Raises:
        UserError: it is none.
    """
    report = read_json(path)
    if not isinstance(report, dict) or not {"rows", "num_prompts"} <= report.keys():
        raise UserError(f"{path} is not a report.json of accvideo evaluate")
    return report


def check_target(config: ExportConfig, student: StudentConfig) -> None:
    """Refuse what a student cannot become.

    Raises:
        UserError: it cannot.
    """
    full = student.lora_rank is None
    if config.to in ("lora", "comfyui") and full and config.rank is None:
        raise UserError(
            f"{config.student} holds full weights; say of which rank the LoRA shall be, such as --rank 32\n"
            "Or keep full weights with --to diffusers or --to original"
        )
    if config.rank is not None and not full:
        raise UserError(f"{config.student} is a LoRA of rank {student.lora_rank} already; leave --rank out")
    if config.to == "diffusers" and student.scheduler["class"] == KeyPointScheduler.__name__:
        levels = ", ".join(f"{sigma:.4f}" for sigma in student.sigmas)
        raise UserError(
            f"no scheduler of diffusers takes a plain {student.pipeline_class} through this student's noise levels "
            f"({levels}): accvideo generate does\n"
            "Export with --to lora, original or comfyui, or record with UniPCMultistepScheduler (use_flow_sigmas=True)"
        )


def check_out(config: ExportConfig) -> None:
    """Refuse to overwrite what no export wrote.

    Raises:
        UserError: something else is there.
    """
    out = config.out
    if out.suffix == ".safetensors" and not out.is_dir():
        for path in (out, out.with_suffix(".md")):
            if path.exists():
                raise UserError(f"{path} exists; give another --out, or delete it")
        return
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; give a new or empty folder as --out")
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    ours = set(read_json(out / EXPORT).get("files", ())) if EXPORT in found else set()
    if others := sorted(found - ours):
        raise UserError(f"{out} holds something else ({others[0]}); give a new or empty folder as --out")


def teacher_files(config: ExportConfig, student: StudentConfig) -> Path | None:
    """The teacher's folder, fetched from the hub as far as this export needs it.

    Raises:
        UserError: it cannot be had.
    """
    full = student.lora_rank is None
    path = teacher_path(student.teacher)
    if (config.to == "lora" and not full) or (config.to == "original" and full):
        return path  # for its license only
    if path is not None:
        return path
    try:
        if config.to == "diffusers":
            return Path(DiffusionPipeline.download(student.teacher, revision=student.revision, use_safetensors=True))
        patterns = ["*.md", "*.txt", "LICENSE*", "transformer*/config.json", "transformer*/*.safetensors*"]
        needed = patterns[:-1] if config.to == "comfyui" and not full else patterns
        return Path(snapshot_download(student.teacher, revision=student.revision, allow_patterns=needed))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load the student's teacher {student.teacher}: {reason}") from error


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


def component_files(teacher: Path, name: str) -> dict[str, Path]:
    """The files of a component by their paths in the pipeline's folder."""
    paths = [path for path in (teacher / name).rglob("*") if path.is_file()]
    return {
        path.relative_to(teacher).as_posix(): path
        for path in paths
        if not any(path.match(pattern) for pattern in FOREIGN_WEIGHTS)
    }


def license_files(teacher: Path | None) -> dict[str, Path]:
    """The texts of the teacher's license, which go with every copy."""
    if teacher is None:
        return {}
    return {
        path.name: path
        for pattern in ("LICENSE*", "NOTICE*", "Notice*")
        for path in teacher.glob(pattern)
        if path.is_file()
    }


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


def write(config: ExportConfig, output: Output) -> list[Path]:
    """Write everything under another name, then rename it; returns the files.

    Raises:
        UserError: the disk is full, or the place cannot be written.
    """
    single = config.out.suffix == ".safetensors" and not config.out.is_dir()
    partial = config.out.with_name(f".{config.out.name}.tmp")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        total = sum(len(weights) for weights, _ in output.weights.values()) + len(output.copies)
        with progress_bar() as progress:
            bar = progress.add_task("write", total=total)
            for name, path in output.copies.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, partial / name)
                progress.advance(bar)
            for name, (weights, header) in output.weights.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                write_weights(partial / name, weights, header, lambda: progress.advance(bar))
        for name, text in output.texts.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(text, encoding="utf-8")
        if single:
            card = config.out.with_suffix(".md")
            (partial / next(iter(output.weights))).rename(config.out)
            (partial / "README.md").rename(card)
            shutil.rmtree(partial)
            return [config.out, card]
        if config.out.exists():  # empty, or an earlier export
            shutil.rmtree(config.out)
        partial.rename(config.out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {config.out}: {error.strerror}; nothing half-written is left") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return [path for path in config.out.rglob("*") if path.is_file()]


def what_it_is(config: ExportConfig, student: StudentConfig) -> str:
    """The kind of weights, in words."""
    if config.to == "diffusers":
        return "Pipeline with full weights"
    if config.to == "original":
        return "Full weights in the original layout"
    rank = student.lora_rank or config.rank
    extracted = ", extracted from full weights by singular value decomposition" if student.lora_rank is None else ""
    return f"LoRA of rank {rank}{extracted}" + (", in ComfyUI's layout" if config.to == "comfyui" else "")


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


def extraction_summary(extractions: Mapping[str, Extraction]) -> dict[str, Any]:
    """What an extracted LoRA leaves out, in numbers."""
    if not extractions:
        return {}
    return {
        "errors": {name: each.errors for name, each in extractions.items()},
        "total_error": {name: each.total_error for name, each in extractions.items()},
        "not_covered": {name: each.not_covered for name, each in extractions.items()},
    }


def usage(config: ExportConfig, source: Source) -> str:
    """How to run what was written, in Markdown."""
    if config.to == "diffusers":
        return diffusers_usage(config, source)
    if config.to == "lora":
        return lora_usage(config, source)
    return comfyui_usage(config, source)


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


def diffusers_usage(config: ExportConfig, source: Source) -> str:
    """For a pipeline's folder."""
    lines = [
        f'pipeline = DiffusionPipeline.from_pretrained("FOLDER", torch_dtype=torch.{config.dtype}).to("cuda")',
        *call_lines(source.config),
    ]
    return f"In diffusers {diffusers.__version__} or later:\n\n{python(lines, source.config)}"


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
    return f"In diffusers {diffusers.__version__} or later:\n\n{python(lines, student)}"


def changed_settings(student: StudentConfig) -> dict[str, Any]:
    """The settings of the student's scheduler that are not its class's defaults."""
    scheduler_class: Any = getattr(diffusers, student.scheduler["class"])
    defaults = scheduler_class().config
    return {name: value for name, value in student.scheduler["config"].items() if value != defaults.get(name)}


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
