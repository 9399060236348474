"""Stage 1: runs the teacher on prompts and keeps the key states and conditional calls of each run."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from accvideo.call import replay, without_padding
from accvideo.command import (
    Prompt,
    progress_bar,
    read_prompt_file,
    shorten,
    with_image,
)
from accvideo.data.manifest import MANIFEST, Manifest
from accvideo.inference.acceleration import accelerate_pipeline, check_acceleration
from accvideo.inference.config import Acceleration
from accvideo.media import media_digests
from accvideo.recording.config import RecordConfig
from accvideo.recording.joining import check_folder, identity, make_folder, open_folder, read_header
from accvideo.recording.setup import call_arguments, check_prompts, items_arguments, make_manifest, set_shift
from accvideo.recording.solvers import solver_step
from accvideo.recording.workers import BackgroundWriter, Claims, Place, find_place, own_device
from accvideo.teacher import (
    Watch,
    WatchedStep,
    check_scheduler,
    denoisers,
    load_pipeline,
    pipeline_defaults,
    watch,
)
from accvideo.trajectory import (
    ForeignError,
    Trajectory,
    check_settings,
    misplaced,
    read_trajectory,
    trajectory_name,
    write_trajectory,
)
from accvideo.types import UserError

POLL_SECONDS = 2.0
"""Longest time between two looks at what other recorders are at."""


def record(config: RecordConfig) -> dict[str, Any]:
    """Records a data set, or the rest of one, and returns a summary of what this process did.

    Any number of processes may do so at once, on one machine or many that share the folder.

    Raises:
        UserError: whatever the user can mend; before the first denoiser call where it can be known by then.
    """
    started = time.perf_counter()
    if config.ray:
        if find_spec("ray") is None:
            raise UserError("--ray takes ray, which is not installed; pip install 'accvideo[ray]'")
        from accvideo.recording.ray_workers import record_on_ray

        return record_on_ray(config)
    place = find_place(os.environ)
    with Recorder(config, place) as recorder:
        blocks = recorder.missing()
        first = place.rank * len(blocks) // place.num_workers
        with progress_bar(visible=place.local_rank == 0) as progress:
            record_blocks(recorder, [*blocks[first:], *blocks[:first]], progress)
    return summary(config.out, recorder.manifest, recorder.num_recorded, recorder.num_blocks, started)


def record_blocks(recorder: "Recorder", blocks: Sequence["Block"], progress: Progress) -> None:
    """Records blocks until all are there, by this recorder or by others."""
    num_steps, waited, pending = recorder.manifest.num_steps, 0.0, dict.fromkeys(blocks)
    bar = progress.add_task("denoising steps", total=len(blocks) * num_steps)
    while pending:
        before = len(pending)
        for block in list(pending):
            done = (len(blocks) - len(pending)) * num_steps
            if recorder.record(block, lambda step, done=done: progress.update(bar, completed=done + step)):
                del pending[block]
        progress.update(bar, completed=(len(blocks) - len(pending)) * num_steps)
        if len(pending) == before:  # others are at all of them; should one die, its block is taken over
            if not waited:
                progress.console.print(f"waiting for {len(pending)} blocks that other recorders are at")
            time.sleep(waited := min(2 * waited + 0.05, POLL_SECONDS))


def summary(folder: Path, manifest: Manifest, num_recorded: int, num_blocks: int, started: float) -> dict[str, Any]:
    """What a recording has done since `started`, and what the folder holds."""
    files = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    return {
        "folder": str(folder),
        "num_trajectories": manifest.num_trajectories,
        "num_recorded": num_recorded,
        "denoiser_calls": manifest.denoiser_calls * num_blocks * manifest.batch_size,
        "nested_schedule": manifest.nested_schedule,
        "bytes": sum(entry.stat(follow_symlinks=False).st_size for entry in files),
        "seconds": time.perf_counter() - started,
    }


@dataclass(frozen=True)
class Block:
    """Items that are denoised together, and what there is to do for them."""

    number: int
    """Block b holds the items `b * batch_size` up to `(b + 1) * batch_size`."""
    missing: tuple[int, ...] = ()
    """Items without a file."""
    damaged: tuple[int, ...] = ()
    """Items with a file that is damaged."""


class Recorder:
    """A pipeline that records blocks of a data set into a folder, to which others may record at the same time."""

    def __init__(self, config: RecordConfig, place: Place):
        """Loads the pipeline and makes or joins the data set.

        Raises:
            UserError: whatever the user can mend.
        """
        self.config, self.place = config, place
        prompts = read_prompt_file(config.prompts)
        check_folder(config.out)
        device, acceleration = own_device(config.device, place), Acceleration(compile=config.compile)
        check_acceleration(acceleration, device)
        self.pipeline = load_pipeline(config.teacher, getattr(torch, config.dtype), device)
        if config.shift is not None:
            set_shift(self.pipeline, config.shift)
        check_scheduler(self.pipeline)
        defaults = pipeline_defaults(config.teacher)
        self.arguments = call_arguments(self.pipeline, config, defaults)
        self.prompts = with_image(prompts, config.image)
        check_prompts(self.pipeline, self.prompts, config)
        manifest, self.shared = make_manifest(self.pipeline, config, defaults, self.arguments, self.prompts)
        accelerate_pipeline(self.pipeline, acceleration, device)
        make_folder(config.out)
        self.num_recorded = self.num_blocks = 0
        self._padding_counts: bool | None = None  # to the denoisers; not known yet
        self.writer, self.claims = BackgroundWriter(), Claims(config.out, identity(manifest))
        try:
            self.manifest = open_folder(config.out, manifest, self.claims)
            self.claims.sweep()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finishes what is being written and gives all claims back.

        Raises:
            UserError: something could not be written.
        """
        try:
            self.writer.close()
        finally:
            self.claims.close()
            self.claims.sweep()

    def missing(self) -> list[Block]:
        """The blocks of which a trajectory is missing or damaged.

        Of all files that are there the header is read, and checksums of those that fall to this worker: of recorders
        that are started together each reads its share.

        Raises:
            UserError: a file was recorded with other settings, on another prompt, or with other arguments, images or
                videos.
        """
        found: dict[int, Block] = {}
        present = {entry.name for entry in os.scandir(self.config.out)}
        for index in range(self.manifest.num_trajectories):
            number = index // self.config.batch_size
            block = found.get(number, Block(number))
            own = number % self.place.num_workers == self.place.rank
            if trajectory_name(index) not in present:
                found[number] = replace(block, missing=(*block.missing, index))
            elif problem := self.check(index, whole=own):
                print(f"warning: {problem}; recording it again", file=sys.stderr)
                found[number] = replace(block, damaged=(*block.damaged, index))
        return list(found.values())

    def check(self, index: int, whole: bool) -> str | None:
        """What is wrong with the file of a trajectory, or None.

        Args:
            index: of the trajectory.
            whole: read all of it, not its header alone.

        Raises:
            UserError: the file cannot be read; or it was recorded with other settings, on another prompt, or with other
                arguments, images or videos.
        """
        path, prompt = self.config.out / trajectory_name(index), self.prompts[index % len(self.prompts)]
        try:
            if whole:
                trajectory = read_trajectory(path)
                check_settings(trajectory, self.manifest, str(path))
                if problem := misplaced(trajectory, index, self.manifest):
                    return f"{path}: {problem}"
                text, arguments, media = trajectory.prompt, trajectory.arguments, trajectory.media
            else:
                header = read_header(path)
                check_settings(header, self.manifest, str(path))
                text, arguments, media = header.prompt, header.arguments, None
        except ForeignError as error:
            raise UserError(
                f"{error}\nPut back what belongs there, {MANIFEST} or file; `accvideo repair` moves such files away"
            ) from error
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                raise
            return str(error)
        for old, new in ((text, prompt.text), (arguments, prompt.arguments)):
            if old != new:
                raise UserError(
                    f"{path} was recorded on the prompt {shorten(old)}, the file of prompts now has {shorten(new)}\n"
                    "Restore the file of prompts, or give another folder"
                )
        if media is not None and (now := self.media(prompt)) != media:
            changed = sorted(name for name in media.keys() | now.keys() if media.get(name) != now.get(name))
            file = {**self.arguments, **prompt.arguments}.get(changed[0])
            raise UserError(
                f"{path} was recorded with another {changed[0]} in {file} than is there now\n"
                "Restore that file, or give another folder"
            )
        return None

    def media(self, prompt: Prompt) -> dict[str, Any]:
        """SHA-256 of the images and videos that the pipeline is called with for a prompt."""
        return media_digests(self.arguments) | media_digests(prompt.arguments, prompt.folder)

    def record(self, block: Block, on_step: Callable[[int], None] | None = None) -> bool:
        """Records what is missing of a block, unless another recorder is at it; says whether it is done.

        It may still be waiting to be written when this returns: see `close`.

        Args:
            block: one of `missing`.
            on_step: called with the number of denoising steps taken, after each.

        Raises:
            UserError: the pipeline cannot be a teacher, or something could not be written.
        """
        if not block.damaged and not self._absent(block):
            return True
        name = f"block-{block.number}"
        if not self.claims.take(name):
            return False
        wanted = [*self._absent(block), *(index for index in block.damaged if self.check(index, whole=True))]
        if not wanted:  # another has recorded it since
            self.claims.release(name)
            return True
        size = self.config.batch_size
        items = range(block.number * size, (block.number + 1) * size)
        media = self.media(self.prompts[items[0] % len(self.prompts)])  # with several items it is the same for all
        solve = solver_step(self.config.solver)
        with watch(self.pipeline, self.manifest.keypoints[:-1], on_step, self.shared, solve) as seen:
            run: Any = self.pipeline
            run(
                num_inference_steps=self.config.num_steps,
                output_type="latent",
                **items_arguments(self.config, self.arguments, self.prompts, items),
            )
        seen.steps = self._without_padding(seen.steps)
        trajectories = trajectories_of(seen, self.manifest, items, self.prompts, media)
        if not self.manifest.denoiser_calls:  # the first of all: a pipeline that is refused leaves no data set
            manifest = replace(self.manifest, denoiser_calls=seen.num_calls)
            self.manifest = open_folder(self.config.out, manifest, self.claims)
        self.num_blocks += 1
        self.writer.put(lambda: self._write(name, [trajectories[index - items[0]] for index in wanted]))
        return True

    @torch.no_grad()
    def _without_padding(self, steps: list[WatchedStep]) -> list[WatchedStep]:
        """The steps, with zeros for the padding of prompts if no denoiser's output differs in a bit: it takes no space.

        Tried once, on the first prompt that is padded.
        """
        bare = [replace(step, call=without_padding(step.call)) for step in steps]
        if self._padding_counts is None and any(new.call is not old.call for new, old in zip(bare, steps, strict=True)):
            networks, firsts = denoisers(self.pipeline), {step.denoiser: step for step in reversed(steps)}
            self._padding_counts = not all(
                torch.equal(
                    *(replay(networks[name], call, step.state) for call in (step.call, without_padding(step.call)))
                )
                for name, step in firsts.items()
            )
        return steps if self._padding_counts else bare

    def _absent(self, block: Block) -> list[int]:
        return [index for index in block.missing if not (self.config.out / trajectory_name(index)).exists()]

    def _write(self, claim: str, trajectories: Sequence[Trajectory]) -> None:
        for trajectory in trajectories:
            write_trajectory(self.config.out, trajectory, self.claims.writer)
            self.num_recorded += 1
        self.claims.release(claim)


def trajectories_of(
    seen: Watch, manifest: Manifest, items: range, prompts: Sequence[Prompt], media: dict[str, Any]
) -> list[Trajectory]:
    """The trajectories of the items of one watched run, all with the same images and videos."""
    if seen.num_steps != manifest.num_steps or seen.final is None:
        raise UserError(f"the pipeline took {seen.num_steps} steps of {manifest.num_steps}; accvideo needs all of them")
    states = torch.stack([*(step.state for step in seen.steps), seen.final], dim=1)
    return [
        Trajectory(
            index=index,
            seed=manifest.seed,
            prompt=prompts[index % len(prompts)].text,
            states=states[row],
            calls=tuple(step.call.select(slice(row, row + 1)) for step in seen.steps),
            denoisers=tuple(step.denoiser for step in seen.steps),
            arguments=prompts[index % len(prompts)].arguments,
            media=media,
            settings=manifest.settings,
        )
        for row, index in enumerate(items)
    ]
