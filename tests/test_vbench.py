import errno
import json
import multiprocessing
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from accvideo.command import Prompt, progress_bar
from accvideo.distill import DistillConfig, distill
from accvideo.evaluate import evaluate
from accvideo.generate import sample_clips
from accvideo.inference.config import PLAIN
from accvideo.inference.model import Model, with_arguments
from accvideo.recording.workers import Claims, Place
from accvideo.reporting.config import EvaluateConfig
from accvideo.types import UserError
from accvideo.vbench.commands import commands, describe_vbench
from accvideo.vbench.published import PUBLISHED
from accvideo.vbench.scores import DIMENSIONS, SUMMARIES, Score, read_scores, summarize
from accvideo.vbench.suite import (
    FIRST_ITEM,
    ITEMS_OF_PROMPT,
    Suite,
    own_suite,
    packaged_list,
    read_suite,
    spread,
    standard_suite,
)
from accvideo.vbench.videos import Making, make_videos, missing
from tests.recorded import record_tiny
from tests.tiny import TINY_CALL, tiny_wan_pipeline

STILL, DOUBLE = "In a still frame, a stop sign", "The bund Shanghai, oil painting"
STYLE = {"appearance_style": {"appearance_style": "oil painting"}}
LISTING: list[dict[str, Any]] = [
    {"prompt_en": STILL, "dimension": ["temporal_flickering"]},
    {"prompt_en": "a cat", "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"]},
    {"prompt_en": DOUBLE, "dimension": ["appearance_style"], "auxiliary_info": STYLE},
    {"prompt_en": DOUBLE, "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"]},
]
"""Entries in the form of VBench's own list, one prompt twice as there."""

PLAIN_MAKING = Making(num_steps=2, seed=0, batch_size=4, dtype="float32", acceleration=PLAIN)


def result_file(folder: Path, time: str, results: dict[str, tuple[float, int]]) -> Path:
    """A file as `vbench evaluate` writes it: by dimension the score, and one object for each video."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"results_{time}_eval_results.json"
    written = {
        name: [score, [{"video_path": f"videos/a-{i}.mp4", "video_results": score} for i in range(num)]]
        for name, (score, num) in results.items()
    }
    path.write_text(json.dumps(written, indent=4))
    return path


def model_folder(folder: Path) -> Path:
    """A model's folder before its videos are made."""
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text('{"num_steps": 5, "size": "480×832×81"}', "utf-8")
    return folder


# Which videos


def test_names_are_those_that_vbench_looks_for():
    """`{prompt}-{0 to 4}.mp4` of every entry; a prompt that stands twice is made once."""
    suite = standard_suite(LISTING, None, 5)
    wanted = {f"{entry['prompt_en']}-{i}.mp4" for entry in LISTING for i in range(5)}
    assert {video.name for video in suite.videos} == wanted and len(suite.videos) == len(wanted) == 15
    assert len({video.item for video in suite.videos}) == 15
    assert all(video.name.startswith(video.prompt.text) for video in suite.videos)
    assert [prompt.text for prompt in suite.prompts] == [STILL, "a cat", DOUBLE]
    assert suite.num_measured("subject_consistency") == 5 and suite.num_measured("color") == 0


def test_further_still_videos_change_no_others():
    """25 of each still prompt come after all the others, whose noise and order are as before."""
    five, more = standard_suite(LISTING, None, 5), standard_suite(LISTING, None, 25)
    assert more.videos[:15] == five.videos
    assert [video.name for video in more.videos[15:]] == [f"{STILL}-{i}.mp4" for i in range(5, 25)]
    assert len({video.item for video in more.videos}) == 35


def test_longer_texts_go_to_the_model_only(tmp_path: Path):
    """Files keep the names of the list; of a prompt that stands twice, the last text counts, as in VBench's recipe."""
    (tmp_path / "list.json").write_text(json.dumps(LISTING))
    (tmp_path / "texts.txt").write_text("A sign.\nA cat/dog, at length.\nFirst.\nSecond.\n")
    suite = read_suite(tmp_path / "list.json", tmp_path / "texts.txt", 5)
    assert [video.name for video in suite.videos] == [video.name for video in standard_suite(LISTING, None, 5).videos]
    assert [prompt.text for prompt in suite.prompts] == ["A sign.", "A cat/dog, at length.", "Second."]
    assert suite.videos[5].prompt.text == "A cat/dog, at length."

    (tmp_path / "texts.txt").write_text("A sign.\nA cat.\nFirst.\n")
    with pytest.raises(UserError, match="3 lines: it takes a text for each of VBench's 4 prompts"):
        read_suite(tmp_path / "list.json", tmp_path / "texts.txt", 5)
    (tmp_path / "texts.txt").write_text("A sign.\n\nFirst.\nSecond.")
    with pytest.raises(UserError, match="an empty line 2"):
        read_suite(tmp_path / "list.json", tmp_path / "texts.txt", 5)


@pytest.mark.parametrize("prompt, why", [("a cat/dog", "a slash"), ("x" * 300, "306 bytes"), ("é" * 125, "256 bytes")])
def test_prompts_that_cannot_be_names(tmp_path: Path, prompt: str, why: str):
    """VBench would not find them: in its list they are refused; the user's own are called by number."""
    with pytest.raises(UserError, match=f"(?s){why}.*text file"):
        standard_suite([{"prompt_en": prompt, "dimension": ["color"]}], None, 5)
    (tmp_path / "own.txt").write_text(f"a dog\n{prompt}\n", "utf-8")
    suite = read_suite(tmp_path / "own.txt", None, 5)
    assert [video.name for video in suite.videos[4:6]] == ["000000-4.mp4", "000001-0.mp4"]
    assert suite.prompt_file()["000001-3.mp4"] == prompt
    assert suite.videos[5].item == FIRST_ITEM + ITEMS_OF_PROMPT
    assert suite.dimensions[0] == "subject_consistency" and len(suite.dimensions) == 6


def test_the_longest_name_is_taken():
    assert standard_suite([{"prompt_en": "x" * 249, "dimension": ["color"]}], None, 5).videos


def test_the_list_is_that_of_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is found without importing the package, whose requirements are of another time."""
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install --no-deps vbench"):
        packaged_list()
    (tmp_path / "vbench").mkdir()
    (tmp_path / "vbench" / "__init__.py").write_text("raise ImportError('decord')")
    (tmp_path / "vbench" / "VBench_full_info.json").write_text(json.dumps(LISTING))
    assert read_suite(None, None, 5).listing == LISTING


def test_lists_of_another_form_are_refused(tmp_path: Path):
    path = tmp_path / "list.json"
    for content in ("[", "{}", "[]", '["a cat"]', '[{"prompt_en": "a", "dimension": ["beauty"]}]'):
        path.write_text(content)
        with pytest.raises(UserError, match="VBench"):
            read_suite(path, None, 5)
    (tmp_path / "own.txt").write_text("a dog")
    with pytest.raises(UserError, match="--vbench-texts is for VBench's own list"):
        read_suite(tmp_path / "own.txt", path, 5)
    with pytest.raises(UserError, match="--vbench-flicker is for"):
        read_suite(tmp_path / "own.txt", None, 25)


def test_spread_takes_all_parts_of_a_list():
    prompts = [Prompt(str(i)) for i in range(10)]
    assert [prompt.text for prompt in spread(prompts, 4)] == ["0", "2", "5", "7"]
    assert spread(prompts, 500) == prompts


# Making them


@pytest.fixture(scope="module")
def model() -> Model:
    return Model("tiny", tiny_wan_pipeline(), "0", 2, 1.0, 8, dict(TINY_CALL))


def make(model: Model, suite: Suite, folder: Path, making: Making = PLAIN_MAKING, place: Place | None = None) -> int:
    with progress_bar(visible=False) as progress:
        return make_videos("tiny", model, suite, making, folder, place or Place(), progress)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "videos").iterdir()}


def test_videos_are_made_and_a_killed_run_goes_on(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a batch has lost is made again, equal to the byte; other settings are refused.

    Nothing but the videos lies in their folder, where VBench takes any file for an example of their kind.
    """
    suite = standard_suite(LISTING, None, 5)
    assert make(model, suite, tmp_path) == 15
    first = contents(tmp_path)
    assert set(first) == {video.name for video in suite.videos}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["settings.json", "videos"]

    (tmp_path / "videos" / suite.videos[9].name).unlink()
    assert make(model, suite, tmp_path) == 15
    again = contents(tmp_path)
    assert {name: data for name, (data, _) in again.items()} == {name: data for name, (data, _) in first.items()}
    changed = {name for name in first if first[name][1] != again[name][1]}
    assert changed == {video.name for video in suite.videos[8:12]}, "the batch of the lost one, and no other"

    made: list[Any] = []
    monkeypatch.setattr("accvideo.vbench.videos.sample_videos", lambda *arguments: made.append(arguments))
    assert make(model, suite, tmp_path) == 15 and not made, "nothing is left to do"
    with pytest.raises(UserError, match="other settings: seed 0 -> 1"):
        make(model, suite, tmp_path, replace(PLAIN_MAKING, seed=1))
    with pytest.raises(UserError, match="other settings: prompts"):
        make(model, standard_suite(LISTING, ["a", "b", "c", "d"], 5), tmp_path)


def test_videos_are_of_their_noise(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each is the clip of its item's noise and its own text, whatever the others of its batch are."""
    suite, frames = standard_suite(LISTING[:2], None, 5), {}
    monkeypatch.setattr(
        "accvideo.vbench.videos.write_video", lambda path, clip, fps: (path.touch(), frames.setdefault(path.name, clip))
    )
    make(model, suite, tmp_path)
    for video in (suite.videos[0], suite.videos[7]):
        [expected] = sample_clips(model, [video.prompt.text], [video.item], 0, 2)
        [ours] = [clip for name, clip in frames.items() if name.startswith(str(video.item))]
        assert (ours.int() - expected.frames[0].int()).abs().max() <= 1


def test_what_another_worker_makes_is_left_to_it(model: Model, tmp_path: Path):
    """A living worker's batch is not made; a dead one's is, and what it left half-written goes."""
    suite = standard_suite(LISTING, None, 5)
    other = Claims(tmp_path, "")
    try:
        assert other.take("batch-4")
        assert make(model, suite, tmp_path, place=Place(1, 2)) == 11
        assert missing(tmp_path, suite.videos) == suite.videos[4:8]
    finally:
        other.close()

    def die() -> None:
        claims = Claims(tmp_path, "")
        claims.take("batch-4")
        (tmp_path / f"{suite.videos[4].item}{claims.writer}.mp4").write_bytes(b"half")
        os._exit(1)

    worker = multiprocessing.get_context("fork").Process(target=die)
    worker.start()
    worker.join()
    assert list(tmp_path.glob("*.mp4")) and (tmp_path / ".batch-4.claim").exists()
    assert make(model, suite, tmp_path) == 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["settings.json", "videos"]


def test_a_full_disk_leaves_nothing_half_written(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    suite = standard_suite(LISTING, None, 5)
    with monkeypatch.context() as patched:
        patched.setattr("accvideo.vbench.videos.write_video", fail)
        with pytest.raises(UserError, match="No space left.*\n.*goes on from here"):
            make(model, suite, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["settings.json", "videos"]
    assert make(model, suite, tmp_path) == 15


def test_images_of_prompts_reach_the_pipeline(tmp_path: Path, model: Model):
    """A column of the user's file is an argument of the call, and part of what the folder is bound to."""
    suite = own_suite([Prompt("a dog", {"max_sequence_length": 8}), Prompt("a dog", {"max_sequence_length": 16})])
    assert (
        make(with_arguments(model, {"guidance_scale": 1.0}), suite, tmp_path, replace(PLAIN_MAKING, batch_size=5)) == 10
    )
    first, second = ((tmp_path / "videos" / f"00000{i}-0.mp4").read_bytes() for i in range(2))
    assert first != second
    with pytest.raises(UserError, match="takes one a batch"):
        make(model, suite, tmp_path / "other")


# Scores


def test_totals_are_those_of_the_published_tables():
    """VBench's rule gives the totals that the paper prints beside its 16 scores, to a hundredth of a percent."""
    assert len(PUBLISHED) == 12
    for row in PUBLISHED:
        sums = summarize({name: row.scores[name] / 100 for name in DIMENSIONS})
        for name in SUMMARIES:
            assert 100 * (sums[name] or 0) == pytest.approx(row.scores[name], abs=0.0105), (row.name, name)


def test_summaries_by_hand():
    """All scores at the ends of their ranges give 0 and 1; dynamic degree counts half; a gap leaves its sums open."""
    highest = {name: dimension.high for name, dimension in DIMENSIONS.items()}
    assert summarize(highest) == {"total": 1, "quality": 1, "semantic": 1}
    lowest = {name: dimension.low for name, dimension in DIMENSIONS.items()}
    assert summarize(lowest) == {"total": 0, "quality": 0, "semantic": 0}
    assert summarize(lowest | {"dynamic_degree": 1.0})["quality"] == pytest.approx(0.5 / 6.5)
    middle = lowest | {"motion_smoothness": (0.706 + 0.9975) / 2, "scene": 0.8222 / 2}
    assert summarize(middle)["total"] == pytest.approx((4 * 0.5 / 6.5 + 0.5 / 9) / 5)
    del highest["color"]
    assert summarize(highest) == {"total": None, "quality": 1, "semantic": None}


def test_results_are_read_from_all_files_the_newest_last(tmp_path: Path):
    result_file(tmp_path, "2026-01-02-10:00:00", {"color": (0.8, 395), "scene": (0.5, 430)})
    result_file(tmp_path, "2026-01-01-11:00:00", {"color": (0.7, 390), "subject_consistency": (0.95, 360)})
    (tmp_path / "results_2026-01-03-10:00:00_full_info.json").write_text("[]")
    scores = read_scores(tmp_path)
    assert list(scores) == ["subject_consistency", "color", "scene"]
    assert scores["color"] == Score(0.8, 395, "results_2026-01-02-10:00:00_eval_results.json")
    assert read_scores(tmp_path / "none") == {}


@pytest.mark.parametrize(
    "content, why",
    [
        ("[]", "no results of `vbench evaluate`"),
        ('{"color": 0.5}', "no results of `vbench evaluate`"),
        ('{"beauty": [0.5, []]}', "none of VBench's 16 dimensions"),
        ('{"temporal_flickering": [NaN, []]}', "no video was counted"),
        ('{"imaging_quality": [64.2, []]}', "between 0 and 1"),
    ],
)
def test_other_files_are_told_from_results(tmp_path: Path, content: str, why: str):
    (tmp_path / "results_1_eval_results.json").write_text(content)
    with pytest.raises(UserError, match=why):
        read_scores(tmp_path)


# Commands


def run_commands(folder: Path) -> list[str]:
    """Runs the script with a stand-in for `vbench` that writes down where and how it is called."""
    (folder / "bin").mkdir(exist_ok=True)
    program = folder / "bin" / "vbench"
    program.write_text('#!/bin/sh\necho "$(basename "$PWD") $*" >> "$LOG"\n')
    program.chmod(0o755)
    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "LOG": str(log)}
    subprocess.run(["sh", str(folder / "vbench" / "measure.sh")], check=True, env=environment)
    return log.read_text().splitlines() if log.exists() else []


def test_the_script_measures_what_is_missing(tmp_path: Path):
    """One call a dimension, of each model, in its own folder; what is measured is not asked for again."""
    folder = tmp_path / "a report" / "vbench"
    suite = standard_suite(LISTING, None, 5)
    for name in ("student", "teacher"):
        model_folder(folder / name)
    result_file(folder / "student" / "results", "1", {name: (0.5, 5) for name in suite.dimensions[1:]})
    report = describe_vbench(folder, suite, ["student", "teacher"])
    ending = "--full_json_dir ../VBench_full_info.json --videos_path videos --dimension"
    calls = run_commands(folder.parent)
    assert calls[0] == f"student evaluate --output_path results {ending} subject_consistency"
    assert calls[1:] == [f"teacher evaluate --output_path results {ending} {name}" for name in suite.dimensions]
    assert json.loads((folder / "VBench_full_info.json").read_text()) == LISTING
    assert (report["models"]["student"]["size"], report["models"]["student"]["num_steps"]) == ("480×832×81", 5)
    assert report["commands"][0] == f"cd '{folder}'" and "subject_consistency" in "\n".join(report["commands"])
    assert report["models"]["student"]["num_missing"] == 15

    for name in ("student", "teacher"):
        result_file(folder / name / "results", "2", {name: (0.5, 5) for name in suite.dimensions})
    assert describe_vbench(folder, suite, ["student", "teacher"])["commands"] == []
    assert run_commands(folder.parent) == []


def test_still_videos_are_filtered_where_there_are_more_than_five(tmp_path: Path):
    """The filter runs after `dynamic_degree`, which fetches its network, and flickering is measured of what it left."""
    model_folder(tmp_path / "vbench" / "student")
    suite = standard_suite(LISTING, None, 25)
    describe_vbench(tmp_path / "vbench", suite, ["student"])
    calls = run_commands(tmp_path)
    assert calls[-2] == "student static_filter --videos_path videos --result_path static"
    assert calls[-1].endswith("--videos_path static/filtered_videos --dimension temporal_flickering")
    assert sum("temporal_flickering" in call for call in calls) == 1
    assert any("dynamic_degree" in call for call in calls[:-2])
    measured = {name: Score(0.5, 5, "") for name in suite.dimensions if name != "temporal_flickering"}
    assert "for dimension" not in "\n".join(commands("student", suite, measured))


def test_own_prompts_are_told_by_a_file(tmp_path: Path):
    """Names say nothing then: VBench's custom mode takes the prompts from a file beside the folders."""
    model_folder(tmp_path / "vbench" / "student")
    suite = own_suite([Prompt("a/b"), Prompt("x" * 300)])
    report = describe_vbench(tmp_path / "vbench", suite, ["student"])
    calls = run_commands(tmp_path)
    assert len(calls) == 6 and all("--mode custom_input --prompt_file ../prompts.json" in call for call in calls)
    told = json.loads((tmp_path / "vbench" / "prompts.json").read_text())
    assert len(told) == 10 and told["000001-4.mp4"] == "x" * 300
    assert (report["mode"], report["published"]) == ("custom_input", [])


def test_what_was_measured_of_too_few_videos_is_told(tmp_path: Path):
    suite = standard_suite([*LISTING, {"prompt_en": "a red cat", "dimension": ["color"]}], None, 5)
    model_folder(tmp_path / "student")
    result_file(tmp_path / "student" / "results", "1", {"imaging_quality": (0.5, 4), "color": (0.5, 4)})
    limits = describe_vbench(tmp_path, suite, ["student"])["limits"]
    assert "20 of the student's videos are still to be made" in limits[0]
    assert "imaging quality of the student was taken of 4 videos instead of 5" in limits[1]
    assert not any("color" in limit for limit in limits), "videos without the object have no color"


# The whole command


def test_evaluate_makes_videos_and_reads_the_results_back(tmp_path: Path):
    """Student and teacher; the same command, run again after VBench, puts its numbers into report and page."""
    record_tiny(tmp_path)
    settings: dict[str, Any] = {"num_iterations": 1, "num_validation": 0, "lora_rank": 1}
    distill(DistillConfig(data=tmp_path / "data", out=tmp_path / "student", **settings))
    (tmp_path / "list.json").write_text(json.dumps(LISTING))
    config = EvaluateConfig(
        student=str(tmp_path / "student"),
        out=tmp_path / "report",
        prompts=tmp_path / "list.json",
        num_prompts=2,
        batch_size=8,
        vbench=True,
        vbench_teacher=True,
    )
    folder = tmp_path / "report" / "vbench"
    report = evaluate(config)["vbench"]
    student, teacher = report["models"]["student"], report["models"]["teacher"]
    assert student["num_videos"] == teacher["num_videos"] == 15 and student["dimensions"] == {}
    assert "vbench evaluate" in (tmp_path / "report" / "index.html").read_text()
    assert (student["num_steps"], teacher["num_steps"], student["size"]) == (5, 10, "32×32×5")
    clips = [(folder / name / "videos" / "a cat-0.mp4").read_bytes() for name in ("student", "teacher")]
    assert clips[0] != clips[1]
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*/videos/*")}

    for name, worse in (("student", 0.0), ("teacher", 0.01)):
        scores = {each: (PUBLISHED[5].scores[each] / 100 - worse, 5) for each in DIMENSIONS}
        result_file(folder / name / "results", "2026-01-01-10:00:00", scores)
    whole = evaluate(config)
    vbench = whole["vbench"]
    assert whole == json.loads((tmp_path / "report" / "report.json").read_text())
    assert 100 * vbench["models"]["student"]["total"] == pytest.approx(83.26, abs=0.0105)
    assert vbench["models"]["student"]["total"] > vbench["models"]["teacher"]["total"]
    assert vbench["commands"] == [] and len(vbench["published"]) == 12
    page = (tmp_path / "report" / "index.html").read_text()
    assert "VBench total is <b>83.26 %</b>" in page and "vbench evaluate" not in page
    assert page.count("T2V-Turbo-V2") == 2 and "<small>+1.00</small>" in page
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/videos/*")} == made


def test_a_second_worker_leaves_the_rows_to_the_first(tmp_path: Path):
    record_tiny(tmp_path)
    distill(
        DistillConfig(data=tmp_path / "data", out=tmp_path / "student", num_iterations=1, num_validation=0, lora_rank=1)
    )
    (tmp_path / "own.txt").write_text("a dog")
    config = EvaluateConfig(
        student=str(tmp_path / "student"),
        out=tmp_path / "report",
        prompts=tmp_path / "own.txt",
        vbench=True,
        batch_size=5,
    )
    (tmp_path / "report" / "cache").mkdir(parents=True)
    first = Claims(tmp_path / "report" / "cache", "rows")
    try:
        assert first.take("rows")
        assert evaluate(config) == {}
        assert len(list((tmp_path / "report" / "vbench" / "student" / "videos").iterdir())) == 5
        assert not (tmp_path / "report" / "report.json").exists()
    finally:
        first.close()


def test_options_without_vbench_are_refused(tmp_path: Path):
    for option in ({"vbench_teacher": True}, {"vbench_texts": Path("a")}, {"vbench_flicker": 25}):
        with pytest.raises(UserError, match="give --vbench as well"):
            EvaluateConfig(student="a", out=tmp_path, **option)
    with pytest.raises(UserError, match="it must be from 5 to 100"):
        EvaluateConfig(student="a", out=tmp_path, vbench=True, vbench_flicker=4)
