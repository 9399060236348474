"""A training whose disk is full says so in two lines; with space again the same command goes on to the same bits."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accvideo import cli
from accvideo.data.dataset import TrajectoryFolder
from accvideo.training.checkpoint import checkpoints
from tests.metrics import numbers_of
from tests.recorded import record_tiny
from tests.test_workers import end_of, fork

OPTIONS = (
    "--num-iterations 10 --batch-size 2 --num-validation 2 --validate-every 4 --save-every 5 --lora-rank 2 "
    "--adversarial-start 0 --precision float32 --device cpu"
).split()
PAGE = 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryFolder:
    return record_tiny(tmp_path_factory.mktemp("teacher"), num_steps=4, num_student_steps=2)


@dataclass(frozen=True)
class Command:
    """A distillation from the command line."""

    folder: TrajectoryFolder
    out: Path
    options: tuple[str, ...] = ()

    def run(self, largest_file: int = resource.RLIM_INFINITY) -> tuple[int, str]:
        """Its exit code and all that it says, in a process that may write no larger file."""
        ours, theirs = os.pipe()

        def limited() -> int:
            os.dup2(theirs, 1)
            os.dup2(theirs, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
            code = cli.run(["distill", str(self.folder.path), "--out", str(self.out), *OPTIONS, *self.options])
            sys.stdout.flush()
            sys.stderr.flush()
            return code

        child = fork(limited)
        os.close(theirs)
        with os.fdopen(ours) as pipe:
            said = pipe.read()
        return end_of(child), said

    def fails(self, reason: str, largest_file: int = resource.RLIM_INFINITY) -> str:
        """What it cannot write for this reason, which it must say in its last two lines, the second with advice."""
        code, said = self.run(largest_file)
        assert code == 1 and "Traceback" not in said and not (self.out / "student.json").exists(), said
        *_, what, advice = said.splitlines()
        by_safetensors = r"(?:Error while serializing: I/O error: )?", r"(?: \(os error \d+\))?"
        match = re.fullmatch(f"accvideo: cannot write (.*?): {reason.join(by_safetensors)}", what)
        assert match and re.search("the same command (then )?(goes on|writes it again)", advice), said
        return match[1]

    def succeeds(self) -> None:
        """It trains to the end, or goes on to it."""
        code, said = self.run()
        assert code == 0 and "num_skipped: 0" in said, said


def assert_same(found: Path, expected: Path) -> None:
    """Metrics, weights, and all that a student's folder says are the same bit for bit."""
    assert numbers_of(found) == numbers_of(expected) != []
    names = {str(path.relative_to(expected)) for path in expected.rglob("*") if path.is_file()}
    tensors = {name for name in names if name.endswith(".safetensors")}
    assert {"pytorch_lora_weights.safetensors", "README.md", "student.json"} < names and len(tensors) == 2
    for name in tensors:
        one, other = (load_file(out / name) for out in (found, expected))
        assert one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    for name in names - tensors - {"metrics.jsonl", "config.json"}:
        if not name.startswith("tensorboard"):
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(folder: TrajectoryFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "student"
    Command(folder, out).succeeds()
    return out


def size_of(out: Path, pattern: str) -> int:
    """Bytes of the one file that matches."""
    (path,) = out.glob(pattern)
    return path.stat().st_size


def test_files_that_may_not_grow_end_a_training_in_two_lines(folder: TrajectoryFolder, whole: Path, tmp_path: Path):
    """One after the other, each of the files that a training writes while it runs; then it goes on to the same bits."""
    command = Command(folder, tmp_path / "student")
    settings, metrics, events, weights = (
        size_of(whole, pattern)
        for pattern in ("config.json", "metrics.jsonl", "tensorboard/*", "checkpoints/*/*.safetensors")
    )
    assert settings < metrics < events < weights
    assert command.fails("File too large", settings - 1) == f"{command.out}/config.json"
    assert not list(command.out.iterdir())
    untracked = Command(folder, command.out, ("--track", "none"))
    size = settings + 100  # names of folders are among them
    assert untracked.fails("File too large", size) == f"{command.out}/metrics.jsonl"
    assert command.fails("File too large", events // 4).startswith(f"{command.out}/tensorboard/events")
    what = command.fails("File too large", weights - 1)
    assert what == f"the checkpoint of iteration 5 to {command.out}/checkpoints"
    assert checkpoints(command.out / "checkpoints") == []
    assert len(numbers_of(command.out)) < len(numbers_of(whole))  # it did not go on up to the next
    command.succeeds()
    assert_same(command.out, whole)


def test_a_folder_that_cannot_be_made_is_told(folder: TrajectoryFolder, tmp_path: Path):
    (tmp_path / "file").write_text("")
    command = Command(folder, tmp_path / "file" / "student")
    assert command.fails("Not a directory") == str(command.out)


@pytest.mark.slow
@pytest.mark.parametrize("track", ["none", "tensorboard"])
def test_wherever_a_file_may_not_grow_the_training_goes_on_to_the_same_bits(
    folder: TrajectoryFolder, whole: Path, tmp_path: Path, track: str
):
    first, last = 100 + size_of(whole, "config.json"), size_of(whole, "checkpoints/*/*.safetensors")
    sizes = [round(first * (last / first) ** (number / 5)) for number in range(5)]
    failed = set()
    for size in sizes:
        command = Command(folder, tmp_path / str(size), ("--track", track))
        failed.add(command.fails("File too large", size).partition(str(command.out))[::2])
        command.succeeds()
        assert_same(command.out, whole)
    assert len(failed) >= 2, failed


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk, if this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={PAGE}", "none", folder], capture_output=True).returncode:
        pytest.skip("may not mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def grow(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def pages(out: Path, *patterns: str) -> int:
    """Bytes that the files of these names take on a disk."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for pattern in patterns for path in out.glob(pattern))


@pytest.mark.slow
def test_wherever_a_disk_is_full_the_training_goes_on_to_the_same_bits(
    folder: TrajectoryFolder, whole: Path, disk: Path
):
    """Metrics before and after a checkpoint, the first and the second checkpoint, each file of the student."""
    command, full = Command(folder, disk / "student", ("--track", "none")), "No space left on device"
    checkpoint = pages(whole, "checkpoints/*/*")
    assert PAGE < size_of(whole, "metrics.jsonl") <= 2 * PAGE
    for size, expected in (
        (PAGE, f"{command.out}/metrics.jsonl"),
        (8 * PAGE, f"the checkpoint of iteration 5 to {command.out}/checkpoints"),
        (checkpoint + 2 * PAGE, f"{command.out}/metrics.jsonl"),
        (checkpoint + 12 * PAGE, f"the checkpoint of iteration 10 to {command.out}/checkpoints"),
    ):
        grow(disk, size)
        for _ in range(2):  # full is full
            assert command.fails(full) == expected
    assert [path.name for path in checkpoints(command.out / "checkpoints")] == ["00000005"]
    grow(disk, 3 * checkpoint)
    command.succeeds()
    assert_same(command.out, whole)

    subprocess.run(["rm", "-r", command.out], check=True)
    once = Command(folder, command.out, (*command.options, "--save-every", "10"))
    size = pages(whole, "config.json", "metrics.jsonl", "checkpoints/*/*")
    weights = "pytorch_lora_weights.safetensors"
    for pattern in (weights, "scheduler/*", "README.md", "student.json"):
        grow(disk, size)
        what = once.fails(full)
        assert what == (f"{command.out}/student.json" if pattern == "student.json" else f"the student to {command.out}")
        size += pages(whole, pattern)
        (command.out / weights).unlink(missing_ok=True)  # beside which new ones would be written
    grow(disk, size)
    once.succeeds()
    assert_same(command.out, whole)
