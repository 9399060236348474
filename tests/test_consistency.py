"""The teacher asked while training: its guidance as found in a run, its levels, and the loss of consistency."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accvideo.training.guidance as stage
from accvideo.analysis.baselines.perflow import solve
from accvideo.call import DenoiserCall
from accvideo.data.dataset import TrajectoryFolder
from accvideo.distill import train
from accvideo.flow import shifted_sigmas
from accvideo.student import Student
from accvideo.teacher import WatchedStep
from accvideo.training.consistency import ConsistencyLesson, consistency_lesson, consistency_loss, teacher_levels
from accvideo.training.guidance import Guidance, GuidedTeacher, at_level, find_practice, guidance_scale, second_call
from accvideo.training.recipe import DistillConfig
from accvideo.training.start import load_denoisers, start_training
from accvideo.training.steps import Step, student_step
from accvideo.trajectory import TrajectoryBatch, collate_trajectories
from accvideo.types import Latents, UserError
from tests.gaussian import draws, gaussian_velocity, leading_to
from tests.recorded import record_tiny
from tests.test_distill import MixtureDenoiser, MixtureTeacher, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryFolder:
    return record_tiny(tmp_path_factory.mktemp("teacher"))


# --- The loss ---


def test_the_consistency_function_of_a_gaussian_has_no_loss():
    """The exact function leads every point of a phase to its end; the loss left is the error of a step, squared."""
    video, noise = draws()
    generator, end = torch.Generator().manual_seed(1), 0.2
    sigma = 0.25 + 0.7 * torch.rand(len(video), dtype=torch.float64, generator=generator)
    losses = []
    for gap in (0.02, 0.01):
        losses.append(
            consistency_loss(partial(leading_to, end), gaussian_velocity, video, noise, sigma, sigma - gap, end).mean()
        )
    assert losses[0] / losses[1] == pytest.approx(16, rel=0.3)  # a step's error goes with the gap squared
    wrong = consistency_loss(partial(leading_to, 0.6), gaussian_velocity, video, noise, sigma, sigma - 0.02, end)
    assert wrong.mean() > 100 * losses[0]


def test_no_gradient_goes_through_the_consistency_target():
    """At a phase's last level the target is the teacher's own step, whatever the student."""
    video, noise = draws()
    sigma = torch.full((len(video),), 0.3, dtype=torch.float64)
    weight = torch.tensor(1.0, requires_grad=True, dtype=torch.float64)

    def student(latents: Latents, sigma: Tensor) -> Latents:
        return weight * gaussian_velocity(latents, sigma)

    loss = consistency_loss(student, gaussian_velocity, video, noise, sigma, sigma - 0.1, 0.2).mean()
    assert loss < 1e-20  # one Euler step of the teacher is what a student with its velocity does
    next_sigma = sigma - 0.05
    loss = consistency_loss(student, gaussian_velocity, video, noise, sigma, next_sigma, 0.2).mean()
    [gradient] = torch.autograd.grad(loss, weight)
    x = (1 - 0.3) * video + 0.3 * noise
    v = gaussian_velocity(x, sigma)
    stepped = x - 0.05 * v
    target = (-0.05 * v - 0.05 * gaussian_velocity(stepped, next_sigma)) / -0.1
    torch.testing.assert_close(gradient, (2 * (v - target) * v).mean())


# --- The teacher, asked anew ---


@pytest.mark.parametrize("experts", [1, 2])
def test_the_guided_teacher_walks_the_recorded_trajectories(experts: int, tmp_path: Path):
    """Its Euler steps lead from a recorded state to the next: prompt, guidance and levels are the pipeline's."""
    folder = record_tiny(tmp_path, experts=experts, batch_size=3, shift=9.0)
    practice, points = find_practice(folder.manifest, folder[0]), folder.manifest.keypoints
    guidance = practice.guidance
    assert guidance is not None and guidance.call.tensors.keys() == {"encoder_hidden_states"}
    assert guidance.scales == pytest.approx(dict.fromkeys(folder.manifest.fingerprints, 3.0), rel=1e-3)
    student = Student(load_denoisers(folder.manifest), lora_rank=2)
    teacher = GuidedTeacher(student, folder.manifest.key_sigmas, guidance)
    assert [practice.denoisers[point] for point in points[:-1]] == list(folder[0].denoisers)
    assert len(set(practice.denoisers)) == experts and practice.denoisers == sorted(practice.denoisers)
    batch, sigmas = next(folder.batches(3, seed=0)), torch.tensor(folder.manifest.sigmas)
    for keypoint, (first, last) in enumerate(pairwise(points)):
        reached = batch.states[:, keypoint]
        for number in range(first, last):
            field = teacher.field(batch, keypoint, practice.denoisers[number])
            reached = solve(field, reached, sigmas[number : number + 2])
        torch.testing.assert_close(reached, batch.states[:, keypoint + 1], atol=2e-4, rtol=2e-4)


class TwoCalls(nn.Module):
    """A denoiser whose velocity is what it is told of the prompt, and nothing else."""

    dtype = torch.float32

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor, return_dict: bool) -> tuple[Tensor]:  # noqa: D102
        return (prompt.expand_as(hidden_states),)


def test_only_a_sum_of_two_calls_is_taken_for_guidance():
    def call(prompt: Tensor) -> DenoiserCall:
        return DenoiserCall({"timestep": torch.tensor([1000.0]), "prompt": prompt}, {})

    one, two, state = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -1.0]]), torch.zeros(1, 2)
    guidance = Guidance({}, DenoiserCall({"prompt": two}, {}), ("timestep", "prompt"))
    step = partial(WatchedStep, state, state, sigma=1.0, next_sigma=0.5, denoiser="transformer", call=call(one))
    assert guidance_scale(TwoCalls(), guidance, step(two + 7 * (one - two))) == pytest.approx([7.0])
    assert guidance_scale(TwoCalls(), replace(guidance, call=call(one)), step(one)) == []
    with pytest.raises(UserError, match="no sum of its two calls: 80%.*\n.*--loss trajectory"):
        guidance_scale(TwoCalls(), guidance, step(two + torch.tensor([[3.0, -0.5]])))


def test_guidance_that_changes_or_takes_more_calls_is_refused(
    folder: TrajectoryFolder, monkeypatch: pytest.MonkeyPatch
):
    scales = iter([3.0, 3.2, 3.0, 1.0, 3.0])
    with monkeypatch.context() as patch:
        patch.setattr(stage, "guidance_scale", lambda *_: [next(scales)])
        with pytest.raises(UserError, match="not the same on each step: scales 3, 3.2, 3, 1, 3"):
            find_practice(folder.manifest, folder[0])
    call, state = folder[0].calls[0], folder[0].states[:1]
    step = WatchedStep(state, state, state, 1.0, 0.5, "transformer", call)
    with pytest.raises(UserError, match="guided by 3 calls a step; known are two"):
        second_call([{"hidden_states": state}] * 3, [step], ())


def test_a_call_moves_to_other_levels_and_other_scales_are_refused(tmp_path: Path):
    folder = record_tiny(tmp_path)
    call = folder[0].calls[1]
    recorded = float(folder.manifest.key_sigmas[1])
    assert at_level(call, recorded, torch.tensor([0.25])).tensors["timestep"].tolist() == [250]
    with pytest.raises(UserError, match="1000 times"):
        at_level(call, recorded / 2, torch.tensor([0.25]))
    tokens = replace(call, tensors={"timestep": torch.tensor([[1e-4, recorded, recorded]])})  # Cosmos, a frame given
    moved = at_level(tokens, recorded, torch.tensor([0.25])).tensors["timestep"]
    torch.testing.assert_close(moved, torch.tensor([[1e-4, 0.25, 0.25]]))


# --- The lesson ---


def test_fewer_steps_of_another_solver_are_cut_into_the_teachers(folder: TrajectoryFolder):
    manifest, names = folder.manifest, ["one"] * 6 + ["two"] * 4
    levels = teacher_levels(manifest, names)
    assert [len(each) for each in levels] == [2] * 5
    assert [level for each in levels for level in each] == list(zip(manifest.sigmas, names, strict=False))
    cut = teacher_levels(replace(manifest, teacher_num_steps=25), names)
    assert [each[::3] for each in cut] == levels and [len(each) for each in cut] == [6] * 5
    sigmas, denoisers = zip(*(level for each in cut for level in each), strict=True)
    assert denoisers == ("one",) * 18 + ("two",) * 12
    gaps = [early - late for early, late in pairwise([*sigmas, 0.0])]
    assert min(gaps) > 0 and gaps[3:6] == pytest.approx([gaps[3]] * 3)


def test_each_level_of_a_step_is_the_experts_that_takes_it(tmp_path: Path):
    """Where experts change within a step, the point is drawn among the levels of one of them, and it is asked."""
    folder = record_tiny(tmp_path, experts=2, num_student_steps=2)
    config = tiny_config(folder, tmp_path / "out", loss="consistency")
    lesson, batch = consistency_lesson(config, folder), next(folder.batches(2, seed=0))
    names = [{name for _, name in each} for each in lesson.levels]
    k = names.index({"transformer", "transformer_2"})
    sigmas = folder.manifest.key_sigmas
    training = start_training(config, load_denoisers(folder.manifest), sigmas, [batch])
    asked = {name: list[float]() for name in names[k]}

    def note(name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() and training.student.adapters[0]._disable_adapters:
            asked[name] += kwargs["timestep"].tolist()

    for name, denoiser in training.student.teachers.items():
        denoiser.register_forward_pre_hook(partial(note, name), with_kwargs=True)
    for _ in range(12):
        list(lesson(training, [batch], sigmas, Step(k, k + 1)))
    assert {name: set(levels) for name, levels in asked.items()} == {
        name: {int(1000 * level) for level, whose in lesson.levels[k] if whose == name} for name in names[k]
    }


def test_a_student_that_is_its_teacher_has_no_loss_over_single_steps_and_guidance_makes_one(tmp_path: Path):
    """From key point to key point in one step of the teacher's, there is nothing else to learn than its guidance."""
    for name, scale, loss in (("plain", 1.0, 0.0), ("guided", 3.0, None)):
        data = record_tiny(tmp_path / name, num_steps=4, num_student_steps=4, guidance_scale=scale)
        config = tiny_config(data, tmp_path / "out", loss="consistency")
        lesson, batch = consistency_lesson(config, data), next(data.batches(2, seed=0))
        sigmas = data.manifest.key_sigmas
        training = start_training(config, load_denoisers(data.manifest), sigmas, [batch])
        for k in range(4):
            [found] = lesson(training, [batch], sigmas, Step(k, k + 1))
            if loss == 0:
                assert found < 1e-12
            else:
                assert found > 1e-8


def test_the_same_is_drawn_for_a_row_however_the_batch_is_cut(folder: TrajectoryFolder, tmp_path: Path):
    config = tiny_config(folder, tmp_path / "out", loss="consistency", batch_size=4)
    lesson, sigmas = consistency_lesson(config, folder), folder.manifest.key_sigmas
    batch = next(folder.batches(4, seed=0))
    halves = [collate_trajectories([folder[i] for i in batch.indices[part : part + 2]]) for part in (0, 2)]
    means = []
    for parts in ([batch], halves):
        training = start_training(config, load_denoisers(folder.manifest), sigmas, parts)
        means.append(torch.stack(list(lesson(training, parts, sigmas, Step(1, 2)))).mean())
    torch.testing.assert_close(means[0], means[1])


class ExactDenoiser(nn.Module):
    """The exact velocity of the mixture."""

    dtype, teacher = torch.float32, MixtureTeacher()

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:  # noqa: D102
        velocity = torch.empty_like(hidden_states)
        for sigma in timestep.unique():
            velocity[timestep == sigma] = self.teacher.velocity(hidden_states[timestep == sigma], float(sigma))
        return (velocity,)


@pytest.mark.parametrize("upwards", [False, True])
def test_a_student_learns_from_videos_and_fresh_noise_alone(upwards: bool):
    """Two steps to 8 modes, from states that are no trajectory: zeros but for the videos.

    Counted upwards, the noise levels and the timesteps are those of Mochi, and the velocity points the other way.
    """
    torch.manual_seed(0)
    exact, sigmas = MixtureTeacher(), shifted_sigmas(2)
    modes = torch.randint(8, (10_000,))
    videos = exact.means[modes] + exact.deviation * torch.randn(10_000, 2)
    told = 1 - sigmas if upwards else sigmas

    def batch(rows: Tensor) -> TrajectoryBatch:
        states = torch.stack([torch.zeros_like(rows), torch.zeros_like(rows), rows], dim=1)
        calls = tuple(DenoiserCall({"timestep": told[k].expand(len(rows))}, {}) for k in range(2))
        return TrajectoryBatch(states, calls, ("transformer",) * 2, (), ())

    def batches(start: int) -> Iterator[TrajectoryBatch]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield batch(videos[torch.randint(len(videos), (256,), generator=generator)])

    class Turned(ExactDenoiser):
        def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:  # noqa: D102
            return (-super().forward(hidden_states, 1 - timestep, return_dict)[0],)

    config = DistillConfig(
        data="data", out=Path("out"), precision="float32", device="cpu", full=True, num_iterations=2000,
        loss="consistency", learning_rate=2e-3, adversarial_weight=0, schedule="cosine",
    )  # fmt: skip
    training = start_training(config, {"transformer": MixtureDenoiser()}, told, [batch(videos[:1])])
    training.student.teachers["transformer"] = Turned() if upwards else ExactDenoiser()
    fine = shifted_sigmas(24)
    levels = [
        [(float(1 - level if upwards else level), "transformer") for level in part] for part in (fine[:12], fine[12:-1])
    ]
    lines: list[dict[str, Any]] = []
    train(config, training, told, batches, lesson=ConsistencyLesson(None, levels), log=lines.append)
    assert {"consistency_loss", "trajectory_gradient_norm"} <= lines[-1].keys()

    latents = noise = torch.randn(4000, 2)
    with torch.no_grad():
        for k in range(2):
            latents = student_step(training.student, batch(noise), latents, told, Step(k, k + 1))
    target, few = (exact.trajectory(noise, num_steps)[:, -1] for num_steps in (24, 2))
    assert exact.share_in_modes(few) < 0.02 and exact.share_in_modes(latents) > 0.1
    assert (latents - target).square().mean().sqrt() < 0.75 * (few - target).square().mean().sqrt()


def test_the_loss_of_recorded_states_alone_knows_shared_updates(folder: TrajectoryFolder, tmp_path: Path):
    with pytest.raises(UserError, match="Leave out one of them"):
        tiny_config(folder, tmp_path / "out", loss="consistency", update="shared")
