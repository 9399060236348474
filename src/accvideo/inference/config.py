"""Settings of generation and decoding, and of how a model runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from accvideo.types import UserError
from accvideo.video import check_suffix

Dtype = Literal["float32", "bfloat16", "float16"]

Quantization = Literal["int8", "float8", "nf4"]
"""Type of the denoisers' linear weights: int8 or float8 (1 byte each, torchao), nf4 (half a byte, bitsandbytes)."""

Offload = Literal["none", "model", "group"]

ContextParallel = Literal["none", "ulysses", "ring"]


@dataclass(frozen=True, kw_only=True)
class Acceleration:
    """How a model runs; what it makes stays the same but for rounding."""

    compile: bool = False
    """Compile the denoiser's blocks by torch.compile: the first video waits for it, all are faster."""
    attention_backend: str | None = None
    """Who computes attention, by diffusers' name: native, flash, _flash_3_hub, sage, xformers and others."""
    quantization: Quantization | None = None
    """Of the denoiser's linear weights: int8 or float8 (one byte each, torchao), nf4 (half a byte, bitsandbytes)."""
    offload: Offload = "none"
    """Keep weights in main memory until they are needed: `model` moves whole networks to the accelerator, which costs
    little time; `group` moves single layers ahead of their use, which takes the least memory."""
    vae_tiling: bool = False
    """Decode in overlapping tiles: less memory for large frames."""
    vae_slicing: bool = False
    """Decode the videos of a batch one by one: less memory."""


PLAIN = Acceleration()


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Makes videos with a teacher or a student."""

    model: Positional[str]
    """`playground`, `playground-student`, `playground-student-2`, a folder of a teacher or a student, or a hub id."""
    out: Path
    """A file (.mp4, .webp or .gif) or a folder for numbered mp4 files; an interrupted generation in it goes on."""
    prompt: str | None = None
    """What to show; or give `prompts`."""
    prompts: Path | None = None
    """Text file, one prompt a line; or .csv or .jsonl with a column `prompt` and others (`image`, `video`) that are
    arguments of the pipeline's call; file names in it are relative to its folder. `out` is a folder then."""
    image: Path | None = None
    """First frame, for image-to-video pipelines; a column `image` of the prompts has one for each."""
    num_videos: int = 1
    """Of each prompt, from different noise; `out` is a folder if there is more than one."""
    seed: int = 0
    """With a video's number, it makes the video's noise."""
    num_steps: int | None = None
    """Denoising steps of a teacher, 50 by default; a student has its own."""
    guidance_scale: float | None = None
    """Of a teacher; the pipeline's own by default. A student has it distilled in."""
    shift: float | None = None
    """Of a teacher's noise levels, as for `record`; its folder's own by default. A student has its own levels."""
    height: int | None = None
    """In pixels; the model's own by default."""
    width: int | None = None
    """In pixels; the model's own by default."""
    num_frames: int | None = None
    """The model's own by default."""
    fps: float | None = None
    """Frames a second of the file; the model's own by default."""
    pipeline_arg: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=JSON: any other argument of the pipeline's call; may be repeated. The name of an image or video file is
    replaced by what is in it."""
    batch_size: int = 1
    """Videos denoised together."""
    dtype: Dtype = "float32"
    """Of the pipeline."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one."""
    acceleration: Annotated[Acceleration, tyro.conf.arg(name="")] = PLAIN
    """Speed and memory."""
    context_parallel: ContextParallel = "none"
    """Share the tokens of each video between the accelerators of `torchrun --nproc-per-node NUM --local-ranks-filter 0
    --no-python accvideo generate ...`; `ulysses` exchanges attention heads, `ring` keys and values."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            raise UserError("give either --prompt TEXT or --prompts FILE")
        if names_file(self.out):
            check_suffix(self.out)
        for name in ("num_videos", "batch_size", "num_steps", "height", "width", "num_frames"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")


def names_file(out: Path) -> bool:
    """Whether a path is meant as a file: it ends in letters after a dot (`run-1.5` is a folder)."""
    return out.suffix[1:].isalnum() and not out.suffix[1:].isdigit() and not out.is_dir()


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Writes the teacher's videos that a data set's trajectories lead to, each beside a text file with its prompt.

    Look at them, or score them with a tool of your choice, and give the numbers of the good ones to `accvideo distill
    --keep`. The teacher's pipeline is run for two steps, and the recorded latents are put in the place of what they
    give: any pipeline's own decoding, for two denoiser calls.
    """

    data: Positional[str]
    """Folder that `accvideo record`, `merge` or `pack` made, or its address."""
    out: Path
    """Folder for 000000.mp4, 000000.txt and so on, by the trajectories' numbers; an interrupted decoding in it goes
    on."""
    num_videos: int | None = None
    """As many, from the beginning; all by default."""
    media_folder: Path = Path()
    """What the names of images and videos in the prompts are relative to: the folder of the file of prompts."""
    batch_size: int = 1
    """Videos decoded together."""
    offload: Offload = "none"
    """Keep weights in main memory until they are needed: `model` moves whole networks, `group` single layers."""
    vae_tiling: bool = False
    """Decode in overlapping tiles: less memory for large frames."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one."""

    def __post_init__(self) -> None:
        for name in ("num_videos", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
