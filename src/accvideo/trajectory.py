"""A recorded trajectory and its file.

A file is written under another name, then renamed, so a half-written one is never seen; a SHA-256 of every byte is in
its header and checked at each read. Nothing in a file is executed, and nothing that it claims is believed: it may come
from anybody.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from accvideo.call import DenoiserCall, collate_calls
from accvideo.data.manifest import FORMAT, FORMATS, MANIFEST, Manifest
from accvideo.data.schema import parse
from accvideo.data.storage import LocalStorage
from accvideo.types import Latents, UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of a pipeline."""
MAX_HEADER_BYTES = 16 * 1024**2
"""Of a file's JSON, a prompt of 100,000 characters included many times."""
MAX_PADDING_BYTES = 1024**3
"""The most zeros that the boxes of a file may stand for."""
MIN_PADDING_BYTES = 256
"""Fewer zeros are stored: a box takes about 100 bytes of the header."""


@dataclass(frozen=True)
class Trajectory:
    """The key states of one run of the teacher, and the conditional calls that left them."""

    index: int
    seed: int
    prompt: str
    states: Tensor
    """`[K + 1, *state]`, float32, from noise to video."""
    calls: tuple[DenoiserCall, ...]
    """K calls with a batch of 1; number k was made at state k."""
    denoisers: tuple[str, ...]
    """K component names of the denoisers that were called."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What else the pipeline was called with for this prompt: JSON, images and videos by their paths."""
    media: dict[str, Any] = field(default_factory=dict)
    """Argument -> SHA-256 of the image or video that it named, or a list of them; arguments of all prompts included."""
    settings: str = ""
    """`Manifest.settings` of its recording; empty where it was recorded in format 3 or before."""


@dataclass(frozen=True)
class TrajectoryBatch:
    """Several trajectories, as a training step wants them."""

    states: Tensor
    """`[batch, K + 1, *state]`, float32."""
    calls: tuple[DenoiserCall, ...]
    """K calls, each for the whole batch."""
    denoisers: tuple[str, ...]
    prompts: tuple[str, ...]
    indices: tuple[int, ...]
    device: torch.device = torch.device("cpu")
    """Where `state` and `call` give what is asked for. The rest stays where it was read: an iteration wants two or
    three of the states, and fifty of HunyuanVideo's at 720p are 1.5 GB."""

    def to(self, device: torch.device | str) -> "TrajectoryBatch":
        """The same batch for a device."""
        return replace(self, device=torch.device(device))

    def state(self, number: int) -> Latents:
        """`[batch, *state]`: a state of each trajectory, on the device."""
        return self.states[:, number].to(self.device)

    def call(self, number: int) -> DenoiserCall:
        """A call, on the device."""
        return self.calls[number].to(self.device)


def trajectory_name(index: int) -> str:
    """The file name of trajectory `index`."""
    return f"{index:06d}.safetensors"


def write_whole(path: Path, data: bytes, writer: str = "") -> None:
    """Writes a file whole or not at all; see `write_pieces`."""
    write_pieces(path, (data,), writer)


def write_pieces(path: Path, pieces: Iterable[bytes], writer: str = "") -> None:
    """Writes a file under a hidden name to the disk, then renames it; leaves nothing behind when interrupted.

    Args:
        path: of the file.
        pieces: of it, in order.
        writer: tells apart those who may write this file at the same time.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}{writer}.tmp")
    try:
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:  # made anew: a link under this name would lead elsewhere
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())  # else a machine that dies may leave the new name with nothing in it
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror}\nNothing half-written is left; the same command goes on from here"
        ) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a trajectory's file says besides its tensors."""

    sha256: str
    """Of the whole file, with zeros in the place of this field."""
    format: int
    index: int
    seed: int
    prompt: str
    arguments: dict[str, Any] = field(default_factory=dict)
    media: dict[str, Any] = field(default_factory=dict)
    settings: str = ""
    denoisers: list[str]
    constants: list[dict[str, Any]]
    starts: list[int] = field(default_factory=list)
    dtype: str
    boxes: dict[str, list[list[int]]] = field(default_factory=dict)
    """Of each tensor that is stored without the zeros around it: its whole shape, and where the stored part begins."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UserError(f"format {self.format}; this version of accvideo reads {FORMATS}")
        if self.dtype not in DTYPES or len(self.denoisers) != len(self.constants):
            raise ValueError(f"{self.dtype}, {len(self.denoisers)} denoisers, {len(self.constants)} calls")


def write_trajectory(folder: Path, trajectory: Trajectory, writer: str = "") -> Path:
    """Writes a trajectory's file; equal trajectories give equal bytes, whoever the `writer` (see `write_whole`)."""
    path = folder / trajectory_name(trajectory.index)
    write_whole(path, encode_trajectory(trajectory), writer)
    return path


def encode_trajectory(trajectory: Trajectory) -> bytes:
    """The bytes of a trajectory's file.

    Each state (`state.<number>`) is float32, or 16 bits wide where those hold every value of it exactly. An argument
    that is equal at all key points is stored once (`call.<name>`, `shared.<name>`), one that varies K times
    (`step.<name>`, `shared_step.<name>`); the condition goes by the name `hidden_states`. Of an argument with zeros
    around it (the padding of prompt embeddings, the channels that the state takes in a condition) only the box inside
    is stored.

    Raises:
        UserError: the denoiser was given other arguments at other key points; or the prompt is too long to be read.
    """
    if len(kinds := {(*sorted(_rows(call)), *call.shared, call.starts, call.dtype) for call in trajectory.calls}) > 1:
        only = sorted(map(str, set.union(*map(set, kinds)) - set.intersection(*map(set, kinds))))
        raise UserError(
            f"the denoiser is given {', '.join(only)} at some key points and not at others: not supported\n"
            "Nothing of this trajectory is written"
        )
    states = {f"state.{number}": narrow(state) for number, state in enumerate(trajectory.states.cpu())}
    tensors: dict[str, Tensor] = {}
    for once, varying, join, groups in (
        ("call", "step", torch.cat, [_rows(call) for call in trajectory.calls]),
        ("shared", "shared_step", torch.stack, [call.shared for call in trajectory.calls]),
    ):
        for name, first in groups[0].items():
            values = [each[name] for each in groups]
            if all(same_bits(value, first) for value in values):
                tensors[f"{once}.{name}"] = first.cpu()
            else:
                tensors[f"{varying}.{name}"] = join(values).cpu()
    boxes = {}
    for name, tensor in list(tensors.items()):
        inner, starts = crop(tensor)
        if tensor.nbytes - inner.nbytes >= MIN_PADDING_BYTES:
            tensors[name], boxes[name] = inner, [list(tensor.shape), starts]
    header = {
        "sha256": "0" * 64,  # first, so that no prompt can be mistaken for it
        "format": FORMAT,
        "index": trajectory.index,
        "seed": trajectory.seed,
        "prompt": trajectory.prompt,
        "arguments": trajectory.arguments,
        "media": trajectory.media,
        "settings": trajectory.settings,
        "denoisers": trajectory.denoisers,
        "constants": [call.constants for call in trajectory.calls],
        "starts": trajectory.calls[0].starts,
        "dtype": str(trajectory.calls[0].dtype).removeprefix("torch."),
        "boxes": boxes,
    }
    # Copies, for safetensors takes no memory twice; one metadata key, for it writes several in no particular order.
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in (states | tensors).items()}
    data = safetensors.torch.save(copies, {"accvideo": json.dumps(header)})
    if (size := 8 + int.from_bytes(data[:8], "little")) > MAX_HEADER_BYTES:
        raise UserError(
            f"prompt and arguments of trajectory {trajectory.index} take {size:,} bytes as JSON; the most that is read "
            f"again is {MAX_HEADER_BYTES:,}\nShorten them"
        )
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)


def _rows(call: DenoiserCall) -> dict[str, Tensor]:
    return call.tensors if call.condition is None else call.tensors | {"hidden_states": call.condition}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, signs of zeros included."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(bits(one), bits(other))


def bits(tensor: Tensor) -> Tensor:
    """The bytes of each value, on a further axis."""
    # A copy: a tensor of one value counts as contiguous whatever its strides.
    return tensor.clone(memory_format=torch.contiguous_format).unsqueeze(-1).view(torch.uint8)


def narrow(state: Tensor) -> Tensor:
    """A state in a floating-point type of 16 bits if it holds each value exactly, else as it is.

    Many pipelines (HunyuanVideo, Wan with an Euler scheduler) draw noise in float32 and step in bfloat16.
    """
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal((narrowed := state.to(dtype)).float(), state):
            return narrowed
    return state


def crop(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """The smallest box of a tensor outside of which all bits are 0, and where it begins on each axis."""
    # Bits, not values: -0.0 is kept.
    filled = bits(tensor).any(-1)
    starts = []
    for axis in range(tensor.ndim):
        others = [each for each in range(tensor.ndim) if each != axis]
        places = (filled.any(others) if others else filled).nonzero()
        start, end = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        tensor, filled = tensor.narrow(axis, start, end - start), filled.narrow(axis, start, end - start)
        starts.append(start)
    return tensor, starts


def uncrop(inner: Tensor, shape: Sequence[int], starts: Sequence[int]) -> Tensor:
    """The tensor of a shape that `crop` took a box from."""
    whole = torch.zeros(list(shape), dtype=inner.dtype)
    whole[tuple(slice(start, start + size) for start, size in zip(starts, inner.shape, strict=True))] = inner
    return whole


def read_trajectory(path: Path) -> Trajectory:
    """Reads and checks a trajectory's file.

    Raises:
        UserError: the file is missing, truncated or changed.
    """
    return decode_trajectory(LocalStorage(path.parent).read(path.name), str(path))


def decode_trajectory(data: bytes, where: str) -> Trajectory:
    """The trajectory in the bytes of a file.

    Raises:
        UserError: they are not exactly what `encode_trajectory` made; `where` they come from is named.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        if start > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {start} bytes")
        # The checksum first, before anything is made of what is written.
        text = json.loads(data[8:start])["__metadata__"]["accvideo"]
        stored: str = json.loads(text)["sha256"]
        digest = hashlib.sha256(data[:start].replace(stored.encode(), b"0" * 64, 1))
        digest.update(memoryview(data)[start:])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: not a trajectory, or truncated") from error
    if digest.hexdigest() != stored:
        raise UserError(f"{where}: truncated or changed, its checksum does not match")
    try:
        return _trajectory(parse(Header, text), safetensors.torch.load(data))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{where}: its checksum matches, but it is not a trajectory ({shorten_error(error)})"
        ) from error


def shorten_error(error: Exception) -> str:
    """An error in at most 100 characters of one line."""
    return f"{type(error).__name__} {error}".splitlines()[0][:100]


def _trajectory(header: Header, tensors: dict[str, Tensor]) -> Trajectory:
    padding = sum(math.prod(shape) * tensors[name].itemsize for name, (shape, _) in header.boxes.items())
    if padding > MAX_PADDING_BYTES or any(size < 0 for box in header.boxes.values() for sizes in box for size in sizes):
        raise ValueError(f"boxes of {padding} bytes")
    tensors |= {name: uncrop(tensors[name], *box) for name, box in header.boxes.items()}
    if header.format < 3:
        states = [*tensors.pop("states")]
    else:
        states = [tensors.pop(name) for name in takewhile(tensors.__contains__, map("state.{}".format, count()))]
    if wrong := [state for state in states if not (state.is_floating_point() and state.ndim)]:
        raise ValueError(f"a state is {wrong[0].dtype} {list(wrong[0].shape)}")
    if unknown := [name for name in tensors if name.partition(".")[0] not in ("call", "step", "shared", "shared_step")]:
        raise ValueError(f"a tensor {unknown[0]}")
    calls = []
    for keypoint, constants in enumerate(header.constants):
        rows = _arguments(tensors, "call") | _arguments(tensors, "step", slice(keypoint, keypoint + 1))
        shared = _arguments(tensors, "shared") | _arguments(tensors, "shared_step", keypoint)
        if short := [name for name, tensor in rows.items() if len(tensor) != 1]:
            raise ValueError(f"{short[0]} has not one row a key point")
        condition = rows.pop("hidden_states", None)
        calls.append(DenoiserCall(rows, constants, condition, DTYPES[header.dtype], tuple(header.starts), shared))
    return Trajectory(
        index=header.index,
        seed=header.seed,
        prompt=header.prompt,
        states=torch.stack([state.float() for state in states]),
        calls=tuple(calls),
        denoisers=tuple(header.denoisers),
        arguments=header.arguments,
        media=header.media,
        settings=header.settings,
    )


def _arguments(tensors: dict[str, Tensor], prefix: str, part: int | slice = slice(None)) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{prefix}."): tensor if part == slice(None) else tensor[part]
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}.")
    }


def collate_trajectories(trajectories: Sequence[Trajectory]) -> TrajectoryBatch:
    """One batch of several trajectories."""
    memo: dict[tuple[int, ...], Tensor] = {}
    return TrajectoryBatch(
        states=torch.stack([each.states for each in trajectories]),
        calls=tuple(collate_calls(calls, memo) for calls in zip(*(each.calls for each in trajectories), strict=True)),
        denoisers=trajectories[0].denoisers,
        prompts=tuple(each.prompt for each in trajectories),
        indices=tuple(each.index for each in trajectories),
    )


class ForeignError(UserError):
    """A trajectory was recorded with other settings than those in the manifest of its data set."""


def check_settings(trajectory: Trajectory | Header, manifest: Manifest, where: str) -> None:
    """Checks that a trajectory was recorded with the settings of a data set.

    One that does not say with which (up to format 3) is checked as far as it tells: by its timesteps.

    Raises:
        ForeignError: it was recorded with others; `where` it is from is named.
    """
    if trajectory.settings:
        foreign = trajectory.settings != manifest.settings
    else:
        foreign = isinstance(trajectory, Trajectory) and told_otherwise(trajectory, manifest)
    if foreign:
        raise ForeignError(
            f"{where}: was recorded with other settings (teacher, schedule, guidance, sizes) than {MANIFEST} has"
        )


def told_otherwise(trajectory: Trajectory, manifest: Manifest) -> bool:
    """Whether the denoiser was told the noise level of a manifest at first, and others later.

    What it is told is mostly 1000 times the level, or the level (Cosmos), rounded by the scheduler and to bfloat16. Of
    a denoiser that is told something else nothing is known.
    """
    timesteps = [call.tensors.get("timestep", torch.empty(0)) for call in trajectory.calls]
    if not all(each.numel() and not each.is_complex() for each in timesteps):
        return False
    pairs = list(zip((float(each.double().max()) for each in timesteps), manifest.key_sigmas.tolist(), strict=False))
    near = [[abs(told - scale * sigma) < 5e-3 * scale for told, sigma in pairs] for scale in (1000, 1)]
    return any(each[:1] == [True] for each in near) and not any(map(all, near))


def misplaced(trajectory: Trajectory, index: int, manifest: Manifest) -> str | None:
    """Why a whole file is not trajectory `index` of a data set, or None if it is."""
    if trajectory.index != index:
        return f"holds trajectory {trajectory.index}"
    if trajectory.seed != (seed := manifest.seed_of(index)):
        return f"was recorded with seed {trajectory.seed}, not {seed}"
    num_states, num_calls = manifest.num_student_steps + 1, manifest.num_student_steps
    if len(trajectory.states) != num_states or len(trajectory.calls) != num_calls:
        return (
            f"has {len(trajectory.states)} states and {len(trajectory.calls)} calls, not {num_states} and {num_calls}"
        )
    if unknown := set(trajectory.denoisers) - manifest.fingerprints.keys():
        return f"was recorded with the denoisers {sorted(unknown)}, which the manifest does not name"
    return None
