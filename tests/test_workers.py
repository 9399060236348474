"""Of those who want a piece of work one gets it, whoever dies at whatever moment."""

import errno
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import psutil
import pytest
import tqdm.auto
import tqdm.std

from accvideo.recording.workers import (
    LEFTOVER_SECONDS,
    BackgroundWriter,
    Claims,
    Place,
    at_work,
    find_place,
    is_gone,
)
from accvideo.types import UserError

ELSEWHERE = "0123456789ab-1-1700000000-abcd"
"""An owner on another machine."""


def fork(function: Callable[[], int | None]) -> int:
    """Run a function in a copy of this process, whose exit code is the result; returns the copy's number."""
    if (pid := os.fork()) == 0:
        code = 77
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):  # their lock is shared with copies, which may die with it
                bar.set_lock(threading.RLock())
            code = function() or 0
        finally:
            os._exit(code)
    return pid


def end_of(pid: int) -> int:
    """The exit code of a process, negative where a signal ended it; waits for it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def end_within(function: Callable[[], int | None], seconds: float = 60) -> int:
    """The exit code of a function in a copy of this process, which may take so long, and 2 GiB of memory."""

    def limited() -> int | None:
        most = psutil.Process().memory_info().vms + 2 * 1024**3
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        return function()

    pid, deadline = fork(limited), time.monotonic() + seconds
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            end_of(pid)
            pytest.fail(f"has not ended after {seconds:g} seconds")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


PLANTED = ("pipe", "device", "outside", "nowhere", "itself", "large")


def plant(kind: str, path: Path, outside: Path) -> None:
    """Puts something at a place that a recorder looks at."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(1 << 36)
    else:
        targets = {"device": Path("/dev/zero"), "outside": outside, "nowhere": outside / "nowhere", "itself": path}
        path.symlink_to(targets[kind])


def foreign_claim(folder: Path, name: str, age: float) -> Path:
    path = folder / f".{name}.claim"
    path.write_text(json.dumps({"owner": f".{ELSEWHERE}", "host": "elsewhere", "pid": 1, "work": "w"}))
    os.utime(path, (time.time() - age,) * 2)
    return path


ARRAY = {"SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_STEP": "2"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}, Place(5, 16, 1)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, Place(3, 8, 1)),
        # torchrun, which srun has started on each machine
        ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "SLURM_PROCID": "1"}, Place(9, 16, 1)),
        ({"SLURM_ARRAY_TASK_ID": "14", **ARRAY}, Place(2, 4, 0)),
        ({"SLURM_ARRAY_TASK_ID": "14", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", **ARRAY}, Place(5, 8, 0)),
    ],
)  # fmt: skip
def test_the_place_is_read_from_torchrun_and_slurm(environment, place):
    assert find_place(environment) == place


def test_one_holds_a_claim_at_a_time(tmp_path):
    one, two = Claims(tmp_path, "w"), Claims(tmp_path, "w")
    assert one.take("block-1") and not two.take("block-1") and two.take("block-2")
    one.release("block-1")
    assert two.take("block-1")
    two.close()
    assert one.take("block-1") and one.take("block-2")
    one.close()
    assert list(tmp_path.iterdir()) == []


def test_each_piece_goes_to_one_of_several_processes(tmp_path):
    """Also where a dead owner's claim is in the way of all of them."""
    for number in range(0, 40, 2):
        foreign_claim(tmp_path, f"block-{number}", age=1000)

    def take_all() -> int:
        claims = Claims(tmp_path, "w")
        taken = sum(claims.take(f"block-{number}") for number in range(40))
        (tmp_path / f"done-{os.getpid()}").touch()
        while len(list(tmp_path.glob("done-*"))) < 2:  # its claims die with it
            time.sleep(0.01)
        return taken

    pids = [fork(take_all) for _ in range(2)]
    assert sum(end_of(pid) for pid in pids) == 40


def test_the_claim_of_a_killed_process_is_free_at_once(tmp_path):
    """Even before its parent has taken notice; that of a living one is not."""

    def hold() -> None:
        Claims(tmp_path, "w").take("block-3")
        (tmp_path / "held").touch()
        time.sleep(600)

    pid = fork(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    claims = Claims(tmp_path, "w")
    assert not claims.take("block-3")
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not (taken := claims.take("block-3")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert taken
    end_of(pid)


@pytest.mark.parametrize("can_link", [True, False])
def test_a_claim_is_free_at_whatever_moment_its_taker_was_killed(tmp_path, monkeypatch, can_link):
    """Before each call that taking it makes, and each return; where files cannot be linked, but for one moment."""

    def take_and_die(moment: int) -> None:
        moments = count(1)

        def look(*_: object) -> None:
            if next(moments) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        claims = Claims(tmp_path, "w")
        sys.setprofile(look)
        claims.take("block-1")
        sys.setprofile(None)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    if not can_link:
        monkeypatch.setattr(os, "link", refuse)
    lost = 0
    for moment in count(1):
        ended, claims = end_of(fork(partial(take_and_die, moment))), Claims(tmp_path, "w")
        free = claims.take("block-1")
        lost += not free
        claims.close()
        for path in () if free else tmp_path.iterdir():
            path.unlink()
        claims.sweep()
        assert list(tmp_path.iterdir()) == []
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert moment > 20
    assert lost == 0 if can_link else lost > 0


def test_the_claim_of_another_machine_is_free_once_it_is_silent(tmp_path):
    claims = Claims(tmp_path, "w", stale_after=60)
    foreign_claim(tmp_path, "block-1", age=50)
    foreign_claim(tmp_path, "block-2", age=70)
    assert not claims.take("block-1") and claims.take("block-2")
    (tmp_path / ".block-4.claim").write_bytes(bytes(100))  # its machine died before it was on the disk
    assert not claims.take("block-4")
    os.utime(tmp_path / ".block-4.claim", (0, 0))
    assert claims.take("block-4")


def test_a_claim_is_kept_by_touching_it(tmp_path):
    """One whose owner hangs is lost, and what the next owner then holds is not given back by the first."""
    one, two = Claims(tmp_path, "w", stale_after=2), Claims(tmp_path, "w", stale_after=2)
    assert one.take("block-1")
    time.sleep(2.5)
    assert not two.take("block-1")
    one._closed.set()
    time.sleep(2.6)
    assert two.take("block-1")
    one.release("block-1")
    assert not one.take("block-1")


def test_turns_are_taken(tmp_path):
    """Read, add and write, in two processes at once: nothing is lost."""
    number = tmp_path / "number"
    number.write_text("0")

    def count() -> None:
        claims = Claims(tmp_path, "w")
        for _ in range(20):
            with claims.alone("manifest"):
                value = int(number.read_text())
                time.sleep(0.001)
                number.write_text(str(value + 1))

    assert [end_of(pid) for pid in [fork(count), fork(count)]] == [0, 0]
    assert number.read_text() == "40"


def test_rivals_are_those_alive_with_other_work(tmp_path):
    one, two, three = (Claims(tmp_path, work) for work in "aab")
    one.take("block-1")
    assert two.rivals() == [] and three.rivals() == [f"process {os.getpid()} on {os.uname().nodename}"]
    one.close()
    foreign_claim(tmp_path, "block-2", age=1000)
    assert three.rivals() == []


@pytest.mark.parametrize("action", ["take", "rivals", "sweep"])
@pytest.mark.parametrize("kind", PLANTED)
def test_what_is_no_claim_is_taken_away_and_not_opened(tmp_path, kind, action):
    """Where a link leads nothing is changed."""
    (folder := tmp_path / "work").mkdir()
    outside = foreign_claim(tmp_path, "elsewhere", age=10)
    before = outside.read_bytes(), outside.stat().st_mtime_ns
    plant(kind, folder / ".block-1.claim", outside)

    def act() -> None:
        claims = Claims(folder, "other")
        assert {"take": lambda: claims.take("block-1"), "rivals": lambda: claims.rivals() == [], "sweep": lambda: True}[
            action
        ]()
        claims.sweep()
        claims.close()

    assert end_within(act) == 0
    assert list(folder.iterdir()) == [] and (outside.read_bytes(), outside.stat().st_mtime_ns) == before


def test_a_folder_in_the_place_of_a_claim_is_told_and_left_alone(tmp_path):
    (tmp_path / ".block-1.claim").mkdir()
    claims = Claims(tmp_path, "w")
    for action in (lambda: claims.take("block-1"), claims.rivals, claims.sweep):
        with pytest.raises(UserError, match="block-1.claim is a folder") as error:
            action()
        assert len(str(error.value).splitlines()) == 2
    claims.close()
    assert [path.name for path in tmp_path.iterdir()] == [".block-1.claim"]


def test_a_date_in_the_future_does_not_hold_a_claim(tmp_path):
    """But for what clocks may differ by."""
    claims = Claims(tmp_path, "w", stale_after=60)
    foreign_claim(tmp_path, "block-1", age=-50)
    foreign_claim(tmp_path, "block-2", age=-1_000_000)
    assert not claims.take("block-1") and claims.take("block-2")
    text = (tmp_path / ".block-1.claim").read_text()
    assert at_work(".block-1.claim", text, -50) and not at_work(".block-1.claim", text, -1_000_000)


def test_a_link_in_the_place_of_what_is_held_changes_nothing_elsewhere(tmp_path):
    """Neither when the claim is touched, nor when it is given back, nor where the time is asked for."""
    (folder := tmp_path / "work").mkdir()
    outside = foreign_claim(tmp_path, "elsewhere", age=1000)
    before = outside.stat().st_mtime_ns
    claims = Claims(folder, "w", stale_after=0.4)
    assert claims.take("block-1")
    (folder / ".block-1.claim").unlink()
    (folder / ".block-1.claim").symlink_to(outside)
    (folder / f".clock{claims.writer}.tmp").symlink_to(outside)
    foreign_claim(folder, "block-2", age=10)
    with pytest.raises(UserError, match="cannot write to"):
        claims.take("block-2")
    assert claims.take("block-2")
    time.sleep(0.5)
    claims.close()
    assert list(folder.iterdir()) == [] and outside.exists() and outside.stat().st_mtime_ns == before


def test_what_a_claim_says_is_shown_in_one_line(tmp_path):
    claim = {"owner": f".{ELSEWHERE}", "host": "a\n\x1b[2Jb", "pid": "9" * 3000, "work": "other"}
    (tmp_path / ".block-1.claim").write_text(json.dumps(claim))
    assert Claims(tmp_path, "w").rivals() == [f"process {'9' * 100} on a[2Jb"]


def test_leftovers_are_swept(tmp_path):
    """Of the dead, and old ones of other machines; nothing else."""
    names = []

    def leave() -> None:
        claims = Claims(tmp_path, "w")
        claims.take("block-7")
        (tmp_path / f".000007.safetensors{claims.writer}.tmp").touch()

    end_of(fork(leave))
    claims = Claims(tmp_path, "w")
    claims.take("block-1")
    foreign_claim(tmp_path, "block-2", age=10)
    old, new = (tmp_path / f".00000{n}.safetensors.{ELSEWHERE}.tmp" for n in (1, 2))
    for path in (old, new, tmp_path / f".000001.safetensors{claims.writer}.tmp", tmp_path / ".note.tmp"):
        path.touch()
    os.utime(old, (time.time() - LEFTOVER_SECONDS - 10,) * 2)
    assert len(list(tmp_path.iterdir())) == 8
    claims.sweep()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(
        [".block-1.claim", ".block-2.claim", new.name, f".000001.safetensors{claims.writer}.tmp", ".note.tmp"]
    )


def test_a_process_number_used_again_is_another_owner(tmp_path):
    owner = Claims(tmp_path, "w").writer
    machine, pid, start, _ = owner.removeprefix(".").split("-")
    assert not is_gone(owner) and is_gone(f".{machine}-{pid}-{int(start) - 60}-0000")
    assert not is_gone(f".{ELSEWHERE}") and not is_gone("")


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    claims = Claims(tmp_path, "w")
    tmp_path.rmdir()
    with pytest.raises(UserError, match="cannot write to"):
        claims.take("block-1")


def test_jobs_are_done_in_order_while_more_are_given():
    """A giver waits only when too many are in line; closing waits for the last."""
    writer, done, gate = BackgroundWriter(num_waiting=1), [], threading.Event()
    writer.put(gate.wait)
    writer.put(lambda: done.append(1))
    threading.Timer(0.3, gate.set).start()
    began = time.monotonic()
    writer.put(lambda: done.append(2))
    assert time.monotonic() - began > 0.2
    writer.put(lambda: done.append(3))
    writer.close()
    assert done == [1, 2, 3]


def test_a_jobs_error_reaches_its_giver_and_the_others_are_done():
    def fail() -> None:
        raise UserError("the disk is full")

    done: list[int] = []
    for jobs in ([fail], [fail, lambda: done.append(1)]):
        writer = BackgroundWriter()
        with pytest.raises(UserError, match="the disk is full"):
            for job in jobs:
                writer.put(job)
            writer.close()
    writer = BackgroundWriter()
    writer.put(fail)
    with pytest.raises(UserError, match="the disk is full"):
        writer.wait()
    writer.put(lambda: done.append(2))
    writer.close()
    assert done[-1] == 2
