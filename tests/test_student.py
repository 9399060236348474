import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from accvideo.call import layer_features, replay
from accvideo.data.dataset import TrajectoryFolder
from accvideo.discriminator import Discriminator
from accvideo.flow import euler_step, shifted_sigmas
from accvideo.inference.schedulers import KeyPointScheduler
from accvideo.inference.student_config import StudentConfig, student_config
from accvideo.student import Student, adapted, load_student, save_student
from accvideo.teacher import denoisers, load_pipeline
from accvideo.trajectory import TrajectoryBatch
from accvideo.types import UserError
from tests.recorded import record_tiny
from tests.tiny import tiny_wan_pipeline, wan_transformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryFolder:
    return record_tiny(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def batch(folder: TrajectoryFolder) -> TrajectoryBatch:
    return next(folder.batches(2, seed=0))


def make_student(folder: TrajectoryFolder, rank: int | None, **options: Any) -> Student:
    """A student of the recorded teacher that has moved away from it."""
    torch.manual_seed(1)
    student = Student(denoisers(load_pipeline(folder.manifest.teacher)), rank, **options)
    with torch.no_grad():
        for parameter in student.trained().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return student


def save(path: Path, student: Student, folder: TrajectoryFolder, rank: int | None) -> StudentConfig:
    config = student_config(folder.manifest, folder[0].calls, rank, {"num_iterations": 3})
    save_student(path, student, config, {"latent_error": 0.1})
    return config


def walk(student: Student, batch: TrajectoryBatch, sigmas: Tensor) -> Tensor:
    """The student's result from the stored noise."""
    latents = batch.states[:, 0]
    with torch.no_grad():
        for k, call in enumerate(batch.calls):
            velocity = student.velocity(batch.denoisers[k], call, latents)
            latents = euler_step(latents, velocity, float(sigmas[k]), float(sigmas[k + 1]))
    return latents


def generate(pipeline: Any, batch: TrajectoryBatch, num_steps: int = 5) -> Tensor:
    return pipeline(
        prompt=list(batch.prompts),
        latents=batch.states[:, 0],
        num_inference_steps=num_steps,
        guidance_scale=1.0,
        height=32,
        width=32,
        num_frames=5,
        max_sequence_length=12,
        output_type="latent",
    ).frames


@pytest.mark.parametrize("rank", [4, None])
def test_a_student_starts_as_its_teacher(folder: TrajectoryFolder, batch: TrajectoryBatch, rank: int | None):
    teacher = denoisers(load_pipeline(folder.manifest.teacher))
    student = Student(denoisers(load_pipeline(folder.manifest.teacher)), rank)
    for keypoint, call in enumerate(batch.calls):
        velocity = replay(teacher["transformer"], call, batch.states[:, keypoint])
        assert torch.equal(student.velocity("transformer", call, batch.states[:, keypoint]), velocity)


def test_adapters_off_is_the_teacher_bit_for_bit(folder: TrajectoryFolder, batch: TrajectoryBatch):
    teacher = denoisers(load_pipeline(folder.manifest.teacher))
    student = make_student(folder, rank=4)
    call, latents = batch.calls[2], batch.states[:, 2]
    expected = replay(teacher["transformer"], call, latents)
    moved = student.velocity("transformer", call, latents)
    with student.without_adapters():
        assert torch.equal(student.velocity("transformer", call, latents), expected)
    assert not torch.equal(moved, expected)
    assert torch.equal(student.velocity("transformer", call, latents), moved)
    features = student.teacher_features("transformer", call, latents, 3)
    assert torch.equal(features, layer_features(teacher["transformer"], call, latents, 3))


def test_what_trains(folder: TrajectoryFolder):
    lora, full = make_student(folder, 4), make_student(folder, None)
    linear = sum(isinstance(module, torch.nn.Linear) for module in wan_transformer().blocks.modules())
    assert len(lora.trained()) == 2 * linear and all("lora_" in name for name in lora.trained())
    assert set(full.trained()) == {f"transformer.{name}" for name, _ in wan_transformer().named_parameters()}
    assert lora.teachers["transformer"] is lora.denoisers["transformer"]  # one copy of the weights
    assert not any(parameter.requires_grad for parameter in full.teachers["transformer"].parameters())


def test_weights_that_train_are_float32_whatever_the_teachers_are(folder: TrajectoryFolder, batch: TrajectoryBatch):
    for rank in (4, None):
        teacher = denoisers(load_pipeline(folder.manifest.teacher, torch.bfloat16))
        student = Student(teacher, rank)
        assert {parameter.dtype for parameter in student.trained().values()} == {torch.float32}
        velocity = student.velocity("transformer", batch.calls[0], batch.states[:, 0])
        velocity.sum().backward()
        assert velocity.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_compute_what_peft_does(autocast: bool, dtype: torch.dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40)).to(dtype)
    layer: Any = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=["0"]), model)[0]
    layer.lora_A.float(), layer.lora_B.float()
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    hidden = torch.randn(2, 5, 24, dtype=dtype)
    results = []
    for forward in (layer.forward, partial(adapted, layer)):
        own = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = forward(own)
        output.float().square().sum().backward()
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        results.append([output.float(), own.grad.float(), *(weight.grad.clone() for weight in weights)])
        for weight in weights:
            weight.grad = None
    for expected, found in zip(*results, strict=True):
        exact = dtype == torch.float32 and not autocast
        assert (found - expected).norm() < (1e-5 if exact else 2e-2) * expected.norm()


@pytest.mark.parametrize("rank", [4, None])
def test_two_experts_and_their_teachers_are_one_copy_of_the_weights_with_a_lora(rank: int | None):
    experts = {"transformer": wan_transformer(), "transformer_2": wan_transformer()}
    size = sum(parameter.nbytes for model in experts.values() for parameter in model.parameters())
    student = Student(experts, rank)
    models = [*student.denoisers.values(), *student.teachers.values()]
    storages = {
        parameter.untyped_storage().data_ptr(): parameter.nbytes for m in models for parameter in m.parameters()
    }
    adapters = sum(parameter.nbytes for parameter in student.trained().values()) if rank else 0
    assert sum(storages.values()) - adapters == (size if rank else 2 * size)
    assert adapters < size


@pytest.mark.parametrize("rank", [4, None])
def test_gradient_checkpointing_keeps_little_of_the_student_and_of_the_features(
    folder: TrajectoryFolder, batch: TrajectoryBatch, rank: int | None
):
    """Bytes that the backward pass waits for, weights aside."""
    kept: dict[bool, list[int]] = {}
    for checkpointing in (False, True):
        student = make_student(folder, rank, gradient_checkpointing=checkpointing)
        given = ("transformer", batch.calls[3], batch.states[:, 3].clone().requires_grad_())
        kept[checkpointing] = [
            bytes_kept(student, partial(student.velocity, *given)),
            bytes_kept(student, partial(student.teacher_features, *given, layer=3)),
        ]
    assert all(less < 0.5 * more for less, more in zip(kept[True], kept[False], strict=True))


def bytes_kept(student: Student, forward: Callable[[], Tensor]) -> int:
    models = [*student.denoisers.values(), *student.teachers.values()]
    weights = {parameter.untyped_storage().data_ptr() for model in models for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    assert result.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in weights)


@pytest.mark.parametrize("rank", [4, None])
def test_gradient_checkpointing_changes_no_gradient(folder: TrajectoryFolder, batch: TrajectoryBatch, rank: int | None):
    """Student and teacher share blocks, and the backward pass must run each again with adapters as they were."""
    gradients = []
    for checkpointing in (False, True):
        student = make_student(folder, rank, gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        discriminator = Discriminator(student, folder.manifest.key_sigmas, [batch])
        velocity = student.velocity("transformer", batch.calls[3], batch.states[:, 3])
        features = discriminator.features(batch.states[:, 3] - 0.2 * velocity, batch, 3)
        discriminator.logits(features, 3).square().sum().backward()
        gradients.append({n: p.grad for n, p in student.trained().items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-7), name
    assert max(gradient.abs().max() for gradient in gradients[0].values()) > 1e-4


@pytest.mark.parametrize("rank", [4, None])
def test_a_saved_student_makes_the_same_video(
    folder: TrajectoryFolder, batch: TrajectoryBatch, tmp_path: Path, rank: int | None
):
    student = make_student(folder, rank)
    config = save(tmp_path / "student", student, folder, rank)
    pipeline, loaded = load_student(tmp_path / "student")
    assert loaded == config
    expected = walk(student, batch, folder.manifest.key_sigmas)
    assert not torch.allclose(expected, batch.states[:, -1], atol=1e-2)
    # A LoRA is merged when it is loaded: rounding differs.
    assert torch.allclose(generate(pipeline, batch), expected, atol=1e-5)


def test_plain_diffusers_runs_the_saved_lora(folder: TrajectoryFolder, batch: TrajectoryBatch, tmp_path: Path):
    """No accvideo needed: the teacher's pipeline, `load_lora_weights` and K steps of the saved scheduler."""
    save(tmp_path / "student", make_student(folder, 4), folder, 4)
    plain: Any = diffusers.WanPipeline.from_pretrained(folder.manifest.teacher)
    plain.load_lora_weights(tmp_path / "student")
    plain.fuse_lora(components=["transformer"])
    plain.unload_lora_weights()
    pipeline, _ = load_student(tmp_path / "student")
    assert torch.equal(generate(plain, batch), generate(pipeline, batch))


@pytest.mark.parametrize("rank", [4, None])
def test_a_student_of_two_experts_has_both(tmp_path: Path, rank: int | None):
    folder = record_tiny(tmp_path, scheduler="unipc", experts=2)
    batch = next(folder.batches(2, seed=0))
    assert set(batch.denoisers) == {"transformer", "transformer_2"}
    student = make_student(folder, rank)
    save(tmp_path / "student", student, folder, rank)
    pipeline, _ = load_student(tmp_path / "student")
    assert torch.allclose(generate(pipeline, batch), walk(student, batch, folder.manifest.key_sigmas), atol=1e-5)


@pytest.mark.parametrize(
    "scheduler, expected",
    [
        ("dpm", "DPMSolverMultistepScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
        ("euler", "FlowMatchEulerDiscreteScheduler"),  # its own K-step grid is another, until its shift is changed
    ],
)
def test_the_schedule_travels_with_the_student(tmp_path: Path, scheduler: str, expected: str):
    """The saved scheduler takes Euler steps over the recorded levels, at the recorded timesteps."""
    folder = record_tiny(tmp_path, scheduler=scheduler)
    batch = next(folder.batches(2, seed=0))
    student = make_student(folder, 4)
    save(tmp_path / "student", student, folder, 4)
    pipeline, config = load_student(tmp_path / "student")
    assert config.scheduler["class"] == expected
    assert json.loads((tmp_path / "student/scheduler/scheduler_config.json").read_text())["_class_name"] == expected
    told: list[float] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    assert torch.allclose(generate(pipeline, batch), walk(student, batch, folder.manifest.key_sigmas), atol=1e-4)
    assert told == pytest.approx([float(call.tensors["timestep"][0]) for call in batch.calls], abs=1e-4)


def test_the_teachers_weights_as_student_with_all_steps_reproduce_its_trajectory(tmp_path: Path):
    """design.md 7.1, guidance off: bit for bit in float32."""
    folder = record_tiny(tmp_path, scheduler="euler", num_student_steps=10, guidance_scale=1.0)
    batch = next(folder.batches(1, seed=0))
    student = Student(denoisers(load_pipeline(folder.manifest.teacher)), 4)
    assert torch.equal(walk(student, batch, folder.manifest.key_sigmas), batch.states[:, -1])


def test_key_point_scheduler_is_the_euler_method():
    sigmas = shifted_sigmas(5, shift=7)
    scheduler = KeyPointScheduler(sigmas.tolist(), (1000 * sigmas[:-1]).tolist())
    for _ in range(2):  # a pipeline uses it again and again
        scheduler.set_timesteps(5, device="cpu")
        latents = expected = torch.randn(2, 4, 3)
        for k, timestep in enumerate(scheduler.timesteps):
            velocity = torch.randn(2, 4, 3)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            expected = euler_step(expected, velocity, float(sigmas[k]), float(sigmas[k + 1]))
        assert torch.equal(latents, expected)


def test_key_point_scheduler_keeps_its_levels_whatever_a_pipeline_asks():
    scheduler = KeyPointScheduler([1.0, 0.6, 0.0], [999, 600])
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=1.15)
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.6, 0.0])
    assert scheduler.timesteps.tolist() == [999, 600] and scheduler.timesteps.dtype == torch.int64
    with pytest.raises(UserError, match="7 steps asked of a student with 2 steps"):
        scheduler.set_timesteps(7)


def test_key_point_scheduler_steps_in_float32():
    scheduler = KeyPointScheduler([1.0, 0.99, 0.0], [1000, 990])
    sample, velocity = torch.full((1, 4), 100.0), torch.full((1, 4), 3.0).bfloat16()
    assert torch.allclose(
        scheduler.step(velocity, None, sample, return_dict=False)[0], torch.full((1, 4), 99.97), atol=1e-4
    )


def test_a_student_of_another_teacher_is_refused(folder: TrajectoryFolder, tmp_path: Path):
    save(tmp_path / "student", make_student(folder, 4), folder, 4)
    tiny_wan_pipeline("dpm", seed=7).save_pretrained(tmp_path / "other")
    path = tmp_path / "student/student.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"teacher": str(tmp_path / "other")}))
    with pytest.raises(UserError, match="another teacher"):
        load_student(tmp_path / "student")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprints": {}}))
    with pytest.raises(UserError, match="another teacher"):
        load_student(tmp_path / "student")


def test_a_student_made_before_its_teachers_scheduler_was_kept_is_read(folder: TrajectoryFolder, tmp_path: Path):
    config = save(tmp_path / "student", make_student(folder, 4), folder, 4)
    assert config.teacher_scheduler == folder.manifest.scheduler
    path = tmp_path / "student/student.json"
    found = json.loads(path.read_text())
    del found["teacher_scheduler"]
    path.write_text(json.dumps(found))
    assert load_student(tmp_path / "student")[1] == replace(config, teacher_scheduler=None)


def test_a_folder_without_a_finished_student_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="holds no finished student"):
        load_student(tmp_path)


def test_the_model_card_says_where_the_student_comes_from(folder: TrajectoryFolder, tmp_path: Path):
    save(tmp_path / "student", make_student(folder, 4), folder, 4)
    card = (tmp_path / "student/README.md").read_text()
    for fact in (
        f"student of {Path(folder.manifest.teacher).name}",
        "2503.19462",
        "LoRA of rank 4",
        "WanPipeline",
        "latent_error",
        "num_iterations",
    ):
        assert fact in card


@pytest.mark.parametrize(("denoiser_calls", "expected"), [(20, 1.0), (10, 6.0)])
def test_only_guidance_by_a_second_call_is_distilled_in(folder: TrajectoryFolder, denoiser_calls: int, expected: float):
    """Guidance that is an input of the denoiser, as in HunyuanVideo, must stay what was recorded."""
    manifest = replace(folder.manifest, denoiser_calls=denoiser_calls, guidance_scale=6.0)
    assert student_config(manifest, folder[0].calls, None, {}).guidance_scale == expected
