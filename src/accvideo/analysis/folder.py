"""The folder of an analysis: its settings, what a killed run goes on with, and where the numbers come from."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accvideo.evaluate import commit, describe_device
from accvideo.trajectory import write_whole
from accvideo.types import UserError

SETTINGS = "settings.json"


PLACES = ("out", "rows", "device", "compile")
"""Settings of analyses that change nothing in their numbers but rounding."""


def settings_of(config: Any, places: Collection[str] = PLACES) -> dict[str, Any]:
    """A configuration as JSON values, without those that change nothing in the numbers."""
    values = {name: value for name, value in asdict(config).items() if name not in places}
    return json.loads(json.dumps(values, default=str))


def open_analysis(folder: Path, settings: Mapping[str, Any]) -> Path:
    """Make the folder of an analysis with these settings, or find it; returns its cache.

    Raises:
        UserError: it holds something else, or an analysis of other settings.
    """
    path = folder / SETTINGS
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and holds no analysis; choose a new or empty folder as --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}; give another --out") from error
        write_whole(path, json.dumps(settings, indent=1).encode() + b"\n")
    theirs = json.loads(path.read_text("utf-8"))
    if differing := [name for name in settings | theirs if settings.get(name) != theirs.get(name)]:
        changes = ", ".join(f"{name} {theirs.get(name)}, now {settings.get(name)}" for name in differing)
        raise UserError(
            f"{folder} holds an analysis of other settings ({changes})\n"
            "Give the same settings to go on with it, or another --out"
        )
    return folder / "cache"


def origin(device: str = "cpu") -> dict[str, str]:
    """Which code on which device: a part of every file of numbers."""
    return {"commit": commit(), "device": describe_device(device)}


def write_results(folder: Path, name: str, results: Mapping[str, Any], table: str, figure: str) -> dict[str, Any]:
    """Write `name.json`, `name.md` and `name.svg`; returns a summary for the command line."""
    for ending, text in (("json", json.dumps(results, indent=1) + "\n"), ("md", table), ("svg", figure)):
        write_whole(folder / f"{name}.{ending}", text.encode())
    return {"folder": str(folder), **results}
