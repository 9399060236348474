"""The count of iterations in which no step was taken, because a loss or gradient was not finite."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from accvideo.data.dataset import TrajectoryFolder
from accvideo.distill import DistillConfig, distill
from accvideo.training.checkpoint import checkpoints, read_metrics
from accvideo.training.tracking import scalars
from accvideo.trajectory import TrajectoryBatch
from tests.recorded import record_tiny


@dataclass
class Spoiled:
    """What is wrong with a data set."""

    bad: set[int] = field(default_factory=lambda: {1, 4, 5, 8})
    """Numbers of batches with values that are not finite."""
    stop: set[int] = field(default_factory=set)
    """Numbers of batches at which a training is interrupted."""


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Spoiled:
    spoiled, original = Spoiled(), TrajectoryFolder.batches

    def batches(folder: TrajectoryFolder, size: int, seed: int, first: int, *place: Any) -> Iterator[TrajectoryBatch]:
        for number, batch in enumerate(original(folder, size, seed, first, *place), first):
            if number in spoiled.stop:
                raise KeyboardInterrupt
            yield replace(batch, states=batch.states + math.inf) if number in spoiled.bad else batch

    monkeypatch.setattr(TrajectoryFolder, "batches", batches)
    return spoiled


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    """Ten iterations, with checkpoints after 3 and 10 of them: after 6 and 9 it is among bad batches."""
    return DistillConfig(
        data=record_tiny(tmp_path, num_steps=4, num_student_steps=2).path, out=tmp_path / "student",
        num_iterations=10, batch_size=2, num_validation=2, save_every=3, lora_rank=2, adversarial_weight=0,
        precision="float32", device="cpu", track="none",
    )  # fmt: skip


def counts(out: Path) -> list[int]:
    return [line["num_skipped"] for line in read_metrics(out / "metrics.jsonl") if "keypoint" in line]


def test_skipped_iterations_are_counted_and_told(
    config: DistillConfig, spoiled: Spoiled, capsys: pytest.CaptureFixture[str]
):
    """In each line of metrics, in the summary, also of a student that is finished, and at the end if there are any."""
    assert distill(config)["num_skipped"] == 4
    assert counts(config.out) == [0, 1, 1, 1, 2, 3, 3, 3, 4, 4]
    assert "4 of 10 iterations were skipped" in capsys.readouterr().err
    assert distill(config)["num_skipped"] == 4
    spoiled.bad.clear()
    good = replace(config, out=config.out.with_name("good"))
    capsys.readouterr()
    assert distill(good)["num_skipped"] == 0 and counts(good.out) == [0] * 10
    assert "skipped" not in capsys.readouterr().err


@pytest.mark.parametrize("by_earlier_version", [False, True])
def test_the_count_goes_on_where_a_training_does(config: DistillConfig, spoiled: Spoiled, by_earlier_version: bool):
    """From the checkpoint's; an earlier version wrote none, and those since are counted."""
    spoiled.stop.add(7)
    with pytest.raises(KeyboardInterrupt):
        distill(config)
    assert counts(config.out) == [0, 1, 1, 1, 2, 3, 3]
    (checkpoint,) = checkpoints(config.out / "checkpoints")
    path = checkpoint / "state.json"
    contents = json.loads(path.read_text())
    assert (contents["state"]["iteration"], contents["state"]["num_skipped"]) == (3, 1)
    if by_earlier_version:
        del contents["state"]["num_skipped"]
        path.write_text(json.dumps(contents))
    spoiled.stop.clear()
    before = 0 if by_earlier_version else 1
    assert distill(config)["num_skipped"] == before + 3
    assert counts(config.out) == [0, 1, 1, *(before + each for each in (0, 1, 2, 2, 2, 3, 3))]


def test_trackers_show_one_curve_of_the_count():
    line = {"iteration": 3, "keypoint": 1, "num_skipped": 2, "gradient_norm": 0.5}
    assert scalars(line) == {"num_skipped": 2, "gradient_norm/keypoint_1": 0.5}
