"""Captions of videos by a vision-language model, as AccVideo's own prompts were (arXiv:2503.19462, section 4.1)."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from accvideo.command import choose_device, progress_bar
from accvideo.data.schema import parse
from accvideo.media import VIDEO_SUFFIXES
from accvideo.types import UserError


@dataclass(frozen=True)
class CaptionConfig:
    """What a caption depends on beside the video."""

    model: str
    """Folder or hub id of an image- or video-text-to-text model of transformers, with a chat template."""
    instruction: str
    num_frames: int
    max_new_tokens: int


@dataclass(frozen=True)
class Caption:
    """A line of a file of captions."""

    of: dict[str, Any]
    """What the caption depends on: `sha256` of the video's file, and the fields of `CaptionConfig`."""
    caption: str
    video: str = ""
    """Its name when it was captioned; nothing depends on it."""


@dataclass(frozen=True)
class Glimpse:
    """Some frames of a video."""

    frames: np.ndarray
    """RGB, uint8 (num_frames, height, width, 3)."""
    numbers: list[int]
    """Which frames of the video these are, from 0."""
    total: int
    """Frames of the whole video."""
    fps: float | None
    """Its frames a second; None: the file does not say."""


def caption_folder(
    folder: Path, config: CaptionConfig, record: Path, device: str, skip_bad: bool
) -> tuple[dict[str, str], list[str]]:
    """Caption every video below a folder.

    Args:
        folder: of the videos.
        config: the settings.
        record: file of captions made so far, by these or other settings; each new one is added to it at once, so that
            the same call goes on where a killed one stopped.
        device: torch device of the model, or "auto".
        skip_bad: leave out videos that cannot be read.

    Returns:
        Captions by the video's name in the folder, in order of the names; and what is wrong with the videos left out.

    Raises:
        UserError: there are no videos, one cannot be read, or the model cannot be loaded.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"{folder} holds no videos; their names end in one of {', '.join(VIDEO_SUFFIXES)}")
    known = {json.dumps(line.of): line.caption for line in read_captions(record)}
    keys: dict[Path, str] = {}
    waiting, bad = [], []
    for path in paths:
        try:
            keys[path] = json.dumps({"sha256": file_digest(path), **asdict(config)})
            if keys[path] not in known:
                waiting.append((path, count_frames(path)))
        except UserError as error:
            bad.append(str(error))
    if bad and not skip_bad:
        raise UserError(f"{bad[0]}\nMend or remove it, or leave such videos out with --skip-bad")
    if waiting:
        captioner = Captioner(config, choose_device(device))
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open("a", encoding="utf-8") as file, progress_bar() as progress:
            task = progress.add_task("caption", total=len(paths), completed=len(paths) - len(waiting))
            for path, total in waiting:
                try:
                    glimpse = spread_frames(path, total, config.num_frames)
                except UserError as error:  # damaged further on
                    if not skip_bad:
                        raise
                    bad.append(str(error))
                    continue
                known[keys[path]] = captioner(glimpse)
                line = Caption(json.loads(keys[path]), known[keys[path]], path.relative_to(folder).as_posix())
                file.write(json.dumps(asdict(line)) + "\n")
                file.flush()
                progress.advance(task)
    return {path.relative_to(folder).as_posix(): known[key] for path, key in keys.items() if key in known}, bad


def file_digest(path: Path) -> str:
    """SHA-256 of a video's bytes, by which its caption is known.

    A name, a size and a date can stay when another video takes the place, and change when the same one is copied. To
    hash a new video costs no more than to count its frames, which reads it whole too; a known one is read once for
    every run, which takes far less than its caption took.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the video {path}: {error.strerror}") from error


def read_captions(record: Path) -> list[Caption]:
    """The lines of a file of captions; one that was cut short is removed from it.

    Raises:
        UserError: it is something else, or of a version that knew videos by their names and sizes.
    """
    if not record.exists():
        return []
    try:
        whole, newline, rest = record.read_text("utf-8").rpartition("\n")
        lines = [parse(Caption, line) for line in whole.split("\n") if line]
    except ValueError as error:
        raise UserError(f"{record} is no file of captions that accvideo made; move it away") from error
    if any("sha256" not in line.of for line in lines):
        raise UserError(
            f"{record} is of an earlier version, which knew videos by name and size: a replaced one kept its caption\n"
            "Move it away; the videos are then captioned anew"
        )
    if rest:
        record.write_text(whole + newline, "utf-8")
    return lines


class Captioner:
    """A vision-language model with its processor.

    Frames go in as one video, with their times, where the processor and the chat template know videos, else as so many
    images, in order. An image costs far more tokens than a frame of a video in models that cut images into tiles.

    Args:
        config: the settings.
        device: torch device.

    Raises:
        UserError: the model cannot be loaded, or cannot chat.
    """

    def __init__(self, config: CaptionConfig, device: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        try:
            # No code of the model's own, said explicitly, or transformers asks on the terminal.
            self.processor: Any = AutoProcessor.from_pretrained(config.model, trust_remote_code=False)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                config.model, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"cannot load {config.model}: {reason}\n"
                "Give a folder or hub id of an image-text-to-text or video-text-to-text model of transformers"
            ) from error
        if getattr(self.processor, "chat_template", None) is None:
            raise UserError(f"{config.model} has no chat template, so it takes no instruction; give another --model")
        self.model = model.to(device).eval()
        self.config = config
        self.knows_videos = self.places_videos()

    def places_videos(self) -> bool:
        """Whether the processor takes videos and the chat template has a place for one."""
        token = getattr(self.processor, "video_token", None)
        if getattr(self.processor, "video_processor", None) is None or token is None:
            return False
        chat = [{"role": "user", "content": [{"type": "video"}]}]
        return str(token) in self.processor.apply_chat_template(chat, tokenize=False)

    @torch.inference_mode()
    def __call__(self, glimpse: Glimpse) -> str:
        """The caption of a video by the likeliest words."""
        content: list[dict[str, Any]] = [{"type": "image", "image": frame} for frame in glimpse.frames]
        settings: dict[str, Any] = {}
        if self.knows_videos:
            content = [{"type": "video", "video": glimpse.frames}]
            seen = {"total_num_frames": glimpse.total, "fps": glimpse.fps, "frames_indices": glimpse.numbers}
            settings = {"do_sample_frames": False, "video_metadata": [seen]}
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": self.config.instruction}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=settings,
        ).to(self.model.device, dtype=self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=self.config.max_new_tokens, do_sample=False)
        return self.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def count_frames(path: Path) -> int:
    """Number of frames of a video, by its packets: nothing is decoded but the first frame.

    Raises:
        UserError: it cannot be read, or has none.
    """
    try:
        with av.open(str(path)) as container:
            next(container.decode(video=0))
        with av.open(str(path)) as container:
            return sum(packet.size > 0 for packet in container.demux(video=0))
    except (OSError, IndexError, ValueError, StopIteration, av.FFmpegError) as error:
        raise UserError(f"cannot read the video {path}: {str(error) or 'no frames'}") from error


def spread_frames(path: Path, total: int, num_frames: int) -> Glimpse:
    """Frames of a video of `total` frames: the middles of `num_frames` parts of equal length; all, if so few.

    Raises:
        UserError: it cannot be read.
    """
    wanted = sorted({int((i + 0.5) * total / num_frames) for i in range(num_frames)})
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            fps = None if stream.average_rate is None else float(stream.average_rate)
            decoded = enumerate(container.decode(stream))
            found = {i: frame.to_ndarray(format="rgb24") for i, frame in decoded if i in wanted}
        if not found:
            raise UserError(f"cannot read the video {path}: it has fewer frames than it says")
        if len({frame.shape for frame in found.values()}) > 1:
            raise UserError(f"cannot read the video {path}: its frames differ in size")
        return Glimpse(np.stack(list(found.values())), list(found), total, fps)
    except (OSError, IndexError, ValueError, av.FFmpegError) as error:
        raise UserError(f"cannot read the video {path}: {error}") from error
