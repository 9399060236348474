"""VBench's scores: read from the files that its command writes, and summed up by its own rule.

Ranges, weights and formula are those of `scripts/constant.py` and `scripts/cal_final_score.py` in the repository
Vchitect/VBench (commit 45e79ec): each dimension's score is brought to its range; quality and semantics are weighted
means; the total is four parts quality and one part semantics. The totals of the paper's tables come out of the scores
there to a hundredth.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accvideo.data.schema import loads
from accvideo.types import UserError


@dataclass(frozen=True)
class Dimension:
    """One of the things that VBench measures."""

    title: str
    is_quality: bool
    """Else it is semantic: whether the video shows what the prompt asks for."""
    low: float = 0.0
    """Score that counts as 0."""
    high: float = 1.0
    """Score that counts as 1."""
    weight: float = 1.0


DIMENSIONS = {
    "subject_consistency": Dimension("Subject consistency", True, low=0.1462),
    "background_consistency": Dimension("Background consistency", True, low=0.2615),
    "temporal_flickering": Dimension("Temporal flickering", True, low=0.6293),
    "motion_smoothness": Dimension("Motion smoothness", True, low=0.706, high=0.9975),
    "dynamic_degree": Dimension("Dynamic degree", True, weight=0.5),
    "aesthetic_quality": Dimension("Aesthetic quality", True),
    "imaging_quality": Dimension("Imaging quality", True),
    "object_class": Dimension("Object class", False),
    "multiple_objects": Dimension("Multiple objects", False),
    "human_action": Dimension("Human action", False),
    "color": Dimension("Color", False),
    "spatial_relationship": Dimension("Spatial relationship", False),
    "scene": Dimension("Scene", False, high=0.8222),
    "appearance_style": Dimension("Appearance style", False, low=0.0009, high=0.2855),
    "temporal_style": Dimension("Temporal style", False, high=0.364),
    "overall_consistency": Dimension("Overall consistency", False, high=0.364),
}
"""By VBench's name, in the order of its and the paper's tables."""

ANY_PROMPT = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
"""What VBench measures of videos of any prompt."""

SUMMARIES = {"total": "Total", "quality": "Quality", "semantic": "Semantic"}
"""Title of what sums the dimensions up."""


@dataclass(frozen=True)
class Score:
    """A dimension's score."""

    score: float
    """As VBench writes it, from 0 to 1."""
    num_videos: int
    """That it was taken of."""
    file: str


def read_scores(folder: Path) -> dict[str, Score]:
    """The scores in VBench's result files, in the order of `DIMENSIONS`; the newest where there are several.

    A file is called `results_<time>_eval_results.json` and holds `{dimension: [score, [one object a video]]}`.

    Args:
        folder: what was given to VBench as `--output_path`; it may be missing.

    Raises:
        UserError: a file is not of that form, or a score is none.
    """
    scores: dict[str, Score] = {}
    for path in sorted(folder.glob("*_eval_results.json"), key=lambda path: path.name):
        try:
            results = loads(path.read_text("utf-8"))
            read = {name: Score(float(value[0]), len(value[1]), path.name) for name, value in results.items()}
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(f"{path} holds no results of `vbench evaluate`: delete it, and measure again") from error
        for name, score in read.items():
            if name not in DIMENSIONS:
                raise UserError(f"{path} holds {name}, which is none of VBench's 16 dimensions; move it elsewhere")
            if not math.isfinite(score.score) or abs(score.score) > 1:
                why = "no video was counted" if math.isnan(score.score) else "VBench's scores lie between 0 and 1"
                raise UserError(
                    f"{name} is {score.score:g} in {path}: {why}\nDelete the file, and measure that dimension again"
                )
        scores |= read
    return {name: scores[name] for name in DIMENSIONS if name in scores}


def summarize(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Total, quality and semantic score, from 0 to 1; None where a dimension is missing.

    Args:
        scores: by dimension, as VBench writes them.
    """
    parts = {
        "quality": [name for name, dimension in DIMENSIONS.items() if dimension.is_quality],
        "semantic": [name for name, dimension in DIMENSIONS.items() if not dimension.is_quality],
    }
    means: dict[str, float | None] = {"total": None}
    for part, names in parts.items():
        means[part] = weighted_mean(scores, names) if all(name in scores for name in names) else None
    if means["quality"] is not None and means["semantic"] is not None:
        means["total"] = (4 * means["quality"] + means["semantic"]) / 5
    return means


def weighted_mean(scores: Mapping[str, float], names: list[str]) -> float:
    """The mean of these dimensions, each brought to its range, by their weights."""
    total = 0.0
    for name in names:
        dimension = DIMENSIONS[name]
        total += dimension.weight * (scores[name] - dimension.low) / (dimension.high - dimension.low)
    return total / sum(DIMENSIONS[name].weight for name in names)


def describe(scores: Mapping[str, Score]) -> dict[str, Any]:
    """Scores and what sums them up, as they stand in `report.json`."""
    plain = {name: score.score for name, score in scores.items()}
    dimensions = {
        name: {"score": score.score, "num_videos": score.num_videos, "file": score.file}
        for name, score in scores.items()
    }
    return {**summarize(plain), "dimensions": dimensions}
