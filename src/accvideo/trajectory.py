"""A recorded trajectory and its file; a folder of them as a data set.

The folder holds `manifest.json` and one `000123.safetensors` a trajectory. A file is written under another name, then
renamed, so a half-written one is never seen; a SHA-256 of every byte is in its header and checked at each read.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from accvideo.call import DenoiserCall, collate_calls
from accvideo.flow import keypoint_indices
from accvideo.types import Sigmas, UserError

FORMAT = 1
MANIFEST = "manifest.json"
CACHE_BYTES = 2 * 1024**3
"""A data set smaller than this stays in memory once read."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What all trajectories of a folder have in common."""

    teacher: str
    """Name the pipeline was loaded by: a hub id, a folder or `playground`."""
    revision: str | None
    license: str | None
    pipeline_class: str
    fingerprints: dict[str, str]
    """Of each denoiser, by component name."""
    num_steps: int
    """Denoising steps S of the teacher."""
    num_student_steps: int
    """Steps K of the students this data set is for."""
    keypoints: list[int]
    """The K + 1 of the S + 1 states that are stored."""
    sigmas: list[float]
    """All S + 1 noise levels of the teacher's run."""
    guidance_scale: float | None
    height: int | None
    width: int | None
    num_frames: int | None
    fps: int | float
    """Frames a second the clips are meant for."""
    pipeline_args: dict[str, Any]
    """Other arguments of the pipeline's call."""
    dtype: str
    seed: int
    num_trajectories: int
    batch_size: int
    """Trajectories denoised together: items `b * batch_size` up to `(b + 1) * batch_size`."""
    scheduler: dict[str, Any]
    """Its class and config."""
    nested_schedule: bool
    """Whether the scheduler's own grid of K steps lies on the recorded one: then a plain pipeline can run a student."""
    versions: dict[str, str]
    denoiser_calls: int = 0
    """Denoiser calls for each trajectory: S, or 2 S where guidance takes two; 0 before the first is recorded."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise UserError(f"a data set of format {self.format}; this version of accvideo reads format {FORMAT}")
        if self.keypoints != keypoint_indices(self.num_steps, self.num_student_steps):
            raise UserError(f"{MANIFEST}: key points {self.keypoints} are not {self.num_student_steps} even steps")
        if len(self.sigmas) != self.num_steps + 1:
            raise UserError(f"{MANIFEST}: {len(self.sigmas)} sigmas for {self.num_steps} steps")

    @property
    def key_sigmas(self) -> Sigmas:
        """Noise levels of the K + 1 key points."""
        return torch.tensor(self.sigmas)[self.keypoints]

    def to_json(self) -> str:
        """The manifest as the text of its file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> "Manifest":
        """The manifest in the text of its file.

        Raises:
            UserError: it is not one.
        """
        try:
            return Manifest(**json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{MANIFEST} cannot be read: {error}") from error

    def differences(self, other: "Manifest", ignore: Sequence[str] = ()) -> list[str]:
        """Names of the fields in which two manifests differ."""
        names = [each.name for each in fields(self) if each.name not in ignore]
        return [name for name in names if getattr(self, name) != getattr(other, name)]


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


def trajectory_name(index: int) -> str:
    """The file name of trajectory `index`."""
    return f"{index:06d}.safetensors"


def write_whole(path: Path, data: bytes, writer: str = "") -> None:
    """Writes a file under a hidden name to the disk, then renames it; leaves nothing behind when interrupted.

    Args:
        path: of the file.
        data: all of it.
        writer: tells apart those who may write this file at the same time.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}{writer}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a machine that dies may leave the new name with nothing in it
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror}\nNothing half-written is left; the same command goes on from here"
        ) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_trajectory(folder: Path, trajectory: Trajectory, writer: str = "") -> Path:
    """Writes a trajectory's file; equal trajectories give equal bytes, whoever the `writer` (see `write_whole`).

    An argument that is equal at all key points is stored once (`call.<name>`, `shared.<name>`), one that varies K
    times (`step.<name>`, `shared_step.<name>`); the condition goes by the name `hidden_states`.
    """
    tensors = {"states": trajectory.states}
    for once, varying, join, groups in (
        ("call", "step", torch.cat, [_rows(call) for call in trajectory.calls]),
        ("shared", "shared_step", torch.stack, [call.shared for call in trajectory.calls]),
    ):
        for name, first in groups[0].items():
            values = [each[name] for each in groups]
            if all(torch.equal(value, first) for value in values):
                tensors[f"{once}.{name}"] = first
            else:
                tensors[f"{varying}.{name}"] = join(values)
    header = {
        "sha256": "0" * 64,  # first, so that no prompt can be mistaken for it
        "format": FORMAT,
        "index": trajectory.index,
        "seed": trajectory.seed,
        "prompt": trajectory.prompt,
        "arguments": trajectory.arguments,
        "media": trajectory.media,
        "denoisers": trajectory.denoisers,
        "constants": [call.constants for call in trajectory.calls],
        "starts": trajectory.calls[0].starts,
        "dtype": str(trajectory.calls[0].dtype).removeprefix("torch."),
    }
    tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    # One metadata key: safetensors writes several in no particular order.
    data = safetensors.torch.save(tensors, {"accvideo": json.dumps(header)})
    path = folder / trajectory_name(trajectory.index)
    write_whole(path, data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1), writer)
    return path


def _rows(call: DenoiserCall) -> dict[str, Tensor]:
    return call.tensors if call.condition is None else call.tensors | {"hidden_states": call.condition}


def read_trajectory(path: Path) -> Trajectory:
    """Reads and checks a trajectory's file.

    Raises:
        UserError: the file is missing, truncated or changed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(json.loads(data[8:start])["__metadata__"]["accvideo"])
        stored: str = header["sha256"]
        digest = hashlib.sha256(data[:start].replace(stored.encode(), b"0" * 64, 1))
        digest.update(memoryview(data)[start:])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a trajectory, or truncated") from error
    if digest.hexdigest() != stored:
        raise UserError(f"{path}: truncated or changed, its checksum does not match")

    tensors = safetensors.torch.load(data)
    states, dtype = tensors.pop("states"), getattr(torch, header["dtype"])
    calls = []
    for keypoint, constants in enumerate(header["constants"]):
        rows = _arguments(tensors, "call") | _arguments(tensors, "step", slice(keypoint, keypoint + 1))
        shared = _arguments(tensors, "shared") | _arguments(tensors, "shared_step", keypoint)
        condition = rows.pop("hidden_states", None)
        calls.append(DenoiserCall(rows, constants, condition, dtype, tuple(header.get("starts", ())), shared))
    return Trajectory(
        index=header["index"],
        seed=header["seed"],
        prompt=header["prompt"],
        states=states,
        calls=tuple(calls),
        denoisers=tuple(header["denoisers"]),
        arguments=header.get("arguments", {}),
        media=header.get("media", {}),
    )


def _arguments(tensors: dict[str, Tensor], prefix: str, part: int | slice = slice(None)) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{prefix}."): tensor if part == slice(None) else tensor[part]
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}.")
    }


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of trajectories.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return Manifest.from_json((folder / MANIFEST).read_text("utf-8"))
    except (OSError, UnicodeError) as error:
        raise UserError(f"{folder} is not a data set: no {MANIFEST} in it; `accvideo record` makes one") from error


class TrajectoryFolder:
    """A folder of trajectories as a data set; a small one stays in memory once read."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.path)}
        missing = [i for i in range(self.manifest.num_trajectories) if trajectory_name(i) not in sizes]
        if missing:
            raise UserError(
                f"{path} lacks {len(missing)} of {self.manifest.num_trajectories} trajectories, the first is "
                f"{trajectory_name(missing[0])}\nRun the same `accvideo record` again: it adds what is missing"
            )
        self._cache: dict[int, Trajectory] | None = {} if sum(sizes.values()) < CACHE_BYTES else None

    def __len__(self) -> int:
        return self.manifest.num_trajectories

    def __getitem__(self, index: int) -> Trajectory:
        """Trajectory `index`.

        Raises:
            UserError: its file is damaged, or belongs elsewhere.
        """
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        trajectory = read_trajectory(self.path / trajectory_name(index))
        if problem := misplaced(trajectory, index, self.manifest):
            raise UserError(f"{self.path / trajectory_name(index)}: {problem}")
        if self._cache is not None:
            self._cache[index] = trajectory
        return trajectory

    def batches(
        self, batch_size: int, seed: int, start: int = 0, indices: Sequence[int] | None = None
    ) -> Iterator[TrajectoryBatch]:
        """Batches without end: each epoch is a new permutation, and a batch may span two.

        Batch number n depends on the arguments and n only, so a run resumes with `start`.

        Args:
            batch_size: trajectories a batch.
            seed: of the permutations.
            start: number of the first batch.
            indices: the trajectories to draw from; all when None.
        """
        chosen = list(range(len(self)) if indices is None else indices)
        epoch, order = -1, chosen
        for batch in _count(start):
            drawn = []
            for position in range(batch * batch_size, (batch + 1) * batch_size):
                if position // len(chosen) != epoch:
                    epoch = position // len(chosen)
                    order = [chosen[i] for i in _permutation(len(chosen), seed, epoch)]
                drawn.append(self[order[position % len(chosen)]])
            yield collate_trajectories(drawn)


def _count(start: int) -> Iterator[int]:
    while True:
        yield start
        start += 1


def _permutation(length: int, seed: int, epoch: int) -> list[int]:
    digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(length, generator=generator).tolist()


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


def misplaced(trajectory: Trajectory, index: int, manifest: Manifest) -> str | None:
    """Why a whole file is not trajectory `index` of a data set, or None if it is."""
    if trajectory.index != index:
        return f"holds trajectory {trajectory.index}"
    if trajectory.seed != manifest.seed:
        return f"was recorded with seed {trajectory.seed}, not {manifest.seed}"
    num_states, num_calls = manifest.num_student_steps + 1, manifest.num_student_steps
    if len(trajectory.states) != num_states or len(trajectory.calls) != num_calls:
        return (
            f"has {len(trajectory.states)} states and {len(trajectory.calls)} calls, not {num_states} and {num_calls}"
        )
    if unknown := set(trajectory.denoisers) - manifest.fingerprints.keys():
        return f"was recorded with the denoisers {sorted(unknown)}, which the manifest does not name"
    return None


def verify(folder: Path) -> list[str]:
    """All that is wrong with a data set, one line a problem, each naming its file; empty when it is whole."""
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    problems, noises, shape = [], {}, None
    names = [trajectory_name(index) for index in range(manifest.num_trajectories)]
    for index, name in enumerate(names):
        if not (folder / name).exists():
            problems.append(f"{folder / name}: missing")
            continue
        try:
            trajectory = read_trajectory(folder / name)
        except UserError as error:
            problems.append(str(error))
            continue
        shape = shape or trajectory.states.shape
        noise = hashlib.sha256(trajectory.states[0].numpy().tobytes()).digest()
        if problem := misplaced(trajectory, index, manifest):
            problems.append(f"{folder / name}: {problem}")
        elif trajectory.states.shape != shape:
            problems.append(f"{folder / name}: states {list(trajectory.states.shape)}, the others {list(shape)}")
        elif not trajectory.states.isfinite().all():
            problems.append(f"{folder / name}: states that are not finite")
        elif noise in noises:
            problems.append(f"{folder / name}: starts from the same noise as {noises[noise]}")
        noises.setdefault(noise, name)
    strays = sorted(entry.name for entry in os.scandir(folder) if entry.name not in {*names, MANIFEST})
    return problems + [f"{folder / name}: does not belong to the data set" for name in strays]
