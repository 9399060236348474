"""Exports are proven by round trips: plain diffusers, without accvideo, makes the same frames from them."""

import inspect
import json
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.loaders import lora_conversion_utils, lora_pipeline, single_file_utils
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from accvideo.export import ExportConfig, export
from accvideo.generate import sample_clips
from accvideo.model import load_model
from accvideo.record import RecordConfig, record
from accvideo.student import Student, StudentConfig, read_student_config, save_student, student_config
from accvideo.teacher import denoisers, fingerprint, item_generator, load_pipeline
from accvideo.trajectory import TrajectoryFolder
from accvideo.types import UserError
from tests.tiny import TINY_CALL, TINY_HUNYUAN_CALL, tiny_hunyuan_pipeline, tiny_wan_i2v_pipeline, tiny_wan_pipeline

PROMPT = "a red square"
SEED = 5
HUNYUAN_WIDTH = 20
"""Of `tiny_hunyuan_pipeline`; diffusers' conversions have the released model's 3072 written into them."""


@dataclass(frozen=True)
class Case:
    """A teacher, and how its student is made."""

    pipeline: Callable[[], Any]
    call: dict[str, Any]
    guidance_scale: float
    rank: int | None


CASES = {
    "wan-unipc-lora": Case(lambda: tiny_wan_pipeline("unipc"), TINY_CALL, 3.0, 4),
    "wan-dpm-full": Case(lambda: tiny_wan_pipeline("dpm"), TINY_CALL, 3.0, None),
    "wan-euler-lora": Case(lambda: tiny_wan_pipeline("euler"), TINY_CALL, 3.0, 4),
    "wan-experts-lora": Case(lambda: tiny_wan_pipeline("unipc", experts=2), TINY_CALL, 3.0, 4),
    "wan-experts-full": Case(lambda: tiny_wan_pipeline("dpm", experts=2), TINY_CALL, 3.0, None),
    "hunyuan-lora": Case(tiny_hunyuan_pipeline, TINY_HUNYUAN_CALL, 6.0, 4),
    "hunyuan-full": Case(tiny_hunyuan_pipeline, TINY_HUNYUAN_CALL, 6.0, None),
}


def make_student(folder: Path, case: Case) -> Path:
    """Record `folder/teacher` and save a student that has moved away from it; returns `folder/student`."""
    case.pipeline().save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text(PROMPT)
    sizes = {name: case.call[name] for name in ("height", "width", "num_frames")}
    record(
        RecordConfig(
            teacher=str(folder / "teacher"),
            prompts=folder / "prompts.txt",
            out=folder / "data",
            num_steps=10,
            num_student_steps=5,
            guidance_scale=case.guidance_scale,
            pipeline_arg=tuple(f"{name}={json.dumps(v)}" for name, v in case.call.items() if name not in sizes),
            **sizes,
        )
    )
    data = TrajectoryFolder(folder / "data")
    student = moved(Student(denoisers(load_pipeline(str(folder / "teacher"))), case.rank, keep_teacher=False))
    config = student_config(data.manifest, data[0].calls, case.rank, {"num_iterations": 3})
    (folder / "student").mkdir()
    save_student(folder / "student", student, config, {"latent_error": 0.25})
    (folder / "student/metrics.jsonl").write_text('{"iteration": 2, "validation_loss": [0.5], "latent_error": 0.25}\n')
    return folder / "student"


def moved(student: Student) -> Student:
    """The student, with other weights than its teacher's."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.trained().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return student


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_student(tmp_path_factory.mktemp(name), case) for name, case in CASES.items()}


@dataclass(frozen=True)
class Clip:
    """What a pipeline made."""

    frames: np.ndarray
    latents: Tensor


@pytest.fixture(scope="module")
def generated(students: dict[str, Path]) -> dict[str, Clip]:
    """By `accvideo generate`'s own function."""
    clips = {}
    for name, folder in students.items():
        [batch] = sample_clips(load_model(str(folder)), [PROMPT], [0], seed=SEED)
        clips[name] = Clip(batch.frames.numpy(), batch.latents)
    return clips


def noise_seed() -> int:
    """The seed of the generator of item 0."""
    return item_generator(SEED, 0).initial_seed()


def run_pipeline(pipeline: Any, call: dict[str, Any], guidance_scale: float = 1.0) -> Tensor:
    """Latents of a plain diffusers call."""
    return pipeline(
        PROMPT,
        num_inference_steps=5,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(noise_seed()),
        output_type="latent",
        **call,
    ).frames


PLAIN_DIFFUSERS = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "accvideo":
            raise ImportError("accvideo is not installed here")

sys.meta_path.insert(0, Absent())
import numpy, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for folder, out, call, seed in json.load(sys.stdin):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    for kind in ("np", "latent"):
        frames = pipeline("a red square", num_inference_steps=5, guidance_scale=1, output_type=kind,
                          generator=torch.Generator().manual_seed(seed), **call).frames
        numpy.save(f"{out}/{kind}.npy", numpy.asarray(frames))
assert "accvideo" not in sys.modules
"""


@pytest.fixture(scope="module")
def plain(students: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Clip]:
    """By `DiffusionPipeline.from_pretrained(folder)` in a process that cannot import accvideo."""
    jobs = []
    for name, student in students.items():
        out = tmp_path_factory.mktemp(f"export-{name}")
        export(ExportConfig(student=str(student), to="diffusers", out=out / "folder"))
        jobs.append((str(out / "folder"), str(out), CASES[name].call, noise_seed()))
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_DIFFUSERS], input=json.dumps(jobs), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    clips = {}
    for name, (_, out, _, _) in zip(students, jobs, strict=True):
        frames, latents = np.load(f"{out}/np.npy"), np.load(f"{out}/latent.npy")
        clips[name] = Clip((frames * 255).round().astype(np.uint8), torch.from_numpy(latents))
    return clips


@pytest.mark.parametrize("name", CASES)
def test_plain_diffusers_makes_the_same_frames(generated: dict[str, Clip], plain: dict[str, Clip], name: str):
    """Bit for bit in float32, from a folder alone, K steps, guidance 1, where accvideo cannot be imported."""
    assert torch.equal(plain[name].latents, generated[name].latents)
    assert np.array_equal(plain[name].frames, generated[name].frames)


def test_students_have_moved(students: dict[str, Path], generated: dict[str, Clip]):
    """The comparison above would be empty if the student were its teacher."""
    for name in ("wan-unipc-lora", "hunyuan-full"):
        teacher = load_pipeline(str(students[name].parent / "teacher"))
        teacher.scheduler = load_model(str(students[name])).pipeline.scheduler
        latents = run_pipeline(teacher, CASES[name].call, 1.0 if "wan" in name else 6.0)
        assert not torch.allclose(latents, generated[name].latents, atol=1e-2)
