"""The commands of VBench that measure the videos, and what they measured.

A model's folder holds `videos`, `results` (VBench's `--output_path`) and, where the static filter is wanted, `static`.
The commands are run in that folder: VBench hands paths to a shell without quotes.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accvideo.trajectory import write_whole
from accvideo.vbench.published import describe_published
from accvideo.vbench.scores import DIMENSIONS, Score, describe, read_scores
from accvideo.vbench.suite import LIST_NAME, NUM_VIDEOS, Suite
from accvideo.vbench.videos import missing, read_settings

PROMPT_FILE = "prompts.json"
SCRIPT = "measure.sh"
FILTERED = "temporal_flickering"


def commands(name: str, suite: Suite, measured: Mapping[str, Score]) -> list[str]:
    """Lines of shell that measure what is not measured yet, from the folder of VBench's part of a report.

    Each dimension is a call of its own: VBench writes results when all dimensions of a call are done.

    Args:
        name: of the model, as its folder.
        suite: the videos.
        measured: the scores that are there, by dimension.
    """
    wanted = [dimension for dimension in suite.dimensions if dimension not in measured]
    own = f"--mode custom_input --prompt_file ../{PROMPT_FILE}"
    how = own if suite.listing is None else f"--full_json_dir ../{LIST_NAME}"
    evaluate = f"vbench evaluate --output_path results {how}"
    filtered = suite.num_flicker > NUM_VIDEOS and FILTERED in wanted
    plain = [dimension for dimension in wanted if not (filtered and dimension == FILTERED)]
    lines = []
    if plain:
        lines += [
            f"for dimension in {' '.join(plain)}; do",
            f"  {evaluate} --videos_path videos --dimension $dimension",
            "done",
        ]
    if filtered:
        # The filter's network, RAFT, is fetched by `dynamic_degree`.
        lines += [
            "vbench static_filter --videos_path videos --result_path static",
            f"{evaluate} --videos_path static/filtered_videos --dimension {FILTERED}",
        ]
    return ["(", *(f"  {line}" for line in (f"cd {name}", *lines)), ")"] if lines else []


def describe_vbench(folder: Path, suite: Suite, names: Sequence[str]) -> dict[str, Any]:
    """VBench's part of `report.json`: what is there of each model, and the commands for the rest.

    Writes what the commands need, and the commands themselves as a script that may be moved with the folder.

    Args:
        folder: of all of VBench's part.
        suite: the videos.
        names: of the models, as their folders.

    Raises:
        UserError: a result file is none.
    """
    models, lines = {}, []
    for name in names:
        scores = read_scores(folder / name / "results")
        num_missing = len(missing(folder / name, suite.videos))
        settings = read_settings(folder / name)
        models[name] = {
            "num_steps": settings["num_steps"],
            "size": settings["size"],
            "num_videos": len(suite.videos) - num_missing,
            "num_missing": num_missing,
            **describe(scores),
        }
        lines += commands(name, suite, scores)
    told = (PROMPT_FILE, suite.prompt_file()) if suite.listing is None else (LIST_NAME, suite.listing)
    write_whole(folder / told[0], json.dumps(told[1], indent=1).encode() + b"\n")
    script = ["#!/bin/sh", 'cd "$(dirname "$0")" || exit 1', *lines]
    write_whole(folder / SCRIPT, "\n".join(script).encode() + b"\n")
    return {
        "mode": "custom_input" if suite.listing is None else "vbench_standard",
        "num_prompts": len(suite.prompts),
        "models": models,
        "commands": [f"cd {shlex.quote(str(folder))}", *lines] if lines else [],
        "limits": limits(suite, models),
        "published": [] if suite.listing is None else describe_published(),
    }


def limits(suite: Suite, models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What VBench's numbers do not show, in sentences."""
    sentences = []
    for name, model in models.items():
        if model["num_missing"]:
            sentences.append(f"VBench: {model['num_missing']} of the {name}'s videos are still to be made.")
        for dimension, measured in model["dimensions"].items():
            expected = suite.num_measured(dimension)
            # Videos in which the object is not found have no color, and those that move are filtered out.
            if measured["num_videos"] < expected and dimension not in ("color", FILTERED):
                sentences.append(
                    f"VBench's {DIMENSIONS[dimension].title.lower()} of the {name} was taken of "
                    f"{measured['num_videos']} videos instead of {expected}."
                )
    if any(model["dimensions"] for model in models.values()):
        sentences.append(
            "VBench's numbers move by some tenths of a percent with seeds, machines and versions, and by more with "
            "prompts that a language model has made longer. Compare with the paper's only what was made with the same "
            "prompts at the same size."
        )
    return sentences
