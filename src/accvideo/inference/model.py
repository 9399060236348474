"""Teachers and students, found by name and ready to run."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from accvideo.command import DEFAULT_FPS
from accvideo.inference.acceleration import (
    accelerate_pipeline,
    check_acceleration,
    pipeline_quantization,
    stored_fingerprint,
)
from accvideo.inference.config import PLAIN, Acceleration, Quantization
from accvideo.inference.schedulers import make_scheduler
from accvideo.inference.student_config import StudentConfig
from accvideo.student import load_student
from accvideo.teacher import (
    call_parameters,
    denoisers,
    fingerprint,
    load_pipeline,
    pipeline_defaults,
    teacher_path,
    weights_fingerprint,
)
from accvideo.types import UserError

PLAYGROUND = Path(__file__).parents[1] / "playground"
PLAYGROUND_STUDENTS = {"playground-student": PLAYGROUND / "student", "playground-student-2": PLAYGROUND / "student_2"}
"""Folders of the students that ship with the package: of five steps, and of two."""

NUM_TEACHER_STEPS = 50

SCHEDULE_ARGUMENTS = ("num_inference_steps", "sigmas", "timesteps", "guidance_scale", "guidance_scale_2")
"""Arguments of pipelines that say which noise levels and guidance they take."""


@dataclass(frozen=True)
class Model:
    """A teacher or a student, ready to run."""

    name: str
    pipeline: DiffusionPipeline
    identity: str
    """Hash of what it computes: other weights or another recipe, another identity."""
    num_steps: int
    guidance_scale: float | None
    """None: the pipeline's own."""
    fps: int | float
    arguments: dict[str, Any]
    """Further arguments of the pipeline's call: sizes and whatever was recorded."""
    student: StudentConfig | None = None
    """None: a teacher."""


def student_folder(name: str) -> Path:
    """The folder of a student, one of those that ship with the package or another.

    Raises:
        UserError: it does not ship with this version.
    """
    if name not in PLAYGROUND_STUDENTS:
        return Path(name)
    if not (PLAYGROUND_STUDENTS[name] / "student.json").exists():
        raise UserError(
            f"{name} does not ship with this version of accvideo; `accvideo demo` makes a student, runs/demo/student"
        )
    return PLAYGROUND_STUDENTS[name]


def load_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    acceleration: Acceleration = PLAIN,
    revision: str | None = None,
) -> Model:
    """The model called `name`: see `GenerateConfig.model`.

    Args:
        name: what it is called.
        dtype: of its pipeline.
        device: where it runs.
        acceleration: switches of speed and memory.
        revision: of a teacher on the hub; None: its newest. A student knows its teacher's.

    Raises:
        UserError: There is no such model, or it or this machine does not offer one of the switches.
    """
    check_acceleration(acceleration, device)
    place = device if acceleration.offload == "none" else "cpu"
    model = find_model(name, dtype, place, acceleration.quantization, revision)
    model = replace(model, identity=digest(model.identity.encode(), others_identity(model.pipeline).encode()))
    accelerate_pipeline(model.pipeline, acceleration, device)
    return model


def find_model(
    name: str, dtype: torch.dtype, device: str, quantization: Quantization | None, revision: str | None
) -> Model:
    """The model called `name`, as it was saved but for quantization.

    Raises:
        UserError: There is no such model.
    """
    path = student_folder(name) if name in PLAYGROUND_STUDENTS else teacher_path(name)
    if path is not None and (path / "student.json").is_file():
        pipeline, config = load_student(path, dtype, device, quantization)
        sizes = {name: getattr(config, name) for name in ("height", "width", "num_frames")}
        return Model(
            name=name,
            pipeline=pipeline,
            identity=student_identity(path),
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
            fps=config.fps,
            arguments={**config.pipeline_args, **{name: size for name, size in sizes.items() if size is not None}},
            student=config,
        )
    if path is not None and not (path / "model_index.json").is_file():
        raise UserError(
            f"{name} is no model: it holds neither student.json nor model_index.json\n"
            f"Give playground, {', '.join(PLAYGROUND_STUDENTS)}, a folder of a student or a teacher, or a hub id"
        )
    quantized = None if quantization is None else pipeline_quantization(quantization, dtype)
    pipeline, defaults = load_pipeline(name, dtype, device, quantized, revision), pipeline_defaults(name)
    identify = fingerprint if quantization is None else stored_fingerprint
    sizes = {name: defaults[name] for name in ("height", "width", "num_frames") if name in defaults}
    return Model(
        name=name,
        pipeline=pipeline,
        identity=digest(*(identify(denoiser).encode() for denoiser in denoisers(pipeline).values())),
        num_steps=NUM_TEACHER_STEPS,
        guidance_scale=defaults.get("guidance_scale"),
        fps=defaults.get("fps", DEFAULT_FPS),
        arguments={**defaults.get("pipeline_args", {}), **sizes},
    )


def digest(*parts: bytes) -> str:
    """A hash of several byte strings."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def others_identity(pipeline: DiffusionPipeline) -> str:
    """A hash of the networks around the denoisers: autoencoder, text and image encoders."""
    modules = {name: each for name, each in pipeline.components.items() if isinstance(each, nn.Module)}
    others: dict[str, Any] = {name: modules[name] for name in sorted(modules.keys() - denoisers(pipeline).keys())}
    parts = []
    for name, module in others.items():
        config = getattr(module, "config", None)
        config = config if isinstance(config, Mapping) else {}  # transformers has others
        weights = {weight_name: partial(Tensor.detach, weight) for weight_name, weight in module.named_parameters()}
        parts.append(weights_fingerprint(name, config, weights).encode())
    return digest(*parts)


def student_identity(folder: Path) -> str:
    """A hash of a student's configuration and of both ends of its weight files."""
    weights = [*folder.glob("*.safetensors"), *folder.glob("transformer*/*.safetensors")]
    ends = []
    for path in sorted(weights):
        with path.open("rb") as file:
            head = file.read(1 << 20)
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            ends += [head, file.read()]
    return digest((folder / "student.json").read_bytes(), *ends)


def with_scheduler(model: Model, description: Mapping[str, Any]) -> Model:
    """The teacher at the noise levels of another scheduler, of this "class" and "config"; its pipeline is changed."""
    model.pipeline.register_modules(scheduler=make_scheduler(description))
    return replace(model, identity=digest(model.identity.encode(), json.dumps(description, sort_keys=True).encode()))


def with_arguments(model: Model, arguments: dict[str, Any]) -> Model:
    """The model with further arguments of its pipeline's call.

    Raises:
        UserError: The pipeline does not take one of them, or it would change a student's noise levels or guidance.
    """
    if model.student is not None and (own := [name for name in arguments if name in SCHEDULE_ARGUMENTS]):
        raise UserError(
            f"{model.name} is a student: its noise levels and guidance came with its weights, and it knows no others\n"
            f"Leave {own[0]} out of --pipeline-arg"
        )
    accepted = call_parameters(model.pipeline)
    if unknown := [name for name in arguments if name not in accepted]:
        raise UserError(
            f"{type(model.pipeline).__name__} takes no {unknown[0]}; it takes {', '.join(list(accepted)[1:])}"
        )
    return replace(model, arguments={**model.arguments, **arguments})


def check_student(model: Model, num_steps: int | None, guidance_scale: float | None) -> None:
    """Refuse to run a student otherwise than it was distilled to run.

    Raises:
        UserError: It is a student, and steps or guidance are not its own.
    """
    if model.student is None:
        return
    if num_steps not in (None, model.num_steps, *model.student.other_num_steps):
        known = " or ".join(map(str, (model.num_steps, *model.student.other_num_steps)))
        raise UserError(
            f"{model.name} is a student of {known} steps and cannot take {num_steps}: it knows no other "
            f"noise levels\nLeave --num-steps out, or record and distill with --num-student-steps {num_steps}"
        )
    if guidance_scale not in (None, model.guidance_scale):
        raise UserError(
            f"{model.name} is a student: the teacher's guidance {model.student.teacher_guidance_scale} is distilled "
            "into it\nLeave --guidance-scale out, or record and distill with another"
        )
