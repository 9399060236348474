"""What a training has written down, to compare one with another."""

from pathlib import Path
from typing import Any

from accvideo.training.checkpoint import read_metrics


def numbers_of(out: Path) -> list[tuple[str, float]]:
    """All that a run wrote into its metrics, in order, but for the time it took."""

    def flat(name: str, value: Any) -> list[tuple[str, float]]:
        if isinstance(value, dict):
            return [pair for key in sorted(value) for pair in flat(f"{name}.{key}", value[key])]
        if isinstance(value, list):
            return [pair for index, each in enumerate(value) for pair in flat(f"{name}.{index}", each)]
        return [] if isinstance(value, str) or name.endswith("seconds") else [(name, float(value))]

    return [pair for line in read_metrics(out / "metrics.jsonl") if "alarm" not in line for pair in flat("", line)]
