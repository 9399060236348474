"""Faster generation in less memory, all by diffusers' own switches."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import torch
from diffusers import (
    BitsAndBytesConfig,
    ContextParallelConfig,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    TorchAoConfig,
)
from diffusers.models.attention_dispatch import AttentionBackendName
from safetensors import safe_open

from accvideo.inference.config import Acceleration, ContextParallel, Quantization
from accvideo.teacher import denoisers, weights_fingerprint
from accvideo.types import UserError


def check_acceleration(acceleration: Acceleration, device: str) -> None:
    """Refuse, before anything is loaded, what this machine does not have.

    Raises:
        UserError: see there.
    """
    names = [backend.value for backend in AttentionBackendName]
    if acceleration.attention_backend not in (None, *names):
        raise UserError(
            f"unknown attention backend {acceleration.attention_backend!r}; diffusers {diffusers.__version__} has "
            f"{', '.join(names)}"
        )
    if acceleration.offload != "none" and torch.device(device).type == "cpu":
        raise UserError(
            f"--offload {acceleration.offload} moves weights between main memory and an accelerator; the device is "
            f"{device}\nLeave --offload out, or give --device cuda"
        )
    if acceleration.compile:
        check_compiler(device)
    if acceleration.quantization is not None:
        quantization_config(acceleration.quantization)


def check_compiler(device: str) -> None:
    """See that torch.compile works here, on one addition.

    Raises:
        UserError: it does not; on a CPU it takes a C++ compiler, on an accelerator Triton.
    """

    def add(numbers: torch.Tensor) -> torch.Tensor:
        return numbers + 1

    try:
        torch.compile(add)(torch.zeros(8, device=device))
    except Exception as error:  # each backend has its own
        needed = "a C++ compiler, such as g++" if torch.device(device).type == "cpu" else "Triton and a C compiler"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--compile: torch.compile does not work here ({reason})\nInstall {needed}, or leave --compile out"
        ) from error


def accelerate_pipeline(pipeline: DiffusionPipeline, acceleration: Acceleration, device: str) -> None:
    """Set a loaded pipeline's switches, all but quantization, which is for loading.

    With offloading the pipeline is in main memory before; otherwise it is on the device.

    Raises:
        UserError: The pipeline does not offer one of them, or a library is missing.
    """
    run: Any = pipeline
    if acceleration.vae_tiling:
        with explained(run.vae, "--vae-tiling"):
            run.vae.enable_tiling()
    if acceleration.vae_slicing:
        with explained(run.vae, "--vae-slicing"):
            run.vae.enable_slicing()
    denoiser: Any
    for denoiser in denoisers(pipeline).values():
        if acceleration.attention_backend is not None:
            with explained(denoiser, f"--attention-backend {acceleration.attention_backend}"):
                denoiser.set_attention_backend(acceleration.attention_backend)
        if acceleration.compile:
            with explained(denoiser, "--compile"):
                denoiser.compile_repeated_blocks()
    if acceleration.offload == "model":
        with explained(pipeline, "--offload model"):
            run.enable_model_cpu_offload(device=device)
    if acceleration.offload == "group":
        with explained(pipeline, "--offload group"):
            # By layers: a text encoder's blocks lie too deep to be found one by one.
            run.enable_group_offload(
                torch.device(device), offload_type="leaf_level", use_stream=torch.device(device).type == "cuda"
            )


@contextmanager
def explained(owner: object, option: str) -> Iterator[None]:
    """A context in which diffusers' refusals of an option become user errors."""
    try:
        yield
    except (NotImplementedError, AttributeError, ImportError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{type(owner).__name__} refuses {option}: {reason}") from error


# Quantization


def quantization_config(name: Quantization, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The `quantization_config` with which diffusers loads one denoiser in few bits.

    Only linear weights are quantized; they are multiplied in `dtype`. A LoRA can be trained or loaded on top.

    Args:
        name: One of `Quantization`.
        dtype: That the denoiser computes in.

    Raises:
        UserError: The name is unknown, or the library or the GPU that it takes is missing.
    """
    if name not in get_args(Quantization):
        raise UserError(f"unknown quantization {name!r}; known are {', '.join(get_args(Quantization))}")
    library = "bitsandbytes" if name == "nf4" else "torchao"
    if find_spec(library) is None:
        raise UserError(f"quantization {name} takes {library}, which is not installed; pip install {library}")
    if name == "nf4":
        if not torch.cuda.is_available():
            raise UserError("quantization nf4 takes a GPU, and none was found; int8 and float8 do without one")
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    torchao: Any = import_module("torchao.quantization")
    return TorchAoConfig(torchao.Int8WeightOnlyConfig() if name == "int8" else torchao.Float8WeightOnlyConfig())


def pipeline_quantization(name: Quantization, dtype: torch.dtype = torch.bfloat16) -> PipelineQuantizationConfig:
    """The `quantization_config` with which `DiffusionPipeline.from_pretrained` loads the denoisers in few bits.

    Raises:
        UserError: see `quantization_config`.
    """
    config = quantization_config(name, dtype)
    return PipelineQuantizationConfig(quant_mapping={"transformer": config, "transformer_2": config})


def stored_fingerprint(denoiser: Any) -> str:
    """The `fingerprint` of a denoiser's files; its own, quantized weights would tell another."""
    folder = Path(denoiser.config["_name_or_path"])
    with torch.device("meta"):
        plain = type(denoiser).from_config(type(denoiser).load_config(folder))
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(path, "pt")) for path in folder.glob("*.safetensors")]
        file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        readers = {name: partial(file_of[name].get_tensor, name) for name, _ in plain.named_parameters()}
        return weights_fingerprint(type(plain).__name__, plain.config, readers)


# Several accelerators


@contextmanager
def joined_processes(kind: ContextParallel) -> Iterator[bool]:
    """Joins the processes that torchrun started; yields whether this is the first one, which writes the files.

    Raises:
        UserError: torchrun did not start this process, it started only one, or there are no accelerators.
    """
    if kind == "none":
        yield True
        return
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise UserError(
            f"--context-parallel {kind} shares the tokens of a video between several accelerators; start it with\n"
            "torchrun --nproc-per-node 4 --local-ranks-filter 0 --no-python accvideo generate ..."
        )
    if not torch.accelerator.device_count():
        raise UserError(f"--context-parallel {kind} takes several accelerators, and none was found")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group()
    try:
        yield torch.distributed.get_rank() == 0
    finally:
        torch.distributed.destroy_process_group()


def share_tokens(pipeline: DiffusionPipeline, kind: Literal["ulysses", "ring"]) -> None:
    """Let each of the joined processes compute a part of the tokens.

    Raises:
        UserError: diffusers has no plan for this denoiser, or its attention backend cannot.
    """
    size = torch.distributed.get_world_size()
    denoiser: Any
    for denoiser in denoisers(pipeline).values():
        if denoiser._cp_plan is None:
            raise UserError(
                f"{type(denoiser).__name__} has no plan for context parallelism in diffusers {diffusers.__version__}; "
                "leave --context-parallel out"
            )
        with explained(denoiser, f"--context-parallel {kind}"):
            degrees = (size, 1) if kind == "ring" else (1, size)
            denoiser.enable_parallelism(config=ContextParallelConfig(*degrees))
