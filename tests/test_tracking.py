import re
import time
from pathlib import Path
from typing import Any, Literal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from accvideo.distill import DistillConfig, distill
from accvideo.training import tracking
from accvideo.training.checkpoint import read_metrics
from accvideo.training.tracking import scalars, tracked
from accvideo.types import UserError
from tests.recorded import record_tiny

ALARM = {"iteration": 3, "alarm": "diverging", "measured": 2.5, "threshold": 2.0, "message": "It diverges."}
LINES: list[dict[str, Any]] = [
    {"iteration": 0, "start": {"validation_loss": [0.5, 0.25], "latent_error": 0.75}},
    {"iteration": 0, "keypoint": 0, "trajectory_loss": 1.0, "seconds": 0.1},
    {"iteration": 1, "keypoint": 1, "trajectory_loss": 0.5, "seconds": 0.1},
    {"iteration": 2, "keypoint": 0, "trajectory_loss": 0.25, "seconds": 0.1},
    {"iteration": 2, "validation_loss": [0.4, 0.2], "latent_error": 0.5},
    ALARM,
]


def curves(out: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_each_key_point_is_a_curve():
    assert scalars(LINES[0]) == {
        "validation_loss/keypoint_0": 0.5, "validation_loss/keypoint_1": 0.25, "latent_error": 0.75
    }  # fmt: skip
    assert scalars(LINES[2]) == {"trajectory_loss/keypoint_1": 0.5, "seconds": 0.1}
    assert scalars(ALARM) == {"alarm/diverging": 2.5}


def test_tensorboard_shows_each_line_once_also_after_a_kill(tmp_path: Path):
    # Killed twice after iteration 2: the first time there was no checkpoint, the second time one of iteration 1.
    for begin, lines in ((0, LINES[:4]), (0, LINES[:4]), (1, LINES[2:])):
        with tracked("tensorboard", tmp_path, {}, begin) as write:
            for line in lines:
                write(line)
    found = curves(tmp_path)
    assert found["trajectory_loss/keypoint_0"] == [(0, 1.0), (2, 0.25)]
    assert found["trajectory_loss/keypoint_1"] == [(1, 0.5)]
    assert found["latent_error"] == [(0, 0.75), (2, 0.5)]
    assert found["alarm/diverging"] == [(3, 2.5)]


@pytest.mark.parametrize("installed", [True, False])
def test_a_distillation_goes_to_tensorboard_where_it_is_installed(
    tmp_path: Path, installed: bool, monkeypatch: pytest.MonkeyPatch
):
    """And works where it is not."""
    if not installed:
        monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    data = record_tiny(tmp_path)
    out = tmp_path / "student"
    distill(
        DistillConfig(
            data=data.path, out=out, num_iterations=6, batch_size=2, num_validation=2, validate_every=3, lora_rank=2,
            precision="float32", device="cpu",
        )
    )  # fmt: skip
    assert (out / "tensorboard").exists() == installed
    if installed:
        found = curves(out)
        for line in read_metrics(out / "metrics.jsonl"):
            for name, value in scalars(line).items():
                step, shown = next((step, shown) for step, shown in found[name] if step == line["iteration"])
                assert shown == pytest.approx(value, rel=1e-5), (name, step)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_at_once(
    tracker: Literal["tensorboard", "wandb"], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install 'accvideo\[{tracker}\]'"):
        DistillConfig(data=Path("data"), out=Path("out"), track=tracker)


def payload(file: bytes) -> str:
    """What a file of W&B holds, without the heads of its records: LevelDB's log, in blocks of 32 KiB."""
    found, at = b"", 7
    while at + 7 <= len(file):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length = int.from_bytes(file[at + 4 : at + 6], "little")
        found += file[at + 7 : at + 7 + length]
        at += 7 + length
    return found.decode("latin-1")


@pytest.mark.slow
def test_wandb_adds_no_traceback_to_the_message_of_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match="full"), tracked("wandb", tmp_path, {}, 0) as write:
        write(LINES[1])
        raise UserError("the disk is full")
    said = capfd.readouterr().err
    assert "wandb" in said and "Traceback" not in said


@pytest.mark.slow
def test_wandb_takes_the_metrics_of_a_run_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Offline, its own file of the run holds every number and the settings."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with tracked("wandb", tmp_path, {"learning_rate": 0.125}, 0) as write:
        for line in LINES:
            write(line)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    values = [item for line in LINES for item in scalars(line).items()]
    wanted = [("learning_rate", 0.125), *values]

    def missing() -> list[str]:
        data = payload(file.read_bytes())
        return [
            name
            for name, value in wanted
            if name not in data or not re.search(rf"\D{re.escape(format(value, 'g'))}\D", data)
        ]

    deadline = time.monotonic() + 60
    while (left := missing()) and time.monotonic() < deadline:  # a process of W&B's own writes the file
        time.sleep(0.2)
    assert not left
