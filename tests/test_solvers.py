"""Recording by another solver than the teacher's own: orders of convergence, and what must not change with it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, WanTransformer3DModel
from safetensors import safe_open

from accvideo.analysis.line import exact_velocity
from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.manifest import read_manifest
from accvideo.data.repair import RepairConfig, repair
from accvideo.data.verify import problems
from accvideo.distill import distill
from accvideo.evaluate import evaluate
from accvideo.export import export
from accvideo.exporting.config import ExportConfig
from accvideo.flow import euler_step, keypoint_indices, shifted_sigmas
from accvideo.generate import sample_clips
from accvideo.inference.model import load_model, with_arguments
from accvideo.inference.student_config import read_student_config
from accvideo.recording.solvers import AdamsStep, Solver, solver_step
from accvideo.reporting.config import EvaluateConfig
from accvideo.reporting.rows import FIRST_ITEM
from accvideo.teacher import denoising_grid, item_generator, watch
from accvideo.training.recipe import DistillConfig
from accvideo.types import UserError
from tests.recorded import PROMPTS, record_tiny
from tests.test_flow import DEVIATION, MEAN, gaussian_velocity
from tests.tiny import TINY_CALL, TINY_FAMILIES, WAN_SIZES, tiny_wan_pipeline


def solve(solver: Solver, velocity: Any, noise: torch.Tensor, sigmas: list[float]) -> list[torch.Tensor]:
    """All states, each as the solver knows it in the end."""
    step, states = solver_step(solver) or AdamsStep(), []
    for sigma, next_sigma in zip(sigmas, sigmas[1:], strict=False):
        state, noise = step(noise, velocity(noise, sigma), sigma, next_sigma)
        states.append(state)
    return [*states, noise]


def order(errors: list[float]) -> float:
    """Of convergence, from the errors of two numbers of steps of which one is twice the other."""
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize(("solver", "expected"), [("euler", 1), ("adams2", 2)])
def test_orders_of_convergence_on_a_gaussian(solver: Solver, expected: int, shift: float):
    """At every key point, against the exact flow, which maps Gaussians linearly onto each other.

    A shift leaves long steps for the end, where the errors of second order fall even faster until steps are very short.
    """
    noise = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors: list[list[float]] = [[], [], []]
    for num_steps in (400, 800):
        sigmas = shifted_sigmas(num_steps, shift).double().tolist()
        states = solve(solver, gaussian_velocity, noise, sigmas)
        for place, level in enumerate((num_steps // 4, num_steps // 2, num_steps)):
            sigma = sigmas[level]
            exact = (1 - sigma) * MEAN + math.hypot((1 - sigma) * DEVIATION, sigma) * noise
            errors[place].append(float((states[level] - exact).abs().max()))
    *inner, last = (order(each) for each in errors)
    assert inner == pytest.approx([expected] * 2, abs=0.12)
    assert expected - 0.12 < last < expected + (0.12 if expected == 1 else 1)


@pytest.mark.parametrize(("solver", "expected"), [("euler", 1), ("adams2", 2)])
def test_orders_of_convergence_on_two_points(solver: Solver, expected: int):
    """Away from the point between them, where the flow parts; halfway, since in the end all solvers are at a point."""
    noise = torch.tensor([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0], dtype=torch.float64)
    exact, *solved = (
        solve(solver if number < 10_000 else "adams2", exact_velocity, noise, shifted_sigmas(number).double().tolist())[
            number // 2
        ]
        for number in (10_000, 200, 400)
    )
    assert order([float((each - exact).abs().max()) for each in solved]) == pytest.approx(expected, abs=0.1)


def test_second_order_steps_are_exact_where_the_velocity_is_linear_in_sigma():
    """On uneven levels, in either direction, at every state but the first guess."""
    noise, constant, slope = torch.randn(3, 5, dtype=torch.float64)
    for sigmas in ([1.0, 0.9, 0.5, 0.45, 0.1, 0.0], [0.0, 0.3, 0.4, 0.8, 1.0]):
        states = solve("adams2", lambda _, sigma: constant + slope * sigma, noise, sigmas)
        for sigma, state in zip(sigmas, states, strict=True):
            exact = noise + constant * (sigma - sigmas[0]) + slope * (sigma**2 - sigmas[0] ** 2) / 2
            torch.testing.assert_close(state, exact, rtol=0, atol=1e-12)


def test_what_a_pipeline_changes_between_steps_stays():
    """A state that is moved after a step, as given frames are, is corrected from where it was moved to."""
    moved, plain = AdamsStep(), AdamsStep()
    velocities = torch.randn(2, 4)
    first, second = (step(torch.zeros(4), velocities[0], 1.0, 0.6)[1] for step in (moved, plain))
    (here, _), (there, _) = (
        step(state, velocities[1], 0.6, 0.1) for step, state in ((moved, first + 7), (plain, second))
    )
    torch.testing.assert_close(here, there + 7)


class GaussianTransformer(WanTransformer3DModel):
    """The exact velocity of Gaussian videos, whatever the prompt."""

    def forward(self, hidden_states: Any, timestep: Any, *_: Any, **__: Any) -> Any:
        """The velocity, as Wan's pipeline asks for it."""
        return (gaussian_velocity(hidden_states, float(timestep[0]) / 1000),)


@torch.no_grad()
@pytest.mark.parametrize(("solver", "expected"), [("own", 1), ("euler", 1), ("adams2", 2)])
def test_a_watched_pipeline_converges_with_the_order_of_its_solver(solver: Solver, expected: int):
    """The recorded key states of a whole pipeline come to the exact flow, by Wan's pipeline and diffusers' Euler."""
    pipeline: Any = tiny_wan_pipeline("euler")
    pipeline.register_modules(transformer=GaussianTransformer(**WAN_SIZES).eval())
    errors: list[list[float]] = [[], []]
    for num_steps in (40, 80):
        with watch(pipeline, [0, num_steps // 2], solve=solver_step(solver)) as seen:
            pipeline(prompt="red", num_inference_steps=num_steps, guidance_scale=1.0, output_type="latent",
                     generator=torch.Generator().manual_seed(1), **TINY_CALL)  # fmt: skip
        assert seen.final is not None and seen.num_calls == num_steps
        noise, middle = seen.steps[0].state, seen.steps[1]
        exact = (1 - middle.sigma) * MEAN + math.hypot((1 - middle.sigma) * DEVIATION, middle.sigma) * noise
        errors[0].append(float((middle.state - exact).square().mean().sqrt()))
        errors[1].append(float((seen.final - MEAN - DEVIATION * noise).square().mean().sqrt()))
    assert all(expected - 0.2 < order(each) < expected + 0.5 for each in errors)
    assert errors[1][1] < (0.03 if expected == 1 else 0.003)


@torch.no_grad()
@pytest.mark.parametrize("scheduler", ["dpm", "unipc", "euler"])
def test_eulers_steps_are_the_same_whatever_the_scheduler(scheduler: str):
    """`next = state + (next_sigma - sigma) * velocity` at every step, also where the scheduler's own are others."""
    pipeline = tiny_wan_pipeline(scheduler)
    with watch(pipeline, solve=solver_step("euler")) as seen:
        pipeline(prompt="red", num_inference_steps=4, guidance_scale=3.0, output_type="latent", **TINY_CALL)
    for step, after in zip(seen.steps, [*(step.state for step in seen.steps[1:]), seen.final], strict=True):
        assert torch.equal(euler_step(step.state, step.velocity, step.sigma, step.next_sigma), after)  # pyright: ignore


@torch.no_grad()
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_recorded_states_follow_the_trapezoidal_rule_in_every_family(family: str):
    """With rising sigmas, doubled batches, packed states, given images, two experts: between any two states."""
    make, arguments = TINY_FAMILIES[family]
    pipeline = make()
    with watch(pipeline, solve=solver_step("adams2")) as seen:
        pipeline(prompt="red", num_inference_steps=5, output_type="latent", **arguments)
    assert seen.final is not None and len(seen.steps) == 5
    for here, there in zip(seen.steps, seen.steps[1:], strict=False):
        mean = (here.velocity + there.velocity) / 2
        torch.testing.assert_close(there.state, euler_step(here.state, mean, here.sigma, there.sigma))
    before, last = seen.steps[-2:]
    bend = (last.velocity - before.velocity) / (last.sigma - before.sigma)
    middle = last.velocity + (last.next_sigma - last.sigma) / 2 * bend
    torch.testing.assert_close(seen.final, euler_step(last.state, middle, last.sigma, last.next_sigma))


def test_another_solver_admits_no_other_schedulers():
    """The rule is checked on the scheduler's own step: that of a model of another kind would look like Euler's."""
    pipeline = tiny_wan_pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler(prediction_type="epsilon")
    with pytest.raises(UserError, match="is not next = state"), watch(pipeline, solve=solver_step("adams2")):
        pipeline(prompt="red", num_inference_steps=4, output_type="latent", **TINY_CALL)


@pytest.mark.parametrize("family", ["wan-unipc", "wan-dpm", "wan-i2v", "hunyuan", "mochi"])
def test_key_levels_are_those_of_a_longer_recording(family: str):
    """Wherever a scheduler's levels nest, those of 10 and of 20 steps have the same 5 key points."""
    make, arguments = TINY_FAMILIES[family]
    pipeline = make()
    few, many = (denoising_grid(pipeline, number, prompt="red square", **arguments) for number in (10, 20))
    for short, long in zip(few, many, strict=True):
        key = [[grid[i] for i in keypoint_indices(n, 5)[: len(grid) - n + 5]] for grid, n in ((short, 10), (long, 20))]
        assert key[0] == pytest.approx(key[1], abs=1e-5 * max(1, max(key[1])))


def test_a_student_of_another_solver_is_compared_with_the_teachers_own_clips(tmp_path: Path):
    """Recorded in 10 steps of second order: data set and student say so; the teacher's row is its own 20 steps."""
    folder = record_tiny(tmp_path, "unipc", solver="adams2", teacher_num_steps=20)
    manifest, data = folder.manifest, tmp_path / "data"
    assert (manifest.solver, manifest.num_steps, manifest.teacher_num_steps) == ("adams2", 10, 20)
    assert manifest.scheduler["class"] == "UniPCMultistepScheduler" and manifest.nested_schedule
    distill(DistillConfig(data=str(data), out=tmp_path / "student", num_iterations=2, batch_size=2, num_validation=0))
    student = read_student_config(tmp_path / "student")
    assert (student.solver, student.recorded_num_steps, student.teacher_num_steps) == ("adams2", 10, 20)
    assert student.scheduler["class"] == "UniPCMultistepScheduler" and student.scheduler["config"]["solver_order"] == 1
    assert "10 steps of adams2" in (tmp_path / "student" / "README.md").read_text()

    (tmp_path / "test.txt").write_text("\n".join(PROMPTS[:2]))
    config = EvaluateConfig(
        student=str(tmp_path / "student"), out=tmp_path / "report", prompts=tmp_path / "test.txt", num_prompts=2
    )
    teacher, *_ = evaluate(config)["rows"]
    assert (teacher["num_steps"], teacher["denoiser_calls"]) == (20, 40)
    arguments = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 12}
    plain = with_arguments(load_model(str(tmp_path / "teacher")), arguments)
    [clips] = sample_clips(plain, PROMPTS[:1], [FIRST_ITEM], num_steps=20, guidance_scale=3.0)
    kept = [safe_open(path, "pt").get_tensor("latents") for path in sorted((tmp_path / "report/cache").glob("*/*"))
            if "latents" in safe_open(path, "pt").keys()]  # fmt: skip # noqa: SIM118
    assert any(torch.equal(latents[0], clips.latents[0]) for latents in kept)


def test_a_student_of_another_solver_runs_in_plain_diffusers(tmp_path: Path):
    """Exported, it takes the same Euler steps over the same levels as in accvideo."""
    data = str(record_tiny(tmp_path, "unipc", solver="adams2", num_trajectories=2).path)
    distill(DistillConfig(data=data, out=tmp_path / "student", num_iterations=2, batch_size=2, num_validation=0))
    export(ExportConfig(student=str(tmp_path / "student"), to="diffusers", out=tmp_path / "plain"))
    plain: Any = DiffusionPipeline.from_pretrained(tmp_path / "plain")
    latents = plain(
        prompt=PROMPTS[0],
        num_inference_steps=5,
        guidance_scale=1.0,
        output_type="latent",
        generator=item_generator(0, 3),
        height=32,
        width=32,
        num_frames=5,
        max_sequence_length=12,
    ).frames
    [clips] = sample_clips(load_model(str(tmp_path / "student")), PROMPTS[:1], [3])  # fmt: skip
    torch.testing.assert_close(clips.latents, latents, rtol=0, atol=1e-5)


def test_repair_records_by_the_same_solver(tmp_path: Path):
    for number, settings in enumerate(({"solver": "adams2"}, {"solver": "euler", "teacher_num_steps": 10}, {})):
        here = tmp_path / str(number)
        here.mkdir()
        record_tiny(here, num_trajectories=2, **settings)  # pyright: ignore[reportArgumentType]
        lost = here / "data" / "000001.safetensors"
        before = lost.read_bytes()
        lost.unlink()
        repair(RepairConfig(folder=here / "data", prompts=(here / "prompts.txt",)))
        assert lost.read_bytes() == before and problems(str(here / "data")) == []
    assert [read_manifest(tmp_path / n / "data").teacher_num_steps for n in "012"] == [50, None, None]


def test_a_recording_cannot_go_on_by_another_solver(tmp_path: Path):
    record_tiny(tmp_path, num_trajectories=1)
    with pytest.raises(UserError, match='solver "own" -> "adams2"'):
        record_tiny(tmp_path, num_trajectories=1, solver="adams2", teacher_num_steps=10)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    del manifest["solver"], manifest["teacher_num_steps"], manifest["sha256"]  # as an earlier version wrote it
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    assert TrajectoryFolder(tmp_path / "data").manifest.solver == "own"
    assert len(record_tiny(tmp_path, num_trajectories=2)) == 2
