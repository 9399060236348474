"""Workers that share one folder: which one this is, what it has claimed, and writing while it computes.

The file system is the queue. A worker claims a piece of work by creating a file that must not exist yet, touches it as
long as it lives, and removes it when the work is in the folder. The claim of a worker that has died is taken over: at
once on the same machine, where its process is seen to be gone, otherwise when the file has not been touched for a
while. Claims only save work: whoever does the same piece twice writes the same bytes and renames them into place.
"""

import functools
import hashlib
import json
import os
import platform
import re
import secrets
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from accvideo.command import choose_device
from accvideo.types import UserError

BEAT_SECONDS = 10.0
"""Between two touches of a claim."""
STALE_SECONDS = 120.0
"""Age at which a claim of another machine counts as left behind; clocks may differ by less."""
LEFTOVER_SECONDS = 3600.0
"""Age at which a half-written file of another machine counts as left behind."""
MAX_CLAIM_BYTES = 4096
"""The most that is read of a claim, which has about 250."""

CLAIM = re.compile(r"\.[a-z]+(-\d+)?\.claim")
OWNER = re.compile(r"\.(?P<machine>[0-9a-f]{12})-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{4}")
PARTIAL = re.compile(rf"\..+(?P<owner>{OWNER.pattern})\.tmp")


@dataclass(frozen=True)
class Place:
    """Which worker this is of those started together: a hint on where to begin, for work is claimed, not dealt out."""

    rank: int = 0
    num_workers: int = 1
    local_rank: int = 0
    """Among those on this machine."""


def find_place(environment: Mapping[str, str]) -> Place:
    """The place that torchrun or SLURM (srun, job arrays, or both) tell in the environment."""

    def number(name: str) -> int:
        return int(environment[name])

    place = Place()
    if "RANK" in environment and "WORLD_SIZE" in environment:
        place = Place(number("RANK"), number("WORLD_SIZE"), int(environment.get("LOCAL_RANK", 0)))
    elif "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
        place = Place(number("SLURM_PROCID"), number("SLURM_NTASKS"), int(environment.get("SLURM_LOCALID", 0)))
    if "SLURM_ARRAY_TASK_ID" in environment:
        step = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
        number_of_task = (number("SLURM_ARRAY_TASK_ID") - number("SLURM_ARRAY_TASK_MIN")) // step
        num_tasks = number("SLURM_ARRAY_TASK_COUNT")
        rank = number_of_task % num_tasks * place.num_workers + place.rank
        place = Place(rank, num_tasks * place.num_workers, place.local_rank)
    return place


@functools.cache
def machine() -> str:
    """Tells this machine from others, and from containers on it: a process number means something only inside."""
    parts = [platform.node()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def start_of(pid: int) -> int | None:
    """When a process of this machine started, in seconds; None when it is no more."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else int(process.create_time())
    except psutil.NoSuchProcess:
        return None


def is_gone(owner: str) -> bool:
    """Whether an owner of claims and half-written files is known to be dead: only of this machine is it known."""
    if not (match := OWNER.fullmatch(owner)) or match["machine"] != machine():
        return False
    start = start_of(int(match["pid"]))
    return start is None or abs(start - int(match["start"])) > 2  # the clock may have been set since


def look_at(path: Path) -> tuple[str, float]:
    """The text of a claim and when it was touched, in seconds; nothing and 0, so long ago, of what is none.

    That is a link, a pipe, a device or a large file: no recorder makes one there, and it is not opened.

    Raises:
        UserError: it is a folder, which is not taken away as others that are no claims are.
        OSError: it is not there, or cannot be read.
    """
    about = path.lstat()
    if stat.S_ISDIR(about.st_mode):
        raise UserError(f"{path} is a folder, where only the claims of recorders may be\nRemove it")
    if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_CLAIM_BYTES:
        return "", 0.0
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # another may lie there since
    with os.fdopen(descriptor, "rb"):  # opened, it is dated as the server has it, not as this machine remembers it
        return os.read(descriptor, MAX_CLAIM_BYTES).decode(errors="replace"), os.fstat(descriptor).st_mtime


def read_claim(text: str) -> dict[str, str]:
    """Owner, host, process and work in the text of a claim; empty where a machine died before it was on the disk."""
    try:
        claim = json.loads(text)
        names = ("owner", "host", "pid", "work")
        return {name: "".join(filter(str.isprintable, str(claim[name])))[:100] for name in names}
    except (ValueError, KeyError, TypeError, RecursionError):
        return dict.fromkeys(("owner", "host", "pid", "work"), "")


def at_work(name: str, text: str, age: float) -> str | None:
    """The worker that a claim or half-written file is of; None if it is neither, or was left behind.

    Args:
        name: of the file.
        text: in it, if it is a claim.
        age: seconds since it was touched.
    """
    claim = read_claim(text)
    if CLAIM.fullmatch(name):
        owner, longest = claim["owner"], STALE_SECONDS
    elif match := PARTIAL.fullmatch(name):
        owner, longest = match["owner"], LEFTOVER_SECONDS
    else:
        return None
    if is_gone(owner) or abs(age) >= longest:
        return None
    return f"process {claim['pid']} on {claim['host']}" if claim["pid"] else "a recorder"


class Claims:
    """The claims of one worker on pieces of work in a folder."""

    def __init__(self, folder: Path, work: str, stale_after: float = STALE_SECONDS):
        """Starts to touch what will be claimed.

        Args:
            folder: of the work; must exist.
            work: what all who share it have in common; see `rivals`.
            stale_after: seconds without a touch after which another machine's claim is taken over.
        """
        self.folder, self.work, self.stale_after = folder, work, stale_after
        self.writer = f".{machine()}-{os.getpid()}-{start_of(os.getpid())}-{secrets.token_hex(2)}"
        """This owner, as the ending of hidden names."""
        self._text = json.dumps({"owner": self.writer, "host": platform.node(), "pid": os.getpid(), "work": work})
        self._held: set[Path] = set()
        self._closed = threading.Event()
        self._beat = threading.Thread(target=self._touch, args=(min(BEAT_SECONDS, stale_after / 4),), daemon=True)
        self._beat.start()

    def take(self, name: str) -> bool:
        """Claims a piece of work, unless a living worker holds it.

        Args:
            name: lower-case letters, or such, a hyphen and a number.

        Raises:
            UserError: the folder cannot be written.
        """
        path = self.folder / f".{name}.claim"
        try:
            while True:
                if not os.path.lexists(path):
                    with suppress(FileExistsError):
                        self._make(path)
                        return True
                if not self._clear(path):
                    return False
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder}: {error.strerror}\nThe same command goes on from here"
            ) from error

    def release(self, name: str) -> None:
        """Gives a claim back."""
        self._remove(self.folder / f".{name}.claim")

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """A context in which no other worker is in the context of this name: waits for its turn."""
        while not self.take(name):
            time.sleep(0.02)
        try:
            yield
        finally:
            self.release(name)

    def rivals(self) -> list[str]:
        """Those who have claimed something in this folder for other work: host and process of each."""
        found = []
        for path in self.folder.glob(".*.claim"):
            if not CLAIM.fullmatch(path.name):
                continue
            with suppress(OSError):
                claim = read_claim(look_at(path)[0])
                if claim["work"] not in (self.work, "") and not self._clear(path):
                    found.append(f"process {claim['pid']} on {claim['host']}")
        return found

    def sweep(self) -> None:
        """Removes what dead workers have left in the folder: claims and half-written files."""
        with suppress(OSError):  # such as a full disk: another time, then
            for path in self.folder.glob(".*"):
                if CLAIM.fullmatch(path.name):
                    self._clear(path)
                elif match := PARTIAL.fullmatch(path.name):
                    if is_gone(match["owner"]) or abs(self._now() - path.lstat().st_mtime) > LEFTOVER_SECONDS:
                        path.unlink()

    def close(self) -> None:
        """Gives all claims back."""
        self._closed.set()
        for path in list(self._held):
            self._remove(path)

    def _make(self, path: Path) -> None:
        """Makes a claim that says from its first moment on whose it is, so that a kill leaves none of nobody.

        Raises:
            FileExistsError: another has.
        """
        whole = path.with_name(f"{path.name}{self.writer}.tmp")
        try:
            with whole.open("x") as file:
                file.write(self._text)
            try:
                os.link(whole, path)
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                with path.open("x") as file:
                    self._held.add(path)
                    file.write(self._text)
            self._held.add(path)
        finally:
            whole.unlink(missing_ok=True)

    def _remove(self, path: Path) -> None:
        self._held.discard(path)
        # Taken over by one who thought this worker dead, or nothing could be written to it.
        with suppress(OSError, UserError):
            if look_at(path)[0] in (self._text, ""):
                path.unlink()

    def _clear(self, path: Path) -> bool:
        """Removes a claim whose owner is dead or silent; says whether the way is free."""
        try:
            text, touched = look_at(path)
            # A date in the future is no touch: it would hold for ever.
            if not is_gone(read_claim(text)["owner"]) and abs(self._now() - touched) < self.stale_after:
                return False
            aside = path.with_name(f"{path.name}{self.writer}.tmp")
            os.rename(path, aside)  # of several who try, one succeeds
            if look_at(aside)[0] != text:  # which has taken the place since
                os.rename(aside, path)
                return False
            aside.unlink()
        except FileNotFoundError:
            pass
        return True

    def _now(self) -> float:
        """The time by the clock that dates files in the folder."""
        probe = self.folder / f".clock{self.writer}.tmp"
        try:
            with probe.open("xb") as file:  # made anew: a link under this name would lead elsewhere
                return os.fstat(file.fileno()).st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _touch(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            for path in list(self._held):
                with suppress(OSError):
                    os.utime(path, follow_symlinks=False)


class BackgroundWriter:
    """Does jobs one after another in a thread of its own, while their giver goes on with something else."""

    def __init__(self, num_waiting: int = 1):
        """Starts without jobs.

        Args:
            num_waiting: jobs that may wait for the one being done; each holds its data in memory.
        """
        self.num_waiting = num_waiting
        self._thread = ThreadPoolExecutor(1, "writer")
        self._jobs: deque[Future[None]] = deque()

    def put(self, job: Callable[[], None]) -> None:
        """Leaves a job to the thread, as soon as there is room; raises what an earlier one has raised."""
        while self._jobs and (self._jobs[0].done() or len(self._jobs) > self.num_waiting):
            self._jobs.popleft().result()
        self._jobs.append(self._thread.submit(job))

    def wait(self) -> None:
        """Waits until all is done; raises what a job has raised."""
        while self._jobs:
            self._jobs.popleft().result()

    def close(self) -> None:
        """Ends the thread when all is done; raises what a job has raised."""
        self._thread.shutdown()
        self.wait()


def own_device(name: str, place: Place) -> str:
    """The device called `name`; of several accelerators, each worker of a machine has its own."""
    device = choose_device(name)
    return f"cuda:{place.local_rank % torch.cuda.device_count()}" if device == "cuda" else device
