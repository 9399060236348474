"""Trajectories in tar archives, as WebDataset reads them: fewer and larger files, for the Hub and object stores.

A folder of shards holds `manifest.json`, `index.json` and `000000.tar`, `000001.tar`, ... Each archive is a plain
USTAR file whose members are trajectory files, byte for byte, in order. All else in it follows from their sizes, which
the index lists: so any member is one read away, equal trajectories give equal archives, and no name in an archive is
ever used.
"""

import hashlib
import json
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from accvideo.data.schema import parse
from accvideo.data.storage import MAX_BYTES, MAX_TEXT_BYTES, Storage
from accvideo.trajectory import trajectory_name
from accvideo.types import UserError

INDEX = "index.json"
BLOCK = tarfile.BLOCKSIZE


def shard_name(number: int) -> str:
    """The file name of an archive."""
    return f"{number:06d}.tar"


@dataclass(frozen=True)
class Member:
    """Where an archive holds a trajectory."""

    shard: int
    start: int
    """Of the file itself, after its header of one block."""
    size: int


@dataclass(frozen=True)
class ShardIndex:
    """What lies where in a folder of shards."""

    sizes: list[list[int]]
    """Bytes of the trajectories in each archive, in order."""
    sha256: str
    """Of the sizes."""
    format: int = 1

    def __post_init__(self) -> None:
        if self.format != 1:
            raise UserError(f"{INDEX}: format {self.format}; this version of accvideo reads 1")
        if self.sha256 != self.checksum(self.sizes):
            raise ValueError("its checksum does not match")
        if not all(1 <= size <= MAX_BYTES for sizes in self.sizes for size in sizes) or not all(self.sizes):
            raise ValueError(f"sizes that are not from 1 to {MAX_BYTES}, or a shard with nothing in it")

    @staticmethod
    def checksum(sizes: list[list[int]]) -> str:
        """SHA-256 of the sizes."""
        return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()

    @staticmethod
    def of(sizes: list[list[int]]) -> "ShardIndex":
        """The index of shards that hold trajectories of these sizes."""
        return ShardIndex(sizes, ShardIndex.checksum(sizes))

    def to_json(self) -> str:
        """The index as the text of its file."""
        return json.dumps({"format": self.format, "sha256": self.sha256, "sizes": self.sizes}) + "\n"

    @cached_property
    def firsts(self) -> list[int]:
        """Number of the first trajectory in each archive, and of all of them."""
        return list(accumulate(map(len, self.sizes), initial=0))

    @cached_property
    def starts(self) -> list[list[int]]:
        """Where the header of each member lies, and where an archive's members end."""
        return [list(accumulate((BLOCK + padded(size) for size in sizes), initial=0)) for sizes in self.sizes]

    def __len__(self) -> int:
        return self.firsts[-1]

    def member(self, index: int) -> Member:
        """Where trajectory `index` lies."""
        shard = bisect_right(self.firsts, index) - 1
        place = index - self.firsts[shard]
        return Member(shard, self.starts[shard][place] + BLOCK, self.sizes[shard][place])

    def archive_size(self, shard: int) -> int:
        """Bytes of an archive."""
        return self.starts[shard][-1] + len(end_of(self.starts[shard][-1]))


def padded(size: int) -> int:
    """Bytes that a file takes in an archive, without its header."""
    return -(-size // BLOCK) * BLOCK


def header_of(index: int, size: int) -> bytes:
    """The block before trajectory `index` in an archive; the same whoever packs it, and when."""
    info = tarfile.TarInfo(trajectory_name(index))
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def end_of(size: int) -> bytes:
    """What follows the members of an archive, which take `size` bytes: two empty blocks, then up to a whole record."""
    return bytes(-(-(size + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - size)


def read_index(storage: Storage) -> ShardIndex:
    """The index of a folder of shards.

    Raises:
        UserError: there is none, or it was changed.
    """
    text = storage.read(INDEX, limit=MAX_TEXT_BYTES)
    try:
        return parse(ShardIndex, text)
    except ValueError as error:
        raise UserError(f"{storage.address}/{INDEX} cannot be read: {error}\nPack the data set again") from error


def read_member(storage: Storage, index: ShardIndex, number: int) -> bytes:
    """Trajectory `number`, with all that belongs to it in its archive checked.

    Raises:
        UserError: the archive is not as `accvideo pack` makes it there.
    """
    member = index.member(number)
    name, end = shard_name(member.shard), member.start + padded(member.size)
    data = storage.read(name, member.start - BLOCK, end - member.start + BLOCK)
    content, rest = data[BLOCK : BLOCK + member.size], data[BLOCK + member.size :]
    if data[:BLOCK] != header_of(number, member.size) or len(data) != end - member.start + BLOCK or any(rest):
        raise UserError(f"{storage.address}/{name}: changed around {trajectory_name(number)}, or truncated there")
    return content


def bad_ends(storage: Storage, index: ShardIndex) -> Iterator[tuple[int, str]]:
    """Each archive that does not end as it should, and a line that says so."""
    for shard, starts in enumerate(index.starts):
        try:
            end = storage.read(shard_name(shard), starts[-1], len(end_of(starts[-1])) + 1)
            if end != end_of(starts[-1]):
                yield shard, f"{storage.address}/{shard_name(shard)}: changed after its last trajectory, or truncated"
        except UserError as error:
            yield shard, str(error)
