"""Low-rank adapters as plain factors: read from a file, merged, and extracted from full weights."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from torch import Tensor

from accvideo.exporting.weights import LazyTensor, Weights, read_weights
from accvideo.types import UserError

EXACT_SVD = 1024
"""Matrices whose smaller side is at most this are decomposed exactly."""


@dataclass(frozen=True)
class Factors:
    """A change `up @ down` of a linear layer's weight (Hu et al. 2021, arXiv:2106.09685)."""

    down: Tensor
    """`[rank, inputs]`; diffusers' lora_A."""
    up: Tensor
    """`[outputs, rank]`; diffusers' lora_B."""

    @property
    def change(self) -> Tensor:
        """The change of the weight, `[outputs, inputs]`."""
        return self.up @ self.down

    def to(self, dtype: torch.dtype) -> "Factors":
        """The same factors in another type."""
        return Factors(self.down.to(dtype), self.up.to(dtype))


def read_lora(path: Path) -> dict[str, Factors]:
    """The LoRA that `save_student` wrote: factors by module.

    Raises:
        UserError: it cannot be read.
    """
    weights = read_weights(path)
    with safe_open(path, framework="pt") as file:
        settings = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    scale = settings.get("transformer.lora_alpha", 1) / settings.get("transformer.r", 1)
    modules = [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]
    if len(weights) != 2 * len(modules):
        raise UserError(f"{path} holds more than the factors of linear layers; it is no LoRA of accvideo distill")
    return {
        module.removeprefix("transformer."): Factors(
            weights[f"{module}.lora_A.weight"].read(), weights[f"{module}.lora_B.weight"].read() * scale
        )
        for module in modules
    }


def merge_lora(weights: Weights, lora: Mapping[str, Factors]) -> Weights:
    """Weights with a LoRA added, in float32."""

    def merged(weight: LazyTensor, factors: Factors) -> LazyTensor:
        return LazyTensor(weight.shape, torch.float32, lambda: weight.read().float() + factors.change)

    missing = [module for module in lora if f"{module}.weight" not in weights]
    if missing:
        raise UserError(f"the LoRA changes {missing[0]}, which its teacher does not have: it is of another base")
    return dict(weights) | {f"{name}.weight": merged(weights[f"{name}.weight"], lora[name]) for name in lora}


@dataclass(frozen=True)
class Extraction:
    """A LoRA that stands for the difference of two sets of weights, and what it leaves out."""

    lora: dict[str, Factors]
    errors: dict[str, float]
    """Of each layer, `|change - up @ down| / |change|` in Frobenius norms; 0 where nothing changed."""
    total_error: float
    """The same over all covered layers together."""
    not_covered: dict[str, float]
    """Weights that changed and that no LoRA can hold (norms, biases, convolutions, tables): `|change| / |weight|`."""


def extract_lora(
    teacher: Weights,
    student: Weights,
    linear: Collection[str],
    rank: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    on_layer: Callable[[], None] = lambda: None,
) -> Extraction:
    """The LoRA of this rank that is nearest to `student - teacher`, layer by layer.

    By singular value decomposition (Eckart and Young 1936). Layers with fewer rows or columns than `rank` are padded
    with zeros, so that all have one rank.

    Args:
        teacher: weights in diffusers' layout.
        student: as the teacher's.
        linear: names of the linear layers.
        rank: of every layer.
        dtype: of the factors; the errors are measured after rounding.
        device: where the decompositions are computed.
        on_layer: called after each weight.
    """
    lora, errors, not_covered = {}, {}, {}
    left_out, changed = 0.0, 0.0
    for name, weight in student.items():
        change = weight.read().to(device, torch.float32) - teacher[name].read().to(device, torch.float32)
        size = change.double().norm().item()
        if (module := name.removesuffix(".weight")) != name and module in linear:
            factors = low_rank(change, rank).to(dtype)
            error = (change - factors.to(torch.float32).change).double().norm().item()
            errors[module] = error / size if size else 0.0
            left_out, changed = left_out + error**2, changed + size**2
            lora[module] = Factors(factors.down.cpu(), factors.up.cpu())
        elif size:
            not_covered[name] = size / max(teacher[name].read().double().norm().item(), 1e-12)
        on_layer()
    return Extraction(lora, errors, (left_out / changed) ** 0.5 if changed else 0.0, not_covered)


def low_rank(matrix: Tensor, rank: int) -> Factors:
    """The nearest matrix of a rank, as factors whose columns and rows have equal lengths, padded with zeros.

    Large matrices are decomposed by subspace iteration (Halko et al. 2011, arXiv:0909.4061, Algorithm 4.4).
    """
    smaller = min(matrix.shape)
    if smaller <= max(EXACT_SVD, 2 * rank):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, q=rank + 32, niter=8)
        right = right.mT
    num_kept = min(rank, smaller)
    root = values[:num_kept].sqrt()
    up, down = left[:, :num_kept] * root, root[:, None] * right[:num_kept]
    missing = rank - num_kept
    return Factors(torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing)))


def lora_tensors(lora: Mapping[str, Factors], prefix: str) -> dict[str, Any]:
    """The tensors of a LoRA's file; no alpha: the change is `lora_B @ lora_A` as it stands."""
    return {
        f"{prefix}{module}.{name}.weight": tensor.contiguous()
        for module, factors in lora.items()
        for name, tensor in (("lora_A", factors.down), ("lora_B", factors.up))
    }
