"""What the commands have in common: reading prompts and call arguments, choosing a device, showing progress."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from accvideo.data.schema import TooDeepError, loads
from accvideo.types import UserError

DEFAULT_FPS = 16
"""Frames a second of a pipeline that does not say."""
MAX_ARGUMENT_DEPTH = 20
"""Of lists and objects within each other in an argument of a call; the records they are written to may be deeper."""


@dataclass(frozen=True)
class Prompt:
    """One line of a file of prompts."""

    text: str
    arguments: dict[str, Any] = field(default_factory=dict)
    """What else the pipeline's call takes for this prompt, as JSON; images and videos by the names of their files."""
    folder: Path = Path()
    """What the names of files are relative to."""


def read_prompt_file(path: Path) -> list[Prompt]:
    """The prompts of a file, with further arguments of the pipeline's call for each.

    A file ending in .csv has a first line that names its columns, one ending in .jsonl has an object a line; `prompt`
    is one of the names, any other is an argument of the call. The names of images and videos are relative to the
    file's folder. Any other file is plain text, one prompt a line. Prompts may be of any length and script; control
    characters in them are kept, and of these only the ends of lines end one.

    Raises:
        UserError: there are no prompts, or the file is not of that form.
    """
    form = "give a text file, one prompt a line, or a .csv or .jsonl with a column `prompt`"
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read the prompts {path}: {error}; {form}") from error
    lines = text.split("\n")  # not `splitlines`, which also splits at form feeds and Unicode's own separators
    if path.suffix.lower() == ".csv":
        rows = list(csv_rows(path, text))
    elif path.suffix.lower() == ".jsonl":
        rows = list(json_rows(path, text))
    else:
        rows = [("", {"prompt": line.strip()}) for line in lines if line.strip()]
    if not rows:
        raise UserError(f"{path} holds no prompts; {form}")
    return [_prompt(path, place, row) for place, row in rows]


def csv_rows(path: Path, text: str, column: str = "prompt") -> Iterator[tuple[str, dict[Any, Any]]]:
    """The rows of a .csv file, each with its place in it; the cells of a column of prompts stay text.

    Raises:
        UserError: the text is no table, or a cell is JSON nested too deep.
    """
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), 1):
            place = f"row {number}"
            yield place, {k: v if k == column else cell_value(f"{path}, {place}", k, v) for k, v in row.items()}
    except csv.Error as error:
        raise UserError(f"cannot read {path}: {error}") from error


def cell_value(place: str, name: str | None, text: Any) -> Any:
    """A number, true or list where the text of a cell is one; prompts stay text.

    Raises:
        UserError: it is JSON nested too deep.
    """
    if name is None or "prompt" in name:
        return text
    try:
        return loads(text, MAX_ARGUMENT_DEPTH)
    except TooDeepError as error:
        raise UserError(f"{place}: the cell of `{name}` holds {error}") from error
    except (ValueError, TypeError):
        return text


def json_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file, each with its place in it.

    Raises:
        UserError: a line is none, or nested too deep.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _json_row(f"{path}, line {number}", line)


def _json_row(place: str, line: str) -> dict[str, Any]:
    try:
        if isinstance(row := loads(line, MAX_ARGUMENT_DEPTH + 1), dict):
            return row
    except TooDeepError as error:
        raise UserError(f"{place}: {error}") from error
    except ValueError:
        pass
    raise UserError(f'{place}: not a JSON object; write {{"prompt": "a red square", "image": "a.png"}}')


def _prompt(path: Path, place: str, row: dict[Any, Any]) -> Prompt:
    """The prompt of a row; an empty cell is an argument not given.

    Raises:
        UserError: the row has no prompt or a broken one, or more cells than there are columns.
    """
    if not isinstance(text := row.get("prompt"), str) or not text.strip():
        raise UserError(f"{path}, {place}: no `prompt`; the columns here are {', '.join(map(str, row))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}, {place}: half of a character, {text[error.start]!r}; write it as UTF-8") from error
    if None in row:
        raise UserError(f'{path}, {place}: more cells than columns; write a cell with a comma in it in "quotes"')
    arguments = {name: value for name, value in row.items() if name != "prompt" and value not in (None, "")}
    return Prompt(text.strip(), arguments, path.parent)


def with_image(prompts: Sequence[Prompt], image: Path | None) -> list[Prompt]:
    """The prompts, those without an image of their own with this one."""
    if image is None:
        return list(prompts)
    return [replace(each, arguments={"image": str(image.absolute())} | each.arguments) for each in prompts]


def choose_device(name: str) -> str:
    """The device called `name`; `auto` is the accelerator if there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def shorten(value: Any) -> str:
    """`value` in at most 40 characters."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


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
            arguments[name] = loads(value, MAX_ARGUMENT_DEPTH)
        except TooDeepError as error:
            raise UserError(f"--pipeline-arg {name} holds {error}") from None
        except ValueError:
            raise UserError(
                f"--pipeline-arg {text} is not NAME=JSON; write max_sequence_length=16, or 'negative_prompt=\"blurry\"'"
            ) from None
    return arguments


def progress_bar(visible: bool = True) -> Progress:
    """A progress bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not visible)
