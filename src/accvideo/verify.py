"""Check a folder of trajectories."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from accvideo import trajectory


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Checks every checksum and shape of a folder of trajectories, and names each bad file."""

    folder: Positional[Path]
    """Folder that `accvideo record` made."""


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Name every bad file on stderr; the summary lists them too."""
    problems = trajectory.verify(config.folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    return {"folder": str(config.folder), "num_problems": len(problems), "problems": problems}
