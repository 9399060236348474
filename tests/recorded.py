"""A recorded data set of a tiny teacher, and a student in memory, for the tests of distillation."""

from pathlib import Path
from typing import Any

from accvideo.data.dataset import TrajectoryFolder
from accvideo.record import record
from accvideo.recording.config import RecordConfig
from tests.tiny import tiny_wan_pipeline

PROMPTS = ["a red square", "two blue dots", "green", "a circle moves left", "nothing", "one more"]


def record_tiny(
    folder: Path, scheduler: str = "dpm", experts: int = 1, teacher_seed: int = 0, **settings: Any
) -> TrajectoryFolder:
    """Save a tiny Wan pipeline to `folder/teacher` and record it to `folder/data`: 10 steps, 5 for the student."""
    tiny_wan_pipeline(scheduler, teacher_seed, experts).save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = {"num_steps": 10, "num_student_steps": 5, "guidance_scale": 3.0, "num_trajectories": 6} | settings
    config = RecordConfig(
        teacher=str(folder / "teacher"),
        prompts=folder / "prompts.txt",
        out=folder / "data",
        height=32,
        width=32,
        num_frames=5,
        pipeline_arg=("max_sequence_length=12",),
        **settings,
    )
    record(config)
    return TrajectoryFolder(folder / "data")
