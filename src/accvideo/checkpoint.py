"""Files of a training run that survive a kill at any moment: checkpoints, and metrics as JSON lines."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from accvideo.types import UserError


def save_checkpoint(folder: Path, iteration: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write `folder/<iteration>/` with `tensors.safetensors` and `state.json`, then delete older checkpoints.

    It is written under another name, then renamed: a kill leaves the one before.

    Raises:
        UserError: it cannot be written.
    """
    partial, final = folder / ".partial", folder / f"{iteration:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
        (partial / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint of iteration {iteration} to {folder}: {error}") from error
    for older in checkpoints(folder)[:-1]:
        shutil.rmtree(older, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors (on the CPU) and state of the newest checkpoint in `folder`; None if there is none."""
    found = checkpoints(folder)
    if not found:
        return None
    return load_file(found[-1] / TENSORS), json.loads((found[-1] / STATE).read_text("utf-8"))


TENSORS, STATE = "tensors.safetensors", "state.json"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("*") if path.name.isdigit())


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


class MetricsLog:
    """A file with one JSON object a line, which a resumed run goes on with.

    Args:
        path: of the file.
        iteration: where the run goes on: lines of this and later iterations, and a half-written one, are dropped.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        kept = [line for line in read_metrics(path) if line["iteration"] < iteration]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
        self.path = path
        self.file: TextIO

    def __enter__(self) -> "MetricsLog":
        self.file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, but for a last one that was cut short; none if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
