"""How recorders begin and join the folder of a data set."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from accvideo.command import (
    shorten,
)
from accvideo.data.manifest import MANIFEST, Manifest, read_manifest
from accvideo.data.schema import parse
from accvideo.data.storage import MAX_BYTES, LocalStorage, check_size
from accvideo.recording.workers import CLAIM, PARTIAL, Claims
from accvideo.trajectory import MAX_HEADER_BYTES, Header, write_whole
from accvideo.types import UserError

NOT_IDENTITY = ("num_trajectories", "denoiser_calls", "versions")
"""Fields of a manifest in which two recordings of one data set may differ."""


def identity(manifest: Manifest) -> str:
    """A hash that is equal for the manifests of recordings that may share a folder."""
    fields = {name: value for name, value in asdict(manifest).items() if name not in NOT_IDENTITY}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def check_folder(folder: Path) -> None:
    """Refuses a folder that holds something else.

    Raises:
        UserError: it is a file, or a folder with files but no manifest.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a new or empty folder")
    if folder.is_dir() and not (folder / MANIFEST).exists():
        names = sorted(each.name for each in folder.iterdir())
        if others := [name for name in names if not (CLAIM.fullmatch(name) or PARTIAL.fullmatch(name))]:
            if not (folder / MANIFEST).exists():  # nor has another recorder just begun
                raise UserError(f"{folder} holds something else ({others[0]}); give a new or empty folder")


def make_folder(folder: Path) -> None:
    """Makes a folder unless it is there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error


def open_folder(folder: Path, manifest: Manifest, claims: Claims) -> Manifest:
    """Joins the data set in the folder, if it is of the same configuration, or begins it; returns its manifest.

    It begins with a manifest that says how many denoiser calls a trajectory takes; before, nothing is written. A larger
    `num_trajectories` than before extends the data set.

    Raises:
        UserError: the configurations differ.
    """
    with claims.alone("manifest"):
        if not (folder / MANIFEST).exists():
            if rivals := claims.rivals():
                raise UserError(
                    f"{rivals[0]} is recording another configuration into {folder}\nGive another folder, or stop it"
                )
            if manifest.denoiser_calls:
                write_whole(folder / MANIFEST, manifest.to_json().encode(), claims.writer)
            return manifest
        old = read_manifest(folder)
        if names := old.differences(manifest, ignore=NOT_IDENTITY):
            changes = (f"{name} {shorten(getattr(old, name))} -> {shorten(getattr(manifest, name))}" for name in names)
            raise UserError(
                f"{folder} holds a data set of another configuration: {', '.join(changes)}\n"
                "Give another folder, or the configuration it was started with"
            )
        if old.num_trajectories > manifest.num_trajectories:
            raise UserError(f"{folder} is for {old.num_trajectories} trajectories already; ask for as many or more")
        if old.num_trajectories < manifest.num_trajectories:
            old = replace(old, num_trajectories=manifest.num_trajectories)
            write_whole(folder / MANIFEST, old.to_json().encode(), claims.writer)
        return old


def read_header(path: Path) -> Header:
    """The header of a trajectory's file, without the tensors.

    Raises:
        UserError: the file is missing, truncated or no trajectory.
    """
    size = LocalStorage(path.parent).read(path.name, 0, 8)  # refuses links out of the folder, pipes and devices
    try:
        check_size(str(path), path.stat().st_size, MAX_BYTES)
        check_size(f"the header of {path}", int.from_bytes(size, "little"), MAX_HEADER_BYTES)
        with safe_open(path, "pt") as file:
            return parse(Header, file.metadata()["accvideo"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a trajectory, or truncated") from error
