"""The few-step student: made from the teacher's denoisers, saved, and loaded into the teacher's own pipeline."""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from accvideo.call import DenoiserCall, denoiser_blocks, layer_features, replay
from accvideo.data.manifest import Manifest
from accvideo.exporting.card import model_card
from accvideo.flow import euler_step, even_grid
from accvideo.inference.acceleration import Quantization, pipeline_quantization, quantization_config, stored_fingerprint
from accvideo.teacher import denoisers, fingerprint, load_pipeline
from accvideo.trajectory import write_whole
from accvideo.types import Latents, UserError

LORA_FILES = {"transformer": "pytorch_lora_weights.safetensors", "transformer_2": "pytorch_lora_weights_2.safetensors"}
"""The LoRA of each denoiser; `pipeline.load_lora_weights(folder)` reads the first."""


USAGE = """    accvideo generate FOLDER --prompt TEXT --out video.mp4

`accvideo export FOLDER --to diffusers|lora|comfyui|original --out PATH` makes a form that runs without accvideo."""
"""How to run a student's folder."""


class Student(nn.Module):
    """The student's denoisers and, frozen, the teacher's that they start as.

    With LoRA both are the same modules, adapters on or off: one copy of the weights. Else the teacher is a copy.

    Args:
        denoisers: the teacher's denoisers by their names in its pipeline; changed in place.
        lora_rank: rank of the adapters on attention and feed-forward layers of the blocks; None trains all weights.
        arithmetic: makes the context that the denoisers run in, such as bfloat16 autocast.
        keep_teacher: whether `teacher_features` will be asked for.
        gradient_checkpointing: keep only the blocks' inputs for the backward pass, and compute the rest again.
        shard: spreads weights over processes; called with the blocks of every denoiser, then with itself.
    """

    def __init__(
        self,
        denoisers: Mapping[str, nn.Module],
        lora_rank: int | None,
        arithmetic: Callable[[], AbstractContextManager[None]] = nullcontext,
        keep_teacher: bool = True,
        gradient_checkpointing: bool = False,
        shard: Callable[[nn.Module], None] | None = None,
    ) -> None:
        super().__init__()
        for denoiser in denoisers.values():
            denoiser.requires_grad_(False)
        # A plain dict, so that the teacher's weights are no part of this module's parameters.
        self.teachers = dict(denoisers)
        if lora_rank is None and keep_teacher:
            self.teachers = {name: deepcopy(denoiser) for name, denoiser in denoisers.items()}
        self.denoisers = nn.ModuleDict(denoisers)
        for denoiser in denoisers.values():
            if lora_rank is None:
                denoiser.requires_grad_(True)
            else:
                add_lora(denoiser, lora_rank)
        for model in dict.fromkeys([*self.teachers.values(), *denoisers.values()]):
            # One by one, so that no large model is whole in float32 before it is spread.
            for module in [*(denoiser_blocks(model) if shard else []), model]:
                if lora_rank is None and model in denoisers.values():
                    module.float()
                if shard is not None:
                    shard(module)
        self.adapters = [module for module in self.modules() if isinstance(module, BaseTunerLayer)]
        self.arithmetic = arithmetic
        if gradient_checkpointing:
            models: list[Any] = [*self.denoisers.values(), *self.teachers.values()]
            for denoiser in models:
                denoiser.enable_gradient_checkpointing(partial(checkpointed, arithmetic))

    def velocity(self, denoiser: str, call: DenoiserCall, latents: Latents) -> Latents:
        """The student's velocity, float32, where the teacher's denoiser of this name made this call."""
        with self.arithmetic():
            return replay(self.denoisers[denoiser], call, latents)

    def teacher_features(self, denoiser: str, call: DenoiserCall, latents: Latents, layer: int) -> Tensor:
        """The frozen teacher's features `[batch, tokens, width]` after block number `layer` (from 1).

        No `no_grad` here: the student learns through the frozen teacher, from the logits back to its own latents.
        """
        with self.arithmetic(), self.without_adapters():
            return layer_features(self.teachers[denoiser], call, latents, layer)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """A context in which a LoRA student is its teacher."""
        # Not peft's `enable_adapters`: that switches `requires_grad` as well, on parameters that a graph already holds.
        for adapter in self.adapters:
            adapter._disable_adapters = True
        try:
            yield
        finally:
            for adapter in self.adapters:
                adapter._disable_adapters = False

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: parameter for name, parameter in self.denoisers.named_parameters() if parameter.requires_grad}


def add_lora(denoiser: Any, rank: int) -> None:
    """Add float32 adapters of this rank, zero at the start, to the attention and feed-forward layers of the blocks.

    Hu et al. 2021, arXiv:2106.09685, with alpha equal to the rank.

    Raises:
        UserError: diffusers knows no adapters for this class of denoisers.
    """
    if not issubclass(type(denoiser), PeftAdapterMixin):  # `isinstance` would take the type checker's Any away
        raise UserError(f"diffusers gives {type(denoiser).__name__} no adapters: train all its weights, with --full")
    # A pattern of whole names: names in a list peft takes for endings, and finds HunyuanVideo's `proj_out` and token
    # refiner by them too.
    names = [re.escape(name) for name in adapted_layers(denoiser)]
    numbered = {re.sub(r"\\\.\d+\\\.", lambda _: r"\.\d+\.", name, count=1) for name in names}
    denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules="|".join(sorted(numbered))))
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    layers: list[Any] = [module for module in denoiser.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.forward = partial(adapted, layer)


def adapted_layers(denoiser: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a denoiser's blocks that a LoRA adapts, by name: attention and feed-forward.

    Not those that make scales and shifts of the timestep (`norm1.linear`, `visual_modulation.out_layer`): they do not
    see the video, and a quarter of HunyuanVideo's adapters would be theirs.
    """
    blocks = set(denoiser_blocks(denoiser))
    places = tuple(f"{name}." for name, module in denoiser.named_modules() if module in blocks)
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(places) and not re.search("norm|modulation", name)
    }


def adapted(layer: Any, hidden: Tensor) -> Tensor:
    """What a linear layer and its adapter, whose alpha is its rank, make of `hidden`.

    The same as peft computes, but added up in one pass over the output instead of three, each with a tensor of its own.
    """
    output = layer.base_layer(hidden)
    if layer.disable_adapters:
        return output
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    narrow = linear(hidden, down.to(hidden.dtype)).to(output.dtype)
    return torch.addmm(output.flatten(0, -2), narrow.flatten(0, -2), up.to(output.dtype).t()).view_as(output)


def checkpointed(arithmetic: Callable[[], AbstractContextManager[None]], block: nn.Module, *args: Any) -> Any:
    """Run a block and drop what it computed; the backward pass computes it again, with adapters as they are now."""
    adapters = [module for module in block.modules() if isinstance(module, BaseTunerLayer)]
    disabled = [adapter._disable_adapters for adapter in adapters]

    def run(*args: Any) -> Any:
        before = [adapter._disable_adapters for adapter in adapters]
        try:
            for adapter, value in zip(adapters, disabled, strict=True):
                adapter._disable_adapters = value
            with arithmetic():
                return block(*args)
        finally:
            for adapter, value in zip(adapters, before, strict=True):
                adapter._disable_adapters = value

    return checkpoint(run, *args, use_reentrant=False)


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


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """What a student is and how to run it: `student.json`, written last, marks a finished student folder."""

    teacher: str
    """"playground", a folder or a hub id: the pipeline that the student runs in."""
    revision: str | None
    license: str | None
    """The teacher's, which binds the student too."""
    pipeline_class: str
    fingerprints: dict[str, str]
    """Of the teacher's denoisers."""
    num_steps: int
    """K, also the number of denoiser calls."""
    sigmas: list[float]
    """The K + 1 noise levels."""
    timesteps: list[float]
    """What the denoiser is told at the first K of them."""
    guidance_scale: float | None
    """1 (off) where the teacher's guidance took a second call: it is distilled in. Where guidance is an input of the
    denoiser (HunyuanVideo), or was off, the teacher's own."""
    teacher_guidance_scale: float | None
    """None: the pipeline's own default."""
    teacher_num_steps: int
    """Of the teacher's own clips, by `teacher_scheduler`, that the student is compared with."""
    height: int | None
    width: int | None
    num_frames: int | None
    fps: float
    pipeline_args: dict[str, Any]
    """Further arguments of the pipeline's call, as recorded."""
    lora_rank: int | None
    """None: full weights."""
    scheduler: dict[str, Any]
    """"class" and "config"."""
    recipe: dict[str, Any]
    """The distillation's own configuration."""
    teacher_scheduler: dict[str, Any] | None = None
    """That the teacher was recorded with, "class" and "config"; its folder may hold another shift. None: not kept by
    the version that made this student."""
    solver: str = "own"
    """What took the recorded steps over that scheduler's noise levels: itself, or another solver."""
    recorded_num_steps: int | None = None
    """Of the recorded trajectories; None: `teacher_num_steps`."""
    other_num_steps: list[int] = field(default_factory=list)
    """Further numbers of steps that it was trained for; its scheduler knows their noise levels."""


def student_config(
    manifest: Manifest,
    calls: Sequence[DenoiserCall],
    lora_rank: int | None,
    recipe: dict[str, Any],
    num_student_steps: Sequence[int] = (),
    tell_size: bool = True,
) -> StudentConfig:
    """The configuration of a student of the recorded teacher.

    Args:
        manifest: of the data set.
        calls: of any trajectory, at all recorded key points.
        lora_rank: None for full weights.
        recipe: how the student was distilled.
        num_student_steps: numbers of steps it was trained for, the usual one first; none: as recorded.
        tell_size: whether, with several numbers, its denoiser is told how far a step goes.
    """
    if num_student_steps:
        configs = []
        for number in num_student_steps:
            points = even_grid(manifest.num_student_steps, number)
            keypoints = [manifest.keypoints[point] for point in points]
            part = replace(manifest, keypoints=keypoints, num_student_steps=number)
            configs.append(student_config(part, [calls[point] for point in points[:-1]], lora_rank, recipe))
        return joined(configs, is_told=tell_size and len(manifest.fingerprints) == 1)
    timesteps = [scheduler_timestep(*pair) for pair in zip(calls, manifest.key_sigmas.tolist(), strict=False)]
    guidance_scale, pipeline_args = unguided(manifest)
    scheduler: Any = student_scheduler(manifest, timesteps)
    plain = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return StudentConfig(
        teacher=manifest.teacher,
        revision=manifest.revision,
        license=manifest.license,
        pipeline_class=manifest.pipeline_class,
        fingerprints=manifest.fingerprints,
        num_steps=manifest.num_student_steps,
        sigmas=manifest.key_sigmas.tolist(),
        timesteps=timesteps,
        guidance_scale=guidance_scale,
        teacher_guidance_scale=manifest.guidance_scale,
        teacher_num_steps=manifest.teacher_num_steps or manifest.num_steps,
        height=manifest.height,
        width=manifest.width,
        num_frames=manifest.num_frames,
        fps=manifest.fps,
        pipeline_args=pipeline_args,
        lora_rank=lora_rank,
        scheduler={"class": type(scheduler).__name__, "config": plain},
        recipe=recipe,
        teacher_scheduler=manifest.scheduler,
        solver=manifest.solver,
        recorded_num_steps=manifest.num_steps,
    )


def joined(configs: Sequence[StudentConfig], is_told: bool) -> StudentConfig:
    """The configuration of one student for all these numbers of steps, by itself that of the first.

    Args:
        configs: of each number of steps.
        is_told: whether its denoiser is told how far steps go. With two denoisers it is not, for pipelines choose
            between them by the timestep.
    """
    if len(configs) == 1:
        return configs[0]
    if is_told:
        configs = [replace(each, timesteps=told_timesteps(each.sigmas, each.timesteps)) for each in configs]
    first, *others = configs
    schedules = [{"sigmas": each.sigmas, "timesteps": each.timesteps} for each in others]
    scheduler: Any = KeyPointScheduler(first.sigmas, first.timesteps, others=schedules)
    plain = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return replace(
        first,
        scheduler={"class": KeyPointScheduler.__name__, "config": plain},
        other_num_steps=[each.num_steps for each in others],
    )


def told_timesteps(sigmas: Sequence[float], timesteps: Sequence[float]) -> list[float]:
    """What a scheduler tells a denoiser that is told how far steps go, from the timesteps of their starts."""
    ends = torch.tensor([*timesteps, timesteps[-1] * sigmas[-1] / sigmas[-2]], dtype=torch.float64)
    return told_timestep(ends[:-1], ends[1:]).tolist()


def unguided(manifest: Manifest) -> tuple[float | None, dict[str, Any]]:
    """Guidance scale and further arguments with which the recorded pipeline takes one denoiser call a step.

    Where the denoiser is told one guidance scale and a second makes two calls (HunyuanVideo), the first stays.
    """
    if manifest.denoiser_calls == manifest.num_steps:
        return manifest.guidance_scale, manifest.pipeline_args
    run = getattr(diffusers, manifest.pipeline_class).__call__
    if "true_cfg_scale" in inspect.signature(run).parameters:
        return manifest.guidance_scale, manifest.pipeline_args | {"true_cfg_scale": 1.0}
    return 1.0, manifest.pipeline_args


def save_student(folder: Path, student: Student, config: StudentConfig, metrics: Mapping[str, float]) -> None:
    """Write weights, scheduler, model card and, last, `student.json`.

    Args:
        folder: where to; made if need be.
        student: its weights.
        config: what `student_config` made.
        metrics: numbers for the model card, by name.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        denoiser: Any
        for name, denoiser in student.denoisers.items():
            if config.lora_rank is None:
                denoiser.save_pretrained(folder / name)
            else:
                save_lora(folder / LORA_FILES[name], denoiser)
        make_scheduler(config.scheduler).save_pretrained(folder / "scheduler")
        what = "Full weights" if config.lora_rank is None else f"LoRA of rank {config.lora_rank}"
        card = model_card(config, what, USAGE, metrics, lora=config.lora_rank is not None)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_whole(folder / "student.json", json.dumps(asdict(config), indent=2).encode() + b"\n")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the student to {folder}: {error}") from error


def save_lora(path: Path, denoiser: Any) -> None:
    """Write a denoiser's adapters as diffusers does, so that `load_lora_weights` reads them."""
    tensors = get_peft_model_state_dict(denoiser)
    settings = {
        name: list(v) if isinstance(v, set) else v for name, v in denoiser.peft_config["default"].to_dict().items()
    }
    metadata = {f"transformer.{name}": value for name, value in settings.items()}
    save_file(
        {f"transformer.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(metadata, sort_keys=True)},
    )


def load_student(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: Quantization | None = None,
) -> tuple[DiffusionPipeline, StudentConfig]:
    """The teacher's pipeline with the student's denoisers and scheduler; call it with `guidance_scale=1`.

    A LoRA is merged into float32 weights. It is not merged into coarser ones, whose rounding would swallow much of it.

    Raises:
        UserError: the folder holds no finished student, or its teacher is not the one it was distilled from.
    """
    config = read_student_config(folder)
    teacher_quantization = None if quantization is None else pipeline_quantization(quantization, dtype)
    pipeline: Any = load_pipeline(config.teacher, dtype, quantization=teacher_quantization, revision=config.revision)
    denoiser: Any
    for name, denoiser in denoisers(pipeline).items():
        found = fingerprint(denoiser) if quantization is None else stored_fingerprint(denoiser)
        if found != config.fingerprints[name]:
            raise UserError(f"{folder} is a student of another teacher than {config.teacher} is now")
        if config.lora_rank is None:
            own_quantization = None if quantization is None else quantization_config(quantization, dtype)
            denoiser = type(denoiser).from_pretrained(
                folder / name, torch_dtype=dtype, use_safetensors=True, quantization_config=own_quantization
            )
        else:
            denoiser.load_lora_adapter(folder, weight_name=LORA_FILES[name], use_safetensors=True)
            if dtype == torch.float32 and quantization is None:
                denoiser.fuse_lora()
                denoiser.unload_lora()
        pipeline.register_modules(**{name: denoiser})
    pipeline.register_modules(scheduler=make_scheduler(config.scheduler))
    return pipeline.to(device), config


def read_student_config(folder: Path) -> StudentConfig:
    """The configuration of the student in `folder`.

    Raises:
        UserError: there is none.
    """
    try:
        return StudentConfig(**json.loads((folder / "student.json").read_text("utf-8")))
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no finished student (no student.json); make one with accvideo distill"
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / 'student.json'} is damaged: {error}") from error


def make_scheduler(description: Mapping[str, Any]) -> SchedulerMixin:
    """The scheduler of a "class" (of diffusers, or `KeyPointScheduler`) and "config"."""
    name = description["class"]
    scheduler_class: Any = KeyPointScheduler if name == KeyPointScheduler.__name__ else getattr(diffusers, name)
    return scheduler_class.from_config(description["config"])
