"""Check a data set: every checksum, shape and place."""

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tyro.conf import Positional

from accvideo.data.dataset import NUM_AHEAD, Source, ahead, open_source
from accvideo.data.shards import bad_ends
from accvideo.data.storage import LocalStorage
from accvideo.recording.workers import at_work
from accvideo.trajectory import Trajectory, trajectory_name
from accvideo.types import UserError

MAX_CLAIM_BYTES = 4096
"""What is read of a claim."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Checks every checksum and shape of a data set, and names each bad file."""

    data: Positional[str]
    """Folder that `accvideo record` or `accvideo pack` made, or its address (https://, s3://, hf:// and others)."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file."""

    text: str
    """One line that names it."""
    indices: tuple[int, ...] = ()
    """The trajectories to record again."""


@dataclass(frozen=True)
class Facts:
    """What is kept of a whole trajectory while the others are checked."""

    shape: tuple[int, ...]
    content: bytes
    """Digest of noise, prompt and arguments: no two trajectories have the same."""
    finite: bool


def facts(trajectory: Trajectory) -> Facts:
    """What the check of the others needs to know."""
    states = trajectory.states
    asked = json.dumps([trajectory.prompt, trajectory.arguments], sort_keys=True)
    content = hashlib.sha256(asked.encode() + tensor_bytes(states[0])).digest()
    return Facts(tuple(states.shape), content, bool(states.isfinite().all()))


def tensor_bytes(tensor: Tensor) -> bytes:
    """The memory of a tensor."""
    return tensor.contiguous().numpy().tobytes()


def examine(source: Source, number: int) -> Facts | str:
    """What a trajectory is, or what is wrong with its file."""
    name = trajectory_name(number)
    if source.index is None and source.sizes is not None and name not in source.sizes:
        return f"{source.where(number)}: missing"
    try:
        return facts(source.read(number))
    except UserError as error:
        return str(error)


def check(source: Source) -> Iterator[Problem]:
    """All that is wrong with a data set."""
    numbers = range(source.manifest.num_trajectories)
    whole: dict[int, Facts] = {}
    for number, result in zip(numbers, ahead(lambda number: examine(source, number), numbers, NUM_AHEAD), strict=True):
        if isinstance(result, Facts):
            whole[number] = result
        else:
            yield Problem(result, (number,))
    common = Counter(each.shape for each in whole.values()).most_common(1)
    seen: dict[bytes, int] = {}
    for number, each in whole.items():
        where = source.where(number)
        if each.shape != common[0][0]:
            yield Problem(f"{where}: states {list(each.shape)}, most others {list(common[0][0])}", (number,))
        elif not each.finite:
            yield Problem(f"{where}: states that are not finite", (number,))
        elif each.content in seen:
            # Which of the two is the copy cannot be told from them.
            first = seen[each.content]
            text = f"{where}: has the noise and the prompt of {trajectory_name(first)}"
            yield Problem(text, (first, number))
        seen.setdefault(each.content, number)
    if source.index is not None:
        yield from map(Problem, bad_ends(source.storage, source.index))
    for name in strays(source)[0]:
        yield Problem(f"{source.storage.address}/{name}: does not belong to the data set")


def strays(source: Source) -> tuple[list[str], list[str]]:
    """Names of what does not belong to a data set, and which recorders are at work in it, as far as can be seen.

    Their claims and half-written files belong there as long as they live.
    """
    names, recorders, storage = [], set(), source.storage
    for name in source.strays():
        if isinstance(storage, LocalStorage):
            path, worker = storage.root / name, None
            with suppress(UserError, OSError):
                text = storage.read(name, 0, MAX_CLAIM_BYTES).decode(errors="replace")
                worker = at_work(name, text, time.time() - path.lstat().st_mtime)
            if not os.path.lexists(path):  # given back since the folder was listed
                continue
            if worker is not None:
                recorders.add(worker)
                continue
        names.append(name)
    return names, sorted(recorders)


def problems(address: Path | str) -> list[str]:
    """All that is wrong with a data set, one line a problem, each naming its file; empty when it is whole."""
    try:
        return [problem.text for problem in check(open_source(address))]
    except UserError as error:
        return [str(error)]


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Name every bad file on stderr; the summary lists them too."""
    try:
        source = open_source(config.data)
        found, recorders = [problem.text for problem in check(source)], strays(source)[1]
    except UserError as error:
        found, recorders = [str(error)], []
    for problem in found:
        print(problem, file=sys.stderr)
    if recorders:
        print(f"{config.data} is being recorded by {', '.join(recorders)}: what is missing may come", file=sys.stderr)
    return {"folder": config.data, "num_problems": len(found), "problems": found, "recorders": recorders}
