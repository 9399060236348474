"""The paper's Figure 7 as numbers (arXiv:2503.19462), and the choices that the paper never varied."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from accvideo.analysis.folder import open_analysis, origin, settings_of, write_results
from accvideo.analysis.students import StudentsConfig, distill_all, evaluate_kinds, metric_figure, metric_table
from accvideo.command import choose_device
from accvideo.data.dataset import TrajectoryFolder
from accvideo.training.recipe import DistillConfig, settings

FIGURE_7: dict[str, dict[str, Any]] = {
    "trajectory loss only": {"adversarial_weight": 0.0},
    "one shared head": {"shared_head": True},
    "one head a key point": {},
}
"""Figure 7 (b), (c) and (d); (a), the teacher at K steps, is a row of every evaluation."""

BEYOND: dict[str, dict[str, Any]] = {
    "weight 0.01": {"adversarial_weight": 0.01},
    "weight 0.5": {"adversarial_weight": 0.5},
    "early features": {"feature_layers": (2, 2)},
    "last features everywhere": {"feature_layers": (8, 8)},
    "hinge loss": {"adversarial_loss": "hinge"},
    "saturating loss": {"adversarial_loss": "saturating"},
    "updates as in Algorithm 1": {"update": "alternating"},
    "rollouts from recorded noise": {"update": "shared"},
    "adversarial from the start": {"adversarial_start": 0},
}
"""What the paper left out, each one change of "one head a key point". The layers are of the playground's teacher."""

FRACTIONS = {"half of the trajectories": 2, "an eighth of the trajectories": 8}
"""Smaller data sets: what the number of trajectories is divided by."""


@dataclass(frozen=True, kw_only=True)
class AblationConfig(StudentsConfig):
    """Distills students that differ in one thing each, several seeds of each, and evaluates them side by side.

    Starts from the preset `playground`. Finished students and rows are kept: the same command goes on where a killed
    run stopped.
    """

    data: Positional[str]
    """Data set that `accvideo record` made."""
    out: Path
    """Folder for students, numbers, table and figure."""
    figure_7: bool = False
    """Only the variants of the paper's Figure 7."""
    keep: Path | None = None
    """As for `accvideo distill`; adds a variant that learns from these trajectories alone."""


def ablation(config: AblationConfig) -> dict[str, Any]:
    """Distill what is missing, evaluate, and write ablation.json, .md and .svg.

    Raises:
        UserError: whatever distillation and evaluation refuse.
    """
    own_settings = settings_of(config)
    folder = TrajectoryFolder(config.data)
    config.evaluation(Path()).check_prompts(folder.manifest.teacher)
    plan = plan_runs(config, len(folder))
    cache = open_analysis(config.out, own_settings)
    seconds = distill_all([replace(run, out=cache / run.out) for runs in plan.values() for run in runs])
    kinds = {name: [cache / run.out for run in runs] for name, runs in plan.items()}
    rows = evaluate_kinds(kinds, config.evaluation(cache / "report"))
    results = {
        "command": f"accvideo analyze ablation {config.data} --out DIR",
        **origin(choose_device(config.device)),
        "settings": own_settings,
        "variants": {name: variant(runs[0], plan) for name, runs in plan.items()},
        "seconds": seconds,
        "rows": rows,
    }
    table = f"Mean and deviation of {config.num_seeds} students.\n\n{metric_table(rows)}"
    return write_results(config.out, "ablation", results, table, metric_figure(rows))


def plan_runs(config: AblationConfig, num_trajectories: int) -> dict[str, list[DistillConfig]]:
    """The configurations of all students by variant, one a seed; their folders are relative."""
    changes = dict(FIGURE_7)
    if config.keep is not None:
        changes["chosen trajectories alone"] = {"keep": config.keep}
    if not config.figure_7:
        changes |= BEYOND
        # What is held out is not trained on.
        changes |= {
            name: {"num_validation": num_trajectories - max(1, num_trajectories // divisor), "validate_every": 10**9}
            for name, divisor in FRACTIONS.items()
        }
    return {
        name: [
            config.run(config.data, Path(f"{name.replace(' ', '-')}-{seed}"), seed=seed, **change)
            for seed in range(config.num_seeds)
        ]
        for name, change in changes.items()
    }


def variant(run: DistillConfig, plan: Mapping[str, list[DistillConfig]]) -> dict[str, Any]:
    """The settings in which a variant differs from "one head a key point"."""
    full = settings(plan["one head a key point"][0])
    return {name: value for name, value in settings(run).items() if value != full[name] and name not in ("out", "seed")}
