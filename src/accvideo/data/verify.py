"""Check a data set: every checksum, shape and place."""

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tyro.conf import Positional

from accvideo.data.dataset import NUM_AHEAD, Source, ahead, open_source
from accvideo.data.shards import bad_ends
from accvideo.data.storage import LocalStorage
from accvideo.recording.workers import MAX_CLAIM_BYTES, at_work
from accvideo.trajectory import ForeignError, Trajectory, trajectory_name
from accvideo.types import UserError


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
    shard: int | None = None
    """The archive that is to be written again, where no trajectory in it is bad."""
    foreign: bool = False
    """Whether a trajectory is whole, but was recorded with other settings than those in the manifest."""


@dataclass(frozen=True)
class Facts:
    """What is kept of a whole trajectory while the others are checked."""

    shape: tuple[int, ...]
    asked: bytes
    """See `asked`."""
    content: bytes
    """Digest of what was asked and the noise: no two trajectories have the same."""
    finite: bool


@dataclass(frozen=True)
class Report:
    """All that was found in a data set."""

    problems: list[Problem]
    facts: dict[int, Facts]
    """Of the trajectories whose files are whole."""


def asked(prompt: str, arguments: Mapping[str, Any], media: Mapping[str, Any]) -> bytes:
    """Digest of all that is a trajectory's own in the call of the pipeline, but for the noise."""
    return hashlib.sha256(json.dumps([prompt, arguments, media], sort_keys=True).encode()).digest()


def facts(trajectory: Trajectory) -> Facts:
    """What the check of the others needs to know."""
    states, own = trajectory.states, asked(trajectory.prompt, trajectory.arguments, trajectory.media)
    content = hashlib.sha256(own + tensor_bytes(states[0])).digest()
    return Facts(tuple(states.shape), own, content, bool(states.isfinite().all()))


def tensor_bytes(tensor: Tensor) -> bytes:
    """The memory of a tensor."""
    return tensor.contiguous().numpy().tobytes()


def examine(source: Source, number: int) -> Facts | Problem:
    """What a trajectory is, or what is wrong with its file."""
    name = trajectory_name(number)
    if source.index is None and source.sizes is not None and name not in source.sizes:
        return Problem(f"{source.where(number)}: missing", (number,))
    try:
        return facts(source.read(number))
    except UserError as error:
        return Problem(str(error), (number,), foreign=isinstance(error, ForeignError))


def check(source: Source) -> Report:
    """Reads all of a data set."""
    numbers = range(source.manifest.num_trajectories)
    report = Report([], {})
    for number, result in zip(numbers, ahead(lambda number: examine(source, number), numbers, NUM_AHEAD), strict=True):
        if isinstance(result, Facts):
            report.facts[number] = result
        else:
            report.problems.append(result)
    report.problems.extend(among(report.facts, source))
    if source.index is not None:
        report.problems.extend(Problem(text, shard=shard) for shard, text in bad_ends(source.storage, source.index))
    address = source.storage.address
    report.problems.extend(Problem(f"{address}/{name}: does not belong to the data set") for name in strays(source)[0])
    return report


def among(whole: Mapping[int, Facts], source: Source) -> Iterator[Problem]:
    """What is wrong with files that are whole, seen beside the others."""
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
        return [problem.text for problem in check(open_source(address)).problems]
    except UserError as error:
        return [str(error)]


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Name every bad file on stderr; the summary lists them too."""
    try:
        source = open_source(config.data)
        found, recorders = [problem.text for problem in check(source).problems], strays(source)[1]
    except UserError as error:
        found, recorders = [str(error)], []
    for problem in found:
        print(problem, file=sys.stderr)
    if recorders:
        print(f"{config.data} is being recorded by {', '.join(recorders)}: what is missing may come", file=sys.stderr)
    return {"folder": config.data, "num_problems": len(found), "problems": found, "recorders": recorders}
