"""An accelerator made of the CPU: a device of its own that computes the CPU's numbers, for machines without a GPU.

As on a GPU, an operation on tensors of two devices is an error. What it does not show: kernels, streams, autocast.
Torch knows one such device a process, and keeps it: use it in a process of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"

aten = torch.ops.aten

COPYING = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
"""Indices may lie on the CPU, on a GPU too, but nothing else."""


class PretendedTensor(Tensor):
    """A tensor that says it lies on the accelerator."""

    inner: Tensor
    """Its numbers, on the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "PretendedTensor":
        """Of the shape and type of its numbers, without memory of its own."""
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportReturnType]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"PretendedTensor({self.inner})"

    def tolist(self) -> Any:
        """Its numbers."""
        return self.inner.tolist()

    def storage(self) -> Any:
        """Its memory, by which tensors that share one are found when they are saved."""
        return self.inner.storage()

    def untyped_storage(self) -> Any:
        """The same."""
        return self.inner.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Makes tensors on the accelerator where they are asked for there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU's numbers, its result on the device where it belongs.

    Raises:
        RuntimeError: it mixes devices, as on a GPU.
    """
    tensors = list(tensors_in((args, *kwargs.values())))
    ours = [each for each in tensors if isinstance(each, PretendedTensor)]
    asked = kwargs.get("device")
    if not ours and asked is None:
        return func(*args, **kwargs)
    together = tensors_in((args[0], args[2:])) if func.overloadpacket in INDEXING else tensors
    strangers = [each for each in together if each.dim() > 0 and not isinstance(each, PretendedTensor)]
    if ours and strangers and func.overloadpacket not in COPYING:
        raise RuntimeError(f"{func}: tensors of shape {[tuple(each.shape) for each in strangers]} are on the CPU")
    lands_here = asked is None or torch.device(asked).type == NAME
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    result = func(*unwrapped(args), **{name: unwrapped(each) for name, each in kwargs.items()})
    if func.overloadpacket is aten.copy_:
        return tensors[0]
    return wrapped(result, {id(each.inner): each for each in ours}) if lands_here else result


def tensors_in(values: Any) -> Iterator[Tensor]:
    """All tensors among arguments, in lists and tuples too; torch's own `tree_leaves` takes several times as long."""
    for each in values:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from tensors_in(each)


def unwrapped(value: Any) -> Any:
    """An argument with the CPU's numbers in the place of the accelerator's tensors."""
    if isinstance(value, PretendedTensor):
        return value.inner
    return type(value)(unwrapped(each) for each in value) if type(value) in (list, tuple) else value


def wrapped(result: Any, known: dict[int, PretendedTensor]) -> Any:
    """A result with the accelerator's tensors in the place of the CPU's; `known` are those of given numbers."""
    if isinstance(result, Tensor):
        return known[id(result)] if id(result) in known else PretendedTensor(result)
    return type(result)(wrapped(each, known) for each in result) if type(result) in (list, tuple) else result


class Module:
    """What torch and diffusers ask `torch.pretended` for."""

    @staticmethod
    def is_available() -> bool:
        """True: it needs nothing."""
        return True

    @staticmethod
    def device_count() -> int:
        """There is one."""
        return 1

    @staticmethod
    def current_device() -> int:
        """Number of the only one."""
        return 0

    @staticmethod
    def empty_cache() -> None:
        """There is none."""

    @staticmethod
    def get_rng_state(device: Any = None) -> Tensor:
        """The CPU's."""
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = None) -> None:
        """Its random numbers are the CPU's."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        """Of autocast, which changes nothing here."""
        return [torch.bfloat16]


@contextmanager
def accelerator() -> Iterator[str]:
    """A context that has the accelerator; gives its name. Once in a process."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module)
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    torch._C._set_only_lift_cpu_tensors(True)  # so that `torch.tensor(..., device=...)` copies by an operation too
    with Pretending():
        yield NAME
