"""Images and videos that a pipeline is called with: read where an argument names a file."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
from PIL import Image

from accvideo.types import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".gif", ".webp")


def read_image(path: Path) -> Image.Image:
    """An image file in RGB.

    Raises:
        UserError: It is none.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # of many kinds: Pillow's readers do not foresee every damage
        raise UserError(f"cannot read the image {path}: {error}") from error


def read_video(path: Path) -> list[Image.Image]:
    """The frames of a video file in RGB.

    Raises:
        UserError: It is none.
    """
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
    except (OSError, IndexError, ValueError, av.FFmpegError) as error:  # ValueError: tags that are no UTF-8
        raise UserError(f"cannot read the video {path}: {error}") from error
    if not frames:
        raise UserError(f"the video {path} has no frames")
    return frames


def load_media(arguments: Mapping[str, Any], folder: Path = Path()) -> dict[str, Any]:
    """The arguments with images (one each) and videos (a list of frames each) in place of the files they name.

    Args:
        arguments: JSON values of a pipeline's call; lists of file names are read too, prompts are not.
        folder: what relative names are relative to.

    Raises:
        UserError: a file cannot be read.
    """

    def load(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [load(name, each) for each in value]
        if (kind := medium(name, value)) is None:
            return value
        return read_image(folder / value) if kind == "image" else read_video(folder / value)

    return {name: load(name, value) for name, value in arguments.items()}


def check_media(arguments: Mapping[str, Any], folder: Path = Path()) -> None:
    """Checks that the files that `load_media` would read are there.

    Raises:
        UserError: one is not.
    """
    for name, value in arguments.items():
        for each in value if isinstance(value, list) else [value]:
            if (kind := medium(name, each)) is not None and not is_file(folder / each):
                raise UserError(f"cannot read the {kind} {folder / each}: there is no such file")


def is_file(path: Path) -> bool:
    """Whether there is such a file; there is none of a name that is too long for one."""
    try:
        return path.is_file()
    except OSError:
        return False


def media_digests(arguments: Mapping[str, Any], folder: Path = Path()) -> dict[str, Any]:
    """SHA-256 of each file that `load_media` would read, by argument; a list of them where the argument is one.

    Raises:
        UserError: a file cannot be read.
    """

    def digest(name: str, value: Any) -> Any:
        if isinstance(value, list):
            digests = [digest(name, each) for each in value]
            return digests if any(digests) else None
        if (kind := medium(name, value)) is None:
            return None
        try:
            with (folder / value).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"cannot read the {kind} {folder / value}: {error.strerror}") from error

    digests = {name: digest(name, value) for name, value in arguments.items()}
    return {name: each for name, each in digests.items() if each}


def medium(name: str, value: Any) -> str | None:
    """Says "image" or "video" where an argument's value is the name of such a file.

    Its ending tells, but what is called an image always is one; prompts are text.
    """
    if not isinstance(value, str) or "prompt" in name:
        return None
    suffix = Path(value).suffix.lower()
    if suffix in IMAGE_SUFFIXES or name.endswith("image"):
        return "image"
    return "video" if suffix in VIDEO_SUFFIXES else None
