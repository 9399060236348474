import json
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from PIL import Image

from accvideo.command import Prompt, read_prompt_file
from accvideo.distill import DistillConfig, distill
from accvideo.evaluate import choose_clips, command_line, evaluate, is_better, load_teacher
from accvideo.generate import ClipBatch, Seconds, sample_clips
from accvideo.inference.config import Acceleration
from accvideo.inference.model import Model, load_model, with_arguments
from accvideo.inference.student_config import read_student_config
from accvideo.metrics import Estimate, latent_mse
from accvideo.playground.judge import diversity_of_samples, judge
from accvideo.playground.world import draw, sample_prompts, scenes_of, to_uint8
from accvideo.record import record
from accvideo.recording.config import RecordConfig
from accvideo.reporting.config import EvaluateConfig
from accvideo.reporting.rows import (
    FIRST_ITEM,
    Plan,
    RowData,
    Task,
    flatten_verdicts,
    read_row,
    restore_verdicts,
    row_differences,
    row_key,
    row_metrics,
    sample_batch,
    write_batch,
)
from accvideo.types import UserError
from tests.recorded import PROMPTS, record_tiny
from tests.tiny import TINY_CALL, tiny_mochi_pipeline, tiny_wan_i2v_pipeline, tiny_wan_pipeline

ROWS = ["teacher", "teacher_few", "teacher_equal_calls", "teacher_equal_calls_other", "student"]
METRICS = {
    "all_right",
    "shape",
    "color",
    "background",
    "motion",
    "count",
    "rerender_psnr_db",
    "flicker",
    "diversity_distance",
    "latent_mse",
    "teacher_psnr_db",
    "motion_error",
    "fvd",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluateConfig, dict[str, Any]]:
    """A student of a tiny Wan teacher (10 guided steps), evaluated on five prompts; also as a further row."""
    folder = tmp_path_factory.mktemp("evaluation")
    record_tiny(folder)
    settings: dict[str, Any] = {"num_iterations": 10, "num_validation": 2, "lora_rank": 4, "batch_size": 2}
    distill(DistillConfig(data=folder / "data", out=folder / "student", **settings))
    config = EvaluateConfig(
        student=str(folder / "student"),
        out=folder / "report",
        prompts=folder / "prompts.txt",
        num_prompts=5,
        batch_size=2,
        also=(str(folder / "student"),),
    )
    return config, evaluate(config)


def test_report_keeps_the_contract(run: tuple[EvaluateConfig, dict[str, Any]]):
    """Names, numbers of steps and calls, and every key that scripts rely on."""
    config, report = run
    assert json.loads((config.out / "report.json").read_text()) == report
    assert [row["name"] for row in report["rows"][:2]] == ROWS[:2]
    assert sorted(row["name"] for row in report["rows"]) == sorted([*ROWS, config.student])
    calls = {row["name"]: (row["num_steps"], row["denoiser_calls"]) for row in report["rows"]}
    assert (calls["teacher"], calls["teacher_few"], calls["student"]) == ((10, 20), (5, 10), (5, 5))
    assert {calls["teacher_equal_calls"], calls["teacher_equal_calls_other"]} == {(5, 5), (2, 4)}
    for row in report["rows"]:
        assert row["seconds_end_to_end"] > row["seconds_denoising"] > 0
        assert row["seconds_end_to_end"] == pytest.approx(sum(row["seconds"].values()))
        assert set(row["metrics"]) == METRICS
        for name in ("flicker", "latent_mse"):
            assert set(row["metrics"][name]) == {"mean", "low", "high"}
            assert row["metrics"][name]["low"] <= row["metrics"][name]["mean"] <= row["metrics"][name]["high"]
        assert row["metrics"]["all_right"] is None, "nobody judges the clips of this teacher"
    seconds = {row["name"]: row["seconds_denoising"] for row in report["rows"]}
    assert report["speedup"]["denoising"] == pytest.approx(seconds["teacher"] / seconds["student"])
    assert report["speedup"]["denoising"] > 1
    assert (report["num_prompts"], report["seed"]) == (5, 0)
    assert report["command"].startswith("accvideo evaluate ") and report["commit"] and report["device"]
    page = (config.out / "index.html").read_text()
    assert page.count("<canvas") == 5 * 5 and "Trajectory loss" in page


def test_the_better_variant_at_equal_calls_gets_the_name(run: tuple[EvaluateConfig, dict[str, Any]]):
    rows = {row["name"]: row for row in run[1]["rows"]}
    assert not is_better(rows["teacher_equal_calls_other"], rows["teacher_equal_calls"])


def test_rows_that_a_scheduler_cannot_make_are_left_out(tmp_path: Path):
    """Mochi's own noise levels begin at two steps: a student of two has no rival of one guided step."""
    tiny_mochi_pipeline().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a dog")
    steps: dict[str, Any] = {"num_steps": 4, "num_student_steps": 2, "guidance_scale": 3.0, "num_trajectories": 1}
    sizes = ("height=32", "width=32", "num_frames=13", "max_sequence_length=16")
    record(
        RecordConfig(
            teacher=str(tmp_path / "teacher"),
            prompts=tmp_path / "prompts.txt",
            out=tmp_path / "data",
            pipeline_arg=sizes,
            **steps,
        )
    )
    settings: dict[str, Any] = {"num_iterations": 1, "num_validation": 0, "lora_rank": 1}
    distill(DistillConfig(data=tmp_path / "data", out=tmp_path / "student", **settings))
    config = EvaluateConfig(
        student=str(tmp_path / "student"), out=tmp_path / "report", prompts=tmp_path / "prompts.txt", batch_size=1
    )
    assert [row["name"] for row in evaluate(config)["rows"]] == [*ROWS[:3], "student"]
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("<canvas") == 4 and "the teacher given 2 calls" in page


def test_rows_share_their_noise(run: tuple[EvaluateConfig, dict[str, Any]]):
    """The teacher is at no distance from itself; the student's distance is that of clips made anew from one noise."""
    config, report = run
    rows = {row["name"]: row["metrics"] for row in report["rows"]}
    assert rows["teacher"]["latent_mse"] == {"mean": 0, "low": 0, "high": 0}
    assert rows[config.student] == rows["student"], "the same student from the same noise"
    assert rows["teacher_few"]["latent_mse"]["mean"] > 0

    student = load_model(config.student)
    assert student.student is not None
    teacher = with_arguments(load_model(student.student.teacher), student.arguments)
    prompts = (config.prompts or Path()).read_text().splitlines()[:5]
    items = [FIRST_ITEM + i for i in range(5)]
    theirs = torch.cat([b.latents for b in sample_clips(teacher, prompts, items, 0, 10, 3.0, batch_size=2)])
    ours = torch.cat([b.latents for b in sample_clips(student, prompts, items, batch_size=2)])
    assert latent_mse(ours, theirs).mean().item() == pytest.approx(rows["student"]["latent_mse"]["mean"], rel=1e-6)


def test_the_teacher_is_run_at_the_recorded_noise_levels(tmp_path: Path):
    """`record --shift` leaves the teacher's folder at another shift; all rows of the teacher go by the student's."""
    data = record_tiny(tmp_path, shift=11.0)
    distill(
        DistillConfig(data=tmp_path / "data", out=tmp_path / "student", num_iterations=1, num_validation=0, lora_rank=1)
    )
    student = read_student_config(tmp_path / "student")
    config = EvaluateConfig(student=str(tmp_path / "student"), out=tmp_path / "report", batch_size=6)
    teacher = load_teacher(config, student.teacher, student, "cpu")
    [recorded] = sample_clips(teacher, PROMPTS, range(6), batch_size=6)
    assert recorded.sigmas == pytest.approx(data.manifest.sigmas, abs=1e-6)
    expected = torch.stack([data[i].states[-1] for i in range(6)])
    assert torch.allclose(recorded.latents, expected, atol=1e-4)

    older = load_teacher(config, student.teacher, replace(student, teacher_scheduler=None), "cpu")
    [other] = sample_clips(older, PROMPTS, range(6), batch_size=6)
    assert not torch.allclose(other.latents, expected, atol=1e-2)
    assert older.identity != teacher.identity, "their clips must not share a cache"


def test_killed_evaluation_goes_on(run: tuple[EvaluateConfig, dict[str, Any]]):
    """One batch is lost and one is damaged: only these two are made again, and the numbers are the same."""
    config, report = run
    files = sorted((config.out / "cache").glob("*/*.safetensors"))
    assert len(files) == 5 * 3, "the further row is the student's own"
    times = {path: path.stat().st_mtime_ns for path in files}
    files[4].unlink()
    files[8].write_bytes(files[8].read_bytes()[:100])
    again = evaluate(config)
    changed = [path for path in files if path.stat().st_mtime_ns != times[path]]
    assert changed == [files[4], files[8]]
    for old, new in zip(report["rows"], again["rows"], strict=True):
        assert old["metrics"] == new["metrics"]
    assert evaluate(config) == again


def test_evaluations_that_share_rows_make_them_once(run: tuple[EvaluateConfig, dict[str, Any]], tmp_path: Path):
    """Another report from the rows of the first: no clip is made again, and the numbers are the same."""
    config, _ = run
    report = evaluate(config)
    files = sorted((config.out / "cache").glob("*/*.safetensors"))
    times = [path.stat().st_mtime_ns for path in files]
    other = replace(config, out=tmp_path / "other", rows=config.out / "cache")
    again = evaluate(other)
    assert again["rows"] == report["rows"] and f"--rows {other.rows}" in again["command"]
    assert sorted((config.out / "cache").glob("*/*.safetensors")) == files
    assert [path.stat().st_mtime_ns for path in files] == times
    assert "their seconds" in (other.out / "index.html").read_text() and not list((other.out / "cache").iterdir())
    assert "their seconds" not in (config.out / "index.html").read_text()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="another --rows"):
        evaluate(replace(config, out=tmp_path / "third", rows=tmp_path / "file"))


def test_mistakes_are_told_first(run: tuple[EvaluateConfig, dict[str, Any]], tmp_path: Path):
    config, _ = run
    with pytest.raises(UserError, match="give --prompts FILE"):
        evaluate(EvaluateConfig(student=config.student, out=tmp_path / "report"))
    with pytest.raises(UserError, match="no finished student"):
        evaluate(EvaluateConfig(student=str(tmp_path), out=tmp_path / "report"))
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="something else \\(thesis.txt\\)"):
        evaluate(EvaluateConfig(student=config.student, out=tmp_path, prompts=config.prompts))
    with pytest.raises(UserError, match="is a student, not a teacher"):
        evaluate(
            EvaluateConfig(
                student=config.student, teacher=config.student, out=tmp_path / "report", prompts=config.prompts
            )
        )
    with pytest.raises(UserError, match="num_prompts is 0"):
        EvaluateConfig(student="student", out=tmp_path, num_prompts=0)
    with pytest.raises(UserError, match="as ./student"):
        EvaluateConfig(student="playground-student", out=tmp_path, also=("student",))


def test_command_line_makes_the_same_configuration():
    config = EvaluateConfig(
        student="my student", out=Path("report"), also=("a", "b"), num_prompts=7, prompts=Path("p.txt"), device="cpu",
        vbench=True, vbench_teacher=True, vbench_texts=Path("t.txt"), vbench_flicker=25, fvd=Path("i3d.pt"),
        acceleration=Acceleration(compile=True, attention_backend="_native_math"),
    )  # fmt: skip
    words = shlex.split(command_line(config))
    assert words[:2] == ["accvideo", "evaluate"]
    assert tyro.cli(EvaluateConfig, args=words[2:]) == config


def test_prompts_may_have_images(tmp_path: Path):
    """A row's clips are of each prompt's own image."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "blue.png")
    (tmp_path / "prompts.csv").write_text("prompt,image\na dog,red.png\na dog,blue.png\n")
    model = Model("tiny", tiny_wan_i2v_pipeline(), "0", 2, 1.0, 8, dict(TINY_CALL))
    task = Task(read_prompt_file(tmp_path / "prompts.csv"), 0, 1, "float32", False, tmp_path)
    for index, name in enumerate(("red.png", "blue.png")):
        clips = sample_batch(model, Plan("student", 2, 1.0, False), task, range(index, index + 1))
        image = Image.open(tmp_path / name).convert("RGB")
        [expected] = sample_clips(with_arguments(model, {"image": image}), ["a dog"], [FIRST_ITEM + index])
        assert torch.equal(clips.latents, expected.latents)
    assert row_key(model, Plan("student", 2, 1.0, False), task, None) != row_key(
        model, Plan("student", 2, 1.0, False), replace(task, prompts=[Prompt("a dog")] * 2), None
    )


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, dict[str, RowData]]:
    """The world's own clips as a teacher, and as a student that gets clip 1 and clip 2 the wrong way round."""
    captions = ["a red star moves left on a plain gray background", "a blue ring grows on a striped navy background"]
    captions += sample_prompts(10, 0)
    frames = to_uint8(draw(scenes_of(captions, seed=3)))
    task = Task([Prompt(caption) for caption in captions], 0, 12, "float32", True, tmp_path_factory.mktemp("judged"))
    latents = torch.randn(12, 4, 2, 2)
    data, batch = {}, task.batches()[0]
    for name, order in (("teacher", list(range(12))), ("student", [1, 0, *range(2, 12)])):
        clips = ClipBatch(list(batch), frames[order], latents[order], Seconds(0.1, 2.0, 0.3), 10, [1.0, 0.0])
        teacher = None if name == "teacher" else task.rows / "teacher"
        write_batch(task.rows / name, task, batch, clips, teacher, keep_wrong=True)
        data[name] = read_row([task.rows / name])
    return task, data


def test_judged_rows(judged: tuple[Task, dict[str, RowData]]):
    """The judge's verdicts, the paired measures and the intervals come together."""
    _, data = judged
    teacher, student = (row_metrics(data[name], is_judged=True) for name in ("teacher", "student"))
    assert set(teacher) == set(student) == METRICS
    assert teacher["all_right"] and teacher["all_right"].mean == 1
    assert student["all_right"] and student["all_right"].mean == pytest.approx(10 / 12)
    assert student["all_right"].low < 10 / 12 < student["all_right"].high < 1
    assert teacher["rerender_psnr_db"] and teacher["rerender_psnr_db"].mean > 35
    assert teacher["diversity_distance"] and teacher["diversity_distance"].mean > 0
    assert student["latent_mse"] and student["latent_mse"].mean > 0
    assert teacher["teacher_psnr_db"] is None and student["teacher_psnr_db"] is not None
    clips = torch.stack([data["teacher"].frames(i) for i in range(12)]).float()
    missed = (clips[[1, 0, *range(2, 12)]] - clips).diff(dim=1).square().sum()
    motion = clips.diff(dim=1).square().sum()
    assert teacher["motion_error"] is None and student["motion_error"] is not None
    assert student["motion_error"].mean == pytest.approx((missed / motion).item(), rel=1e-4)
    assert student["fvd"] is None, "not asked for"


def test_differences_to_the_teacher_are_of_the_same_clips(judged: tuple[Task, dict[str, RowData]]):
    """Nothing differs from itself, in no resample; the student's two wrong clips are two less than the teacher's."""
    _, data = judged
    teacher, student = data["teacher"], data["student"]
    assert set(row_differences(teacher, teacher, is_judged=False)) == {"flicker"}
    for estimate in row_differences(teacher, teacher, is_judged=True).values():
        assert estimate == Estimate(0, 0, 0)
    found = row_differences(student, teacher, is_judged=True)
    assert found["all_right"].mean == pytest.approx(-2 / 12)
    assert found["all_right"].low < -2 / 12 < found["all_right"].high <= 0
    assert found["count"].mean == student.values["count"].double().mean() - teacher.values["count"].double().mean()
    theirs, ours = (row_metrics(each, is_judged=True)["diversity_distance"] for each in (teacher, student))
    assert ours and theirs and found["diversity_distance"].mean == pytest.approx(ours.mean - theirs.mean)
    # What is the same in both falls out of the interval: their flicker is that of the same clips, of which two differ.
    flicker = row_metrics(student, is_judged=True)["flicker"]
    assert flicker and found["flicker"].high - found["flicker"].low < flicker.high - flicker.low


def test_failures_are_shown(judged: tuple[Task, dict[str, RowData]]):
    """The student's wrong clips stand beside the teacher's, with what is wrong in them."""
    task, data = judged
    shown, failures = choose_clips(task, data)
    assert [clip.index for clip in shown] == list(range(10))
    assert [clip.index for clip in failures] == [0, 1]
    assert failures[0].wrong["teacher"] == []
    assert set(failures[0].wrong["student"]) == {"shape", "color", "background", "motion"}
    assert torch.equal(failures[0].frames["student"], failures[1].frames["teacher"])


def test_verdicts_survive_storage():
    """Flattened, restored and judged again: the same diversity, field by field."""
    captions = sample_prompts(6, 1)
    verdicts = judge(to_uint8(draw(scenes_of(captions, seed=0))), captions)
    restored = restore_verdicts(flatten_verdicts(verdicts))
    clips = torch.arange(len(captions))
    assert diversity_of_samples(restored)(clips) == diversity_of_samples(verdicts)(clips)
    for field in fields(verdicts):
        if field.name != "scenes":
            assert torch.equal(getattr(restored, field.name), getattr(verdicts, field.name))


def test_playground_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the playground's name, prompts are the world's held-out ones and noise is judged wrong, also on the page."""
    monkeypatch.setattr("accvideo.teacher.PLAYGROUND_TEACHER", tmp_path / "teacher")
    monkeypatch.setattr("accvideo.evaluate.PLAYGROUND_TEACHER", tmp_path / "teacher")
    tiny_wan_pipeline("dpm").save_pretrained(tmp_path / "teacher")
    sizes = {"height": 64, "width": 64, "num_frames": 17, "guidance_scale": 3.0, "fps": 8}
    defaults = {**sizes, "pipeline_args": {"max_sequence_length": 12}}
    (tmp_path / "teacher" / "accvideo.json").write_text(json.dumps(defaults))
    (tmp_path / "prompts.txt").write_text("\n".join(sample_prompts(4, 0)))
    record(RecordConfig(teacher="playground", prompts=tmp_path / "prompts.txt", out=tmp_path / "data", num_steps=5))
    distill(DistillConfig(data=tmp_path / "data", out=tmp_path / "student", num_iterations=2, num_validation=1))
    config = EvaluateConfig(student=str(tmp_path / "student"), out=tmp_path / "report", num_prompts=3)
    report = evaluate(config)
    assert all(row["metrics"]["all_right"]["mean"] == 0 for row in report["rows"])
    assert all(row["metrics"]["diversity_distance"]["mean"] > 0 for row in report["rows"])
    page = (tmp_path / "report" / "index.html").read_text()
    assert sample_prompts(3, 0, "held_out")[2] in page and "What goes wrong" in page
