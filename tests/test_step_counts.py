"""Students of fewer steps than were recorded, and of several numbers of steps at once."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from accvideo.data.dataset import TrajectoryFolder
from accvideo.distill import distill, measure
from accvideo.export import export
from accvideo.exporting.config import ExportConfig
from accvideo.flow import even_grid
from accvideo.generate import generate
from accvideo.inference.config import GenerateConfig
from accvideo.inference.model import load_model
from accvideo.inference.schedulers import KeyPointScheduler
from accvideo.inference.student_config import read_student_config
from accvideo.student import Student, load_student
from accvideo.teacher import denoisers, load_pipeline
from accvideo.training.recipe import DistillConfig
from accvideo.training.start import load_denoisers, start_training
from accvideo.training.steps import (
    Rollouts,
    Step,
    Training,
    every_state_lesson,
    paired_loss,
    step_of_iteration,
    student_step,
    student_sweeps,
    student_velocity,
)
from accvideo.trajectory import TrajectoryBatch, collate_trajectories
from accvideo.types import UserError
from tests.recorded import record_tiny
from tests.test_distill import metrics_of, tensors_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryFolder:
    return record_tiny(tmp_path_factory.mktemp("teacher"))


def config(folder: TrajectoryFolder, out: Path, *num_student_steps: int, **settings: Any) -> DistillConfig:
    defaults = {"num_iterations": 10, "batch_size": 2, "num_validation": 2, "lora_rank": 2, "precision": "float32"}
    defaults |= {"adversarial_start": 0}
    return DistillConfig(
        data=str(folder.path), out=out, num_student_steps=num_student_steps, device="cpu", **defaults | settings
    )


def test_each_number_of_steps_is_swept_from_noise_to_video_one_after_the_other():
    [sweep] = student_sweeps(5, ())
    assert [sweep] == student_sweeps(5, [5]) and sweep == [Step(k, k + 1) for k in range(5)]
    assert [step_of_iteration([sweep], i) for i in range(7)] == [(i % 5, sweep[i % 5]) for i in range(7)]
    sweeps = student_sweeps(50, [3, 1])
    assert [[(step.start, step.end) for step in sweep] for sweep in sweeps] == [
        [(0, 17), (17, 33), (33, 50)],
        [(0, 50)],
    ]
    assert [step_of_iteration(sweeps, i)[0] for i in range(6)] == [0, 1, 2, 3, 0, 1]
    assert step_of_iteration(sweeps, 5)[1] == Step(17, 33, is_told=True)
    with pytest.raises(UserError, match="choose from 1 to 5"):
        student_sweeps(5, [6])


@pytest.mark.parametrize("number", range(1, 11))
def test_an_even_grid_goes_from_end_to_end_in_steps_that_differ_by_one_at_most(number: int):
    points = even_grid(10, number)
    gaps = {late - early for early, late in zip(points[:-1], points[1:], strict=True)}
    assert (points[0], points[-1], len(points)) == (0, 10, number + 1) and max(gaps) - min(gaps) <= 1


def test_rollouts_pass_over_the_key_points_between(folder: TrajectoryFolder):
    """What the student leaves at the end of a step is where its next begins, also of another number of steps."""
    sigmas, batch = folder.manifest.key_sigmas, collate_trajectories([folder[0], folder[1]])
    student = Student(denoisers(load_pipeline(folder.manifest.teacher)), 2)
    rollouts, latents = Rollouts(5, seed=0), batch.states[:, 0]
    for step in [step for sweep in student_sweeps(5, [3, 1, 2]) for step in sweep]:
        if step.start == 0:
            assert not any(rollouts.queues)
            rollouts.start([batch], number=0, fresh=False)
            latents = batch.states[:, 0]
        with torch.no_grad():
            latents = student_step(student, batch, latents, sigmas, step)
            assert torch.equal(rollouts.advance(student, sigmas, step).latents, latents)
    assert not any(rollouts.queues)


def test_the_number_that_was_recorded_is_the_same_as_none(folder: TrajectoryFolder, tmp_path: Path):
    for name, numbers in {"none": (), "five": (5,)}.items():
        distill(config(folder, tmp_path / name, *numbers, adversarial_start=5))
    none, five = tensors_of(tmp_path / "none"), tensors_of(tmp_path / "five")
    assert none.keys() == five.keys() and all(torch.equal(tensor, five[name]) for name, tensor in none.items())
    assert metrics_of(tmp_path / "none") == metrics_of(tmp_path / "five")
    assert read_student_config(tmp_path / "five").scheduler == read_student_config(tmp_path / "none").scheduler


def test_a_student_of_several_numbers_takes_each_from_key_point_to_key_point(folder: TrajectoryFolder, tmp_path: Path):
    """By the pipeline, as by its denoiser alone; its levels are recorded ones; any other number is refused."""
    distill(config(folder, tmp_path / "student", 3, 1, 5))
    pipeline, made = load_student(tmp_path / "student")
    assert (made.num_steps, made.other_num_steps, made.scheduler["class"]) == (3, [1, 5], "KeyPointScheduler")
    key_sigmas, scheduler = folder.manifest.key_sigmas, pipeline.scheduler
    recorded = [float(call.tensors["timestep"]) for call in folder[0].calls] + [0.0]
    for number in (1, 3, 5):
        points = even_grid(5, number)
        scheduler.set_timesteps(number)
        torch.testing.assert_close(scheduler.sigmas, key_sigmas[points])
        told = [2 * recorded[start] - recorded[end] for start, end in pairwise(points)]
        assert scheduler.timesteps.tolist() == pytest.approx(told)
    with pytest.raises(UserError, match="4 steps asked of a student with 3 or 1 or 5 steps"):
        scheduler.set_timesteps(4)

    model = load_model(str(tmp_path / "student"))
    assert model.num_steps == 3
    for number, expected in ((None, 3), (5, 5), (1, 1)):
        made = generate(GenerateConfig(
            model=str(tmp_path / "student"), prompt="a red square", out=tmp_path / f"{number}.mp4", num_steps=number,
        ))  # fmt: skip
        assert made["denoiser_calls"] == expected and len(made["sigmas"]) == expected + 1
    with pytest.raises(UserError, match="student of 3 or 1 or 5 steps and cannot take 2"):
        generate(GenerateConfig(
            model=str(tmp_path / "student"), prompt="a red square", out=tmp_path / "x.mp4", num_steps=2,
        ))  # fmt: skip


def test_the_pipeline_of_such_a_student_does_what_was_trained(folder: TrajectoryFolder, tmp_path: Path):
    """From the same noise, whatever the number of steps: levels and timesteps told are the same in both."""
    distill(config(folder, tmp_path / "student", 2, 1, full=True, learning_rate=1e-2, adversarial_weight=0.0))
    pipeline: Any
    pipeline, made = load_student(tmp_path / "student")
    student = Student(denoisers(pipeline), None, keep_teacher=False)
    batch, sigmas = collate_trajectories([folder[0]]), folder.manifest.key_sigmas
    for sweep in student_sweeps(5, [2, 1]):
        latents = batch.states[:, 0]
        for step in sweep:
            with torch.no_grad():
                latents = student_step(student, batch, latents, sigmas, step)
        found = pipeline(
            prompt=folder[0].prompt, num_inference_steps=len(sweep), latents=batch.states[:, 0], output_type="latent",
            guidance_scale=1.0, height=32, width=32, num_frames=5, max_sequence_length=12,
        ).frames  # fmt: skip
        torch.testing.assert_close(found, latents, atol=1e-5, rtol=1e-5)


def test_only_a_student_of_several_numbers_is_told_how_far_a_step_goes(folder: TrajectoryFolder):
    """And the sizes make a difference: what the denoiser is told is all that tells them apart."""
    batch, sigmas = collate_trajectories([folder[0]]), folder.manifest.key_sigmas
    student = Student(denoisers(load_pipeline(folder.manifest.teacher)), None, keep_teacher=False)
    with torch.no_grad():
        plain, *told = (
            student_velocity(student, batch, batch.states[:, 0], sigmas, step)
            for step in (Step(0, 3), Step(0, 3, is_told=True), Step(0, 5, is_told=True))
        )
        expected = student.velocity("transformer", batch.calls[0], batch.states[:, 0])
    assert torch.equal(plain, expected)
    assert not torch.allclose(told[0], plain, atol=1e-5) and not torch.allclose(told[0], told[1], atol=1e-5)


def test_a_student_that_is_not_told_gets_the_teachers_own_timesteps(folder: TrajectoryFolder, tmp_path: Path):
    sweeps = student_sweeps(5, [2, 1], tell_size=False)
    assert not any(step.is_told for sweep in sweeps for step in sweep)
    distill(config(folder, tmp_path / "student", 2, 1, tell_size=False, num_iterations=3, adversarial_weight=0.0))
    scheduler = load_student(tmp_path / "student")[0].scheduler
    told = [float(folder[0].calls[point].tensors["timestep"]) for point in even_grid(5, 2)[:-1]]
    assert scheduler.timesteps.tolist() == pytest.approx(told)


def test_two_denoisers_are_not_told_for_pipelines_choose_between_them_by_the_timestep(tmp_path: Path):
    folder = record_tiny(tmp_path, experts=2)
    distill(config(folder, tmp_path / "student", 5, 1, num_iterations=6, adversarial_weight=0.0))
    pipeline, _ = load_student(tmp_path / "student")
    told = [float(call.tensors["timestep"]) for call in folder[0].calls]
    assert pipeline.scheduler.timesteps.tolist() == pytest.approx(told)


def test_other_programs_cannot_tell_such_a_student_how_far_to_go(folder: TrajectoryFolder, tmp_path: Path):
    distill(config(folder, tmp_path / "student", 5, 1, num_iterations=1, adversarial_weight=0.0))
    for form in ("lora", "comfyui", "original", "diffusers"):
        with pytest.raises(UserError, match=r"several numbers of steps \(5, 1\)"):
            export(ExportConfig(student=str(tmp_path / "student"), to=form, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_validation_of_several_numbers_is_the_mean_of_each(folder: TrajectoryFolder, tmp_path: Path):
    several = config(folder, tmp_path / "student", 1, 2, adversarial_weight=0.0)
    batch, sigmas = collate_trajectories([folder[i] for i in range(3)]), folder.manifest.key_sigmas
    loaded = {name: denoiser for name, denoiser in denoisers(load_pipeline(folder.manifest.teacher)).items()}
    training = start_training(several, loaded, sigmas, [batch])
    sweeps = student_sweeps(5, several.num_student_steps)
    both, one, two = (measure(training, [batch], sigmas, part) for part in (sweeps, sweeps[:1], sweeps[1:]))
    assert both["latent_error"] == pytest.approx((one["latent_error"] + two["latent_error"]) / 2)
    assert both["validation_loss"] == one["validation_loss"] + two["validation_loss"]


def test_one_step_is_taken_by_euler_teachers_too(tmp_path: Path):
    """Their own scheduler spaces levels between two ends; a single step has none between."""
    folder = record_tiny(tmp_path, scheduler="euler")
    assert not folder.manifest.nested_schedule
    distill(config(folder, tmp_path / "student", 1, num_iterations=1, adversarial_weight=0.0))
    assert load_student(tmp_path / "student")[0].scheduler.config["sigmas"] == pytest.approx([1, 0], abs=1e-6)


def starting(settings: DistillConfig, folder: TrajectoryFolder) -> tuple[Training, TrajectoryBatch]:
    batch = collate_trajectories([folder[0], folder[1]])
    return start_training(settings, load_denoisers(folder.manifest), folder.manifest.key_sigmas, [batch]), batch


@pytest.mark.parametrize("is_told", [False, True])
@torch.no_grad()
def test_every_state_of_a_step_is_set_out_from_and_all_lead_to_its_end(
    folder: TrajectoryFolder, tmp_path: Path, is_told: bool
):
    training, batch = starting(config(folder, tmp_path / "student", 2), folder)
    sigmas, step = folder.manifest.key_sigmas, Step(1, 4, is_told)
    known = {float(paired_loss(training.student, batch, sigmas, Step(k, 4, is_told)).mean()): k for k in (1, 2, 3)}
    assert len(known) == 3
    drawn = [float(*every_state_lesson(training, [batch], sigmas, step)) for _ in range(150)]
    counts = {state: [known[loss] for loss in drawn].count(state) for state in (1, 2, 3)}
    assert sum(counts.values()) == 150 and min(counts.values()) > 25, counts


@torch.no_grad()
def test_a_step_without_states_between_is_learned_as_it_is(folder: TrajectoryFolder, tmp_path: Path):
    training, batch = starting(config(folder, tmp_path / "student"), folder)
    sigmas = folder.manifest.key_sigmas
    for k in range(5):
        [found] = every_state_lesson(training, [batch], sigmas, Step(k, k + 1))
        assert found == paired_loss(training.student, batch, sigmas, Step(k, k + 1)).mean()


@torch.no_grad()
def test_an_exact_teacher_has_no_loss_from_the_last_state_of_a_step(tmp_path: Path):
    """From there one step of the teacher's leads to the end: without guidance, its own velocity is the secant."""
    folder = record_tiny(tmp_path, num_steps=4, num_student_steps=4, guidance_scale=1.0)
    training, batch = starting(config(folder, tmp_path / "student", 2), folder)
    losses = [float(*every_state_lesson(training, [batch], folder.manifest.key_sigmas, Step(0, 2))) for _ in range(20)]
    last, first = min(losses), max(losses)
    assert last < 1e-12 and first > 1e-6 and set(losses) == {first, last}


@torch.no_grad()
def test_of_a_step_in_which_the_teacher_changes_denoisers_the_states_of_the_first_are_drawn(tmp_path: Path):
    folder = record_tiny(tmp_path, experts=2)
    training, batch = starting(config(folder, tmp_path / "student", 1), folder)
    change = next(k for k, name in enumerate(batch.denoisers) if name != batch.denoisers[0])
    sigmas = folder.manifest.key_sigmas
    allowed = {float(paired_loss(training.student, batch, sigmas, Step(k, 5)).mean()) for k in range(change)}
    drawn = {float(*every_state_lesson(training, [batch], sigmas, Step(0, 5))) for _ in range(100)}
    assert 1 < change < 5 and drawn == allowed


def test_heads_are_only_where_a_step_of_the_students_ends(folder: TrajectoryFolder, tmp_path: Path):
    training, _ = starting(config(folder, tmp_path / "student", 2, 1), folder)
    assert training.discriminator is not None and training.discriminator.places == {1: 0, 4: 1}
    assert len(training.discriminator.heads) == 2


@torch.no_grad()
def test_the_same_state_is_drawn_for_all_parts_of_a_batch(folder: TrajectoryFolder, tmp_path: Path):
    settings, sigmas = config(folder, tmp_path / "student", 1), folder.manifest.key_sigmas
    training, whole = starting(settings, folder)
    parts = [collate_trajectories([folder[number]]) for number in whole.indices]
    found = [float(*every_state_lesson(training, [whole], sigmas, Step(0, 5))) for _ in range(8)]
    training.rollouts = Rollouts(5, settings.seed)
    cut = [float(torch.stack(list(every_state_lesson(training, parts, sigmas, Step(0, 5)))).mean()) for _ in range(8)]
    assert len(set(found)) > 2 and cut == pytest.approx(found, rel=1e-5)


def test_every_state_is_refused_where_there_are_none_between_or_another_loss_takes_none(
    folder: TrajectoryFolder, tmp_path: Path
):
    for numbers in ((), (5,)):
        with pytest.raises(UserError, match="each of the 5 steps recorded in .* is one of the student's"):
            distill(config(folder, tmp_path / "student", *numbers, every_state=True))
    with pytest.raises(UserError, match="every_state is of the trajectory loss, and loss is consistency"):
        config(folder, tmp_path / "student", 2, every_state=True, loss="consistency")
    assert not (tmp_path / "student").exists()
    distill(config(folder, tmp_path / "student", 5, 1, every_state=True, num_iterations=2))
    assert read_student_config(tmp_path / "student").recipe["every_state"]


def test_a_number_given_twice_or_not_recorded_is_refused_before_anything_is_written(
    folder: TrajectoryFolder, tmp_path: Path
):
    with pytest.raises(UserError, match="each number once"):
        config(folder, tmp_path / "student", 2, 2)
    with pytest.raises(UserError, match="6 student steps of 5 recorded ones"):
        distill(config(folder, tmp_path / "student", 2, 6))
    assert not (tmp_path / "student").exists()


def test_schedules_of_a_key_point_scheduler_survive_saving(tmp_path: Path):
    others = [{"sigmas": [1.0, 0.0], "timesteps": [1000.0]}]
    scheduler = KeyPointScheduler([1.0, 0.6, 0.0], [999.0, 600.0], others=others)
    scheduler.save_pretrained(tmp_path)
    again: Any = KeyPointScheduler.from_pretrained(tmp_path)
    again.set_timesteps(1)
    assert again.sigmas.tolist() == [1, 0]
    again.set_timesteps()
    assert again.timesteps.tolist() == [999, 600]
