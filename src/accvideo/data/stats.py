"""Figures of a data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from accvideo.command import progress_bar
from accvideo.data.dataset import NUM_AHEAD, ahead, open_source
from accvideo.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """Counts, sizes, prompt lengths, and the size of states by key point."""

    data: Positional[str]
    """Folder that `accvideo record` or `accvideo pack` made, or its address (https://, s3://, hf:// and others)."""


@dataclass(frozen=True)
class Figures:
    """What is kept of one trajectory."""

    bytes: int
    prompt: str
    rms: list[float]
    """Root mean square of the state at each key point."""
    steps: list[float]
    """Root mean square of the way from each key point to the next."""


def figures(trajectory: Trajectory, size: int) -> Figures:
    """The figures of a trajectory whose file has `size` bytes."""
    states = trajectory.states.double().flatten(1)
    return Figures(
        size,
        trajectory.prompt,
        states.square().mean(1).sqrt().tolist(),
        states.diff(dim=0).square().mean(1).sqrt().tolist(),
    )


def summary(values: Sequence[int | float]) -> dict[str, float]:
    """Smallest, mean, median and largest value."""
    return {"min": min(values), "mean": mean(values), "median": median(values), "max": max(values)}


def stats(config: StatsConfig) -> dict[str, Any]:
    """Read each trajectory once; print a table, and return its figures.

    Raises:
        UserError: a trajectory is missing or damaged.
    """
    source = open_source(config.data)
    numbers = range(source.manifest.num_trajectories)

    def read(number: int) -> Figures:
        data = source.read_bytes(number)
        return figures(source.decode(data, number), len(data))

    with progress_bar() as progress:
        found = list(progress.track(ahead(read, numbers, NUM_AHEAD), total=len(numbers), description="reading"))
    manifest = source.manifest
    keypoints = [
        {
            "keypoint": number,
            "step": manifest.keypoints[number],
            "sigma": manifest.sigmas[manifest.keypoints[number]],
            "rms": summary([each.rms[number] for each in found]),
            "rms_to_next": summary([each.steps[number] for each in found]) if number < len(found[0].steps) else None,
        }
        for number in range(len(manifest.keypoints))
    ]
    result = {
        "folder": config.data,
        "teacher": manifest.teacher,
        "num_trajectories": len(found),
        "num_prompts": len({each.prompt for each in found}),
        "num_shards": 0 if source.index is None else len(source.index.sizes),
        "bytes": sum(each.bytes for each in found),
        "denoiser_calls": manifest.denoiser_calls * len(found),
        "bytes_each": summary([each.bytes for each in found]),
        "prompt_words": summary([len(each.prompt.split()) for each in found]),
        "prompt_characters": summary([len(each.prompt) for each in found]),
        "keypoints": keypoints,
    }
    console = Console(stderr=True)
    for table in tables(result):
        console.print(table)
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    """The figures for a reader."""
    lengths = Table("", "min", "mean", "median", "max", title="by trajectory")
    for name in ("bytes_each", "prompt_words", "prompt_characters"):
        lengths.add_row(name.replace("_", " "), *(f"{value:,.6g}" for value in result[name].values()))
    states = Table(
        "key point", "teacher's step", "sigma", "RMS of the state", "min", "max", "RMS to the next", title="states"
    )
    for row in result["keypoints"]:
        rms, following = row["rms"], row["rms_to_next"]
        states.add_row(
            str(row["keypoint"]),
            str(row["step"]),
            f"{row['sigma']:.4f}",
            *(f"{rms[name]:.4f}" for name in ("mean", "min", "max")),
            "" if following is None else f"{following['mean']:.4f}",
        )
    return [lengths, states]
