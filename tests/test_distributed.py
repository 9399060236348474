import json
import math
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from accvideo.call import DenoiserCall, denoiser_blocks, layer_features, replay
from accvideo.data.dataset import TrajectoryFolder
from accvideo.distill import DistillConfig, distill
from accvideo.student import load_student
from accvideo.training.checkpoint import Checkpoints, checkpoints, read_metrics
from accvideo.training.distributed import first_ranks, gather, joined_ranks, mean, num_ranks, own_parts, rank, total
from accvideo.training.sharding import average_gradients, gathered, own_pieces, sharder, spread_as, whole
from accvideo.training.steps import Rollouts, accumulate, gradient, update
from accvideo.trajectory import TrajectoryBatch
from accvideo.types import UserError
from tests.metrics import numbers_of
from tests.ranks import run_ranks, start_ranks
from tests.recorded import record_tiny
from tests.tiny import TEXT_WIDTH, wan_transformer

# --- What ranks tell each other ---


def check_sums() -> None:
    mine = torch.tensor([1.0, 2.0]) * (rank() + 1)
    assert mean({"a": mine[0], "b": mine[1]}) == {"a": 1.5, "b": 3.0}
    assert total(mine.clone()).tolist() == [3.0, 6.0]
    assert gather(torch.tensor([[rank()], [rank() + 10]])).flatten().tolist() == [0, 1, 10, 11]
    assert first_ranks(7 + rank()) == 7


def check_parts() -> None:
    """Together the ranks' parts are the batch, and the noise of its rows is that of a single rank."""
    assert list(own_parts(3)) == [rank(), 2 + rank(), 4 + rank()]
    call = DenoiserCall({}, {})
    parts = [TrajectoryBatch(torch.zeros(2, 3, 5), (call,), ("transformer",), (), ()) for _ in range(3)]
    rollouts = Rollouts(2, seed=4)
    rollouts.start(parts, number=0)
    batch = torch.randn(12, 5, generator=torch.Generator().manual_seed(4))
    rows = torch.cat([batch[2 * part : 2 * part + 2] for part in own_parts(3)])
    assert torch.equal(torch.cat([rollout.latents for rollout in rollouts.queues[0]]), rows)


def same_layer() -> nn.Module:
    """The same weights each time; their 5 rows cannot be shared evenly."""
    torch.manual_seed(0)
    return nn.Linear(3, 5)


def check_skipped_together() -> None:
    """A loss that is not finite on one rank alone is no step on any, whether weights are whole or sharded."""
    for sharded in (False, True):
        layer = same_layer()
        if sharded:
            sharder("cpu", "float32")(layer)
        optimizer, line = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True), dict[str, Tensor]()
        for bad in (math.inf, 0.0):
            before = [whole(weight).detach().clone() for weight in layer.parameters()]
            with gradient(optimizer, line, "norm"):
                accumulate(layer(torch.ones(2, 3)).square().mean() + bad * rank())
            norm = update(optimizer, 1.0)
            same = [torch.equal(old, whole(new)) for old, new in zip(before, layer.parameters(), strict=True)]
            assert norm.isfinite() == all(math.isfinite(value) for value in line.values()) == (bad == 0)
            assert all(same) if bad else not any(same)


def check_gradients() -> None:
    """Mean over the rows of all ranks, and its norm: that of one rank with all rows."""
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    layer = same_layer()
    expected = torch.autograd.grad(layer(rows).square().mean(), list(layer.parameters()))
    norm = torch.nn.utils.get_total_norm(list(expected))
    for sharded in (False, True):
        layer, line = same_layer(), dict[str, Tensor]()
        if sharded:
            sharder("cpu", "float32")(layer)
            assert all(isinstance(weight, DTensor) for weight in layer.parameters())
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        before = [whole(weight).detach().clone() for weight in layer.parameters()]
        with gradient(optimizer, line, "norm"):
            accumulate(layer(rows[rank() :: 2]).square().mean())
        torch.testing.assert_close(line["norm"], norm)
        update(optimizer, max_norm=0.5 * norm.item())
        for old, new, step in zip(before, layer.parameters(), expected, strict=True):
            torch.testing.assert_close(old - whole(new), 0.5 * step)


def check_frozen_base() -> None:
    """Of a module with frozen weights, these are sharded, and those that train stay whole on each rank."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3))
    expected = module(torch.ones(1, 4))
    sharder("cpu", "float32")(module)
    assert [isinstance(weight, DTensor) for weight in module.parameters()] == [True, True, False, False]
    torch.testing.assert_close(module(torch.ones(1, 4)), expected)
    module(torch.full((1, 4), float(rank()))).sum().backward()
    average_gradients(list(module.parameters()))
    assert module[1].bias.grad is not None and module[1].bias.grad.tolist() == [1, 1, 1]


def check_denoiser() -> None:
    """A sharded Wan has the velocities and features of the whole one, and comes back whole."""
    torch.manual_seed(0)
    denoiser, latents = wan_transformer(), torch.randn(1, 4, 2, 4, 4)
    call = DenoiserCall({"timestep": torch.tensor([500.0]), "encoder_hidden_states": torch.randn(1, 3, TEXT_WIDTH)}, {})
    with torch.no_grad():
        expected = replay(denoiser, call, latents), layer_features(denoiser, call, latents, 2)
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    shard = sharder("cpu", "float32")
    for module in [*denoiser_blocks(denoiser), denoiser]:
        shard(module)
    for _ in range(2):
        found = replay(denoiser, call, latents), layer_features(denoiser, call, latents, 2)
        torch.testing.assert_close(found, expected)
        assert all(isinstance(weight, DTensor) for weight in denoiser.parameters())  # none stays gathered
    plain = gathered(denoiser)
    assert type(plain).__name__ == "WanTransformer3DModel"
    if rank() == 0:
        assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def check_checkpoint(folder: Path) -> None:
    """Each rank writes its rows once, whole tensors are written once, and every rank reads back its own."""
    layer = same_layer()
    sharder("cpu", "float32")(layer)
    tensors = dict(layer.named_parameters()) | {"step": torch.tensor(3.0)}
    with Checkpoints(folder) as written:
        written.save(4, own_pieces(tensors), {"iteration": 4})
        with torch.no_grad():
            layer.weight.zero_()  # what is written is a copy
    expected = same_layer()
    checkpoint = Checkpoints(folder).newest()
    assert checkpoint is not None and checkpoint.state == {"iteration": 4}
    assert torch.equal(checkpoint.read("weight"), expected.weight) and checkpoint.read("step") == 3
    assert torch.equal(checkpoint.read("weight", 2, 4), expected.weight[2:4])
    with torch.no_grad():
        layer.weight.copy_(spread_as(layer.weight, lambda *rows: checkpoint.read("weight", *rows)))
    assert torch.equal(whole(layer.weight), expected.weight)
    assert len(list((folder / "00000004").glob("*.safetensors"))) == num_ranks()


def test_two_ranks_agree(tmp_path: Path):
    """Sums, parts of a batch, gradients, skipped steps, sharded weights and checkpoints, in one pair of processes."""

    def checks() -> None:
        with joined_ranks("cpu"):
            check_sums()
            check_parts()
            check_gradients()
            check_skipped_together()
            check_frozen_base()
            check_denoiser()
            check_checkpoint(tmp_path / "checkpoints")

    run_ranks(checks, 2, tmp_path / "log")


# --- Whole trainings ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryFolder:
    return record_tiny(tmp_path_factory.mktemp("teacher"), num_steps=4, num_student_steps=2)


def tiny_config(folder: TrajectoryFolder, out: Path, **settings: Any) -> DistillConfig:
    defaults: dict[str, Any] = {
        "num_iterations": 4,
        "batch_size": 4,
        "num_validation": 2,
        "validate_every": 3,
        "save_every": 2,
        "lora_rank": 2,
        "schedule": "constant",
        "adversarial_start": 0,
        "precision": "float32",
        "device": "cpu",
    }
    return DistillConfig(data=Path(folder.path), out=out, **defaults | settings)


def weights_of(out: Path) -> dict[str, Tensor]:
    """The tensors of a finished student."""
    files = [path for path in out.rglob("*.safetensors") if path.parent.parent.name != "checkpoints"]
    return {f"{path.relative_to(out)}/{name}": each for path in files for name, each in load_file(path).items()}


def assert_same_run(found: Path, expected: Path, tolerance: float) -> None:
    """The loss curves, and the weights, of two runs are equal.

    Adam divides a gradient by its own size, so where one is nearly zero its rounding shows in the weight: with a
    tolerance, weights may differ by a hundredth of one of Adam's steps.
    """
    numbers, others = numbers_of(found), numbers_of(expected)
    assert [name for name, _ in numbers] == [name for name, _ in others]
    for (name, value), (_, other) in zip(numbers, others, strict=True):
        assert value == pytest.approx(other, rel=tolerance, abs=tolerance), name
    weights, others = weights_of(found), weights_of(expected)
    assert weights.keys() == others.keys() and weights
    adam_step = json.loads((expected / "config.json").read_text())["learning_rate"]
    furthest = max(tolerance, 0.01 * adam_step) if tolerance else 0.0
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=tolerance, atol=furthest, msg=name)


CASES: dict[str, dict[str, Any]] = {
    "full": {"full": True, "ema_decay": 0.5, "learning_rate": 1e-3},
    "lora": {"update": "alternating", "accumulate": 2, "head_updates": 2},
    "consistency": {"full": True, "loss": "consistency", "learning_rate": 1e-4},
    "correction": {"full": True, "loss": "correction", "learning_rate": 1e-4},
    "sharded base": {"update": "shared", "shard_base": True, "gradient_checkpointing": True},
}


def test_two_ranks_train_as_one_with_the_same_batch(folder: TrajectoryFolder, tmp_path: Path):
    """Losses, norms, validations and weights, with the discriminator, whatever is sharded or accumulated."""
    start = tmp_path / "start"
    distill(tiny_config(folder, start, full=True, num_iterations=1, learning_rate=1e-2))
    cases = CASES | {"going on": {"full": True, "start_from": str(start), "learning_rate": 1e-3}}

    def all_cases() -> None:
        for name, settings in cases.items():
            port = int(os.environ["MASTER_PORT"])
            distill(tiny_config(folder, tmp_path / f"two {name}", **settings))
            os.environ["MASTER_PORT"] = str(port + 1)

    run_ranks(all_cases, 2, tmp_path / "log")
    for name, settings in cases.items():
        alone = settings | {"accumulate": 1, "shard_base": False, "gradient_checkpointing": False}
        distill(tiny_config(folder, tmp_path / f"one {name}", **alone))
        assert_same_run(tmp_path / f"two {name}", tmp_path / f"one {name}", tolerance=1e-5)
        assert any("head_loss" in line for line in read_metrics(tmp_path / f"two {name}/metrics.jsonl"))


def test_ranks_that_cannot_share_evenly_are_told_so(folder: TrajectoryFolder, tmp_path: Path):
    for settings, message in (
        ({"accumulate": 3}, "batch_size 4 cannot be cut into 3 equal parts"),
        ({"shard_base": True, "full": True}, "shard_base spreads the frozen weights under a LoRA"),
    ):
        with pytest.raises(UserError, match=message):
            distill(tiny_config(folder, tmp_path / "student", **settings))
    assert not (tmp_path / "student").exists()


def kill(children: list[int]) -> None:
    """Kill them all at once, by signal 9."""
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)


def wait_for_lines(out: Path, num_lines: int, children: list[int]) -> bool:
    """Wait until a run has written so many lines of metrics; False if it ended before."""
    while len(read_metrics(out / "metrics.jsonl")) < num_lines:
        if os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.001)
    return True


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(folder: TrajectoryFolder, tmp_path: Path):
    """24 times kill -9, while starting, between and in iterations, while a checkpoint is written: bit-identical."""
    settings = {"num_iterations": 60, "save_every": 2, "validate_every": 7, "batch_size": 2, "keep_best": True}
    settings |= {"ema_decay": 0.8, "schedule": "cosine", "adversarial_start": 5}
    whole_run, killed = (tiny_config(folder, tmp_path / name, **settings) for name in ("whole", "killed"))
    distill(whole_run)
    moments, num_killed = random.Random(0), 0
    while num_killed < 24:
        lines = len(read_metrics(killed.out / "metrics.jsonl"))
        children = start_ranks(lambda: distill(killed), 1, tmp_path / "log")
        if moments.random() < 0.8 and not wait_for_lines(killed.out, lines + moments.randint(0, 2), children):
            break
        time.sleep(moments.uniform(0, 0.05))
        kill(children)
        num_killed += 1
        assert not (killed.out / "student.json").exists()
    assert num_killed == 24
    distill(killed)
    assert_same_run(killed.out, whole_run.out, tolerance=0.0)


@pytest.mark.slow
def test_killed_ranks_go_on_and_any_number_of_ranks_can(folder: TrajectoryFolder, tmp_path: Path):
    """Two sharded ranks, killed twice: bit-identical. One rank that takes over from them, and back: equal."""
    settings = {"full": True, "learning_rate": 1e-3, "num_iterations": 9, "ema_decay": 0.5}
    configs = {name: tiny_config(folder, tmp_path / name, **settings) for name in ("whole", "killed", "taken over")}
    run_ranks(lambda: distill(configs["whole"]), 2, tmp_path / "log")
    for num_lines in (5, 9):
        children = start_ranks(lambda: distill(configs["killed"]), 2, tmp_path / "log")
        assert wait_for_lines(configs["killed"].out, num_lines, children)
        kill(children)
        if num_lines == 5:
            shutil.copytree(configs["killed"].out, configs["taken over"].out)
    assert checkpoints(configs["taken over"].out / "checkpoints")
    run_ranks(lambda: distill(configs["killed"]), 2, tmp_path / "log")
    assert_same_run(configs["killed"].out, configs["whole"].out, tolerance=0.0)

    children = start_ranks(lambda: distill(configs["taken over"]), 1, tmp_path / "log")
    assert wait_for_lines(configs["taken over"].out, 9, children)
    kill(children)
    run_ranks(lambda: distill(replace(configs["taken over"], accumulate=2)), 2, tmp_path / "log")
    assert_same_run(configs["taken over"].out, configs["whole"].out, tolerance=1e-5)


@pytest.mark.slow
def test_compiled_blocks_train_as_others_do(folder: TrajectoryFolder, tmp_path: Path):
    """Losses, norms, validations and weights: features, adapters on and off, blocks computed again, sharded weights.

    By a backend that traces and differentiates as all do, and then runs the operations as they are.
    """
    cases = {
        "full": {"full": True, "learning_rate": 1e-3},
        "lora": {"update": "alternating", "gradient_checkpointing": True, "num_iterations": 6},
    }

    def distill_compiled(config: DistillConfig) -> None:
        with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):
            distill(replace(config, compile=True))

    for name, settings in cases.items():
        plain, compiled = (tiny_config(folder, tmp_path / f"{how} {name}", **settings) for how in ("plain", "compiled"))
        distill(plain)
        run_ranks(partial(distill_compiled, compiled), 2 if plain.full else 1, tmp_path / "log")
        assert_same_run(compiled.out, plain.out, tolerance=1e-5)
        load_student(compiled.out)


@pytest.mark.slow
def test_ranks_train_a_bfloat16_teacher_of_two_experts_with_blocks_computed_again(tmp_path: Path):
    """Close to one rank, whose weights are rounded at other places, and a student that loads."""
    folder = record_tiny(tmp_path, "unipc", experts=2, num_steps=4, num_student_steps=2, dtype="bfloat16")
    common = {"precision": "bfloat16", "gradient_checkpointing": True, "learning_rate": 1e-4}
    for name, settings in {"full": {"full": True}, "lora": {"shard_base": True}}.items():
        one, two = (tiny_config(folder, tmp_path / f"{number} {name}", **common) for number in ("one", "two"))
        two = replace(two, **settings)
        run_ranks(lambda two=two: distill(two), 2, tmp_path / "log")
        distill(replace(one, full=two.full))
        for (what, value), (_, other) in zip(numbers_of(two.out), numbers_of(one.out), strict=True):
            if what.endswith("loss"):
                assert value == pytest.approx(other, rel=0.05), (name, what)
        load_student(two.out)
