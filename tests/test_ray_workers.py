"""A pool on Ray records what one recorder does, whichever of its workers die."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from accvideo.data.verify import problems as verify
from accvideo.record import record
from accvideo.recording.config import RecordConfig
from accvideo.recording.workers import PARTIAL
from accvideo.trajectory import trajectory_name
from accvideo.types import UserError
from tests.tiny import tiny_wan_pipeline

pytestmark = pytest.mark.xdist_group("ray")  # one cluster for all of them, and one after the other


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, whose workers are processes below this one."""
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 leaves them next to nothing beside other tests
    ray.init(address="local", num_cpus=2, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordConfig:
    """Twelve trajectories in blocks of two, of paths relative to a folder that workers must enter."""
    tiny_wan_pipeline("dpm").save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("red square\na blue circle\ngreen\n")
    monkeypatch.chdir(tmp_path)
    return RecordConfig(
        teacher="teacher",
        prompts=Path("prompts.txt"),
        out=Path("one"),
        num_steps=2,
        num_student_steps=1,
        num_trajectories=12,
        batch_size=2,
        height=32,
        width=32,
        num_frames=5,
        pipeline_arg=("max_sequence_length=16",),
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_those_who_claim(folder: Path, number: int, killed: list[int], block: str = "*") -> None:
    """SIGKILL to some of the processes that claim blocks of a folder, or one block."""
    deadline = time.monotonic() + 300
    while len(killed) < number and time.monotonic() < deadline:
        for path in folder.glob(f".block-{block}.claim"):
            try:
                pid = json.loads(path.read_text())["pid"]
                if pid not in killed and len(killed) < number:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            except (OSError, ValueError):  # given back, or not yet written
                pass
        time.sleep(0.001)


@pytest.mark.slow
def test_a_pool_loses_nothing_when_workers_die(cluster, config):
    """Two workers, of which two are killed over a block: each is replaced, and the bytes are those of one recorder."""
    record(config)
    pooled: Any = replace(config, out=Path("pooled"), ray=True, num_workers=2)
    killed: list[int] = []
    killer = threading.Thread(target=kill_those_who_claim, args=(pooled.out, 2, killed))
    killer.start()
    summary = record(pooled)
    killer.join()
    assert len(killed) == 2 and summary["num_restarts"] == 2
    assert contents(pooled.out) == contents(config.out) and verify(pooled.out) == []
    assert summary["num_recorded"] == 12 and summary["num_workers"] == 2
    assert 12 * summary["denoiser_calls"] >= 12 * 12 * 4 and json.loads(json.dumps(summary)) == summary

    damaged, missing = (pooled.out / trajectory_name(number) for number in (3, 7))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    missing.unlink()
    assert record(pooled)["num_recorded"] == 2
    assert contents(pooled.out) == contents(config.out)

    Path("prompts.txt").write_text("red square\nan edited circle\ngreen\n")
    with pytest.raises(UserError, match='"a blue circle".*"an edited circle"'):
        record(pooled)
    with pytest.raises(UserError, match="num_workers is 9999: the Ray cluster has .* CPUs"):
        record(replace(pooled, num_workers=9999))


MOMENTS = ("loading", "denoising", "writing", "idle")


def titles() -> dict[int, str]:
    """What Ray calls the processes below this one, by their numbers."""
    names: dict[int, str] = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, IndexError):  # gone since
            names[process.pid] = process.cmdline()[0]
    return names


def those_at(moment: str, folder: Path) -> list[int]:
    """Processes of the workers that are at something now; who writes has begun a file."""
    if moment == "writing":
        partial = map(PARTIAL.fullmatch, os.listdir(folder) if folder.is_dir() else ())
        writers = [int(name["pid"]) for name in partial if name]
        return [pid for pid in writers if pid in titles()]
    title = {"loading": "ray::Worker.open", "denoising": "ray::Worker.record", "idle": "ray::Worker"}[moment]
    return [pid for pid, name in titles().items() if name == title]


def kill_at_each_moment(folder: Path, over: threading.Event, draw: random.Random, killed: list[str]) -> None:
    """SIGKILL to a worker at each of the moments, or a little later.

    In this order no three workers die over one block, or without one that has loaded since.
    """
    gone = set[int]()  # a killed process may be listed for a while
    for moment in MOMENTS:
        while not (found := [pid for pid in those_at(moment, folder) if pid not in gone]):
            if over.wait(0.001 if moment == "writing" else 0.02):
                return
        time.sleep(draw.random() * {"loading": 1.0, "denoising": 0.1}.get(moment, 0.0))
        gone.add(pid := draw.choice(found))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed.append(moment)


@pytest.mark.slow
def test_workers_may_die_at_any_moment(cluster, config):
    """One of two, while it loads, denoises, writes or waits, six times and more in some recordings on one cluster."""
    record(config)
    expected = contents(config.out)
    pooled: Any = replace(config, out=Path("pooled"), ray=True, num_workers=2)
    draw, killed, runs, restarts = random.Random(0), list[str](), 0, 0
    while runs < 6 and (len(killed) < 6 or min(map(killed.count, MOMENTS)) < 1):
        for number in draw.sample(range(12), 10) if runs else ():
            (pooled.out / trajectory_name(number)).unlink()
        over = threading.Event()
        killer = threading.Thread(target=kill_at_each_moment, args=(pooled.out, over, draw, killed))
        killer.start()
        try:
            restarts += record(pooled)["num_restarts"]
        finally:
            over.set()
            killer.join()
        assert contents(pooled.out) == expected
        runs += 1
    assert len(killed) >= 6 and min(map(killed.count, MOMENTS)) >= 1
    assert 0 < restarts <= len(killed)  # nobody misses one who had nothing left to do when it was killed


@pytest.mark.slow
def test_recording_stops_where_workers_die_over_a_block_and_keeps_the_others(cluster, config):
    record(config)
    expected = contents(config.out)
    pooled: Any = replace(config, out=Path("pooled"), ray=True, num_workers=2)
    killed: list[int] = []
    killer = threading.Thread(target=kill_those_who_claim, args=(pooled.out, 3, killed, "2"))
    killer.start()
    with pytest.raises(UserError, match="3 workers have died over block 2: .*\n.*same command goes on from here"):
        record(pooled)
    killer.join()
    recorded = {name: data for name, data in contents(pooled.out).items() if not name.startswith(".")}
    missing = expected.keys() - recorded.keys()
    # Of another block that was under way when the pool stopped, some may be missing too.
    assert len(killed) == 3 and {trajectory_name(4), trajectory_name(5)} <= missing < expected.keys()
    assert recorded == {name: data for name, data in expected.items() if name not in missing}
    assert record(replace(config, out=pooled.out))["num_recorded"] == len(missing)
    assert contents(pooled.out) == expected


def test_workers_are_counted_on_ray_only(config):
    with pytest.raises(UserError, match="--num-workers is for --ray"):
        replace(config, num_workers=2)
