"""VBench's videos: made batch by batch into one folder, by as many workers as share it.

In the folder of the videos nothing else ever lies: VBench takes the first file that it finds there for their kind. Each
is written beside it and moved when it is whole. Batches are claimed as in a recording.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from accvideo.command import shorten
from accvideo.generate import ClipBatch, batches, describe_prompt, sample_clips, with_prompts
from accvideo.inference.config import Acceleration
from accvideo.inference.model import Model, digest
from accvideo.recording.workers import OWNER, BackgroundWriter, Claims, Place, is_gone
from accvideo.trajectory import write_whole
from accvideo.types import UserError
from accvideo.vbench.suite import Suite, Video
from accvideo.video import write_video

SETTINGS = "settings.json"
"""What the videos were made with."""


@dataclass(frozen=True)
class Making:
    """How a model's videos are made."""

    num_steps: int | None
    """Of a teacher; None: the model's own."""
    seed: int
    batch_size: int
    dtype: str
    acceleration: Acceleration


def video_settings(model: Model, suite: Suite, making: Making) -> dict[str, Any]:
    """All that the videos depend on, but for how many there are of one prompt."""
    acceleration = asdict(making.acceleration)
    return {
        "identity": model.identity,
        "prompts": digest(json.dumps([describe_prompt(prompt) for prompt in suite.prompts]).encode()),
        "names": digest(*dict.fromkeys(video.name.rpartition("-")[0].encode() for video in suite.videos)),
        "seed": making.seed,
        "num_steps": making.num_steps or model.num_steps,
        "guidance_scale": model.guidance_scale,
        "arguments": model.arguments,
        "size": size(model),
        "fps": model.fps,
        "batch_size": making.batch_size,
        "dtype": making.dtype,
        **{name: acceleration[name] for name in ("compile", "attention_backend", "quantization", "vae_tiling")},
    }


def size(model: Model) -> str | None:
    """Height, width and frames of the videos as in the published tables; None where the pipeline chooses them."""
    sides = [model.arguments.get(name) for name in ("height", "width", "num_frames")]
    return None if None in sides else "×".join(map(str, sides))


def read_settings(folder: Path) -> dict[str, Any]:
    """What the videos of a folder were made with.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / SETTINGS
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged; delete {folder}, or put back what was in the file") from error


def check_prompts(model: Model, suite: Suite, batch_size: int) -> None:
    """Refuse, before anything is made, what the model's pipeline does not take.

    Raises:
        UserError: see `with_prompts`.
    """
    for block in batches(len(suite.videos), batch_size):
        with_prompts(model, [suite.videos[number].prompt for number in block])


def make_videos(
    name: str, model: Model, suite: Suite, making: Making, folder: Path, place: Place, progress: Progress
) -> int:
    """Make the videos that are not there and that no other worker is making; returns how many there are then.

    Args:
        name: what the bar is called.
        model: teacher or student.
        suite: the videos.
        making: how they are made.
        folder: for this model; the videos go to `videos` in it.
        place: which worker this is.
        progress: where to show a bar.

    Raises:
        UserError: the folder holds videos that were made otherwise, or cannot be written.
    """
    settings = video_settings(model, suite, making)
    try:
        (folder / "videos").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; give another --out") from error
    writer, claims = BackgroundWriter(), Claims(folder, digest(json.dumps(settings, sort_keys=True).encode()))
    try:
        join_folder(folder, settings, claims)
        sweep(folder, claims)
        blocks = batches(len(suite.videos), making.batch_size)
        first = place.rank * len(blocks) // place.num_workers
        bar = progress.add_task(f"VBench, {name}", total=len(blocks))
        for block in [*blocks[first:], *blocks[:first]]:
            claim, videos = f"batch-{block.start}", [suite.videos[number] for number in block]
            if missing(folder, videos) and claims.take(claim):
                if missing(folder, videos):  # no other worker has made them since
                    clips = sample_videos(model, videos, making)
                    writer.put(partial(write_videos, folder, claims, claim, videos, clips, model.fps))
                else:
                    claims.release(claim)
            progress.advance(bar)
    finally:
        try:
            writer.close()
        finally:
            claims.close()
    return len(suite.videos) - len(missing(folder, suite.videos))


def join_folder(folder: Path, settings: dict[str, Any], claims: Claims) -> None:
    """Begin a folder of videos, or go on with one of the same settings.

    Raises:
        UserError: its videos were made with others.
    """
    path = folder / SETTINGS
    with claims.alone("settings"):
        if not path.exists():
            write_whole(path, json.dumps(settings, indent=2).encode() + b"\n", claims.writer)
            return
    old = read_settings(folder)
    if changed := [name for name in settings if old.get(name) != settings[name]]:
        name = changed[-1]  # the identity, first, says least
        raise UserError(
            f"{folder} holds videos of other settings: {name} {shorten(old.get(name))} -> {shorten(settings[name])}\n"
            "Give another --out, or delete it"
        )


def sweep(folder: Path, claims: Claims) -> None:
    """Remove what workers that died have left: claims, and videos that they had not finished."""
    claims.sweep()
    for path in folder.glob("*.mp4"):
        if (owner := OWNER.search(path.name)) and is_gone(owner[0]):
            path.unlink(missing_ok=True)


def missing(folder: Path, videos: Sequence[Video]) -> list[Video]:
    """Those of the videos that are not there."""
    return [video for video in videos if not (folder / "videos" / video.name).exists()]


def sample_videos(model: Model, videos: Sequence[Video], making: Making) -> ClipBatch:
    """The clips of one batch."""
    prompts, items = [video.prompt for video in videos], [video.item for video in videos]
    texts = [prompt.text for prompt in prompts]
    [clips] = sample_clips(
        with_prompts(model, prompts), texts, items, making.seed, making.num_steps, batch_size=len(videos)
    )
    return clips


def write_videos(
    folder: Path, claims: Claims, claim: str, videos: Sequence[Video], clips: ClipBatch, fps: int | float
) -> None:
    """Write the videos of a batch, then give its claim back.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    for video, frames in zip(videos, clips.frames, strict=True):
        unfinished = folder / f"{video.item}{claims.writer}.mp4"
        try:
            write_video(unfinished, frames, fps)
            os.replace(unfinished, folder / "videos" / video.name)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise UserError(
                f"cannot write to {folder}: {error.strerror}\nThe same command goes on from here"
            ) from error
    claims.release(claim)
