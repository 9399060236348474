"""What a recording settles before its first denoiser call: arguments, noise levels, the manifest."""

import difflib
import inspect
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from accvideo.call import flatten
from accvideo.command import DEFAULT_FPS, Prompt, parse_pipeline_args
from accvideo.data.manifest import Manifest
from accvideo.flow import keypoint_indices
from accvideo.inference.model import NUM_TEACHER_STEPS
from accvideo.inference.schedulers import KeyPointScheduler, student_scheduler
from accvideo.media import check_media, load_media
from accvideo.recording.config import RecordConfig
from accvideo.teacher import (
    Approach,
    approach,
    batch_arguments,
    call_parameters,
    denoisers,
    fingerprint,
    guidance_arguments,
    has_guider,
    item_generator,
    provenance,
    shared_arguments,
)
from accvideo.types import UserError

OWN_ARGUMENTS = ("prompt", "generator", "num_inference_steps", "output_type", "return_dict", "latents")
"""Arguments of a pipeline's call that the recorder sets itself."""


def call_arguments(pipeline: DiffusionPipeline, config: RecordConfig, defaults: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline's call: the command line's, else the teacher folder's, else the pipeline's own.

    Raises:
        UserError: the pipeline's call does not take one of them.
    """
    given = {**defaults.get("pipeline_args", {}), **parse_pipeline_args(config.pipeline_arg)}
    for name in ("height", "width", "num_frames", "guidance_scale"):
        if (value := getattr(config, name)) is None:
            value = defaults.get(name)
        if value is not None:
            given[name] = value
    if "guidance_scale" in given:
        given |= guidance_arguments(pipeline, given.pop("guidance_scale"))
    accepted = call_parameters(pipeline)
    for name in given:
        if name in OWN_ARGUMENTS:
            raise UserError(f"{name} is set by the recorder; leave it out of --pipeline-arg")
        if name not in accepted:
            close = difflib.get_close_matches(name, accepted, n=3) or sorted(accepted)
            raise UserError(f"{type(pipeline).__name__} takes no argument {name}; it takes {', '.join(close)}")
    return given


def check_prompts(pipeline: DiffusionPipeline, prompts: Sequence[Prompt], config: RecordConfig) -> None:
    """Checks what the prompts ask the pipeline's call for, and that their images and videos are there.

    Raises:
        UserError: the call does not take an argument or lacks an image, or a file is missing.
    """
    name, accepted = type(pipeline).__name__, call_parameters(pipeline)
    for number, prompt in enumerate(prompts, 1):
        for argument in prompt.arguments:
            if argument in OWN_ARGUMENTS:
                raise UserError(f"{config.prompts}: the column {argument} is set by the recorder; leave it out")
            if argument not in accepted:
                raise UserError(f"{name} takes no {argument} (of prompt {number}); it takes {', '.join(accepted)}")
        if prompt.arguments and config.batch_size > 1:
            raise UserError(
                f"prompt {number} has a {next(iter(prompt.arguments))} of its own, and {name} takes one a call\n"
                "Leave --batch-size out"
            )
        check_media(prompt.arguments, prompt.folder)


def items_arguments(
    config: RecordConfig, arguments: Mapping[str, Any], prompts: Sequence[Prompt], items: Sequence[int]
) -> dict[str, Any]:
    """The arguments of the pipeline's call that makes these items."""
    chosen = [prompts[index % len(prompts)] for index in items]
    return {
        **batch_arguments([prompt.text for prompt in chosen], config.seed, items),
        **load_media(arguments),
        **load_media(chosen[0].arguments, chosen[0].folder),  # the only one that has any: see `check_prompts`
    }


def set_shift(pipeline: DiffusionPipeline, shift: float) -> None:
    """Gives the pipeline a scheduler like its own with another shift of the noise levels.

    Raises:
        UserError: its noise levels have no shift that can be set.
    """
    settings: Any = pipeline.scheduler.config
    name = next((name for name in ("flow_shift", "shift") if name in settings), None)
    if name is None or settings.get("use_dynamic_shifting") or shift <= 0:
        raise UserError(
            f"shift is {shift}: it must be positive, and {type(pipeline.scheduler).__name__} must have one of its own\n"
            f"{type(pipeline).__name__} may compute it from the size; leave --shift out then"
        )
    scheduler_class: Any = type(pipeline.scheduler)
    pipeline.register_modules(scheduler=scheduler_class.from_config(settings, **{name: shift}))


def make_manifest(
    pipeline: DiffusionPipeline,
    config: RecordConfig,
    defaults: dict[str, Any],
    arguments: dict[str, Any],
    prompts: Sequence[Prompt],
) -> tuple[Manifest, list[str]]:
    """The manifest of a data set, without a denoiser call; warns if students of it cannot run in plain diffusers.

    Also the names of the denoiser's arguments that have no row for each sample.

    Raises:
        UserError: the pipeline refuses its arguments, or cannot be a teacher.
    """

    def first(num_steps: int, item: int = 0, **others: Any) -> Approach:
        return approach(pipeline, num_steps, **items_arguments(config, arguments, prompts, [item]) | others)

    kinds = {tuple(prompt.arguments): item for item, prompt in reversed(list(enumerate(prompts)))}
    for item in sorted(kinds.values())[1:]:  # such as the first prompt without an image
        first(config.num_steps, item)
    few, many = first(config.num_student_steps), first(config.num_steps)
    check_same_call(pipeline, few, many)
    try:
        two = first(config.num_steps, prompt=[prompts[0].text] * 2, generator=item_generator(config.seed, 0))
        shared = shared_arguments(many.arguments, two.arguments)
    except Exception:  # pipelines that take one image or video a call say so in many ways
        shared = []
    (key_sigmas, key_timesteps), (sigmas, timesteps) = ((each.sigmas, each.timesteps) for each in (few, many))
    if len(sigmas) != config.num_steps + 1:
        raise UserError(
            f"{type(pipeline.scheduler).__name__} makes {len(sigmas) - 1} steps of {config.num_steps}; "
            "choose a number of steps that it keeps"
        )
    keypoints = keypoint_indices(config.num_steps, config.num_student_steps)
    nested = is_nested(key_sigmas, [sigmas[i] for i in keypoints], 1e-5)
    nested = nested and is_nested(key_timesteps, [timesteps[i] for i in keypoints[:-1]], 1.0)
    usual_num_steps = config.num_steps if config.solver == "own" else NUM_TEACHER_STEPS
    teacher_num_steps = config.teacher_num_steps or usual_num_steps
    revision, license = provenance(config.teacher)
    own_defaults = call_parameters(pipeline)

    def used(name: str) -> Any:
        value = arguments.get(name, own_defaults.get(name))
        return None if value is inspect.Parameter.empty else value

    manifest = Manifest(
        teacher=config.teacher,
        revision=revision,
        license=license,
        pipeline_class=type(pipeline).__name__,
        fingerprints={name: fingerprint(denoiser) for name, denoiser in denoisers(pipeline).items()},
        num_steps=config.num_steps,
        num_student_steps=config.num_student_steps,
        keypoints=keypoints,
        sigmas=sigmas,
        guidance_scale=pipeline.guider.guidance_scale if has_guider(pipeline) else used("guidance_scale"),
        height=used("height"),
        width=used("width"),
        num_frames=used("num_frames"),
        fps=config.fps or defaults.get("fps") or used("frame_rate") or used("fps") or DEFAULT_FPS,
        pipeline_args={
            name: value
            for name, value in arguments.items()
            if name not in ("guidance_scale", "height", "width", "num_frames")
        },
        dtype=config.dtype,
        seed=config.seed,
        num_trajectories=config.num_trajectories or len(prompts),
        batch_size=config.batch_size,
        scheduler={
            "class": type(pipeline.scheduler).__name__,
            "config": {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")},
        },
        nested_schedule=nested,
        solver=config.solver,
        teacher_num_steps=None if teacher_num_steps == config.num_steps else teacher_num_steps,
        versions={name: version(name) for name in ("accvideo", "torch", "diffusers", "transformers")},
    )
    if isinstance(student_scheduler(manifest, [timesteps[i] for i in keypoints[:-1]]), KeyPointScheduler):
        print(
            f"warning: {type(pipeline.scheduler).__name__} cannot be made to take {config.num_student_steps} steps "
            f"over these noise levels: accvideo can run a student of them, a plain {type(pipeline).__name__} not\n"
            "Record with UniPCMultistepScheduler or DPMSolverMultistepScheduler (use_flow_sigmas=True) to export one",
            file=sys.stderr,
        )
    return manifest, shared


def check_same_call(pipeline: DiffusionPipeline, few: Approach, many: Approach) -> None:
    """Checks that the denoiser is asked the same at its first call, however many steps are to follow.

    Raises:
        UserError: it is not, so that a student would not be asked what its teacher was.
    """
    before = dict(flatten(many.arguments))
    for name, value in flatten(few.arguments):
        if name in ("hidden_states", "timestep") or not isinstance(value, Tensor):
            continue
        if name not in before or not torch.equal(value, before[name]):
            raise UserError(
                f"{type(pipeline).__name__} tells its denoiser {name}, which depends on the number of steps: "
                "a student of fewer steps would not be asked what was recorded"
            )


def is_nested(grid: Sequence[float], other: Sequence[float], tolerance: float) -> bool:
    """Whether two grids are the same within a tolerance."""
    return len(grid) == len(other) and all(abs(a - b) <= tolerance for a, b in zip(grid, other, strict=True))
