"""Record again what is bad in a data set, and nothing else."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from accvideo.command import progress_bar, shorten
from accvideo.data.dataset import Source, open_source
from accvideo.data.manifest import MANIFEST, Manifest
from accvideo.data.merge import parts_of
from accvideo.data.pack import archive
from accvideo.data.shards import INDEX, ShardIndex, read_member, shard_name
from accvideo.data.verify import Facts, Report, asked, check, strays
from accvideo.record import Recorder, record, record_blocks
from accvideo.recording.config import RecordConfig
from accvideo.recording.joining import make_folder
from accvideo.recording.workers import Place
from accvideo.trajectory import (
    encode_trajectory,
    read_trajectory,
    trajectory_name,
    write_pieces,
    write_whole,
)
from accvideo.types import UserError


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """Moves damaged trajectories aside, and records them and the missing ones again; in shards, too."""

    folder: Positional[Path]
    """Folder that `accvideo record`, `merge` or `pack` made."""
    prompts: tuple[Path, ...]
    """The file of prompts that it was recorded on; of a merged data set that of each recording, in order, if they
    differ."""
    image: Path | None = None
    """The first frame that it was recorded with, if one was given to all prompts."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one."""


@dataclass(frozen=True)
class Recording:
    """A part of a data set that was recorded in one go."""

    first: int
    """Number in the data set of its first trajectory."""
    manifest: Manifest
    """Of the recording alone."""
    prompts: Path

    def of(self, indices: Collection[int]) -> list[int]:
        """Its own numbers of those among some trajectories of the data set that are its."""
        numbers = range(self.first, self.first + self.manifest.num_trajectories)
        return [index - self.first for index in sorted(indices) if index in numbers]


def repair(config: RepairConfig) -> dict[str, Any]:
    """Mend a data set; what is recorded again has the bytes it had, on the same kind of device and library versions.

    Raises:
        UserError: it cannot be recorded again here, its prompts are others now, its manifest is of another data set, or
            recorders are at work in it.
    """
    source = open_source(config.folder)
    if at_work := strays(source)[1]:
        raise UserError(
            f"{config.folder} is being recorded by {at_work[0]}\nLet it end; it mends what it finds damaged"
        )
    if source.index is None and shard_name(0) in source.strays():
        raise UserError(
            f"{config.folder} holds shards, but no {INDEX}; take their files out with tar, and repair those"
        )
    recordings = recordings_of(source.manifest, config)
    report = check(source)
    bad = sorted({index for problem in report.problems for index in problem.indices})
    aside = config.folder.absolute().with_name(f"{config.folder.absolute().name}.bad")
    for problem in report.problems:
        print(problem.text, file=sys.stderr)
    if not report.facts and any(problem.foreign for problem in report.problems):
        raise UserError(
            f"{config.folder} holds no trajectory that was recorded with the settings in its {MANIFEST}\n"
            f"Put its own {MANIFEST} back; nothing was changed"
        )
    if source.index is None and not source.manifest.parts:
        for index in bad:
            move_aside(config.folder / trajectory_name(index), aside)
        num_recorded = record(settings_of(recordings[0], config, config.folder))["num_recorded"] if bad else 0
    else:
        num_recorded = mend(source, report, bad, recordings, config, aside)
    left = [problem.text for problem in check(open_source(config.folder)).problems]
    return {
        "folder": str(config.folder),
        "num_bad": len(bad),
        "num_recorded": num_recorded,
        "moved_to": str(aside) if aside.exists() else None,
        "num_problems": len(left),
        "problems": left,
    }


def recordings_of(manifest: Manifest, config: RepairConfig) -> list[Recording]:
    """The recordings that a data set is made of.

    Raises:
        UserError: there are not as many files of prompts, nor one for all.
    """
    parts, files = parts_of(manifest), config.prompts
    if len(files) not in (1, len(parts)):
        raise UserError(
            f"{config.folder} is made of {len(parts)} recordings, and {len(files)} files of prompts are given\n"
            "Give that of each recording, in order, or one that all were recorded on"
        )
    firsts = accumulate((part["num_trajectories"] for part in parts), initial=0)
    return [
        Recording(first, replace(manifest, parts=[], **part), files[number % len(files)])
        for number, (part, first) in enumerate(zip(parts, firsts, strict=False))
    ]


def mend(
    source: Source,
    report: Report,
    bad: Collection[int],
    recordings: Sequence[Recording],
    config: RepairConfig,
    aside: Path,
) -> int:
    """Records bad trajectories of merged or packed recordings elsewhere, then puts them in their places.

    Args:
        source: of the data set.
        report: what was found in it.
        bad: numbers of its bad trajectories.
        recordings: that it is made of.
        config: of the repair.
        aside: where bad files are put.

    Returns:
        How many were recorded.
    """
    folder = config.folder.absolute()
    again = folder.with_name(f".{folder.name}.again")  # kept when interrupted: the next repair goes on from there
    num_recorded = sum(record_again(each, bad, report.facts, config, again) for each in recordings)

    def recorded(index: int) -> bytes:
        own = next(each for each in reversed(recordings) if each.first <= index)
        trajectory = read_trajectory(again / str(own.first) / trajectory_name(index - own.first))
        return encode_trajectory(replace(trajectory, index=index))

    if source.index is None:
        for index in bad:
            move_aside(folder / trajectory_name(index), aside)
            write_whole(folder / trajectory_name(index), recorded(index))
    else:
        shards = {problem.shard for problem in report.problems if problem.shard is not None}
        mend_shards(source, source.index, shards, bad, recorded, folder, aside)
    shutil.rmtree(again, ignore_errors=True)
    return num_recorded


def record_again(
    recording: Recording, bad: Collection[int], facts: dict[int, Facts], config: RepairConfig, folder: Path
) -> int:
    """Records what is bad of a recording into a folder of its own, or the rest of it after an interruption.

    Args:
        recording: which.
        bad: numbers in the data set.
        facts: of the trajectories that are whole, to compare the prompts with.
        config: of the repair.
        folder: that folders of recordings are in, by the number of their first trajectory.

    Returns:
        How many were recorded.

    Raises:
        UserError: teacher, settings or prompts are others than those recorded.
    """
    if not (wanted := {*recording.of(bad)}):
        return 0
    make_folder(out := folder / str(recording.first))
    write_whole(out / MANIFEST, recording.manifest.to_json().encode())
    with Recorder(settings_of(recording, config, out), Place()) as recorder:
        for number in recording.of(facts):
            prompt = recorder.prompts[number % len(recorder.prompts)]
            if asked(prompt.text, prompt.arguments, recorder.media(prompt)) != facts[recording.first + number].asked:
                raise UserError(
                    f"{trajectory_name(recording.first + number)} in {config.folder} was not recorded on the prompt "
                    f"{shorten(prompt.text)} in {recording.prompts}, or with another image or argument\n"
                    "Restore what was changed; of a merged data set, give the file of each recording, in order"
                )
        blocks = [replace(each, missing=(*(i for i in each.missing if i in wanted),)) for each in recorder.missing()]
        with progress_bar() as progress:
            record_blocks(recorder, [each for each in blocks if each.missing or each.damaged], progress)
    return recorder.num_recorded


def mend_shards(
    source: Source,
    index: ShardIndex,
    shards: Collection[int],
    bad: Collection[int],
    recorded: Callable[[int], bytes],
    folder: Path,
    aside: Path,
) -> None:
    """Writes archives again, with what was recorded again in the place of what is bad.

    Args:
        source: of the data set.
        index: of its shards.
        shards: the archives to write again, besides those with bad trajectories.
        bad: numbers of the bad trajectories.
        recorded: gives their files.
        folder: of the data set.
        aside: where bad files are put.

    Raises:
        UserError: something cannot be written.
    """
    sizes = [list(each) for each in index.sizes]
    for number in bad:
        member = index.member(number)
        sizes[member.shard][number - index.firsts[member.shard]] = len(recorded(number))
        with suppress(UserError):  # nothing is there any more
            data = source.storage.read(shard_name(member.shard), member.start, member.size)
            write_whole(free_place(trajectory_name(number), aside), data)
    new = ShardIndex.of(sizes)

    def contents(shard: int) -> Iterator[bytes]:
        for number in range(index.firsts[shard], index.firsts[shard + 1]):
            yield recorded(number) if number in bad else read_member(source.storage, index, number)

    for shard in sorted({*shards, *(index.member(number).shard for number in bad)}):
        write_pieces(folder / shard_name(shard), archive(new, shard, contents(shard)))
    if new != index:
        write_whole(folder / INDEX, new.to_json().encode())


def free_place(name: str, folder: Path) -> Path:
    """Where a file of this name can be put in a folder, which is made; under another name if its own is taken.

    Raises:
        UserError: the folder cannot be made.
    """
    make_folder(folder)
    path, number = folder / name, 1
    while os.path.lexists(path):
        path, number = folder / f"{name}.{number}", number + 1
    return path


def move_aside(path: Path, aside: Path) -> None:
    """Move a file to another folder, under another name if its own is taken there; a missing one is left missing.

    Raises:
        UserError: it cannot be moved.
    """
    if not os.path.lexists(path):
        return
    try:
        os.rename(path, free_place(path.name, aside))
    except OSError as error:
        raise UserError(f"cannot move {path} to {aside}: {error.strerror}") from error


def settings_of(recording: Recording, config: RepairConfig, out: Path) -> RecordConfig:
    """The settings of a recording, into a folder; the recorder compares what they give with the manifest there."""
    manifest = recording.manifest
    scheduler = manifest.scheduler["config"]
    shift = next((scheduler[name] for name in ("flow_shift", "shift") if name in scheduler), None)
    dtype: Any = manifest.dtype
    solver: Any = manifest.solver
    return RecordConfig(
        teacher=manifest.teacher,
        prompts=recording.prompts,
        out=out,
        num_steps=manifest.num_steps,
        solver=solver,
        teacher_num_steps=manifest.teacher_num_steps or manifest.num_steps,
        num_student_steps=manifest.num_student_steps,
        image=config.image,
        guidance_scale=manifest.guidance_scale,
        height=manifest.height,
        width=manifest.width,
        num_frames=manifest.num_frames,
        fps=int(manifest.fps) if manifest.fps == int(manifest.fps) else None,
        shift=None if scheduler.get("use_dynamic_shifting") else shift,
        seed=manifest.seed,
        num_trajectories=manifest.num_trajectories,
        pipeline_arg=tuple(f"{name}={json.dumps(value)}" for name, value in manifest.pipeline_args.items()),
        batch_size=manifest.batch_size,
        dtype=dtype,
        device=config.device,
    )
