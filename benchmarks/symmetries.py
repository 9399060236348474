"""Has the playground's teacher symmetries that could double its recorded trajectories?

    accvideo playground prompts --num 152 --out prompts.txt
    accvideo record playground --prompts prompts.txt --solver adams2 --num-steps 25 --batch-size 16 --out trajectories
    python benchmarks/symmetries.py trajectories

A world of shapes has them: a clip that is mirrored shows the prompt with its directions exchanged. What training would
need is that the recorded states, which are latents, can be mirrored, and that the teacher's velocity is then mirrored
too. So the videos' latents are mirrored, decoded and judged by the exchanged prompts, and compared with the mirrored
clips; and the teacher's velocities (its conditional call) at mirrored states are compared with its mirrored velocities,
as a root-mean-square distance relative to theirs.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from accvideo.call import replay
from accvideo.data.dataset import TrajectoryFolder
from accvideo.decode import load_recorded_teacher, recorded_clips
from accvideo.metrics import psnr
from accvideo.playground.judge import judge
from accvideo.trajectory import Trajectory, TrajectoryBatch, collate_trajectories

MIRRORS = {"left and right": (-1, ("left", "right")), "up and down": (-2, ("up", "down"))}
"""The dimension of latents that is turned around, and the words that change places."""


def exchanged(prompt: str, words: tuple[str, str]) -> str:
    """A prompt with two words in each other's places."""
    other = dict(zip(words, reversed(words), strict=True))
    return " ".join(other.get(word, word) for word in prompt.split())


def mirrored(trajectory: Trajectory, dimension: int, words: tuple[str, str]) -> Trajectory:
    """A trajectory with mirrored states and the prompt that goes with them; its calls are those of before."""
    return replace(trajectory, states=trajectory.states.flip(dimension), prompt=exchanged(trajectory.prompt, words))


def velocities(pipeline: Any, batch: TrajectoryBatch, prompts: Sequence[str], dimension: int | None = None) -> Tensor:
    """The teacher's conditional velocities at the recorded key points but the last, `[key point, batch, ...]`.

    Args:
        pipeline: the teacher's.
        batch: the recorded states.
        prompts: one a clip.
        dimension: in which the states are mirrored; None: they are not.
    """
    length = batch.calls[0].tensors["encoder_hidden_states"].shape[1]
    embeddings, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=length)
    found = []
    for keypoint, call in enumerate(batch.calls):
        latents = batch.states[:, keypoint] if dimension is None else batch.states[:, keypoint].flip(dimension)
        own = replace(call, tensors=call.tensors | {"encoder_hidden_states": embeddings.float()})
        found.append(replay(pipeline.transformer, own, latents))
    return torch.stack(found)


@torch.no_grad()
def main() -> None:
    """Compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    options = parser.parse_args()
    folder = TrajectoryFolder(options.data)
    teacher = load_recorded_teacher(folder.manifest, "cpu")
    trajectories = [folder[i] for i in range(len(folder))]
    prompts, batch = [each.prompt for each in trajectories], collate_trajectories(trajectories)
    clips, velocity = recorded_clips(teacher, trajectories), velocities(teacher.pipeline, batch, prompts)
    keypoints = [f"velocity off at {float(sigma):.2f}" for sigma in folder.manifest.key_sigmas[:-1]]
    table = Table("mirrored", "all right, %", "PSNR to the mirrored clip, dB", *keypoints)
    table.add_row(
        "not at all", f"{100 * judge(clips, prompts).all_right.float().mean():.1f}", "", *["0"] * len(keypoints)
    )
    for name, (dimension, words) in MIRRORS.items():
        others = [mirrored(each, dimension, words) for each in trajectories]
        found = recorded_clips(teacher, others)
        right = judge(found, [each.prompt for each in others]).all_right.float().mean()
        likeness = psnr(found, clips.flip(dimension - 1)).mean()  # clips have colors last
        turned = velocity.flip(dimension)
        off = velocities(teacher.pipeline, batch, [each.prompt for each in others], dimension) - turned
        shares = off.square().flatten(1).mean(1).sqrt() / turned.square().flatten(1).mean(1).sqrt()
        table.add_row(name, f"{100 * right:.1f}", f"{likeness:.1f}", *(f"{share:.2f}" for share in shares.tolist()))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
