"""Folders that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accvideo.types import UserError


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder under a hidden name beside `path`, which takes its name once the block has ended well.

    Raises:
        UserError: `path` holds something already, or what is in the block cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} holds something already; give a new or empty folder")
    partial = path.absolute().with_name(f".{path.absolute().name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for each in partial.rglob("*"):
            if each.is_file():
                with each.open("rb") as file:
                    os.fsync(file.fileno())  # else a machine that dies may leave the folder with nothing in its files
        if path.exists():
            path.rmdir()
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; nothing half-made is left") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
