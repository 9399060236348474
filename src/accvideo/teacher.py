"""A teacher: any diffusers pipeline, loaded as it is and watched while it denoises."""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from huggingface_hub import ModelCard, try_to_load_from_cache
from torch import Tensor, nn

from accvideo.call import Block, DenoiserCall, capture_call, flatten
from accvideo.data.schema import loads
from accvideo.flow import euler_step
from accvideo.recording.solvers import Step
from accvideo.types import Latents, UserError

PLAYGROUND_TEACHER = Path(__file__).parent / "playground" / "teacher"
"""Folder of the embedded teacher, a `WanPipeline`."""

SUPPORTED = "supported are flow-matching schedulers (FlowMatchEulerDiscrete, UniPC and DPMSolver with flow sigmas)"


def teacher_path(name: str) -> Path | None:
    """The local folder that `name` stands for, or None for a hub id."""
    if name == "playground":
        return PLAYGROUND_TEACHER
    return Path(name) if Path(name).exists() else None


def load_pipeline(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: PipelineQuantizationConfig | None = None,
    revision: str | None = None,
) -> DiffusionPipeline:
    """The pipeline called `name`: "playground" (the embedded teacher), a local folder, or a hub id at a revision.

    Raises:
        UserError: there is no such pipeline, or it has no denoiser.
    """
    path = teacher_path(name)
    if path is not None and not (path / "model_index.json").is_file():
        raise UserError(f"{name} is not a pipeline: no model_index.json in it; give a folder that diffusers saved")
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            path or name, revision=revision, dtype=dtype, use_safetensors=True, quantization_config=quantization
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load the pipeline {name}: {reason}\nGive `playground`, a folder or a hub id"
        ) from error
    if not denoisers(pipeline):
        raise UserError(f"{name} is a {type(pipeline).__name__} without a `transformer`: nothing to distill")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def pipeline_defaults(name: str) -> dict[str, Any]:
    """Default call arguments in the teacher's folder (`accvideo.json`): height, width, fps, pipeline_args and so on.

    Raises:
        UserError: the file is not JSON.
    """
    path = teacher_path(name)
    if path is None or not (path / "accvideo.json").is_file():
        return {}
    try:
        return loads((path / "accvideo.json").read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path / 'accvideo.json'} is not JSON: {error}") from error


def provenance(name: str) -> tuple[str | None, str | None]:
    """Commit and license of a teacher, as far as this machine's copy tells them."""
    path, revision = teacher_path(name), None
    if path is None and isinstance(cached := try_to_load_from_cache(name, "model_index.json"), str):
        path, revision = Path(cached).parent, Path(cached).parent.name
    if path is None or not (path / "README.md").is_file():
        return revision, None
    return revision, ModelCard.load(path / "README.md").data.get("license")


def denoisers(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The networks of a pipeline that predict the velocity, by component name."""
    found = {name: getattr(pipeline, name, None) for name in ("transformer", "transformer_2")}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def fingerprint(denoiser: nn.Module) -> str:
    """A hash of configuration and weights: tells teachers apart, not floating-point types or a LoRA put on top.

    Of each weight, 64 values are read.
    """
    model: Any = denoiser
    weights = {name.replace(".base_layer", ""): w for name, w in denoiser.named_parameters() if "lora_" not in name}
    return weights_fingerprint(type(denoiser).__name__, model.config, {n: lambda w=w: w for n, w in weights.items()})


def weights_fingerprint(class_name: str, config: Mapping[str, Any], weights: Mapping[str, Callable[[], Tensor]]) -> str:
    """`fingerprint` of a denoiser that is not loaded, from its parameters, which are read one by one."""
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps([class_name, config], sort_keys=True, default=str).encode())
    for name in sorted(weights):
        weight = weights[name]().detach()
        values = weight.flatten()[:: max(1, weight.numel() // 64)][:64]
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(values.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def item_generator(seed: int, index: int) -> torch.Generator:
    """The source of noise of item `index`: depends on both numbers and nothing else."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def batch_arguments(prompts: Sequence[str], seed: int, indices: Sequence[int]) -> dict[str, Any]:
    """Prompts and noise of the items of a pipeline's call; a single one is no list, which some pipelines refuse.

    Args:
        prompts: one an item.
        seed: of all noise.
        indices: numbers of the items.
    """
    generators = [item_generator(seed, index) for index in indices]
    if len(prompts) == 1:
        return {"prompt": prompts[0], "generator": generators[0]}
    return {"prompt": list(prompts), "generator": generators}


@dataclass(frozen=True)
class WatchedStep:
    """One denoising step: the states around it and the conditional call that led it."""

    state: Latents
    """As the solver knows it once it has the velocity: a solver of second order may have corrected it."""
    next_state: Latents
    velocity: Latents
    """The model output, after guidance, given to the scheduler; float32, as the states."""
    sigma: float
    next_sigma: float
    denoiser: str
    call: DenoiserCall


@dataclass
class Watch:
    """What `watch` has seen so far."""

    steps: list[WatchedStep] = field(default_factory=list)
    """The steps to keep, in order."""
    final: Latents | None = None
    """The state after the last step, float32."""
    sigmas: list[float] = field(default_factory=list)
    """The scheduler's noise levels, S + 1 of them."""
    num_steps: int = 0
    """Steps taken."""
    num_calls: int = 0
    """Denoiser calls for each video (a doubled batch counts twice)."""
    part: Block = ()
    """Where the states are among the scheduler's latents: all of them, but for frames that are given."""


@contextmanager
def watch(
    pipeline: DiffusionPipeline,
    keep: Collection[int] | None = None,
    on_step: Callable[[int], None] | None = None,
    shared: Collection[str] = (),
    solve: Step | None = None,
) -> Iterator[Watch]:
    """Watches one run of `pipeline`: its states, noise levels and conditional calls.

    Where the pipeline is given some frames, the states are the others.

    Args:
        pipeline: any diffusers pipeline whose steps are `next = state + (next_sigma - sigma) * velocity`, velocity
            being the model output (after guidance) that the scheduler is given. Multistep solvers obey this on their
            first step.
        keep: numbers of the steps to keep; all when None.
        on_step: called with the number of steps taken, after each.
        shared: names of the denoiser's arguments that have no row for each sample; see `shared_arguments`.
        solve: what takes the steps in place of the scheduler, which still sets the noise levels; see `solver_step`.

    Raises:
        UserError: on the first step, if the rule does not hold or the call cannot be replayed.
    """
    scheduler, seen = pipeline.scheduler, Watch()
    original_step = scheduler.step
    calls: list[tuple[str, dict[str, Any]]] = []  # of the step under way

    def see_call(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((name, named_arguments(module, args, kwargs)))

    @functools.wraps(original_step)
    def see_step(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original_step).bind(*args, **kwargs).arguments
        velocity, sample = bound["model_output"], bound["sample"]
        if bound.get("per_token_timesteps") is not None:
            raise UserError(f"{type(pipeline).__name__} steps each token from a noise level of its own; {SUPPORTED}")
        first, kept = seen.num_steps == 0, keep is None or seen.num_steps in keep
        state = sample.detach().float().clone()
        output = original_step(*args, **kwargs)
        next_sample = own_sample = output[0] if isinstance(output, tuple) else output.prev_sample

        if not calls:
            raise UserError(f"{type(pipeline).__name__} takes a step without calling its denoiser: not supported")
        index = scheduler.step_index - 1  # the step has just raised it
        if not seen.sigmas:
            seen.sigmas = scheduler.sigmas.tolist()
        if first and index > 0:
            raise UserError(
                f"{type(pipeline).__name__} starts at noise level {seen.sigmas[index]:.4g}, from a noised video: "
                "a student starts from noise\nCall it with strength 1"
            )
        if index != seen.num_steps:
            raise UserError(
                f"{type(pipeline).__name__} makes the video in several runs of the denoiser, one after another: "
                "supported is one\nAsk for fewer frames, so that it takes one run"
            )
        sigma, next_sigma = seen.sigmas[index], seen.sigmas[index + 1]
        name, arguments = calls[0]  # guidance by two calls: the first is the conditional one
        call = None
        if kept or first:
            call, seen.part = capture_call(arguments, sample, shared)
        if solve is not None:
            state, following = solve(state, velocity.detach().float(), sigma, next_sigma)
            next_sample = following.to(own_sample.dtype)
            output = (next_sample,) if isinstance(output, tuple) else type(output)(prev_sample=next_sample)
        part = seen.part
        if call is not None:
            following = next_sample.detach().float().clone()
            own = velocity.detach().float().clone()[part]
            step = WatchedStep(state[part], following[part], own, sigma, next_sigma, name, call)
            if first:
                check_rule(pipeline, replace(step, next_state=own_sample.detach().float()[part]), own_sample.dtype)
            if kept:
                seen.steps.append(step)
        seen.num_calls += sum(len(arguments["hidden_states"]) // len(sample) for _, arguments in calls)
        calls.clear()
        seen.final = next_sample.detach().float()[part]
        seen.num_steps += 1
        if on_step is not None:
            on_step(seen.num_steps)
        return output

    check_scheduler(pipeline)
    with ExitStack() as undo:
        for name, denoiser in denoisers(pipeline).items():
            hook = denoiser.register_forward_pre_hook(functools.partial(see_call, name), with_kwargs=True)
            undo.callback(hook.remove)
        undo.enter_context(alone(pipeline))
        scheduler.step = see_step
        undo.callback(delattr, scheduler, "step")
        yield seen


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of `module` by name."""
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments if args else kwargs


@contextmanager
def alone(pipeline: DiffusionPipeline) -> Iterator[None]:
    """A context in which the pipeline cannot copy its scheduler.

    A pipeline that does steps something beside the video's state: its sound (LTX-2), or each frame on its own
    (SkyReels V2 diffusion forcing).
    """

    def refuse(memo: dict[int, Any]) -> None:
        raise UserError(
            f"{type(pipeline).__name__} denoises with several copies of its scheduler (sound beside the video, or a "
            "noise level for each frame); supported are pipelines that denoise one state with one scheduler"
        )

    scheduler: Any = pipeline.scheduler
    scheduler.__deepcopy__ = refuse
    try:
        yield
    finally:
        del scheduler.__deepcopy__


def check_scheduler(pipeline: DiffusionPipeline) -> None:
    """Refuses, before the first denoiser call, a scheduler that cannot obey the rule.

    Raises:
        UserError: it has no noise levels, or takes several denoiser calls a step.
    """
    scheduler = pipeline.scheduler
    what = f"{type(pipeline).__name__} has a {type(scheduler).__name__}"
    if not isinstance(getattr(scheduler, "sigmas", None), Tensor):
        raise UserError(f"{what}, which has no noise levels (sigmas); {SUPPORTED}")
    if scheduler.order != 1:
        raise UserError(f"{what}, which takes {scheduler.order} calls a step; {SUPPORTED}")


def check_rule(pipeline: DiffusionPipeline, step: WatchedStep, dtype: torch.dtype) -> None:
    """Checks that a step is `next = state + (next_sigma - sigma) * velocity`, to 0.1 % and the rounding of `dtype`.

    Raises:
        UserError: it is not.
    """
    expected = euler_step(step.state, step.velocity, step.sigma, step.next_sigma)
    error, length = (step.next_state - expected).norm().item(), (expected - step.state).norm().item()
    rounding = 4 * torch.finfo(dtype).eps * step.state.norm().item()
    if not error <= 1e-3 * length + rounding:
        name = f"{type(pipeline.scheduler).__name__} ({pipeline.scheduler.config.get('prediction_type', 'no type')})"
        raise UserError(
            f"a step of {name} is not next = state + (next_sigma - sigma) * velocity: off by {error / length:.1%}\n"
            f"{SUPPORTED[0].upper()}{SUPPORTED[1:]}"
        )


class _FirstCall(Exception):  # noqa: N818 - a way out of the pipeline, not an error
    """The pipeline is about to call its denoiser."""

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments


@dataclass(frozen=True)
class Approach:
    """How a pipeline comes to its first denoiser call."""

    sigmas: list[float]
    """Noise levels of the run to come, one more than steps."""
    timesteps: list[float]
    arguments: dict[str, Any]
    """Of the denoiser's first call, by name."""


def approach(pipeline: DiffusionPipeline, num_steps: int, **arguments: Any) -> Approach:
    """Runs the pipeline up to its first denoiser call: its own way of setting the scheduler is what counts.

    Raises:
        UserError: the pipeline refuses its arguments, or its noise levels are not those of a flow.
    """

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _FirstCall(named_arguments(module, args, kwargs))

    run: Any = pipeline
    with ExitStack() as undo:
        undo.enter_context(alone(pipeline))
        for denoiser in denoisers(pipeline).values():
            undo.callback(denoiser.register_forward_pre_hook(leave, with_kwargs=True).remove)
        try:
            run(num_inference_steps=num_steps, output_type="latent", **arguments)
            raise UserError(f"{type(pipeline).__name__} does not call its denoiser")
        except _FirstCall as first:
            found = first.arguments
        except (ValueError, TypeError, ArithmeticError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{type(pipeline).__name__} refuses its arguments or {num_steps} steps: {reason}"
            ) from error
    pipeline.maybe_free_model_hooks()
    scheduler: Any = pipeline.scheduler
    sigmas = scheduler.sigmas.tolist()
    if not all(0 <= sigma < 1.001 for sigma in sigmas):
        raise UserError(
            f"{type(pipeline).__name__} has a {type(scheduler).__name__} with noise levels up to {max(sigmas):.4g}, "
            f"a flow's are from 0 to 1; {SUPPORTED}"
        )
    return Approach(sigmas, scheduler.timesteps.float().tolist(), found)


def shared_arguments(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Names of the denoiser's arguments that have no row for each sample.

    Args:
        one: all arguments of a call for one video.
        two: those of the same call for two.
    """
    tensors = {name: value for name, value in flatten(two) if isinstance(value, Tensor)}
    return [
        name
        for name, value in flatten(one)
        if isinstance(value, Tensor) and name in tensors and value.shape[:1] == tensors[name].shape[:1]
    ]


def call_parameters(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Names of what a pipeline's call takes, and their defaults."""
    return {name: each.default for name, each in inspect.signature(type(pipeline).__call__).parameters.items()}


def guidance_arguments(pipeline: Any, guidance_scale: float) -> dict[str, Any]:
    """What to call the pipeline with for this guidance scale.

    Nothing where it leaves guidance to a component of its own, a guider (HunyuanVideo 1.5), which is then changed.
    """
    if "guidance_scale" in call_parameters(pipeline) or not has_guider(pipeline):
        return {"guidance_scale": guidance_scale}
    pipeline.register_modules(guider=pipeline.guider.new(guidance_scale=guidance_scale))
    return {}


def has_guider(pipeline: Any) -> bool:
    """Whether the pipeline leaves guidance to a component."""
    return "guider" in pipeline.components


def denoising_grid(pipeline: DiffusionPipeline, num_steps: int, **arguments: Any) -> tuple[list[float], list[float]]:
    """Noise levels (`num_steps` + 1) and timesteps (`num_steps`) of a run, found without a denoiser call.

    Raises:
        UserError: the pipeline refuses its arguments, or its noise levels are not those of a flow.
    """
    found = approach(pipeline, num_steps, **arguments)
    return found.sigmas, found.timesteps
