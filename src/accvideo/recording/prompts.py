"""Prompts to record: read from tables or captioned from videos, checked, freed of duplicates, split in two."""

import csv
import hashlib
import io
import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tyro.conf import Positional

from accvideo.command import MAX_ARGUMENT_DEPTH, Prompt, csv_rows, json_rows
from accvideo.data.schema import is_deep
from accvideo.media import is_file, medium
from accvideo.recording.captions import CaptionConfig, caption_folder
from accvideo.trajectory import write_whole
from accvideo.types import UserError

TABLES = (".txt", ".csv", ".jsonl", ".parquet")
OUTPUTS = (".txt", ".csv", ".jsonl")

Row = tuple[str, dict[str, Any]]
"""Where it stands, and its cells by column."""


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Gathers prompts for `accvideo record` from tables, or by captioning a folder of videos.

    Prompts that differ in case, spaces and punctuation only are kept once. Whether one is held out depends on its words
    alone: further prompts move none.
    """

    sources: Positional[tuple[Path, ...]]
    """Files (.txt, .csv, .jsonl, .parquet), and folders of videos, which --model captions."""
    out: Path
    """File for the prompts: .txt, or .csv or .jsonl where columns are kept."""
    held_out: Path | None = None
    """File for the prompts that are held out; None: all go to `out`."""
    held_out_share: float = 0.05
    """Share of the prompts that is held out."""
    column: str = "prompt"
    """Column of the tables that holds the prompts."""
    keep: tuple[str, ...] = ()
    """Further columns to keep, each as an argument of the pipeline's call: ARGUMENT, or ARGUMENT=COLUMN such as
    image=first_frame. Columns called an image or video hold names of files, relative to the table, or, in Parquet, the
    files themselves, which are then written beside `out`."""
    near_duplicates: float = 0.0
    """Leave out prompts that share this much (0.5 to 1) of their runs of five letters with an earlier one; 0: off."""
    max_characters: int = 4000
    """Longer prompts are bad; text encoders read a few hundred words."""
    skip_bad: bool = False
    """Leave out bad prompts and videos, and count them, instead of stopping at them."""
    model: str | None = None
    """Folder or hub id of the vision-language model that captions videos, such as OpenGVLab/InternVL3-8B-hf."""
    instruction: str = "These are frames of one video, in order. Describe the video in detail."
    """What the model is asked for."""
    num_frames: int = 8
    """Frames of a video that the model is shown, evenly spaced."""
    max_new_tokens: int = 256
    """Most tokens of a caption."""
    device: str = "auto"
    """Torch device of the model; "auto": cuda where there is one."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError(f"no source: give files ({', '.join(TABLES)}) or folders of videos")
        kinds = OUTPUTS[1:] if self.keep else OUTPUTS
        for path in (self.out, *([self.held_out] if self.held_out else [])):
            if path.suffix.lower() not in kinds:
                raise UserError(
                    f"cannot write {path.name}: its name ends in one of {', '.join(kinds)}"
                    + (", for the columns that are kept" if self.keep else "")
                )
        if self.held_out == self.out:
            raise UserError(f"out and held_out are both {self.out}; give them two names")
        if not 0 < self.held_out_share < 1:
            raise UserError(f"held_out_share is {self.held_out_share}; choose a share between 0 and 1, such as 0.05")
        if self.near_duplicates and not 0.5 <= self.near_duplicates <= 1:
            raise UserError(f"near_duplicates is {self.near_duplicates}; choose 0 (off), or from 0.5 to 1, such as 0.8")
        for name in ("max_characters", "num_frames", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; the least is 1")


def prompts(config: PromptsConfig) -> dict[str, Any]:
    """Gather prompts from the sources, and write those to train on and those held out.

    Returns:
        The files, and the numbers of prompts read, written and left out.

    Raises:
        UserError: a source cannot be read, lacks a column, or holds bad prompts.
    """
    folders = [path for path in config.sources if path.is_dir()]
    if folders and (config.model is None or config.keep):
        raise UserError(
            f"{folders[0]} is a folder of videos, which a model captions; give it with --model"
            if config.model is None
            else f"{folders[0]} is a folder of videos, which has no columns to keep; leave out --keep"
        )
    found, bad = list[Prompt](), list[str]()
    for path in config.sources:
        if path not in folders:
            gather_table(path, config, found, bad)
    refuse(bad, config)  # before a model captions for hours
    for path in folders:
        gather_videos(path, config, found, bad)
    refuse(bad, config)
    for problem in bad:
        print(f"left out: {problem}", file=sys.stderr)

    different = without_duplicates(found)
    near = [False] * len(different)
    if config.near_duplicates:
        near = near_duplicates([normal_form(prompt.text) for prompt in different], config.near_duplicates)
    chosen = [prompt for prompt, left_out in zip(different, near, strict=True) if not left_out]
    apart = [config.held_out is not None and is_held_out(prompt.text, config.held_out_share) for prompt in chosen]
    kept = [prompt for prompt, away in zip(chosen, apart, strict=True) if not away]
    write_prompts(config.out, kept)
    summary = {"prompts": str(config.out), "num_prompts": len(kept)}
    if config.held_out is not None:
        held_out = [prompt for prompt, away in zip(chosen, apart, strict=True) if away]
        write_prompts(config.held_out, held_out)
        summary |= {"held_out": str(config.held_out), "num_held_out": len(held_out)}
    return summary | {
        "num_read": len(found) + len(bad),
        "num_duplicates": len(found) - len(different),
        "num_near_duplicates": sum(near),
        "num_bad": len(bad),
    }


def refuse(bad: Sequence[str], config: PromptsConfig) -> None:
    """Stop at bad prompts, unless they are to be skipped.

    Raises:
        UserError: they are not.
    """
    if bad and not config.skip_bad:
        more = f" (and {len(bad) - 1} more bad prompts)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}\nMend it, or leave bad prompts out with --skip-bad")


# --- Reading ---


def gather_table(path: Path, config: PromptsConfig, found: list[Prompt], bad: list[str]) -> None:
    """Add the prompts of a table, and what is wrong with its other rows.

    Raises:
        UserError: the table cannot be read, or lacks a column.
    """
    kept = {}
    for text in config.keep:
        argument, _, column = text.partition("=")
        kept[argument] = column or argument
    for place, cells in table_rows(path, [config.column, *kept.values()]):
        prompt = row_prompt(path.parent, cells, config, kept)
        if isinstance(prompt, str):
            bad.append(f"{path}, {place}: {prompt}")
        else:
            found.append(prompt)


def gather_videos(folder: Path, config: PromptsConfig, found: list[Prompt], bad: list[str]) -> None:
    """Add the captions of the videos in a folder, and what is wrong with its other videos.

    Raises:
        UserError: there are no videos, or the model cannot be loaded.
    """
    settings = CaptionConfig(str(config.model), config.instruction, config.num_frames, config.max_new_tokens)
    record = config.out.with_name(f"{config.out.stem}.captions.jsonl")
    captions, unread = caption_folder(folder, settings, record, config.device, config.skip_bad)
    bad += unread
    for name, caption in captions.items():
        if problem := text_problem(caption, config.max_characters):
            bad.append(f"the caption of {folder / name}: {problem}")
        else:
            found.append(Prompt(one_line(caption)))


def table_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a table, each with its place in the file; `columns` are there, the first holds the prompts.

    Raises:
        UserError: it cannot be read, is empty, or lacks a column.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        raise UserError(f"cannot read {path}: give a file ending in one of {', '.join(TABLES)}, or a folder of videos")
    rows_seen = 0
    for place, cells in parquet_rows(path) if suffix == ".parquet" else text_rows(path, suffix, columns[0]):
        if not rows_seen and (missing := [column for column in columns if column not in cells]):
            option = "--column " if missing[0] == columns[0] else "--keep ARGUMENT="
            raise UserError(
                f"{path}, {place}: no column `{missing[0]}`; the columns are {', '.join(map(str, cells))}\n"
                f"Name the right one: {option}NAME"
            )
        rows_seen += 1
        yield place, cells
    if not rows_seen:
        raise UserError(f"{path} holds no prompts")


def text_rows(path: Path, suffix: str, column: str) -> Iterator[Row]:
    """The rows of a .txt (one prompt a line), .csv or .jsonl file."""
    try:
        text = path.read_text("utf-8-sig")
        if suffix == ".txt":
            yield from ((f"line {i}", {column: line}) for i, line in enumerate(text.split("\n"), 1) if line.strip())
        elif suffix == ".csv":
            yield from csv_rows(path, text, column)
        else:
            yield from json_rows(path, text)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a .parquet file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("Parquet needs pyarrow: pip install 'accvideo[prompts]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def row_prompt(folder: Path, cells: Mapping[Any, Any], config: PromptsConfig, kept: Mapping[str, str]) -> Prompt | str:
    """The prompt of a row with the arguments that are kept, or what is wrong with it."""
    if None in cells:
        return 'more cells than columns; write a cell with a comma in it in "quotes"'
    text = cells.get(config.column)
    if text is not None and not isinstance(text, str):
        return f"the prompt is not text but {type(text).__name__}"
    if problem := text_problem(text or "", config.max_characters):
        return problem
    given = {argument: cells[column] for argument, column in kept.items() if cells.get(column) not in (None, "")}
    try:
        arguments = {argument: media_file(folder, argument, value, config.out) for argument, value in given.items()}
    except UserError as error:
        return str(error)
    for argument, value in arguments.items():
        if problem := value_problem(value):
            return f"the value for `{argument}` {problem}"
    return Prompt(one_line(text or ""), arguments)


def media_file(folder: Path, argument: str, value: Any, out: Path) -> Any:
    """A kept value, for a file of prompts `out`: the name of a file becomes relative to `out`.

    An image or video that stands in the table itself (bytes, or an object with `bytes` and `path`, as data sets on the
    Hub have it) is written beside `out`, by a name that follows from its bytes.

    Raises:
        UserError: there is no such file, or the bytes are no image.
    """
    name = value.get("path") if isinstance(value, dict) else None
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        path = out.parent / f"{out.stem}-media" / (hashlib.sha256(data).hexdigest()[:24] + suffix_of(data, name))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, data)
        return os.path.relpath(path, out.parent)
    value = name if isinstance(value, dict) else value
    if medium(argument, value) is None:
        return value
    if not is_file(folder / value):
        raise UserError(f"there is no file {folder / value}")
    return os.path.relpath((folder / value).resolve(), out.parent.resolve())


def suffix_of(data: bytes, name: str | None) -> str:
    """The ending for the name of a file: as the image in it says, else as a video's own name says.

    Raises:
        UserError: it is neither.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
            return f".{str(image.format).lower()}".replace(".jpeg", ".jpg")
    except Exception:  # of many kinds: Pillow's readers do not foresee every damage
        suffix = Path(name or "").suffix.lower()
        if medium("", f"a{suffix}") == "video":
            return suffix
        raise UserError(f"{len(data)} bytes that are no image") from None


# --- Checking, comparing, splitting ---


def text_problem(text: str, max_characters: int) -> str | None:
    """What is wrong with a prompt, or None."""
    if len(text) > max_characters:
        return f"{len(text)} characters; at most {max_characters} are taken (--max-characters)"
    for i, character in enumerate(text):
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\r\n":
            return f"the control character U+{ord(character):04X} at position {i}"
    return None if normal_form(text) else f"no words in {text!r}" if text.strip() else "an empty prompt"


def value_problem(value: Any) -> str | None:
    """What is wrong with a value that is kept for a file of prompts, or None."""
    if is_deep(value, MAX_ARGUMENT_DEPTH):
        return f"holds lists or objects more than {MAX_ARGUMENT_DEPTH} deep within each other"
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"holds half of a character, {str(error.object)[error.start]!r}"
    except TypeError as error:
        return f"cannot be written as JSON ({error})"
    return None


def one_line(text: str) -> str:
    """The text with each run of white space as one space."""
    return " ".join(text.split())


def normal_form(text: str) -> str:
    """The text without what makes no other prompt of it: case, punctuation, white space, forms of the same letter."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return one_line("".join(" " if unicodedata.category(each).startswith("P") else each for each in text))


def without_duplicates(found: Iterable[Prompt]) -> list[Prompt]:
    """The prompts without later ones that equal an earlier one in normal form and in their arguments."""
    first: dict[str, Prompt] = {}
    for prompt in found:
        first.setdefault(json.dumps([normal_form(prompt.text), prompt.arguments], sort_keys=True, default=str), prompt)
    return list(first.values())


def is_held_out(text: str, share: float) -> bool:
    """Whether a prompt is held out: a share of all are, told by a hash of the normal form."""
    digest = hashlib.sha256(normal_form(text).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


RUN = 5  # letters of the runs that near duplicates share
BANDS, BAND = (
    16,
    4,
)  # of the signatures: two texts that share half their runs meet in a band with probability 0.64, 0.8: 0.9998


def near_duplicates(texts: Sequence[str], similarity: float) -> list[bool]:
    """Whether each text shares at least `similarity` (Jaccard) of its runs of five letters with an earlier, kept one.

    Candidates are found by min-wise hashing (Broder 1997) in bands, and compared exactly.
    """
    generator = np.random.default_rng(0)
    factors = generator.integers(1, 2**63, BANDS * BAND, dtype=np.uint64) | np.uint64(1)
    buckets: dict[tuple[int, bytes], list[int]] = {}
    answers = []
    for number, text in enumerate(texts):
        runs = letter_runs(text)
        # The product's high half is the better hash; equal sets have equal minima.
        signature = ((runs[:, None] * factors) >> np.uint64(32)).min(0).reshape(BANDS, BAND)
        keys = [(band, row.tobytes()) for band, row in enumerate(signature)]
        candidates = {other for key in keys for other in buckets.get(key, ())}
        near = any(jaccard(runs, letter_runs(texts[other])) >= similarity for other in sorted(candidates))
        answers.append(near)
        if not near:
            for key in keys:
                buckets.setdefault(key, []).append(number)
    return answers


def letter_runs(text: str) -> np.ndarray:
    """Hashes of the distinct runs of five letters of a text; of the whole, if it is shorter."""
    letters = np.frombuffer(text.ljust(RUN).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(letters, RUN)
    powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, RUN + 1, dtype=np.uint64)
    return np.unique((windows * powers).sum(1, dtype=np.uint64))


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Size of the intersection of two sets over that of their union."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


# --- Writing ---


def write_prompts(path: Path, chosen: Sequence[Prompt]) -> None:
    """Write prompts as `command.read_prompt_file` reads them.

    Raises:
        UserError: there are none, or the file cannot be written.
    """
    if not chosen:
        raise UserError(f"no prompt is left for {path}; gather more, or choose another --held-out-share")
    rows = [{"prompt": prompt.text, **prompt.arguments} for prompt in chosen]
    suffix = path.suffix.lower()
    if suffix == ".txt":
        text = "".join(f"{row['prompt']}\n" for row in rows)
    elif suffix == ".csv":
        columns = list(dict.fromkeys(name for row in rows for name in row))
        sink = io.StringIO(newline="")
        # All is quoted: before Python 3.13 a lone carriage return would not be, and would end the row when it is read.
        writer = csv.DictWriter(sink, columns, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
        text = sink.getvalue()
    else:
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())
