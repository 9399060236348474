"""Settings of a plan."""

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from accvideo.presets import find_preset
from accvideo.training.recipe import DistillConfig
from accvideo.types import UserError

Gpu = Literal["a100", "h100", "h200", "b200", "l40s", "rtx4090"]


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Says what recording, distilling and generating with a preset will take, before anything is downloaded."""

    preset: Positional[str]
    """Name of the preset, such as wan21-t2v-14b; a wrong one lists them all."""
    gpu: Gpu = "a100"
    """Kind of GPU. Times are calibrated on the A100's; others are taken to achieve the same share of their peak."""
    num_gpus: int = 8
    """GPUs that record and distill; one of them generates."""
    num_trajectories: int | None = None
    """Trajectories to record; by default each of the training's samples is drawn once (iterations x batch size)."""
    lora_rank: int = DistillConfig.lora_rank
    """Rank of the LoRA, where one is trained."""

    def __post_init__(self) -> None:
        find_preset(self.preset)
        for name in ("num_gpus", "num_trajectories", "lora_rank"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
