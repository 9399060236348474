import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from diffusers import WanTransformer3DModel

from accvideo.analysis.budget import judged_iterations, training_evaluations
from accvideo.analysis.cost import (
    CALLS,
    PAPER,
    VARIANTS,
    CostConfig,
    Recording,
    cheapest,
    compare,
    cost,
    largest,
    plan_recipes,
    plan_variants,
    work_left,
    write_beginning,
)
from accvideo.analysis.figure import whisker_ticks
from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.manifest import read_manifest
from accvideo.data.verify import problems
from accvideo.distill import distill
from accvideo.inference.student_config import read_student_config
from accvideo.training.recipe import DistillConfig
from accvideo.trajectory import trajectory_name
from accvideo.types import UserError
from tests.recorded import record_tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cost")
    record_tiny(path)
    return path / "data"


@pytest.mark.parametrize(
    "change",
    [
        {"adversarial_weight": 0.0},
        {"adversarial_start": 0, "update": "alternating", "full": True},
        {"adversarial_start": 6},
        {"adversarial_start": 3, "update": "shared"},
        {"adversarial_start": 99},
        {"adversarial_start": 3, "fresh_rollouts": True},
        {"adversarial_start": 0, "fresh_rollouts": True, "update": "shared"},
        {"adversarial_start": 6, "head_updates": 3},
        {"adversarial_start": 6, "num_validation": 2, "validate_every": 5},
    ],
)
def test_forward_passes_are_those_that_are_counted(data: Path, tmp_path: Path, change: dict[str, Any]):
    """Of a paired step one, of a judged one three: the student's own, and the teacher's of the fake and the real.

    One more at the start shows how wide the features are.
    """
    options = {"num_validation": 0, "track": "none", **change}
    config = DistillConfig(data=str(data), out=tmp_path / "out", num_iterations=13, batch_size=2, **options)
    iterations = judged_iterations(config, 5)
    plain, judged = 13 - len(iterations), len(iterations)
    seen = 0

    def count(module: torch.nn.Module, args: Any, kwargs: Any = None) -> None:
        nonlocal seen
        if isinstance(module, WanTransformer3DModel):
            seen += 1

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        distill(config)
    finally:
        hook.remove()
    together = 3 if config.update == "shared" else 4
    first_look = 5 if config.adversarial_weight else 0
    # Before the first iteration, after 5, 10 and 13: each step from the record, and in the student's own way.
    validations = 4 * 10 if config.num_validation else 0
    led = sum(each % 5 for each in iterations) if config.fresh_rollouts else 0
    assert seen == plain + judged * together + led + first_look + validations
    # A paired step has a backward pass, 2; a judged one another and that through the features to their input, 1.
    backward = 2 * (plain + judged) + (1 if config.update == "shared" else 3) * judged
    assert training_evaluations(config, 5) == 2 * (seen + backward)


def test_recipes_differ_in_records_and_training():
    config = CostConfig(out=Path("out"))
    published, plain, whole, half, quarter = plan_recipes(config)
    assert published.name == PAPER and published.training.update == "alternating" and published.training.full
    assert published.recording == plain.recording == Recording("euler", 50, 480)
    assert plain.training == whole.training == half.training == quarter.training
    assert [each.recording for each in (whole, half, quarter)] == [Recording("adams2", 25, n) for n in (480, 240, 120)]
    assert whole.recording.evaluations == 480 * 25 * CALLS
    assert training_evaluations(published.training, 5) == 32 * (600 * 9 + 5)
    assert training_evaluations(whole.training, 5) == 16 * (300 * 3 + 100 * 9 + 5)
    runs = [run for recipe in plan_recipes(config) for run in recipe.runs(Path("cache"), 3)]
    assert len({run.out for run in runs}) == 15 and {run.seed for run in runs} == {0, 1, 2}
    found = {each.recording for each in plan_recipes(config)}
    assert largest(found) == [Recording("adams2", 25, 480), Recording("euler", 50, 480)]


def test_variants_are_one_change_each_where_records_are_fewest():
    config = CostConfig(out=Path("out"), num_trajectories=960, fractions=(1, 8, 4))
    recipes = plan_recipes(config)
    variants = plan_variants(config, recipes)
    assert {each.recording for each in variants} == {Recording("adams2", 25, 120)}
    for variant, change in zip(variants, VARIANTS.values(), strict=True):
        assert variant.training == replace(recipes[-1].training, **change) != recipes[-1].training
    assert len({run.out for each in recipes + variants for run in each.runs(Path("cache"), 3)}) == 3 * 10
    assert plan_variants(replace(config, variants=False), recipes) == []


def test_what_is_left_shrinks_with_what_is_there(tmp_path: Path):
    config = CostConfig(out=tmp_path, num_trajectories=8, fractions=(1, 2), num_seeds=1, num_prompts=4, variants=False)
    recipes, cache = plan_recipes(config), tmp_path / "cache"
    before = work_left(config, recipes, cache)
    assert before["recording"].sampled == 8 * CALLS * (50 + 25) and before["evaluating"].clips == 4 * 9
    assert before["evaluating"].sampled == 4 * (100 + 10 + 5 + 4 + 10 + 4 * 5)
    (folder := cache / "records-adams2-25-8").mkdir(parents=True)
    (folder / trajectory_name(3)).touch()
    run = recipes[0].runs(cache, 1)[0]
    run.out.mkdir()
    (run.out / "student.json").touch()
    after = work_left(config, recipes, cache)
    assert after["recording"].sampled == before["recording"].sampled - 25 * CALLS
    assert after["distilling"].trained == before["distilling"].trained - training_evaluations(run, 5)


def test_the_beginning_of_a_data_set_is_one(data: Path, tmp_path: Path):
    for _ in range(2):  # the second time it is there
        write_beginning(data, 2, tmp_path / "part")
    part, whole = TrajectoryFolder(tmp_path / "part"), TrajectoryFolder(data)
    assert len(part) == 2 and problems(str(tmp_path / "part")) == []
    assert torch.equal(part[1].states, whole[1].states)
    assert read_manifest(tmp_path / "part").differences(whole.manifest) == ["num_trajectories"]


def row(name: str, evaluations: int, right: list[float], error: list[float]) -> dict[str, Any]:
    metrics = {"all_right": right, "latent_mse": error}
    return {"name": name, "recording": evaluations // 4, "training": evaluations - evaluations // 4, "metrics": metrics}


def test_a_recipe_is_as_good_unless_it_is_worse_by_more_than_a_standard_error():
    rows = compare(
        [
            row(PAPER, 1000, [0.70, 0.72, 0.74], [0.20, 0.21, 0.22]),
            row("half", 500, [0.71, 0.71, 0.71], [0.30, 0.30, 0.30]),
            row("fifth", 200, [0.71, 0.72, 0.73], [0.15, 0.16, 0.17]),
            row("tenth", 100, [0.60, 0.61, 0.62], [0.21, 0.22, 0.23]),
        ]
    )
    assert [each["share"] for each in rows] == [1, 0.5, 0.2, 0.1]
    assert rows[1]["all_right_difference"]["mean"] == pytest.approx(-0.01)
    assert rows[1]["all_right_difference"]["error"] == pytest.approx(0.02 / 3**0.5)
    assert [each["all_right_difference"]["as_good"] for each in rows] == [True, True, True, False]
    assert [each["latent_mse_difference"]["as_good"] for each in rows] == [True, False, True, False]
    assert rows[2]["latent_mse_difference"]["mean"] == pytest.approx(0.05)  # less error is better
    assert cheapest(rows) == {
        name: {"recipe": "fifth", "share": 0.2, "within_a_quarter": True} for name in ("all_right", "latent_mse")
    }
    assert cheapest(rows[:2])["latent_mse"] == {"recipe": PAPER, "share": 1.0, "within_a_quarter": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_seeds": 0}, "num_seeds is 0"),
        ({"fractions": (1, 2000)}, "what the records are divided by"),
        ({"fractions": ()}, "fractions is"),
        ({"fractions": (1, 32)}, "the fewest records are 15, and one of the variants holds out 16"),
        ({"num_steps": 18}, "5 student steps do not divide the teacher's 18 steps"),
    ],
)
def test_mistakes_are_told_at_once(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        CostConfig(out=Path("out"), **change)


@pytest.mark.slow
def test_recipes_are_recorded_distilled_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = CostConfig(
        out=tmp_path / "out", num_trajectories=4, fractions=(2,), num_steps=5, num_iterations=10, batch_size=2,
        paper_iterations=5, paper_batch_size=2, num_seeds=1, num_prompts=1, variants=False,
    )  # fmt: skip
    estimate = cost(replace(config, estimate=True))
    assert not config.out.exists() and "a denoiser evaluation" in capsys.readouterr().err
    assert estimate["work"]["recording"]["sampled"] == 4 * 100 + 2 * 10
    results = cost(config)
    names = [row["name"] for row in results["recipes"]]
    assert names == ["paper", "default, the paper's records", "default, 2 records of 5 steps"]
    assert [row["evaluations"] for row in results["recipes"]] == [400 + 100, 400 + 70, 20 + 70]
    assert all(len(row["metrics"]["latent_mse"]) == 1 for row in results["recipes"])
    student = read_student_config(config.out / "cache" / "default-2-records-of-5-steps-0")
    assert (student.solver, student.recorded_num_steps, student.teacher_num_steps) == ("adams2", 5, 50)
    assert results["teacher"]["num_steps"] == 50
    ElementTree.parse(config.out / "cost.svg")
    again = cost(config)
    assert again["recipes"] == results["recipes"] == json.loads((config.out / "cost.json").read_text())["recipes"]


def test_whiskers_end_between_the_first_and_the_last_tick():
    """Of two values the deviation reaches beyond both."""
    series = [[1.0, 3.0], [5.0, 5.0, 8.0], [4.0]]
    ticks = whisker_ticks(series)
    assert ticks[0] <= 2 - math.sqrt(2) and 6 + math.sqrt(3) <= ticks[-1]
    assert len(whisker_ticks([[4.0]])) > 1
