"""Settings of a recording."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from accvideo.flow import keypoint_indices
from accvideo.recording.solvers import SOLVERS, Solver
from accvideo.types import UserError


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """Records the teacher's denoising trajectories on the prompts of a file.

    `--preset NAME`, such as wan21-t2v-14b, starts from a released teacher and its settings; a wrong name lists all.
    """

    teacher: tyro.conf.Positional[str]
    """`playground`, a folder that diffusers saved, or a hub id."""
    prompts: Path
    """Text file, one prompt a line; or .csv or .jsonl with a column `prompt` and others (`image`, `video`) that are
    arguments of the pipeline's call; file names in it are relative to its folder."""
    out: Path
    """Folder of the data set; an interrupted recording in it goes on."""
    num_steps: int = 50
    """Denoising steps S of the recording."""
    solver: Solver = "own"
    """How steps are taken, always over the noise levels of the teacher's own scheduler: by that scheduler; by Euler's
    method; or by one of second order, which in 25 steps comes nearer to the flow than Euler's in 50."""
    teacher_num_steps: int | None = None
    """Steps of the teacher's own clips, by its own scheduler, that students will be compared with; `num_steps` by
    default, or 50 where `solver` is another."""
    num_student_steps: int = 5
    """Steps K of the student to come; must divide S."""
    image: Path | None = None
    """First frame, for image-to-video pipelines; a column `image` of the prompts has one for each."""
    guidance_scale: float | None = None
    """The pipeline's own by default."""
    height: int | None = None
    """In pixels; the pipeline's own by default."""
    width: int | None = None
    """In pixels; the pipeline's own by default."""
    num_frames: int | None = None
    """The pipeline's own by default."""
    fps: int | None = None
    """Frames a second the clips are meant for; the pipeline's own by default."""
    shift: float | None = None
    """Of the noise levels towards noise: `shift` or `flow_shift` of the scheduler; as the teacher has it by default."""
    seed: int = 0
    """With an item's number, it makes the item's noise."""
    num_trajectories: int | None = None
    """As many as prompts by default; more go round the prompts again, with other noise."""
    pipeline_arg: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=JSON: any other argument of the pipeline's call; may be repeated. The name of an image or video file is
    replaced by what is in it."""
    batch_size: int = 1
    """Trajectories denoised together. Batches are always whole: what an item becomes depends on this number."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the pipeline; states are stored in float32 in any case."""
    compile: bool = False
    """Compile the denoiser's blocks by torch.compile: the first batch waits for it, all others are faster."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one; under torchrun, srun or a SLURM array each worker its own."""
    ray: bool = False
    """Record with a pool of workers on Ray (`pip install 'accvideo[ray]'`), here or on the cluster that is set up."""
    num_workers: int | None = None
    """Of the pool on Ray, with a pipeline each; by default as many as accelerators, or processor cores without any."""

    def __post_init__(self) -> None:
        keypoint_indices(self.num_steps, self.num_student_steps)
        if self.solver not in SOLVERS:
            raise UserError(f"solver is {self.solver}; choose one of {', '.join(SOLVERS)}")
        if self.num_workers is not None and not self.ray:
            raise UserError("--num-workers is for --ray; without it, start workers by torchrun, srun or by hand")
        for name in ("num_trajectories", "batch_size", "num_workers", "teacher_num_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
