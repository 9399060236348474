"""Trains a student by a method that is not AccVideo's, on the same data set, within a budget of evaluations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import AdamW

from accvideo.analysis.baselines.dmd2 import fake_score_loss, predicted_video, student_loss
from accvideo.analysis.baselines.perflow import window_loss
from accvideo.call import DenoiserCall, denoiser_blocks, layer_features, replay_with_features
from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.manifest import Manifest
from accvideo.discriminator import Head, token_grid
from accvideo.flow import euler_step, noised
from accvideo.inference.student_config import student_config
from accvideo.losses import cross_entropy_head_loss
from accvideo.student import Student, save_student
from accvideo.training.consistency import consistency_loss, teacher_levels
from accvideo.training.guidance import Field, GuidedTeacher, at_level, find_practice
from accvideo.training.start import arithmetic, compile_blocks, load_denoisers
from accvideo.trajectory import TrajectoryBatch
from accvideo.types import Latents, UserError

Baseline = Literal["perflow", "dmd2", "consistency_recorded", "consistency_keypoints", "consistency_both"]

FACTORS: dict[Baseline, tuple[bool, bool]] = {
    "consistency_recorded": (False, True),
    "consistency_keypoints": (True, False),
    "consistency_both": (False, False),
}
"""Consistency without one or both of what sets it apart from the trajectory loss, beside its target: whether noise is
drawn anew, and whether all of the teacher's levels within a step are trained at or the key point alone."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a student of a baseline is trained."""

    method: Baseline
    learning_rate: float
    budget: int
    """Denoiser evaluations for one sample each, recording included: forward 1, backward 2."""
    seed: int = 0
    batch_size: int = 16
    lora_rank: int | None = None
    """None: all weights."""
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    """As for `accvideo distill`."""
    device: str = "cpu"
    adversarial_weight: float = 0.1
    """Of DMD2's adversarial term."""
    fake_updates: int = 5
    """Of the fake score for each of the student's: DMD2's ratio (arXiv:2405.14867, section 4.2)."""


@dataclass
class Budget:
    """Evaluations of denoisers, for one sample each: a forward pass is one, a backward pass two."""

    spent: int = 0

    def count(self, samples: int, units: int) -> None:
        """Take note of `units` evaluations of a batch."""
        self.spent += samples * units

    def counted(self, field: Field, units: Callable[[], int]) -> Field:
        """The same field, taking note of each use."""

        def velocity(latents: Latents, sigma: Tensor) -> Latents:
            self.count(len(latents), units())
            return field(latents, sigma)

        return velocity


@dataclass(frozen=True)
class Setting:
    """What a method works with."""

    recipe: Recipe
    manifest: Manifest
    student: Student
    optimizer: AdamW
    teacher: GuidedTeacher
    levels: Sequence[Sequence[float]]
    """Noise levels of the teacher's steps, from each key point to the next."""
    generator: torch.Generator
    budget: Budget

    def noise(self, like: Latents) -> Latents:
        """Fresh noise."""
        return torch.randn(like.shape, generator=self.generator).to(like.device)

    def levels_between(self, keypoint: int, size: int, device: torch.device) -> Tensor:
        """A random noise level for each sample within the student's step from a key point to the next."""
        first, last = self.manifest.key_sigmas[keypoint : keypoint + 2]
        return torch.lerp(first, last, torch.rand(size, generator=self.generator)).to(device)

    def field(self, batch: TrajectoryBatch, keypoint: int, student: Student | None = None) -> Field:
        """The velocity of the student, or of another."""
        recorded = float(self.manifest.key_sigmas[keypoint])

        def velocity(latents: Latents, sigma: Tensor) -> Latents:
            call = at_level(batch.call(keypoint), recorded, sigma)
            return (student or self.student).velocity(batch.denoisers[keypoint], call, latents)

        return self.budget.counted(velocity, lambda: 3 if torch.is_grad_enabled() else 1)

    def teacher_field(self, batch: TrajectoryBatch, keypoint: int) -> Field:
        """The teacher's velocity."""
        calls = 1 if self.teacher.guidance is None else 2
        return self.budget.counted(self.teacher.field(batch, keypoint), lambda: calls)


Update = Callable[[int, TrajectoryBatch], Tensor]
"""One iteration: its number and a batch in, a loss for display out."""


def train_baseline(recipe: Recipe, data: str, out: Path, progress: Progress) -> dict[str, Any]:
    """Train until the budget is spent, and save the student; one that is there already is left as it is.

    Returns:
        Iterations and evaluations spent.

    Raises:
        UserError: data set and teacher do not match, or the folder cannot be written.
    """
    folder = TrajectoryFolder(data)
    setting = start(recipe, folder)
    make = {"perflow": perflow, "dmd2": dmd2, **dict.fromkeys(FACTORS, consistency)}[recipe.method]
    batches = folder.batches(recipe.batch_size, recipe.seed)
    first = next(batches).to(recipe.device)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        update = make(setting, first)
    bar = progress.add_task(out.name, total=recipe.budget, completed=setting.budget.spent)
    iteration = 0
    while setting.budget.spent < recipe.budget:
        for group in setting.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * setting.budget.spent / recipe.budget))
        update(iteration, next(batches).to(recipe.device))
        progress.update(bar, completed=setting.budget.spent)
        iteration += 1
    spent = {"num_iterations": iteration, "evaluations": setting.budget.spent}
    config = student_config(folder.manifest, first.calls, recipe.lora_rank, asdict(recipe) | spent)
    save_student(out, setting.student, config, {})
    return spent


def start(recipe: Recipe, folder: TrajectoryFolder) -> Setting:
    """Student, teacher and optimizer before the first iteration; the recording is on the budget's account."""
    manifest = folder.manifest
    if manifest.sigmas[0] < manifest.sigmas[-1]:
        raise UserError(f"the noise levels of {manifest.teacher} rise from noise to video; baselines know falling ones")
    student = make_student(recipe, manifest, keep_teacher=True)
    budget = Budget(manifest.denoiser_calls * len(folder))
    practice = find_practice(manifest, folder[0], device=recipe.device)
    teacher = GuidedTeacher(student, manifest.key_sigmas, practice.guidance and practice.guidance.to(recipe.device))
    levels = [
        [*(level for level, _ in starts), float(end)]
        for starts, end in zip(teacher_levels(manifest, practice.denoisers), manifest.key_sigmas[1:], strict=True)
    ]
    optimizer = AdamW(student.trained().values(), lr=recipe.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(recipe.seed)
    return Setting(recipe, manifest, student, optimizer, teacher, levels, generator, budget)


def make_student(recipe: Recipe, manifest: Manifest, keep_teacher: bool) -> Student:
    """A student that is still its teacher."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        student = Student(
            {name: denoiser.to(recipe.device) for name, denoiser in load_denoisers(manifest).items()},
            lora_rank=recipe.lora_rank,
            arithmetic=partial(arithmetic, recipe.device, recipe.precision),
            keep_teacher=keep_teacher,
        )
    if recipe.compile:
        compile_blocks(student)
    return student


def step(optimizer: AdamW, loss: Tensor) -> Tensor:
    """One update of the optimizer's parameters alone, the gradient clipped to norm 1; the loss."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loss.backward(inputs=parameters)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def perflow(setting: Setting, first: TrajectoryBatch) -> Update:
    """Knowledge distillation from forward-diffused points, one window an iteration."""
    points, sigmas = setting.manifest.keypoints, torch.tensor(setting.manifest.sigmas)

    def update(iteration: int, batch: TrajectoryBatch) -> Tensor:
        keypoint = iteration % (len(points) - 1)
        video = batch.state(-1)
        levels = sigmas[points[keypoint] : points[keypoint + 1] + 1].to(video.device)
        fields = setting.field(batch, keypoint), setting.teacher_field(batch, keypoint)
        loss = window_loss(*fields, video, setting.noise(video), levels)
        return step(setting.optimizer, loss.mean())

    return update


def consistency(setting: Setting, first: TrajectoryBatch) -> Update:
    """The loss of `distill --loss consistency`, one step an iteration, without one or both of the `FACTORS`."""
    fresh_noise, all_levels = FACTORS[setting.recipe.method]

    def update(iteration: int, batch: TrajectoryBatch) -> Tensor:
        keypoint = iteration % setting.manifest.num_student_steps
        video, recorded = batch.state(-1), batch.state(0)
        levels = torch.tensor(setting.levels[keypoint])
        place = torch.randint(len(levels) - 1 if all_levels else 1, (len(video),), generator=setting.generator)
        loss = consistency_loss(
            setting.field(batch, keypoint),
            setting.teacher_field(batch, keypoint),
            video,
            setting.noise(video) if fresh_noise else recorded,
            levels[place].to(video.device),
            levels[place + 1].to(video.device),
            end=float(levels[-1]),
        )
        return step(setting.optimizer, loss.mean())

    return update


def given(velocity: Latents) -> Field:
    """A field that has been asked already, at the one place where it will be."""
    return lambda latents, sigma: velocity


def dmd2(setting: Setting, first: TrajectoryBatch) -> Update:
    """Distribution matching with an adversarial term; the student is trained where its own steps lead.

    DMD2 samples with fresh noise at each step; here the steps are Euler steps, as for all students, so that the same
    sampler runs them. The head sees the fake score's last features at noised videos; the real ones are the data set's.
    """
    recipe, manifest, budget = setting.recipe, setting.manifest, setting.budget
    num_steps, key_sigmas = manifest.num_student_steps, manifest.key_sigmas
    fake = make_student(recipe, manifest, keep_teacher=False)
    fake.load_state_dict(setting.student.state_dict())
    layer = {name: len(denoiser_blocks(module)) for name, module in fake.denoisers.items()}

    def call_at(batch: TrajectoryBatch, window: int, sigma: Tensor) -> DenoiserCall:
        return at_level(batch.call(window), float(key_sigmas[window]), sigma)

    def features(batch: TrajectoryBatch, window: int, latents: Latents, sigma: Tensor) -> Tensor:
        budget.count(len(latents), 3 if torch.is_grad_enabled() else 1)
        name = batch.denoisers[window]
        with fake.arithmetic():
            return layer_features(fake.denoisers[name], call_at(batch, window, sigma), latents, layer[name]).float()

    def both(
        batch: TrajectoryBatch, window: int, latents: Latents, sigma: Tensor, units: int
    ) -> tuple[Latents, Tensor]:
        """The fake score's velocity and, of the same pass, its last features."""
        budget.count(len(latents), units)
        name = batch.denoisers[window]
        with fake.arithmetic():
            velocity, seen = replay_with_features(
                fake.denoisers[name], call_at(batch, window, sigma), latents, layer[name]
            )
        return velocity, seen.float()

    def logits(values: Tensor) -> Tensor:
        values = (values - center) / scale
        frames, height, width = token_grid(values.shape[1], first.states.shape[2:])
        images = values.reshape(-1, height, width, values.shape[-1]).permute(0, 3, 1, 2)
        return head(images).reshape(len(values), -1)

    # As AccVideo's own heads, this one sees channels of mean 0 and deviation 1: see `Discriminator`.
    with torch.no_grad():
        video, noise = first.state(-1), setting.noise(first.state(-1))
        levels = [setting.levels_between(window, len(video), video.device) for window in range(num_steps)]
        seen = torch.cat(
            [features(first, window, noised(video, noise, level), level) for window, level in enumerate(levels)]
        ).flatten(0, 1)
        center, scale = seen.mean(0), seen.std(0).clamp(min=1e-6)
    head = Head(len(center)).to(recipe.device)
    optimizer = AdamW([*fake.trained().values(), *head.parameters()], lr=recipe.learning_rate, weight_decay=0.0)

    def generate(keypoint: int, batch: TrajectoryBatch) -> Latents:
        latents = setting.noise(batch.state(0))
        with torch.no_grad():
            for earlier in range(keypoint):
                sigma, next_sigma = (float(level) for level in key_sigmas[earlier : earlier + 2])
                velocity = setting.field(batch, earlier)(
                    latents, torch.full((len(latents),), sigma, device=latents.device)
                )
                latents = euler_step(latents, velocity, sigma, next_sigma)
        sigma = key_sigmas[keypoint].expand(len(latents)).to(latents.device)
        return predicted_video(latents, setting.field(batch, keypoint)(latents, sigma), sigma)

    def update(iteration: int, batch: TrajectoryBatch) -> Tensor:
        real_video = batch.state(-1)
        size, device = len(real_video), real_video.device
        for number in range(recipe.fake_updates):
            with torch.no_grad():
                video = generate((iteration + number) % num_steps, batch)
            window = int(torch.randint(num_steps, (1,), generator=setting.generator))
            noise, sigma = setting.noise(video), setting.levels_between(window, size, device)
            velocity, fake_features = both(batch, window, noised(video, noise, sigma), sigma, units=3)
            real_features = features(batch, window, noised(real_video, noise, sigma), sigma)
            head_loss = cross_entropy_head_loss(logits(real_features), logits(fake_features))
            score_loss = fake_score_loss(given(velocity), video, noise, sigma)
            loss = score_loss + recipe.adversarial_weight * head_loss
            step(optimizer, loss.mean())
        video = generate(iteration % num_steps, batch)
        window = int(torch.randint(num_steps, (1,), generator=setting.generator))
        noise, sigma = setting.noise(video), setting.levels_between(window, size, device)
        # Of the fake score only the gradient of its input is wanted.
        velocity, fake_features = both(batch, window, noised(video, noise, sigma), sigma, units=2)
        fields = setting.teacher_field(batch, window), given(velocity.detach())
        fooled = softplus(-logits(fake_features)).mean(1)
        loss = student_loss(*fields, video, noise, sigma) + recipe.adversarial_weight * fooled
        return step(setting.optimizer, loss.mean())

    return update
