"""How fast the discriminator's heads learn to tell a student's latents from its teacher's, by what they are shown.

    accvideo record playground --prompts prompts.txt --out trajectories --solver adams2 --num-steps 20
    python benchmarks/heads.py trajectories --student playground-student [--rates 1e-3 3e-3]

The student is held still. Its rollouts from fresh noise stand against the recorded states; a new head is trained on two
thirds of both and measured on the others by the AUC of a clip's mean logit (1: all told apart, 0.5: chance). "plain"
features are the teacher's own; "standardized" ones, which `accvideo distill` uses, have mean 0 and deviation 1.
"""

import argparse
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from accvideo.data.dataset import TrajectoryFolder
from accvideo.discriminator import Discriminator, Head
from accvideo.inference.model import student_folder
from accvideo.inference.student_config import read_student_config
from accvideo.losses import cross_entropy_head_loss
from accvideo.student import Student
from accvideo.training.start import arithmetic, load_denoisers, starting_weights
from accvideo.training.steps import Step, set_weights, student_step
from accvideo.trajectory import collate_trajectories

UPDATES = (20, 40, 80, 160)
BATCH_SIZE = 16


@torch.no_grad()
def collect(options: argparse.Namespace) -> tuple[Discriminator, list[tuple[Tensor, Tensor]]]:
    """The discriminator, and for each key point the features of the teacher's and of the student's latents."""
    folder = TrajectoryFolder(options.data)
    sigmas = folder.manifest.key_sigmas
    lora_rank = read_student_config(student_folder(options.student)).lora_rank
    student = Student(load_denoisers(folder.manifest), lora_rank, partial(arithmetic, "cpu", "bfloat16"))
    set_weights(student, starting_weights(options.student, student.trained()))
    starts = range(0, len(folder), 32)
    batches = [collate_trajectories([folder[i] for i in range(s, min(s + 32, len(folder)))]) for s in starts]
    discriminator = Discriminator(student, sigmas, batches[:1])
    found: list[Any] = [([], []) for _ in range(folder.manifest.num_student_steps)]
    for batch in batches:
        latents = torch.randn_like(batch.states[:, 0])
        for keypoint, (real, fake) in enumerate(found):
            latents = student_step(student, batch, latents, sigmas, Step(keypoint, keypoint + 1))
            real.append(discriminator.real_features(batch, keypoint))
            fake.append(discriminator.features(latents, batch, keypoint))
    return discriminator, [(torch.cat(real), torch.cat(fake)) for real, fake in found]


def learn(discriminator: Discriminator, keypoint: int, real: Tensor, fake: Tensor, rate: float) -> list[float]:
    """The AUC of a new head for one key point after so many updates."""
    torch.manual_seed(0)
    discriminator.heads[keypoint] = Head(real.shape[-1])
    optimizer = torch.optim.AdamW(discriminator.heads[keypoint].parameters(), lr=rate, weight_decay=0)
    logits = partial(discriminator.logits, keypoint=keypoint)
    num_seen, found = len(real) * 2 // 3, []
    for update in range(1, UPDATES[-1] + 1):
        rows, others = torch.randint(num_seen, (2, BATCH_SIZE))
        loss = cross_entropy_head_loss(logits(real[rows]), logits(fake[others])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update in UPDATES:
            with torch.no_grad():
                high, low = logits(real[num_seen:]).mean(1), logits(fake[num_seen:]).mean(1)
            found.append((high[:, None] > low).float().mean().item())
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="recorded trajectories")
    parser.add_argument("--student", required=True, help="student of their teacher")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3], help="learning rates of the heads")
    options = parser.parse_args()
    torch.manual_seed(0)
    discriminator, features = collect(options)
    own = discriminator.center.clone(), discriminator.scale.clone()
    table = Table("key point", "features", "rate", *(f"{number} updates" for number in UPDATES))
    for keypoint, (real, fake) in enumerate(features):
        for kind in ("plain", "standardized"):
            discriminator.center, discriminator.scale = own
            if kind == "plain":
                discriminator.center, discriminator.scale = torch.zeros_like(own[0]), torch.ones_like(own[1])
            for rate in options.rates:
                aucs = learn(discriminator, keypoint, real, fake, rate)
                table.add_row(str(keypoint + 1), kind, f"{rate:g}", *(f"{each:.2f}" for each in aucs))
    Console().print(table)


if __name__ == "__main__":
    main()
