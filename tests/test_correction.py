"""The correction loss: its zero, its weights in closed form, and what the teacher is asked."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accvideo.data.dataset import TrajectoryFolder
from accvideo.distill import distill
from accvideo.student import Student
from accvideo.training.checkpoint import read_metrics
from accvideo.training.correction import correction_lesson, correction_loss, predicted_again
from accvideo.training.guidance import GuidedTeacher
from accvideo.training.start import load_denoisers, start_training
from accvideo.training.steps import Step, student_sweeps, sweep_of_iteration
from accvideo.trajectory import collate_trajectories
from accvideo.types import Latents, UserError
from tests.gaussian import DEVIATION, gaussian_velocity, scale
from tests.recorded import record_tiny
from tests.test_distill import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryFolder:
    return record_tiny(tmp_path_factory.mktemp("teacher"))


# --- The loss ---


@pytest.mark.parametrize("upwards", [False, True])
@pytest.mark.parametrize("sigma", [0.3, 0.8])
def test_errors_weigh_by_what_a_gaussian_teacher_would_mend_of_them(sigma: float, upwards: bool):
    """Of an error d the mean of all videos keeps a d, with a = ((1 - sigma) s)^2 / (((1 - sigma) s)^2 + sigma^2)."""
    generator = torch.Generator().manual_seed(0)
    recorded, noise, error = torch.randn(3, 64, 3, dtype=torch.float64, generator=generator)

    def field(latents: Latents, level: Tensor) -> Latents:
        return -gaussian_velocity(latents, 1 - level) if upwards else gaussian_velocity(latents, level)

    corrected = partial(predicted_again, field, noise, 1 - sigma if upwards else sigma, upwards=upwards)
    video = (recorded + error).requires_grad_()
    loss = correction_loss(video, recorded, corrected)
    kept = ((1 - sigma) * DEVIATION) ** 2 / float(scale(torch.tensor(sigma, dtype=torch.float64))) ** 2
    torch.testing.assert_close(loss.double(), (1 - kept) ** 2 * error.square().mean(1), rtol=1e-5, atol=1e-6)
    [gradient] = torch.autograd.grad(loss.sum(), video)
    # None through the target.
    torch.testing.assert_close(gradient, 2 * (1 - kept) * error / 3, rtol=1e-5, atol=1e-6)
    assert 0.01 < kept < 0.6


def test_the_teachers_own_videos_have_no_loss_whatever_it_makes_of_them():
    recorded = torch.randn(4, 5)
    video = recorded.clone().requires_grad_()
    loss = correction_loss(video, recorded, lambda latents: latents.sin() + 7)
    [gradient] = torch.autograd.grad(loss.sum(), video)
    assert not loss.any() and not gradient.any()


# --- The teacher, asked ---


@pytest.mark.parametrize("experts", [1, 2])
def test_the_teacher_answers_as_it_was_recorded(experts: int, tmp_path: Path):
    """Asked with the noise that makes its last recorded state of its video, it answers with this very video."""
    folder = record_tiny(tmp_path, experts=experts, num_steps=5, batch_size=3, shift=9.0)
    manifest, sigmas = folder.manifest, folder.manifest.key_sigmas
    lesson = correction_lesson(
        tiny_config(folder, tmp_path / "out", loss="correction", correction_levels=(1e-3, 0.9999)), folder
    )
    assert [keypoint for *_, keypoint in lesson.levels] == [0, 1, 2, 3, 4][-len(lesson.levels) :]
    assert {name for _, name, _ in lesson.levels} == set(manifest.fingerprints)
    teacher = GuidedTeacher(Student(load_denoisers(manifest), lora_rank=2), sigmas, lesson.guidance)
    batch = next(folder.batches(3, seed=0))
    level, name, keypoint = lesson.levels[-1]
    video, state = batch.states[:, -1], batch.states[:, -2]
    noise = (state - (1 - level) * video) / level
    answer = predicted_again(teacher.field(batch, keypoint, name), noise, level, video)
    torch.testing.assert_close(answer, video, atol=1e-3, rtol=1e-3)


def test_videos_are_noised_to_levels_that_are_asked_for_and_others_refused(folder: TrajectoryFolder, tmp_path: Path):
    config = partial(tiny_config, folder, tmp_path / "out", loss="correction")
    lesson = correction_lesson(config(correction_levels=(0.5, 0.8)), folder)
    inside = [level for level in folder.manifest.sigmas if 0.5 <= level <= 0.8]
    assert [level for level, *_ in lesson.levels] == inside and len(inside) > 1
    with pytest.raises(UserError, match=r"correction_levels is 0.01 to 0.02, and no step.*\nIts steps start at 1, "):
        correction_lesson(config(correction_levels=(0.01, 0.02)), folder)
    for levels in ((0.6, 0.5), (0.0, 0.5), (0.5, 1.0)):
        with pytest.raises(UserError, match="two rising numbers between 0 and 1"):
            config(correction_levels=levels)
    with pytest.raises(UserError, match="Leave out one of them"):
        config(update="shared")
    with pytest.raises(UserError, match="keep_best and patience go by the distance"):
        config(keep_best=True)


# --- The lesson ---


def test_the_whole_way_is_learned_of_each_number_of_steps_in_turn():
    sweeps = student_sweeps(4, (2, 1))
    assert [sweep_of_iteration(sweeps, i) for i in range(4)] == [sweeps[0], sweeps[0], sweeps[1], sweeps[0]]


def test_a_student_that_is_its_teacher_has_nothing_to_correct(tmp_path: Path):
    """As many steps as the teacher, guidance off: it arrives at the recorded videos; guidance is a difference."""
    for name, guidance in (("plain", 1.0), ("guided", 3.0)):
        data = record_tiny(tmp_path / name, num_steps=4, num_student_steps=4, guidance_scale=guidance)
        config = tiny_config(data, tmp_path / "out", loss="correction")
        lesson, batch = correction_lesson(config, data), next(data.batches(2, seed=0))
        training = start_training(config, load_denoisers(data.manifest), data.manifest.key_sigmas, [batch])
        [found] = lesson(training, [batch], data.manifest.key_sigmas, Step(0, 1))
        assert (found < 1e-12) == (guidance == 1.0)


def test_the_same_is_drawn_for_a_row_however_the_batch_is_cut(folder: TrajectoryFolder, tmp_path: Path):
    config = tiny_config(folder, tmp_path / "out", loss="correction", batch_size=4)
    lesson, sigmas = correction_lesson(config, folder), folder.manifest.key_sigmas
    batch = next(folder.batches(4, seed=0))
    halves = [collate_trajectories([folder[i] for i in batch.indices[part : part + 2]]) for part in (0, 2)]
    means = []
    for parts in ([batch], halves):
        training = start_training(config, load_denoisers(folder.manifest), sigmas, parts)
        means.append(torch.stack(list(lesson(training, parts, sigmas, Step(1, 2)))).mean())
    torch.testing.assert_close(means[0], means[1])


def test_a_distillation_by_it_is_recorded_as_such(folder: TrajectoryFolder, tmp_path: Path):
    config = tiny_config(folder, tmp_path / "out", loss="correction", num_student_steps=(2,), adversarial_weight=0)
    distill(config)
    lines = read_metrics(config.out / "metrics.jsonl")
    assert sum("correction_loss" in line for line in lines) == config.num_iterations
    assert not any("trajectory_loss" in line for line in lines)
