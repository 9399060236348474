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
from typing import Any

import numpy as np
import torch
from PIL import Image

from accvideo.command import (
    Prompt,
    choose_device,
    parse_pipeline_args,
    progress_bar,
    read_prompt_file,
    shorten,
    with_image,
)
from accvideo.inference.acceleration import joined_processes, share_tokens
from accvideo.inference.config import GenerateConfig, names_file
from accvideo.inference.model import Model, check_student, digest, load_model, with_arguments
from accvideo.media import load_media
from accvideo.metrics import Clips
from accvideo.recording.setup import set_shift
from accvideo.teacher import batch_arguments, denoisers, guidance_arguments, watch
from accvideo.trajectory import write_whole
from accvideo.types import Latents, UserError
from accvideo.video import viewing_scale, write_video

OUT_OF_MEMORY = (
    "the accelerator's memory is full\nTry --offload model, then --offload group; --vae-tiling; --dtype bfloat16; "
    "--quantization int8; a smaller --batch-size, or fewer frames"
)


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
    run: Any = model.pipeline
    guidance_scale = model.guidance_scale if guidance_scale is None else guidance_scale
    arguments = load_media(model.arguments)
    if guidance_scale is not None:
        arguments |= guidance_arguments(model.pipeline, guidance_scale)
    for start in range(0, len(prompts), batch_size):
        items = list(indices[start : start + batch_size])
        with watch(model.pipeline, keep=(), on_step=on_step) as seen, stopwatch(model.pipeline) as marks:
            try:
                output = run(
                    **batch_arguments(prompts[start : start + batch_size], seed, items),
                    num_inference_steps=num_steps or model.num_steps,
                    output_type="np",
                    **arguments,
                )
            except torch.OutOfMemoryError as error:
                raise UserError(OUT_OF_MEMORY) from error
            except (ValueError, TypeError, RuntimeError) as error:
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
        if device.type == "cuda":
            torch.cuda.synchronize(device)
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
    # The pipeline knows where it computes, also where weights are elsewhere; but it takes milliseconds to find out.
    device = pipeline._execution_device if torch.cuda.is_initialized() else torch.device("cpu")
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
    prompts = [Prompt(config.prompt)] if config.prompt is not None else read_prompt_file(config.prompts or Path())
    prompts = [prompt for prompt in with_image(prompts, config.image) for _ in range(config.num_videos)]
    described = [describe_prompt(prompt) for prompt in prompts]
    files, journal = output_files(config, len(prompts))
    with joined_processes(config.context_parallel) as writes:
        model = prepare_model(config)
        for block in batches(len(prompts), config.batch_size):
            with_prompts(model, [prompts[index] for index in block])  # refuses here what it cannot do
        generation = open_journal(config.out, journal, files, generation_settings(config, model, described))
        num_generated = generate_missing(config, model, prompts, files, journal, generation, writes)
    return {"out": str(config.out), "num_generated": num_generated, **generation}


def prepare_model(config: GenerateConfig) -> Model:
    """The model with the arguments of the command line.

    Raises:
        UserError: It does not take one of them.
    """
    model = load_model(config.model, getattr(torch, config.dtype), choose_device(config.device), config.acceleration)
    check_student(model, config.num_steps, config.guidance_scale)
    if config.shift is not None:
        if model.student is not None:
            raise UserError(f"{model.name} is a student: its noise levels came with its weights\nLeave --shift out")
        set_shift(model.pipeline, config.shift)
    if config.context_parallel != "none":
        share_tokens(model.pipeline, config.context_parallel)
    sizes = {name: getattr(config, name) for name in ("height", "width", "num_frames")}
    given = {name: size for name, size in sizes.items() if size is not None}
    return with_arguments(model, {**parse_pipeline_args(config.pipeline_arg), **given})


def with_prompts(model: Model, prompts: Sequence[Prompt]) -> Model:
    """The model with the arguments that these prompts, one batch, have besides their text.

    Raises:
        UserError: The pipeline does not take one of them, a file is missing, or the prompts differ in them.
    """
    first = prompts[0]
    for prompt in prompts:
        if prompt.arguments != first.arguments:
            name = next(iter(prompt.arguments | first.arguments))
            raise UserError(
                f"the prompts have an argument {name} each, and {type(model.pipeline).__name__} takes one a batch\n"
                "Leave --batch-size out"
            )
    return with_arguments(model, load_media(first.arguments, first.folder))


def describe_prompt(prompt: Prompt) -> str | dict[str, Any]:
    """A prompt as JSON: its text, or an object with its other columns and a hash of the images that they name."""
    if not prompt.arguments:
        return prompt.text

    def pixels(value: Any) -> Iterator[bytes]:
        if isinstance(value, Image.Image):
            yield value.tobytes()
        elif isinstance(value, list):
            for each in value:
                yield from pixels(each)

    media = list(load_media(prompt.arguments, prompt.folder).values())
    return {"prompt": prompt.text, **prompt.arguments, "pixels": digest(*pixels(media))}


def generation_settings(
    config: GenerateConfig, model: Model, prompts: Sequence[str | dict[str, Any]]
) -> dict[str, Any]:
    """All that the videos depend on; prompts as `describe_prompt` gives them."""
    acceleration = asdict(config.acceleration)
    return {
        "model": config.model,
        "identity": model.identity,
        "prompts": prompts,
        "seed": config.seed,
        "num_steps": config.num_steps or model.num_steps,
        "guidance_scale": model.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        "shift": config.shift,
        "arguments": model.arguments,
        "fps": config.fps or model.fps,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        **{name: acceleration[name] for name in ("compile", "attention_backend", "quantization", "vae_tiling")},
    }


def generate_missing(
    config: GenerateConfig,
    model: Model,
    prompts: Sequence[Prompt],
    files: Sequence[Path],
    journal: Path,
    generation: dict[str, Any],
    writes: bool,
) -> int:
    """Generate the videos that are not there yet, writing each batch and the journal; returns how many.

    Args:
        config: The command line's.
        model: With the command line's arguments.
        prompts: One a video.
        files: One a video.
        journal: Where the journal goes.
        generation: The journal; changed in place.
        writes: Whether this process writes files; False for all but the first of several.
    """
    settings = generation["settings"]
    done = {video["file"] for video in generation["videos"] if journal.with_name(video["file"]).exists()}
    blocks = batches(len(prompts), config.batch_size)
    blocks = [block for block in blocks if any(files[index].name not in done for index in block)]
    with progress_bar() as progress:
        bar = progress.add_task("denoising steps", total=len(blocks) * settings["num_steps"])
        for block in blocks:
            [batch] = sample_clips(
                with_prompts(model, [prompts[index] for index in block]),
                [prompts[index].text for index in block],
                block,
                config.seed,
                config.num_steps,
                config.guidance_scale,
                len(block),
                on_step=lambda _: progress.advance(bar),
            )
            seconds = {name: value / len(block) for name, value in asdict(batch.seconds).items()}
            seconds["total"] = batch.seconds.total / len(block)
            made = [
                {"file": files[index].name, "index": index, "prompt": prompts[index].text, "seconds": seconds}
                for index in block
            ]
            kept = [video for video in generation["videos"] if video["index"] not in block]
            generation["videos"] = sorted(kept + made, key=lambda video: video["index"])
            generation |= {
                "sigmas": batch.sigmas,
                "denoiser_calls": batch.denoiser_calls,
                "peak_memory_bytes": peak_memory(choose_device(config.device)),
            }
            if writes:
                for index, frames in zip(block, batch.frames, strict=True):
                    write_video(files[index], frames, settings["fps"], viewing_scale(*frames.shape[1:3]))
                write_whole(journal, json.dumps(generation, indent=2).encode() + b"\n")
    return sum(map(len, blocks))


def batches(num_items: int, batch_size: int) -> list[range]:
    """Numbers of the items of each batch; the last may be smaller."""
    return [range(start, min(start + batch_size, num_items)) for start in range(0, num_items, batch_size)]


def output_files(config: GenerateConfig, num_videos: int) -> tuple[list[Path], Path]:
    """Where each video goes, and the JSON file that says how they were made.

    Raises:
        UserError: Several videos for one file.
    """
    if not names_file(config.out):
        return [config.out / f"{index:06d}.mp4" for index in range(num_videos)], config.out / "generation.json"
    if num_videos > 1:
        raise UserError(f"{config.out} is one file for {num_videos} videos; give a folder as --out")
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


def peak_memory(device: str) -> int:
    """Most bytes used so far: on the accelerator if there is one, else resident in memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
