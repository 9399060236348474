"""Several key points of a record in one iteration, against one key point of as many records.

    accvideo playground prompts --num 152 --out prompts.txt
    accvideo record playground --prompts prompts.txt --solver adams2 --num-steps 25 --batch-size 16 --out trajectories
    python benchmarks/keypoints_at_once.py trajectories

Both take the same denoiser evaluations: 15 rows an iteration, of 15 records at one key point, whose turn it is, or of 3
records at all 5 key points. The second reads a fifth of the bytes. Trajectory loss alone, a LoRA by the defaults of
`accvideo distill`; measured are the trajectory loss and the latent error on held-out records, for several seeds.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from accvideo.data.dataset import TrajectoryFolder
from accvideo.distill import DistillConfig, measure, train
from accvideo.training.recipe import resolved
from accvideo.training.start import load_denoisers, start_training
from accvideo.training.steps import Step, Training, paired_loss, recorded_lesson, student_sweeps
from accvideo.trajectory import TrajectoryBatch, collate_trajectories
from accvideo.types import Sigmas


def whole_lesson(training: Training, parts: Sequence[TrajectoryBatch], sigmas: Sigmas, step: Step) -> Iterator[Tensor]:
    """The trajectory losses of the parts at all key points, whichever is at its turn."""
    [sweep] = student_sweeps(len(sigmas) - 1)
    for part in parts:
        losses = [paired_loss(training.student, part, sigmas, each).mean() for each in sweep]
        yield torch.stack(losses).mean()


def student(folder: TrajectoryFolder, num_at_once: int, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """Train one; its trajectory loss, the mean over key points, and its latent error, both on held-out records."""
    config = resolved(
        DistillConfig(
            data="", out=Path(), num_iterations=options.iterations, batch_size=options.rows // num_at_once,
            adversarial_weight=0, save_every=10**9, device="cpu", seed=seed,
        )
    )  # fmt: skip
    first = len(folder) - options.held_out
    held_out = [collate_trajectories([folder[i] for i in range(first, len(folder))])]

    def batches(start: int) -> Iterator[TrajectoryBatch]:
        return folder.batches(config.batch_size, seed, start, range(first))

    sigmas = folder.manifest.key_sigmas
    training = start_training(config, load_denoisers(folder.manifest), sigmas, held_out)
    train(config, training, sigmas, batches, lesson=recorded_lesson if num_at_once == 1 else whole_lesson)
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
    options = parser.parse_args()
    folder, console = TrajectoryFolder(options.data), Console()
    for num_at_once in (1, folder.manifest.num_student_steps):
        found = []
        for seed in range(options.seeds):
            found.append(student(folder, num_at_once, seed, options))
            console.print(
                f"{num_at_once} at once, seed {seed}: loss {found[-1][0]:.4f}, latent error {found[-1][1]:.4f}"
            )
        loss, error = map(statistics.mean, zip(*found, strict=True))
        console.print(f"{num_at_once} at once: trajectory loss {loss:.4f}, latent error {error:.4f}")


if __name__ == "__main__":
    main()
