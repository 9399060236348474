import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler, WanTransformer3DModel

import accvideo.analysis.solvers as analysis
from accvideo.analysis.solvers import SolversConfig, enough, relative_distances, solvers, step_of
from accvideo.inference.model import Model
from accvideo.types import UserError
from tests.test_flow import gaussian_velocity
from tests.tiny import TINY_CALL, WAN_SIZES, tiny_wan_pipeline

NAMES = ("euler", "adams2", "dpm2", "unipc2")


class GaussianTransformer(WanTransformer3DModel):
    """The exact velocity of Gaussian videos at the scheduler's own noise level, which its timestep is rounded from."""

    pipeline: list[Any] = []

    def forward(self, hidden_states: Any, *_: Any, **__: Any) -> Any:
        """The velocity, as Wan's pipeline asks for it."""
        scheduler = self.pipeline[0].scheduler
        return (gaussian_velocity(hidden_states, float(scheduler.sigmas[scheduler.step_index or 0])),)


def gaussian_teacher(scheduler: str) -> Model:
    pipeline: Any = tiny_wan_pipeline(scheduler)
    transformer = GaussianTransformer(**WAN_SIZES).eval()
    transformer.pipeline = [pipeline]
    pipeline.register_modules(transformer=transformer)
    return Model("gaussian", pipeline, "", 50, 1.0, 8, dict(TINY_CALL))


@pytest.fixture
def config(tmp_path: Path) -> SolversConfig:
    (tmp_path / "prompts.txt").write_text("red\nblue\ngreen\n")
    return SolversConfig(
        teacher="tests", out=tmp_path / "out", prompts=tmp_path / "prompts.txt", num_steps=(25, 50, 100), batch_size=2,
        reference_steps=800,
    )  # fmt: skip


def test_distances_are_relative_to_the_reference():
    reference = torch.randn(3, 2, 4, 5)
    factors = torch.tensor([[1.1, 1.0], [0.5, 2.0], [1.0, -1.0]])
    expected = torch.tensor([[0.1, 0.0], [0.5, 1.0], [0.0, 2.0]])
    torch.testing.assert_close(relative_distances(factors[..., None, None] * reference, reference), expected)


def test_enough_steps_are_the_least_that_are_as_near_as_fifty_of_eulers():
    def row(solver: str, num_steps: int, distance: float) -> dict[str, Any]:
        return {"solver": solver, "num_steps": num_steps, "to_reference": {"mean": [0.0, distance]}}

    rows = [row("euler", 50, 0.2), row("euler", 25, 0.4), row("adams2", 10, 0.3), row("adams2", 20, 0.2)]
    rows += [row("adams2", 25, 0.1), row("dpm2", 25, 0.21)]
    assert enough(rows) == {"euler": 50, "adams2": 20, "dpm2": None}


@pytest.mark.parametrize("scheduler", ["dpm", "euler"])
def test_solvers_come_to_the_exact_flow_with_their_order(
    config: SolversConfig, scheduler: str, monkeypatch: pytest.MonkeyPatch
):
    """On a Gaussian teacher Euler's error halves with twice the steps, Adams' falls to a quarter; all converge."""
    monkeypatch.setattr(analysis, "load_model", lambda *_: gaussian_teacher(scheduler))
    results = solvers(config)
    rows = {(row["solver"], row["num_steps"]): row for row in results["rows"]}
    assert set(rows) == {(name, n) for name in NAMES for n in (25, 50, 100)}
    errors = {key: row["to_reference"]["mean"] for key, row in rows.items()}
    for keypoint in (3, 4) if scheduler == "dpm" else (4,):
        orders = [math.log2(errors[name, 50][keypoint] / errors[name, 100][keypoint]) for name in ("euler", "adams2")]
        assert orders[0] == pytest.approx(1, abs=0.1) and orders[1] == pytest.approx(2, abs=0.15)
    # This scheduler's levels depend on the number of steps: only the videos can be compared.
    assert [errors["adams2", 25][k] is None for k in range(5)] == [scheduler == "euler"] * 4 + [False]
    for name in NAMES[1:]:
        assert errors[name, 100][-1] < errors[name, 25][-1] and errors[name, 100][-1] < 0.6 * errors["euler", 100][-1]
    assert rows["euler", 50]["to_euler"]["mean"] == [0.0] * 5 and rows["adams2", 25]["denoiser_calls"] == 25
    assert results["enough"]["euler"] == 50 and results["enough"]["adams2"] == 25

    # The same command reads what it has made, and writes the same numbers.
    monkeypatch.setattr(analysis, "watch", None)
    assert solvers(config)["rows"] == results["rows"]
    assert json.loads((config.out / "solvers.json").read_text())["rows"] == results["rows"]
    assert "adams2, 25 | 25 |" in (config.out / "solvers.md").read_text()
    ElementTree.parse(config.out / "solvers.svg")


@pytest.mark.parametrize("name", ["dpm2", "unipc2"])
@torch.no_grad()
def test_solvers_of_diffusers_take_their_own_steps_over_given_levels(name: str):
    """As they do by themselves where these levels are their own."""
    scheduler: Any = {"dpm2": DPMSolverMultistepScheduler, "unipc2": UniPCMultistepScheduler}[name](
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, solver_order=2
    )
    scheduler.set_timesteps(8)
    sigmas = scheduler.sigmas.tolist()
    state = expected = torch.randn(1, 50)
    step = step_of(name, sigmas)
    for timestep, sigma, next_sigma in zip(scheduler.timesteps, sigmas, sigmas[1:], strict=False):
        expected = scheduler.step(gaussian_velocity(expected, sigma), timestep, expected, return_dict=False)[0]
        _, state = step(state, gaussian_velocity(state, sigma), sigma, next_sigma)  # pyright: ignore
    torch.testing.assert_close(state, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": (10, 16)}, "5 student steps do not divide the teacher's 16 steps"),
        ({"reference_steps": 501}, "do not divide"),
        ({"num_prompts": 0}, "num_prompts is 0"),
        ({"prompts": None}, "give --prompts FILE"),
        ({"teacher": "playground-student"}, "is a student"),
    ],
)
def test_mistakes_are_told_before_any_work(config: SolversConfig, change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        solvers(replace(config, **change))
    assert not config.out.exists()
