"""Stage 3: clips from a teacher or a student, by its own diffusers pipeline."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image, UnidentifiedImageError

from accvideo.command import (
    choose_device,
    parse_pipeline_args,
    progress_bar,
    read_prompts,
    shorten,
)
from accvideo.metrics import Clips
from accvideo.model import Dtype, Model, check_student, digest, load_model, with_arguments
from accvideo.teacher import (
    denoisers,
    item_generator,
    watch,
)
from accvideo.trajectory import write_whole
from accvideo.types import Latents, UserError
from accvideo.video import check_suffix, viewing_scale, write_video


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Makes videos with a teacher or a student."""

    model: tyro.conf.Positional[str]
    """`playground`, `playground-student`, a folder of a teacher or a student, or a hub id."""
    out: Path
    """A file (.mp4, .webp or .gif) or a folder for numbered mp4 files; an interrupted generation in it goes on."""
    prompt: str | None = None
    """What to show; or give `prompts`."""
    prompts: Path | None = None
    """Text file, one prompt a line; `out` is a folder then."""
    image: Path | None = None
    """First frame, for image-to-video pipelines."""
    seed: int = 0
    """With a video's number, it makes the video's noise."""
    num_steps: int | None = None
    """Denoising steps of a teacher, 50 by default; a student has its own."""
    guidance_scale: float | None = None
    """Of a teacher; the pipeline's own by default. A student has it distilled in."""
    height: int | None = None
    """In pixels; the model's own by default."""
    width: int | None = None
    """In pixels; the model's own by default."""
    num_frames: int | None = None
    """The model's own by default."""
    fps: float | None = None
    """Frames a second of the file; the model's own by default."""
    pipeline_arg: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=JSON: any other argument of the pipeline's call; may be repeated."""
    batch_size: int = 1
    """Videos denoised together."""
    dtype: Dtype = "float32"
    """Of the pipeline."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            raise UserError("give either --prompt TEXT or --prompts FILE")
        if names_file(self.out):
            check_suffix(self.out)
        for name in ("batch_size", "num_steps", "height", "width", "num_frames"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")


@dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds of the parts of a generation, which follow each other without gaps."""

    text: float
    """Everything before the first denoiser call: mostly the text encoder."""
    denoising: float
    """From the first denoiser call until the decoder starts."""
    decoding: float

    @property
    def total(self) -> float:
        """All parts."""
        return self.text + self.denoising + self.decoding


@dataclass(frozen=True)
class ClipBatch:
    """Clips that were generated together."""

    indices: list[int]
    frames: Clips
    latents: Latents
    """The state after the last step, float32, on the CPU."""
    seconds: Seconds
    """Of the whole batch."""
    denoiser_calls: int
    """For each clip, counted at the denoiser."""
    sigmas: list[float]
    """Noise levels that the scheduler went through."""


def sample_clips(
    model: Model,
    prompts: Sequence[str],
    indices: Sequence[int],
    seed: int = 0,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 1,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[ClipBatch]:
    """Generate clips batch by batch.

    The noise of an item depends on `seed` and its index only: it is the same for teacher and student.

    Args:
        model: Teacher or student.
        prompts: One a clip.
        indices: Number of each clip, which makes its noise.
        seed: Seed of all noise.
        num_steps: Denoising steps; the model's own by default.
        guidance_scale: The model's own by default; 1 is off.
        batch_size: Clips denoised together; the last batch may be smaller.
        on_step: Called with the number of steps taken in this batch, after each.

    Raises:
        UserError: A student is asked for other steps or guidance than its own, or the pipeline refuses its arguments.
    """
    check_student(model, num_steps, guidance_scale)
    guidance_scale = model.guidance_scale if guidance_scale is None else guidance_scale
    arguments = (
        dict(model.arguments) if guidance_scale is None else {**model.arguments, "guidance_scale": guidance_scale}
    )
    run: Any = model.pipeline
    for start in range(0, len(prompts), batch_size):
        items = list(indices[start : start + batch_size])
        with watch(model.pipeline, keep=(), on_step=on_step) as seen, stopwatch(model.pipeline) as marks:
            try:
                output = run(
                    prompt=list(prompts[start : start + batch_size]),
                    generator=[item_generator(seed, index) for index in items],
                    num_inference_steps=num_steps or model.num_steps,
                    output_type="np",
                    **arguments,
                )
            except (ValueError, TypeError) as error:
                if seen.num_steps:
                    raise
                reason = str(error).splitlines()[0]
                raise UserError(f"{type(model.pipeline).__name__} refuses its arguments: {reason}") from error
        assert seen.final is not None
        yield ClipBatch(
            indices=items,
            frames=torch.from_numpy((np.asarray(output.frames) * 255).round().astype(np.uint8)),
            latents=seen.final.cpu(),
            seconds=Seconds(*(late - early for early, late in zip(marks[:-1], marks[1:], strict=True))),
            denoiser_calls=seen.num_calls,
            sigmas=seen.sigmas,
        )


@contextmanager
def stopwatch(pipeline: Any) -> Iterator[list[float]]:
    """Times one run of a pipeline: start, first denoiser call, start of decoding, end, in seconds."""

    def mark(*_: Any) -> None:
        if torch.device(pipeline.device).type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    def first_call(*_: Any) -> None:
        if len(marks) == 1:
            mark()

    original_decode = pipeline.vae.decode

    @wraps(original_decode)
    def decode(*args: Any, **kwargs: Any) -> Any:
        if len(marks) == 2:
            mark()
        return original_decode(*args, **kwargs)

    marks: list[float] = []
    hooks = [denoiser.register_forward_pre_hook(first_call) for denoiser in denoisers(pipeline).values()]
    pipeline.vae.decode = decode
    try:
        mark()
        yield marks
        mark()
    finally:
        del pipeline.vae.decode
        for hook in hooks:
            hook.remove()


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Generate videos, or the rest of them, and return what `generation.json` holds.

    Raises:
        UserError: Whatever the user can mend.
    """
    prompts = [config.prompt] if config.prompt is not None else read_prompts(config.prompts or Path())
    files, journal = output_files(config, len(prompts))
    device = choose_device(config.device)
    model = load_model(config.model, getattr(torch, config.dtype), device)
    check_student(model, config.num_steps, config.guidance_scale)
    sizes = {name: getattr(config, name) for name in ("height", "width", "num_frames")}
    given = {name: size for name, size in sizes.items() if size is not None}
    model = with_arguments(model, {**parse_pipeline_args(config.pipeline_arg), **given})
    settings = {
        "model": config.model,
        "identity": model.identity,
        "prompts": prompts,
        "image": None if config.image is None else digest(read_image(config.image).tobytes()),
        "seed": config.seed,
        "num_steps": config.num_steps or model.num_steps,
        "guidance_scale": model.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        "arguments": model.arguments,
        "fps": config.fps or model.fps,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
    }
    generation = open_journal(config.out, journal, files, settings)
    if config.image is not None:
        model = with_arguments(model, {"image": read_image(config.image)})

    done = {video["file"] for video in generation["videos"] if journal.with_name(video["file"]).exists()}
    blocks = [range(i, min(i + config.batch_size, len(prompts))) for i in range(0, len(prompts), config.batch_size)]
    blocks = [block for block in blocks if any(files[index].name not in done for index in block)]
    with progress_bar() as progress:
        bar = progress.add_task("denoising steps", total=len(blocks) * settings["num_steps"])
        for block in blocks:
            [batch] = sample_clips(
                model,
                [prompts[index] for index in block],
                block,
                config.seed,
                config.num_steps,
                config.guidance_scale,
                len(block),
                on_step=lambda _: progress.advance(bar),
            )
            for index, frames in zip(block, batch.frames, strict=True):
                write_video(files[index], frames, settings["fps"], viewing_scale(*frames.shape[1:3]))
            kept = [video for video in generation["videos"] if video["index"] not in block]
            seconds = {name: value / len(block) for name, value in asdict(batch.seconds).items()}
            seconds["total"] = batch.seconds.total / len(block)
            made = [
                {"file": files[index].name, "index": index, "prompt": prompts[index], "seconds": seconds}
                for index in block
            ]
            generation["videos"] = sorted(kept + made, key=lambda video: video["index"])
            generation |= {
                "sigmas": batch.sigmas,
                "denoiser_calls": batch.denoiser_calls,
                "peak_memory_bytes": peak_memory(device),
            }
            write_whole(journal, json.dumps(generation, indent=2).encode() + b"\n")
    return {"out": str(config.out), "num_generated": sum(map(len, blocks)), **generation}


def names_file(out: Path) -> bool:
    """Whether a path is meant as a file: it ends in letters after a dot (`run-1.5` is a folder)."""
    return out.suffix[1:].isalnum() and not out.suffix[1:].isdigit() and not out.is_dir()


def output_files(config: GenerateConfig, num_videos: int) -> tuple[list[Path], Path]:
    """Where each video goes, and the JSON file that says how they were made.

    Raises:
        UserError: Several videos for one file.
    """
    if not names_file(config.out):
        return [config.out / f"{index:06d}.mp4" for index in range(num_videos)], config.out / "generation.json"
    if num_videos > 1:
        raise UserError(f"{config.out} is one file for {num_videos} prompts; give a folder as --out")
    return [config.out], config.out.with_suffix(".json")


def open_journal(out: Path, journal: Path, files: Sequence[Path], settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run of the same command has left, or the start of a new journal.

    Raises:
        UserError: Something else is there, which would be overwritten.
    """
    if journal.exists():
        try:
            generation = json.loads(journal.read_text("utf-8"))
            old = generation["settings"]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{journal} is not of accvideo generate; give another --out") from None
        changed = [name for name in settings if old.get(name) != settings[name]]
        if changed:
            name = next((name for name in changed if name != "identity"), "identity")
            raise UserError(
                f"{out} holds videos of other settings: {name} {shorten(old.get(name))} -> {shorten(settings[name])}\n"
                "Give another --out, or delete it"
            )
        return generation
    if out.is_dir() and (others := sorted(each.name for each in out.iterdir() if not each.name.startswith("."))):
        raise UserError(f"{out} holds something else ({others[0]}); give a new or empty folder as --out")
    if any(path.exists() for path in files):
        raise UserError(f"{out} exists; give another --out, or delete it")
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {journal.parent}: {error.strerror}; give another --out") from error
    versions = {name: version(name) for name in ("accvideo", "torch", "diffusers")}
    return {"settings": settings, "versions": versions, "videos": []}


def read_image(path: Path) -> Image.Image:
    """An image file in RGB.

    Raises:
        UserError: It is none.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"cannot read the image {path}: {error}") from error


def peak_memory(device: str) -> int:
    """Most bytes used so far: on the accelerator if there is one, else resident in memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
