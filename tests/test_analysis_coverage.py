import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from accvideo.analysis.baselines.perflow import solve
from accvideo.analysis.coverage import (
    CoverageConfig,
    coverage,
    decoded,
    follow,
    measure_level,
    nearest,
    off_share,
    stretched,
)
from accvideo.flow import noised
from accvideo.teacher import PLAYGROUND_TEACHER, load_pipeline
from accvideo.trajectory import collate_trajectories
from accvideo.types import UserError
from tests.gaussian import DEVIATION, gaussian_velocity, scale
from tests.recorded import record_tiny


def normal(size: int, seed: int, dim: int = 2) -> Tensor:
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_nearest_state_and_its_distance():
    states = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    points = torch.tensor([[0.0, 1.0], [3.0, 0.0], [9.0, 12.0]])
    expected = torch.tensor([1.0, 3.0, 10.0]) / 2**0.5
    torch.testing.assert_close(nearest(points, states), expected)
    assert off_share(torch.tensor([0.5, 2.0, 3.0, 4.0]), torch.linspace(0, 2.5, 101), beyond=0.2) == 0.5


@pytest.mark.parametrize("sigma", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("stretch", [0.0, 0.5, 2.0])
def test_the_share_of_a_gaussians_exact_flow_has_a_closed_form(sigma: float, stretch: float):
    """Videos of N(0, s^2) in the plane and one covering trajectory, at rest in the middle.

    Squared distances of a plane normal with variance v are exponential with mean 2 v: the share beyond what 1 % of the
    teacher's own reach is 0.01^(own v / v). As they are, videos make points that are spread as the teacher's own: 1 %.
    """
    noise, videos = normal(400_000, 10), DEVIATION * normal(400_000, 11)
    own = float(scale(torch.tensor(sigma))) * noise
    points = noised(stretched(videos, torch.zeros(2), stretch), normal(400_000, 12), sigma)
    found = measure_level(torch.zeros(1, 2, dtype=torch.float64), own, points, beyond=0.01)
    variance = ((1 - sigma) * (1 + stretch) * DEVIATION) ** 2 + sigma**2
    expected = 0.01 ** (float(scale(torch.tensor(sigma))) ** 2 / variance)
    assert found["share"] == pytest.approx(expected, rel=0.15)
    assert found["distance"] / found["own_distance"] == pytest.approx(
        variance**0.5 / float(scale(torch.tensor(sigma))), rel=0.02
    )


def test_the_error_of_a_gaussians_exact_flow_has_a_closed_form():
    """The flow scales: from a noised point it leads to another video, with a known correlation to the first.

    Its mean squared distance, as a share of two videos', is 1 - (1 - sigma) s / scale(sigma): 1 at noise, 0 at video.
    """
    videos, sigma = DEVIATION * normal(20_000, 3, 1), 0.6
    point = noised(videos, normal(20_000, 4, 1), sigma)
    levels = torch.linspace(sigma, 0.0, 301, dtype=torch.float64)
    reached = solve(gaussian_velocity, point, levels)
    apart = (videos - videos.roll(1, 0)).square().mean()
    expected = 1 - (1 - sigma) * DEVIATION / scale(torch.tensor(sigma))
    assert float((reached - videos).square().mean() / apart) == pytest.approx(float(expected), rel=0.03)


def test_from_its_own_states_the_teacher_is_followed_to_the_recorded_video(tmp_path: Path):
    from accvideo.analysis.baselines.training import Recipe, start

    folder = record_tiny(tmp_path)
    teacher = start(Recipe(method="perflow", learning_rate=0.0, budget=0), folder).teacher
    batch = collate_trajectories([folder[0], folder[3]])
    for keypoint in (0, 2, 4):
        reached = follow(teacher, folder.manifest, batch, batch.states[:, keypoint], keypoint)
        torch.testing.assert_close(reached, batch.states[:, -1], atol=1e-3, rtol=1e-3)


def test_clips_are_decoded_as_the_pipeline_does():
    pipeline: Any = load_pipeline(str(PLAYGROUND_TEACHER))
    noise = torch.randn(1, 48, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    call = {"prompt": "a red star spins on a plain navy background", "num_inference_steps": 1, "height": 64}
    call |= {"width": 64, "num_frames": 17, "guidance_scale": 1.0, "max_sequence_length": 32, "latents": noise}
    frames = torch.from_numpy(pipeline(**call, output_type="np").frames)
    latents = pipeline(**call, output_type="latent").frames
    assert ((frames * 255).round().int() - decoded(pipeline, latents).int()).abs().max() <= 1


def test_a_data_set_is_measured_and_gone_on_with(tmp_path: Path):
    record_tiny(tmp_path)
    config = CoverageConfig(
        data=tmp_path / "data", out=tmp_path / "out", stretches=(0.0, 40.0), num_followed=2, batch_size=2, device="cpu"
    )
    results = coverage(config)
    assert results["num_trajectories"] == {"covering": 3, "probing": 3} and len(results["sigmas"]) == 5
    near, far = results["rows"]
    assert len(near["levels"]) == 5 and far["levels"][-1]["share"] == 1  # videos forty times as far apart
    assert far["levels"][-1]["distance"] > 5 * near["levels"][-1]["distance"]
    noise_alone = pytest.approx(near["levels"][0]["distance"], rel=0.01)
    assert far["levels"][0]["distance"] == noise_alone
    assert [(row["stretch"], round(row["sigma"], 3)) for row in results["followed"][:3]] == [
        (None, 0), (0.0, round(results["sigmas"][1], 3)), (40.0, round(results["sigmas"][1], 3)),
    ]  # fmt: skip
    assert all("all_right" not in row and row["error"] >= 0 for row in results["followed"])
    assert json.loads((tmp_path / "out" / "coverage.json").read_text()) | {"folder": str(tmp_path / "out")} == results
    ElementTree.parse(tmp_path / "out" / "coverage.svg")
    kept = tmp_path / "out" / "cache" / "1-0.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"error": 7.0}))
    assert coverage(config)["followed"][1]["error"] == 7
    with pytest.raises(UserError, match="other settings"):
        coverage(replace(config, seed=1))


def test_settings_without_sense_are_refused(tmp_path: Path):
    wrong: list[dict[str, Any]] = [{"stretches": ()}, {"stretches": (-0.1,)}, {"beyond": 1.0}, {"num_followed": -1}]
    for settings in wrong:
        with pytest.raises(UserError):
            CoverageConfig(data=tmp_path, out=tmp_path, **settings)
