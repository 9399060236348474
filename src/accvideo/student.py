"""The few-step student: made from the teacher's denoisers, saved, and loaded into the teacher's own pipeline."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from accvideo.call import DenoiserCall, denoiser_blocks, layer_features, replay
from accvideo.exporting.card import model_card
from accvideo.inference.acceleration import pipeline_quantization, quantization_config, stored_fingerprint
from accvideo.inference.config import Quantization
from accvideo.inference.schedulers import make_scheduler
from accvideo.inference.student_config import StudentConfig, read_student_config
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
        layer.forward = MethodType(adapted, layer)  # no `partial`, which torch.compile takes apart for each layer


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
        folder.mkdir(parents=True, exist_ok=True)
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
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write the student to {folder}: {reason}\n"
            "Make room there, or mend what else is wrong; the same command then writes it again"
        ) from error


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


def saved_weights(folder: Path, config: StudentConfig) -> dict[str, Any]:
    """The trained weights of a saved student, each read when a slice of it is taken, by the names of `trained`."""
    found = {}
    for component in config.fingerprints:
        lora = config.lora_rank is not None
        paths = [folder / LORA_FILES[component]] if lora else (folder / component).glob("*.safetensors")
        for path in paths:
            file: Any = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 - no mapping
                name = key.removeprefix("transformer.").removesuffix("weight") + "default.weight" if lora else key
                found[f"{component}.{name}"] = file.get_slice(key)
    return found


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
        if found != config.fingerprints.get(name):
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
