"""Whether a distillation goes well: measures of the student's samples, and alarms on the lines of its metrics."""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from accvideo.types import Latents

MAX_VALUES = 1 << 20  # a channel, from which a percentile is taken; more are thinned out evenly

MAX_LOSS_RATIO = 2.0
"""Trajectory loss over a sweep of the key points, over the teacher's own at the student's few steps."""
MAX_RISE = 1.2
"""Held-out trajectory loss over the lowest so far, at two validations in a row: it swings in the first iterations."""
MAX_WORSE = 2.0
"""Latent error over that at the start, at two validations in a row. While the learning rate is high it was 1.6
times that of the start in a training that ended below it."""
MAX_PULL = 1.0
"""Gradient norm of the adversarial loss over that of the trajectory loss, geometric mean of two sweeps."""
HEAD_SWEEPS = 6
"""Sweeps of adversarial training after which the heads should have learned something."""
MIN_HEAD_GAIN = 0.01
"""By what share the heads' loss should then lie below their first."""
MAX_ACCURACY = 0.98
"""Share of tokens that the heads judge right, over two sweeps."""
MAX_SATURATION = 0.02
"""Share of values beyond the teacher's 0.1 and 99.9 percentiles; the teacher's own share is 0.002."""
MAX_CONTRAST = 1.25
"""Standard deviation inside a sample over the teacher's, and its inverse."""
MAX_MOTION = 1.6
"""Mean absolute change from frame to frame over the teacher's, and its inverse."""
MAX_DIVERSITY = 1.25
"""Mean distance between two samples over the teacher's, and its inverse."""

ROUNDING = 1e-6
"""Trajectory losses and latent errors are compared with no smaller one. Where the teacher takes as few steps as the
student, and no guidance is to be learnt, there is nothing to begin with."""

CHANCE_LOSSES = {"nonsaturating": 2 * math.log(2), "saturating": 2 * math.log(2), "hinge": 2.0}
"""Loss of heads that cannot tell, by the name of the adversarial loss."""


# --- Measures of samples, in the teacher's latent space ---


def by_channel(latents: Latents) -> Tensor:
    """Latents `[batch, channels, ...]`, or packed `[batch, tokens, channels]`, as `[batch, channels, positions]`."""
    if latents.ndim > 3:
        return latents.flatten(2)
    return latents.reshape(len(latents), -1, latents.shape[-1]).transpose(1, 2)


def percentile_limits(latents: Latents, share: float = 0.001) -> tuple[Tensor, Tensor]:
    """The values `[channels, 1]` below which, and above which, a share of each channel's values lies."""
    values = by_channel(latents.float()).transpose(0, 1).flatten(1)
    values = values[:, :: math.ceil(values.shape[1] / MAX_VALUES)].sort(1).values
    rank = min(int(share * values.shape[1]), (values.shape[1] - 1) // 2)
    return values[:, rank, None], values[:, -1 - rank, None]


def saturation(latents: Latents, limits: tuple[Tensor, Tensor]) -> float:
    """Share of the values that lie beyond their channel's limits."""
    values, (low, high) = by_channel(latents.float()), limits
    return ((values < low) | (values > high)).float().mean().item()


def contrast(latents: Latents) -> float:
    """Standard deviation over the positions of a channel, mean over channels and samples."""
    return by_channel(latents.float()).std(2, correction=0).mean().item()


def motion(latents: Latents) -> float:
    """Mean absolute change from a latent frame to the next; 0 where latents have no frames or only one."""
    if latents.ndim != 5 or latents.shape[2] == 1:
        return 0.0
    return latents.float().diff(dim=2).abs().mean().item()


def diversity(latents: Latents) -> float:
    """Root mean squared distance of two samples, mean over all pairs; 0 for a single sample."""
    flat = latents.float().flatten(1)
    return torch.pdist(flat).mean().item() / math.sqrt(flat.shape[1]) if len(flat) > 1 else 0.0


def sample_health(student: Latents, teacher: Latents) -> dict[str, float]:
    """Saturation, contrast, motion and diversity of finished samples beside the teacher's.

    Args:
        student: finished latents.
        teacher: the teacher's for the same prompts and noise.

    Returns:
        `saturation`: share of values beyond the teacher's 0.1 and 99.9 percentiles. The others are ratios to the
        teacher's value, and missing where that is 0 (a single sample has no diversity, a single frame no motion).
    """
    measures = {"contrast": contrast, "motion": motion, "diversity": diversity}
    values = {name: (measure(student), measure(teacher)) for name, measure in measures.items()}
    ratios = {name: own / theirs for name, (own, theirs) in values.items() if theirs > 0}
    return {"saturation": saturation(student, percentile_limits(teacher))} | ratios


# --- Alarms ---


@dataclass(frozen=True)
class Alarm:
    """Something measured that a healthy training keeps clear of."""

    name: str
    measured: float
    threshold: float
    meaning: str
    """What was measured and what that means."""
    advice: str

    def line(self, iteration: int) -> dict[str, Any]:
        """As a line of metrics."""
        message = f"{self.meaning} is {self.measured:.3g}, the limit {self.threshold:.4g}. {self.advice}"
        return {
            "iteration": iteration,
            "alarm": self.name,
            "measured": self.measured,
            "threshold": self.threshold,
            "message": message,
        }


@dataclass
class Watch:
    """Looks at each line of metrics and says when something goes wrong, once a kind.

    What it knows follows from the lines alone: a resumed run shows it the lines so far, and goes on.

    Args:
        num_student_steps: a sweep of the key points.
        chance_loss: the heads' loss when they cannot tell; see `CHANCE_LOSSES`.
    """

    num_student_steps: int
    chance_loss: float
    rung: set[str] = field(default_factory=set)
    start: dict[str, Any] = field(default_factory=dict)
    """The student before its first iteration: the teacher itself at few steps, or the student it goes on from."""
    first_losses: dict[int, float] = field(default_factory=dict)
    """Trajectory loss by key point that the training started from."""
    first_head_losses: dict[int, float] = field(default_factory=dict)
    num_judged: int = 0
    lowest_validation: float = math.inf
    num_risen: int = 0
    """Validations in a row with a held-out loss above the limit."""
    num_worse: int = 0
    """Validations in a row with a latent error above the limit."""
    losses: deque[float] = field(init=False)
    head_losses: deque[tuple[float, float]] = field(init=False)
    """The heads' last losses, each with its key point's first."""
    accuracies: deque[float] = field(init=False)
    pulls: deque[float] = field(init=False)

    def __post_init__(self) -> None:
        sweep = self.num_student_steps
        self.losses = deque(maxlen=sweep)
        self.head_losses = deque(maxlen=2 * sweep)
        self.accuracies = deque(maxlen=2 * sweep)
        self.pulls = deque(maxlen=2 * sweep)

    def look(self, line: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The lines of the alarms that ring at a line of metrics for the first time."""
        if "start" in line:
            self.start = dict(line["start"])
            self.first_losses = dict(enumerate(self.start["validation_loss"]))
        alarms: list[Alarm] = []
        if "keypoint" in line:
            alarms += self.finite(line)
        # Without a gradient norm of its own the loss is of a step that began off the teacher's trajectory.
        if {"trajectory_loss", "trajectory_gradient_norm"} <= line.keys():
            alarms += self.trajectory(line)
        if "head_loss" in line:
            alarms += self.heads(line)
        if "adversarial_gradient_norm" in line:
            alarms += self.pull(line)
        if "latent_error" in line:
            alarms += self.validation(line)
            alarms += self.samples(line)
        new = [alarm for alarm in alarms if alarm.name not in self.rung]
        self.rung |= {alarm.name for alarm in new}
        return [alarm.line(line["iteration"]) for alarm in new]

    def finite(self, line: Mapping[str, Any]) -> Iterable[Alarm]:
        """Rings at a loss or gradient norm that is not a number."""
        bad = [name for name, value in line.items() if name.endswith(("loss", "norm")) and not math.isfinite(value)]
        if bad:
            advice = "The step was skipped. If it comes again, lower --learning-rate, or use --precision float32."
            yield Alarm(
                "not_finite", len(bad), 0, f"The number of values that are not finite ({', '.join(bad)})", advice
            )

    def trajectory(self, line: Mapping[str, Any]) -> Iterable[Alarm]:
        """Rings when the student is further off the teacher's trajectories than the teacher's own few steps."""
        keypoint, loss = line["keypoint"], line["trajectory_loss"]
        if not self.start:  # nothing held out: the first visit, but key point 0 alone is visited before any update
            self.first_losses.setdefault(keypoint, min(loss, self.first_losses.get(0, math.inf)))
        self.losses.append(loss / max(self.first_losses[keypoint], ROUNDING))
        ratio = fmean(self.losses)
        if len(self.losses) == self.losses.maxlen and ratio > MAX_LOSS_RATIO:
            meaning = "The trajectory loss over that before the training, mean of a sweep,"
            advice = (
                "The student diverges: lower --learning-rate or --adversarial-weight, or raise --warmup-iterations."
            )
            yield Alarm("diverging", ratio, MAX_LOSS_RATIO, meaning, advice)

    def heads(self, line: Mapping[str, Any]) -> Iterable[Alarm]:
        """Rings when the heads learn nothing, or know everything."""
        self.num_judged += 1
        first = self.first_head_losses.setdefault(line["keypoint"], line["head_loss"])
        self.head_losses.append((line["head_loss"], first))
        self.accuracies.append((line["real_accuracy"] + line["fake_accuracy"]) / 2)
        now, before = (fmean(values) for values in zip(*self.head_losses, strict=True))
        limit = max((1 - MIN_HEAD_GAIN) * before, self.chance_loss)
        if self.num_judged == HEAD_SWEEPS * self.num_student_steps and now > limit:
            meaning = f"The heads' loss after {HEAD_SWEEPS} sweeps of adversarial training (at first {before:.3g})"
            advice = "They do not learn, and push the student at random: raise --head-learning-rate or --head-updates."
            yield Alarm("heads_idle", now, limit, meaning, advice)
        accuracy = fmean(self.accuracies)
        if len(self.accuracies) == self.accuracies.maxlen and accuracy > MAX_ACCURACY:
            meaning = "The share of tokens that the heads judge right, over two sweeps,"
            advice = "The student learns little from heads that always win: lower --head-learning-rate."
            yield Alarm("heads_win", accuracy, MAX_ACCURACY, meaning, advice)

    def pull(self, line: Mapping[str, Any]) -> Iterable[Alarm]:
        """Rings when the adversarial loss pulls the student harder than its teacher's trajectories do."""
        norms = line["adversarial_gradient_norm"], line["trajectory_gradient_norm"]
        if all(0 < norm < math.inf for norm in norms):
            self.pulls.append(math.log(norms[0] / norms[1]))
        ratio = math.exp(fmean(self.pulls)) if self.pulls else 0.0
        if len(self.pulls) == self.pulls.maxlen and ratio > MAX_PULL:
            meaning = "The adversarial loss's gradient norm over the trajectory loss's, mean of two sweeps,"
            advice = "The student follows the heads, not the teacher: lower --adversarial-weight."
            yield Alarm("adversarial_pull", ratio, MAX_PULL, meaning, advice)

    def validation(self, line: Mapping[str, Any]) -> Iterable[Alarm]:
        """Rings when held-out trajectories are followed worse than before."""
        ratio = line["latent_error"] / max(self.start.get("latent_error", math.inf), ROUNDING)
        self.num_worse = self.num_worse + 1 if ratio > MAX_WORSE else 0
        if self.num_worse == 2:
            meaning = "The distance to the teacher's held-out latents over that before the training, twice in a row,"
            advice = "What the training started from does better: lower --learning-rate or --adversarial-weight."
            yield Alarm("worse_than_start", ratio, MAX_WORSE, meaning, advice)
        loss = fmean(line["validation_loss"])
        ratio = loss / max(min(loss, self.lowest_validation), ROUNDING)
        self.lowest_validation = min(loss, self.lowest_validation)
        self.num_risen = self.num_risen + 1 if ratio > MAX_RISE else 0
        if self.num_risen == 2:
            meaning = "The held-out trajectory loss over its lowest, at two validations in a row,"
            advice = "Record more trajectories, or train less: --keep-best saves the best student, --patience stops."
            yield Alarm("held_out_rises", ratio, MAX_RISE, meaning, advice)

    def samples(self, line: Mapping[str, Any]) -> Iterable[Alarm]:
        """Rings when samples look unlike the teacher's, and more so than at the start."""
        share = line["saturation"]
        if share > max(MAX_SATURATION, self.start.get("saturation", 0.0)):
            meaning = "The share of values beyond the teacher's 0.1 and 99.9 percentiles"
            advice = "Colors burn out: lower --learning-rate or --adversarial-weight."
            yield Alarm("saturation", share, MAX_SATURATION, meaning, advice)
        for name, limit, less, more in (
            ("contrast", MAX_CONTRAST, "Samples wash out", "Samples overshoot"),
            ("motion", MAX_MOTION, "Samples stand still", "Samples flicker"),
            ("diversity", MAX_DIVERSITY, "Samples grow alike", "Samples scatter"),
        ):
            if (ratio := line.get(name)) is None:
                continue
            off, at_start = (abs(math.log(max(value, 1e-9))) for value in (ratio, self.start.get(name, 1.0)))
            if off > max(math.log(limit), 1.1 * at_start):
                threshold = limit if ratio > 1 else 1 / limit
                advice = f"{more if ratio > 1 else less}: lower --learning-rate or --adversarial-weight."
                yield Alarm(name, ratio, threshold, f"The samples' {name} over the teacher's", advice)
