"""VBench scores that others have published, in percent, to stand beside one's own.

Tables 2, 4 and 5 of AccVideo (arXiv:2503.19462) and the table in the README of its repository, which has the released
students. They were taken at other sizes, with prompts made longer by other models and on other machines: differences
below half a percent say little.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accvideo.vbench.scores import DIMENSIONS, SUMMARIES


@dataclass(frozen=True)
class Published:
    """One row of a table."""

    name: str
    size: str
    """Height, width and frames."""
    source: str
    scores: dict[str, float]
    """Percent: total, quality and semantic score, then the dimensions."""


def _row(name: str, size: str, source: str, quality: Sequence[float], semantic: Sequence[float]) -> Published:
    scores = dict(zip([*SUMMARIES, *DIMENSIONS], [*quality, *semantic], strict=True))
    return Published(name, size, source, scores)


LEADERBOARD = "VBench's leaderboard, in AccVideo's Table 2"
AUTHORS = "measured by AccVideo's authors, Table 2"
RELEASED = "README of AccVideo's repository"

PUBLISHED = [
    _row(
        "VideoCrafter2", "320×512×16", LEADERBOARD,
        [80.44, 82.20, 73.42, 96.85, 98.22, 98.41, 97.73, 42.50, 63.13, 67.22],
        [92.55, 40.66, 95.00, 92.92, 35.86, 55.29, 25.13, 25.84, 28.23],
    ),
    _row(
        "T2V-Turbo-V2", "320×512×16", LEADERBOARD,
        [83.52, 85.13, 77.12, 95.50, 96.71, 97.35, 97.07, 90.00, 62.61, 71.78],
        [95.33, 61.49, 96.20, 92.53, 43.32, 56.40, 24.17, 27.06, 28.26],
    ),
    _row(
        "LTX-Video", "512×768×121", LEADERBOARD,
        [80.00, 82.30, 70.79, 96.56, 97.20, 99.34, 98.96, 54.35, 59.81, 60.28],
        [83.45, 45.43, 92.80, 81.45, 65.43, 51.07, 21.47, 22.62, 25.19],
    ),
    _row(
        "CogVideoX-5B", "480×720×49", LEADERBOARD,
        [81.61, 82.75, 77.04, 96.23, 96.52, 98.66, 96.92, 70.97, 61.98, 62.90],
        [85.23, 62.11, 99.40, 82.81, 66.35, 53.20, 24.91, 25.38, 27.59],
    ),
    _row(
        "HunyuanVideo", "544×960×93", AUTHORS,
        [82.67, 84.43, 75.59, 94.33, 97.13, 99.03, 98.64, 76.38, 61.97, 65.57],
        [88.67, 67.69, 94.80, 92.07, 67.39, 51.23, 19.43, 23.96, 26.80],
    ),
    _row(
        "AccVideo, 5 steps", "544×960×93", AUTHORS,
        [83.26, 84.58, 77.96, 94.46, 97.45, 99.18, 98.79, 75.00, 62.08, 65.64],
        [92.99, 67.33, 95.60, 94.11, 75.70, 54.72, 19.87, 23.71, 27.21],
    ),
    _row(
        "PyramidFlow", "768×1280×121", LEADERBOARD,
        [81.72, 84.74, 69.62, 96.95, 98.06, 99.49, 99.12, 64.63, 63.26, 65.01],
        [86.67, 50.71, 85.60, 82.87, 59.53, 43.20, 20.91, 23.09, 26.23],
    ),
    _row(
        "OpenSora V1.2", "720×1280×204", LEADERBOARD,
        [79.76, 81.35, 73.39, 96.75, 97.61, 99.53, 98.50, 42.39, 56.85, 63.34],
        [82.22, 51.83, 91.20, 90.08, 68.56, 42.44, 23.95, 24.54, 26.85],
    ),
    _row(
        "CogVideoX1.5-5B", "768×1360×81", LEADERBOARD,
        [82.17, 82.78, 79.76, 96.87, 97.35, 98.88, 98.31, 50.93, 62.79, 65.02],
        [87.47, 69.65, 97.20, 87.55, 80.25, 52.91, 24.89, 25.19, 27.30],
    ),
    _row(
        "HunyuanVideo", "720×1280×129", LEADERBOARD,
        [83.24, 85.09, 75.82, 97.37, 97.76, 99.44, 98.99, 70.83, 60.36, 67.56],
        [86.10, 68.55, 94.40, 91.60, 68.68, 53.88, 19.80, 23.89, 26.44],
    ),
    _row(
        "AccVideo, 5 steps", "720×1280×129", AUTHORS,
        [82.77, 84.38, 76.34, 94.20, 96.87, 99.01, 98.90, 75.55, 60.61, 66.70],
        [89.71, 66.35, 94.00, 94.61, 71.74, 50.75, 20.16, 23.44, 26.92],
    ),
    _row(
        "AccVideo of Wan 2.1 14B, 10 steps", "480×832×81", RELEASED,
        [85.95, 86.62, 83.25, 95.02, 97.75, 99.54, 97.95, 93.33, 64.21, 68.42],
        [98.38, 86.58, 97.40, 92.04, 75.68, 59.82, 23.88, 24.62, 27.34],
    ),
]  # fmt: skip
"""By resolution, as in the paper."""


def describe_published() -> list[dict[str, Any]]:
    """The published rows as they stand in `report.json`."""
    return [{"name": row.name, "size": row.size, "source": row.source, "percent": row.scores} for row in PUBLISHED]
