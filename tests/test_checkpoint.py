import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from accvideo.training.checkpoint import (
    Checkpoint,
    Checkpoints,
    checkpoints,
    metrics_log,
    optimizer_tensors,
    read_metrics,
    restore_optimizer,
    write_checkpoint,
)
from accvideo.types import UserError


def save(folder: Path, iteration: int, value: float = 0.0) -> None:
    with Checkpoints(folder) as written:
        written.save(iteration, {"x": torch.full((2,), value)}, {"iteration": iteration})


def test_only_the_last_checkpoint_is_kept_and_a_half_written_one_is_not_seen(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    assert Checkpoints(folder).newest() is None
    for iteration in (9, 10, 100):
        save(folder, iteration, value=iteration)
    half = folder / "00000200"
    half.mkdir()
    (half / ".rank-0-of-1.safetensors.partial").write_bytes(b"half")
    half = folder / "00000300"
    save(tmp_path / "elsewhere", 300)
    shutil.copytree(tmp_path / "elsewhere/00000300", half)
    (half / "state.json").write_text((half / "state.json").read_text().replace('"num_files": 1', '"num_files": 2'))
    assert len(checkpoints(folder)) == 1
    newest = Checkpoints(folder).newest()
    assert newest is not None and newest.folder.name == "00000100"
    assert newest.read("x").tolist() == [100, 100] and newest.state == {"iteration": 100}
    assert [path.name for path in folder.iterdir()] == ["00000100"]


def test_a_checkpoint_in_the_background_is_of_the_moment_it_was_asked_for(tmp_path: Path):
    """Tensors may change while they are written, and the one before is kept until they are."""
    tensor = torch.zeros(1_000_000)
    with Checkpoints(tmp_path) as written:
        for iteration in range(4):
            written.save(iteration, {"x": tensor, "half": tensor[:2]}, {"iteration": iteration})
            tensor += 1
            assert iteration == 0 or checkpoints(tmp_path)[0].name == f"{iteration - 1:08d}"
    assert len(list(tmp_path.iterdir())) == 1
    newest = Checkpoints(tmp_path).newest()
    assert newest is not None and newest.state == {"iteration": 3} and newest.read("half").tolist() == [3, 3]
    assert newest.read("x").eq(3).all() and newest.read("x", 5, 8).tolist() == [3, 3, 3]


def test_pieces_of_a_tensor_are_read_as_one(tmp_path: Path):
    x = torch.randn(5, 2)
    write_checkpoint(tmp_path / "00000007", {"a/x@3": x[3:].clone()}, {}, 1, 2)
    assert checkpoints(tmp_path) == []
    write_checkpoint(tmp_path / "00000007", {"a/x@0": x[:3].clone(), "a/n": torch.tensor(4)}, {}, 0, 2)
    checkpoint = Checkpoint(checkpoints(tmp_path)[0])
    assert sorted(checkpoint.names("a")) == ["n", "x"] and checkpoint.read("a/n") == 4
    for start in range(6):
        for stop in range(start, 6):
            assert torch.equal(checkpoint.read("a/x", start, stop), x[start:stop])


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path / "checkpoints", 1)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="cannot write the checkpoint of iteration 2 .*No space left"):
        save(tmp_path / "checkpoints", 2)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["00000001"]


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
    with metrics_log(path, 0) as log:
        for iteration in range(4):
            log({"iteration": iteration, "loss": 0.5})
    with path.open("a") as file:
        file.write('{"iteration": 4, "lo')  # killed while writing
    assert len(read_metrics(path)) == 4
    with metrics_log(path, 2) as log:
        log({"iteration": 2, "loss": 0.25})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [0.5, 0.5, 0.25]
