"""Recording on Ray: a pool of workers with a pipeline each, given blocks as they finish; needs `accvideo[ray]`.

A worker is a recorder in a process of its own, on this machine or another of the cluster, that writes to the same
folder as all the others: see `accvideo.recording.workers`. One that dies is replaced, and its blocks are given out
again.
"""

import io
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stderr, suppress
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from rich.progress import Progress

from accvideo.command import progress_bar
from accvideo.data.manifest import read_manifest
from accvideo.record import POLL_SECONDS, Block, Recorder, summary
from accvideo.recording.config import RecordConfig
from accvideo.recording.joining import check_folder
from accvideo.recording.workers import Place
from accvideo.types import UserError

MAX_TRIES = 3
"""Workers that may die over one block, or one after another while they load the pipeline, before recording stops."""


def record_on_ray(config: RecordConfig) -> dict[str, Any]:
    """Records a data set, or the rest of one, with a pool of workers; returns a summary of what they did together.

    Raises:
        UserError: whatever the user can mend.
    """
    started = time.perf_counter()
    check_folder(config.out)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    if own := not ray.is_initialized():
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    try:
        kind, num_workers = workers_of(config, ray.cluster_resources())
        with progress_bar() as progress:
            pool = Pool(config, num_workers, {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}, progress)
            pool.run()
    finally:
        if own:
            ray.shutdown()
    done = summary(config.out, read_manifest(config.out), pool.num_recorded, pool.num_blocks, started)
    return done | {"num_workers": num_workers, "num_restarts": pool.num_restarts}


def workers_of(config: RecordConfig, resources: Mapping[str, float]) -> tuple[str, int]:
    """What each worker takes one of, "GPU" or "CPU", and the number of workers.

    Raises:
        UserError: more are asked for than there are.
    """
    kind = "GPU" if resources.get("GPU", 0) and config.device != "cpu" else "CPU"
    available = int(resources.get(kind, 0))
    num_workers = available if config.num_workers is None else config.num_workers
    if not 1 <= num_workers <= available:
        raise UserError(f"num_workers is {num_workers}: the Ray cluster has {available} {kind}s, one for each")
    return kind, num_workers


class Worker:
    """A recorder as an actor."""

    recorder: Recorder

    def open(self, config: RecordConfig, place: Place, folder: str) -> tuple[list[Block], str]:
        """Loads the pipeline; returns the blocks to record, and what was said on stderr.

        Args:
            config: of the recording.
            place: of this worker in the pool.
            folder: that relative paths start from.

        Raises:
            UserError: whatever the user can mend.
        """
        try:
            os.chdir(folder)
        except OSError as error:
            raise UserError(f"a worker on {os.uname().nodename} cannot enter {folder}: {error.strerror}") from error
        with redirect_stderr(io.StringIO()) as said:
            self.recorder = Recorder(config, place)
            blocks = self.recorder.missing()
        return blocks, said.getvalue()

    def record(self, block: Block) -> tuple[bool, bool]:
        """Records a block, if it is not done and nobody is at it; says whether it is done, and whether it was now."""
        before = self.recorder.num_blocks
        if not (done := self.recorder.record(block)):
            time.sleep(POLL_SECONDS)
        return done, self.recorder.num_blocks > before

    def flush(self) -> None:
        """Waits until all is written."""
        self.recorder.writer.wait()

    def close(self) -> None:
        """Gives back what is claimed."""
        self.recorder.close()


class Pool:
    """Workers, and the blocks that they are given."""

    def __init__(self, config: RecordConfig, num_workers: int, resources: Mapping[str, float], progress: Progress):
        """Does nothing yet.

        Args:
            config: of the recording.
            num_workers: pipelines at once.
            resources: that each takes, as arguments of `ray.remote`.
            progress: where blocks are counted.
        """
        self.config, self.num_workers, self.progress = config, num_workers, progress
        self.num_recorded = self.num_blocks = self.num_restarts = 0
        """Trajectories that were missing; blocks denoised, some perhaps twice; workers that took a dead one's place."""
        remote: Any = ray.remote
        self._actor_class = remote(**resources)(Worker)
        self._actors: dict[int, Any] = {}
        self._busy: dict[Any, tuple[int, Block | str]] = {}  # what is waited for -> worker and job
        self._idle: list[int] = []
        self._todo: dict[int, Block] = {}
        self._given: dict[int, list[Block]] = {}  # worker -> blocks that it has perhaps not written yet
        self._known: set[int] = set()  # numbers of all blocks that have been to do
        self._said: set[str] = set()
        self._deaths: Counter[int | None] = Counter()  # over a block, or over something else

    def run(self) -> None:
        """Records until all blocks are in the folder.

        Raises:
            UserError: a worker raised it, or workers die again and again.
        """
        bar = self.progress.add_task("blocks", total=None)
        for rank in range(self.num_workers):
            self._start(rank)
        while self._busy:
            [ready], _ = ray.wait(list(self._busy), num_returns=1)
            rank, job = self._busy.pop(ready)
            try:
                self._note(rank, job, ray.get(ready))
                self._idle.append(rank)
            except (RayActorError, OutOfMemoryError) as error:
                self._replace(rank, job, error)
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, UserError) else error from None
            self._give()
            left = len(self._todo) + sum(isinstance(each, Block) for _, each in self._busy.values())
            self.progress.update(bar, total=len(self._known), completed=len(self._known) - left)
        with suppress(RayActorError):
            ray.get([actor.close.remote() for actor in self._actors.values()])

    def _start(self, rank: int) -> None:
        self._actors[rank], self._given[rank] = self._actor_class.remote(), []
        opening = self._actors[rank].open.remote(self.config, Place(rank, self.num_workers), os.getcwd())
        self._busy[opening] = rank, "open"

    def _note(self, rank: int, job: Block | str, result: Any) -> None:
        if isinstance(job, Block):
            done, denoised = result
            self.num_blocks += denoised
            if not done:
                self._todo[job.number] = job
        elif job == "open":
            self._deaths[None] = 0
            blocks, said = result
            self._learn(blocks)
            for line in said.splitlines():
                if line not in self._said:
                    self.progress.console.print(line, markup=False, highlight=False)
            self._said.update(said.splitlines())
        else:
            self._given[rank].clear()

    def _learn(self, blocks: list[Block]) -> None:
        """Adds what a worker has found to do: all of the first one's, of others the damaged files in their share."""
        first = not self._known
        for block in blocks:
            if first or block.damaged:
                missing = block.missing if first else ()
                before = self._todo.get(block.number, Block(block.number))
                self._todo[block.number] = Block(
                    block.number, before.missing + missing, (*before.damaged, *block.damaged)
                )
                self._known.add(block.number)
                self.num_recorded += len(missing) + len(block.damaged)

    def _give(self) -> None:
        """Gives a block to each idle worker; those who get none finish writing."""
        while self._idle and self._todo:
            rank, block = self._idle.pop(), self._todo.pop(next(iter(self._todo)))
            self._given[rank].append(block)
            self._busy[self._actors[rank].record.remote(block)] = rank, block
        for rank in [rank for rank in self._idle if self._given[rank]]:
            self._idle.remove(rank)
            self._busy[self._actors[rank].flush.remote()] = rank, "flush"

    def _replace(self, rank: int, job: Block | str, error: Exception) -> None:
        """Starts another worker in the place of a dead one, whose blocks are to do again."""
        cause = job.number if isinstance(job, Block) else None
        self._deaths[cause] += 1
        if self._deaths[cause] == MAX_TRIES:
            what = "while they loaded the pipeline" if cause is None else f"over block {cause}"
            raise UserError(
                f"{MAX_TRIES} workers have died {what}: {str(error).strip().splitlines()[0]}\n"
                "Look into the logs of Ray; the same command goes on from here"
            )
        ray.kill(self._actors[rank])
        self._todo |= {block.number: block for block in self._given[rank]}
        self.num_restarts += 1
        self._start(rank)
