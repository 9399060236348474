"""A pool on Ray records what one recorder does, whichever of its workers die."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from accvideo.data.verify import problems as verify
from accvideo.record import record
from accvideo.recording.config import RecordConfig
from accvideo.trajectory import trajectory_name
from accvideo.types import UserError
from tests.tiny import tiny_wan_pipeline


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordConfig:
    """Twelve trajectories in blocks of two, of paths relative to a folder that workers must enter."""
    pytest.importorskip("ray")
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


def kill_those_who_claim(folder: Path, number: int, killed: list[int]) -> None:
    """SIGKILL to some of the processes that claim blocks of a folder."""
    deadline = time.monotonic() + 300
    while len(killed) < number and time.monotonic() < deadline:
        for path in folder.glob(".block-*.claim"):
            try:
                pid = json.loads(path.read_text())["pid"]
                if pid not in killed and len(killed) < number:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            except (OSError, ValueError):  # given back, or not yet written
                pass
        time.sleep(0.001)


@pytest.mark.slow
def test_a_pool_loses_nothing_when_workers_die(config):
    """Two workers, of which two are killed over a block: each is replaced, and the bytes are those of one recorder."""
    import ray

    record(config)
    pooled: Any = replace(config, out=Path("pooled"), ray=True, num_workers=2)
    killed: list[int] = []
    ray.init(logging_level="error", log_to_driver=False)  # or the cluster of RAY_ADDRESS
    try:
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
    finally:
        ray.shutdown()


def test_workers_are_counted_on_ray_only(config):
    with pytest.raises(UserError, match="--num-workers is for --ray"):
        replace(config, num_workers=2)
