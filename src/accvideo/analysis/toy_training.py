"""The 1-D study's teacher and its students, all seeds and variants of a method side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor
from torch.nn.functional import softplus

from accvideo.analysis.baselines.dmd2 import distribution_matching_loss, predicted_video
from accvideo.analysis.fitting import descend, run, start_fit
from accvideo.analysis.line import DATA, moved_data, trajectories
from accvideo.analysis.networks import Heads, Points, VelocityNetworks, generator
from accvideo.flow import euler_step, keypoint_indices, noised, secant_velocity, shifted_sigmas
from accvideo.losses import cross_entropy_head_loss, nonsaturating_generator_loss, trajectory_loss


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of the 1-D study that every method shares."""

    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    width: int = 32
    num_blocks: int = 2
    teacher_iterations: int = 10_000
    teacher_batch_size: int = 2048
    teacher_learning_rate: float = 1e-4
    """The paper's, as the two above (arXiv:2503.19462, supplement A)."""
    num_steps: int = 50
    """Euler steps of the teacher."""
    num_student_steps: int = 5
    num_trajectories: int = 8192
    """Recorded for each seed; a method that starts from forward-diffused points gets as many denoiser calls."""
    iterations: int = 1500
    """Updates of each student."""
    batch_size: int = 256
    learning_rate: float = 5e-4
    """Of students, heads and the fake score."""
    adversarial_weight: float = 0.1
    fake_updates: int = 5
    """Of the fake score for each of the student's: DMD2's ratio (arXiv:2405.14867, section 4.2)."""
    mismatches: tuple[float, ...] = (0.0, 1.5, 3.0)
    """Degrees M that students are distilled at."""

    @property
    def sigmas(self) -> Tensor:
        """Noise levels of the teacher's steps."""
        return shifted_sigmas(self.num_steps)

    @property
    def keypoints(self) -> list[int]:
        """The states that a student visits."""
        return keypoint_indices(self.num_steps, self.num_student_steps)

    @property
    def key_sigmas(self) -> list[float]:
        """Noise levels of the key points."""
        return self.sigmas[self.keypoints].tolist()

    @property
    def recording_calls(self) -> int:
        """Denoiser calls of the teacher for the trajectories of one seed."""
        return self.num_trajectories * self.num_steps

    def normal(self, purpose: str, number: int, size: int, times: int = 1) -> Points:
        """Normal numbers: a row for each seed, all rows `times` over."""
        rows = [torch.randn(size, generator=generator(seed, purpose, number)) for seed in self.seeds]
        return torch.stack(rows).repeat(times, 1)

    def uniform(self, purpose: str, number: int, size: int, times: int = 1) -> Points:
        """Numbers from 0 to 1: a row for each seed, all rows `times` over."""
        rows = [torch.rand(size, generator=generator(seed, purpose, number)) for seed in self.seeds]
        return torch.stack(rows).repeat(times, 1)


@dataclass(frozen=True)
class Students:
    """Trained students of one method: several variants of each seed."""

    networks: VelocityNetworks
    teacher_calls: dict[str, int]
    """By variant: denoiser calls of the teacher for one student, in recording and training."""
    seconds: float
    """Of the training of all."""


def filled(data: Sequence[float], size: int) -> Tensor:
    """A batch of the points of a data set, each equally often."""
    return torch.tensor(data).repeat_interleave(size // len(data))


def train_teacher(study: Study, folder: Path, progress: Progress) -> tuple[VelocityNetworks, float]:
    """Flow matching on the two points, one teacher a seed (Lipman et al. 2023, arXiv:2210.02747); and its seconds."""
    teacher = VelocityNetworks(study.seeds, study.width, study.num_blocks)
    fit = start_fit({"teacher": teacher}, {"teacher": study.teacher_learning_rate})
    video = filled(DATA, study.teacher_batch_size).expand(len(study.seeds), -1)

    def update(iteration: int) -> None:
        noise = study.normal("teacher noise", iteration, video.shape[1])
        sigma = study.uniform("teacher level", iteration, video.shape[1])
        velocity = teacher((1 - sigma) * video + sigma * noise, sigma)
        descend(fit, trajectory_loss(velocity, noise - video).sum(), "teacher")

    seconds = run(fit, study.teacher_iterations, update, folder / "teacher.safetensors", progress)
    return teacher.eval().requires_grad_(False), seconds


@torch.no_grad()
def record(study: Study, teacher: VelocityNetworks) -> Float[Tensor, "networks samples levels"]:
    """The teacher's trajectories, all states of each."""
    return trajectories(teacher, study.normal("trajectories", 0, study.num_trajectories), study.sigmas)


def train_accvideo(
    study: Study,
    teacher: VelocityNetworks,
    states: Float[Tensor, "networks samples levels"],
    folder: Path,
    progress: Progress,
) -> Students:
    """AccVideo's students (arXiv:2503.19462, Algorithm 1): trajectory loss alone, one head for all, one a key point.

    They see recorded trajectories only, so that no distillation data is there to mismatch. Each update is for the sum
    of both losses; an iteration is one update, and K of them are a sweep of the key points from noise to video.
    """
    names, num_heads = ("trajectory loss", "one shared head", "AccVideo"), study.num_student_steps
    times, sigmas = len(names), study.key_sigmas
    weights = torch.tensor([0.0, 1.0, 1.0]).repeat_interleave(len(study.seeds)) * study.adversarial_weight
    student, frozen = teacher.repeated(times), teacher.repeated(times).requires_grad_(False)
    seeds = list(study.seeds) * times
    heads, shared = Heads(seeds, num_heads, study.width), Heads(seeds, 1, study.width)
    rate = study.learning_rate
    modules = {"student": student, "heads": heads, "shared": shared}
    fit = start_fit(modules, dict.fromkeys(modules, rate))
    states = states[:, :, study.keypoints].repeat(times, 1, 1)
    is_shared = torch.zeros(len(seeds), 1, dtype=torch.bool)
    is_shared[len(study.seeds) : 2 * len(study.seeds)] = True

    def features(latents: Points, keypoint: int) -> Tensor:
        # Of the last block where noise is left, of the one at two thirds of the depth at the video.
        is_video = keypoint + 1 == study.num_student_steps
        layer = max(1, round(study.num_blocks * 2 / 3)) - 1 if is_video else -1
        return frozen.features(latents, sigmas[keypoint + 1])[layer]

    def logits(features: Tensor, keypoint: int) -> Points:
        return torch.where(is_shared, shared(features, 0), heads(features, keypoint))

    def sweep(number: int) -> None:
        rollout = study.normal("accvideo rollout", number, study.batch_size, times)
        for keypoint, (sigma, next_sigma) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            picked = chosen(study, "accvideo batch", number * len(sigmas) + keypoint, states)
            latents, next_latents = picked[..., keypoint], picked[..., keypoint + 1]
            target = secant_velocity(latents, next_latents, sigma, next_sigma)
            rollout = euler_step(rollout, student(rollout, sigma), sigma, next_sigma)
            fake = features(rollout, keypoint)
            fooled = nonsaturating_generator_loss(logits(fake, keypoint))
            descend(fit, (trajectory_loss(student(latents, sigma), target) + weights * fooled).sum(), "student")
            real, rollout = features(next_latents, keypoint), rollout.detach()
            head_loss = cross_entropy_head_loss(logits(real, keypoint), logits(fake.detach(), keypoint))
            descend(fit, head_loss.sum(), "heads", "shared")

    num_sweeps = study.iterations // study.num_student_steps
    seconds = run(fit, num_sweeps, sweep, folder / "accvideo.safetensors", progress, save_every=100)
    calls = [study.recording_calls + looks * study.iterations * study.batch_size for looks in (0, 2, 2)]
    return Students(student.requires_grad_(False), dict(zip(names, calls, strict=True)), seconds)


def chosen(study: Study, purpose: str, number: int, values: Float[Tensor, "networks samples levels"]) -> Tensor:
    """A batch of rows of `values`, the same for all variants of a seed."""
    draws = study.uniform(purpose, number, study.batch_size, values.shape[0] // len(study.seeds))
    indices = (draws * values.shape[1]).long()
    return values.gather(1, indices[..., None].expand(-1, -1, values.shape[2]))


def data_rows(study: Study, mismatches: Sequence[float], size: int) -> Points:
    """A batch of distillation data for each degree of mismatch and seed."""
    return torch.stack([filled(moved_data(mismatch), size) for mismatch in mismatches for _ in study.seeds])


@torch.no_grad()
def windows(study: Study, teacher: VelocityNetworks) -> Float[Tensor, "networks samples 3"]:
    """What PeRFlow's students learn from: start of a window, end of it, and its number.

    The start is a point of the distillation data with noise drawn for it, the end is where the teacher's steps lead
    from there. There are as many as take the denoiser calls of `num_trajectories` whole trajectories.
    """
    times, num_windows = len(study.mismatches), study.num_student_steps
    size = study.num_trajectories * num_windows
    window = torch.arange(size).remainder(num_windows)  # the data repeats in halves, so both see every window
    inner = study.num_steps // num_windows
    sigmas = study.sigmas[window[:, None] * inner + torch.arange(inner + 1)]
    video = data_rows(study, study.mismatches, size)
    start = end = noised(video, study.normal("windows", 0, size, times), sigmas[:, 0].expand_as(video))
    networks = teacher.repeated(times)
    for level in range(inner):
        sigma, next_sigma = sigmas[:, level].expand_as(end), sigmas[:, level + 1].expand_as(end)
        end = end + (next_sigma - sigma) * networks(end, sigma)
    return torch.stack([start, end, window.expand_as(start)], dim=-1)


def train_perflow(study: Study, teacher: VelocityNetworks, folder: Path, progress: Progress) -> Students:
    """PeRFlow's students, one for each degree of mismatch (Yan et al. 2024, arXiv:2405.07510).

    The time of a step is cut into windows; within each the student learns the straight line from a forward-diffused
    point to where the teacher's steps take it.
    """
    student = teacher.repeated(len(study.mismatches))
    fit = start_fit({"student": student}, {"student": study.learning_rate})
    pool, sigmas = windows(study, teacher), torch.tensor(study.key_sigmas)

    def update(iteration: int) -> None:
        start, end, window = chosen(study, "perflow batch", iteration, pool).unbind(-1)
        first, last = sigmas[window.long()], sigmas[window.long() + 1]
        place = study.uniform("perflow level", iteration, study.batch_size, len(study.mismatches))
        latents, sigma = torch.lerp(start, end, place), torch.lerp(first, last, place)
        loss = trajectory_loss(student(latents, sigma), (end - start) / (last - first))
        descend(fit, loss.sum(), "student")

    seconds = run(fit, study.iterations, update, folder / "perflow.safetensors", progress)
    names = [f"PeRFlow, M = {mismatch:g}" for mismatch in study.mismatches]
    return Students(student.requires_grad_(False), dict.fromkeys(names, study.recording_calls), seconds)


def renoised_steps(
    student: VelocityNetworks, noise: Points, sigmas: Sequence[float], fresh: Sequence[Points]
) -> list[Points]:
    """What the student sees at each key point where every step predicts a video and adds fresh noise to it.

    The sampler of consistency models and DMD2 (Song et al. 2023, arXiv:2303.01469, Algorithm 1). The last is the
    video.
    """
    seen = [noise]
    for sigma, next_sigma, each in zip(sigmas[:-1], sigmas[1:], fresh, strict=True):
        video = predicted_video(seen[-1], student(seen[-1], sigma), sigma)
        seen.append((1 - next_sigma) * video + next_sigma * each)
    return seen


def train_dmd(study: Study, teacher: VelocityNetworks, folder: Path, progress: Progress) -> Students:
    """Students by distribution matching, without data, and with DMD2's adversarial term for each degree of mismatch.

    Yin et al. 2024, arXiv:2405.14867: several updates of the fake score (and its head on noised samples) for one of the
    student; the student is trained where its own earlier steps lead. The head sees the fake score's features.
    """
    names = ("DMD", *(f"DMD2, M = {mismatch:g}" for mismatch in study.mismatches))
    times, size = len(names), study.batch_size
    weights = torch.tensor([0.0] + [1.0] * len(study.mismatches)).repeat_interleave(len(study.seeds))
    weights = weights * study.adversarial_weight
    student, fake = teacher.repeated(times), teacher.repeated(times)
    real = teacher.repeated(times).requires_grad_(False)
    head = Heads(list(study.seeds) * times, 1, study.width)
    modules = {"student": student, "fake": fake, "head": head}
    fit = start_fit(modules, dict.fromkeys(modules, study.learning_rate))
    data = data_rows(study, (0.0, *study.mismatches), size)
    sigmas = study.key_sigmas

    def generate(purpose: str, number: int) -> Points:
        keypoint = number % study.num_student_steps
        noise, *fresh = (study.normal(f"dmd {purpose} step {k}", number, size, times) for k in range(keypoint + 1))
        with torch.no_grad():
            latents = renoised_steps(student, noise, sigmas[: keypoint + 1], fresh)[-1]
        return predicted_video(latents, student(latents, sigmas[keypoint]), sigmas[keypoint])

    def diffusion(purpose: str, number: int) -> tuple[Points, Points]:
        noise = study.normal(f"dmd {purpose} noise", number, size, times)
        return noise, 0.02 + 0.96 * study.uniform(f"dmd {purpose} level", number, size, times)

    def update(iteration: int) -> None:
        for number in range(iteration * study.fake_updates, (iteration + 1) * study.fake_updates):
            with torch.no_grad():
                video = generate("fake", number)
            noise, sigma = diffusion("fake", number)
            latents = noised(video, noise, sigma)
            seen = fake.features(latents, sigma)
            loss = trajectory_loss(fake.velocity(seen), noise - video)
            fake_logits = head(seen[-1], 0)
            real_logits = head(fake.features(noised(data, noise, sigma), sigma)[-1], 0)
            loss = loss + weights * cross_entropy_head_loss(real_logits, fake_logits)
            descend(fit, loss.sum(), "fake", "head")
        video = generate("student", iteration)
        noise, sigma = diffusion("student", iteration)
        latents = noised(video, noise, sigma)
        seen = fake.features(latents, sigma)
        with torch.no_grad():
            real_video = predicted_video(latents, real(latents, sigma), sigma)
            fake_video = predicted_video(latents, fake.velocity(seen), sigma)
        fooled = softplus(-head(seen[-1], 0)).mean(1)
        loss = distribution_matching_loss(video, real_video, fake_video) + weights * fooled
        descend(fit, loss.sum(), "student")

    seconds = run(fit, study.iterations, update, folder / "dmd.safetensors", progress, save_every=200)
    return Students(student.requires_grad_(False), dict.fromkeys(names, study.iterations * size), seconds)
