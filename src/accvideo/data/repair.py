"""Record again what is bad in a data set, and nothing else."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from accvideo.data.dataset import open_source
from accvideo.data.manifest import Manifest
from accvideo.data.verify import check
from accvideo.record import RecordConfig, record
from accvideo.trajectory import trajectory_name
from accvideo.types import UserError


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """Moves damaged trajectories aside, and records them and the missing ones again."""

    folder: Positional[Path]
    """Folder that `accvideo record` made."""
    prompts: Path
    """The file of prompts that it was recorded on."""
    image: Path | None = None
    """The first frame that it was recorded with, if one was given to all prompts."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one."""


def repair(config: RepairConfig) -> dict[str, Any]:
    """Mend a data set; what is recorded again has the bytes it had, on the same kind of device and library versions.

    Raises:
        UserError: it cannot be recorded again here, or its prompts are others now.
    """
    source = open_source(config.folder)
    if source.index is not None or source.manifest.parts:
        made, instead = ("packed", "copy or pack it") if source.index is not None else ("merged", "merge them")
        raise UserError(f"{config.folder} was {made}: repair what it was made from, then {instead} again")
    settings = settings_of(source.manifest, config)
    found = list(check(source))
    bad = sorted({index for problem in found for index in problem.indices})
    aside = config.folder.absolute().with_name(f"{config.folder.absolute().name}.bad")
    for problem in found:
        print(problem.text, file=sys.stderr)
    for index in bad:
        move_aside(config.folder / trajectory_name(index), aside)
    recorded = record(settings) if bad else {"num_recorded": 0}
    left = [problem.text for problem in check(open_source(config.folder))]
    return {
        "folder": str(config.folder),
        "num_bad": len(bad),
        "num_recorded": recorded["num_recorded"],
        "moved_to": str(aside) if aside.exists() else None,
        "num_problems": len(left),
        "problems": left,
    }


def move_aside(path: Path, aside: Path) -> None:
    """Move a file to another folder, under another name if its own is taken there; a missing one is left missing.

    Raises:
        UserError: it cannot be moved.
    """
    if not os.path.lexists(path):
        return
    try:
        aside.mkdir(exist_ok=True)
        place, number = aside / path.name, 1
        while os.path.lexists(place):
            place, number = aside / f"{path.name}.{number}", number + 1
        os.rename(path, place)
    except OSError as error:
        raise UserError(f"cannot move {path} to {aside}: {error.strerror}") from error


def settings_of(manifest: Manifest, config: RepairConfig) -> RecordConfig:
    """The settings that a data set was recorded with; the recorder compares what they give with its manifest."""
    scheduler = manifest.scheduler["config"]
    shift = next((scheduler[name] for name in ("flow_shift", "shift") if name in scheduler), None)
    dtype: Any = manifest.dtype
    solver: Any = manifest.solver
    return RecordConfig(
        teacher=manifest.teacher,
        prompts=config.prompts,
        out=config.folder,
        num_steps=manifest.num_steps,
        solver=solver,
        teacher_num_steps=manifest.teacher_num_steps or manifest.num_steps,
        num_student_steps=manifest.num_student_steps,
        image=config.image,
        guidance_scale=manifest.guidance_scale,
        height=manifest.height,
        width=manifest.width,
        num_frames=manifest.num_frames,
        fps=int(manifest.fps) if manifest.fps == int(manifest.fps) else None,
        shift=None if scheduler.get("use_dynamic_shifting") else shift,
        seed=manifest.seed,
        num_trajectories=manifest.num_trajectories,
        pipeline_arg=tuple(f"{name}={json.dumps(value)}" for name, value in manifest.pipeline_args.items()),
        batch_size=manifest.batch_size,
        dtype=dtype,
        device=config.device,
    )
