"""Reading a data set in training: any item, in a shuffled order that anybody can repeat, ahead of its use."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TypeVar

import torch

from accvideo.data.manifest import MANIFEST, Manifest, read_manifest
from accvideo.data.shards import INDEX, ShardIndex, read_index, read_member, shard_name
from accvideo.data.storage import Storage, open_storage
from accvideo.trajectory import (
    Trajectory,
    TrajectoryBatch,
    check_settings,
    collate_trajectories,
    decode_trajectory,
    misplaced,
    trajectory_name,
)
from accvideo.types import UserError

CACHE_BYTES = 2 * 1024**3
"""A data set that is smaller than this, on disk and in memory, stays in memory once read."""
NUM_AHEAD = 4
"""Batches that are read, each by a thread, before they are asked for."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Source:
    """Where the trajectories of a data set lie: in a file each, or in shards."""

    storage: Storage
    manifest: Manifest
    index: ShardIndex | None
    """None: in a file each."""
    sizes: dict[str, int] | None
    """Names of the files with their bytes; None if the place cannot be listed."""

    @property
    def num_bytes(self) -> int | None:
        """Bytes of all trajectories; None if they are not known."""
        if self.index is not None:
            return sum(map(sum, self.index.sizes))
        sizes = [] if self.sizes is None else [self.sizes.get(name, 0) for name in self.expected()]
        return sum(sizes) if all(sizes) and sizes else None

    def expected(self) -> Iterator[str]:
        """Names of the files that trajectories lie in."""
        if self.index is not None:
            return map(shard_name, range(len(self.index.sizes)))
        return map(trajectory_name, range(self.manifest.num_trajectories))

    def strays(self) -> list[str]:
        """Names of what does not belong to the data set."""
        own = {*self.expected(), MANIFEST, *([INDEX] if self.index else [])}
        return sorted((self.sizes or {}).keys() - own)

    def where(self, number: int) -> str:
        """The address of a trajectory's file, in which shard included."""
        shard = [] if self.index is None else [shard_name(self.index.member(number).shard)]
        return "/".join([self.storage.address, *shard, trajectory_name(number)])

    def read_bytes(self, number: int) -> bytes:
        """The file of trajectory `number`, unchecked.

        Raises:
            UserError: it is not there, or its archive was changed.
        """
        if self.index is not None:
            return read_member(self.storage, self.index, number)
        return self.storage.read(trajectory_name(number))

    def decode(self, data: bytes, number: int) -> Trajectory:
        """Trajectory `number` from the bytes of its file.

        Raises:
            UserError: they are damaged, or belong elsewhere.
        """
        trajectory = decode_trajectory(data, self.where(number))
        check_settings(trajectory, self.manifest, self.where(number))
        if problem := misplaced(trajectory, number, self.manifest):
            raise UserError(f"{self.where(number)}: {problem}")
        return trajectory

    def read(self, number: int) -> Trajectory:
        """Trajectory `number`.

        Raises:
            UserError: its file is missing, damaged, or belongs elsewhere.
        """
        return self.decode(self.read_bytes(number), number)


def open_source(address: Path | str) -> Source:
    """The data set in a folder or at an address, of files or of shards; some may be missing.

    Raises:
        UserError: it is none.
    """
    storage = open_storage(address)
    manifest, sizes = read_manifest(storage), storage.sizes()
    if sizes is not None and MANIFEST not in sizes:  # a web page, whose links are no list of the folder
        sizes = None
    index = None
    if INDEX in (sizes if sizes is not None else _answering(storage, INDEX)):
        index = read_index(storage)
        if len(index) != manifest.num_trajectories:
            raise UserError(
                f"{address}: {INDEX} lists {len(index)} trajectories, {MANIFEST} {manifest.num_trajectories}"
            )
    return Source(storage, manifest, index, sizes)


def _answering(storage: Storage, name: str) -> list[str]:
    try:
        storage.read(name, 0, 1)
        return [name]
    except UserError:
        return []


class TrajectoryFolder:
    """A folder of trajectories or of shards, at a path or any address, as a data set; a small one stays in memory.

    Raises:
        UserError: it is none, or some are missing.
    """

    def __init__(self, path: Path | str):
        self.path = path
        self.source = open_source(path)
        self.manifest = self.source.manifest
        if (sizes := self.source.sizes) is not None:
            missing = [name for name in self.source.expected() if name not in sizes]
            if missing:
                kind = "trajectories" if self.source.index is None else "shards"
                again = "Run the same `accvideo record` again: it adds what is missing"
                remedy = (
                    "Copy them again, or run `accvideo repair`" if self.source.index or self.manifest.parts else again
                )
                raise UserError(
                    f"{path} lacks {len(missing)} of {len(list(self.source.expected()))} {kind}, the first is "
                    f"{missing[0]}\n{remedy}"
                )
        self._cache: dict[int, Trajectory] = {}
        self._room = CACHE_BYTES if (self.source.num_bytes or 0) < CACHE_BYTES else 0

    def __len__(self) -> int:
        return self.manifest.num_trajectories

    def __getitem__(self, index: int) -> Trajectory:
        """Trajectory `index`.

        Raises:
            UserError: its file is damaged, or belongs elsewhere.
        """
        if (known := self._cache.get(index)) is not None:
            return known
        trajectory = self.source.read(index)
        if self._room:
            self._cache[index] = trajectory
            self._room = max(self._room - num_bytes(trajectory), 0)
            if not self._room:  # it takes more than on disk, or its size was not known
                self._cache = {}
        return trajectory

    def batches(
        self,
        batch_size: int,
        seed: int,
        start: int = 0,
        indices: Sequence[int] | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> Iterator[TrajectoryBatch]:
        """Batches without end: each epoch is a new permutation, and a batch may span two.

        Batch number n depends on the arguments and n only, so a run resumes with `start`. From the second on, batches
        are read ahead.

        Args:
            batch_size: trajectories a batch of this rank.
            seed: of the permutations.
            start: number of the first batch.
            indices: the trajectories to draw from; all when None.
            rank: which part of each `num_ranks * batch_size` trajectories is wanted.
            num_ranks: into how many parts they are split; together they are the batch of one rank that takes them all.
        """
        chosen = list(range(len(self)) if indices is None else indices)

        def drawn(batch: int) -> list[int]:
            first = (batch * num_ranks + rank) * batch_size
            return [place(position, chosen, seed) for position in range(first, first + batch_size)]

        def read(numbers: list[int]) -> TrajectoryBatch:
            return collate_trajectories([self[number] for number in numbers])

        return ahead(read, map(drawn, count(start)), NUM_AHEAD)


def num_bytes(trajectory: Trajectory) -> int:
    """Bytes of a trajectory's tensors in memory, each counted once: padding is filled in, states are float32."""
    tensors = [trajectory.states]
    for call in trajectory.calls:
        tensors += [
            *call.tensors.values(),
            *call.shared.values(),
            *([] if call.condition is None else [call.condition]),
        ]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def place(position: int, chosen: Sequence[int], seed: int) -> int:
    """The trajectory at a position of the endless shuffled order of those chosen."""
    epoch, offset = divmod(position, len(chosen))
    return chosen[permutation(len(chosen), seed, epoch)[offset]]


@lru_cache(maxsize=4)
def permutation(length: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch."""
    digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(length, generator=generator).tolist()


def ahead(function: Callable[[Item], Result], items: Iterable[Item], num_ahead: int) -> Iterator[Result]:
    """The function's results in order, as `map` gives them, computed by threads before they are asked for.

    The first is computed when asked for, and nothing ahead of it: who wants one waits for no other.
    """
    items = iter(items)
    for item in items:
        yield function(item)
        break
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(num_ahead, thread_name_prefix="accvideo-read")
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > num_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
