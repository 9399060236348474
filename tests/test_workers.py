"""Of those who want a piece of work one gets it, whoever dies at whatever moment."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tqdm.auto
import tqdm.std

from accvideo.recording.workers import LEFTOVER_SECONDS, BackgroundWriter, Claims, Place, find_place, is_gone
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
