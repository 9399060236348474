"""A student with as much of its teacher as an export needs; no weight is read before it is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from accvideo.data.schema import loads
from accvideo.exporting.config import ExportConfig
from accvideo.exporting.lora import merge_lora, read_lora
from accvideo.exporting.weights import LazyTensor, Weights, read_weights
from accvideo.inference.student_config import StudentConfig
from accvideo.student import LORA_FILES
from accvideo.teacher import teacher_path, weights_fingerprint
from accvideo.types import UserError

FOREIGN_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.onnx")
"""Not copied: the same weights in formats that run code, or for other libraries."""


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


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
