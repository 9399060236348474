"""Which trajectories of a data set the judge finds right, for `accvideo distill --keep`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tyro.conf import Positional

from accvideo.command import choose_device, progress_bar
from accvideo.data.dataset import TrajectoryFolder
from accvideo.decode import load_recorded_teacher, recorded_clips
from accvideo.generate import batches
from accvideo.playground import world
from accvideo.playground.judge import judge
from accvideo.teacher import PLAYGROUND_TEACHER, teacher_path
from accvideo.trajectory import write_whole
from accvideo.types import UserError

PROPERTIES = ("shape", "color", "background", "motion", "count", "all_right")


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Decodes a data set of the playground's teacher, judges its videos, and writes the numbers of the right ones.

    So a student can be distilled from what the teacher got right alone. Real worlds have no such judge: there, decode a
    data set by `accvideo decode` and score it as you see fit.
    """

    data: Positional[str]
    """Data set of the playground's teacher."""
    out: Path
    """Text file to write, for `accvideo distill --keep`."""
    batch_size: int = 16
    """Videos decoded together."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: it must be at least 1")


def select(config: SelectConfig) -> dict[str, Any]:
    """Write the file, and return how many are right, and in which share each property is.

    Raises:
        UserError: the data set is not of the playground's teacher, or `out` exists.
    """
    if config.out.exists():
        raise UserError(f"{config.out} exists; give another --out, or delete it")
    folder = TrajectoryFolder(config.data)
    if teacher_path(folder.manifest.teacher) != PLAYGROUND_TEACHER:
        raise UserError(
            f"{config.data} was recorded with {folder.manifest.teacher}, and the judge knows the playground only\n"
            "Write its videos with `accvideo decode`, score them, and give the numbers to `accvideo distill --keep`"
        )
    world.parse_captions([folder[number].prompt for number in range(len(folder))])  # refuses what cannot be judged
    teacher = load_recorded_teacher(folder.manifest, choose_device(config.device))
    verdicts = []
    with progress_bar() as progress:
        for block in progress.track(batches(len(folder), config.batch_size), description="judging"):
            trajectories = [folder[number] for number in block]
            verdicts.append(judge(recorded_clips(teacher, trajectories), [each.prompt for each in trajectories]))
    right = torch.cat([each.all_right for each in verdicts])
    write_whole(config.out, "".join(f"{number}\n" for number in right.nonzero().flatten().tolist()).encode())
    shares = {name: torch.cat([getattr(each, name) for each in verdicts]).float().mean().item() for name in PROPERTIES}
    return {"keep": str(config.out), "num_right": int(right.sum()), "num_trajectories": len(right), **shares}
