import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from accvideo.analysis.grids import (
    best_grid,
    best_shift,
    grid_cost,
    secant_costs,
    shifted_grid,
    start_costs,
)
from accvideo.analysis.keypoints import CHOICES, KeypointsConfig, keypoints
from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.manifest import read_manifest
from accvideo.data.verify import problems
from accvideo.distill import distill
from accvideo.flow import even_grid, keypoint_indices, shifted_sigmas
from accvideo.inference.student_config import read_student_config
from accvideo.training.recipe import DistillConfig
from accvideo.types import UserError
from tests.recorded import PROMPTS, record_tiny


def random_states(num_levels: int, seed: int = 0) -> torch.Tensor:
    steps = torch.randn(3, num_levels, 2, 4, generator=torch.Generator().manual_seed(seed))
    return steps.cumsum(1)


def test_a_straight_trajectory_has_no_bend_and_no_first_error():
    sigmas = shifted_sigmas(8, 3.0)
    noise, video = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    states = torch.stack([sigma * noise + (1 - sigma) * video for sigma in sigmas], dim=1)
    for costs in (secant_costs(states, sigmas), start_costs(states, sigmas)):
        assert costs.triu(1).abs().max() < 1e-9
        assert costs.shape == (9, 9)


def test_the_bend_is_the_squared_difference_of_velocities_over_the_step():
    states, sigmas = random_states(7), shifted_sigmas(6, 4.0)
    costs = secant_costs(states, sigmas)
    for start, end in combinations(range(7), 2):
        secant = (states[:, end] - states[:, start]) / (sigmas[end] - sigmas[start])
        expected = 0.0
        for level in range(start, end):
            gap = sigmas[level + 1] - sigmas[level]
            velocity = (states[:, level + 1] - states[:, level]) / gap
            expected += float(gap.abs() * (velocity - secant).square().mean())
        assert float(costs[start, end]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_bend_of_a_gaussians_exact_flow_has_a_closed_form():
    """The flow of N(0, s^2) scales its noise: x(sigma) = a(sigma) noise, a^2 = ((1 - sigma) s)^2 + sigma^2."""
    sigmas, noise = shifted_sigmas(40, 5.0).double(), torch.randn(50, 1, 6, dtype=torch.float64)
    scale = (((1 - sigmas) * 0.5) ** 2 + sigmas**2).sqrt()
    costs = secant_costs(scale[None, :, None] * noise, sigmas)
    power, moves, gaps = float(noise.square().mean()), scale.diff(), sigmas.diff().abs()
    for start, end in ((0, 40), (0, 7), (12, 33)):
        inner = (moves[start:end] ** 2 / gaps[start:end]).sum() - (scale[end] - scale[start]) ** 2 / (
            sigmas[start] - sigmas[end]
        )
        assert float(costs[start, end]) == pytest.approx(power * float(inner), rel=1e-9)


def test_the_first_error_is_where_the_teachers_own_velocity_leads():
    states, sigmas = random_states(5), shifted_sigmas(4, 2.0)
    costs = start_costs(states, sigmas)
    velocity = (states[:, 2] - states[:, 1]) / (sigmas[2] - sigmas[1])
    missed = states[:, 1] + (sigmas[4] - sigmas[1]) * velocity - states[:, 4]
    assert float(costs[1, 4]) == pytest.approx(float(missed.square().mean()), rel=1e-5)
    assert costs.diagonal(1).abs().max() < 1e-10


@pytest.mark.parametrize("num_student_steps", range(1, 9))
def test_dynamic_programming_finds_what_trying_all_grids_finds(num_student_steps: int):
    for seed in range(5):
        costs = secant_costs(random_states(9, seed), shifted_sigmas(8, 3.0))
        tried = [[0, *inner, 8] for inner in combinations(range(1, 8), num_student_steps - 1)]
        best = min(tried, key=lambda grid: grid_cost(costs, grid))
        assert best_grid(costs, num_student_steps) == best


def test_a_shift_of_one_is_even_and_shifts_multiply():
    assert even_grid(50, 5) == keypoint_indices(50, 5) == shifted_grid(50, 5, 1.0).keypoints  # pyright: ignore
    levels, wanted = shifted_sigmas(1000, 3.0), shifted_sigmas(4, 6.0)
    grid = shifted_grid(1000, 4, 2.0)
    assert grid is not None
    torch.testing.assert_close(levels[grid.keypoints], wanted, atol=2e-3, rtol=0)
    assert shifted_grid(10, 8, 30.0) is None  # two steps would be one


def test_the_best_shift_is_no_worse_than_an_even_grid_and_dynamic_no_worse_than_both():
    for seed in range(5):
        costs = secant_costs(random_states(21, seed), shifted_sigmas(20))
        for k in (2, 4, 5, 10):
            shifted = best_shift(20, k, lambda grid, costs=costs: grid_cost(costs, grid))
            even, best = grid_cost(costs, even_grid(20, k)), grid_cost(costs, best_grid(costs, k))
            assert best <= grid_cost(costs, shifted.keypoints) <= even


def test_uneven_key_points_are_a_data_set_and_others_are_refused(tmp_path: Path):
    manifest = record_tiny(tmp_path).manifest
    assert replace(manifest, keypoints=[0, 1, 2, 5, 9, 10]).keypoints[3] == 5
    for wrong in ([0, 2, 4, 6, 8, 9], [1, 2, 4, 6, 8, 10], [0, 2, 2, 6, 8, 10], [0, 4, 2, 6, 8, 10], [0, 5, 10]):
        with pytest.raises(UserError, match="5 steps from 0 to 10"):
            replace(manifest, keypoints=wrong)
    with pytest.raises(UserError, match="--num-student-steps 10"):
        keypoints(KeypointsConfig(data=tmp_path / "data", out=tmp_path / "out"))


def test_a_student_learns_on_the_key_points_that_were_chosen(tmp_path: Path):
    full = record_tiny(tmp_path, num_student_steps=10)
    config = KeypointsConfig(data=tmp_path / "data", out=tmp_path / "out", num_student_steps=(2, 3), write="dynamic")
    results = keypoints(config)
    assert results["num_trajectories"] == {"chosen_on": 3, "measured_on": 3}
    by_choice = {(row["num_student_steps"], row["choice"]): row for row in results["rows"]}
    assert by_choice[3, "dynamic"]["bend_chosen_on"] <= by_choice[3, "shift"]["bend_chosen_on"]
    assert by_choice[3, "shift"]["bend_chosen_on"] <= by_choice[3, "uniform"]["bend_chosen_on"] < 1
    assert json.loads((tmp_path / "out" / "keypoints.json").read_text())["rows"] == results["rows"]
    ElementTree.parse(tmp_path / "out" / "keypoints.svg")

    chosen = by_choice[3, "dynamic"]["keypoints"]
    part = tmp_path / "out" / "data-dynamic-3"
    assert problems(str(part)) == [] and read_manifest(part).keypoints == chosen
    torch.testing.assert_close(TrajectoryFolder(part)[4].states, full[4].states[chosen])
    assert TrajectoryFolder(part)[4].calls[1].tensors["timestep"] == full[4].calls[chosen[1]].tensors["timestep"]

    distill(DistillConfig(data=part, out=tmp_path / "student", num_iterations=3, batch_size=2, num_validation=0))
    student = read_student_config(tmp_path / "student")
    assert student.sigmas == pytest.approx([full.manifest.sigmas[i] for i in chosen])
    assert student.scheduler["class"] == "KeyPointScheduler"


def test_students_of_every_choice_are_evaluated_beside_their_teacher(tmp_path: Path):
    full = record_tiny(tmp_path, num_student_steps=10)
    (tmp_path / "test.txt").write_text("\n".join(PROMPTS[:2]))
    config = KeypointsConfig(
        data=tmp_path / "data", out=tmp_path / "out", num_student_steps=(1, 3, 4), distill=(1, 3), num_seeds=2,
        num_iterations=5, batch_size=2, num_prompts=2, prompts=tmp_path / "test.txt", device="cpu",
    )  # fmt: skip
    results = keypoints(config)
    teacher, *students = results["students"]
    assert teacher["name"] == "teacher" and teacher["denoiser_calls"] == 20
    assert [(row["num_student_steps"], row["choice"]) for row in students] == [(k, c) for k in (1, 3) for c in CHOICES]
    assert all(len(row["metrics"]["latent_mse"]) == 2 and row["denoiser_calls"] == row["num_steps"] for row in students)
    # With one step all choices are the same: so are their students, each trained once.
    cache = tmp_path / "out" / "cache"
    assert students[0]["metrics"] == students[1]["metrics"] == students[2]["metrics"]
    grids = {tuple(row["keypoints"]) for row in results["rows"] if row["num_student_steps"] in (1, 3)}
    assert len(list(cache.glob("student-*"))) == 2 * len(grids)
    for grid in grids:
        student = read_student_config(cache / f"student-{'-'.join(map(str, grid))}-1")
        assert student.sigmas == pytest.approx([full.manifest.sigmas[i] for i in grid])
    written = (tmp_path / "out/keypoints.md").read_text()
    assert all(f"| {k}, {choice} |" in written for k in (1, 3) for choice in CHOICES)
    assert keypoints(config)["students"] == results["students"]
    with pytest.raises(UserError, match="choose among num_student_steps"):
        replace(config, distill=(2,))
    with pytest.raises(UserError, match="give --prompts FILE"):
        keypoints(replace(config, prompts=None, out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()
