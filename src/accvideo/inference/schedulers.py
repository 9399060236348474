"""Schedulers by which a student walks from key point to key point, in accvideo and in plain diffusers."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from accvideo.call import DenoiserCall
from accvideo.data.manifest import Manifest
from accvideo.flow import euler_step
from accvideo.types import UserError


class KeyPointScheduler(SchedulerMixin, ConfigMixin):
    """Euler steps over a student's own noise levels, for pipelines whose scheduler cannot be made to visit them.

    Whatever sigmas or shift a pipeline asks for, these are the levels the student was trained at.

    Args:
        sigmas: K + 1 noise levels, the last one is the video's.
        timesteps: what the denoiser is told at the first K of them.
        num_train_timesteps: the timestep of sigma 1; some pipelines read it.
        others: of a student trained for several numbers of steps, "sigmas" and "timesteps" for each of the others.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        sigmas: list[float],
        timesteps: list[float],
        num_train_timesteps: int = 1000,
        others: Sequence[Mapping[str, list[float]]] = (),
    ) -> None:
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,
        **_: Any,
    ) -> None:
        """Go back to the first level.

        Raises:
            UserError: if another number of steps is asked for than the student has.
        """
        own: Any = self.config
        schedules = {len(each["timesteps"]): each for each in (own, *own.others)}
        asked = num_inference_steps if sigmas is None else len(sigmas)
        num_steps = len(own.timesteps) if asked is None else asked
        if num_steps not in schedules:
            known = " or ".join(map(str, schedules))
            raise UserError(f"{num_steps} steps asked of a student with {known} steps; use {known}")
        timesteps = schedules[num_steps]["timesteps"]
        self.sigmas = torch.tensor(schedules[num_steps]["sigmas"], dtype=torch.float32)
        dtype = torch.int64 if all(float(timestep).is_integer() for timestep in timesteps) else torch.float32
        self.timesteps = torch.tensor(timesteps, dtype=dtype, device=device)
        self.num_inference_steps = num_steps
        self.set_begin_index(0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Make the next step the one from level `begin_index`."""
        self.begin_index = self.step_index = begin_index

    def scale_model_input(self, sample: Tensor, *_: Any, **__: Any) -> Tensor:
        """The sample itself: flow matching scales nothing."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_: Any
    ) -> SchedulerOutput | tuple[Tensor]:
        """One Euler step in float32 to the next level."""
        sigma, next_sigma = (float(level) for level in self.sigmas[self.step_index : self.step_index + 2])
        self.step_index += 1
        sample = euler_step(sample.float(), model_output.float(), sigma, next_sigma).to(sample.dtype)
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)

    def __len__(self) -> int:
        return len(self.timesteps)


def scheduler_timestep(call: DenoiserCall, sigma: float) -> float:
    """The scheduler's timestep at a recorded call: what the denoiser was told, if that is a timestep.

    Schedulers round it in different ways, so that 1000 times sigma is not exact.
    """
    told = float(call.tensors["timestep"].double().max())  # tokens that are given hold 0 (Wan 2.2 5B)
    return told if abs(told - 1000 * sigma) < 1.5 else 1000 * sigma


def told_timestep(start: Tensor, end: Tensor) -> Tensor:
    """What a denoiser is told on a step where its own noise level does not say how far to go.

    The timestep of the level it sets out from, moved on by the distance to that where the step ends. For a short step
    this is what the teacher is told; shortcut models (Frans et al. 2024, arXiv:2410.12557) give step sizes an embedding
    of their own, for which a teacher has no weights.
    """
    return (2 * start.double() - end.double()).to(start.dtype)


def student_scheduler(manifest: Manifest, timesteps: list[float]) -> SchedulerMixin:
    """The scheduler that takes the student through its key points.

    It is the teacher's own class where that can be made to visit, asked for K steps, the recorded levels and timesteps
    by Euler steps, so that plain diffusers runs the student too. Otherwise it is a `KeyPointScheduler`.
    """
    sigmas = [float(sigma) for sigma in manifest.key_sigmas]
    name = manifest.scheduler["class"]
    # One step visits one level: it has no spacing that a shift could give.
    euler = name == FlowMatchEulerDiscreteScheduler.__name__ and len(timesteps) > 1
    if not manifest.nested_schedule and not (euler and has_own_grid(manifest)):
        return KeyPointScheduler(sigmas, timesteps)
    scheduler_class = getattr(diffusers, name)
    if manifest.nested_schedule:
        takes = inspect.signature(scheduler_class.__init__).parameters
        first_order = {"solver_order": 1, "disable_corrector": list(range(len(timesteps)))}
        changes = {name: value for name, value in first_order.items() if name in takes}
    else:
        changes = nested_euler(manifest)
    scheduler = scheduler_class.from_config(dict(manifest.scheduler["config"]) | changes)
    if walks(scheduler, sigmas, timesteps):
        return scheduler_class.from_config(scheduler.config)
    return KeyPointScheduler(sigmas, timesteps)


def has_own_grid(manifest: Manifest) -> bool:
    """Whether the teacher's pipeline left the noise levels to its scheduler, asking for a number of steps only."""
    settings = manifest.scheduler["config"]
    if settings["use_dynamic_shifting"] or settings["shift_terminal"]:
        return False
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(settings)
    scheduler.set_timesteps(manifest.num_steps)
    return np.allclose(scheduler.sigmas, manifest.sigmas, atol=1e-6)


def nested_euler(manifest: Manifest) -> dict[str, float]:
    """The settings by which `FlowMatchEulerDiscreteScheduler`, asked for K steps, visits every (S / K)-th of S levels.

    It spaces the levels evenly between ends that are shifted already, then shifts them: those of an S-step grid are
    `1 - i p / (1 - i q)` with `q = (shift - 1) / shift * spacing`. Another shift, with the wider spacing of K levels,
    has the same q between key points; `shift_terminal` stretches all distances from 1, and so makes p the same.
    """
    num_steps, num_student_steps = manifest.num_steps, manifest.num_student_steps
    shift, last = manifest.scheduler["config"]["shift"], manifest.scheduler["config"]["num_train_timesteps"] - 1

    def spacing(shift: float, num_levels: int) -> float:
        return last / ((last + shift) * (num_levels - 1))

    q = (shift - 1) / shift * spacing(shift, num_steps) * (num_steps // num_student_steps)
    nested_shift = 1.0
    for _ in range(50):  # a contraction: the spacing hardly depends on the shift
        nested_shift = 1 / (1 - q / spacing(nested_shift, num_student_steps))
    return {"shift": nested_shift, "shift_terminal": float(manifest.key_sigmas[-2])}


def walks(scheduler: Any, sigmas: list[float], timesteps: list[float]) -> bool:
    """Whether the scheduler, asked for that many steps, takes Euler steps through these levels at these timesteps."""
    num_steps = len(timesteps)
    ways = [{"num_inference_steps": num_steps}, {"sigmas": np.linspace(1, 0, num_steps + 1)[:-1]}]  # Wan; HunyuanVideo
    for way in ways:
        try:
            scheduler.set_timesteps(**way)
        except (TypeError, ValueError):  # it takes no sigmas, or wants more than these pipelines give
            continue
        same_levels = np.allclose(scheduler.sigmas, sigmas, atol=1e-5)
        if same_levels and np.allclose(scheduler.timesteps, timesteps, atol=1e-2):
            return takes_euler_steps(scheduler, sigmas)
    return False


def takes_euler_steps(scheduler: Any, sigmas: list[float]) -> bool:
    """Whether a scheduler whose timesteps are set ends where Euler steps do, for random velocities."""
    generator = torch.Generator().manual_seed(0)
    walked = euler = torch.randn(1, 64, generator=generator)
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn(1, 64, generator=generator)
        walked = scheduler.step(velocity, timestep, walked, return_dict=False)[0]
        euler = euler_step(euler, velocity, sigmas[step], sigmas[step + 1])
    return torch.allclose(walked, euler, atol=1e-4)


def make_scheduler(description: Mapping[str, Any]) -> SchedulerMixin:
    """The scheduler of a "class" (of diffusers, or `KeyPointScheduler`) and "config".

    Raises:
        UserError: there is no such class.
    """
    name = description["class"]
    scheduler_class: Any = KeyPointScheduler if name == KeyPointScheduler.__name__ else getattr(diffusers, name, None)
    if SchedulerMixin not in getattr(scheduler_class, "__mro__", ()):
        raise UserError(f"diffusers {diffusers.__version__} has no scheduler {name}; install a version that has")
    return scheduler_class.from_config(description["config"])
