import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from accvideo.distill import DistillConfig, distill
from accvideo.generate import sample_clips
from accvideo.inference.config import Acceleration
from accvideo.inference.model import PLAYGROUND_STUDENTS, load_model, with_arguments
from accvideo.playground.judge import judge
from accvideo.playground.world import sample_prompts
from accvideo.types import UserError
from tests.recorded import record_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher`, `lora` and `full`: a tiny Wan pipeline and two students of it, distilled for a moment."""
    folder = tmp_path_factory.mktemp("models")
    record_tiny(folder)
    settings: dict[str, Any] = {"num_iterations": 5, "num_validation": 2, "lora_rank": 4, "batch_size": 2}
    for name in ("lora", "full"):
        distill(DistillConfig(data=folder / "data", out=folder / name, full=name == "full", **settings))
    return folder


def latents(name: Path, acceleration: Acceleration) -> torch.Tensor:
    """What a model makes of one prompt and one noise."""
    model = load_model(str(name), acceleration=acceleration)
    model = with_arguments(model, {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16})
    return next(sample_clips(model, ["a red square"], [0])).latents


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
@pytest.mark.parametrize("name", ["teacher", "lora"])
def test_another_decoder_or_text_encoder_is_another_model(folder: Path, tmp_path: Path, name: str, part: str):
    """Else clips of the old one would be shown for those of the new one, from `evaluate`'s cache."""
    shutil.copytree(folder, tmp_path / "copy")
    before = load_model(str(folder / name)).identity
    description = tmp_path / "copy" / "lora" / "student.json"
    moved = json.loads(description.read_text()) | {"teacher": str(tmp_path / "copy" / "teacher")}
    description.write_text(json.dumps(moved))
    same = load_model(str(tmp_path / "copy" / name)).identity
    assert (same == before) == (name == "teacher")  # a student's identity holds where its teacher is
    (path,) = (tmp_path / "copy" / "teacher" / part).glob("*.safetensors")
    weights = load_file(path)
    longest = max(weights, key=lambda key: weights[key].numel())
    weights[longest] = weights[longest] * 1.5
    save_file(weights, path, {"format": "pt"})
    assert load_model(str(tmp_path / "copy" / name)).identity != same


@pytest.mark.parametrize("name", ["teacher", "lora", "full"])
def test_quantized_models_have_their_identity_and_nearly_their_results(folder: Path, name: str):
    """Weights are known again although a quantized denoiser holds others; a LoRA lies on the quantized base."""
    pytest.importorskip("torchao")
    quantized = Acceleration(quantization="int8")
    plain = load_model(str(folder / name))
    model: Any = load_model(str(folder / name), acceleration=quantized)
    assert model.identity == plain.identity
    linear = model.pipeline.transformer.blocks[0].ffn.net[2]
    assert (linear.base_layer if name == "lora" else linear).weight.qdata.dtype == torch.int8
    expected = latents(folder / name, Acceleration())
    error = (latents(folder / name, quantized) - expected).norm() / expected.norm()
    assert 0 < error < 0.02


def test_student_of_another_teacher_is_refused_quantized_too(folder: Path, tmp_path: Path):
    pytest.importorskip("torchao")
    student = tmp_path / "student"
    student.mkdir()
    for path in (folder / "lora").glob("*"):
        if path.is_file():
            (student / path.name).write_bytes(path.read_bytes())
    text = (student / "student.json").read_text()
    known = load_model(str(folder / "lora")).student
    assert known is not None
    (student / "student.json").write_text(text.replace(known.fingerprints["transformer"], "0" * 64))
    with pytest.raises(UserError, match="student of another teacher"):
        load_model(str(student), acceleration=Acceleration(quantization="int8"))


@pytest.mark.parametrize(("name", "num_steps"), [("playground-student", 5), ("playground-student-2", 2)])
def test_the_students_that_ship_follow_prompts(name: str, num_steps: int):
    """In as many calls as their names say, and small enough to ship."""
    assert sum(path.stat().st_size for path in PLAYGROUND_STUDENTS[name].rglob("*")) <= 10_000_000
    model, prompts = load_model(name), sample_prompts(16, seed=3)
    right, calls = 0, set[int]()
    for clips in sample_clips(model, prompts, list(range(16)), batch_size=16):
        right += int(judge(clips.frames, prompts).all_right.sum())
        calls.add(clips.denoiser_calls)
    assert right >= 12 and calls == {num_steps}


def test_unknown_models_and_arguments(tmp_path: Path, folder: Path):
    with pytest.raises(UserError, match="is no model"):
        load_model(str(tmp_path))
    with pytest.raises(UserError, match="WanPipeline takes no strength; it takes .*num_inference_steps"):
        with_arguments(load_model(str(folder / "teacher")), {"strength": 0.5})
