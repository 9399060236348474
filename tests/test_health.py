import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from accvideo.distill import DistillConfig, distill
from accvideo.training.checkpoint import read_metrics
from accvideo.training.health import CHANCE_LOSSES, Watch, percentile_limits, sample_health, saturation
from tests.recorded import record_tiny

RUNS: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "docs/healthy-training/metrics.json").read_text("utf-8")
)
"""Metrics of real distillations of the playground, made by benchmarks/healthy_training.py."""


def rung(lines: list[dict[str, Any]], num_student_steps: int = 5) -> dict[str, int]:
    """The alarms that ring at these lines, and when."""
    watch = Watch(num_student_steps, CHANCE_LOSSES["nonsaturating"])
    return {alarm["alarm"]: alarm["iteration"] for line in lines for alarm in watch.look(line)}


# --- Alarms on real runs ---


def test_no_alarm_rings_at_a_healthy_run():
    assert rung(RUNS["healthy"]) == {}
    assert max(line["iteration"] for line in RUNS["healthy"]) == 59


@pytest.mark.parametrize(
    ("run", "alarm", "latest"),
    [
        ("learning rate x 100", "diverging", 9),
        ("learning rate x 100", "saturation", 9),
        ("learning rate x 100", "motion", 9),
        ("learning rate x 100", "worse_than_start", 19),
        ("adversarial weight 10", "adversarial_pull", 24),
        ("frozen heads", "heads_idle", 39),
    ],
)
def test_the_alarm_that_tells_what_is_wrong_rings_soon(run: str, alarm: str, latest: int):
    assert rung(RUNS[run])[alarm] <= latest


def test_frozen_heads_ring_no_other_alarm():
    assert rung(RUNS["frozen heads"]).keys() == {"heads_idle"}


def test_a_resumed_run_rings_the_same_alarms_at_the_same_lines():
    """What a watch knows follows from the lines, also from those in the file, where the alarms stand between them."""
    for lines in RUNS.values():
        whole = Watch(5, CHANCE_LOSSES["nonsaturating"])
        expected = [(line, whole.look(line)) for line in lines]
        for cut in (1, 7, 23, len(lines) - 2):
            resumed = Watch(5, CHANCE_LOSSES["nonsaturating"])
            for line, alarms in expected[:cut]:
                for each in (line, *alarms):
                    resumed.look(each)
            assert [(line, resumed.look(line)) for line in lines[cut:]] == expected[cut:]


# --- Alarms one by one: each rings on its side of the limit only, and once ---


def steps(num: int, **values: float) -> list[dict[str, Any]]:
    return [{"iteration": i, "keypoint": i % 2, **values} for i in range(num)]


def validation(iteration: int, loss: float = 0.5, error: float = 0.5, **samples: float) -> dict[str, Any]:
    healthy = {"saturation": 0.002, "contrast": 1.0, "motion": 1.0, "diversity": 1.0}
    return {"iteration": iteration, "validation_loss": [loss, loss], "latent_error": error} | healthy | samples


def start(**samples: float) -> dict[str, Any]:
    return {"iteration": 0, "start": {k: v for k, v in validation(0, **samples).items() if k != "iteration"}}


HEADS = {"head_loss": 1.5, "real_accuracy": 0.5, "fake_accuracy": 0.5}
PULL = {"trajectory_gradient_norm": 0.5}

CASES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "not_finite": (
        steps(4, trajectory_loss=1.0, gradient_norm=1.0),
        [*steps(4, trajectory_loss=1.0, gradient_norm=1.0), {"iteration": 4, "keypoint": 0, "gradient_norm": math.nan}],
    ),
    "diverging": (
        [start(), *steps(20, trajectory_loss=0.95, **PULL)],
        [start(), *steps(2, trajectory_loss=0.9, **PULL), *steps(20, trajectory_loss=1.1, **PULL)],
    ),
    "adversarial_pull": (
        steps(20, adversarial_gradient_norm=0.4, trajectory_loss=0.5, **PULL),
        steps(20, adversarial_gradient_norm=0.6, trajectory_loss=0.5, **PULL),
    ),
    "heads_win": (
        steps(20, **HEADS | {"real_accuracy": 1.0, "fake_accuracy": 0.95, "head_loss": 0.1}),
        steps(20, **HEADS | {"real_accuracy": 0.99, "fake_accuracy": 1.0, "head_loss": 0.1}),
    ),
    "heads_idle": (
        steps(2, **HEADS) + steps(18, **HEADS | {"head_loss": 1.4}),
        steps(20, **HEADS),
    ),
    "worse_than_start": (
        [start(), validation(9, error=1.2), validation(19, error=0.9), validation(29, error=1.2)],
        [start(), validation(9, error=1.2), validation(19, error=1.1)],
    ),
    "held_out_rises": (
        [start(), validation(9), validation(19, loss=0.7), validation(29, loss=0.55), validation(39, loss=0.7)],
        [start(), validation(9), validation(19, loss=0.65), validation(29, loss=0.65)],
    ),
    "saturation": (
        [start(), validation(9, saturation=0.019)],
        [start(), validation(9, saturation=0.021)],
    ),
    "contrast": (
        [start(contrast=0.7), validation(9, contrast=0.7), validation(19, contrast=1.2)],
        [start(contrast=0.7), validation(9, contrast=0.6)],
    ),
    "motion": (
        [start(motion=0.5), validation(9, motion=0.5), validation(19, motion=1.5)],
        [start(), validation(9, motion=1.7)],
    ),
    "diversity": (
        [start(), validation(9, diversity=0.85)],
        [start(), validation(9, diversity=0.7), validation(19, diversity=0.6)],
    ),
}  # fmt: skip
"""Lines at which an alarm is silent, and lines at which it rings."""


@pytest.mark.parametrize("name", CASES)
def test_an_alarm_rings_beyond_its_limit_only_and_once(name: str):
    silent, loud = CASES[name]
    assert rung(silent, 2) == {}
    watch = Watch(2, CHANCE_LOSSES["nonsaturating"])
    alarms = [alarm for line in loud for alarm in watch.look(line)]
    assert [alarm["alarm"] for alarm in alarms] == [name]
    (alarm,) = alarms
    assert f"{alarm['measured']:.3g}" in alarm["message"] and f"{alarm['threshold']:.4g}" in alarm["message"]


def test_a_student_that_starts_as_its_teacher_is_told_when_it_becomes_worse():
    """As many steps as the teacher takes, nothing to learn: all errors are 0 before the first update."""
    same, worse = (validation(i, loss=error, error=error) for i, error in ((9, 0.0), (19, 3e-6)))
    lines = [start(loss=0.0, error=0.0), *steps(2, trajectory_loss=0.0, **PULL), same]
    assert rung(lines, 2) == {}
    lines += [worse, worse | {"iteration": 29}]
    assert rung(lines, 2) == {"worse_than_start": 29, "held_out_rises": 29}


def test_without_held_out_trajectories_a_student_gone_astray_at_once_is_seen_too():
    """Only the first key point is visited before the first update."""
    losses = [1.0, 50.0, 60.0, 55.0]
    lines = [step | {"trajectory_loss": loss} for step, loss in zip(steps(4, **PULL), losses, strict=True)]
    assert rung(lines, 2) == {"diverging": 1}


def test_a_step_that_began_off_the_trajectory_has_a_loss_of_its_own_scale():
    """As with `--update shared`, where the target leads back to the trajectory: no comparison with the start."""
    lines = [start(), *steps(4, trajectory_loss=0.5, **PULL), *steps(8, trajectory_loss=9.0, **HEADS)]
    assert rung(lines, 2) == {}


# --- Measures ---


def video_latents(seed: int = 0, num: int = 6) -> torch.Tensor:
    """Smooth in time, different by sample, channel 1 four times as wide as channel 0."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randn(2, num, 2, 1, 8, 8, generator=generator)
    time = torch.linspace(0, 1, 5)[:, None, None]
    return ((1 - time) * ends[0] + time * ends[1]) * torch.tensor([0.5, 2.0])[:, None, None, None]


def test_the_teachers_own_samples_are_healthy():
    latents = video_latents(num=40)
    health = sample_health(latents, latents)
    assert health["saturation"] == pytest.approx(0.002, rel=0.1)
    assert [health[name] for name in ("contrast", "motion", "diversity")] == [1, 1, 1]


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_measures_scale_with_what_they_measure(factor: float):
    teacher = video_latents()
    health = sample_health(teacher * factor, teacher)
    assert [health[name] for name in ("contrast", "motion", "diversity")] == pytest.approx([factor] * 3)
    mean = teacher.mean(0, keepdim=True)
    assert sample_health(mean + factor * (teacher - mean), teacher)["diversity"] == pytest.approx(factor)
    slow = teacher.mean(2, keepdim=True)
    assert sample_health(slow + factor * (teacher - slow), teacher)["motion"] == pytest.approx(factor)


def test_samples_that_stand_still_or_are_alike_or_flat_have_none():
    teacher = video_latents()
    still = sample_health(teacher[:, :, :1].expand_as(teacher), teacher)
    assert still["motion"] == 0 and still["diversity"] > 0.5
    assert sample_health(teacher[:1].expand_as(teacher), teacher)["diversity"] == 0
    assert sample_health(torch.zeros_like(teacher), teacher)["contrast"] == 0


def test_saturation_is_seen_in_each_channel_by_its_own_limits():
    teacher = video_latents(num=40)
    student = teacher.clone()
    student[:, 0] *= 3  # still narrower than channel 1
    assert sample_health(student, teacher)["saturation"] > 0.05 > sample_health(teacher, teacher)["saturation"]


def test_packed_latents_are_measured_as_they_would_be_unpacked():
    """`[batch, tokens, channels]`; only motion cannot be seen."""
    teacher, student = video_latents(0), 1.5 * video_latents(1)
    packed = [latents.flatten(2).transpose(1, 2) for latents in (student, teacher)]
    found, expected = sample_health(*packed), sample_health(student, teacher)
    assert expected.pop("motion") and found == pytest.approx(expected)


def test_large_samples_are_thinned_out_for_their_percentiles():
    latents = torch.randn(1, 1, 3_000_000, generator=torch.Generator().manual_seed(0)).unflatten(2, (3, 1000, 1000))
    low, high = percentile_limits(latents)
    assert high.item() == pytest.approx(3.09, abs=0.03) and low.item() == pytest.approx(-3.09, abs=0.03)
    assert saturation(latents, (low, high)) == pytest.approx(0.002, rel=0.05)


# --- In a distillation ---


def test_a_learning_rate_far_too_high_is_told_on_stderr_and_in_the_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = record_tiny(tmp_path)
    config = DistillConfig(
        data=data.path, out=tmp_path / "student", num_iterations=15, batch_size=2, num_validation=2, validate_every=5,
        full=True, learning_rate=0.3, schedule="constant", adversarial_start=0, precision="float32", device="cpu",
        track="none",
    )  # fmt: skip
    distill(config)
    lines = read_metrics(config.out / "metrics.jsonl")
    alarms = [line for line in lines if "alarm" in line]
    (diverging,) = [line for line in alarms if line["alarm"] == "diverging"]
    assert diverging["iteration"] < 10 and diverging["measured"] > diverging["threshold"] == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"alarm at iteration {diverging['iteration']}: {diverging['message']}" in told
    start = next(line["start"] for line in lines if "start" in line)
    assert start.keys() == {"validation_loss", "latent_error", "saturation", "contrast", "motion", "diversity"}
    assert rung([line for line in lines if "alarm" not in line]) == {a["alarm"]: a["iteration"] for a in alarms}
