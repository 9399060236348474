import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from accvideo.report import ShownClip, curves, sprite, training_section, write_report
from accvideo.reporting.charts import binned, log_ticks, nice_ticks
from accvideo.reporting.wording import number
from accvideo.vbench.published import PUBLISHED, describe_published
from accvideo.vbench.scores import DIMENSIONS, Score, describe

VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects text, ids of references and clips."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.text, self.references, self.sprites = "", [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: D102
        values = dict(attrs)
        self.references += [values[name] for name in ("src", "href", "srcset") if name in values]
        if "data-sprite" in values:
            self.sprites.append(values["aria-label"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: D102
        pass

    def handle_endtag(self, tag: str) -> None:  # noqa: D102
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:  # noqa: D102
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def estimate(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def row(name: str, steps: int, calls: int, guidance: float, denoising: float, right: float | None) -> dict[str, Any]:
    """A row with numbers of the size that the playground gives."""
    judged = None if right is None else estimate(right, 0.02)
    metrics: dict[str, Any] = dict.fromkeys(("all_right", "shape", "color", "background", "motion", "count"), judged)
    metrics["rerender_psnr_db"] = None if right is None else estimate(18 + 10 * right, 0.4)
    metrics["diversity_distance"] = None if right is None else estimate(0.12 - 0.06 * right, 0.008)
    metrics["flicker"] = estimate(3.1, 0.12)
    metrics["latent_mse"] = None if name == "teacher" else estimate(0.6 / calls, 0.02)
    metrics["teacher_psnr_db"] = None if name == "teacher" else estimate(20.0 + calls, 0.3)
    seconds = {"text": 0.004, "denoising": denoising, "decoding": 0.021}
    return {
        "name": name,
        "model": "playground",
        "num_steps": steps,
        "guidance_scale": guidance,
        "denoiser_calls": calls,
        "seconds": seconds,
        "seconds_denoising": denoising,
        "seconds_end_to_end": sum(seconds.values()),
        "metrics": metrics,
    }


DIFFERENCES = {
    "all_right": {"mean": -0.014, "low": -0.03, "high": 0.002},
    "flicker": {"mean": 0.05, "low": 0.01, "high": 0.09},
}


def make_report(judged: bool = True) -> dict[str, Any]:
    rows = [
        row("teacher", 50, 100, 3.0, 0.66, 0.972),
        row("teacher_few", 5, 10, 3.0, 0.068, 0.912),
        row("teacher_equal_calls", 5, 5, 1.0, 0.034, 0.534),
        row("teacher_equal_calls_other", 2, 4, 3.0, 0.027, 0.31),
        row("student", 5, 5, 1.0, 0.034, 0.958) | {"differences": DIFFERENCES},
        row("playground-student", 5, 5, 1.0, 0.035, 0.969),
    ]
    if not judged:
        rows = [{**row, "metrics": {**row["metrics"], **dict.fromkeys(JUDGED)}} for row in rows]
    return {
        "rows": rows,
        "speedup": {"denoising": 19.4, "end_to_end": 11.6},
        "num_prompts": 500,
        "seed": 0,
        "command": "accvideo evaluate runs/demo/student --out runs/demo/report",
        "commit": "0123456789ab",
        "device": "CPU, 2 threads, x86_64",
        "teacher": "playground",
        "student": "runs/demo/student",
        "limits": ["Nothing is said about <real> videos.", "Intervals cover prompts and noise only."],
    }


JUDGED = (
    "all_right",
    "shape",
    "color",
    "background",
    "motion",
    "count",
    "rerender_psnr_db",
    "diversity_distance",
)


def make_clips(num: int, frames: int = 17, size: int = 64) -> list[ShownClip]:
    """A bright square that moves over a dark background, blurred by noise that differs between the rows."""
    clips = []
    for index in range(num):
        generator = torch.Generator().manual_seed(index)
        clean = torch.full((frames, size, size, 3), 30.0) + 40 * torch.rand(3, generator=generator)
        for i in range(frames):
            start = 4 + 2 * i
            clean[i, 20 + index : 40 + index, start : start + 20] = 255 * torch.rand(3, generator=generator).round()
        noise = {"teacher": 2, "teacher_few": 12, "teacher_equal_calls": 50, "student": 4, "playground-student": 3}
        clips.append(
            ShownClip(
                index,
                f"a red star moves left and a blue ring bounces on a striped gray background {index}",
                {
                    name: (clean + sigma * torch.randn(clean.shape, generator=generator)).clamp(0, 255).byte()
                    for name, sigma in noise.items()
                },
                {name: ["shape", "motion"] if name == "teacher_equal_calls" else [] for name in noise},
            )
        )
    return clips


def make_log() -> list[dict[str, Any]]:
    """Lines as `accvideo distill` writes them; heads start at iteration 100."""
    log: list[dict[str, Any]] = []
    for i in range(500):
        loss = 0.5 * (1 + i % 5) * (1 + i) ** -0.3
        accuracy = 0.5 + 0.08 * (i % 5) * (1 - 2.7 ** (-i / 100))
        heads = {"real_accuracy": accuracy + 0.05, "fake_accuracy": accuracy - 0.05} if i >= 100 else {}
        log.append({"iteration": i, "keypoint": i % 5, "trajectory_loss": loss, **heads})
        if i % 50 == 49:
            validation = [0.6 * (1 + k) * (1 + i) ** -0.27 for k in range(5)]
            log.append({"iteration": i, "validation_loss": validation, "latent_error": 0.2})
    return log


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    clips = make_clips(3)
    path = write_report(tmp_path_factory.mktemp("report"), make_report(), clips[:2], clips[2:], make_log(), 8)
    return path.read_text("utf-8")


def test_page_parses_and_holds_all_rows(page: str):
    """Tags balance; every row stands in the table with its numbers, and its clips are on the page."""
    parsed = Page(page)
    assert not parsed.open
    for text in ("50 steps guided", "100 calls", "Playground student", "97.2", "53.4", "11.6×", "0123456789ab"):
        assert text in parsed.text
    assert len(parsed.sprites) == 2 * 5 + 2
    assert "shape, motion" in parsed.text and "Trajectory loss" in parsed.text and "key point 4" in parsed.text


def test_differences_to_the_teacher_stand_below_the_metric_and_are_bold_where_they_are_some(page: str):
    assert re.search(r"95\.8<small>[\d. to]+</small><small>−1\.4 \(−3\.0, \+0\.2\)</small>", page)
    assert "<small><b>+0.05 (+0.01, +0.09)</b></small>" in page


def test_the_training_is_shown_by_its_own_loss():
    assert "trajectory loss pulls" in training_section(make_log())
    log = [{name.replace("trajectory", "consistency"): value for name, value in line.items()} for line in make_log()]
    assert "consistency loss pulls" in training_section(log) and "Consistency loss" in training_section(log)


def test_page_needs_no_network(page: str):
    """No address anywhere: neither in tags, nor in the style, nor in the script."""
    assert not re.findall(r"(https?:)?//[a-z]", re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", page))
    assert not Page(page).references
    assert "url(" not in page and "@import" not in page


def test_page_escapes_what_users_wrote(page: str):
    assert "&lt;real&gt;" in page and "<real>" not in page


def test_page_is_small_and_leaves_no_partial_file(tmp_path: Path):
    """Ten prompts of five rows of the playground's size stay below three megabytes."""
    path = write_report(tmp_path, make_report(), make_clips(10), [], [], 8)
    assert path.stat().st_size < 3e6
    assert [child.name for child in tmp_path.iterdir()] == ["index.html"]


def test_page_without_a_judge(tmp_path: Path):
    """Of a teacher without a judge the paired metrics are shown, and no dead columns."""
    clips = [ShownClip(clip.index, clip.prompt, clip.frames) for clip in make_clips(1)]
    text = Page(write_report(tmp_path, make_report(judged=False), clips, [], [], 8).read_text("utf-8")).text
    assert "Latent error" in text and "PSNR to the teacher's clip" in text
    assert "All properties right" not in text and "all right" not in text and "Training" not in text


def vbench_part(measured: list[str], custom: bool = False) -> dict[str, Any]:
    """VBench's part of a report with the paper's scores of student and teacher, in these dimensions."""
    models = {}
    for name, row in (("student", PUBLISHED[5]), ("teacher", PUBLISHED[4])):
        scores = {each: Score(row.scores[each] / 100, 360, "results_1_eval_results.json") for each in measured}
        made = {"num_steps": 5, "size": None, "num_videos": 4700, "num_missing": 20}
        models[name] = {**made, **describe(scores)}
    return {
        "mode": "custom_input" if custom else "vbench_standard",
        "num_prompts": 944,
        "models": models,
        "commands": [] if len(measured) == 16 else ["cd '<here>'", "vbench evaluate"],
        "published": [] if custom else describe_published(),
    }


@pytest.mark.parametrize("measured, custom", [(list(DIMENSIONS), False), ([], False), (["dynamic_degree"], True)])
def test_vbench_stands_beside_the_published_tables(tmp_path: Path, measured: list[str], custom: bool):
    """All numbers and the differences to the teacher; what is not measured yet by its commands, and no empty table."""
    report = make_report(judged=False) | {"vbench": vbench_part(measured, custom)}
    text = write_report(tmp_path, report, [], [], [], 8).read_text("utf-8")
    page = Page(text)
    assert not page.open and not re.findall(r"(https?:)?//[a-z]", text)
    assert "4,700 of the student's 4,720 videos" in page.text
    assert ("&lt;here&gt;" in text and "vbench evaluate" in page.text) == (len(measured) < 16)
    assert ("PyramidFlow" in page.text) == (len(measured) == 16)
    assert ("The student's VBench total is 83.26 %, the teacher's 82.66 %." in page.text) == (len(measured) == 16)
    assert ("75.00−1.38" in page.text) == ("dynamic_degree" in measured)
    if len(measured) == 16:
        for row in PUBLISHED:
            assert all(f"{value:.2f}" in page.text for value in row.scores.values())


def test_sprite_holds_the_frames_side_by_side():
    """Frames of the playground's size are kept; long and large clips are thinned and made smaller."""
    frames = make_clips(1)[0].frames["teacher"]
    assert sprite(frames)[1:] == (17, 64, 64)
    large = torch.zeros(81, 96, 416, 3, dtype=torch.uint8)
    assert sprite(large)[1:] == (41, 192, 44)


def test_ticks_are_round_and_cover_the_range():
    assert nice_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(13, 96) == [0, 20, 40, 60, 80, 100]
    assert log_ticks(0.04, 3) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])


def test_numbers_have_three_digits():
    assert [number(value) for value in (0, 0.012345, 1.2345, 12.345, 123.45)] == ["0", "0.0123", "1.23", "12.3", "123"]


def test_curves_are_separate_for_each_key_point():
    """Lines without a key point, without the value or with a value that is no number are left out."""
    log = [{"iteration": i, "keypoint": i % 2, "trajectory_loss": float(i % 2)} for i in range(6)]
    others: list[dict[str, Any]] = [{"iteration": 7}, {"iteration": 8, "keypoint": 0}]
    others.append({"iteration": 9, "keypoint": 0, "trajectory_loss": float("nan")})
    assert curves([*log, *others], lambda line: line["trajectory_loss"]) == {
        0: [(0.0, 0.0), (2.0, 0.0), (4.0, 0.0)],
        1: [(1.0, 1.0), (3.0, 1.0), (5.0, 1.0)],
    }


def test_long_curves_are_averaged():
    """Equal groups of neighbors become their means."""
    points = [(float(i), float(i % 2)) for i in range(120)]
    short = binned(points, num_bins=30)
    assert len(short) == 30 and short[0] == (1.5, 0.5)
