"""Which trajectories of a data set the judge finds right, for `accvideo distill --keep`."""

from typing import Any

import torch

from accvideo.command import choose_device, progress_bar
from accvideo.data.dataset import TrajectoryFolder
from accvideo.decode import load_recorded_teacher, recorded_clips
from accvideo.generate import batches
from accvideo.playground import world
from accvideo.playground.config import SelectConfig
from accvideo.playground.judge import judge
from accvideo.teacher import PLAYGROUND_TEACHER, teacher_path
from accvideo.trajectory import write_whole
from accvideo.types import UserError

PROPERTIES = ("shape", "color", "background", "motion", "count", "all_right")


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
