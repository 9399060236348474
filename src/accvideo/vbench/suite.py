"""What VBench measures: which prompts, how many videos of each, and what their files are called.

VBench (Huang et al. 2024, arXiv:2311.17982) has a list of its own, 946 prompts of 16 dimensions, and finds the videos
by names made of the prompts. Of any other prompts it measures those dimensions that need no knowledge of them, and
takes the prompts from a file.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accvideo.command import Prompt, read_prompt_file
from accvideo.data.schema import loads
from accvideo.types import UserError
from accvideo.vbench.scores import ANY_PROMPT, DIMENSIONS

NUM_VIDEOS = 5
"""Videos of each prompt that VBench looks at, numbered from 0."""

LIST_NAME = "VBench_full_info.json"
"""What VBench calls its list of prompts."""

FIRST_ITEM = 2_000_000
"""Number of the first item of the videos, past those of recordings and of an evaluation's rows: another noise."""

ITEMS_OF_PROMPT = 100
"""Numbers of items kept for each prompt, so that more videos of one leave the noise of the others alone."""

LONGEST_NAME = 255
"""Bytes of a file's name on common file systems."""


@dataclass(frozen=True)
class Video:
    """One video to make."""

    name: str
    """Of its file."""
    prompt: Prompt
    """What the model is given."""
    item: int
    """Number that makes its noise."""


@dataclass(frozen=True)
class Suite:
    """The videos that VBench needs, and what it is told of them."""

    videos: list[Video]
    """Those numbered 0 to 4 of all prompts, then the further ones for temporal flickering."""
    prompts: list[Prompt]
    """What the models are given, one for each name."""
    listing: list[dict[str, Any]] | None
    """VBench's own list; None: the prompts are the user's."""
    num_flicker: int = NUM_VIDEOS
    """Videos of each prompt of temporal flickering."""

    @property
    def dimensions(self) -> list[str]:
        """What VBench can measure of these prompts."""
        if self.listing is None:
            return list(ANY_PROMPT)
        return [name for name in DIMENSIONS if any(name in entry["dimension"] for entry in self.listing)]

    def num_measured(self, dimension: str) -> int:
        """Videos that VBench looks at for a dimension."""
        if self.listing is None:
            return len(self.videos)
        return NUM_VIDEOS * sum(dimension in entry["dimension"] for entry in self.listing)

    def prompt_file(self) -> dict[str, str]:
        """The user's prompts by names of files, as VBench's `--prompt_file` has them."""
        return {video.name: video.prompt.text for video in self.videos}


def read_suite(prompts: Path | None, texts: Path | None, num_flicker: int) -> Suite:
    """The videos that VBench needs.

    Args:
        prompts: VBench's list (.json) or the user's prompts; None: the list of the installed package.
        texts: what the models are given in place of the list's prompts, one a line; None: these themselves.
        num_flicker: videos of each prompt of temporal flickering.

    Raises:
        UserError: there is no list, or one of the files is not of its form.
    """
    if prompts is not None and prompts.suffix.lower() != ".json":
        if texts is not None or num_flicker != NUM_VIDEOS:
            option = "--vbench-texts" if texts is not None else "--vbench-flicker"
            raise UserError(f"{option} is for VBench's own list, and {prompts} is another\nLeave one of them out")
        return own_suite(read_prompt_file(prompts))
    listing = read_listing(prompts or packaged_list())
    return standard_suite(listing, None if texts is None else read_texts(texts, len(listing)), num_flicker)


def own_suite(prompts: Sequence[Prompt]) -> Suite:
    """Any prompts; the files are called by number, since a prompt may hold what a name cannot."""
    videos = [
        Video(f"{number:06d}-{index}.mp4", prompt, FIRST_ITEM + ITEMS_OF_PROMPT * number + index)
        for number, prompt in enumerate(prompts)
        for index in range(NUM_VIDEOS)
    ]
    return Suite(videos, list(prompts), None)


def standard_suite(listing: list[dict[str, Any]], texts: Sequence[str] | None, num_flicker: int) -> Suite:
    """VBench's list; the files are called `{prompt}-{index}.mp4`.

    Two prompts of the list stand in it twice. They share their videos, of the text that stands last.

    Args:
        listing: the list.
        texts: what the models are given, one for each entry; None: the prompts themselves.
        num_flicker: videos of each prompt of temporal flickering.

    Raises:
        UserError: a prompt cannot be a file's name.
    """
    names = [entry["prompt_en"] for entry in listing]
    given = dict(zip(names, texts or names, strict=True))
    still = {entry["prompt_en"] for entry in listing if "temporal_flickering" in entry["dimension"]}
    first, further = [], []
    for number, (name, text) in enumerate(given.items()):
        for index in range(num_flicker if name in still else NUM_VIDEOS):
            video = Video(f"{name}-{index}.mp4", Prompt(text), FIRST_ITEM + ITEMS_OF_PROMPT * number + index)
            check_name(video.name)
            (first if index < NUM_VIDEOS else further).append(video)
    return Suite([*first, *further], [Prompt(text) for text in given.values()], listing, num_flicker)


def check_name(name: str) -> None:
    """Refuse a prompt that VBench could not find the videos of.

    Raises:
        UserError: see there.
    """
    what = None
    if "/" in name or "\0" in name:
        what = "it holds a slash" if "/" in name else "it holds a null character"
    elif (length := len(os.fsencode(name))) > LONGEST_NAME:
        what = f"the name would have {length} bytes, and file systems take {LONGEST_NAME}"
    if what is not None:
        raise UserError(
            f"VBench finds videos by names made of prompts, and {name[:40]!r}... cannot be one: {what}\n"
            "Put such prompts into a text file, one a line: their videos are called by number"
        )


def packaged_list() -> Path:
    """The list in the installed package `vbench`, which is not imported.

    Raises:
        UserError: it is not installed.
    """
    spec = find_spec("vbench")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (path := Path(folder) / LIST_NAME).is_file():
            return path
    raise UserError(
        "VBench's prompts are not here: pip install --no-deps vbench, or give --prompts a text file of your own\n"
        f"or {LIST_NAME}, which is in the folder `vbench` of github.com/Vchitect/VBench"
    )


def read_listing(path: Path) -> list[dict[str, Any]]:
    """VBench's list from its file.

    Raises:
        UserError: the file is not of that form.
    """
    try:
        listing = loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; give VBench's {LIST_NAME}") from error
    if not isinstance(listing, list) or not listing or not all(map(is_entry, listing)):
        raise UserError(
            f"{path} is no list of VBench's: its objects have `prompt_en` and `dimension`, a list of names\n"
            "Prompts of your own go into a .txt, .csv or .jsonl file"
        )
    return listing


def is_entry(entry: Any) -> bool:
    """Whether this is a prompt of VBench's list, of dimensions that are known."""
    if not isinstance(entry, Mapping):
        return False
    prompt, dimensions = entry.get("prompt_en"), entry.get("dimension")
    return isinstance(prompt, str) and isinstance(dimensions, list) and set(dimensions) <= set(DIMENSIONS)


def read_texts(path: Path, num_prompts: int) -> list[str]:
    """What the models are given in place of the list's prompts, one a line.

    Raises:
        UserError: there are more or fewer lines than prompts, or one is empty.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").rstrip().split("\n")]
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if len(lines) != num_prompts or not all(lines):
        what = f"{len(lines)} lines" if all(lines) else f"an empty line {lines.index('') + 1}"
        raise UserError(
            f"{path} has {what}: it takes a text for each of VBench's {num_prompts} prompts, in the order of its list"
        )
    return lines


def spread(prompts: Sequence[Prompt], num: int) -> list[Prompt]:
    """At most this many of the prompts, at equal distances: neighbors in VBench's list are of one dimension."""
    num = min(num, len(prompts))
    return [prompts[i * len(prompts) // num] for i in range(num)]
