"""How long analyses of the playground will take: what they compute, by how fast this machine does it now."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from accvideo.generate import sample_clips
from accvideo.inference.config import Acceleration
from accvideo.inference.model import Model, load_model
from accvideo.playground.judge import judge
from accvideo.playground.world import sample_prompts
from accvideo.training.recipe import fast_precision
from accvideo.training.start import arithmetic

PLAYGROUND = "playground"

CALLS = 2
"""Denoiser evaluations of a guided step."""


@dataclass(frozen=True)
class Work:
    """What an analysis, or a stage of one, computes."""

    sampled: float = 0.0
    """Denoiser evaluations for one sample, of clips and recordings."""
    trained: float = 0.0
    """Those of distillation, forward 1, backward 2, in its faster arithmetic."""
    clips: float = 0.0
    """To be decoded and judged."""
    seconds: float = 0.0
    """Of anything else."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.sampled + other.sampled,
            self.trained + other.trained,
            self.clips + other.clips,
            self.seconds + other.seconds,
        )

    def times(self, number: float) -> "Work":
        """The same so many times."""
        return Work(number * self.sampled, number * self.trained, number * self.clips, number * self.seconds)


@dataclass(frozen=True)
class Speed:
    """Seconds that one of each takes."""

    sampled: float
    trained: float
    clip: float

    def seconds(self, work: Work) -> float:
        """What work will take."""
        return self.sampled * work.sampled + self.trained * work.trained + self.clip * work.clips + work.seconds


def show_estimate(works: Mapping[str, Work], batch_size: int, device: str, compiled: bool) -> dict[str, float]:
    """Say how long each will take on this machine, as it is loaded now, with blocks compiled in training or not.

    Returns:
        The seconds.
    """
    speed = measure_speed(batch_size, device, compiled)
    seconds = {name: speed.seconds(work) for name, work in works.items()}
    lines = [f"  {name:10} {duration(value)}" for name, value in [*seconds.items(), ("all", sum(seconds.values()))]]
    print(
        f"At {1000 * speed.sampled:.1f} ms a denoiser evaluation, {1000 * speed.trained:.1f} ms in training, and "
        f"{1000 * speed.clip:.0f} ms a clip decoded and judged, about:",
        *lines,
        sep="\n",
        file=sys.stderr,
        flush=True,
    )
    return seconds


def measure_speed(batch_size: int, device: str, compiled: bool) -> Speed:
    """How fast this machine is now, in batches of this size, with blocks compiled in training or not."""
    sampled, clip = sampling_speed(load_model(PLAYGROUND, device=device), batch_size)
    student = load_model(PLAYGROUND, device=device, acceleration=Acceleration(compile=compiled))
    with arithmetic(torch.device(device).type, fast_precision(device)):
        trained, _ = sampling_speed(student, batch_size)
    return Speed(sampled, trained, clip)


def sampling_speed(model: Model, batch_size: int) -> tuple[float, float]:
    """Seconds of a denoiser evaluation for one sample, and of decoding and judging a clip."""
    texts = sample_prompts(batch_size, 0, "train")

    def run(num_steps: int) -> tuple[float, float]:
        [clips] = sample_clips(model, texts, range(batch_size), num_steps=num_steps, batch_size=batch_size)
        began = time.perf_counter()
        judge(clips.frames, texts)
        judging, seconds = time.perf_counter() - began, clips.seconds
        return seconds.denoising / (num_steps * CALLS * batch_size), (seconds.decoding + judging) / batch_size

    run(1)  # the first one allocates memory, chooses kernels and draws the judge's templates
    return run(3)


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
