"""The teacher's own videos, from the latents of a data set: to look at, or to score, what a student will learn from."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from accvideo.command import choose_device, progress_bar, shorten
from accvideo.data.dataset import ahead, open_source
from accvideo.data.manifest import Manifest
from accvideo.flow import euler_step
from accvideo.generate import OUT_OF_MEMORY, batches
from accvideo.inference.config import PLAIN, Acceleration, DecodeConfig
from accvideo.inference.model import SCHEDULE_ARGUMENTS, Model, load_model
from accvideo.inference.student_config import unguided
from accvideo.media import load_media, media_digests
from accvideo.metrics import Clips
from accvideo.teacher import batch_arguments, denoisers, fingerprint, guidance_arguments, watch
from accvideo.trajectory import Trajectory, write_whole
from accvideo.types import Latents, UserError
from accvideo.video import viewing_scale, write_video

JOURNAL = "decoded.json"


def decode(config: DecodeConfig) -> dict[str, Any]:
    """Write the videos that are not there yet, and return a summary.

    Raises:
        UserError: whatever the user can mend.
    """
    source = open_source(config.data)
    manifest = source.manifest
    num_videos = min(config.num_videos or manifest.num_trajectories, manifest.num_trajectories)
    claim(config.out, manifest)
    missing = [number for number in range(num_videos) if not video_file(config.out, number).exists()]
    if missing:
        acceleration = Acceleration(offload=config.offload, vae_tiling=config.vae_tiling)
        teacher = load_recorded_teacher(manifest, choose_device(config.device), acceleration)
        blocks = [[missing[place] for place in block] for block in batches(len(missing), config.batch_size)]
        with progress_bar() as progress:
            bar = progress.add_task("decoding", total=len(missing))
            for trajectories in ahead(lambda block: [source.read(number) for number in block], blocks, 1):
                clips = recorded_clips(teacher, trajectories, config.media_folder)
                for trajectory, frames in zip(trajectories, clips, strict=True):
                    path = video_file(config.out, trajectory.index)
                    write_whole(path.with_suffix(".txt"), f"{trajectory.prompt}\n".encode())
                    write_video(path, frames, manifest.fps, viewing_scale(*frames.shape[1:3]))
                progress.advance(bar, len(trajectories))
    return {"folder": str(config.out), "num_videos": num_videos, "num_decoded": len(missing)}


def video_file(folder: Path, number: int) -> Path:
    """Where the video of a trajectory goes."""
    return folder / f"{number:06d}.mp4"


def claim(folder: Path, manifest: Manifest) -> None:
    """Make a folder that of the videos of a data set, or see that it is.

    Raises:
        UserError: it holds something else.
    """
    own = {"teacher": manifest.teacher, "manifest": hashlib.sha256(manifest.to_json().encode()).hexdigest()}
    path, text = folder / JOURNAL, json.dumps(own, indent=1) + "\n"
    if path.exists():
        if path.read_bytes() != text.encode():
            raise UserError(f"{folder} holds the videos of another data set; give another --out")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and holds no decoded videos; give a new or empty folder as --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; give another --out") from error
    write_whole(path, text.encode())


def load_recorded_teacher(
    manifest: Manifest, device: str, acceleration: Acceleration = PLAIN, guided: bool = False
) -> Model:
    """The teacher of a data set, with the arguments of its recording; guidance off, unless it is to be as recorded.

    Raises:
        UserError: it cannot be loaded, or is another one now.
    """
    teacher = load_model(
        manifest.teacher, getattr(torch, manifest.dtype), device, acceleration, revision=manifest.revision
    )
    found = {name: fingerprint(denoiser) for name, denoiser in denoisers(teacher.pipeline).items()}
    if found != manifest.fingerprints:
        raise UserError(f"the data set was recorded with another teacher than {manifest.teacher} is now")
    sizes = {name: getattr(manifest, name) for name in ("height", "width", "num_frames")}
    guidance_scale, arguments = (manifest.guidance_scale, manifest.pipeline_args) if guided else unguided(manifest)
    arguments = {name: value for name, value in arguments.items() if name not in SCHEDULE_ARGUMENTS}
    if guidance_scale is not None:
        arguments |= guidance_arguments(teacher.pipeline, guidance_scale)
    return replace(teacher, arguments=arguments | {name: size for name, size in sizes.items() if size is not None})


def recorded_clips(teacher: Model, trajectories: Sequence[Trajectory], media_folder: Path = Path()) -> Clips:
    """The videos that trajectories lead to, decoded by their teacher's pipeline.

    Args:
        teacher: as `load_recorded_teacher` has it.
        trajectories: of its data set.
        media_folder: what the names of images and videos in their arguments are relative to.

    Raises:
        UserError: an image or video is not the one recorded with, or the pipeline refuses its arguments.
    """
    first, run = trajectories[0], cast(Any, teacher.pipeline)
    for trajectory in trajectories:
        if trajectory.arguments != first.arguments:
            raise UserError(
                f"the prompts have a {next(iter(trajectory.arguments | first.arguments))} each, and "
                f"{type(run).__name__} takes one a batch\nLeave --batch-size out"
            )
        check_media(trajectory, teacher.arguments, media_folder)
    num_steps = len(first.calls)  # some schedulers make no grid of one step
    recorded = torch.stack([trajectory.states[-1] for trajectory in trajectories])

    def arrive(state: Latents, velocity: Latents, sigma: float, next_sigma: float) -> tuple[Latents, Latents]:
        latents = euler_step(state, velocity, sigma, next_sigma)  # of given frames, if there are any
        latents[seen.part] = recorded.to(latents)
        return state, latents

    arguments: Any = {
        **batch_arguments([each.prompt for each in trajectories], first.seed, [each.index for each in trajectories]),
        **load_media(teacher.arguments),
        **load_media(first.arguments, media_folder),
    }
    with watch(run, keep=(), solve=arrive) as seen:
        try:
            frames = run(**arguments, num_inference_steps=min(2, num_steps), output_type="np").frames
        except torch.OutOfMemoryError as error:
            raise UserError(OUT_OF_MEMORY) from error
    return torch.from_numpy((np.asarray(frames) * 255).round().astype(np.uint8))


def check_media(trajectory: Trajectory, arguments: Mapping[str, Any], folder: Path) -> None:
    """Checks that the images and videos of a trajectory are those that it was recorded with.

    Args:
        trajectory: whose they are.
        arguments: of all trajectories' calls; names of files in them are relative to the working folder.
        folder: what the names of files in the trajectory's own arguments are relative to.

    Raises:
        UserError: they are missing, or others.
    """
    try:
        found = media_digests(arguments) | media_digests(trajectory.arguments, folder)
    except UserError as error:
        raise UserError(f"{error}\nGive the folder of the file of prompts as --media-folder") from error
    if changed := [name for name, digest in trajectory.media.items() if found.get(name) != digest]:
        raise UserError(
            f"the {changed[0]} of trajectory {trajectory.index} ({shorten(trajectory.arguments.get(changed[0]))}) is "
            "not the one that it was recorded with\nGive the folder of the file of prompts as --media-folder"
        )
