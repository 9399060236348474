import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from accvideo.analysis.steps import (
    ALL_STEPS,
    KINDS,
    NOT_TOLD,
    ONE_EACH,
    ONE_FOR_ALL,
    StepsConfig,
    plan_runs,
    steps,
    steps_figure,
    steps_table,
)
from accvideo.analysis.students import curves_of, curves_panel
from accvideo.inference.student_config import read_student_config
from accvideo.reporting.wording import METRICS
from accvideo.types import UserError
from tests.recorded import PROMPTS, record_tiny

SVG = "{http://www.w3.org/2000/svg}"


def test_the_student_for_all_numbers_gets_as_many_iterations_for_each_as_a_student_of_its_own():
    config = StepsConfig(data="data", out=Path("out"), num_student_steps=(1, 4, 10), num_seeds=2, num_iterations=50)
    plan = plan_runs(config, Path("cache"))
    assert list(plan) == [1, 4, 10]
    own = [run for kinds in plan.values() for run in kinds[ONE_EACH]]
    assert {run.num_iterations for run in own} == {50} and len(own) == 6
    assert [run.num_student_steps for run in own[::2]] == [(1,), (4,), (10,)]
    for kind, is_told in ((ONE_FOR_ALL, True), (NOT_TOLD, False)):
        runs = plan[4][kind]
        assert runs == plan[10][kind] and [run.seed for run in runs] == [0, 1]
        settings = {(run.num_student_steps, run.num_iterations, run.tell_size) for run in runs}
        assert settings == {((1, 4, 10), 150, is_told)}
    assert [plan[4][kind][0].adversarial_start for kind in (ONE_EACH, ONE_FOR_ALL)] == [30, 90]
    outs = {run.out for kinds in plan.values() for runs in kinds.values() for run in runs}
    assert len(outs) == 2 * (3 + 2)


def made_up_rows(numbers: tuple[int, ...], with_judge: bool = True) -> list[dict[str, Any]]:
    def row(name: str, number: int, num_steps: int, num_seeds: int) -> dict[str, Any]:
        metrics = {"latent_mse": [1 / num_steps] * num_seeds}
        if with_judge:
            metrics["all_right"] = [1 - 0.5 / num_steps] * num_seeds
        seconds = {part: [0.1 * num_steps] * num_seeds for part in ("seconds_denoising", "seconds_end_to_end")}
        return {
            "name": name, "num_student_steps": number, "num_steps": num_steps, "denoiser_calls": num_steps,
            "metrics": metrics, **seconds,
        }  # fmt: skip

    rows = [row(kind, number, number, 1 if "teacher" in kind else 3) for number in numbers for kind in KINDS]
    return [row(ALL_STEPS, numbers[0], 50, 1), *rows]


@pytest.mark.parametrize("with_judge", [True, False])
def test_table_and_figure_show_every_row(with_judge: bool):
    results = {"rows": made_up_rows((1, 2, 5), with_judge), "settings": {"num_seeds": 3, "num_iterations": 100}}
    results["baselines"] = [{"name": "perflow", "num_student_steps": 5, "metrics": {"latent_mse": [0.3, 0.5]}}]
    table = steps_table(results).splitlines()
    lines = [line for line in table if line.startswith("|")]
    assert len(lines) == 2 + 1 + 3 * len(KINDS) and lines[2].startswith("| 50 | teacher, all steps | 50 |")
    assert ("All properties right" in lines[0]) == with_judge
    svg = steps_figure(results)
    ElementTree.fromstring(svg)
    assert all(kind in svg for kind in KINDS) and ">perflow<" in svg and "prefers-color-scheme: dark" in svg
    assert svg.count('class="head"') == (2 if with_judge else 1) + 1 + 2  # those of perflow's metric, and seconds


def test_other_methods_stand_beside_and_can_be_told_apart_where_they_coincide():
    def method(name: str, number: int) -> dict[str, Any]:
        metrics = {"latent_mse": [1 / number - 0.1, 1 / number + 0.1]}
        return {"name": name, "num_student_steps": number, "metrics": metrics}

    methods = [method("dmd2", 2), method("dmd2", 5), method("perflow", 5)]
    svg = ElementTree.fromstring(steps_figure({"rows": made_up_rows((1, 2, 5)), "baselines": methods}))
    charts = [each for each in svg.iter(f"{SVG}svg") if each.get("aria-label") == METRICS["latent_mse"][0]]
    own, others = (
        [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in each.iter(f"{SVG}circle")] for each in charts
    )
    # Students of 2 and of 5 steps beside them, which have the very values of the methods: as high, and 4 units apart.
    assert len(own) == 3 * len(KINDS) and len(others) == 2 + len(methods)
    assert [y for _, y in others] == [others[0][1], others[1][1], others[0][1], others[1][1], others[1][1]]
    at_two, at_five = ([x for x, y in others if y == height] for height in (others[0][1], others[1][1]))
    assert [right - left for left, right in pairwise(at_two)] == pytest.approx([4], abs=0.11)
    assert [right - left for left, right in pairwise(at_five)] == pytest.approx([4, 4], abs=0.11)


def test_what_is_always_right_is_drawn_below_100_percent():
    panel = curves_panel("all_right", {"a": {1: [100.0, 100.0], 5: [100.0, 100.0]}}, ("teacher", [100.0]))
    ticks = [
        float(text.text or "") for text in ElementTree.fromstring(panel.chart).iter("text") if text.get("x") == "38"
    ]
    assert (ticks[0], ticks[-1]) == (99, 100) and [name for name, _ in panel.keys] == ["a", "teacher"]
    low = curves_panel("all_right", {"a": {1: [90.0], 5: [95.0]}}, ("teacher", [10.0]))
    assert [name for name, _ in low.keys] == ["a"]  # a level far off is left out
    near = curves_panel("all_right", {"a": {1: [90.0], 5: [95.0]}}, ("teacher", [96.0]))
    assert [name for name, _ in near.keys] == ["a", "teacher"]


def test_curves_rise_with_the_number_of_steps_in_whatever_order_they_were_trained():
    rows = [{"name": "a", "num_student_steps": k, "metrics": {"all_right": [k / 10]}} for k in (5, 2, 8)]
    assert [*curves_of("all_right", rows)["a"].items()] == [(2, [20.0]), (5, [50.0]), (8, [80.0])]


@pytest.mark.slow
def test_students_are_distilled_from_one_recording_and_evaluated_beside_the_teacher(tmp_path: Path):
    record_tiny(tmp_path, num_student_steps=10)
    (tmp_path / "test.txt").write_text("\n".join(PROMPTS[:2]))
    config = StepsConfig(
        data=str(tmp_path / "data"), out=tmp_path / "out", num_student_steps=(1, 3), num_seeds=1, num_iterations=4,
        batch_size=2, num_prompts=2, prompts=tmp_path / "test.txt", device="cpu",
    )  # fmt: skip
    results = steps(config)
    by_kind = {(row["name"], row["num_student_steps"]): row for row in results["rows"]}
    assert set(by_kind) == {(kind, number) for kind in KINDS for number in (1, 3)} | {(ALL_STEPS, 1)}
    assert by_kind[ALL_STEPS, 1]["denoiser_calls"] == 20
    for kind in (ONE_EACH, ONE_FOR_ALL, NOT_TOLD):
        assert [by_kind[kind, number]["denoiser_calls"] for number in (1, 3)] == [1, 3]
        assert [by_kind[kind, number]["num_steps"] for number in (1, 3)] == [1, 3]
    assert [by_kind["teacher, guided", number]["denoiser_calls"] for number in (1, 3)] == [2, 6]
    assert by_kind["teacher, equal calls", 3]["denoiser_calls"] <= 3
    both = read_student_config(tmp_path / "out/cache/all-0")
    own = read_student_config(tmp_path / "out/cache/steps-3-0")
    assert (both.num_steps, both.other_num_steps, own.num_steps, own.other_num_steps) == (1, [3], 3, [])
    sigmas = json.loads((tmp_path / "data/manifest.json").read_text())["sigmas"]
    assert own.sigmas == pytest.approx([sigmas[point] for point in (0, 3, 7, 10)])
    assert (
        set(results["seconds"]) == {"steps-1-0", "steps-3-0", "all-0", "all-not-told-0"}
        and min(results["seconds"].values()) > 0
    )
    assert steps(config)["rows"] == results["rows"]
    written = {path.name for path in (tmp_path / "out").glob("steps.*")}
    assert written == {"steps.json", "steps.md", "steps.svg"}


def test_numbers_without_sense_or_not_recorded_are_refused_before_anything_is_written(tmp_path: Path):
    for numbers in ((5,), (2, 2), ()):
        with pytest.raises(UserError, match="at least two numbers"):
            StepsConfig(data="data", out=tmp_path, num_student_steps=numbers)
    record_tiny(tmp_path)
    config = StepsConfig(data=str(tmp_path / "data"), out=tmp_path / "out", num_student_steps=(2, 6))
    with pytest.raises(UserError, match="6 student steps of 5 recorded ones"):
        steps(config)
    with pytest.raises(UserError, match="is no baselines.json"):
        steps(replace(config, num_student_steps=(1, 2), baselines=(tmp_path / "data/manifest.json",)))
    assert not (tmp_path / "out").exists()
