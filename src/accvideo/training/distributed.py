"""Training on several ranks: processes that torchrun starts, each on an accelerator of its own.

All ranks do the same on rows of their own of every batch, and agree on every gradient. Without torchrun there is one
rank, and nothing here does anything.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from accvideo.types import UserError

Made = TypeVar("Made")

PATIENCE = timedelta(hours=1)
"""How long ranks wait for each other: the first writes the student meanwhile, which may be large."""


@contextmanager
def joined_ranks(device: str) -> Iterator[None]:
    """A context in which the processes that torchrun started are ranks of one training; does nothing without it.

    Args:
        device: that they train on.

    Raises:
        UserError: another rank has ended, in an error or by a kill.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "gloo"
    if torch.device(device).type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
        yield
    except RuntimeError as error:
        if "gloo/transport" not in str(error):
            raise
        reason = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        raise UserError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} has lost another one: {reason}\n"
            "That one's own last words say why; the same command then goes on from the last checkpoint"
        ) from error
    # After an error there is no orderly end: the other ranks may be waiting for this one, until torchrun ends them.
    dist.destroy_process_group()


def rank() -> int:
    """The number of this process among those that train together; the first, 0, writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if num_ranks() > 1:
        dist.barrier()


def first_ranks(number: int) -> int:
    """The number that the first rank gave."""
    if num_ranks() == 1:
        return number
    told = torch.tensor(number)
    dist.broadcast(told, src=0)
    return int(told)


def made_by_first(make: Callable[[], Made]) -> Made:
    """What the first rank makes, on the CPU, for all."""
    if num_ranks() == 1:
        return make()
    made = [make() if rank() == 0 else None]
    dist.broadcast_object_list(made, src=0, device=torch.device("cpu"))
    return cast(Made, made[0])


def own_parts(num_parts: int) -> range:
    """The numbers of a rank's parts of a batch that all ranks together cut into equal ones, from row 0 on.

    Args:
        num_parts: of each rank.
    """
    return range(rank(), num_parts * num_ranks(), num_ranks())


def mean(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of scalars over the ranks, by name."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if num_ranks() > 1:
        dist.all_reduce(stacked)
        stacked /= num_ranks()
    return dict(zip(values, stacked.tolist(), strict=True))


def total(values: Tensor) -> Tensor:
    """The sum over the ranks."""
    if num_ranks() > 1:
        dist.all_reduce(values)
    return values


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks in turns: the first of each rank, the second of each, and so on."""
    if num_ranks() == 1:
        return rows
    everybodys = [torch.empty_like(rows) for _ in range(num_ranks())]
    dist.all_gather(everybodys, rows.contiguous())
    return torch.stack(everybodys, dim=1).flatten(0, 1)


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


# --- Sharded weights ---


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
