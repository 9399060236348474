"""Faster generation in less memory, all by diffusers' own switches."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig

from accvideo.types import UserError

Quantization = Literal["int8", "float8", "nf4"]
"""Type of the denoisers' linear weights: int8 or float8 (1 byte each, torchao), nf4 (half a byte, bitsandbytes)."""


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
