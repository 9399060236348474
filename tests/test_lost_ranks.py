"""What becomes of a training one of whose ranks ends before the others."""

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import accvideo.distill as stage
from accvideo.data.dataset import TrajectoryFolder
from accvideo.distill import DistillConfig, distill
from accvideo.training.checkpoint import read_metrics
from accvideo.training.distributed import joined_ranks, rank, wait_for_all
from tests.metrics import numbers_of
from tests.ranks import start_ranks
from tests.recorded import record_tiny

LOST = "has lost another one: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryFolder:
    return record_tiny(tmp_path_factory.mktemp("teacher"), num_steps=4, num_student_steps=2)


def ends_of_two(function: Callable[[], object], log: Path) -> list[tuple[int, str]]:
    """The exit code of each of two ranks, negative where a signal ended it, and the last lines of its error."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in start_ranks(function, 2, log)]
    errors = [log.with_name(f"{log.name}.{number}") for number in range(2)]
    return [
        (code, error.read_text().rpartition("UserError: ")[2] if error.exists() else "")
        for code, error in zip(codes, errors, strict=True)
    ]


def test_a_rank_that_loses_another_says_so(tmp_path: Path):
    def lose() -> None:
        with joined_ranks("cpu"):
            wait_for_all()
            if rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            wait_for_all()

    (code, error), (killed, _) = ends_of_two(lose, tmp_path / "log")
    assert (code, killed) == (1, -signal.SIGKILL)
    assert error.startswith(f"rank 0 of 2 {LOST}") and len(error.splitlines()) == 2


def test_a_rank_lost_in_a_validation_is_told_too(
    folder: TrajectoryFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """There the student has other weights, and some of them are gathered: here those outside of its blocks."""
    config = DistillConfig(
        data=folder.path, out=tmp_path / "student", batch_size=2, num_validation=2, full=True, ema_decay=0.5,
        precision="float32", device="cpu", track="none",
    )  # fmt: skip
    student_step = stage.student_step

    def die(module: nn.Module, _: Any) -> None:
        if isinstance(module, nn.Conv3d):
            os.kill(os.getpid(), signal.SIGKILL)

    def last_step(*args: Any) -> Any:
        if rank() == 1:
            register_module_forward_pre_hook(die)
        return student_step(*args)

    monkeypatch.setattr(stage, "student_step", last_step)
    (code, error), (killed, _) = ends_of_two(lambda: distill(config), tmp_path / "log")
    assert (code, killed) == (1, -signal.SIGKILL)
    assert error.startswith(f"rank 0 of 2 {LOST}")


def test_an_error_of_a_rank_itself_stays_as_it_is(tmp_path: Path):
    def fail() -> None:
        with joined_ranks("cpu"):
            torch.ones(2) @ torch.ones(3)

    assert [code for code, _ in ends_of_two(fail, tmp_path / "log")] == [1, 1]
    for number in range(2):
        assert "RuntimeError: inconsistent tensor size" in (tmp_path / f"log.{number}").read_text()


def test_a_disk_full_for_one_rank_is_told_by_that_one(folder: TrajectoryFolder, tmp_path: Path):
    """The other says that it has lost one, and both end."""
    config = DistillConfig(
        data=folder.path, out=tmp_path / "student", num_iterations=9, batch_size=2, num_validation=2, lora_rank=2,
        adversarial_start=0, precision="float32", device="cpu", track="none",
    )  # fmt: skip

    def limited() -> None:
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, unlimited[1]))
        try:
            distill(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    (code, error), (other_code, other) = ends_of_two(limited, tmp_path / "log")
    assert code == other_code == 1
    assert error.startswith(f"cannot write {config.out}/metrics.jsonl: File too large")
    assert other.startswith(f"rank 1 of 2 {LOST}")


class Torchrun:
    """A distillation by two processes that the real torchrun starts, on CPUs."""

    def __init__(self, folder: TrajectoryFolder, out: Path, log: Path, max_restarts: int = 0) -> None:
        programs = Path(sys.executable).parent
        command = f"{programs}/torchrun --standalone --nproc-per-node 2 --max-restarts {max_restarts}"
        settings = (
            "--num-iterations 16 --batch-size 2 --num-validation 2 --validate-every 5 --save-every 3 --full "
            "--learning-rate 1e-3 --ema-decay 0.5 --adversarial-start 0 --precision float32 --device cpu --track none"
        )
        words = [*command.split(), "--no-python", f"{programs}/accvideo", "distill", str(folder.path)]
        self.out, self.log = out, log
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if max_restarts:
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with log.open("w") as file:
            self.process = psutil.Popen(
                [*words, "--out", str(out), *settings.split()], stdout=file, stderr=file, env=environment
            )

    def ranks(self) -> list[psutil.Process]:
        """The processes of both ranks, once they are there."""
        found: dict[str, psutil.Process] = {}
        while not {"0", "1"} <= found.keys():
            assert self.process.poll() is None, self.log.read_text()
            found = {each.environ().get("RANK", ""): each for each in self.process.children()}
        return [found["0"], found["1"]]

    def wait_for_lines(self, num_lines: int) -> None:
        """Wait until there are so many lines of metrics."""
        while len(read_metrics(self.out / "metrics.jsonl")) < num_lines:
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)

    def end(self, seconds: float = 300) -> int:
        """Its exit code, after the ends of both ranks."""
        code = self.process.wait(seconds)
        said = self.log.read_text()
        assert "gloo/transport" not in said, said
        return code


@pytest.mark.slow
def test_after_a_rank_of_torchruns_was_killed_the_same_command_goes_on(folder: TrajectoryFolder, tmp_path: Path):
    """Either rank, while starting and while training; the other ends soon, and the weights are those of no kill."""
    whole = Torchrun(folder, tmp_path / "whole", tmp_path / "log")
    assert whole.end() == 0, whole.log.read_text()
    moments, third = random.Random(0), len(read_metrics(whole.out / "metrics.jsonl")) // 3
    for kill, number in enumerate((0, 1, 0)):  # the last time torchrun itself gives the command again
        run = Torchrun(folder, tmp_path / "killed", tmp_path / f"log-{kill}", max_restarts=kill // 2)
        ranks = run.ranks()
        if kill > 0:
            run.wait_for_lines(kill * third + moments.randrange(third))
        time.sleep(moments.uniform(0, 0.2))
        ranks[number].kill()
        if kill < 2:
            assert run.end(seconds=60) == 1
            assert not (run.out / "student.json").exists()
        else:
            assert run.end() == 0, run.log.read_text()
        assert not any(process.is_running() for process in ranks)

    assert numbers_of(run.out) == numbers_of(whole.out)
    expected, found = (load_file(each.out / "transformer/diffusion_pytorch_model.safetensors") for each in (whole, run))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
