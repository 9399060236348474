"""Several key points in one iteration, against one whose turn it is: trajectory loss alone, equal denoiser evaluations.

    accvideo playground prompts --num 512 --out prompts.txt
    accvideo record playground --prompts prompts.txt --solver adams2 --num-steps 25 --batch-size 16 --out trajectories
    python benchmarks/keypoints_at_once.py trajectories

An iteration takes 15 rows: of 15 records at the key point whose turn it is; of 3 records at all 5 key points, which
reads a fifth of the bytes; or of 15 records, 3 at each key point. A LoRA by the defaults of `accvideo distill`.
Measured are the trajectory loss and the latent error on held-out records, for several seeds.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from accvideo.analysis.figure import spread_text
from accvideo.data.dataset import TrajectoryFolder
from accvideo.distill import DistillConfig, measure, train
from accvideo.training.recipe import resolved
from accvideo.training.start import load_denoisers, start_training
from accvideo.training.steps import Lesson, Step, Training, paired_loss, recorded_lesson, student_sweeps
from accvideo.trajectory import TrajectoryBatch, collate_trajectories
from accvideo.types import Sigmas


def whole_lesson(training: Training, parts: Sequence[TrajectoryBatch], sigmas: Sigmas, step: Step) -> Iterator[Tensor]:
    """The trajectory losses of the parts at all key points, whichever is at its turn."""
    [sweep] = student_sweeps(len(sigmas) - 1)
    for part in parts:
        losses = [paired_loss(training.student, part, sigmas, each).mean() for each in sweep]
        yield torch.stack(losses).mean()


def mixed_lesson(training: Training, parts: Sequence[TrajectoryBatch], sigmas: Sigmas, step: Step) -> Iterator[Tensor]:
    """The trajectory losses of the parts at one key point each, the first part's the one at its turn."""
    [sweep] = student_sweeps(len(sigmas) - 1)
    for number, part in enumerate(parts):
        yield paired_loss(training.student, part, sigmas, sweep[(step.start + number) % len(sweep)]).mean()


WAYS: dict[str, tuple[Lesson, bool, bool]] = {
    "one key point": (recorded_lesson, False, False),
    "all of fewer records": (whole_lesson, True, False),
    "some records at each": (mixed_lesson, False, True),
}
"""Lesson; whether a record's rows are as many as the key points; whether a batch is cut into as many parts."""


def student(folder: TrajectoryFolder, way: str, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """Train one; its trajectory loss, the mean over key points, and its latent error, both on held-out records."""
    lesson, is_whole, is_cut = WAYS[way]
    num_steps = folder.manifest.num_student_steps
    config = resolved(
        DistillConfig(
            data="", out=Path(), num_iterations=options.iterations, adversarial_weight=0, save_every=10**9,
            batch_size=options.rows // num_steps if is_whole else options.rows,
            accumulate=num_steps if is_cut else 1, device="cpu", seed=seed,
        )
    )  # fmt: skip
    first = len(folder) - options.held_out
    held_out = [collate_trajectories([folder[i] for i in range(first, len(folder))])]

    def batches(start: int) -> Iterator[TrajectoryBatch]:
        size = config.batch_size // config.accumulate
        return folder.batches(size, seed, start * config.accumulate, range(first))

    sigmas = folder.manifest.key_sigmas
    training = start_training(config, load_denoisers(folder.manifest), sigmas, held_out)
    train(config, training, sigmas, batches, lesson=lesson)
    found = measure(training, held_out, sigmas, student_sweeps(len(sigmas) - 1))
    return statistics.mean(found["validation_loss"]), found["latent_error"]


def main() -> None:
    """Train all students, and print each and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--rows", type=int, default=15)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    folder, console = TrajectoryFolder(options.data), Console()
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in options.ways}
    for seed in range(options.seeds):  # in turns, so that what is there when it is stopped can be compared
        for way in options.ways:
            found[way].append(student(folder, way, seed, options))
            loss, error = found[way][-1]
            console.print(f"{way}, seed {seed}: trajectory loss {loss:.4f}, latent error {error:.4f}")
    for way in options.ways:
        for name, values in zip(("trajectory loss", "latent error"), zip(*found[way], strict=True), strict=True):
            console.print(f"{way}: {name} {spread_text(values, 4)}")


if __name__ == "__main__":
    main()
