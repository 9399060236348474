"""Prompts of the playground's world, for a try without prompts of one's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accvideo.playground import world
from accvideo.trajectory import write_whole


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Writes distinct prompts of the playground's world to a file, one a line."""

    out: Path
    """Text file to write."""
    num: int = 100
    """Number of prompts."""
    split: Literal["train", "held_out"] = "train"
    """No teacher or student was ever trained on a held-out prompt."""
    seed: int = 0
    """Other seeds draw other prompts."""


def prompts(config: PromptsConfig) -> dict[str, Any]:
    """Write the file."""
    lines = world.sample_prompts(config.num, config.seed, config.split)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(config.out, "".join(f"{line}\n" for line in lines).encode())
    return {"prompts": str(config.out), "num_prompts": len(lines)}
