"""What all trajectories of a data set have in common, and the file that says so."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from accvideo.data.schema import parse
from accvideo.data.storage import MAX_TEXT_BYTES, Storage, open_storage
from accvideo.types import Sigmas, UserError

FORMAT = 4
FORMATS = (1, 2, 3, 4)
"""What can be read; up to 3 a trajectory does not say with which settings it was recorded, up to 2 its states are one
tensor, in 1 tensors have the zeros around them and the manifest no checksum."""
MANIFEST = "manifest.json"
MAX_TRAJECTORIES = 10_000_000
SETTINGS = (
    *("pipeline_class", "fingerprints", "dtype", "batch_size", "height", "width", "num_frames", "pipeline_args"),
    *("guidance_scale", "num_steps", "num_student_steps", "keypoints", "sigmas", "scheduler", "nested_schedule"),
    "solver",
)
"""Fields of the manifest that say what the states are; each trajectory holds their digest. The others name, count or
describe: a teacher may move, a recording grow, recordings be merged."""


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
    solver: str = "own"
    """How the steps were taken over the scheduler's noise levels: by itself ("own"), or by another solver."""
    teacher_num_steps: int | None = None
    """Steps by the scheduler itself of the clips that students are compared with; None: S."""
    denoiser_calls: int = 0
    """Denoiser calls for each trajectory: S, or 2 S where guidance takes two; 0 before the first is recorded."""
    parts: list[dict[str, int]] = field(default_factory=list)
    """Of merged data sets, in order: `seed` and `num_trajectories` of each recording; empty where there was one."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UserError(f"a data set of format {self.format}; this version of accvideo reads {FORMATS}")
        if not 1 <= self.num_trajectories <= MAX_TRAJECTORIES:
            raise UserError(f"{MANIFEST}: {self.num_trajectories} trajectories; allowed are 1 to {MAX_TRAJECTORIES:,}")
        if len(self.sigmas) != self.num_steps + 1:
            raise UserError(f"{MANIFEST}: {len(self.sigmas)} sigmas for {self.num_steps} steps")
        if wrong := [sigma for sigma in self.sigmas if not 0 <= sigma < 1.001]:
            raise UserError(f"{MANIFEST}: a sigma of {str(wrong[0])[:20]}; a flow's are from 0 to 1")
        rising = self.keypoints == sorted(set(self.keypoints)) and len(self.keypoints) == self.num_student_steps + 1
        if not rising or self.num_steps < 1 or (self.keypoints[0], self.keypoints[-1]) != (0, self.num_steps):
            raise UserError(
                f"{MANIFEST}: key points {self.keypoints} are not {self.num_student_steps} steps from 0 to "
                f"{self.num_steps}"
            )
        if any(part.keys() != {"seed", "num_trajectories"} or part["num_trajectories"] < 1 for part in self.parts) or (
            self.parts and sum(part["num_trajectories"] for part in self.parts) != self.num_trajectories
        ):
            raise UserError(f"{MANIFEST}: the parts are not {self.num_trajectories} trajectories")

    @property
    def key_sigmas(self) -> Sigmas:
        """Noise levels of the K + 1 key points."""
        return torch.tensor(self.sigmas)[self.keypoints]

    @cached_property
    def settings(self) -> str:
        """SHA-256 of the fields in `SETTINGS`, by which a trajectory tells its own manifest from others."""
        text = json.dumps({name: getattr(self, name) for name in SETTINGS})
        return checksum(json.loads(text, parse_int=float))  # for recorders that write 5 and 5.0 share a data set

    def seed_of(self, index: int) -> int:
        """The seed that trajectory `index` was recorded with."""
        for part in self.parts:
            if index < part["num_trajectories"]:
                return part["seed"]
            index -= part["num_trajectories"]
        return self.seed

    def to_json(self) -> str:
        """The manifest as the text of its file, with a checksum."""
        values = asdict(self)
        return json.dumps(values | {"sha256": checksum(values)}, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> "Manifest":
        """The manifest in the text of its file, as if of the present format.

        Raises:
            UserError: it is not one, or was changed.
        """
        try:
            stored = parse(_Checked, text)
        except ValueError as error:
            raise UserError(f"{MANIFEST} cannot be read: {error}") from error
        values = {each.name: getattr(stored, each.name) for each in fields(Manifest)}
        if stored.sha256 is not None and stored.sha256 != checksum(json.loads(text)):
            raise UserError(
                f"{MANIFEST} was changed: its checksum does not match\nUndo the change, or remove `sha256` from it"
            )
        return replace(Manifest(**values), format=FORMAT)

    def differences(self, other: "Manifest", ignore: Sequence[str] = ()) -> list[str]:
        """Names of the fields in which two manifests differ."""
        names = [each.name for each in fields(self) if each.name not in ignore]
        return [name for name in names if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True, kw_only=True)
class _Checked(Manifest):
    sha256: str | None = None


def checksum(values: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, but for a field `sha256`."""
    others = {name: value for name, value in values.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def read_manifest(place: Path | Storage) -> Manifest:
    """The manifest of a folder of trajectories.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    storage = open_storage(place) if isinstance(place, Path) else place
    try:
        text = storage.read(MANIFEST, limit=MAX_TEXT_BYTES)
    except UserError as error:
        raise UserError(
            f"{storage.address} is not a data set: no {MANIFEST} in it; `accvideo record` makes one ({error})"
        ) from error
    try:
        return Manifest.from_json(text)
    except UserError as error:
        raise UserError(f"{storage.address}: {error}") from error
