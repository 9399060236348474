"""The paper's Figure 7 as numbers (arXiv:2503.19462), and the choices that the paper never varied."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from accvideo.analysis.budget import training_evaluations
from accvideo.analysis.figure import markdown_table
from accvideo.analysis.folder import open_analysis, origin, settings_of, write_results
from accvideo.analysis.students import StudentsConfig, distill_all, evaluate_kinds, metric_figure, metric_table
from accvideo.command import choose_device
from accvideo.data.dataset import TrajectoryFolder
from accvideo.training.recipe import DistillConfig, settings
from accvideo.types import UserError

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
    "fresh rollouts": {"fresh_rollouts": True},
}
"""What the paper left out, each one change of "one head a key point". The layers are of the playground's teacher."""

REFERENCE = "one head a key point"
"""The full method, which every other variant differs from in one thing."""

CUT_SHORT = "trajectory loss cut short"
"""Beside the trajectory loss with as many evaluations, that with as many iterations as the full method: whether they
differ by the heads or by the iterations that the heads' evaluations pay for."""

LATE = 0.6
"""Share of the iterations after which the preset `playground` has the adversarial half."""

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
    only: tuple[str, ...] = ()
    """Of the variants these alone, by their names in the table, beside "one head a key point"."""
    adversarial_from: float = 0.0
    """Share of the iterations before the adversarial half takes part; 0: from the first on, as in the paper."""
    equal: Literal["evaluations", "iterations"] = "evaluations"
    """What all students have as many of: denoiser evaluations in training, as many as "one head a key point" takes in
    `num_iterations`, so that a variant whose iterations cost less has more of them; or iterations."""
    keep: Path | None = None
    """As for `accvideo distill`; adds a variant that learns from these trajectories alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.adversarial_from < 1:
            raise UserError(f"adversarial_from is {self.adversarial_from}; give a share from 0 to less than 1")


def ablation(config: AblationConfig) -> dict[str, Any]:
    """Distill what is missing, evaluate, and write ablation.json, .md and .svg.

    Raises:
        UserError: whatever distillation and evaluation refuse.
    """
    own_settings = settings_of(config)
    folder = TrajectoryFolder(config.data)
    num_steps = folder.manifest.num_student_steps
    config.evaluation(Path()).check_prompts(folder.manifest.teacher)
    plan = plan_runs(config, len(folder), num_steps)
    cache = open_analysis(config.out, own_settings)
    seconds = distill_all([replace(run, out=cache / run.out) for runs in plan.values() for run in runs])
    kinds = {name: [cache / run.out for run in runs] for name, runs in plan.items()}
    rows = evaluate_kinds(kinds, config.evaluation(cache / "report"))
    results = {
        "command": f"accvideo analyze ablation {config.data} --out DIR",
        **origin(choose_device(config.device)),
        "settings": own_settings,
        "variants": {name: variant(runs[0], plan[REFERENCE][0]) for name, runs in plan.items()},
        "training": {
            name: {"iterations": runs[0].num_iterations, "evaluations": learning_evaluations(runs[0], num_steps)}
            for name, runs in plan.items()
        },
        "seconds": seconds,
        "rows": rows,
    }
    return write_results(config.out, "ablation", results, ablation_table(results), metric_figure(rows))


def plan_runs(config: AblationConfig, num_trajectories: int, num_steps: int) -> dict[str, list[DistillConfig]]:
    """The configurations of all students by variant, one a seed; their folders are relative.

    Args:
        config: what is asked for.
        num_trajectories: in the data set.
        num_steps: K of the students.

    Raises:
        UserError: a variant that is asked for is not known.
    """
    start = round(config.adversarial_from * config.num_iterations)
    late = round(LATE * config.num_iterations)
    changes = dict(FIGURE_7)
    if config.keep is not None:
        changes["chosen trajectories alone"] = {"keep": config.keep}
    if not config.figure_7:
        changes |= BEYOND
        changes |= {
            name: {"adversarial_start": other}
            for name, other in (("adversarial from the start", 0), (f"adversarial from {LATE:.0%} on", late))
            if other != start
        }
        # What is held out is not trained on.
        changes |= {
            name: {"num_validation": num_trajectories - max(1, num_trajectories // divisor), "validate_every": 10**9}
            for name, divisor in FRACTIONS.items()
        }
    runs = {
        name: config.run(config.data, Path(), **{"adversarial_start": start} | change)
        for name, change in changes.items()
    }
    if config.equal == "evaluations":
        budget, short = learning_evaluations(runs[REFERENCE], num_steps), runs["trajectory loss only"]
        runs = {CUT_SHORT: short} | {name: at_budget(run, num_steps, budget) for name, run in runs.items()}
    if unknown := [name for name in config.only if name not in runs]:
        raise UserError(f'there is no variant "{unknown[0]}"; choose from: {", ".join(runs)}')
    return {
        name: [
            replace(run, out=Path(f"{name.replace(' ', '-')}-{seed}"), seed=seed) for seed in range(config.num_seeds)
        ]
        for name, run in runs.items()
        if not config.only or name in (*config.only, REFERENCE)
    }


def learning_evaluations(run: DistillConfig, num_steps: int) -> int:
    """Denoiser evaluations of a student's training, without those that only measure it."""
    return training_evaluations(replace(run, num_validation=0), num_steps)


def at_budget(run: DistillConfig, num_steps: int, budget: int) -> DistillConfig:
    """The same with as many iterations as spend the budget; the adversarial half has the same share of them."""
    factor = budget / learning_evaluations(run, num_steps)
    start = round(factor * run.first_adversarial)
    return replace(run, num_iterations=max(1, round(factor * run.num_iterations)), adversarial_start=start)


def variant(run: DistillConfig, reference: DistillConfig) -> dict[str, Any]:
    """The settings in which a variant differs from "one head a key point"."""
    full = settings(reference)
    return {name: value for name, value in settings(run).items() if value != full[name] and name not in ("out", "seed")}


def ablation_table(results: Mapping[str, Any]) -> str:
    """What each variant was given, and all metrics of all rows, in Markdown."""
    training = results["training"]
    most = max(each["evaluations"] for each in training.values())
    lines = [
        [name, f"{each['iterations']:,}", f"{each['evaluations']:,}", f"{100 * each['evaluations'] / most:.0f}"]
        for name, each in training.items()
    ]
    given = markdown_table(["", "iterations", "denoiser evaluations in training", "of the most, %"], lines)
    num_seeds = results["settings"]["num_seeds"]
    return (
        f"Mean and deviation of {num_seeds} students.\n\n{metric_table(results['rows'])}\n"
        f"Given to each student (a forward pass counts one, a backward pass two, for one sample each):\n\n{given}"
    )
