"""Stage 4: teacher and student from the same prompts and the same noise, measured, into `report/`.

Each row of the report is one model run in one way. Its clips are made and measured batch by batch; what is kept of each
batch goes to a file in `report/cache`, from which a killed evaluation goes on and from which the report is made.
"""

import json
import platform
import shlex
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from accvideo.command import choose_device, progress_bar, read_prompts
from accvideo.generate import ClipBatch, Seconds, sample_clips
from accvideo.metrics import (
    Estimate,
    bootstrap_interval,
    deviation_interval,
    flicker,
    latent_mse,
    psnr,
    wilson_interval,
)
from accvideo.model import Dtype, Model, digest, load_model, student_folder
from accvideo.playground.judge import Verdicts, diversity_distance, judge
from accvideo.playground.world import Requests, Scenes, sample_prompts
from accvideo.report import ShownClip, write_report
from accvideo.student import StudentConfig, read_student_config
from accvideo.teacher import PLAYGROUND_TEACHER, teacher_path
from accvideo.trajectory import write_whole
from accvideo.types import UserError

PROPERTIES = ("shape", "color", "background", "motion", "count")
"""What the judge looks at."""

FIRST_ITEM = 1_000_000
"""Number of the first item of an evaluation. Recordings count from 0: no student has been trained on this noise."""

NUM_SHOWN = 10
"""Prompts whose clips are shown side by side."""

NUM_FAILURES = 6
"""Wrong clips of the student that are shown."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compares a student with its teacher and writes a report."""

    student: tyro.conf.Positional[str]
    """Folder of a student, or `playground-student`."""
    out: Path
    """Folder of the report; a killed evaluation in it goes on."""
    teacher: str | None = None
    """The student's own by default."""
    also: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A further student, as one more row; may be repeated."""
    num_prompts: int = 500
    """Number of prompts, and clips of each row."""
    prompts: Path | None = None
    """Text file, one prompt a line; held-out prompts of the world by default if the teacher is the playground's."""
    seed: int = 0
    """Seed of prompts and noise."""
    num_steps: int | None = None
    """Steps of the teacher; by default as many as were recorded."""
    batch_size: int | None = None
    """Clips denoised together; 16 by default for the playground, else 1."""
    dtype: Dtype = "float32"
    """Of the pipelines."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_steps", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")


@dataclass(frozen=True)
class Plan:
    """How a row's clips are made."""

    name: str
    num_steps: int
    guidance_scale: float | None
    is_teacher: bool


@dataclass(frozen=True)
class Task:
    """What all rows have in common."""

    prompts: list[str]
    seed: int
    batch_size: int
    dtype: str
    is_judged: bool
    cache: Path

    def batches(self) -> list[range]:
        """Numbers of the prompts of each batch."""
        size, total = self.batch_size, len(self.prompts)
        return [range(start, min(start + size, total)) for start in range(0, total, size)]


@dataclass(frozen=True)
class RowData:
    """What was made and measured for a row."""

    values: dict[str, Tensor]
    """One value a clip: `latent_mse` and the like, and the judge's verdicts by the names of `flatten_verdicts`."""
    frames: dict[int, Tensor]
    """The clips that were kept, by number of the prompt."""
    seconds: list[tuple[int, Seconds]]
    """Size and seconds of each batch."""
    denoiser_calls: int
    """For each clip."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run all rows, write `report.json` and `index.html`, and return what `report.json` holds.

    Raises:
        UserError: Whatever the user can mend.
    """
    folder = student_folder(config.student)
    student = read_student_config(folder)
    teacher = config.teacher or student.teacher
    is_judged = teacher_path(teacher) == PLAYGROUND_TEACHER
    task = Task(
        prompts=choose_prompts(config, is_judged),
        seed=config.seed,
        batch_size=config.batch_size or (16 if is_judged else 1),
        dtype=config.dtype,
        is_judged=is_judged,
        cache=open_folder(config.out),
    )
    device = choose_device(config.device)
    dtype = getattr(torch, config.dtype)
    students = {"student": config.student, **{name: name for name in config.also}}
    with progress_bar() as progress:
        model = load_teacher(teacher, student, dtype, device)
        teacher_key, rows, data = teacher_rows(config, task, model, student, progress)
        for name, model_name in students.items():
            model = load_model(model_name, dtype, device)
            plan = Plan(name, model.num_steps, model.guidance_scale, is_teacher=False)
            data[name] = run_row(model, plan, task, teacher_key, progress)
            rows.append(make_row(model, plan, task, data[name]))
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
    write_whole(config.out / "report.json", json.dumps(report, indent=2).encode() + b"\n")
    shown, failures = choose_clips(task, data)
    write_report(config.out, report, shown, failures, training_log(folder), student.fps)
    return report


# What to run


def choose_prompts(config: EvaluateConfig, is_judged: bool) -> list[str]:
    """The prompts: of a file, or drawn from the world's held-out ones.

    Raises:
        UserError: There is no file, and the teacher is not the playground's.
    """
    if config.prompts is not None:
        return read_prompts(config.prompts)[: config.num_prompts]
    if not is_judged:
        raise UserError("prompts can only be drawn for the playground's teacher; give --prompts FILE")
    return sample_prompts(config.num_prompts, config.seed, "held_out")


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


def load_teacher(name: str, student: StudentConfig, dtype: torch.dtype, device: str) -> Model:
    """The teacher, run as it was recorded for the student."""
    model = load_model(name, dtype, device)
    if model.student is not None:
        raise UserError(f"{name} is a student, not a teacher; give it with --also")
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
        The key of the first row, the rows, and their data by name.
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
    data |= {plan.name: run_row(model, plan, task, key, progress) for plan in (few, *equal)}

    rows = [make_row(model, plan, task, data[plan.name]) for plan in (full, few, *equal)]
    if len(equal) == 2 and is_better(rows[3], rows[2]):
        first, other = equal[0].name, equal[1].name
        rows[2:] = [rows[3] | {"name": first}, rows[2] | {"name": other}]
        data |= {first: data[other], other: data[first]}
    return key, rows, data


def is_better(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a row is right more often, or, where nothing is judged, nearer to the teacher's own result."""
    if row["metrics"]["all_right"] is not None:
        return row["metrics"]["all_right"]["mean"] > other["metrics"]["all_right"]["mean"]
    return row["metrics"]["latent_mse"]["mean"] < other["metrics"]["latent_mse"]["mean"]


# One row


def row_key(model: Model, plan: Plan, task: Task, teacher_key: str | None) -> str:
    """A hash of everything that a row's clips and measurements depend on."""
    settings = {
        "identity": model.identity,
        "arguments": model.arguments,
        "num_steps": plan.num_steps,
        "guidance_scale": plan.guidance_scale,
        "prompts": task.prompts,
        "seed": task.seed,
        "batch_size": task.batch_size,
        "dtype": task.dtype,
        "is_judged": task.is_judged,
        "teacher": teacher_key,
        "version": version("accvideo"),
    }
    return digest(json.dumps(settings, sort_keys=True).encode())[:16]


def run_row(model: Model, plan: Plan, task: Task, teacher_key: str | None, progress: Progress) -> RowData:
    """Make and measure a row's clips, or the rest of them.

    Args:
        model: Teacher or student.
        plan: How its clips are made.
        task: On what.
        teacher_key: Key of the teacher's row, which clips are compared with; None for that row itself.
        progress: Where to show a bar.
    """
    folder = task.cache / row_key(model, plan, task, teacher_key)
    folder.mkdir(exist_ok=True)
    missing = [batch for batch in task.batches() if not is_whole(folder / file_name(batch))]
    bar = progress.add_task(plan.name, total=len(missing) * plan.num_steps)
    if missing:
        # The first run allocates memory and chooses kernels: it is not timed.
        warm_up = min(2, plan.num_steps) if model.student is None else plan.num_steps
        sample_batch(model, replace(plan, num_steps=warm_up), task, missing[0])
    for batch in missing:
        clips = sample_batch(model, plan, task, batch, on_step=lambda _: progress.advance(bar))
        teacher = None if teacher_key is None else task.cache / teacher_key / file_name(batch)
        write_batch(folder / file_name(batch), task, batch, clips, teacher, keep_wrong=not plan.is_teacher)
    return read_row([folder / file_name(batch) for batch in task.batches()])


def sample_batch(
    model: Model, plan: Plan, task: Task, batch: range, on_step: Callable[[int], None] | None = None
) -> ClipBatch:
    """The clips of one batch."""
    prompts, items = [task.prompts[i] for i in batch], [FIRST_ITEM + i for i in batch]
    [clips] = sample_clips(model, prompts, items, task.seed, plan.num_steps, plan.guidance_scale, len(batch), on_step)
    return clips


def file_name(batch: range) -> str:
    """Name of a batch's file."""
    return f"{batch.start:06d}.safetensors"


def is_whole(path: Path) -> bool:
    """Whether a batch's file is there and not damaged."""
    try:
        with safe_open(path, "pt"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False


def write_batch(path: Path, task: Task, batch: range, clips: ClipBatch, teacher: Path | None, keep_wrong: bool) -> None:
    """Measure a batch and write what is kept of it.

    All of the teacher's own clips and latents are kept, since the other rows are compared with them; of other rows the
    clips to show and, where `keep_wrong`, those that the judge finds wrong.
    """
    values = {"flicker": flicker(clips.frames)}
    if task.is_judged:
        verdicts = judge(clips.frames, [task.prompts[i] for i in batch])
        # The judge's flicker leaves out the motion that it recognized.
        values = {**flatten_verdicts(verdicts), "flicker": verdicts.flicker}
    kept = torch.tensor([i < NUM_SHOWN for i in batch])
    tensors = {}
    if teacher is None:
        kept[:] = True
        values["latent_mse"] = torch.zeros(len(batch))
        tensors["latents"] = clips.latents
    else:
        with safe_open(teacher, "pt") as reference:
            values["latent_mse"] = latent_mse(clips.latents, reference.get_tensor("latents"))
            values["teacher_psnr_db"] = psnr(clips.frames, reference.get_tensor("frames"))
        if keep_wrong and task.is_judged:
            kept |= ~values["all_right"]
    tensors |= {f"values.{name}": value for name, value in values.items()}
    tensors |= {"frames": clips.frames[kept], "kept": torch.tensor(batch)[kept]}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    measured = {"seconds": asdict(clips.seconds), "denoiser_calls": clips.denoiser_calls}
    write_whole(path, save(tensors, {"measured": json.dumps(measured)}))


def read_row(paths: Sequence[Path]) -> RowData:
    """What the files of a row's batches hold."""
    values: dict[str, list[Tensor]] = {}
    frames: dict[int, Tensor] = {}
    seconds, denoiser_calls = [], 0
    for path in paths:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith("values.")]  # noqa: SIM118 - no mapping
            for name in names:
                values.setdefault(name.removeprefix("values."), []).append(file.get_tensor(name))
            frames |= dict(zip(file.get_tensor("kept").tolist(), file.get_tensor("frames"), strict=True))
            measured = json.loads(file.metadata()["measured"])
        seconds.append((len(values["flicker"][-1]), Seconds(**measured["seconds"])))
        denoiser_calls = measured["denoiser_calls"]
    return RowData({name: torch.cat(parts) for name, parts in values.items()}, frames, seconds, denoiser_calls)


def make_row(model: Model, plan: Plan, task: Task, data: RowData) -> dict[str, Any]:
    """A row of `report.json`; seconds are for one clip, medians over batches of full size."""
    size = min(task.batch_size, len(task.prompts))
    full = [seconds for num_clips, seconds in data.seconds if num_clips == size]
    parts = {part.name: statistics.median(getattr(each, part.name) for each in full) / size for part in fields(Seconds)}
    return {
        "name": plan.name,
        "model": model.name,
        "num_steps": plan.num_steps,
        "guidance_scale": plan.guidance_scale,
        "denoiser_calls": data.denoiser_calls,
        "seconds": parts,
        "seconds_denoising": parts["denoising"],
        "seconds_end_to_end": sum(parts.values()),
        "metrics": {
            name: None if estimate is None else asdict(estimate)
            for name, estimate in row_metrics(data.values, task.is_judged).items()
        },
    }


def row_metrics(values: Mapping[str, Tensor], is_judged: bool) -> dict[str, Estimate | None]:
    """Each metric with its 95 % interval; None where it does not apply."""
    metrics: dict[str, Estimate | None] = {
        name: wilson_interval(int(values[name].sum()), len(values[name])) if is_judged else None
        for name in ("all_right", *PROPERTIES)
    }
    for name in ("rerender_psnr_db", "flicker", "latent_mse", "teacher_psnr_db"):
        metrics[name] = bootstrap_interval(values[name].double().numpy()) if name in values else None
    metrics["diversity_distance"] = None
    if is_judged:

        def distance(rows: np.ndarray) -> float:
            indices = torch.from_numpy(rows)
            return diversity_distance(restore_verdicts({name: value[indices] for name, value in values.items()}))

        metrics["diversity_distance"] = deviation_interval(len(values["flicker"]), distance)
    return metrics


# The judge's verdicts as plain tensors


def flatten_verdicts(verdicts: Verdicts) -> dict[str, Tensor]:
    """All tensors of the verdicts by name, so that they can be stored."""
    scenes, requests = verdicts.scenes, verdicts.scenes.requests
    columns = {field.name: getattr(verdicts, field.name) for field in fields(Verdicts) if field.name != "scenes"}
    columns |= {f"requests.{field.name}": getattr(requests, field.name) for field in fields(Requests)}
    return columns | {"scenes.objects": scenes.objects, "scenes.phase": scenes.phase}


def restore_verdicts(values: Mapping[str, Tensor]) -> Verdicts:
    """Inverse of `flatten_verdicts`; other values are ignored."""
    requests = Requests(**{field.name: values[f"requests.{field.name}"] for field in fields(Requests)})
    scenes = Scenes(requests, values["scenes.objects"], values["scenes.phase"])
    columns = {field.name: values[field.name] for field in fields(Verdicts) if field.name != "scenes"}
    return Verdicts(**columns, scenes=scenes)


# The report


def choose_clips(task: Task, data: Mapping[str, RowData]) -> tuple[list[ShownClip], list[ShownClip]]:
    """Clips to show side by side, the first ones, and clips in which the student is wrong, the first of those."""

    def clip(index: int, names: Sequence[str]) -> ShownClip:
        wrong = {}
        if task.is_judged:
            wrong = {name: [one for one in PROPERTIES if not data[name].values[one][index]] for name in names}
        frames = {name: data[name].frames[index] for name in names}
        return ShownClip(index, task.prompts[index], frames, wrong)

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
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "student" or value == field.default:
            continue
        for each in value if isinstance(value, tuple) else (value,):
            words += [f"--{field.name.replace('_', '-')}", str(each)]
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
