"""Several recordings of one teacher as one data set."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from accvideo.command import progress_bar, shorten
from accvideo.data.dataset import NUM_AHEAD, Source, ahead, open_source
from accvideo.data.manifest import MANIFEST, Manifest
from accvideo.data.verify import facts
from accvideo.folder import whole_folder
from accvideo.trajectory import Trajectory, encode_trajectory, trajectory_name
from accvideo.types import UserError

OWN = ("num_trajectories", "seed", "parts", "denoiser_calls", "versions")
"""Fields of the manifest in which data sets that are merged may differ."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merges recordings that differ in prompts, numbers and seeds only; their trajectories are numbered anew."""

    data: Positional[tuple[str, ...]]
    """Two or more folders that `accvideo record` or `pack` made, or their addresses."""
    out: Path
    """New folder for the data set."""

    def __post_init__(self) -> None:
        if len(self.data) < 2:
            raise UserError(f"{len(self.data)} data set to merge; give two or more")


def merge(config: MergeConfig) -> dict[str, Any]:
    """Write the trajectories of all data sets to one folder, in order, each with its own seed.

    Raises:
        UserError: teachers, schedules or other settings differ; a trajectory is missing, damaged or there twice.
    """
    sources = [open_source(address) for address in config.data]
    manifest = merged(config.data, [source.manifest for source in sources])
    items = [(source, number) for source in sources for number in range(source.manifest.num_trajectories)]

    def read(item: tuple[int, tuple[Source, int]]) -> Trajectory:
        index, (source, number) = item
        return replace(source.read(number), index=index)

    seen: dict[bytes, int] = {}
    with whole_folder(config.out) as folder, progress_bar() as progress:
        trajectories = ahead(read, enumerate(items), NUM_AHEAD)
        for trajectory in progress.track(trajectories, total=len(items), description="merging"):
            index = trajectory.index
            if (twin := seen.setdefault(facts(trajectory).content, index)) != index:
                (one, first), (other, second) = items[twin], items[index]
                raise UserError(
                    f"{one.where(first)} and {other.where(second)} have the same noise and prompt\n"
                    "Leave one of the data sets out, or record it with another --seed"
                )
            (folder / trajectory_name(trajectory.index)).write_bytes(encode_trajectory(trajectory))
        (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return {"folder": str(config.out), "num_trajectories": len(items)}


def merged(names: Sequence[str], manifests: Sequence[Manifest]) -> Manifest:
    """The manifest of several data sets in one.

    Raises:
        UserError: they cannot be one.
    """
    first = manifests[0]
    for name, other in zip(names[1:], manifests[1:], strict=True):
        if differing := first.differences(other, ignore=OWN):
            pairs = ((field, getattr(first, field), getattr(other, field)) for field in differing)
            changes = ", ".join(f"{field} {shorten(here)} and {shorten(there)}" for field, here, there in pairs)
            raise UserError(
                f"{names[0]} and {name} differ in {changes}\n"
                "A student learns from one teacher and one schedule: merge recordings of the same settings"
            )
    parts = [part for manifest in manifests for part in parts_of(manifest)]
    number = sum(manifest.num_trajectories for manifest in manifests)
    return replace(first, num_trajectories=number, parts=parts)


def parts_of(manifest: Manifest) -> list[dict[str, int]]:
    """The recordings that a data set is made of."""
    return manifest.parts or [{"seed": manifest.seed, "num_trajectories": manifest.num_trajectories}]
