"""Exports are proven by round trips: plain diffusers, without accvideo, makes the same frames from them."""

import inspect
import json
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers.utils
import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.loaders import lora_conversion_utils, lora_pipeline, single_file_utils
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from accvideo.data.dataset import TrajectoryFolder
from accvideo.export import export
from accvideo.exporting.config import ExportConfig
from accvideo.exporting.lora import low_rank
from accvideo.exporting.weights import in_memory, read_weights, write_weights
from accvideo.generate import generate, sample_clips
from accvideo.inference.config import GenerateConfig
from accvideo.inference.model import load_model
from accvideo.inference.student_config import read_student_config, student_config
from accvideo.record import record
from accvideo.recording.config import RecordConfig
from accvideo.student import Student, save_student
from accvideo.teacher import denoisers, fingerprint, item_generator, load_pipeline
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


def load_lora(student: Path, file: Path, call: dict[str, Any], guidance_scale: float) -> Tensor:
    """Latents of the bare teacher with exported LoRAs, fused, and the student's scheduler."""
    pipeline: Any = DiffusionPipeline.from_pretrained(student.parent / "teacher")
    files = sorted(file.glob("*.safetensors"))
    for path in files:  # high noise before low, and the first LoRA before the second
        second = {"load_into_transformer_2": True} if path != files[0] else {}
        pipeline.load_lora_weights(path.parent, weight_name=path.name, **second)
    pipeline.fuse_lora(components=list(denoisers(pipeline)))
    pipeline.unload_lora_weights()
    pipeline.scheduler = load_model(str(student)).pipeline.scheduler
    return run_pipeline(pipeline, call, guidance_scale)


LORA_CASES = [name for name in CASES if name.endswith("lora")]


@pytest.mark.parametrize("name", LORA_CASES)
def test_load_lora_weights_makes_the_same_frames(
    students: dict[str, Path], generated: dict[str, Clip], tmp_path: Path, name: str
):
    export(ExportConfig(student=str(students[name]), to="lora", out=tmp_path / "lora"))
    guidance = 6.0 if "hunyuan" in name else 1.0
    latents = load_lora(students[name], tmp_path / "lora", CASES[name].call, guidance)
    assert torch.equal(latents, generated[name].latents)


def with_width(function: Any, width: int) -> Any:
    """A function of diffusers with another width than HunyuanVideo's 3072 written into it."""

    def changed(code: types.CodeType) -> types.CodeType:
        constants = tuple(
            changed(each) if isinstance(each, types.CodeType) else width if each == 3072 else each
            for each in code.co_consts
        )
        return code.replace(co_consts=constants)

    return types.FunctionType(changed(function.__code__), function.__globals__)


@pytest.mark.parametrize("name", LORA_CASES)
def test_the_comfyui_file_loaded_by_diffusers_makes_the_same_frames(
    students: dict[str, Path], generated: dict[str, Clip], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    """Diffusers converts the original layout of LoRAs itself; stacked q, k and v come apart again."""
    convert = with_width(lora_conversion_utils._convert_hunyuan_video_lora_to_diffusers, HUNYUAN_WIDTH)
    monkeypatch.setattr(lora_pipeline, "_convert_hunyuan_video_lora_to_diffusers", convert)
    export(ExportConfig(student=str(students[name]), to="comfyui", out=tmp_path / "lora"))
    for path in (tmp_path / "lora").glob("*.safetensors"):
        assert all(key.startswith("diffusion_model.") for key in load_file(path))
    latents = load_lora(students[name], tmp_path / "lora", CASES[name].call, 6.0 if "hunyuan" in name else 1.0)
    assert torch.allclose(latents, generated[name].latents, atol=1e-5)


def comfyui_lora_keys(original: dict[str, Tensor]) -> dict[str, str]:
    """LoRA key -> weight in the original layout, as ComfyUI maps them.

    Its models of Wan keep the original names, and a LoRA names them with the prefix `diffusion_model.`. Its model of
    HunyuanVideo has names of its own, of which a LoRA may use the original ones for all but the embedders.
    """
    renamed = {
        "txt_in.t_embedder.mlp.0": "txt_in.t_embedder.in_layer",
        "txt_in.t_embedder.mlp.2": "txt_in.t_embedder.out_layer",
        "txt_in.c_embedder.linear_1": "txt_in.c_embedder.in_layer",
        "txt_in.c_embedder.linear_2": "txt_in.c_embedder.out_layer",
        "time_in.mlp.0": "time_in.in_layer",
        "time_in.mlp.2": "time_in.out_layer",
        "guidance_in.mlp.0": "guidance_in.in_layer",
        "guidance_in.mlp.2": "guidance_in.out_layer",
    }
    modules = [name.removesuffix(".weight") for name in original if name.endswith(".weight")]
    return {f"diffusion_model.{renamed.get(module, module)}": f"{module}.weight" for module in modules}


@pytest.mark.parametrize("name", ["wan-unipc-lora", "hunyuan-lora", "wan-dpm-full", "hunyuan-full"])
def test_the_comfyui_file_added_to_the_original_weights_is_the_student(
    students: dict[str, Path], tmp_path: Path, name: str
):
    """What ComfyUI does: `weight + lora_B @ lora_A`, on every layer that the student changed."""
    student, rank = students[name], 24 if name.endswith("full") else None
    teacher = teacher_as_student(student, tmp_path / "same")
    originals = []
    for each in (teacher, student):
        export(ExportConfig(student=str(each), to="original", out=tmp_path / f"{each.name}.safetensors"))
        originals.append(load_file(tmp_path / f"{each.name}.safetensors"))
    export(ExportConfig(student=str(student), to="comfyui", out=tmp_path / "lora.safetensors", rank=rank))
    lora, keys = load_file(tmp_path / "lora.safetensors"), comfyui_lora_keys(originals[0])
    modules = {key.removesuffix(".lora_A.weight") for key in lora if key.endswith("lora_A.weight")}
    assert len(lora) == 2 * len(modules) and modules <= keys.keys()
    covered = 0
    for module in modules:
        before, after = (original[keys[module]] for original in originals)
        change = lora[f"{module}.lora_B.weight"] @ lora[f"{module}.lora_A.weight"]
        assert (after - before).norm() > 0.1
        if rank is None or min(before.shape) <= rank:
            assert torch.allclose(before + change, after, atol=2e-5), module
            covered += 1
    assert covered >= 20
    left = {key for key in originals[0] if key not in {keys[module] for module in modules}}
    linear_left = [key for key in left if originals[0][key].ndim == 2 and key.endswith(".weight")]
    assert name.endswith("lora") or not linear_left


def teacher_as_student(student: Path, folder: Path) -> Path:
    """A student of full weights that is its teacher."""
    config = replace(read_student_config(student), lora_rank=None)
    pipeline = load_pipeline(config.teacher)
    save_student(folder, Student(denoisers(pipeline), None, keep_teacher=False), config, {})
    return folder


def own_weights(student: Path) -> dict[str, dict[str, Tensor]]:
    """A student's denoisers as accvideo loads them."""
    return {name: model.state_dict() for name, model in denoisers(load_model(str(student)).pipeline).items()}


@pytest.mark.parametrize("name", CASES)
def test_diffusers_converts_the_original_file_back_bit_for_bit(students: dict[str, Path], tmp_path: Path, name: str):
    export(ExportConfig(student=str(students[name]), to="original", out=tmp_path / "original"))
    files = sorted(path.name for path in (tmp_path / "original").glob("*.safetensors"))
    two = ["model_high_noise.safetensors", "model_low_noise.safetensors"]
    assert files == (two if "experts" in name else ["model.safetensors"])
    for file, expected in zip(files, own_weights(students[name]).values(), strict=True):
        assert_converts(load_file(tmp_path / "original" / file), expected)


def assert_converts(original: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Diffusers' conversion of `original` is `expected`, bit for bit."""
    if "double_blocks.0.img_mod.linear.weight" in original:
        convert = with_width(single_file_utils.convert_hunyuan_video_transformer_to_diffusers, HUNYUAN_WIDTH)
    else:
        convert = single_file_utils.convert_wan_transformer_to_diffusers
    converted = convert(dict(original))
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], tensor) for key, tensor in expected.items())


def test_the_constant_in_diffusers_conversion_is_hunyuan_videos_width():
    """`with_width` changes what it is meant to, and nothing else is 3072."""
    assert inspect.signature(HunyuanVideoTransformer3DModel.__init__).parameters["attention_head_dim"].default == 128
    source = inspect.getsource(single_file_utils.convert_hunyuan_video_transformer_to_diffusers)
    assert source.count("3072") == 1 and "hidden_size = 3072" in source


def test_from_single_file_reads_the_original_file(students: dict[str, Path], tmp_path: Path):
    student = students["wan-unipc-lora"]
    export(ExportConfig(student=str(student), to="original", out=tmp_path / "model.safetensors"))
    model = WanTransformer3DModel.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(student.parent / "teacher"), subfolder="transformer"
    )
    [expected] = own_weights(student).values()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def i2v_student(students: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of Wan image-to-video, whose denoiser has an image embedder and attends to it."""
    folder = tmp_path_factory.mktemp("i2v")
    pipeline: Any = tiny_wan_i2v_pipeline()
    settings = {name: value for name, value in pipeline.transformer.config.items() if not name.startswith("_")}
    settings["added_kv_proj_dim"] = 24  # as in the released model
    pipeline.register_modules(transformer=WanTransformer3DModel.from_config(settings))
    pipeline.save_pretrained(folder / "teacher")
    teacher = load_pipeline(str(folder / "teacher"))
    config = replace(
        read_student_config(students["wan-unipc-lora"]),
        teacher=str(folder / "teacher"),
        pipeline_class="WanImageToVideoPipeline",
        fingerprints={"transformer": fingerprint(teacher.transformer)},
        lora_rank=None,
    )
    save_student(folder / "student", moved(Student(denoisers(teacher), None, keep_teacher=False)), config, {})
    return folder / "student"


def test_image_to_video_converts_back(i2v_student: Path, tmp_path: Path):
    export(ExportConfig(student=str(i2v_student), to="original", out=tmp_path / "model.safetensors"))
    original = load_file(tmp_path / "model.safetensors")
    assert {"img_emb.proj.1.weight", "blocks.0.cross_attn.k_img.weight"} <= original.keys()
    [expected] = own_weights(i2v_student).values()
    assert_converts(original, expected)


def test_an_image_to_video_lora_for_comfyui_comes_back(i2v_student: Path, tmp_path: Path):
    """All linear layers, embedders included, at full rank: diffusers' conversion gives the exported LoRA back."""
    for target in ("lora", "comfyui"):
        out = tmp_path / f"{target}.safetensors"
        export(ExportConfig(student=str(i2v_student), to=target, out=out, rank=8))
    ours = load_file(tmp_path / "lora.safetensors")
    converted = lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers(
        load_file(tmp_path / "comfyui.safetensors")
    )
    assert converted.keys() == ours.keys()
    assert all(torch.equal(converted[key], tensor) for key, tensor in ours.items())


def test_an_image_to_video_folder_has_its_image_encoder(i2v_student: Path, tmp_path: Path):
    export(ExportConfig(student=str(i2v_student), to="diffusers", out=tmp_path / "folder"))
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "folder")
    teacher: Any = DiffusionPipeline.from_pretrained(i2v_student.parent / "teacher")
    for name in ("image_encoder", "text_encoder", "vae"):
        ours, theirs = getattr(pipeline, name).state_dict(), getattr(teacher, name).state_dict()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert pipeline.image_processor.size == teacher.image_processor.size
    assert pipeline.tokenizer("a b").input_ids == teacher.tokenizer("a b").input_ids


@pytest.fixture(scope="module")
def merged(students: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of full weights that differs from its teacher by a LoRA of rank 4."""
    student = students["wan-unipc-lora"]
    folder = tmp_path_factory.mktemp("merged") / "student"
    pipeline = load_model(str(student)).pipeline
    config = replace(read_student_config(student), lora_rank=None)
    save_student(folder, Student(denoisers(pipeline), None, keep_teacher=False), config, {})
    return folder


def test_extraction_finds_a_low_rank_change_exactly(
    merged: Path, students: dict[str, Path], generated: dict[str, Clip], tmp_path: Path
):
    """At the rank of the change nothing is left out, and the LoRA makes the student's frames from the teacher."""
    total = {}
    for rank in (1, 2, 3, 4):
        out = tmp_path / f"rank{rank}"
        result = export(ExportConfig(student=str(merged), to="lora", out=out, rank=rank))
        total[rank] = result["total_error"]["transformer"]
        assert result["not_covered"] == {"transformer": {}}
        assert result["errors"]["transformer"]["condition_embedder.time_proj"] == 0  # did not change
    assert total[1] > total[2] > total[3] > 0.05 and total[4] < 1e-5
    latents = load_lora(students["wan-unipc-lora"], tmp_path / "rank4", TINY_CALL, 1.0)
    assert torch.allclose(latents, generated["wan-unipc-lora"].latents, atol=1e-4)


@pytest.mark.parametrize("name", ["wan-dpm-full", "hunyuan-full"])
def test_what_is_left_out_is_the_tail_of_the_singular_values(students: dict[str, Path], tmp_path: Path, name: str):
    """Eckart and Young: the error of each layer is that of the best matrix of the rank; the rest is listed."""
    student = students[name]
    before = denoisers(load_pipeline(str(student.parent / "teacher")))["transformer"]
    [after] = own_weights(student).values()
    result = export(ExportConfig(student=str(student), to="lora", out=tmp_path / "lora", rank=3))
    linear = {name for name, module in before.named_modules() if isinstance(module, torch.nn.Linear)}
    assert result["errors"]["transformer"].keys() == linear
    assert result["not_covered"]["transformer"].keys() == after.keys() - {f"{name}.weight" for name in linear}
    lora = load_file(tmp_path / "lora/pytorch_lora_weights.safetensors")
    for module, error in result["errors"]["transformer"].items():
        change = (after[f"{module}.weight"] - before.get_submodule(module).weight).detach()
        values = torch.linalg.svdvals(change.double())
        assert error == pytest.approx(float(values[3:].norm() / values.norm()), abs=1e-5)
        rest = change - lora[f"transformer.{module}.lora_B.weight"] @ lora[f"transformer.{module}.lora_A.weight"]
        assert error == pytest.approx(float(rest.norm() / change.norm()), abs=1e-5)


def test_large_matrices_are_decomposed_nearly_as_well():
    """Subspace iteration against the exact decomposition, for a spectrum that falls slowly."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 1030, generator=generator))[0] for size in (1040, 1030))
    values = 1 / torch.arange(1, 1031).sqrt()
    matrix = (left * values) @ right.mT
    factors = low_rank(matrix, 16)
    assert float((matrix - factors.change).norm() / values[16:].norm()) < 1.001


def test_the_full_weights_of_a_layer_smaller_than_the_rank_are_kept(students: dict[str, Path], tmp_path: Path):
    result = export(ExportConfig(student=str(students["wan-dpm-full"]), to="lora", out=tmp_path / "lora", rank=40))
    assert max(result["errors"]["transformer"].values()) < 1e-5
    tensors = load_file(tmp_path / "lora/pytorch_lora_weights.safetensors")
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {40}


def test_weights_may_be_split_into_files(students: dict[str, Path], tmp_path: Path):
    """As diffusers splits them; what it loads is the same."""
    student = students["wan-dpm-full"]
    export(ExportConfig(student=str(student), to="diffusers", out=tmp_path / "folder", max_shard_size=2e-5))
    folder = tmp_path / "folder/transformer"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 2e4 + 8e3 for path in files)
    [expected] = own_weights(student).values()
    loaded = WanTransformer3DModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())


def test_types(students: dict[str, Path], tmp_path: Path):
    """Weights are rounded once, after the LoRA is merged; what diffusers keeps in float32 stays so."""
    student = students["wan-unipc-lora"]
    export(ExportConfig(student=str(student), to="diffusers", out=tmp_path / "folder", dtype="bfloat16"))
    [exact] = own_weights(student).values()
    stored = load_file(tmp_path / "folder/transformer/diffusion_pytorch_model.safetensors")
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "folder/transformer", torch_dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        assert stored[name].dtype == parameter.dtype
        assert torch.equal(stored[name], exact[name].to(parameter.dtype))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32, torch.bfloat16}


def test_the_schedule_travels_in_every_form(students: dict[str, Path], tmp_path: Path):
    student = students["hunyuan-lora"]
    config = read_student_config(student)
    for target in ("diffusers", "lora", "comfyui", "original"):
        export(ExportConfig(student=str(student), to=target, out=tmp_path / target))
        call = json.loads((tmp_path / target / "accvideo.json").read_text())
        assert (call["sigmas"], call["guidance_scale"], call["num_steps"]) == (config.sigmas, 6.0, 5)
        assert call["pipeline_args"] == config.pipeline_args
        card = (tmp_path / target / "README.md").read_text()
        assert "1.000000, 0.965517, 0.913043, 0.823529, 0.636364, 0.000000" in card
        everything = [path.read_text() for pattern in ("*.json", "*.md") for path in (tmp_path / target).rglob(pattern)]
        assert not any(str(student.parent) in text for text in everything)  # no path of this machine
    with safe_open(tmp_path / "comfyui/lora.safetensors", "pt") as file:
        assert json.loads(file.metadata()["accvideo"])["sigmas"] == config.sigmas


def test_accvideo_runs_the_exported_folder(students: dict[str, Path], generated: dict[str, Clip], tmp_path: Path):
    """With the sizes and arguments of the student, and its number of steps."""
    export(ExportConfig(student=str(students["hunyuan-full"]), to="diffusers", out=tmp_path / "folder"))
    [batch] = sample_clips(load_model(str(tmp_path / "folder")), [PROMPT], [0], seed=SEED, num_steps=5)
    assert torch.equal(batch.latents, generated["hunyuan-full"].latents)


@pytest.mark.parametrize("scale", [1.0, 3.0, 6.0])
def test_embedded_guidance_is_baked_in(
    students: dict[str, Path], generated: dict[str, Clip], tmp_path: Path, scale: float
):
    """The student of HunyuanVideo was trained at guidance 6; its folder takes every scale for that."""
    export(ExportConfig(student=str(students["hunyuan-lora"]), to="diffusers", out=tmp_path / "folder"))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "folder")
    latents = run_pipeline(pipeline, TINY_HUNYUAN_CALL, scale)
    assert torch.equal(latents, generated["hunyuan-lora"].latents)


def run_card(folder: Path, student: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The frames that the Python in a model card makes, on a CPU in float32."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    for before, after in (('"FOLDER"', repr(str(folder))), ('"teacher"', repr(str(student.parent / "teacher")))):
        code = code.replace(before, after)
    code = code.replace("bfloat16", "float32").replace('.to("cuda")', '.to("cpu")').replace("a prompt", PROMPT)
    code = code.replace("frames = pipeline(", "frames = pipeline(output_type='np', generator=generator, prompt=")
    assert "imageio imageio-ffmpeg`" in (folder / "README.md").read_text()
    shown: list[Any] = []  # writing the file takes these two, which the tests do without
    monkeypatch.setattr(diffusers.utils, "export_to_video", lambda frames, path, fps: shown.append((frames, path, fps)))
    exec(compile(code, "README.md", "exec"), {"generator": torch.Generator().manual_seed(noise_seed())})
    [(frames, path, fps)] = shown
    assert (path, fps) == ("video.mp4", 16)
    return frames


@pytest.mark.parametrize("name", ["wan-euler-lora", "wan-experts-lora", "hunyuan-lora"])
@pytest.mark.parametrize("target", ["diffusers", "lora"])
def test_the_card_says_how_to_run_it(
    students: dict[str, Path],
    generated: dict[str, Clip],
    tmp_path: Path,
    name: str,
    target: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    """Its Python, run as it stands, makes the student's frames."""
    export(ExportConfig(student=str(students[name]), to=target, out=tmp_path / "folder"))
    frames = run_card(tmp_path / "folder", students[name], monkeypatch)
    assert np.abs(frames * 255 - generated[name].frames[0]).max() < 0.6


def test_the_card_is_in_the_hubs_format(students: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    student = students["hunyuan-lora"]
    rows = [{"name": "student", "num_steps": 5, "denoiser_calls": 5, "seconds_denoising": 0.125}]
    rows[0]["metrics"] = {"flicker": {"mean": 4.25, "low": 4.0, "high": 4.5}}
    (tmp_path / "report.json").write_text(json.dumps({"rows": rows, "num_prompts": 96}))
    (student.parent / "teacher/LICENSE").write_text("Tencent Hunyuan Community License")
    export(ExportConfig(student=str(student), to="lora", out=tmp_path / "lora", report=tmp_path / "report.json"))
    card = ModelCard.load(tmp_path / "lora/README.md")
    card.data.to_dict()
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-video")
    assert card.data.license_name == "tencent-hunyuan-community"
    assert {"distillation", "lora", "text-to-video"} <= set(card.data.tags)
    for fact in ("latent_error | 0.25", "num_iterations | 3", "LoRA of rank 4", "flicker", "4.25", "96 prompts"):
        assert fact in card.text, fact
    assert "European Union" in card.text and "European Union" in capsys.readouterr().err
    assert (tmp_path / "lora/LICENSE").read_text().startswith("Tencent")


def test_comfyuis_simple_schedule_at_the_cards_shift_is_the_students(students: dict[str, Path], tmp_path: Path):
    """ComfyUI takes every (1000 / K)-th of 1000 shifted levels; other students get their levels as a list."""
    cards = {}
    for name in ("hunyuan-lora", "wan-unipc-lora", "wan-euler-lora"):
        export(ExportConfig(student=str(students[name]), to="comfyui", out=tmp_path / name))
        cards[name] = (tmp_path / name / "README.md").read_text()
    assert "ModelSamplingSD3 with shift 7, and KSampler with 5 steps, cfg 1" in cards["hunyuan-lora"]
    assert "FluxGuidance gives the guidance, 6" in cards["hunyuan-lora"]
    assert "ModelSamplingSD3 with shift 5, and KSampler" in cards["wan-unipc-lora"]
    assert "KSampler with" not in cards["wan-euler-lora"]
    levels = cards["wan-euler-lora"].split("ManualSigmas: `")[1].split("`")[0]
    expected = read_student_config(students["wan-euler-lora"]).sigmas
    assert [float(level) for level in levels.split(",")] == pytest.approx(expected, abs=1e-6)


def changed_config(student: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a student whose configuration differs."""
    shutil.copytree(student, folder)
    values = json.loads((student / "student.json").read_text()) | changes
    (folder / "student.json").write_text(json.dumps(values))
    return folder


def test_mistakes(students: dict[str, Path], tmp_path: Path):
    """Each is explained, and nothing is written."""
    lora, full = str(students["wan-unipc-lora"]), str(students["wan-dpm-full"])
    out = tmp_path / "out"

    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=message):
            export(ExportConfig(**{"student": lora, "to": "lora", "out": out} | settings))
        assert not out.exists() and not list(tmp_path.glob(".*"))

    refused("holds no finished student", student=str(tmp_path))
    refused("say of which rank", student=full)
    refused("say of which rank", student=full, to="comfyui")
    refused("is a LoRA of rank 4 already", rank=8)
    refused("takes no --rank", to="original", rank=8)
    refused("rank is 0", rank=0, student=full)
    refused("max_shard_size is 0", max_shard_size=0)
    refused("writes a folder", to="diffusers", out=tmp_path / "x.safetensors")
    refused("has 2 denoisers", student=str(students["wan-experts-lora"]), out=tmp_path / "x.safetensors")
    (tmp_path / "notes.json").write_text("{}")
    refused("is not a report.json", report=tmp_path / "notes.json")
    refused("cannot read", report=tmp_path / "missing.json")

    other = changed_config(students["wan-unipc-lora"], tmp_path / "other", fingerprints={"transformer": "0"})
    refused("student of another teacher", student=str(other), to="diffusers")
    levels = {"class": "KeyPointScheduler", "config": {}}
    irregular = changed_config(students["wan-unipc-lora"], tmp_path / "irregular", scheduler=levels)
    refused("no scheduler of diffusers takes a plain WanPipeline", student=str(irregular), to="diffusers")
    teacher = students["wan-unipc-lora"].parent / "teacher"
    shutil.copytree(teacher, tmp_path / "teacher")
    settings = json.loads((teacher / "transformer/config.json").read_text())
    settings["_class_name"] = "MochiTransformer3DModel"
    (tmp_path / "teacher/transformer/config.json").write_text(json.dumps(settings))
    strange = changed_config(students["wan-unipc-lora"], tmp_path / "strange", teacher=str(tmp_path / "teacher"))
    refused("original layout of MochiTransformer3DModel is not known; known are", student=str(strange), to="comfyui")


def test_only_an_earlier_export_is_replaced(students: dict[str, Path], tmp_path: Path):
    student, out = str(students["wan-unipc-lora"]), tmp_path / "out"
    out.mkdir()  # an empty folder is fine
    export(ExportConfig(student=student, to="original", out=out))
    export(ExportConfig(student=student, to="lora", out=out))
    files = ["README.md", "accvideo.json", "pytorch_lora_weights.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == files
    (out / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="holds something else \\(thesis.txt\\)"):
        export(ExportConfig(student=student, to="lora", out=out))
    (tmp_path / "file").write_text("dear")
    with pytest.raises(UserError, match="is a file"):
        export(ExportConfig(student=student, to="lora", out=tmp_path / "file"))
    (tmp_path / "lora.safetensors").write_text("dear")
    with pytest.raises(UserError, match="lora.safetensors exists"):
        export(ExportConfig(student=student, to="lora", out=tmp_path / "lora.safetensors"))
    assert (out / "thesis.txt").read_text() == (tmp_path / "lora.safetensors").read_text() == "dear"


def test_a_lora_is_exported_without_its_teacher(students: dict[str, Path], tmp_path: Path):
    """Nothing of the teacher is needed for it, so nothing is downloaded."""
    gone = changed_config(students["wan-unipc-lora"], tmp_path / "gone", teacher="nobody/no-such-teacher")
    export(ExportConfig(student=str(gone), to="lora", out=tmp_path / "lora"))
    assert ModelCard.load(tmp_path / "lora/README.md").data.base_model == "nobody/no-such-teacher"
    with pytest.raises(UserError, match="cannot load the student's teacher nobody/no-such-teacher"):
        export(ExportConfig(student=str(gone), to="diffusers", out=tmp_path / "folder"))


def test_files_are_written_tensor_by_tensor(tmp_path: Path):
    """What safetensors reads back is what went in, for all shapes and types; tensors are read one at a time."""
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "whole": torch.arange(4),
        "turned": torch.randn(4, 6).mT,
    }
    write_weights(tmp_path / "file.safetensors", in_memory(tensors), {"format": "pt"})
    back = load_file(tmp_path / "file.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in tensors.items())
    again = read_weights(tmp_path / "file.safetensors")
    assert {name: each.shape for name, each in again.items()} == {name: tuple(t.shape) for name, t in tensors.items()}


@pytest.mark.parametrize("argument", ["sigmas=[1.0, 0.5]", "guidance_scale=3.0", "num_inference_steps=7"])
def test_a_student_refuses_another_schedule(students: dict[str, Path], tmp_path: Path, argument: str):
    """Its noise levels and guidance travel with the weights; HunyuanVideo's pipeline would take others."""
    config = read_student_config(students["hunyuan-lora"])
    assert (config.teacher, config.guidance_scale, len(config.sigmas)) == (
        str(students["hunyuan-lora"].parent / "teacher"),
        6.0,
        6,
    )
    with pytest.raises(UserError, match="came with its weights"):
        generate(
            GenerateConfig(
                model=str(students["hunyuan-lora"]), prompt=PROMPT, out=tmp_path / "clip.mp4", pipeline_arg=(argument,)
            )
        )
    assert not list(tmp_path.iterdir())


def test_generate_visits_the_students_noise_levels(students: dict[str, Path]):
    for folder in students.values():
        model = load_model(str(folder))
        [batch] = sample_clips(model, [PROMPT], [0], seed=SEED)
        assert model.student is not None and batch.sigmas == pytest.approx(model.student.sigmas, abs=1e-6)
        assert batch.denoiser_calls == 5


def test_the_teachers_revision_is_the_recorded_one(
    students: dict[str, Path], generated: dict[str, Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A teacher on the hub whose main branch has moved on: generate and export take the commit of the student."""
    student, old, new = students["wan-unipc-lora"], "a" * 40, "b" * 40
    repository = tmp_path / "hub/models--someone--tiny-wan"
    shutil.copytree(student.parent / "teacher", repository / "snapshots" / old)
    tiny_wan_pipeline("unipc", seed=9).save_pretrained(repository / "snapshots" / new)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(new)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    settings = {"teacher": "someone/tiny-wan", "license": "apache-2.0"}
    ours = changed_config(student, tmp_path / "ours", revision=old, **settings)
    export(ExportConfig(student=str(ours), to="diffusers", out=tmp_path / "folder"))
    for folder in (ours, tmp_path / "folder"):
        pipeline = load_model(str(folder)).pipeline
        assert torch.equal(run_pipeline(pipeline, TINY_CALL), generated["wan-unipc-lora"].latents)
    card = ModelCard.load(tmp_path / "folder/README.md").data
    assert (card.base_model, card.license) == ("someone/tiny-wan", "apache-2.0")
    assert card.base_model_relation == "finetune"

    theirs = changed_config(student, tmp_path / "theirs", revision=new, **settings)
    with pytest.raises(UserError, match="student of another teacher"):
        load_model(str(theirs))
