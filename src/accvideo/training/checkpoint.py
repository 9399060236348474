"""Files of a training run that survive a kill at any moment: checkpoints, and metrics as JSON lines.

A checkpoint is a folder `<iteration>` with `state.json` and a safetensors file for each rank. A tensor of which ranks
hold rows goes into several files as pieces called `name@first row`, so that any number of ranks can read it. Every file
is written under another name, then renamed; the checkpoint counts once all of its files are there.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from accvideo.training.distributed import first_ranks, num_ranks, rank, wait_for_all
from accvideo.types import UserError

STATE = "state.json"


class Checkpoint:
    """A complete checkpoint on disk; each rank reads from it what it needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        contents = json.loads((folder / STATE).read_text("utf-8"))
        self.state: dict[str, Any] = contents["state"]
        self.num_files: int = contents["num_files"]

    @cached_property
    def pieces(self) -> dict[str, list[tuple[int, Any]]]:
        """By name, the first row and the lazily read rows of each piece of a tensor, in order."""
        found: dict[str, list[tuple[int, Any]]] = {}
        for number in range(self.num_files):
            file: Any = safe_open(self.folder / tensors_name(number, self.num_files), framework="pt")
            for key in file.keys():  # noqa: SIM118 - no mapping
                name, _, start = key.partition("@")
                found.setdefault(name, []).append((int(start or 0), file.get_slice(key)))
        return {name: sorted(pieces, key=lambda piece: piece[0]) for name, pieces in found.items()}

    def names(self, group: str) -> list[str]:
        """What follows `group/` in names of tensors."""
        return [name.removeprefix(f"{group}/") for name in self.pieces if name.startswith(f"{group}/")]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or its rows from `start` up to `stop`, on the CPU."""
        pieces = self.pieces[name]
        if len(pieces[0][1].get_shape()) == 0:
            return pieces[0][1][...]
        stop = sum(rows.get_shape()[0] for _, rows in pieces) if stop is None else stop
        return torch.cat([rows[max(start - first, 0) : max(stop - first, 0)] for first, rows in pieces])

    def group(self, group: str) -> dict[str, Tensor]:
        """The whole tensors of a group, by what follows `group/` in their names."""
        return {name: self.read(f"{group}/{name}") for name in self.names(group)}


class Checkpoints:
    """The checkpoints of a run, written in the background; use it as a context, which waits for the last one.

    The checkpoint before the newest complete one is deleted when the next is begun.

    Args:
        folder: of all of them, which all ranks see.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer = ThreadPoolExecutor(max_workers=1)
        self.writing: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.shutdown()
        if kind is None:
            self.finish()

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, the same for all ranks; leftovers of killed runs are deleted."""
        found = checkpoints(self.folder)
        number = first_ranks(int(found[-1].name) if found else -1)
        if rank() == 0:
            delete(path for path in numbered(self.folder) if path.name != folder_name(number))
        wait_for_all()
        return Checkpoint(self.folder / folder_name(number)) if number >= 0 else None

    def save(self, iteration: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint from copies of the tensors, which are free to change when this returns.

        Args:
            iteration: its number.
            tensors: this rank's; see the top of this file for names of pieces.
            state: the first rank's is written; JSON.

        Raises:
            UserError: the one before could not be written.
        """
        self.finish()
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        folder = self.folder / folder_name(iteration)
        self.writing = self.writer.submit(write_checkpoint, folder, copies, dict(state), rank(), num_ranks())

    def check(self) -> None:
        """See that the checkpoint that is being written has not failed yet.

        Raises:
            UserError: it could not be written.
        """
        if self.writing is not None and self.writing.done():
            self.writing.result()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete, and delete those before it.

        Raises:
            UserError: it could not be written.
        """
        if self.writing is not None:
            self.writing.result()
            wait_for_all()
            self.writing = None
            if rank() == 0:
                delete_older(self.folder)


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], number: int, num_files: int
) -> None:
    """Write one rank's share of a checkpoint.

    Raises:
        UserError: it cannot be written.
    """
    path = folder / tensors_name(number, num_files)
    partial = folder / f".{path.name}.partial"
    contents = json.dumps({"num_files": num_files, "state": state}, indent=2) + "\n"
    with writing(f"the checkpoint of iteration {int(folder.name)} to {folder.parent}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(dict(tensors), partial)
            keep(partial, path)
            if number == 0:
                partial.write_text(contents, encoding="utf-8")
                keep(partial, folder / STATE)
        finally:
            partial.unlink(missing_ok=True)


def keep(partial: Path, path: Path) -> None:
    """Give a file its final name once it is on the disk, not in memory only."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def folder_name(iteration: int) -> str:
    """Of the checkpoint of an iteration."""
    return f"{iteration:08d}"


def tensors_name(number: int, num_files: int) -> str:
    """Of the tensors of rank `number`."""
    return f"rank-{number}-of-{num_files}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""

    def complete(path: Path) -> bool:
        if not (path / STATE).exists():
            return False
        num_files = Checkpoint(path).num_files
        return all((path / tensors_name(number, num_files)).exists() for number in range(num_files))

    return [path for path in numbered(folder) if complete(path)]


def numbered(folder: Path) -> list[Path]:
    """The folders of checkpoints, complete or not, oldest first."""
    return sorted(path for path in folder.glob("*") if path.name.isdigit())


def delete_older(folder: Path) -> None:
    """Delete the checkpoints before the newest complete one."""
    newest = checkpoints(folder)[-1].name
    delete(path for path in numbered(folder) if path.name < newest)


def delete(paths: Iterable[Path]) -> None:
    """Delete checkpoints; what a kill leaves of one is not complete."""
    for path in paths:
        (path / STATE).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state by "number of the parameter.name"."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, values in state.items() for name, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer the state that `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@contextmanager
def metrics_log(path: Path, iteration: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that appends lines to a file with one JSON object a line, which a resumed run goes on with.

    Args:
        path: of the file.
        iteration: where the run goes on: lines of this and later iterations, and a half-written one, are dropped.

    Raises:
        UserError: it cannot be written.
    """
    with writing(path), path.open("a+b") as file:
        file.seek(0)
        kept = takewhile(lambda line: line[-1:] == b"\n" and json.loads(line)["iteration"] < iteration, file)
        file.truncate(sum(map(len, kept)))  # which needs no space
    with appended(path) as append:
        yield lambda line: append(json.dumps(line).encode() + b"\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, but for a last one that was cut short; none if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


@contextmanager
def appended(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A function that appends to a file; when it returns, the system has what it was given.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(path):
        file = path.open("ab")

    def append(data: bytes) -> None:
        with writing(path):
            file.write(data)
            file.flush()

    try:
        yield append
    finally:
        with writing(path):  # once more what could not be written
            file.close()


@contextmanager
def writing(what: object) -> Iterator[None]:
    """A context in which `what` is written: a path, or some words.

    Raises:
        UserError: it cannot be written, as on a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write {what}: {reason}\n"
            "Make room there, or mend what else is wrong; the same command then goes on from the last checkpoint"
        ) from error
