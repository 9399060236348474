"""What networks cost: floating-point operations and bytes, counted on the meta device, where nothing is computed.

The real classes run on tensors that have a shape and no memory. Every operation is seen on its way: matrix products
and convolutions are counted by torch's own formulas, attention as a flash kernel would do it, and every tensor from
its birth to its end, which gives the peak of memory. Repeated blocks cost the same, so a network of any depth is
counted at a depth of one and two.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes."""

    matmul: float = 0.0
    """Floating-point operations of matrix products and convolutions: a multiplication and an addition are two."""
    attention: float = 0.0
    """Floating-point operations of attention."""
    peaks: tuple[float, ...] = ()
    """Bytes of tensors alive at once, at most, beyond those that were there before: in each phase of the work."""

    def plus(self, other: "Cost", times: float = 1.0) -> "Cost":
        """This cost and `times` the other."""
        return Cost(
            self.matmul + times * other.matmul,
            self.attention + times * other.attention,
            tuple(mine + times * its for mine, its in zip(self.peaks, other.peaks, strict=True)),
        )

    @property
    def peak(self) -> float:
        """Bytes of tensors alive at once, at most, in all phases."""
        return max(self.peaks, default=0.0)

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return self.matmul + self.attention


class Meter(TorchDispatchMode):
    """Counts the operations and living bytes of what runs in its context, all but attention's operations."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.matmul = self.attention = self.live = self.peak = 0
        self._sizes: dict[int, Any] = {}
        for tensor in known:
            self._sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (packet := func._overloadpacket) in flop_registry:
            self.matmul += flop_registry[packet](*args, **kwargs, out_val=result)
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor):
                self._see(each.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            self._sizes[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        self.live -= size
        del self._sizes[key]


class _Attend(torch.autograd.Function):
    """Attention of a flash kernel: its operations, and what it keeps for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, meter: Meter) -> Tensor:
        *batch, length, width = query.shape
        ctx.meter, ctx.flops = meter, 4 * torch.Size(batch).numel() * length * key.shape[-2] * width
        meter.attention += ctx.flops
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result, query.new_empty(*batch, length, dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # Five products of that size in place of two: the scores are computed again (Dao 2023, arXiv:2307.08691).
        ctx.meter.attention += 5 * ctx.flops // 2
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


@contextmanager
def metered(known: Iterable[Tensor] = ()) -> Iterator[Meter]:
    """A context whose work, all of it on the meta device, is counted.

    What this device cannot do is replaced by what has the same shape.

    Args:
        known: tensors whose memory is not counted: weights and inputs.
    """
    meter = Meter(known)

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Attend.apply(query, key, value, meter)  # pyright: ignore[reportReturnType]

    def nonzero(mask: Tensor, **_: Any) -> Tensor:
        """Of a mask of the prompt's tokens (Mochi): all of them count."""
        return torch.arange(mask.numel(), device="meta")[:, None]

    with (
        replaced(F, "scaled_dot_product_attention", attention),
        replaced(torch, "nonzero", nonzero),
        replaced(torch, "autocast", lambda *_, **__: nullcontext()),  # for meta torch has none, and Mochi asks for it
        meter,
    ):
        yield meter


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """A context in which a module has another attribute of this name."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def measure(*phases: Callable[[], Any], known: Iterable[Tensor] = ()) -> Cost:
    """The cost of running functions one after the other; what one returns is dropped.

    Args:
        phases: the functions.
        known: tensors whose memory is not counted: weights and inputs.
    """
    peaks = []
    with metered(known) as meter:
        for phase in phases:
            meter.peak = meter.live
            phase()
            peaks.append(meter.peak)
    return Cost(meter.matmul, meter.attention, tuple(peaks))


def at_depth(cost: Callable[..., Cost], depths: Sequence[int], least: int = 1) -> Cost:
    """The cost of a network with these numbers of repeated blocks, from the costs of shallow ones.

    Each further block of a kind costs the same. That holds for the peak of a phase too where its moment is: a phase
    must keep something of each block until then, or of none.

    Args:
        cost: gives the cost at small numbers.
        depths: of each kind of block.
        least: number from which on each further block costs the same.
    """
    shallow = [min(least, depth) for depth in depths]
    base = total = cost(*shallow)
    for kind, depth in enumerate(depths):
        if depth > shallow[kind]:
            deeper = [number + (other == kind) for other, number in enumerate(shallow)]
            total = total.plus(cost(*deeper).plus(base, -1), depth - shallow[kind])
    return total
