"""Weights that are read when they are needed: files of any size pass through the memory of one tensor."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from accvideo.types import UserError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors files call types."""

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
"""Weights in a folder of a diffusers model, unless they are sharded."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Its size in a file."""
        return prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The same tensor in another type."""
        return LazyTensor(self.shape, dtype, lambda: self.read().to(dtype))


Weights = Mapping[str, LazyTensor]
"""Tensors by name."""


def in_memory(tensors: Mapping[str, Tensor]) -> Weights:
    """Tensors at hand, as weights."""
    return {name: LazyTensor(tuple(each.shape), each.dtype, lambda each=each: each) for name, each in tensors.items()}


def read_weights(path: Path) -> Weights:
    """The tensors of a safetensors file, or of the sharded or single files in a folder of a diffusers model.

    Raises:
        UserError: there are none.
    """
    index = path / f"{WEIGHTS_NAME}.index.json"
    try:
        if index.is_file():
            files = sorted({path / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
        else:
            files = [path / WEIGHTS_NAME if path.is_dir() else path]
        return {name: each for file in files for name, each in open_file(file).items()}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot read the weights in {path}: {error}") from error


def open_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one safetensors file."""
    file: Any = safe_open(path, framework="pt")

    def lazy(name: str) -> LazyTensor:
        view = file.get_slice(name)
        return LazyTensor(tuple(view.get_shape()), DTYPES[view.get_dtype()], lambda: file.get_tensor(name))

    return {name: lazy(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def write_weights(
    path: Path, weights: Weights, metadata: Mapping[str, str], on_tensor: Callable[[], None] = lambda: None
) -> None:
    """Write a safetensors file tensor by tensor.

    The layout of the file (github.com/huggingface/safetensors): the length of a JSON header in 8 bytes, the header
    with type, shape and place of each tensor, padded to 8 bytes, and the tensors without gaps.

    Args:
        path: of the file.
        weights: what goes into it; the widest types come first, so that all are aligned.
        metadata: its `__metadata__`.
        on_tensor: called after each tensor.
    """
    names = sorted(weights, key=lambda name: (-weights[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name in names:
        each = weights[name]
        place = [start, start + each.num_bytes]
        header[name] = {"dtype": DTYPE_NAMES[each.dtype], "shape": list(each.shape), "data_offsets": place}
        start += each.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = weights[name].read().detach().cpu().contiguous()
            assert (tuple(tensor.shape), tensor.dtype) == (weights[name].shape, weights[name].dtype)
            tensor.flatten().view(torch.uint8).numpy().tofile(file)
            on_tensor()


def shards(weights: Weights, max_bytes: int) -> list[list[str]]:
    """The names of the tensors, in order, in groups of at most so many bytes (or of one tensor that is larger)."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, each in weights.items():
        if groups[-1] and size + each.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += each.num_bytes
    return groups


def shard_files(weights: Weights, max_bytes: int) -> tuple[dict[str, Weights], dict[str, Any] | None]:
    """The files of a diffusers model's folder by name, and the index that several of them need."""
    groups = shards(weights, max_bytes)
    if len(groups) == 1:
        return {WEIGHTS_NAME: weights}, None
    stem, suffix = WEIGHTS_NAME.split(".")
    names = [f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}" for number in range(1, len(groups) + 1)]
    files: dict[str, Weights] = {
        file: {name: weights[name] for name in group} for file, group in zip(names, groups, strict=True)
    }
    weight_map = {name: file for file, group in files.items() for name in group}
    return files, {"metadata": {"total_size": total_bytes(weights.values())}, "weight_map": weight_map}


def total_bytes(tensors: Iterable[LazyTensor]) -> int:
    """The size of several tensors."""
    return sum(each.num_bytes for each in tensors)
