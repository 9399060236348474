from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from accvideo.analysis.ablation import (
    CUT_SHORT,
    REFERENCE,
    AblationConfig,
    ablation,
    learning_evaluations,
    plan_runs,
    variant,
)
from accvideo.analysis.students import metric_figure, readable_range
from accvideo.inference.student_config import read_student_config
from accvideo.types import UserError
from tests.recorded import PROMPTS, record_tiny


def test_each_variant_changes_one_thing_for_all_seeds():
    config = AblationConfig(data="data", out=Path("out"), num_seeds=2, num_iterations=50, equal="iterations")
    plan = plan_runs(config, 64, 5)
    changes = {name: variant(runs[0], plan[REFERENCE][0]) for name, runs in plan.items()}
    assert changes[REFERENCE] == {} and plan[REFERENCE][0].adversarial_start == 0
    assert changes["trajectory loss only"] == {"adversarial_weight": 0.0}
    assert changes["one shared head"] == {"shared_head": True}
    assert changes["adversarial from 60% on"] == {"adversarial_start": 30}
    assert changes["an eighth of the trajectories"] == {"num_validation": 56, "validate_every": 10**9}
    assert all(len(change) == 1 for name, change in changes.items() if change and "trajectories" not in name)
    assert len({str(change) for change in changes.values()}) == len(changes)
    outs = [run.out for runs in plan.values() for run in runs]
    assert len(set(outs)) == len(outs) == 2 * len(plan)
    assert [run.seed for run in plan["hinge loss"]] == [0, 1]
    assert "chosen trajectories alone" not in plan
    chosen = plan_runs(replace(config, keep=Path("right.txt"), figure_7=True), 64, 5)
    assert variant(chosen["chosen trajectories alone"][0], chosen[REFERENCE][0]) == {"keep": "right.txt"}
    late = plan_runs(replace(config, adversarial_from=0.6), 64, 5)
    assert late[REFERENCE][0].adversarial_start == 30 and late["adversarial from the start"][0].adversarial_start == 0
    assert list(plan_runs(replace(config, only=("hinge loss",)), 64, 5)) == [REFERENCE, "hinge loss"]
    with pytest.raises(UserError, match='no variant "hinge"; choose from: trajectory loss only, one shared head'):
        plan_runs(replace(config, only=("hinge",)), 64, 5)
    with pytest.raises(UserError, match="adversarial_from is 1"):
        replace(config, adversarial_from=1)


def test_all_variants_take_as_many_evaluations():
    """A trajectory loss has a third of an iteration's, so three times the iterations."""
    plan = plan_runs(AblationConfig(data="data", out=Path("out"), num_seeds=1, adversarial_from=0.5), 64, 5)
    [short] = plan.pop(CUT_SHORT)
    assert short.num_iterations == 200 and not short.adversarial_weight
    budget = learning_evaluations(plan[REFERENCE][0], 5)
    assert budget == 16 * (100 * 3 + 100 * 9 + 5) and plan[REFERENCE][0].num_iterations == 200
    for name, [run] in plan.items():
        # A whole sweep of judged iterations more or less, where a share of the iterations is no whole number of sweeps.
        assert learning_evaluations(run, 5) == pytest.approx(budget, abs=16 * 5 * 9), name
    assert plan["trajectory loss only"][0].num_iterations == round(1205 / 3)
    [shared] = plan["rollouts from recorded noise"]
    assert shared.first_adversarial / shared.num_iterations == pytest.approx(0.5, abs=0.01)


def test_students_can_be_told_apart_beside_teachers_that_are_far_off():
    values = [[95.0], [60.0], [90.0, 92.0], [93.0, 93.0]]
    low, high = readable_range(values, [False, False, True, True])
    assert high == 95 and low == pytest.approx(91 - 2**0.5)
    names = ("teacher", "teacher_few", "one", "another")
    rows = [
        {"name": name, "metrics": {"all_right": [value / 100 for value in each], "color": [1.0]}}
        for name, each in zip(names, values, strict=True)
    ]
    svg = metric_figure(rows)
    ElementTree.fromstring(svg)
    assert svg.count("<circle") == 3 + 4 + 2 * 2 and "‹ 60" in svg  # dots of rows and keys
    assert ">101<" not in svg and ">100<" in svg


@pytest.mark.slow
def test_variants_are_distilled_once_and_evaluated_together(tmp_path: Path):
    record_tiny(tmp_path)
    (tmp_path / "test.txt").write_text("\n".join(PROMPTS[:2]))
    config = AblationConfig(
        data=str(tmp_path / "data"), out=tmp_path / "out", figure_7=True, num_seeds=2, num_iterations=10,
        batch_size=2, num_prompts=2, prompts=tmp_path / "test.txt",
    )  # fmt: skip
    results = ablation(config)
    by_name = {row["name"]: row for row in results["rows"]}
    assert list(by_name)[-4:] == [CUT_SHORT, "trajectory loss only", "one shared head", "one head a key point"]
    assert by_name["teacher_few"]["num_steps"] == 5
    assert len(by_name["one shared head"]["metrics"]["latent_mse"]) == 2
    recipe = read_student_config(tmp_path / "out" / "cache" / "one-shared-head-1").recipe
    assert recipe["shared_head"] and recipe["seed"] == 1 and recipe["adversarial_start"] == 0
    assert read_student_config(tmp_path / "out" / "cache" / "trajectory-loss-only-1").recipe["num_iterations"] == 32
    short = read_student_config(tmp_path / "out" / "cache" / "trajectory-loss-cut-short-1").recipe
    assert short["num_iterations"] == 10 and not short["adversarial_weight"]
    assert "| trajectory loss only | 32 |" in (tmp_path / "out" / "ablation.md").read_text()
    again = ablation(config)
    assert again["rows"] == results["rows"] and again["seconds"] == results["seconds"]
    assert {path.name for path in (tmp_path / "out").glob("ablation.*")} == {
        "ablation.json", "ablation.md", "ablation.svg",
    }  # fmt: skip
