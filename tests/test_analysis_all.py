import json
from dataclasses import replace
from pathlib import Path

import pytest

from accvideo.analysis.ablation import AblationConfig, learning_evaluations, plan_runs
from accvideo.analysis.estimate import Speed, Work, duration
from accvideo.analysis.everything import (
    DISTILLING,
    PARTS,
    SHORT,
    AllConfig,
    Place,
    Sizes,
    baselines_part,
    fill,
    fill_page,
    section,
    teacher_work,
    template,
    timed,
    whole_teacher_work,
)
from accvideo.analysis.everything import (
    all as all_analyses,
)
from accvideo.cli import COMMANDS, run
from accvideo.types import UserError
from tests.recorded import record_tiny

PLACE = Place(Path("out/data"), Path("out/data-5"), Path("out/right.txt"), Path("out/rows"), Path("out"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 1-D study's estimate trains networks: its own tests look at it."""
    monkeypatch.setattr("accvideo.analysis.everything.estimate_seconds", lambda study: 1.0)


@pytest.mark.parametrize("sizes", [Sizes(), SHORT])
@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_a_command_that_takes_its_arguments(
    name: str, sizes: Sizes, quick: None, monkeypatch: pytest.MonkeyPatch
):
    import importlib

    module = importlib.import_module(COMMANDS[f"analyze {name}"][0])
    seen = []
    monkeypatch.setattr(module, name, lambda config: seen.append(config) or {})
    assert run(["analyze", name, *PARTS[name](sizes, PLACE).arguments, "--out", "out/part"]) == 0
    assert seen[0].out == Path("out/part")
    assert hasattr(seen[0], "compile") == (name in DISTILLING)
    for field in ("num_seeds", "num_prompts", "batch_size", "num_student_steps"):
        if (
            hasattr(seen[0], field)
            and name not in ("toy", "solvers")
            and (name, field) != ("cost", "num_student_steps")
        ):
            own = {("steps", "num_seeds"): "num_step_seeds", ("baselines", "num_student_steps"): "method_steps"}
            assert getattr(seen[0], field) == getattr(sizes, own.get((name, field), field)), field


def test_work_adds_up():
    assert Work(1, 2, 3, 4) + Work(10, 1).times(2) == Work(21, 4, 3, 4)
    assert Speed(0.5, 0.25, 2).seconds(Work(4, 8, 1, 3)) == 2 + 2 + 2 + 3
    sizes = replace(Sizes(), num_steps=50, num_prompts=3)
    # At 5 steps: 10 guided, 5 without, 2 guided steps of 4 calls, 10 by UniPC; 1 step has no half.
    assert teacher_work(sizes, [5]) == Work(sampled=3 * (10 + 5 + 4 + 10), clips=3 * 4)
    assert teacher_work(sizes, [1]) == Work(sampled=3 * (2 + 1 + 0 + 2), clips=3 * 3)
    assert whole_teacher_work(sizes) == Work(sampled=3 * 100, clips=3)


def test_the_work_of_ablations_is_that_of_their_plan(quick: None):
    sizes = Sizes(num_seeds=2, num_ablation_iterations=50, batch_size=4, num_prompts=10)
    config = AblationConfig(
        data="data", out=Path("out"), keep=Path("right.txt"), num_seeds=2, num_iterations=50, batch_size=4
    )
    plan = plan_runs(config, 512, 5)
    num_students = sum(map(len, plan.values()))
    work = PARTS["ablation"](sizes, PLACE).work
    others = teacher_work(sizes, [5])
    assert work.clips - others.clips == num_students * 10
    # Nine evaluations a sample and iteration for the reference, as many for the others, three for the one that is cut
    # short; five for a clip.
    assert work.trained == (num_students - 2) * 50 * 4 * 9 + 2 * 50 * 4 * 3
    planned = sum(learning_evaluations(run, 5) for runs in plan.values() for run in runs)
    assert work.trained == pytest.approx(planned, rel=0.05)
    assert work.sampled - others.sampled == num_students * 10 * 5


def test_students_of_the_best_learning_rate_are_not_trained_twice():
    one, two = (
        baselines_part(Sizes(num_seeds=3, learning_rates=rates), PLACE).work for rates in ((1e-4,), (1e-4, 2e-4))
    )
    assert one.trained == 6 * 3 * 3 * Sizes().training_budget  # methods, numbers of steps, seeds
    # One more student a method, and both tried, beside the teacher at 50 steps and in four ways at 5.
    assert two.trained - one.trained == 6 * Sizes().training_budget
    assert two.sampled - one.sampled == 6 * 2 * 100 * 5 + 100 * (100 + 10 + 5 + 4 + 10)


def test_a_page_is_filled_between_its_marks_and_again(tmp_path: Path):
    text = "# Mine\n\nBefore.\n\n<!-- steps -->\nold\n<!-- /steps -->\n\nAfter.\n<!-- toy --><!-- /toy -->\n"
    once = fill(text, {"steps": "a $\\1 [n](FIGURE.json)\n"}, "results/{name}")
    assert once == text.replace("old\n", "\na $\\1 [n](results/steps.json)\n\n")
    assert fill(once, {"steps": "a $\\1 [n](FIGURE.json)\n"}, "results/{name}") == once
    assert all(f"<!-- {name} -->" in template(list(PARTS)) for name in PARTS)

    page, out = tmp_path / "mine.md", tmp_path / "out"
    page.write_text(text)
    (out / "steps").mkdir(parents=True)
    for ending in ("svg", "json", "md"):
        (out / "steps" / f"steps.{ending}").write_text(ending)
    fill_page(page, {"steps": "![x](FIGURE.svg)\n", "ablation": "not on this page\n"}, out)
    assert "![x](mine/steps.svg)" in page.read_text() and "not on this page" not in page.read_text()
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"steps.svg", "steps.json"}


def test_a_section_says_command_commit_device_seeds_and_time(tmp_path: Path):
    (tmp_path / "steps").mkdir()
    results = {"commit": "abc", "device": "a laptop", "settings": {"num_seeds": 3}}
    (tmp_path / "steps/steps.json").write_text(json.dumps(results))
    (tmp_path / "steps/steps.md").write_text("| a table |\n")
    (tmp_path / "steps.json").write_text(json.dumps({"seconds": 3000.0}))
    text = section(tmp_path, "steps", [str(tmp_path / "data"), "--num-seeds", "3"], tmp_path)
    assert text.startswith("* command: `accvideo analyze steps data --num-seeds 3 --out steps`\n* commit: abc\n")
    assert "* device: a laptop\n* seeds: 3\n* time: 50 min\n" in text and text.endswith("| a table |\n")


def test_the_time_of_an_interrupted_part_is_counted(tmp_path: Path):
    path = tmp_path / "part.json"
    path.write_text(json.dumps({"seconds": 100.0}))
    with pytest.raises(KeyboardInterrupt), timed(path):
        raise KeyboardInterrupt
    assert 100 < json.loads(path.read_text())["seconds"] < 101
    assert [duration(seconds) for seconds in (8, 600, 9000)] == ["8 s", "10 min", "2.5 h"]


def test_data_of_another_teacher_and_pages_without_marks_are_refused_before_anything_is_written(tmp_path: Path):
    record_tiny(tmp_path, num_student_steps=10)
    with pytest.raises(UserError, match="need the playground's"):
        all_analyses(AllConfig(out=tmp_path / "out", short=True, data=tmp_path / "data"))
    page = tmp_path / "page.md"
    page.write_text("# Mine\n")
    with pytest.raises(UserError, match="has no marks"):
        all_analyses(AllConfig(out=tmp_path / "out", page=page))
    with pytest.raises(UserError, match="cannot read"):
        all_analyses(AllConfig(out=tmp_path / "out", page=tmp_path / "none.md"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_all_analyses_run_one_after_the_other_and_what_is_done_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page = tmp_path / "page.md"
    page.write_text(template(["steps"]))
    config = AllConfig(out=tmp_path / "out", short=True, page=page, device="cpu")
    all_analyses(config)
    said = capsys.readouterr().err
    assert (
        "a denoiser evaluation" in said and f"{len(PARTS)} of {len(PARTS)}: accvideo analyze {list(PARTS)[-1]}" in said
    )
    text = (tmp_path / "out/results.md").read_text()
    assert all(f"`accvideo analyze {name} " in text and f"({name}/{name}.svg)" in text for name in PARTS)
    assert all((tmp_path / "out" / name / f"{name}.svg").exists() for name in PARTS)
    assert "(page/steps.svg)" in page.read_text() and (tmp_path / "page/steps.svg").exists()

    def fail(*_: object) -> None:
        raise AssertionError("run again")

    monkeypatch.setattr("accvideo.analysis.everything.execute", fail)
    all_analyses(config)
    assert (tmp_path / "out/results.md").read_text() == text
    with pytest.raises(UserError, match="other settings"):
        all_analyses(replace(config, short=False))
