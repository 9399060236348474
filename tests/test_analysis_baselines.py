import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import Tensor

from accvideo.analysis.baselines.consistency import consistency_loss
from accvideo.analysis.baselines.dmd2 import fake_score_loss, student_loss
from accvideo.analysis.baselines.guided import Budget, at_level, solve
from accvideo.analysis.baselines.perflow import window_loss
from accvideo.analysis.baselines.training import Recipe, start, train_baseline
from accvideo.analysis.comparison import BaselinesConfig, baselines
from accvideo.inference.student_config import read_student_config
from accvideo.student import load_student
from accvideo.teacher import denoisers, load_pipeline
from accvideo.types import Latents, UserError
from tests.recorded import PROMPTS, record_tiny

DEVIATION = 0.5
"""Of the Gaussian videos of the closed forms below."""


def scale(sigma: Tensor) -> Tensor:
    """The exact flow of N(0, s^2) scales its noise by sqrt(((1 - sigma) s)^2 + sigma^2)."""
    return (((1 - sigma) * DEVIATION) ** 2 + sigma**2).sqrt()


def gaussian_velocity(latents: Latents, sigma: Tensor, mean: float = 0.0) -> Latents:
    """The exact velocity of videos drawn from N(mean, s^2): (x - E[video | x]) / sigma."""
    column = sigma.reshape(-1, 1)
    keep = (1 - column) * DEVIATION**2 / scale(column) ** 2
    return (latents - mean - keep * (latents - (1 - column) * mean)) / column


def leading_to(end: float, latents: Latents, sigma: Tensor) -> Latents:
    """The velocity of a perfect student of steps that end at a noise level: straight to where the exact flow goes."""
    column = sigma.reshape(-1, 1)
    return latents * (scale(torch.tensor(end)) / scale(column) - 1) / (end - column)


def draws() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    video, noise = torch.randn(2, 512, 1, dtype=torch.float64, generator=generator)
    return DEVIATION * video, noise


def test_the_solver_is_of_first_order():
    """Twice as many Euler steps, half the error against the exact flow."""
    _, noise = draws()
    errors = []
    for num_steps in (40, 80):
        levels = torch.linspace(1, 0.1, num_steps + 1, dtype=torch.float64)
        exact = noise * scale(levels[-1]) / scale(levels[0])
        errors.append((solve(gaussian_velocity, noise, levels) - exact).abs().mean())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


def test_windows_teach_the_exact_flow():
    """PeRFlow's loss vanishes for the student that leads where the exact flow goes, and not for the teacher itself."""
    video, noise = draws()
    losses = []
    for num_steps in (50, 200):
        levels = torch.linspace(0.8, 0.3, num_steps + 1, dtype=torch.float64)
        losses.append(window_loss(partial(leading_to, 0.3), gaussian_velocity, video, noise, levels).mean())
    assert losses[1] < losses[0] / 10 < 1e-4
    teacher = window_loss(gaussian_velocity, gaussian_velocity, video, noise, levels).mean()  # pyright: ignore
    assert teacher > 100 * losses[0]


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


def test_the_fake_score_is_best_at_the_velocity_of_the_students_distribution():
    video, noise = draws()
    sigma = torch.full((len(video),), 0.5, dtype=torch.float64)
    exact, other = (
        fake_score_loss(partial(gaussian_velocity, mean=mean), video, noise, sigma).mean() for mean in (0.0, 0.4)
    )
    assert exact < other


def test_distribution_matching_moves_a_student_to_its_teachers_mean():
    """Descending the loss of a student that is N(m, s^2), with both velocities exact, takes m to the teacher's."""
    video, noise = draws()
    mean = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    sigma = torch.linspace(0.1, 0.9, len(video), dtype=torch.float64)
    for _ in range(300):
        fake = partial(gaussian_velocity, mean=float(mean.detach()))
        real = partial(gaussian_velocity, mean=1.5)
        loss = student_loss(real, fake, video + mean, noise, sigma).mean()
        [gradient] = torch.autograd.grad(loss, mean)
        mean = (mean - 0.1 * gradient).detach().requires_grad_()
    assert float(mean.detach()) == pytest.approx(1.5, abs=0.02)


@pytest.mark.parametrize("experts", [1, 2])
def test_the_guided_teacher_walks_the_recorded_trajectories(experts: int, tmp_path: Path):
    """Its Euler steps lead from a recorded state to the next: prompt, guidance and levels are the pipeline's."""
    folder = record_tiny(tmp_path, experts=experts, batch_size=3)
    recipe = Recipe(method="perflow", learning_rate=1e-3, budget=10**9)
    setting = start(recipe, folder)
    recording = 6 * 20
    assert setting.budget.spent == recording
    batch = next(folder.batches(3, seed=0))
    points = folder.manifest.keypoints
    for keypoint in range(5):
        levels = setting.teacher.sigmas[points[keypoint] : points[keypoint + 1] + 1]
        reached = solve(setting.teacher.field(batch, keypoint), batch.states[:, keypoint], levels)
        if experts == 2 and batch.denoisers[keypoint] != batch.denoisers[min(keypoint + 1, 4)]:
            continue  # the experts may change within the step
        torch.testing.assert_close(reached, batch.states[:, keypoint + 1], atol=2e-4, rtol=2e-4)
    assert setting.budget.spent == recording + 5 * 2 * 3 * 2


def test_a_call_moves_to_other_levels_and_other_scales_are_refused(tmp_path: Path):
    folder = record_tiny(tmp_path)
    call = folder[0].calls[1]
    recorded = float(folder.manifest.key_sigmas[1])
    assert at_level(call, recorded, torch.tensor([0.25])).tensors["timestep"].tolist() == [250]
    with pytest.raises(UserError, match="1000 times"):
        at_level(call, recorded / 2, torch.tensor([0.25]))


@pytest.mark.parametrize("method", ["perflow", "consistency", "dmd2"])
def test_a_baseline_spends_its_budget_and_saves_a_student(method: Any, tmp_path: Path):
    folder = record_tiny(tmp_path)
    recording = 6 * 20
    costs = {"perflow": 2 * 2 + 3, "consistency": 2 + 1 + 3}  # two steps of two calls; one step, target, student
    recipe = Recipe(method=method, learning_rate=1e-3, budget=recording + 40, batch_size=2, fake_updates=1)
    spent = train_baseline(recipe, str(tmp_path / "data"), tmp_path / "student", Progress(disable=True))
    if method in costs:
        assert spent["num_iterations"] == math.ceil(40 / (2 * costs[method]))
        assert spent["evaluations"] == recording + spent["num_iterations"] * 2 * costs[method]
    assert spent["evaluations"] >= recipe.budget
    pipeline, config = load_student(tmp_path / "student")
    assert config.recipe["method"] == method and config.sigmas == folder.manifest.key_sigmas.tolist()
    teacher = denoisers(load_pipeline(str(tmp_path / "teacher")))["transformer"].state_dict()
    changed = [
        name for name, w in denoisers(pipeline)["transformer"].state_dict().items() if (w != teacher[name]).any()
    ]
    assert changed


def test_a_budget_counts_samples():
    budget = Budget(10)
    budget.count(4, 3)
    assert budget.spent == 12


def test_what_is_missing_is_said_before_students_are_trained(tmp_path: Path):
    record_tiny(tmp_path)
    with pytest.raises(UserError, match="give --prompts FILE"):
        baselines(BaselinesConfig(data=str(tmp_path / "data"), out=tmp_path / "out", budget=120 + 1600))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_methods_are_compared_at_an_equal_budget(tmp_path: Path):
    record_tiny(tmp_path)
    (tmp_path / "test.txt").write_text("\n".join(PROMPTS[:2]))
    config = BaselinesConfig(
        data=str(tmp_path / "data"), out=tmp_path / "out", budget=120 + 1600, methods=("trajectory", "perflow"),
        num_seeds=2, learning_rates=(1e-4, 1e-3), num_prompts=2, num_trial_prompts=1, prompts=tmp_path / "test.txt",
    )  # fmt: skip
    results = baselines(config)
    names = [row["name"] for row in results["rows"]]
    assert names[-2:] == ["trajectory", "perflow"] and "teacher_unipc" in names
    assert [(each["method"], each["learning_rate"]) for each in results["trials"]] == [
        (method, rate) for method in ("trajectory", "perflow") for rate in (1e-4, 1e-3)
    ]
    by_name = {row["name"]: row for row in results["rows"]}
    assert len(by_name["perflow"]["metrics"]["latent_mse"]) == 2
    assert by_name["perflow"]["denoiser_calls"] == 5 and by_name["teacher_unipc"]["num_steps"] == 5
    rate = results["learning_rates"]["trajectory"]
    recipe = read_student_config(tmp_path / "out" / "cache" / f"trajectory-{rate:g}-0").recipe
    assert recipe["num_iterations"] == round(1600 / (16 * 3))
    assert baselines(config)["rows"] == results["rows"]
    with pytest.raises(UserError, match="recording alone took 120"):
        baselines(BaselinesConfig(data=config.data, out=tmp_path / "other", budget=100))
