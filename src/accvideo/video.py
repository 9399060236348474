"""Write clips as mp4, animated WebP or animated GIF."""

import os
from fractions import Fraction
from pathlib import Path

import av
import av.video.reformatter
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from accvideo.types import UserError

Frames = UInt8[Tensor, "frames height width 3"]
"""One clip, RGB."""

SUFFIXES = (".mp4", ".webp", ".gif")

VIEWING_SIZE = 256
"""Shorter side in pixels that tiny clips are enlarged to, so that they can be looked at."""


def check_suffix(path: Path) -> None:
    """Refuse a file name that says no known format.

    Raises:
        UserError: The suffix is none of `SUFFIXES`.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot write {path.name}: a clip's name ends in one of {', '.join(SUFFIXES)}")


def viewing_scale(height: int, width: int) -> int:
    """Whole factor by which a clip is enlarged for looking at it: 1 unless its shorter side is tiny."""
    return max(1, VIEWING_SIZE // min(height, width))


def write_video(path: Path, frames: Frames, fps: int | float, scale: int = 1) -> None:
    """Write a clip in the format that the file's suffix names, enlarged `scale` times by repeating pixels.

    It is written under another name and then renamed, so that no half-written file is ever seen.

    Raises:
        UserError: The suffix is none of `SUFFIXES`.
    """
    check_suffix(path)
    suffix = path.suffix.lower()
    images = frames.repeat_interleave(scale, 1).repeat_interleave(scale, 2).cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{suffix}")
    try:
        if suffix == ".mp4":
            _write_mp4(partial, images, fps)
        else:
            _write_animation(partial, images, fps)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_mp4(path: Path, images: np.ndarray, fps: int | float) -> None:
    num_frames, height, width, _ = images.shape
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "12"})
        stream.pix_fmt = "yuv420p"
        # 4:2:0 needs even sides; an odd last row or column is dropped.
        stream.height, stream.width = height - height % 2, width - width % 2
        # Players guess the color matrix from the size unless it is said.
        stream.codec_context.color_range = av.video.reformatter.ColorRange.MPEG
        stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU709
        for image in images[:, : stream.height, : stream.width]:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_animation(path: Path, images: np.ndarray, fps: int | float) -> None:
    first, *others = [Image.fromarray(image) for image in images]
    first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0, quality=90)
