"""A recorded call of a denoiser, and its replay with another state.

What a pipeline passes to its denoiser (timestep, prompt embeddings, masks, pooled embeddings, guidance, sizes, image
conditions) is kept as it is. Replayed with other latents it asks the same question of another point, whatever the
model family: nothing here knows one.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from accvideo.types import Latents, UserError

Block = tuple[slice, ...]
"""A part of a tensor: one slice an axis, of step 1."""


@dataclass(frozen=True)
class DenoiserCall:
    """One conditional call of a denoiser without the state that `hidden_states` held."""

    tensors: dict[str, Tensor]
    """Keyword -> batch-first tensor (timestep, prompt embeddings, masks, pooled embeddings, guidance)."""
    constants: dict[str, Any]
    """Keyword -> JSON value, the same for each sample (return_dict, attention_kwargs, num_frames)."""
    condition: Tensor | None = None
    """All of `hidden_states`, with 0 where the state was, batch first: further channels (Wan image-to-video) or frames
    that are given (HunyuanVideo and LTX-Video image-to-video). None where the state was all of it."""
    dtype: torch.dtype = torch.float32
    """Floating-point type of the recorded `hidden_states`: what the pipeline gave the denoiser."""
    starts: tuple[int, ...] = ()
    """Where the state began in `hidden_states`, on each axis but the batch's; empty: at 0."""
    shared: dict[str, Tensor] = field(default_factory=dict)
    """Keyword -> tensor without a row for each sample (positions, padding masks)."""

    def to(self, device: torch.device | str) -> "DenoiserCall":
        """The same call on `device`."""
        return replace(
            self,
            tensors={name: tensor.to(device) for name, tensor in self.tensors.items()},
            shared={name: tensor.to(device) for name, tensor in self.shared.items()},
            condition=None if self.condition is None else self.condition.to(device),
        )

    def select(self, rows: slice) -> "DenoiserCall":
        """The call of some samples of the batch."""
        tensors = {name: tensor[rows] for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, condition=None if self.condition is None else self.condition[rows])


def capture_call(
    arguments: Mapping[str, Any], state: Latents, shared: Collection[str] = ()
) -> tuple[DenoiserCall, Block]:
    """The conditional call among what a denoiser was given while the scheduler held `state`.

    Where guidance doubles the batch (LTX-Video, Mochi), unconditional first, the second half is kept.

    Args:
        arguments: all arguments of the denoiser's forward by name, `hidden_states` included.
        state: the latents passed to the scheduler's step that followed.
        shared: names of tensors that have no row for each sample, although their first size may look so.

    Returns:
        The call, and the part of `state` that the denoiser saw: all of it, but for frames that are given.

    Raises:
        UserError: the call cannot be replayed.
    """
    if not isinstance(hidden_states := arguments.get("hidden_states"), Tensor):
        raise UserError("the denoiser takes no `hidden_states`: supported are diffusers' video transformers")
    num_rows = len(hidden_states)
    if num_rows not in (len(state), 2 * len(state)):
        raise _misfit(hidden_states, state)
    conditional = slice(num_rows - len(state), num_rows)
    hidden_states = hidden_states[conditional].detach()
    own, seen = locate(hidden_states, state)
    condition = None
    if hidden_states[own].shape != hidden_states.shape:
        condition = hidden_states.clone()
        condition[own] = 0

    tensors, shared_tensors, constants = {}, {}, {}
    for name, value in flatten({name: value for name, value in arguments.items() if name != "hidden_states"}):
        if not isinstance(value, Tensor):
            constants[name] = value
        elif name in shared or value.ndim == 0 or len(value) not in (len(state), num_rows):
            shared_tensors[name] = value.detach().clone()
        else:
            tensors[name] = value[conditional if len(value) == num_rows else slice(None)].detach().clone()
    starts = () if condition is None else tuple(part.start for part in own[1:])
    return DenoiserCall(tensors, constants, condition, hidden_states.dtype, starts, shared_tensors), seen


def without_padding(call: DenoiserCall) -> DenoiserCall:
    """The call with zeros in the rows of prompt embeddings that an attention mask leaves out; itself if there are none.

    By diffusers' names: `encoder_attention_mask_2` is the mask of `encoder_hidden_states_2`. Whether the denoiser makes
    the same of both calls is for a replay to tell.
    """
    changed = {}
    for name, mask in call.tensors.items():
        rows = call.tensors.get(own := name.replace("attention_mask", "hidden_states"))
        if own != name and rows is not None and rows.shape[:2] == mask.shape and rows[mask == 0].any():
            changed[own] = rows.masked_fill((mask == 0).unsqueeze(-1), 0)
    return replace(call, tensors=call.tensors | changed) if changed else call


def flatten(arguments: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names and values of a call's arguments: tensors as they are, the rest as JSON.

    A sequence of tensors (rotary positions) becomes one entry a tensor, called `name.0`, `name.1` and so on.

    Raises:
        UserError: a value is neither.
    """
    entries = []
    for name, value in arguments.items():
        if isinstance(value, (tuple, list)) and value and all(isinstance(each, Tensor) for each in value):
            entries += [(f"{name}.{index}", each) for index, each in enumerate(value)]
        elif isinstance(value, Tensor):
            entries.append((name, value))
        else:
            try:
                entries.append((name, json.loads(json.dumps(value))))
            except TypeError:
                raise UserError(f"the denoiser's argument {name} is neither a tensor nor plain JSON") from None
    return entries


def unflatten(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that `flatten` made these entries of."""
    arguments: dict[str, Any] = {}
    for name, value in entries.items():
        name, _, index = name.partition(".")
        if index:
            arguments.setdefault(name, []).append(value)
        else:
            arguments[name] = value
    return arguments


def locate(hidden_states: Tensor, state: Latents) -> tuple[Block, Block]:
    """Where `hidden_states` holds the state, and which part of the state it holds.

    On each axis the state is as long as `hidden_states`, or it is their beginning (further channels follow) or their
    end (given frames come first). Where `hidden_states` are tokens and the state is a video, the state is read as one
    token a latent pixel. Where some frames or channels of the state are replaced by given ones (Wan 2.2 TI2V), the
    others are what the denoiser saw.

    Raises:
        UserError: the state is not there.
    """
    view = tokens(state) if hidden_states.ndim == 3 and state.ndim == 5 else state
    if hidden_states.ndim != view.ndim or any(
        whole < part for whole, part in zip(hidden_states.shape, view.shape, strict=True)
    ):
        raise _misfit(hidden_states, state)
    everything = tuple(slice(0, size) for size in state.shape)
    places = [{0, whole - part} for whole, part in zip(hidden_states.shape[1:], view.shape[1:], strict=True)]
    for starts in product(*map(sorted, places)):
        block = tuple(slice(start, start + size) for start, size in zip((0, *starts), view.shape, strict=True))
        same = hidden_states[block] == view.to(hidden_states.dtype)
        if same.all():
            return block, everything
        if view is not state:
            continue
        for axis in range(1, state.ndim):
            held = same.transpose(0, axis).flatten(1).all(1).nonzero().flatten().tolist()
            if held and held == list(range(held[0], held[-1] + 1)):
                part, whole = slice(held[0], held[-1] + 1), block[axis]
                own = slice(whole.start + part.start, whole.start + part.stop)
                return (*block[:axis], own, *block[axis + 1 :]), (*everything[:axis], part, *everything[axis + 1 :])
    raise UserError(
        "the denoiser did not see the scheduler's state: supported are pipelines that pass it on unscaled, "
        "as a part of `hidden_states`"
    )


def _misfit(hidden_states: Tensor, state: Tensor) -> UserError:
    return UserError(
        f"the denoiser saw {list(hidden_states.shape)} where the scheduler steps on {list(state.shape)}: supported "
        "are the same shape, twice the batch (guidance), more channels and given frames (image conditions)"
    )


def tokens(latents: Latents) -> Tensor:
    """`[batch, channels, frames, height, width]` as `[batch, tokens, channels]`, one token a latent pixel."""
    return latents.flatten(2).transpose(1, 2)


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
    if not all(_fit(call, first) for call in calls):
        raise UserError("recorded calls with different arguments cannot share a batch; use a batch size of 1")
    memo = {} if memo is None else memo
    tensors = {name: _concatenate(name, [call.tensors[name] for call in calls], memo) for name in first.tensors}
    conditions = [call.condition for call in calls if call.condition is not None]
    return replace(
        first, tensors=tensors, condition=_concatenate("condition", conditions, memo) if conditions else None
    )


def _fit(call: DenoiserCall, other: DenoiserCall) -> bool:
    """Whether two calls differ in nothing but what has a row for each sample."""
    return (
        (call.constants, call.starts) == (other.constants, other.starts)
        and call.tensors.keys() == other.tensors.keys()
        and call.shared.keys() == other.shared.keys()
        and all(torch.equal(tensor, other.shared[name]) for name, tensor in call.shared.items())
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
    timestep keeps its type. Of an output that is larger than the latents (given frames, a learned variance) the
    latents' own part is the velocity.
    """
    arguments, own = call_arguments(denoiser, call, latents)
    output = denoiser(**arguments)
    velocity = (output if isinstance(output, Tensor) else output[0])[own].float()
    packed = velocity.ndim == 3 and latents.ndim == 5
    return velocity.transpose(1, 2).reshape(latents.shape) if packed else velocity


def replay_with_features(
    denoiser: nn.Module, call: DenoiserCall, latents: Latents, layer: int
) -> tuple[Latents, Tensor]:
    """The velocity of `replay` and, of the same pass, the tokens of `layer_features`."""
    seen: list[Tensor] = []

    def see(module: nn.Module, arguments: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = denoiser_blocks(denoiser)[layer - 1].register_forward_hook(see)
    try:
        return replay(denoiser, call, latents), seen[0]
    finally:
        handle.remove()


def call_arguments(denoiser: nn.Module, call: DenoiserCall, latents: Latents) -> tuple[dict[str, Any], Block]:
    """What a denoiser is given for latents under a recorded call, and where in `hidden_states` the latents are."""
    dtype = denoiser.dtype
    assert isinstance(dtype, torch.dtype)
    hidden_states, condition = latents.to(dtype), call.condition
    if condition is not None and condition.ndim == 3 and latents.ndim == 5:
        hidden_states = tokens(hidden_states)
    starts = call.starts or (0,) * (hidden_states.ndim - 1)
    own = tuple(slice(start, start + size) for start, size in zip((0, *starts), hidden_states.shape, strict=True))
    if condition is not None:
        whole = condition.to(dtype, copy=True)
        whole[own] = hidden_states
        hidden_states = whole
    entries = {
        name: tensor.to(dtype) if tensor.dtype == call.dtype and name != "timestep" else tensor
        for name, tensor in (call.tensors | call.shared).items()
    }
    return {"hidden_states": hidden_states} | unflatten(entries) | call.constants | {"return_dict": False}, own


def denoiser_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The repeated transformer blocks of a denoiser, in the order they run (HunyuanVideo: double, then single)."""
    names = {
        *(getattr(denoiser, "_repeated_blocks", None) or []),
        *(getattr(denoiser, "_no_split_modules", None) or []),
    }
    lists = [child for child in denoiser.children() if isinstance(child, nn.ModuleList)]
    # Of a sharded block, the class is a subclass of its own.
    blocks = [b for modules in lists for b in modules if names & {base.__name__ for base in type(b).__mro__}]
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

    def forward_to_block(**arguments: Any) -> Tensor:
        try:
            forward(**arguments)
        except _Reached as reached:
            return reached.features
        raise RuntimeError(f"block {layer} of {type(denoiser).__name__} did not run")

    forward, own = denoiser.forward, dict(vars(denoiser))
    handle = denoiser_blocks(denoiser)[layer - 1].register_forward_hook(leave)
    # The way out ends inside the call, so that hooks after it still run: a sharded denoiser counts on its own.
    denoiser.forward = forward_to_block
    try:
        return denoiser(**call_arguments(denoiser, call, latents)[0])
    finally:
        handle.remove()
        del denoiser.forward
        vars(denoiser).update(own)
