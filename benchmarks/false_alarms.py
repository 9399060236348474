"""Train healthily on the embedded playground, with several recipes and seeds, and count the alarms that ring.

    accvideo playground prompts --num 256 --out prompts.txt
    accvideo record playground --prompts prompts.txt --batch-size 32 --out trajectories
    python benchmarks/false_alarms.py trajectories

Recipes with nothing wrong in them: that of docs/healthy-training.md and what users change first in it, none of them
the run that the limits were set by. A run takes 4 to 7 minutes on one core without bfloat16; those that are done are
not made again.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from healthy_training import recipe
from rich.console import Console

from accvideo.distill import distill
from accvideo.training.checkpoint import read_metrics

RECIPES: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA of rank 32": {"full": False, "learning_rate": 2e-3},
    "an update for each loss": {"update": "alternating"},
    "both losses on one step": {"update": "shared"},
    "adversarial from the start": {"adversarial_start": 0},
    "hinge": {"adversarial_loss": "hinge"},
    "batches of 4": {"batch_size": 4, "learning_rate": 1e-4},
    "two steps": {"num_student_steps": (2,)},
    "several numbers of steps": {"num_student_steps": (2, 5)},
    "running mean of the weights": {"ema_decay": 0.9},
}
"""What differs from the recipe of the healthy run."""


def main() -> None:
    """Make the runs that are missing, and print a line for each and the number with an alarm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of recorded trajectories of the playground")
    parser.add_argument("--out", type=Path, default=Path("runs/false-alarms"), help="folder of the students")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe")
    options = parser.parse_args()
    console, num_alarmed = Console(), 0
    for name, changes in RECIPES.items():
        for seed in range(1, options.seeds + 1):  # the limits were set by seed 0
            out = options.out / f"{name.replace(' ', '-')}-{seed}"
            distill(replace(recipe(options.data, out), track="none", seed=seed, **changes))
            lines = list(read_metrics(out / "metrics.jsonl"))
            alarms = [
                f"{line['alarm']} at {line['iteration']} ({line['measured']:.3g})" for line in lines if "alarm" in line
            ]
            errors = [line["latent_error"] for line in lines if "latent_error" in line]
            first = next(line["start"]["latent_error"] for line in lines if "start" in line)
            console.print(
                f"{name}, seed {seed}: {', '.join(alarms) or 'no alarm'}; latent error {first:.3f} -> {errors[-1]:.3f}"
            )
            num_alarmed += bool(alarms)
    console.print(f"{num_alarmed} of {len(RECIPES) * options.seeds} runs rang an alarm")


if __name__ == "__main__":
    main()
