import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from accvideo.checkpoint import (
    MetricsLog,
    checkpoints,
    load_checkpoint,
    optimizer_tensors,
    read_metrics,
    restore_optimizer,
    save_checkpoint,
)
from accvideo.types import UserError


def test_only_the_last_checkpoint_is_kept_and_a_half_written_one_is_not_seen(tmp_path: Path):
    assert load_checkpoint(tmp_path / "checkpoints") is None
    for iteration in (9, 10, 100):
        save_checkpoint(
            tmp_path / "checkpoints", iteration, {"x": torch.full((2,), iteration)}, {"iteration": iteration}
        )
    (tmp_path / "checkpoints/.partial").mkdir()
    (tmp_path / "checkpoints/.partial/tensors.safetensors").write_bytes(b"half")
    found = load_checkpoint(tmp_path / "checkpoints")
    assert found is not None and found[0]["x"].tolist() == [100, 100] and found[1] == {"iteration": 100}
    assert len(checkpoints(tmp_path / "checkpoints")) == 1


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save_checkpoint(tmp_path / "checkpoints", 1, {"x": torch.ones(1)}, {})
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="cannot write the checkpoint of iteration 2 .*No space left"):
        save_checkpoint(tmp_path / "checkpoints", 2, {"x": torch.ones(1)}, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001"]


def test_a_restored_optimizer_goes_on_as_the_first():
    def run(break_at: int | None) -> list[float]:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        for step in range(6):
            if step == break_at:
                tensors = optimizer_tensors(optimizer)
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
                restore_optimizer(optimizer, {name: tensor.clone() for name, tensor in tensors.items()})
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
        return model.weight.flatten().tolist()

    assert run(break_at=3) == run(break_at=None)


def test_metrics_go_on_from_an_iteration(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 0) as log:
        for iteration in range(4):
            log.write({"iteration": iteration, "loss": 0.5})
    with path.open("a") as file:
        file.write('{"iteration": 4, "lo')  # killed while writing
    assert len(read_metrics(path)) == 4
    with MetricsLog(path, 2) as log:
        log.write({"iteration": 2, "loss": 0.25})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [0.5, 0.5, 0.25]
