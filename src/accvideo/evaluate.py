"""Stage 4: teacher and student from the same prompts and the same noise, measured, into `report/`.

What is kept of each row goes to `report/cache`, from which a killed evaluation goes on.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from accvideo.command import Prompt, progress_bar, read_prompt_file
from accvideo.generate import batches, with_prompts
from accvideo.inference.model import PLAYGROUND_STUDENTS, Model, load_model, student_folder, with_scheduler
from accvideo.inference.student_config import StudentConfig, read_student_config
from accvideo.playground.world import sample_prompts
from accvideo.recording.workers import Claims, Place, find_place, own_device
from accvideo.report import ShownClip, write_report
from accvideo.reporting.config import EvaluateConfig
from accvideo.reporting.fvd import VideoFeatures
from accvideo.reporting.rows import NUM_SHOWN, PROPERTIES, Plan, RowData, Task, make_row, row_key, run_row
from accvideo.teacher import PLAYGROUND_TEACHER, teacher_path
from accvideo.trajectory import write_whole
from accvideo.types import UserError
from accvideo.vbench.commands import describe_vbench
from accvideo.vbench.suite import Suite, read_suite, spread
from accvideo.vbench.videos import Making, check_prompts, make_videos

NUM_FAILURES = 6
"""Wrong clips of the student that are shown."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run all rows, write `report.json` and `index.html`, and return what `report.json` holds.

    With `vbench` its videos are made first. Of several processes that share these, one goes on with the rows, and the
    others return nothing.

    Raises:
        UserError: Whatever the user can mend.
    """
    folder = student_folder(config.student)
    student = read_student_config(folder)
    teacher = config.teacher or student.teacher
    is_judged = check_teacher(teacher) == PLAYGROUND_TEACHER
    suite = read_suite(config.prompts, config.vbench_texts, config.vbench_flicker) if config.vbench else None
    place = find_place(os.environ) if config.vbench else Place()
    device = own_device(config.device, place)
    features = None if config.fvd is None else VideoFeatures(config.fvd, device)
    task = Task(
        prompts=choose_prompts(config, is_judged, suite),
        seed=config.seed,
        batch_size=config.batch_size or (16 if is_judged else 1),
        dtype=config.dtype,
        acceleration=config.acceleration,
        is_judged=is_judged,
        rows=row_folder(config),
        features=features,
    )
    with progress_bar(visible=place.local_rank == 0) as progress:
        if suite is None:
            return write_rows(config, task, None, student, device, progress)
        make_vbench(config, task, suite, student, device, place, progress)
        claims = Claims(config.out / "cache", "rows")
        try:
            if not claims.take("rows"):
                return {}
            report = write_rows(config, task, suite, student, device, progress)
        finally:
            claims.close()
    if num_missing := sum(model["num_missing"] for model in report["vbench"]["models"].values()):
        print(
            f"{num_missing} videos are still being made by others that run this command: wait for them", file=sys.stderr
        )
    if commands := report["vbench"]["commands"]:
        lines = ("VBench measures the videos by", *commands, "and then this evaluation's command reads the results.")
        print(*lines, sep="\n", file=sys.stderr)
    return report


def make_vbench(
    config: EvaluateConfig,
    task: Task,
    suite: Suite,
    student: StudentConfig,
    device: str,
    place: Place,
    progress: Progress,
) -> None:
    """Make VBench's videos: of the student, so that they can be measured meanwhile, then of the teacher if wanted."""
    for name in vbench_models(config):
        if name == "student":
            model = load_model(config.student, getattr(torch, config.dtype), device, config.acceleration)
        else:
            model = load_teacher(config, config.teacher or student.teacher, student, device)
        check_prompts(model, suite, task.batch_size)
        num_steps = None if name == "student" else config.num_steps
        making = Making(num_steps, task.seed, task.batch_size, task.dtype, task.acceleration)
        make_videos(name, model, suite, making, config.out / "vbench" / name, place, progress)


def vbench_models(config: EvaluateConfig) -> list[str]:
    """What VBench's videos are made of, by the names of their folders."""
    return ["student", "teacher"] if config.vbench_teacher else ["student"]


def write_rows(
    config: EvaluateConfig, task: Task, suite: Suite | None, student: StudentConfig, device: str, progress: Progress
) -> dict[str, Any]:
    """Run all rows and write the report; returns what `report.json` holds."""
    teacher, folder = config.teacher or student.teacher, student_folder(config.student)
    students = {"student": config.student, **{name: name for name in config.also}}
    model = load_teacher(config, teacher, student, device)
    for block in batches(len(task.prompts), task.batch_size):
        with_prompts(model, [task.prompts[index] for index in block])  # refuses here what it cannot do
    teacher_key, rows, data = teacher_rows(config, task, model, student, progress)
    for name, model_name in students.items():
        model = load_model(model_name, getattr(torch, config.dtype), device, config.acceleration)
        plan = Plan(name, model.num_steps, model.guidance_scale, is_teacher=False)
        data[name] = run_row(model, plan, task, teacher_key, progress)
        rows.append(make_row(model, plan, task, data[name], data["teacher"]))
    report = {
        "rows": rows,
        "speedup": speedup(rows),
        "num_prompts": len(task.prompts),
        "seed": config.seed,
        "command": command_line(config),
        "commit": commit(),
        "device": describe_device(device),
        "teacher": teacher,
        "student": config.student,
        "batch_size": task.batch_size,
        "dtype": config.dtype,
        "limits": limits(task, student, rows),
    }
    if suite is not None:
        report["vbench"] = describe_vbench(config.out / "vbench", suite, vbench_models(config))
        report["limits"] += report["vbench"].pop("limits")
    if config.rows is not None:
        report["limits"].append(
            "Rows may have been made for another evaluation (--rows), perhaps on another device: their seconds, and "
            "the speed-up, are of then."
        )
    write_whole(config.out / "report.json", json.dumps(report, indent=2).encode() + b"\n")
    shown, failures = choose_clips(task, data)
    write_report(config.out, report, shown, failures, training_log(folder), student.fps)
    return report


# What to run


def choose_prompts(config: EvaluateConfig, is_judged: bool, suite: Suite | None = None) -> list[Prompt]:
    """The prompts: of a file, drawn from the world's held-out ones, or some of VBench's.

    Raises:
        UserError: There is no file, and the teacher is not the playground's.
    """
    if suite is not None and suite.listing is not None and not is_judged:
        return spread(suite.prompts, config.num_prompts)
    if config.prompts is not None and (suite is None or suite.listing is None):
        return read_prompt_file(config.prompts)[: config.num_prompts]
    if not is_judged:
        raise UserError("prompts can only be drawn for the playground's teacher; give --prompts FILE")
    return [Prompt(text) for text in sample_prompts(config.num_prompts, config.seed, "held_out")]


def open_folder(folder: Path) -> Path:
    """Make the report's folder, or find an earlier evaluation in it; returns its cache.

    Raises:
        UserError: The folder holds something else.
    """
    cache = folder / "cache"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a new or empty folder as --out")
    if folder.is_dir() and not cache.is_dir() and (others := sorted(path.name for path in folder.iterdir())):
        raise UserError(f"{folder} holds something else ({others[0]}); give a new or empty folder as --out")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {cache}: {error.strerror}; give another --out") from error
    return cache


def row_folder(config: EvaluateConfig) -> Path:
    """Where an evaluation keeps its finished rows; the report's folder is made too.

    Raises:
        UserError: one of them cannot be.
    """
    own = open_folder(config.out)
    if config.rows is None:
        return own
    try:
        config.rows.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {config.rows}: {error.strerror}; give another --rows") from error
    return config.rows


def check_teacher(name: str) -> Path | None:
    """The teacher's folder; None for one on the hub.

    Raises:
        UserError: It is a student.
    """
    folder = student_folder(name) if name in PLAYGROUND_STUDENTS else teacher_path(name)
    if folder is not None and (folder / "student.json").is_file():
        raise UserError(f"{name} is a student, not a teacher; give it with --also")
    return folder


def load_teacher(config: EvaluateConfig, name: str, student: StudentConfig, device: str) -> Model:
    """The teacher, run as it was recorded for the student: at the same noise levels, guidance and sizes."""
    revision = student.revision if config.teacher is None else None
    model = load_model(name, getattr(torch, config.dtype), device, config.acceleration, revision)
    if student.teacher_scheduler is not None:
        model = with_scheduler(model, student.teacher_scheduler)
    sizes = {name: getattr(student, name) for name in ("height", "width", "num_frames")}
    recorded = {**student.pipeline_args, **{name: size for name, size in sizes.items() if size is not None}}
    return replace(
        model,
        num_steps=student.teacher_num_steps,
        guidance_scale=student.teacher_guidance_scale,
        arguments={**model.arguments, **recorded},
    )


def teacher_rows(
    config: EvaluateConfig, task: Task, model: Model, student: StudentConfig, progress: Progress
) -> tuple[str, list[dict[str, Any]], dict[str, RowData]]:
    """The teacher's rows: all steps; the student's number of steps; the student's number of calls.

    Where guidance takes a second call, the student's calls buy K steps without guidance or K // 2 with it. The better
    of the two is `teacher_equal_calls`.

    Returns:
        The key of the first row, the rows, and their data by name; without rows that the scheduler cannot make.
    """
    full = Plan("teacher", config.num_steps or model.num_steps, model.guidance_scale, is_teacher=True)
    key = row_key(model, full, task, None)
    data = {full.name: run_row(model, full, task, None, progress)}

    few = replace(full, name="teacher_few", num_steps=student.num_steps)
    equal = [replace(few, name="teacher_equal_calls")]
    if data["teacher"].denoiser_calls == 2 * full.num_steps:
        equal = [replace(equal[0], guidance_scale=1.0)]
        if student.num_steps > 1:
            equal.append(replace(few, name="teacher_equal_calls_other", num_steps=student.num_steps // 2))
    made = {plan.name: run_few(model, plan, task, key, progress) for plan in (few, *equal)}
    data |= {name: row for name, row in made.items() if row is not None}

    rows = {full.name: make_row(model, full, task, data[full.name])}
    rows |= {
        plan.name: make_row(model, plan, task, data[plan.name], data[full.name])
        for plan in (few, *equal)
        if plan.name in data
    }
    first, other = "teacher_equal_calls", "teacher_equal_calls_other"
    if other in rows and is_better(rows[other], rows[first]):
        rows |= {first: rows[other] | {"name": first}, other: rows[first] | {"name": other}}
        data |= {first: data[other], other: data[first]}
    return key, list(rows.values()), data


def run_few(model: Model, plan: Plan, task: Task, key: str, progress: Progress) -> RowData | None:
    """A row of few steps; None where the scheduler knows no single one, as those of LTX-Video and Mochi."""
    try:
        return run_row(model, plan, task, key, progress)
    except (IndexError, ZeroDivisionError):
        if plan.num_steps > 1:
            raise
        return None


def is_better(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a row is right more often, or, where nothing is judged, nearer to the teacher's own result."""
    if row["metrics"]["all_right"] is not None:
        return row["metrics"]["all_right"]["mean"] > other["metrics"]["all_right"]["mean"]
    return row["metrics"]["latent_mse"]["mean"] < other["metrics"]["latent_mse"]["mean"]


# One row


# The report


def choose_clips(task: Task, data: Mapping[str, RowData]) -> tuple[list[ShownClip], list[ShownClip]]:
    """Clips to show side by side, the first ones, and clips in which the student is wrong, the first of those."""

    def clip(index: int, names: Sequence[str]) -> ShownClip:
        wrong = {}
        if task.is_judged:
            wrong = {name: [one for one in PROPERTIES if not data[name].values[one][index]] for name in names}
        frames = {name: data[name].frames(index) for name in names}
        return ShownClip(index, task.prompts[index].text, frames, wrong)

    shown = [clip(index, list(data)) for index in range(min(NUM_SHOWN, len(task.prompts)))]
    if not task.is_judged:
        return shown, []
    wrong = (~data["student"].values["all_right"]).nonzero()[:, 0].tolist()
    return shown, [clip(index, ["teacher", "student"]) for index in wrong[:NUM_FAILURES]]


def speedup(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How many times faster the student is than the teacher at all its steps."""
    teacher, student = (next(row for row in rows if row["name"] == name) for name in ("teacher", "student"))
    return {part: teacher[f"seconds_{part}"] / student[f"seconds_{part}"] for part in ("denoising", "end_to_end")}


def training_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a student's `metrics.jsonl`; none if it was not kept."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def limits(task: Task, student: StudentConfig, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers do not show, in sentences."""
    sizes = f"{student.num_steps} steps, guidance {student.teacher_guidance_scale}"
    sentences = [
        "The intervals cover which prompts and which noise were drawn. They do not cover another training run: one "
        "student, of one seed, was evaluated.",
        f"Seconds are of this device, batches of {task.batch_size} and {task.dtype}. Elsewhere text encoder, denoiser "
        "and decoder take other shares, and the end-to-end speed-up changes with them.",
        f"The student is fixed to what it was distilled for ({sizes}). Nothing is said about other sizes, lengths or "
        "guidance.",
        "A small latent error is no proof of a good clip: a blurred one may be nearer to the teacher's result than a "
        "sharp one that differs.",
    ]
    if task.features is not None:
        sentences.append(
            f"FVD falls with the number of clips, here {len(task.prompts)}: compare it between rows of this page only. "
            "Below some 500 clips it is rough: it takes a covariance of 400 features."
        )
    if not task.is_judged:
        return [
            "No judge: the numbers say how near the student comes to the teacher, not whether clips follow their "
            "prompts or look good.",
            *sentences,
        ]
    return [
        "The playground is a world of simple shapes, and its teacher is tiny. That the method works here does not say "
        "how well it works for a large model of real video.",
        "The judge reads clips by image analysis and errs in about 1 % of clean clips; blurred or broken clips are "
        "judged wrong rather than right.",
        f"The diversity distance depends on the number of clips: compare it between rows of this page only. The "
        f"teacher's own is {rows[0]['metrics']['diversity_distance']['mean']:.3f}.",
        *sentences,
    ]


def command_line(config: EvaluateConfig) -> str:
    """The command that makes this report again."""
    words = ["accvideo", "evaluate", config.student]
    for owner in (config, config.acceleration):
        for field in fields(owner):
            value, option = getattr(owner, field.name), f"--{field.name.replace('_', '-')}"
            if field.name in ("student", "acceleration") or value == field.default:
                continue
            for each in value if isinstance(value, tuple) else (value,):
                words += [option] if each is True else [option, str(each)]
    return shlex.join(words)


def commit() -> str:
    """The commit this code is of, with `-dirty` if it was changed since; outside a checkout the package's version."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return f"accvideo {version('accvideo')}"


def describe_device(device: str) -> str:
    """The device in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"
