"""The frozen teacher as a velocity field at any noise level, guidance included, for methods that ask it while training.

AccVideo never does: what it wants of the teacher was recorded. The calls of a data set are conditional ones at its key
points; here they are moved to other noise levels, and repeated with the empty prompt where guidance takes that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from accvideo.analysis.baselines.diffusion import per_sample
from accvideo.call import DenoiserCall, flatten, replay
from accvideo.data.manifest import Manifest
from accvideo.student import Student
from accvideo.teacher import approach, batch_arguments, guidance_arguments, load_pipeline
from accvideo.trajectory import TrajectoryBatch
from accvideo.types import Latents, UserError

Field = Callable[[Latents, Tensor], Latents]
"""A velocity field: latents and one noise level a sample in, velocities out."""


@dataclass
class Budget:
    """Evaluations of denoisers, for one sample each: a forward pass is one, a backward pass two."""

    limit: int
    spent: int = 0

    def count(self, samples: int, units: int) -> None:
        """Take note of `units` evaluations of a batch."""
        self.spent += samples * units


@dataclass(frozen=True)
class GuidedTeacher:
    """The teacher of a student, with the guidance that the data set was recorded with."""

    student: Student
    sigmas: Tensor
    """All noise levels of the recording."""
    keypoints: list[int]
    guidance_scale: float
    """1: off."""
    empty: Mapping[str, Tensor]
    """The arguments of a call on the empty prompt; none where guidance takes no second call."""
    budget: Budget

    def field(self, batch: TrajectoryBatch, keypoint: int) -> Field:
        """Its velocity for the prompts of a batch, by the denoiser that made the step from this key point."""
        denoiser = self.student.teachers[batch.denoisers[keypoint]]
        recorded = float(self.sigmas[self.keypoints[keypoint]])

        @torch.no_grad()
        def velocity(latents: Latents, sigma: Tensor) -> Latents:
            call = at_level(batch.calls[keypoint], recorded, sigma)
            self.budget.count(len(latents), 2 if self.empty else 1)
            with self.student.arithmetic(), self.student.without_adapters():
                conditional = replay(denoiser, call, latents)
                if not self.empty:
                    return conditional
                unconditional = replay(denoiser, with_prompt(call, self.empty, len(latents)), latents)
            return unconditional + self.guidance_scale * (conditional - unconditional)

        return velocity


def solve(field: Field, latents: Latents, levels: Tensor) -> Latents:
    """Euler steps through noise levels `[steps + 1]`, the same for all samples."""
    for sigma, next_sigma in zip(levels[:-1], levels[1:], strict=True):
        latents = latents + (next_sigma - sigma) * field(latents, sigma.expand(len(latents)))
    return latents


def student_field(student: Student, manifest: Manifest, batch: TrajectoryBatch, keypoint: int, budget: Budget) -> Field:
    """A student's velocity; as for the teacher. A pass with a gradient counts three evaluations."""
    recorded = float(manifest.key_sigmas[keypoint])

    def velocity(latents: Latents, sigma: Tensor) -> Latents:
        budget.count(len(latents), 3 if torch.is_grad_enabled() else 1)
        return student.velocity(batch.denoisers[keypoint], at_level(batch.calls[keypoint], recorded, sigma), latents)

    return velocity


def at_level(call: DenoiserCall, recorded: float, sigma: Tensor) -> DenoiserCall:
    """A call recorded at one noise level, moved to another for each sample.

    Raises:
        UserError: the denoiser is not told 1000 times the noise level.
    """
    timestep = call.tensors["timestep"]
    if abs(float(timestep.max()) - 1000 * recorded) >= 1.5:
        raise UserError(
            f"the denoiser is told {float(timestep.max()):g} at noise level {recorded:.4g}: baselines know denoisers "
            "that are told 1000 times the level"
        )
    told = per_sample(1000 * sigma.double(), timestep.double()).expand(timestep.shape)
    moved = torch.where(timestep == 0, timestep.double(), told)  # tokens that are given hold 0 (Wan 2.2 5B)
    return replace(call, tensors=call.tensors | {"timestep": moved.to(timestep.dtype)})


def with_prompt(call: DenoiserCall, arguments: Mapping[str, Tensor], size: int) -> DenoiserCall:
    """A call for `size` samples with these arguments of a call for one, but for the timestep."""
    others = {
        name: arguments[name].expand(size, *arguments[name].shape[1:])
        for name in call.tensors
        if name != "timestep" and name in arguments
    }
    return replace(call, tensors=call.tensors | others)


def empty_prompt(manifest: Manifest, device: str) -> dict[str, Tensor]:
    """What the recorded pipeline tells its denoiser of the empty prompt; nothing where guidance takes one call."""
    if manifest.denoiser_calls == manifest.num_steps:
        return {}
    pipeline: Any = load_pipeline(manifest.teacher, getattr(torch, manifest.dtype), device, revision=manifest.revision)
    sizes = {name: getattr(manifest, name) for name in ("height", "width", "num_frames")}
    arguments = manifest.pipeline_args | {name: size for name, size in sizes.items() if size is not None}
    if manifest.guidance_scale is not None:
        arguments |= guidance_arguments(pipeline, manifest.guidance_scale)
    found = approach(pipeline, manifest.num_steps, **batch_arguments([""], manifest.seed, [0]), **arguments)
    return {name: value[:1] for name, value in flatten(found.arguments) if isinstance(value, Tensor) and value.ndim}
