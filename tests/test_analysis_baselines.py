import json
import math
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.progress import Progress

from accvideo.analysis.baselines.dmd2 import fake_score_loss, student_loss
from accvideo.analysis.baselines.perflow import solve, window_loss
from accvideo.analysis.baselines.training import FACTORS, Budget, Recipe, train_baseline
from accvideo.analysis.comparison import BaselinesConfig, Run, baselines, part_of, spent_evaluations, train
from accvideo.inference.student_config import read_student_config
from accvideo.student import load_student
from accvideo.teacher import denoisers, load_pipeline
from accvideo.training.consistency import consistency_loss
from accvideo.types import UserError
from tests.gaussian import draws, gaussian_velocity, leading_to, scale
from tests.recorded import PROMPTS, record_tiny


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


@pytest.mark.parametrize("method", ["perflow", "dmd2", "consistency_both"])
def test_a_baseline_spends_its_budget_and_saves_a_student(method: Any, tmp_path: Path):
    folder = record_tiny(tmp_path)
    recording = 6 * 20
    # Two steps of two calls, the student; or one step of the teacher, the target, the student.
    cost = 2 * 2 + 3 if method == "perflow" else 2 + 1 + 3
    recipe = Recipe(method=method, learning_rate=1e-3, budget=recording + 40, batch_size=2, fake_updates=1)
    spent = train_baseline(recipe, str(tmp_path / "data"), tmp_path / "student", Progress(disable=True))
    if method != "dmd2":
        assert spent["num_iterations"] == math.ceil(40 / (2 * cost))
        assert spent["evaluations"] == recording + spent["num_iterations"] * 2 * cost
    else:
        # Of step k, k without a gradient. Fake score: the student's video, features of the real, both of the fake; then
        # the student with its gradient, the teacher's two calls, the fake score with that of its input.
        per_sample = 1 + 3 + 3 + 3 + 2 + 2
        led = sum(2 * (k % 5) for k in range(spent["num_iterations"]))
        first_look = 5  # at the features of each window
        assert spent["evaluations"] == recording + 2 * (first_look + spent["num_iterations"] * per_sample + led)
    assert spent["evaluations"] >= recipe.budget
    pipeline, config = load_student(tmp_path / "student")
    assert config.recipe["method"] == method and config.sigmas == folder.manifest.key_sigmas.tolist()
    teacher = denoisers(load_pipeline(str(tmp_path / "teacher")))["transformer"].state_dict()
    changed = [
        name for name, w in denoisers(pipeline)["transformer"].state_dict().items() if (w != teacher[name]).any()
    ]
    assert changed


@pytest.mark.parametrize("method", ["perflow", "dmd2"])
def test_a_compiled_baseline_is_the_same(method: Any, tmp_path: Path):
    """DMD2 takes features of a denoiser that it trains; by a backend that runs what was traced as it is."""
    recording, found = record_tiny(tmp_path).manifest.denoiser_calls * 6, []
    for compiled in (False, True):
        out = tmp_path / f"student-{compiled}"
        recipe = Recipe(
            method=method, learning_rate=1e-3, budget=recording + 40, batch_size=2, fake_updates=1, compile=compiled
        )
        with mock.patch("torch.compile", wraps=partial(torch.compile, backend="eager")) as compiling:
            train_baseline(recipe, str(tmp_path / "data"), out, Progress(disable=True))
        assert compiling.called == compiled
        found.append(denoisers(load_student(out)[0])["transformer"].state_dict())
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", FACTORS)
def test_consistency_lacks_the_factor_it_is_named_for(method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its noise is the recorded one or none of it, its levels the key point's or all of the teacher's in the step."""
    folder, seen = record_tiny(tmp_path), []

    def watched(student: Any, teacher: Any, video: Any, noise: Any, *levels: Any, end: float) -> Any:
        seen.append((video, noise, *levels, end))
        return consistency_loss(student, teacher, video, noise, *levels, end=end)

    monkeypatch.setattr("accvideo.analysis.baselines.training.consistency_loss", watched)
    recipe = Recipe(method=method, learning_rate=1e-3, budget=6 * 20 + 300, batch_size=3)
    train_baseline(recipe, str(tmp_path / "data"), tmp_path / "student", Progress(disable=True))
    fresh_noise, all_levels = FACTORS[method]
    videos = torch.stack([folder[number].states[-1] for number in range(6)])
    noises = torch.stack([folder[number].states[0] for number in range(6)])
    manifest = folder.manifest
    steps, keys = manifest.num_steps // manifest.num_student_steps, manifest.key_sigmas.tolist()
    places = set()
    for number, (video, noise, sigma, next_sigma, end) in enumerate(seen):
        keypoint = number % 5
        rows = [int((videos == each).flatten(1).all(1).nonzero()[0]) for each in video]
        assert all(torch.equal(noise[i], noises[row]) != fresh_noise for i, row in enumerate(rows))
        levels = torch.tensor(manifest.sigmas[keypoint * steps : (keypoint + 1) * steps + 1])
        place = [int((levels == each).nonzero()[0]) for each in sigma]
        assert torch.equal(next_sigma, levels[[each + 1 for each in place]]) and end == keys[keypoint + 1]
        places |= set(place)
    assert len(seen) >= 5 and places == (set(range(steps)) if all_levels else {0})


def test_a_student_of_every_state_learns_from_the_whole_data_set(tmp_path: Path):
    """The other methods see the key points of their K alone."""
    folder = record_tiny(tmp_path)
    config = BaselinesConfig(
        data=str(tmp_path / "data"), out=tmp_path, budget=120 + 96, methods=("every_state",), batch_size=2
    )
    part = part_of(folder, (0, 2, 5), tmp_path / "cache")
    student = train(config, Run("every_state", 2, 1e-3, 0), tmp_path / "cache", part)
    found, sigmas = read_student_config(student), folder.manifest.key_sigmas.tolist()
    assert found.recipe["every_state"]
    assert json.loads((student / "config.json").read_text("utf-8"))["data"] == config.data
    assert found.sigmas == [sigmas[0], sigmas[2], sigmas[5]]
    assert found.recipe["num_iterations"] == 96 // (2 * 3) and spent_evaluations(student, part) == 120 + 96


def test_a_budget_counts_samples():
    budget = Budget()
    budget.count(4, 3)
    assert budget.spent == 12


def test_what_is_missing_is_said_before_students_are_trained(tmp_path: Path):
    record_tiny(tmp_path)
    with pytest.raises(UserError, match="give --prompts FILE"):
        baselines(BaselinesConfig(data=str(tmp_path / "data"), out=tmp_path / "out", budget=120 + 1600))
    for numbers, message in (((2, 2), "give each number once"), ((5, 6), "6 student steps of 5 recorded ones")):
        with pytest.raises(UserError, match=message):
            baselines(
                BaselinesConfig(
                    data=str(tmp_path / "data"), out=tmp_path / "out", budget=120 + 1600, num_student_steps=numbers
                )
            )
    with pytest.raises(UserError, match="each of the 5 steps recorded in .* is one of the student's"):
        baselines(
            BaselinesConfig(
                data=str(tmp_path / "data"), out=tmp_path / "out", budget=120 + 1600,
                methods=("every_state",), num_student_steps=(2, 5), prompts=tmp_path / "prompts.txt",
            )
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_methods_are_compared_at_an_equal_budget(tmp_path: Path):
    folder = record_tiny(tmp_path)
    (tmp_path / "test.txt").write_text("\n".join(PROMPTS[:2]))
    config = BaselinesConfig(
        data=str(tmp_path / "data"), out=tmp_path / "out", budget=120 + 1600,
        methods=("trajectory", "perflow", "consistency"), num_seeds=2, num_student_steps=(5, 2),
        learning_rates=(1e-4, 1e-3), num_prompts=2, num_trial_prompts=1, prompts=tmp_path / "test.txt",
    )  # fmt: skip
    results = baselines(config)
    names = [row["name"] for row in results["rows"]]
    assert names[-3:] == ["trajectory", "perflow", "consistency"] and names.count("teacher_unipc") == 2
    assert names.count("teacher") == 1
    assert [(each["method"], each["learning_rate"]) for each in results["trials"]] == [
        (method, rate) for method in ("trajectory", "perflow", "consistency") for rate in (1e-4, 1e-3)
    ]
    # Three evaluations a sample of the trajectory loss; PeRFlow stops with the update that spends the last of it.
    by_place = {(row["name"], row["num_student_steps"]): row for row in results["rows"]}
    for number in (5, 2):
        assert results["evaluations"]["trajectory"][number] == 120 + 16 * 3 * round(1600 / (16 * 3))
        assert 1720 <= results["evaluations"]["perflow"][number] < 1720 + 16 * (2 * 10 // number + 3)
        row = by_place["perflow", number]
        assert len(row["metrics"]["latent_mse"]) == 2 and row["denoiser_calls"] == number
        assert by_place["teacher_unipc", number]["num_steps"] == number
    assert by_place["perflow", 5]["metrics"] != by_place["perflow", 2]["metrics"]
    sigmas = folder.manifest.sigmas
    for method in config.methods:
        student = tmp_path / "out/cache" / f"{method}-2-{results['learning_rates'][method]:g}-1"
        assert read_student_config(student).sigmas == pytest.approx([sigmas[0], sigmas[4], sigmas[10]])
    for method, cost in (("trajectory", 3), ("consistency", 2 + 1 + 3)):  # the teacher's step, the target, the student
        rate = results["learning_rates"][method]
        recipe = read_student_config(tmp_path / "out" / "cache" / f"{method}-5-{rate:g}-0").recipe
        assert (recipe["loss"] == "consistency") == (method == "consistency")
        assert recipe["num_iterations"] == round(1600 / (16 * cost))
    assert baselines(config)["rows"] == results["rows"]
    with pytest.raises(UserError, match="recording alone took 120"):
        baselines(BaselinesConfig(data=config.data, out=tmp_path / "other", budget=100))
