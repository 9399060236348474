"""Data sets into tar shards, and back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from accvideo.command import progress_bar
from accvideo.data.dataset import NUM_AHEAD, Source, ahead, open_source
from accvideo.data.manifest import MANIFEST
from accvideo.data.shards import BLOCK, INDEX, ShardIndex, end_of, header_of, padded, shard_name
from accvideo.folder import whole_folder
from accvideo.trajectory import trajectory_name
from accvideo.types import UserError


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Packs a data set into tar shards, as WebDataset reads them, for the Hub and object stores."""

    data: Positional[str]
    """Folder that `accvideo record` made, or its address."""
    out: Path
    """New folder for the shards."""
    shard_size: int = 1_000_000_000
    """Bytes of a shard, at most, unless one trajectory is larger."""

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise UserError(f"shard_size is {self.shard_size}; it is a number of bytes, such as 1000000000")


@dataclass(frozen=True, kw_only=True)
class UnpackConfig:
    """Unpacks tar shards into a file for each trajectory."""

    data: Positional[str]
    """Folder that `accvideo pack` made, or its address (https://, s3://, hf:// and others)."""
    out: Path
    """New folder for the trajectories."""


def pack(config: PackConfig) -> dict[str, Any]:
    """Pack each file as it is, once checked; equal data sets give equal shards.

    Raises:
        UserError: a trajectory is missing or damaged, or the folder holds something already.
    """
    source = open_source(config.data)
    sizes = file_sizes(source) or [len(data) for data in checked(source, "sizes")]
    index = ShardIndex.of(groups(sizes, config.shard_size))
    contents = checked(source, "packing")
    with whole_folder(config.out) as folder:
        for shard in range(len(index.sizes)):
            with (folder / shard_name(shard)).open("wb") as file:
                file.writelines(archive(index, shard, contents))
        next(contents, None)  # the progress is complete
        (folder / INDEX).write_text(index.to_json(), "utf-8")
        (folder / MANIFEST).write_text(source.manifest.to_json(), "utf-8")
    return {
        "folder": str(config.out),
        "num_shards": len(index.sizes),
        "num_trajectories": len(index),
        "bytes": sum(map(index.archive_size, range(len(index.sizes)))),
    }


def file_sizes(source: Source) -> list[int]:
    """Bytes of each trajectory's file; none if they are not known.

    Raises:
        UserError: one is missing.
    """
    if source.index is not None:
        return [size for sizes in source.index.sizes for size in sizes]
    if source.sizes is None:
        return []
    for name in source.expected():
        if name not in source.sizes:
            raise UserError(f"{source.storage.address}/{name}: missing; record or repair the data set first")
    sizes = [source.sizes[name] for name in source.expected()]
    return sizes if all(sizes) else []


def groups(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Sizes in consecutive groups whose archives take at most `limit` bytes; a larger one stands alone."""
    result: list[list[int]] = []
    total = 0
    for size in sizes:
        total += BLOCK + padded(size)
        if not result or total + len(end_of(total)) > limit:
            result.append([])
            total = BLOCK + padded(size)
        result[-1].append(size)
    return result


def checked(source: Source, what: str) -> Iterator[bytes]:
    """The files of all trajectories, in order, with a progress bar.

    Raises:
        UserError: one is missing, damaged, or belongs elsewhere.
    """
    numbers = range(source.manifest.num_trajectories)

    def read(number: int) -> bytes:
        data = source.read_bytes(number)
        source.decode(data, number)
        return data

    with progress_bar() as progress:
        yield from progress.track(ahead(read, numbers, NUM_AHEAD), total=len(numbers), description=what)


def archive(index: ShardIndex, shard: int, contents: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces of an archive, from the files that lie in it.

    Raises:
        UserError: a file has changed since the index was made.
    """
    for number, size in enumerate(index.sizes[shard], index.firsts[shard]):
        data = next(contents)
        if len(data) != size:
            raise UserError(
                f"{trajectory_name(number)} changes while it is packed; stop what writes to it, and try again"
            )
        yield header_of(number, size)
        yield data
        yield bytes(padded(size) - size)
    yield end_of(index.starts[shard][-1])


def unpack(config: UnpackConfig) -> dict[str, Any]:
    """Write each member of the shards to a file of its own, once checked.

    Raises:
        UserError: a trajectory is missing or damaged, or the folder holds something already.
    """
    source = open_source(config.data)
    size = 0
    with whole_folder(config.out) as folder:
        for number, data in enumerate(checked(source, "unpacking")):
            (folder / trajectory_name(number)).write_bytes(data)
            size += len(data)
        (folder / MANIFEST).write_text(source.manifest.to_json(), "utf-8")
    return {"folder": str(config.out), "num_trajectories": source.manifest.num_trajectories, "bytes": size}
