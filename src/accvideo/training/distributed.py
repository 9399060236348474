"""Training on several ranks: processes that torchrun starts, each on an accelerator of its own.

All ranks do the same on rows of their own of every batch, and agree on every gradient. Without torchrun there is one
rank, and nothing here does anything.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

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
