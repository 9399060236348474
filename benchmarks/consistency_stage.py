"""The second stage of the playground's student: consistency within each step, asking the teacher at fresh noise.

    python benchmarks/consistency_stage.py trajectories --start-from first-stage --keep right.txt --out student

Writes the student to --out and prints each hundred iterations' mean loss by step. It is what wins the comparison of
docs/results.md ("Other methods"), from a student that `accvideo distill` has made instead of from the teacher.
"""

import argparse
import math
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from accvideo.analysis.baselines.training import Recipe, consistency, start
from accvideo.cli import quiet_libraries
from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.manifest import Manifest
from accvideo.distill import to_device
from accvideo.flow import even_grid
from accvideo.inference.schedulers import make_scheduler
from accvideo.inference.student_config import student_config
from accvideo.student import load_student, save_student
from accvideo.teacher import denoisers
from accvideo.training.recipe import DistillConfig, fast_precision, kept_trajectories


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description="Refine a student by consistency within each step.")
    parser.add_argument("data", help="data set of the playground's teacher")
    parser.add_argument("--start-from", type=Path, required=True, help="student whose weights are trained on")
    parser.add_argument("--out", type=Path, required=True, help="folder for the student")
    parser.add_argument("--keep", type=Path, help="file with the numbers of the trajectories to use; all by default")
    parser.add_argument("--num-iterations", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="falls to 0 along half a cosine")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    quiet_libraries()
    if options.out.exists():
        parser.error(f"{options.out} exists; give another --out")

    folder = TrajectoryFolder(options.data)
    recipe = Recipe(
        method="consistency",
        learning_rate=options.learning_rate,
        budget=2**62,  # the number of iterations is given instead
        batch_size=options.batch_size,
        precision=fast_precision(options.device),
        device=options.device,
    )
    setting, levels = start(recipe, folder), with_teacher_levels(folder.manifest)
    teacher = replace(setting.teacher, sigmas=torch.tensor(levels.sigmas), keypoints=levels.keypoints)
    setting = replace(setting, manifest=levels, teacher=teacher)
    pipeline, before = load_student(options.start_from)
    for name, denoiser in denoisers(pipeline).items():
        setting.student.denoisers[name].load_state_dict(denoiser.state_dict())
    kept = kept_trajectories(DistillConfig(data=options.data, out=options.out, keep=options.keep), len(folder))
    batches = folder.batches(options.batch_size, recipe.seed, indices=kept)
    update = consistency(setting, first := to_device(next(batches), options.device))

    began, losses = time.perf_counter(), defaultdict(list)
    for iteration in range(options.num_iterations):
        for group in setting.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * iteration / options.num_iterations))
        loss = update(iteration, to_device(next(batches), options.device))
        losses[iteration % folder.manifest.num_student_steps].append(loss.item())
        if (iteration + 1) % 100 == 0:
            means = ", ".join(f"{fmean(each[-20:]):.4f}" for each in losses.values())
            print(f"{iteration + 1} iterations, {time.perf_counter() - began:.0f} s, loss by step {means}", flush=True)
    settings = {name: value for name, value in asdict(recipe).items() if name != "budget"}
    settings |= {"num_iterations": options.num_iterations, "first_stage": before.recipe}
    save_student(options.out, setting.student, student_config(folder.manifest, first.calls, None, settings), {})


def with_teacher_levels(manifest: Manifest) -> Manifest:
    """The manifest with the noise levels of the teacher's own steps, where fewer and larger ones were recorded."""
    num_steps = manifest.teacher_num_steps or manifest.num_steps
    scheduler: Any = make_scheduler(manifest.scheduler)
    scheduler.set_timesteps(num_steps)
    sigmas, keypoints = scheduler.sigmas.tolist(), list(even_grid(num_steps, manifest.num_student_steps))
    assert torch.allclose(torch.tensor(sigmas)[keypoints], manifest.key_sigmas, atol=1e-4)
    return replace(manifest, sigmas=sigmas, keypoints=keypoints, num_steps=num_steps)


if __name__ == "__main__":
    main()
