"""Settings of an export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from accvideo.inference.config import Dtype
from accvideo.types import UserError


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Writes a student in a form that runs without accvideo.

    `diffusers`: a whole pipeline's folder for `DiffusionPipeline.from_pretrained`. `lora`: for `load_lora_weights`.
    `comfyui`: a LoRA for ComfyUI (Wan, HunyuanVideo). `original`: one file as the authors of Wan or HunyuanVideo
    published theirs, which ComfyUI loads too.
    """

    student: Positional[str]
    """Folder of a student that `accvideo distill` made, or `playground-student`."""
    to: Literal["diffusers", "lora", "comfyui", "original"]
    """What to write."""
    out: Path
    """A new folder; for one file of weights also a path that ends in .safetensors."""
    rank: int | None = None
    """Rank of the LoRA that is extracted from a student of full weights, for `lora` and `comfyui`."""
    dtype: Dtype = "float32"
    """Of the denoisers' weights. What diffusers keeps in float32 stays so."""
    max_shard_size: float = 10.0
    """Size in GB from which a denoiser's weights are split into several files, for `diffusers`."""
    report: Path | None = None
    """`report.json` of `accvideo evaluate`, for the model card."""
    device: str = "auto"
    """Where singular value decompositions run; `auto` takes the accelerator if there is one."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank is {self.rank}; the least is 1")
        if self.rank is not None and self.to in ("diffusers", "original"):
            raise UserError(f"--to {self.to} writes full weights and takes no --rank; use --to lora or comfyui")
        if not self.max_shard_size > 0:
            raise UserError(f"max_shard_size is {self.max_shard_size} GB; choose a size above 0")
        if self.to == "diffusers" and self.out.suffix == ".safetensors":
            raise UserError(f"--to diffusers writes a folder; {self.out} is the name of a file")
