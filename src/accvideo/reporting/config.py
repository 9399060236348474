"""Settings of an evaluation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from accvideo.inference.config import PLAIN, Acceleration, Dtype
from accvideo.types import UserError
from accvideo.vbench.suite import ITEMS_OF_PROMPT, NUM_VIDEOS


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compares a student with its teacher and writes a report."""

    student: Positional[str]
    """Folder of a student, or `playground-student`, or `playground-student-2`."""
    out: Path
    """Folder of the report; a killed evaluation in it goes on."""
    rows: Path | None = None
    """Folder to take finished rows from and to keep them in, `cache` in `out` by default. Evaluations that share one
    make the teacher's clips once; the seconds of a row are those of when it was made."""
    teacher: str | None = None
    """The student's own by default."""
    also: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A further student, as one more row; may be repeated."""
    num_prompts: int = 500
    """Number of prompts, and clips of each row."""
    prompts: Path | None = None
    """Text file, one prompt a line; or .csv or .jsonl with further columns, as for `generate`. Held-out prompts of the
    world by default if the teacher is the playground's; with `vbench`, some of its."""
    seed: int = 0
    """Seed of prompts and noise."""
    num_steps: int | None = None
    """Steps of the teacher; by default as many as were recorded, or `record --teacher-num-steps`."""
    batch_size: int | None = None
    """Clips denoised together; 16 by default for the playground, else 1."""
    dtype: Dtype = "float32"
    """Of the pipelines."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one."""
    fvd: Path | None = None
    """Also measure FVD to the teacher's clips: the file with I3D's weights, for the package cd-fvd."""
    vbench: bool = False
    """Also make the videos that VBench wants of the student, five of each prompt of its list or of `prompts`; print the
    commands that measure them, and read what they have measured. `prompts` may be VBench's list in a .json file.
    Several processes with this command share the work."""
    vbench_teacher: bool = False
    """With `vbench`: of the teacher as well."""
    vbench_texts: Path | None = None
    """With `vbench`: text file of what the models are given in place of the prompts of its list, one a line."""
    vbench_flicker: int = NUM_VIDEOS
    """With `vbench`: videos of each prompt of temporal flickering. More than five, VBench asks for 25, are filtered by
    it, so that it looks at those that stand still."""
    acceleration: Annotated[Acceleration, tyro.conf.arg(name="")] = PLAIN
    """Speed and memory, of teacher and student alike."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_steps", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        if not NUM_VIDEOS <= self.vbench_flicker <= ITEMS_OF_PROMPT:
            raise UserError(
                f"vbench_flicker is {self.vbench_flicker}: it must be from {NUM_VIDEOS} to {ITEMS_OF_PROMPT}"
            )
        for name in ("vbench_teacher", "vbench_texts", "vbench_flicker"):
            if not self.vbench and getattr(self, name) != getattr(type(self), name):
                raise UserError(f"--{name.replace('_', '-')} is for VBench's videos; give --vbench as well")
        if "student" in self.also or len(set(self.also)) < len(self.also):
            raise UserError(
                f"--also {' '.join(self.also)}: every row needs a name of its own, and `student` is taken\n"
                "Write the folder `student` as ./student, and each further student once"
            )
