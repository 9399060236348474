"""Small one-dimensional velocity networks, many side by side in one module: one for each seed and variant."""

import hashlib
import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

NUM_FREQUENCIES = 8
"""Of the encoding of the noise level."""

EPSILON = 1e-5
"""Added to a batch's variance."""

MOMENTUM = 0.1
"""Share of a batch in the running statistics."""

Points = Float[Tensor, "networks samples"]
"""Numbers on the line: one row a network."""


def encode(sigma: Float[Tensor, "networks samples"]) -> Float[Tensor, "networks samples features"]:
    """Sines and cosines of a noise level at frequencies of half a turn to 64 turns."""
    angles = sigma[..., None] * math.pi * 2.0 ** torch.arange(NUM_FREQUENCIES)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Normalized(torch.autograd.Function):
    """Features normalized by the statistics of their batch, and these; a closed gradient saves a fifth of an update."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of `[networks, samples, width]`; the others are `[networks, 1, width]`."""
        # Not torch.var_mean: along this axis it takes longer than all else here together.
        mean = hidden.mean(dim=1, keepdim=True)
        variance = torch.addcmul(hidden.square().mean(dim=1, keepdim=True), mean, mean, value=-1)
        rate = (variance + EPSILON).rsqrt()
        ctx.save_for_backward(hidden, mean, rate, scale)
        ctx.mark_non_differentiable(mean, variance)
        return torch.addcmul(shift - mean * scale * rate, hidden, scale * rate), mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore
        """Ioffe and Szegedy 2015, section 3."""
        hidden, mean, rate, scale = ctx.saved_tensors
        to_shift = gradient.sum(dim=1, keepdim=True)
        to_scale = rate * ((gradient * hidden).sum(dim=1, keepdim=True) - mean * to_shift)
        slope = -scale * rate.square() * to_scale / hidden.shape[1]
        offset = -scale * rate * to_shift / hidden.shape[1] - slope * mean
        to_hidden = torch.addcmul(torch.addcmul(offset, hidden, slope), gradient, scale * rate)
        return to_hidden, to_scale, to_shift


class Norm(nn.Module):
    """Batch normalization of each network's features (Ioffe and Szegedy 2015, arXiv:1502.03167)."""

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, num_networks: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_networks, 1, width))
        self.shift = nn.Parameter(torch.zeros(num_networks, 1, width))
        self.register_buffer("running_mean", torch.zeros(num_networks, 1, width))
        self.register_buffer("running_variance", torch.ones(num_networks, 1, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """The features normalized by the batch's own statistics in training, else by the running ones."""
        if not self.training:
            factor = self.scale * (self.running_variance + EPSILON).rsqrt()
            return torch.addcmul(self.shift - self.running_mean * factor, hidden, factor)
        normalized: Any = Normalized.apply(hidden, self.scale, self.shift)
        hidden, mean, variance = normalized
        self.running_mean.lerp_(mean, MOMENTUM)
        self.running_variance.lerp_(variance, MOMENTUM)
        return hidden


class Linear(nn.Module):
    """A linear layer of each network; on a signal of one position that is a 1-D convolution."""

    def __init__(self, seeds: Sequence[int], name: str, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        bound = num_inputs**-0.5
        shape = (num_inputs, num_outputs)
        draws = [torch.rand(shape, generator=generator(seed, name, 0)) for seed in seeds]
        self.weight = nn.Parameter(bound * (2 * torch.stack(draws) - 1))
        self.bias = nn.Parameter(torch.zeros(len(seeds), 1, num_outputs))

    def forward(self, hidden: Tensor) -> Tensor:
        """`[networks, samples, outputs]` of `[networks, samples, inputs]`."""
        return torch.baddbmm(self.bias, hidden, self.weight)


class VelocityNetworks(nn.Module):
    """Residual networks `v(x, sigma)`, one for each seed (Zhang et al. 2025, arXiv:2503.19462, Figure 8).

    Convolutions with batch normalization around residual blocks, the noise level by a positional encoding, average
    pooling, a linear layer. The signal has one position, so convolutions are linear layers, and pooling does nothing.
    The paper gives neither widths nor depths.

    Args:
        seeds: of the first weights, one a network.
        width: of the hidden layers.
        num_blocks: residual blocks.
    """

    def __init__(self, seeds: Sequence[int], width: int = 32, num_blocks: int = 2) -> None:
        super().__init__()

        def layer(name: str, num_inputs: int, num_outputs: int = width) -> Linear:
            return Linear(seeds, name, num_inputs, num_outputs)

        def norms() -> nn.ModuleList:
            return nn.ModuleList(Norm(len(seeds), width) for _ in range(num_blocks))

        self.enter, self.enter_norm = layer("enter", 1), Norm(len(seeds), width)
        self.enter_level = layer("enter_level", 2 * NUM_FREQUENCIES)
        self.first = nn.ModuleList(layer(f"first{i}", width) for i in range(num_blocks))
        self.level = nn.ModuleList(layer(f"level{i}", 2 * NUM_FREQUENCIES) for i in range(num_blocks))
        self.second = nn.ModuleList(layer(f"second{i}", width) for i in range(num_blocks))
        self.first_norm, self.second_norm = norms(), norms()
        self.leave = layer("leave", width, 1)

    def forward(self, x: Points, sigma: Points | float) -> Points:
        """Velocities at points `x` and noise levels `sigma`."""
        return self.velocity(self.features(x, sigma))

    def velocity(self, features: list[Tensor]) -> Points:
        """The velocities that follow from features."""
        return self.leave(features[-1])[..., 0]

    def features(self, x: Points, sigma: Points | float) -> list[Tensor]:
        """What each residual block puts out: `[networks, samples, width]`."""
        encoding = encode(torch.as_tensor(sigma, dtype=x.dtype).expand_as(x))
        hidden = torch.relu(self.enter_norm(self.enter(x[..., None])) + self.enter_level(encoding))
        found = []
        for first, norm, level, second, last in zip(
            self.first, self.first_norm, self.level, self.second, self.second_norm, strict=True
        ):
            inner = torch.relu(norm(first(hidden)) + level(encoding))
            hidden = torch.relu(hidden + last(second(inner)))
            found.append(hidden)
        return found

    def repeated(self, times: int) -> "VelocityNetworks":
        """All networks `times` over, one round after the other, with batch statistics fixed: students to be."""
        copy = deepcopy(self).eval()
        for module in copy.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().repeat(times, 1, 1)))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.repeat(times, 1, 1))
        return copy


class Heads(nn.Module):
    """Real-or-fake heads on features of a given width: one hidden layer, one logit a sample; one head a key point."""

    def __init__(self, seeds: Sequence[int], num_heads: int, width: int) -> None:
        super().__init__()
        self.enter = nn.ModuleList(Linear(seeds, f"head{k}", width, width) for k in range(num_heads))
        self.logit = nn.ModuleList(Linear(seeds, f"logit{k}", width, 1) for k in range(num_heads))

    def forward(self, features: Tensor, head: int) -> Points:
        """Logits of one head; above 0 is real."""
        hidden = torch.nn.functional.leaky_relu(self.enter[head](features), 0.2)
        return self.logit[head](hidden)[..., 0]


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A source of random numbers that depends on its arguments and on nothing else."""
    digest = hashlib.sha256(f"{seed}:{purpose}:{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
