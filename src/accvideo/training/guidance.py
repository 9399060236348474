"""The frozen teacher as a velocity field at any noise level, guidance included, for losses that ask it while training.

The paper's losses never do: what they want of the teacher was recorded. The recorded calls are the conditional ones at
key points. Here they are moved to other noise levels; the call that guidance takes beside them, and its weight, are
read off a run of the teacher's own pipeline.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from accvideo.call import DenoiserCall, capture_call, flatten, replay, unflatten
from accvideo.data.manifest import Manifest
from accvideo.decode import check_media, load_recorded_teacher
from accvideo.flow import per_sample
from accvideo.inference.schedulers import make_scheduler
from accvideo.media import load_media
from accvideo.student import Student
from accvideo.teacher import WatchedStep, batch_arguments, denoisers, named_arguments, watch
from accvideo.trajectory import Trajectory, TrajectoryBatch
from accvideo.types import Latents, Sigmas, UserError

Field = Callable[[Latents, Tensor], Latents]
"""A velocity field: latents and one noise level a sample in, velocities out."""

INSTEAD = "The teacher cannot be asked at other noise levels than the recorded ones; use --loss trajectory"

NUM_WATCHED_STEPS = 5
MAX_RESIDUAL = 0.02
"""Share of a velocity by which a sum of two calls may miss it: the rounding of bfloat16."""
MAX_SPREAD = 0.1
"""Of the guidance scales that are measured on the steps of one denoiser, as a share of their mean."""


@dataclass(frozen=True)
class Guidance:
    """A second denoiser call, without the prompt, away from which the first one is moved.

    Ho and Salimans 2022, arXiv:2207.12598: `velocity = unconditional + scale * (conditional - unconditional)`.
    """

    scales: Mapping[str, float]
    """By denoiser."""
    call: DenoiserCall
    """The second call, for one sample; of its tensors, those that are not the conditional one's."""
    names: tuple[str, ...]
    """Of all tensors that the second call has a row a sample of."""

    def unconditional(self, call: DenoiserCall) -> DenoiserCall:
        """The second call beside a batch's first."""
        size = len(call.tensors["timestep"])
        own = {name: tensor.expand(size, *tensor.shape[1:]) for name, tensor in self.call.tensors.items()}
        tensors = {name: own[name] if name in own else call.tensors[name] for name in self.names}
        return replace(self.call, tensors=tensors, condition=call.condition)

    def to(self, device: str) -> "Guidance":
        """The same on a device."""
        return replace(self, call=self.call.to(device))


@dataclass(frozen=True)
class GuidedTeacher:
    """The frozen teacher of a student, guided as it was when it was recorded."""

    student: Student
    key_sigmas: Sigmas
    """Noise levels of the recorded key points."""
    guidance: Guidance | None
    """None: the teacher takes one call a step."""

    def field(self, batch: TrajectoryBatch, keypoint: int, denoiser: str | None = None) -> Field:
        """Its velocity for the prompts of a batch.

        Args:
            batch: with the recorded calls.
            keypoint: whose call is moved to other levels.
            denoiser: None: the one that made this call.
        """
        name, recorded = denoiser or batch.denoisers[keypoint], float(self.key_sigmas[keypoint])

        @torch.no_grad()
        def velocity(latents: Latents, sigma: Tensor) -> Latents:
            call = at_level(batch.call(keypoint), recorded, sigma)
            with self.student.arithmetic(), self.student.without_adapters():
                conditional = replay(self.student.teachers[name], call, latents)
                if self.guidance is None:
                    return conditional
                unconditional = replay(self.student.teachers[name], self.guidance.unconditional(call), latents)
            return unconditional + self.guidance.scales[name] * (conditional - unconditional)

        return velocity


def at_level(call: DenoiserCall, recorded: float, sigma: Tensor) -> DenoiserCall:
    """A call recorded at one noise level, moved to another for each sample.

    Raises:
        UserError: the denoiser is told neither the noise level (Cosmos) nor 1000 times it.
    """
    timestep = call.tensors["timestep"]
    own = float(timestep.max())
    scale = next((scale for scale in (1000, 1) if abs(own - scale * recorded) < 1.5e-3 * scale), None)
    if scale is None:
        raise UserError(
            f"the denoiser is told {own:g} at noise level {recorded:.4g}; known are denoisers that are told the level, "
            f"or 1000 times it\n{INSTEAD}"
        )
    told = per_sample(scale * sigma.double(), timestep.double()).expand(timestep.shape)
    # Tokens of given frames hold another number, at each level the same (0 in Wan 2.2 5B, 0.0001 in Cosmos).
    moved = torch.where(timestep == timestep.max(), told, timestep.double())
    return replace(call, tensors=call.tensors | {"timestep": moved.to(timestep.dtype)})


@dataclass(frozen=True)
class Practice:
    """How a teacher goes about its steps."""

    denoisers: Sequence[str]
    """Of each step."""
    guidance: Guidance | None
    """None: it takes one call a step."""


def find_practice(
    manifest: Manifest, trajectory: Trajectory, media_folder: Path = Path(), device: str = "cpu"
) -> Practice:
    """How the teacher went about its steps while it was recorded; its pipeline is run if the data set does not say.

    Args:
        manifest: of the data set.
        trajectory: one of it, whose prompt and noise the pipeline is run with.
        media_folder: what the names of images and videos in its arguments are relative to.
        device: to run on.

    Raises:
        UserError: the teacher cannot be loaded or is another one now, a file is not the recorded one, or guidance is
            not a sum of two calls with the same weights on each step.
    """
    guided = manifest.denoiser_calls > manifest.num_steps
    steps = [trajectory.denoisers[0]] * manifest.num_steps
    if not guided and len(manifest.fingerprints) == 1:
        return Practice(steps, None)
    teacher = load_recorded_teacher(manifest, device, guided=True)
    check_media(trajectory, teacher.arguments, media_folder)
    teacher.pipeline.register_modules(scheduler=make_scheduler(manifest.scheduler))  # with the shift of the recording

    def run(num_steps: int) -> None:
        pipeline: Any = teacher.pipeline
        pipeline(
            num_inference_steps=num_steps,
            output_type="latent",
            **batch_arguments([trajectory.prompt], trajectory.seed, [trajectory.index]),
            **load_media(teacher.arguments),
            **load_media(trajectory.arguments, media_folder),
        )

    if len(manifest.fingerprints) > 1:
        steps = denoisers_of_steps(teacher.pipeline, partial(run, manifest.num_steps), manifest.num_steps)
    few = partial(run, min(NUM_WATCHED_STEPS, manifest.num_steps))
    return Practice(steps, find_guidance(teacher.pipeline, few, trajectory) if guided else None)


def denoisers_of_steps(pipeline: DiffusionPipeline, run: Callable[[], None], num_steps: int) -> list[str]:
    """The names of the denoisers that a run of a pipeline calls, step by step; each computes but once.

    Its later calls get the same answer: which is called goes by the noise level.
    """
    called, answers = [], dict[str, Any]()

    def answer(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        called.append(name)
        if name not in answers:
            answers[name] = forward(*args, **kwargs)
        return answers[name]

    networks: dict[str, Any] = {**denoisers(pipeline)}
    try:
        for name, network in networks.items():
            network.forward = partial(answer, name, network.forward)
        run()
    finally:
        for network in networks.values():
            del network.forward
    return called[:: len(called) // num_steps]


def find_guidance(pipeline: DiffusionPipeline, run: Callable[[], None], trajectory: Trajectory) -> Guidance:
    """How a pipeline is guided on the steps of a run.

    Raises:
        UserError: not by a sum of two calls with the same weights on each step.
    """
    shared, networks = trajectory.calls[0].shared.keys(), denoisers(pipeline)
    asked: list[Mapping[str, Any]] = []  # all arguments of each call

    def see_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Copies: some pipelines write the next state into the tensor that they called with.
        arguments = named_arguments(module, args, kwargs).items()
        asked.append({name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments})

    with ExitStack() as undo:
        for network in networks.values():
            undo.callback(network.register_forward_pre_hook(see_call, with_kwargs=True).remove)
        seen = undo.enter_context(watch(pipeline, shared=shared))
        run()
    first, second = seen.steps[0].call, second_call(asked, seen.steps, shared)
    own = {
        name: tensor
        for name, tensor in second.tensors.items()
        if name not in first.tensors or not torch.equal(tensor, first.tensors[name])
    }
    guidance = Guidance({}, replace(second, tensors=own, condition=None), tuple(second.tensors))
    measured: dict[str, list[float]] = {step.denoiser: [] for step in seen.steps}
    for step in seen.steps:
        measured[step.denoiser] += guidance_scale(networks[step.denoiser], guidance, step)
    if unseen := set(trajectory.denoisers) - measured.keys():
        raise UserError(f"{len(seen.steps)} steps of the teacher took none by its {min(unseen)}\n{INSTEAD}")
    scales = {name: fmean(each) if each else 1.0 for name, each in measured.items()}
    for name, each in measured.items():
        if max(each, default=0) - min(each, default=0) > MAX_SPREAD * abs(scales[name]):
            raise UserError(
                f"the guidance of {name} is not the same on each step: scales "
                f"{', '.join(f'{scale:.3g}' for scale in each)}\n{INSTEAD}"
            )
    return replace(guidance, scales=scales, call=guidance.call.to("cpu"))


def second_call(
    asked: Sequence[Mapping[str, Any]], steps: Sequence[WatchedStep], shared: Collection[str]
) -> DenoiserCall:
    """The call without the prompt on the first of some steps: a call of its own, or the first half of a doubled batch.

    Args:
        asked: all arguments of all calls of these steps.
        steps: as they were watched, for one video.
        shared: names of tensors that have no row for each sample.

    Raises:
        UserError: the teacher took another number of calls.
    """
    if len(asked) == 2 * len(steps):
        return capture_call(asked[1], steps[0].state, shared)[0]
    if len(asked) == len(steps) and len(asked[0]["hidden_states"]) == 2:
        # The prompt's half is the second; turned round, the other is.
        turned = {
            name: value.roll(1, 0) if isinstance(value, Tensor) and value.ndim and len(value) == 2 else value
            for name, value in flatten(asked[0])
        }
        return capture_call(unflatten(turned), steps[0].state, shared)[0]
    raise UserError(f"the teacher is guided by {len(asked) / len(steps):g} calls a step; known are two\n{INSTEAD}")


@torch.no_grad()
def guidance_scale(denoiser: nn.Module, guidance: Guidance, step: WatchedStep) -> list[float]:
    """The weight that the teacher gave to the difference of its two calls on a step; none where there is no difference.

    Raises:
        UserError: what it made of them is no such sum.
    """
    conditional, unconditional = (
        replay(denoiser, call, step.state) for call in (step.call, guidance.unconditional(step.call))
    )
    difference, moved = (conditional - unconditional).flatten(), (step.velocity - unconditional).flatten()
    if not difference.any():
        return []
    scale = float(moved @ difference / (difference @ difference))
    residual = float((moved - scale * difference).norm() / step.velocity.norm())
    if not residual <= MAX_RESIDUAL:
        raise UserError(
            f"the teacher's guidance is no sum of its two calls: {residual:.0%} of its velocity is left over at noise "
            f"level {step.sigma:.3g}\n{INSTEAD}"
        )
    return [scale]
