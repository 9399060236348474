"""Reading the files of one folder, wherever it is: on disk, behind a web server, in an object store."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from accvideo.types import UserError

MAX_BYTES = 16 * 1024**3
"""The most that is read at once; a trajectory of 50 states of a 720p clip is a tenth of it."""
MAX_TEXT_BYTES = 64 * 1024**2
"""The most that is read as JSON."""
TRIES = 4

Result = TypeVar("Result")


class Storage(Protocol):
    """The files of one folder, which is never written to."""

    @property
    def address(self) -> str:
        """Where it is, as the user gave it."""
        ...

    def sizes(self) -> dict[str, int] | None:
        """Names of the entries with their bytes (0: unknown); None if the place cannot be listed."""
        ...

    def read(self, name: str, start: int = 0, size: int | None = None, limit: int = MAX_BYTES) -> bytes:
        """A file, or `size` bytes of it from `start` on; fewer where it ends.

        Raises:
            UserError: it is not there, is larger than `limit`, or cannot be read.
        """
        ...


def open_storage(address: str | Path) -> Storage:
    """The folder at a path or at any address that fsspec knows, such as https://, s3://, hf:// or memory://.

    Raises:
        UserError: the protocol is unknown, or its library is not installed.
    """
    text = str(address)
    if isinstance(address, Path) or ("://" not in text and "::" not in text):
        return LocalStorage(Path(address))
    try:
        filesystem, root = fsspec.url_to_fs(text)
    except (ImportError, ValueError, OSError) as error:
        raise UserError(
            f"cannot open {text}: {error}\nGive a folder, or an address such as https://, s3://, gs:// or hf://datasets/"
        ) from error
    if isinstance(filesystem, LocalFileSystem):
        return LocalStorage(Path(root))
    return RemoteStorage(text.rstrip("/"), filesystem, root.rstrip("/"))


@dataclass(frozen=True)
class LocalStorage:
    """A folder on disk. Links out of it are not followed."""

    root: Path

    @property
    def address(self) -> str:
        """The path."""
        return str(self.root)

    def sizes(self) -> dict[str, int] | None:
        """See `Storage`."""
        found = {}
        try:
            for entry in os.scandir(self.root):
                with suppress(FileNotFoundError):  # a recorder's claim, given back since
                    found[entry.name] = 0 if entry.is_symlink() else entry.stat(follow_symlinks=False).st_size
        except OSError as error:
            raise UserError(f"{self.root}: {error.strerror}; give a folder that accvideo recorded") from error
        return found

    def read(self, name: str, start: int = 0, size: int | None = None, limit: int = MAX_BYTES) -> bytes:
        """See `Storage`."""
        path = self.root / name
        try:
            real = path.resolve(strict=True)
            if not real.is_relative_to(self.root.resolve()):
                raise UserError(f"{path}: a link to {real}, outside the data set; copy the file itself to here")
            if not real.is_file():
                raise UserError(f"{path}: not a regular file")
            with real.open("rb") as file:
                rest = max(file.seek(0, os.SEEK_END) - start, 0)
                size = rest if size is None else min(size, rest)  # all that is asked for would be allocated
                check_size(str(path), size, limit)
                file.seek(start)
                return file.read(size)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        except RuntimeError as error:  # before Python 3.13
            raise UserError(f"{path}: a link to itself") from error


@dataclass(frozen=True)
class RemoteStorage:
    """A folder that fsspec reads; what fails for another reason than absence is tried again."""

    address: str
    filesystem: Any
    root: str

    def sizes(self) -> dict[str, int] | None:
        """See `Storage`."""
        try:
            entries = attempt(self.address, lambda: self.filesystem.ls(self.root, detail=True), tries=1)
        except UserError:
            return None
        return {entry["name"].rstrip("/").rpartition("/")[2]: entry.get("size") or 0 for entry in entries} or None

    def read(self, name: str, start: int = 0, size: int | None = None, limit: int = MAX_BYTES) -> bytes:
        """See `Storage`."""
        where, path = f"{self.address}/{name}", f"{self.root}/{name}"
        if size is None:
            whole = attempt(where, lambda: self.filesystem.info(path))["size"]
            check_size(where, (whole or 0) - start, limit)
        else:
            check_size(where, size, limit)
        part = {} if size is None and not start else {"start": start, "end": None if size is None else start + size}
        data = attempt(where, lambda: self.filesystem.cat_file(path, **part))
        if size is not None and len(data) > size:
            raise UserError(
                f"{where}: the server sends whole files where parts are asked for\n"
                "Serve the shards from one that knows HTTP ranges, or copy them to a disk"
            )
        return data


def check_size(where: str, size: int, limit: int) -> None:
    """Refuse what could not be read into memory.

    Raises:
        UserError: it is larger than the limit.
    """
    if size > limit:
        raise UserError(f"{where}: {size:,} bytes; the most that is read is {limit:,}")


def attempt(where: str, action: Callable[[], Result], tries: int = TRIES) -> Result:
    """The result of an action that a network may disturb.

    Raises:
        UserError: it failed each time, or the file is not there.
    """
    for number in range(tries):
        try:
            return action()
        except FileNotFoundError as error:
            raise UserError(f"{where}: No such file or directory") from error
        except Exception as error:  # the library of each protocol has errors of its own
            if number == tries - 1:
                raise UserError(f"{where}: {type(error).__name__} {error}") from error
            time.sleep(2**number)
    raise AssertionError("unreachable")
