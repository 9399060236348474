"""A recorded call of a denoiser, and its replay with another state.

What a pipeline passes to its denoiser (timestep, prompt embeddings, masks, pooled embeddings, guidance, sizes, image
conditions) is kept as it is. Replayed with other latents it asks the same question of another point, whatever the
model family: nothing here knows one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from accvideo.types import Latents, UserError


@dataclass(frozen=True)
class DenoiserCall:
    """One conditional call of a denoiser without its `hidden_states`."""

    tensors: dict[str, Tensor]
    """Keyword -> batch-first tensor (timestep, prompt embeddings, masks, pooled embeddings, guidance)."""
    constants: dict[str, Any]
    """Keyword -> JSON value, the same for each sample (return_dict, attention_kwargs, num_frames)."""
    condition: Tensor | None = None
    """Channels of `hidden_states` beyond the state's (Wan image-to-video), batch first."""
    dtype: torch.dtype = torch.float32
    """Floating-point type of the recorded `hidden_states`: what the pipeline gave the denoiser."""

    def to(self, device: torch.device | str) -> "DenoiserCall":
        """The same call on `device`."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, condition=None if self.condition is None else self.condition.to(device))

    def select(self, rows: slice) -> "DenoiserCall":
        """The call of some samples of the batch."""
        tensors = {name: tensor[rows] for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, condition=None if self.condition is None else self.condition[rows])


def capture_call(arguments: Mapping[str, Any], state: Latents) -> DenoiserCall:
    """The conditional call among what a denoiser was given while the scheduler held `state`.

    Where guidance doubles the batch (LTX-Video, Mochi), unconditional first, the second half is kept. Where
    `hidden_states` has more channels than the state, the rest is a condition.

    Args:
        arguments: all arguments of the denoiser's forward by name, `hidden_states` included.
        state: the latents passed to the scheduler's step that followed.

    Raises:
        UserError: the call cannot be replayed.
    """
    if not isinstance(hidden_states := arguments.get("hidden_states"), Tensor):
        raise UserError("the denoiser takes no `hidden_states`: supported are diffusers' video transformers")
    num_rows, num_channels = len(hidden_states), state.shape[channel_axis(state)]
    if num_rows not in (len(state), 2 * len(state)) or hidden_states.ndim != state.ndim:
        raise UserError(
            f"the denoiser saw {list(hidden_states.shape)} where the scheduler steps on {list(state.shape)}: supported "
            "are the same shape, twice the batch (guidance) and more channels (image conditions)"
        )
    conditional = slice(num_rows - len(state), num_rows)
    axis = channel_axis(state)
    own, condition = hidden_states[conditional].tensor_split([num_channels], dim=axis)
    if own.shape != state.shape or not torch.equal(own, state.to(own.dtype)):
        raise UserError(
            "the denoiser did not see the scheduler's state: supported are pipelines that pass it on unscaled, "
            "as the first channels of `hidden_states`"
        )

    tensors, constants = {}, {}
    for name, value in arguments.items():
        if name == "hidden_states":
            continue
        if isinstance(value, Tensor):
            if value.ndim == 0 or len(value) != num_rows:
                raise UserError(f"the denoiser's argument {name} {list(value.shape)} has no row for each sample")
            tensors[name] = value[conditional].detach().clone()
        else:
            try:
                constants[name] = json.loads(json.dumps(value))
            except TypeError:
                raise UserError(f"the denoiser's argument {name} is neither a tensor nor plain JSON") from None
    has_condition = condition.shape[axis] > 0
    return DenoiserCall(tensors, constants, condition.detach().clone() if has_condition else None, hidden_states.dtype)


def collate_calls(calls: Sequence[DenoiserCall], memo: dict[tuple[int, ...], Tensor] | None = None) -> DenoiserCall:
    """One call for the samples of all `calls`, which have the same arguments and shapes.

    Args:
        calls: of one key point.
        memo: what was concatenated before, by the identities of the parts; key points that share their parts
            (prompt embeddings) then share the result.

    Raises:
        UserError: a tensor's shape differs between the calls.
    """
    first = calls[0]
    if any(call.constants != first.constants or call.tensors.keys() != first.tensors.keys() for call in calls):
        raise UserError("recorded calls with different arguments cannot share a batch; use a batch size of 1")
    memo = {} if memo is None else memo
    tensors = {name: _concatenate(name, [call.tensors[name] for call in calls], memo) for name in first.tensors}
    conditions = [call.condition for call in calls if call.condition is not None]
    return replace(
        first, tensors=tensors, condition=_concatenate("condition", conditions, memo) if conditions else None
    )


def _concatenate(name: str, tensors: Sequence[Tensor], memo: dict[tuple[int, ...], Tensor]) -> Tensor:
    if len(shapes := {tensor.shape[1:] for tensor in tensors}) > 1:
        raise UserError(
            f"recorded calls cannot share a batch: {name} has the shapes {sorted(map(list, shapes))}; "
            "use a batch size of 1, or record prompts padded to one length"
        )
    parts = tuple(map(id, tensors))
    if parts not in memo:
        memo[parts] = torch.cat(list(tensors))
    return memo[parts]


def replay(denoiser: nn.Module, call: DenoiserCall, latents: Latents) -> Latents:
    """The velocity `denoiser` predicts at `latents` under the recorded call, in float32; differentiable in `latents`.

    Latents, and the tensors recorded in the pipeline's floating-point type, are cast to the denoiser's own; the
    timestep keeps its type.
    """
    dtype = denoiser.dtype
    assert isinstance(dtype, torch.dtype)
    hidden_states = latents.to(dtype)
    if call.condition is not None:
        hidden_states = torch.cat([hidden_states, call.condition.to(dtype)], dim=channel_axis(latents))
    tensors = {
        name: tensor.to(dtype) if tensor.dtype == call.dtype and name != "timestep" else tensor
        for name, tensor in call.tensors.items()
    }
    return denoiser(hidden_states=hidden_states, **tensors, **call.constants | {"return_dict": False})[0].float()


def channel_axis(latents: Latents) -> int:
    """1 for `[batch, channels, frames, height, width]`, 2 for packed `[batch, tokens, channels]`."""
    return 2 if latents.ndim == 3 else 1


def denoiser_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The repeated transformer blocks of a denoiser, in the order they run (HunyuanVideo: double, then single)."""
    names = {
        *(getattr(denoiser, "_repeated_blocks", None) or []),
        *(getattr(denoiser, "_no_split_modules", None) or []),
    }
    lists = [child for child in denoiser.children() if isinstance(child, nn.ModuleList)]
    blocks = [block for modules in lists for block in modules if type(block).__name__ in names]
    if not blocks:
        raise UserError(f"{type(denoiser).__name__} names no repeated blocks: it cannot serve as a feature extractor")
    return blocks


class _Reached(Exception):  # noqa: N818 - a way out of the denoiser, not an error
    """The block of interest has run."""

    def __init__(self, features: Tensor):
        self.features = features


def layer_features(denoiser: nn.Module, call: DenoiserCall, latents: Latents, layer: int) -> Tensor:
    """Image tokens `[batch, tokens, width]` after block number `layer` (1-based), before any final norm.

    The forward stops there: later blocks cost nothing. Differentiable in `latents`.
    """

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    handle = denoiser_blocks(denoiser)[layer - 1].register_forward_hook(leave)
    try:
        replay(denoiser, call, latents)
    except _Reached as reached:
        return reached.features
    finally:
        handle.remove()
    raise RuntimeError(f"block {layer} of {type(denoiser).__name__} did not run")
