"""What the commands have in common: reading prompts and call arguments, choosing a device, showing progress."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from accvideo.types import UserError

DEFAULT_FPS = 16
"""Frames a second of a pipeline that does not say."""


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are skipped.

    Raises:
        UserError: there are none.
    """
    try:
        prompts = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read the prompts {path}: {error}; give a text file, one prompt a line") from error
    if not prompts:
        raise UserError(f"{path} holds no prompts; give a text file, one prompt a line")
    return prompts


def choose_device(name: str) -> str:
    """The device called `name`; `auto` is the accelerator if there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def shorten(value: Any) -> str:
    """`value` in at most 40 characters."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def call_parameters(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Names of what a pipeline's call takes, and their defaults."""
    return {name: each.default for name, each in inspect.signature(type(pipeline).__call__).parameters.items()}


def parse_pipeline_args(texts: Sequence[str]) -> dict[str, Any]:
    """The arguments in texts of the form NAME=JSON.

    Raises:
        UserError: a text is not of that form.
    """
    arguments = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            if not equals:
                raise ValueError
            arguments[name] = json.loads(value)
        except ValueError:
            raise UserError(
                f"--pipeline-arg {text} is not NAME=JSON; write max_sequence_length=16, or 'negative_prompt=\"blurry\"'"
            ) from None
    return arguments


def progress_bar() -> Progress:
    """A progress bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
