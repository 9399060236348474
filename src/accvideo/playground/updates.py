"""How weights of the playground's teacher are updated: Muon and Adam, learning rates, running means, CUDA graphs."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal for matrices, and Adam at a tenth of the rate for all other weights.

    A convolution kernel counts as a matrix of outputs by everything else; five Newton-Schulz iterations bring the
    singular values of the momentum near 1 (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural
    networks"), those of all matrices of one shape at once. Adam's moments start at zero and are not corrected for it:
    the learning rate is to rise from zero.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], lr: float | Tensor) -> None:
        super().__init__([{"params": list(matrices)}, {"params": list(others)}], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient."""
        rate = self.param_groups[0]["lr"]
        matrices, others = ([w for w in group["params"] if w.grad is not None] for group in self.param_groups)

        momenta = self._moments(matrices, "momentum")
        torch._foreach_lerp_(momenta, [w.grad for w in matrices], 0.05)
        ahead = torch._foreach_lerp([w.grad for w in matrices], momenta, 0.95)
        by_shape: dict[torch.Size, list[int]] = {}
        for i, gradient in enumerate(ahead):
            by_shape.setdefault(gradient.flatten(1).shape, []).append(i)
        for (outputs, inputs), rows in by_shape.items():
            directions = _orthogonal(torch.stack([ahead[i].flatten(1) for i in rows]))
            directions = directions * (-rate * max(1.0, outputs / inputs) ** 0.5)
            changes = [change.view_as(matrices[i]) for i, change in zip(rows, directions.unbind(), strict=True)]
            torch._foreach_add_([matrices[i] for i in rows], changes)

        means, squares = self._moments(others, "momentum"), self._moments(others, "square")
        gradients = [w.grad for w in others]
        torch._foreach_lerp_(means, gradients, 0.1)
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 0.01)
        deviations = torch._foreach_add(torch._foreach_sqrt(squares), 1e-8)
        changes = torch._foreach_mul(torch._foreach_div(means, deviations), -0.1 * rate)
        torch._foreach_add_(others, changes)

    def _moments(self, weights: list[nn.Parameter], name: str) -> list[Tensor]:
        for weight in weights:
            if name not in self.state[weight]:
                self.state[weight][name] = torch.zeros_like(weight)
        return [self.state[weight][name] for weight in weights]


def _orthogonal(matrices: Float[Tensor, "batch rows columns"]) -> Float[Tensor, "batch rows columns"]:
    """The orthogonal matrices nearest to `matrices`, roughly: singular values come to lie between about 0.7 and 1.2."""
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        product = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * product + 2.0315 * product @ product) @ wide
    return wide.mT if tall else wide


def muon(matrices: list[nn.Parameter], others: list[nn.Parameter]) -> Muon:
    """Muon for matrices and kernels, Adam for all other weights; the learning rate is set before each update."""
    return Muon(matrices, others, _no_learning_rate(matrices[0].device))


def adamw(weights: list[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW without decay; the learning rate is set before each update."""
    rate, on_gpu = _no_learning_rate(weights[0].device), weights[0].device.type == "cuda"
    return torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True, capturable=on_gpu)


def _no_learning_rate(device: torch.device) -> float | Tensor:
    """A learning rate of zero, to be set later; a captured graph reads it from a tensor."""
    return torch.zeros((), device=device) if device.type == "cuda" else 0.0


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float | Tensor) -> None:
    """Set the learning rate of all weights, in place where a captured graph reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].copy_(rate) if isinstance(rate, Tensor) else group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def schedule(iteration: int, num_iterations: int) -> float:
    """Learning rate as a fraction of its peak: 300 updates of warm-up, then half a cosine down to zero."""
    warmup = min(300, num_iterations // 10 + 1)
    if iteration < warmup:
        return (iteration + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / max(1, num_iterations - warmup)))


def minimize(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One clipped step of the optimizer down the gradient of the loss."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


@torch.no_grad()
def move_averages(averages: list[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """Move running means towards the weights.

    With gradients on, the means would join the weights' graph and keep it alive, and no CUDA graph could be captured.
    """
    torch._foreach_lerp_(averages, list(weights), 1 - decay)


class Graphed:
    """An update captured as a CUDA graph at its first call: its thousands of small kernels start with one launch.

    Inputs are copied into fixed tensors. Capture needs a few trial updates; they run at learning rate 0, and what they
    did to the optimizer's moments is undone. On a CPU the update is simply called.
    """

    def __init__(self, update: Callable[..., dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
        self.update, self.optimizer = update, optimizer
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Update once on these inputs; returns the update's metrics."""
        if inputs[0].device.type != "cuda":
            return self.update(*inputs)
        if self.graph is None:
            self._capture(inputs)
        assert self.graph is not None
        for fixed, value in zip(self.inputs, inputs, strict=True):
            fixed.copy_(value)
        self.graph.replay()
        return self.outputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(value.clone() for value in inputs)
        rate = self.optimizer.param_groups[0]["lr"].clone()
        before = {p: {k: v.clone() for k, v in state.items()} for p, state in self.optimizer.state.items()}
        set_learning_rate(self.optimizer, 0.0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.update(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                value.copy_(before[parameter][key]) if parameter in before else value.zero_()
        set_learning_rate(self.optimizer, rate)
        self.graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        with torch.cuda.graph(self.graph):
            self.outputs = self.update(*self.inputs)
