"""Weights spread over the ranks by FSDP2, and their gradients; without torchrun nothing is spread."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from accvideo.training.distributed import num_ranks, rank


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Average the gradients of weights that every rank has whole; those of sharded weights are averaged already."""
    gradients = [each.grad for each in parameters if each.grad is not None and not isinstance(each, DTensor)]
    if num_ranks() == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= num_ranks()
    for gradient, averaged in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(averaged.view_as(gradient))


def sharder(device: str, precision: str) -> Callable[[nn.Module], Any]:
    """A function that spreads a module's weights over the ranks, each of which gathers them while it computes.

    That is FSDP2 (Zhao et al. 2023, arXiv:2304.11277). Call it with the blocks of a denoiser, then with the denoiser.
    Where a module has frozen weights, those alone are spread: the others are small adapters, which stay whole.

    Args:
        device: to which the weights are moved.
        precision: "bfloat16" gathers float32 weights that train in bfloat16; gradients are summed in float32.
    """
    # It warns of changing a denoiser's output in place, which nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(torch.device(device).type, (num_ranks(),))

    def shard(module: nn.Module) -> None:
        trained = {parameter for parameter in module.parameters() if parameter.requires_grad}
        all_trained = len(trained) == len(list(module.parameters()))
        gathered = torch.bfloat16 if all_trained and precision == "bfloat16" else None
        if not all_trained:
            for parameter in trained:
                parameter.data = parameter.data.to(device)
        # Weights are set from outside between passes (validation of the running mean): none may stay gathered.
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False),
            ignored_params=set() if all_trained else trained,
        )

    return shard


def first_row(tensor: DTensor) -> int:
    """The number of the first row that this rank has of a sharded tensor; each has as many, but for the last ones."""
    return min(rank() * math.ceil(len(tensor) / num_ranks()), len(tensor))


def own_pieces(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this rank writes of tensors: its rows of sharded ones, as `name@first row`; the first rank, all others."""
    pieces = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            pieces[f"{name}@{first_row(tensor)}"] = tensor.to_local()
        elif rank() == 0:
            pieces[name] = tensor
    return pieces


def spread_as(other: Tensor, read: Callable[..., Tensor]) -> Tensor:
    """A tensor spread over the ranks, and on the device, as another of its shape.

    Args:
        other: a weight.
        read: gives its rows, from a first one up to another; all of it without them.
    """
    if not isinstance(other, DTensor):
        return read().to(other.device)
    start, num_rows = first_row(other), len(other.to_local())
    rows = read(start, start + num_rows).to(other.device)
    return DTensor.from_local(
        rows, other.device_mesh, other.placements, run_check=False, shape=other.shape, stride=other.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, sharded or not."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(denoiser: nn.Module) -> nn.Module:
    """A denoiser whose weights are not sharded: itself, or a copy on the CPU; whole on the first rank only."""
    if not isinstance(denoiser, FSDPModule):
        return denoiser
    model: Any = denoiser
    plain_class: Any = next(base for base in type(denoiser).__bases__ if base is not FSDPModule)
    with torch.device("meta"):
        plain = plain_class.from_config(model.config)
    weights = {}
    for name, tensor in denoiser.state_dict().items():
        gathered = whole(tensor)
        weights[name] = gathered.cpu() if rank() == 0 else gathered.to("meta")
    plain.load_state_dict(weights, assign=True)
    return plain
