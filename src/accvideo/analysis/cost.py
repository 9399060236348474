"""What a student costs in denoiser evaluations, recording included, and how good it is: recipes side by side."""

import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accvideo.analysis.budget import training_evaluations
from accvideo.analysis.estimate import CALLS, PLAYGROUND, Work, show_estimate
from accvideo.analysis.figure import Panel, color, figure, markdown_table, whisker, whisker_ticks
from accvideo.analysis.folder import PLACES, open_analysis, origin, settings_of, write_results
from accvideo.analysis.students import Evaluation, distill_all, evaluate_kinds, metric_cell, metric_title, scaled
from accvideo.command import choose_device
from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.manifest import MANIFEST
from accvideo.folder import whole_folder
from accvideo.playground.prompts import PromptsConfig, prompts
from accvideo.record import record
from accvideo.recording.config import RecordConfig
from accvideo.recording.solvers import Solver
from accvideo.reporting.charts import Plot, log_ticks
from accvideo.reporting.wording import METRICS
from accvideo.training.recipe import DistillConfig, paper
from accvideo.trajectory import trajectory_name
from accvideo.types import UserError

STUDENT_STEPS = 5

PAPER_STEPS = 50
"""Of Euler's method, by which the paper records."""

PAPER = "paper"
"""The recipe that the others are measured against."""

QUARTER = 0.25
"""The share of the paper recipe's evaluations that the default may take."""

VARIANTS: dict[str, dict[str, Any]] = {
    "running mean of the weights": {"ema_decay": 0.98},
    "best of the validations": {"num_validation": 16, "validate_every": 25, "keep_best": True},
    "four head updates": {"head_updates": 4},
    "adversarial from the start": {"adversarial_start": 0},
    "all weights": {"full": True, "learning_rate": 2e-4},
}
"""What is changed in the default recipe, one thing each, where its records are fewest."""

SCORES = ("all_right", "latent_mse")
"""What a recipe is judged by: more is better; less is better."""


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Records and distills by the paper's recipe and by the default one, with fewer and fewer records, and compares.

    On the playground. Counts every denoiser evaluation that a student took, for one sample each: forward 1, backward 2
    (1 where only the gradient of the input is wanted, in the discriminator's features). Says what is left to do and how
    long it takes first. What is done is kept: the same command goes on where a killed run stopped.
    """

    out: Path
    """Folder for records, students, numbers, table and figure."""
    num_trajectories: int = 480
    """Records of the paper's recipe."""
    fractions: tuple[int, ...] = (1, 2, 4)
    """The default recipe is tried with the whole, a half and a quarter of these records."""
    solver: Solver = "adams2"
    """Of the default recipe's recording."""
    num_steps: int = 25
    """Of the default recipe's recording."""
    num_iterations: int = DistillConfig.num_iterations
    """Of the default recipe."""
    batch_size: int = DistillConfig.batch_size
    """Of the default recipe."""
    variants: bool = True
    """Also try one change each of the default recipe on the fewest records: a running mean of the weights, the best
    student by held-out trajectories, several updates of the heads, the adversarial half from the start, no LoRA."""
    paper_iterations: int = 600
    """Of the paper's recipe; the adversarial half takes part in all of them."""
    paper_batch_size: int = 32
    """Of the paper's recipe."""
    paper_learning_rate: float = 2e-4
    """Of the paper's recipe; its own 5e-6 is for 13 billion weights, and teaches the playground's student next to
    nothing."""
    num_seeds: int = 3
    """Students of each recipe."""
    num_prompts: int = 500
    """Clips of each row."""
    rows: Path | None = None
    """As for `accvideo evaluate`: analyses that share it make the teacher's clips once."""
    estimate: bool = False
    """Say what is left to do and how long it takes, and stop."""
    compile: bool = False
    """As for `accvideo distill`."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one."""

    def __post_init__(self) -> None:
        names = ("num_trajectories", "num_iterations", "batch_size", "paper_iterations")
        for name in (*names, "paper_batch_size", "num_seeds", "num_prompts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not self.fractions or not all(1 <= each <= self.num_trajectories for each in self.fractions):
            raise UserError(f"fractions is {self.fractions}; give numbers from 1, what the records are divided by")
        held_out = max(change.get("num_validation", 0) for change in VARIANTS.values())
        if self.variants and (fewest := self.num_trajectories // max(self.fractions)) <= held_out:
            raise UserError(
                f"the fewest records are {fewest}, and one of the variants holds out {held_out}\n"
                "Give more num_trajectories or smaller fractions, or leave out the variants (--no-variants)"
            )
        RecordConfig(
            teacher=PLAYGROUND, prompts=Path(), out=Path(), num_steps=self.num_steps, num_student_steps=STUDENT_STEPS
        )


@dataclass(frozen=True)
class Recording:
    """A data set."""

    solver: Solver
    num_steps: int
    num_trajectories: int

    @property
    def folder(self) -> str:
        """Its name."""
        return f"records-{self.solver}-{self.num_steps}-{self.num_trajectories}"

    @property
    def evaluations(self) -> int:
        """Denoiser evaluations that it takes."""
        return self.num_trajectories * self.num_steps * CALLS


@dataclass(frozen=True)
class Recipe:
    """How students are made."""

    name: str
    recording: Recording
    training: DistillConfig
    """Without places and seed."""

    def runs(self, cache: Path, num_seeds: int) -> list[DistillConfig]:
        """The distillations, one a seed."""
        folder, name = str(cache / self.recording.folder), self.name.replace(", ", "-").replace(" ", "-")
        return [
            replace(self.training, data=folder, out=cache / f"{name}-{seed}", seed=seed) for seed in range(num_seeds)
        ]


def cost(config: CostConfig) -> dict[str, Any]:
    """Record, distill and evaluate what is missing, and write cost.json, .md and .svg.

    Raises:
        UserError: whatever the stages refuse.
    """
    settings = settings_of(config, (*PLACES, "estimate"))
    recipes, device = plan_recipes(config), choose_device(config.device)
    variants = plan_variants(config, recipes)
    left = work_left(config, recipes + variants, config.out / "cache")
    if any(work != Work() for work in left.values()):
        seconds = show_estimate(left, config.batch_size, device, config.compile)
        if config.estimate:
            return {"work": {name: asdict(each) for name, each in left.items()}, "seconds": seconds}
    cache = open_analysis(config.out, settings)
    cache.mkdir(exist_ok=True)
    make_records(config, {recipe.recording for recipe in recipes}, cache, device)
    runs = {recipe.name: recipe.runs(cache, config.num_seeds) for recipe in recipes + variants}
    distill_all([run for each in runs.values() for run in each])
    evaluation = Evaluation(
        out=cache / "report",
        num_prompts=config.num_prompts,
        prompts=None,
        seed=0,
        device=config.device,
        rows=config.rows,
    )
    kinds = {name: [run.out for run in each] for name, each in runs.items()}
    rows = {row["name"]: row for row in evaluate_kinds(kinds, evaluation)}

    def found(recipe: Recipe) -> dict[str, Any]:
        return {
            "name": recipe.name,
            "num_trajectories": recipe.recording.num_trajectories,
            "recording": recipe.recording.evaluations,
            "training": training_evaluations(recipe.training, STUDENT_STEPS),
            "recipe": {name: str(value) for name, value in asdict(recipe.training).items()},
            "metrics": rows[recipe.name]["metrics"],
        }

    results = {
        "command": "accvideo analyze cost --out DIR",
        **origin(device),
        "settings": settings,
        "teacher": rows["teacher"],
        "recipes": compare([found(recipe) for recipe in recipes]),
        "variants": compare([found(recipe) for recipe in [fewest_records(recipes), *variants]]),
    }
    results["cheapest"] = cheapest(results["recipes"])
    return write_results(config.out, "cost", results, cost_table(results), cost_figure(results["recipes"]))


# What there is to do


def plan_recipes(config: CostConfig) -> list[Recipe]:
    """The paper's recipe; the default one on its records; and on records of another solver, fewer and fewer."""
    whole = Recording("euler", PAPER_STEPS, config.num_trajectories)
    as_published = replace(
        paper("", Path()),
        num_iterations=config.paper_iterations,
        batch_size=config.paper_batch_size,
        learning_rate=config.paper_learning_rate,
        head_learning_rate=1e-3,
        gradient_checkpointing=False,
        compile=config.compile,
        device=config.device,
    )
    default = DistillConfig(
        data="",
        out=Path(),
        num_iterations=config.num_iterations,
        batch_size=config.batch_size,
        num_validation=0,
        compile=config.compile,
        device=config.device,
    )
    recipes = [Recipe(PAPER, whole, as_published), Recipe("default, the paper's records", whole, default)]
    for divisor in config.fractions:
        recording = Recording(config.solver, config.num_steps, config.num_trajectories // divisor)
        name = f"default, {recording.num_trajectories} records of {config.num_steps} steps"
        recipes.append(Recipe(name, recording, default))
    return recipes


def fewest_records(recipes: Sequence[Recipe]) -> Recipe:
    """Of the default recipes on records of another solver, the one with the fewest."""
    return min(recipes[2:], key=lambda recipe: recipe.recording.num_trajectories)


def plan_variants(config: CostConfig, recipes: Sequence[Recipe]) -> list[Recipe]:
    """The default recipe on the fewest records, changed in one thing each; of none, if they are not asked for."""
    fewest = fewest_records(recipes)
    return [
        Recipe(f"{fewest.name}, {name}", fewest.recording, replace(fewest.training, **change))
        for name, change in (VARIANTS.items() if config.variants else ())
    ]


def work_left(config: CostConfig, recipes: Sequence[Recipe], cache: Path) -> dict[str, Work]:
    """By stage, what has not been done yet; an evaluation counts whole until it is done."""
    recordings = {recipe.recording for recipe in recipes}
    recorded = sum(
        each.num_steps * CALLS * sum(not (cache / each.folder / trajectory_name(i)).exists() for i in range(most))
        for each, most in ((each, each.num_trajectories) for each in largest(recordings))
    )
    runs = [run for recipe in recipes for run in recipe.runs(cache, config.num_seeds)]
    trained = sum(training_evaluations(run, STUDENT_STEPS) for run in runs if not (run.out / "student.json").exists())
    # The teacher at all its steps; at the student's number with guidance, without, half as many with; and by UniPC.
    teacher = CALLS * PAPER_STEPS + CALLS * STUDENT_STEPS + STUDENT_STEPS + STUDENT_STEPS // 2 * CALLS
    num_rows, calls = 5 + len(runs), teacher + CALLS * STUDENT_STEPS + len(runs) * STUDENT_STEPS
    is_done = (config.out / "cost.json").exists() and not trained
    clips = 0 if is_done else config.num_prompts
    return {
        "recording": Work(sampled=recorded),
        "distilling": Work(trained=trained),
        "evaluating": Work(sampled=clips * calls, clips=clips * num_rows),
    }


def largest(recordings: set[Recording]) -> list[Recording]:
    """Of recordings that differ in their number of trajectories only, the one that has the others in it."""
    ways = {(each.solver, each.num_steps) for each in recordings}
    return [
        max(
            (each for each in recordings if (each.solver, each.num_steps) == way),
            key=lambda each: each.num_trajectories,
        )
        for way in sorted(ways)
    ]


def make_records(config: CostConfig, recordings: set[Recording], cache: Path, device: str) -> None:
    """Record the largest data sets; the others are their beginnings."""
    file = cache / "prompts.txt"
    if not file.exists():
        prompts(PromptsConfig(out=file, num=config.num_trajectories))
    for whole in largest(recordings):
        record(
            RecordConfig(
                teacher=PLAYGROUND,
                prompts=file,
                out=cache / whole.folder,
                solver=whole.solver,
                num_steps=whole.num_steps,
                teacher_num_steps=PAPER_STEPS,
                num_student_steps=STUDENT_STEPS,
                num_trajectories=whole.num_trajectories,
                batch_size=min(16, whole.num_trajectories),
                device=device,
            )
        )
        for part in recordings:
            if (part.solver, part.num_steps) == (whole.solver, whole.num_steps):
                write_beginning(cache / whole.folder, part.num_trajectories, cache / part.folder)


def write_beginning(data: Path, num_trajectories: int, out: Path) -> None:
    """Write the first trajectories of a data set as one of their own, unless it is there."""
    if (out / MANIFEST).exists():
        return
    manifest = replace(TrajectoryFolder(data).manifest, num_trajectories=num_trajectories)
    with whole_folder(out) as folder:
        for index in range(num_trajectories):
            shutil.copyfile(data / trajectory_name(index), folder / trajectory_name(index))
        (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")


# What came out


def compare(recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The recipes with their sums and what sets them apart from the first.

    For each score the difference of the means, positive where a recipe is better, and its standard error over the
    seeds; a recipe is as good where it is not worse by more than that.
    """
    first, rows = recipes[0], []
    for recipe in recipes:
        total = recipe["recording"] + recipe["training"]
        row = {**recipe, "evaluations": total, "share": total / (first["recording"] + first["training"])}
        for name, sign in zip(SCORES, (1, -1), strict=True):
            own, theirs = recipe["metrics"][name], first["metrics"][name]
            difference = sign * (statistics.fmean(own) - statistics.fmean(theirs))
            error = math.hypot(standard_error(own), standard_error(theirs))
            row[f"{name}_difference"] = {"mean": difference, "error": error, "as_good": difference + error >= 0}
        rows.append(row)
    return rows


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of some values; 0 for a single one, which says nothing about it."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def cheapest(recipes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By score, the recipe of fewest evaluations that is as good as the paper's, and whether a quarter is enough."""
    found = {}
    for name in SCORES:
        best = min((row for row in recipes if row[f"{name}_difference"]["as_good"]), key=lambda row: row["evaluations"])
        found[name] = {"recipe": best["name"], "share": best["share"], "within_a_quarter": best["share"] <= QUARTER}
    return found


def cost_table(results: Mapping[str, Any]) -> str:
    """Evaluations and scores of all recipes in Markdown, and what follows."""
    header = ["", "records", "recording", "training", "evaluations"]
    header += ["of {}, %", *map(metric_title, SCORES)] + ["better than {}, points"]

    def table(rows: Sequence[Mapping[str, Any]], first: str) -> str:
        lines = [
            [row["name"], *(f"{row[key]:,}" for key in ("num_trajectories", "recording", "training", "evaluations"))]
            + [f"{100 * row['share']:.1f}", *(metric_cell(name, row) for name in SCORES)]
            + [f"{100 * row['all_right_difference']['mean']:+.1f} ± {100 * row['all_right_difference']['error']:.1f}"]
            for row in rows
        ]
        return markdown_table([title.format(first) for title in header], lines)

    settings, teacher = results["settings"], results["teacher"]["metrics"]["all_right"][0]
    recipes = table(results["recipes"], "the paper's")
    text = (
        "Denoiser evaluations for one sample each: forward 1, backward 2 (1 where only the gradient of the input is "
        f"wanted). Scores: mean and deviation of {settings['num_seeds']} students on {settings['num_prompts']} "
        f"prompts; the teacher itself has {100 * teacher:.1f} % all right. Last column: difference of the means and "
        f"its standard error.\n\n{recipes}"
    )
    for name, best in results["cheapest"].items():
        text += (
            f"\n{METRICS[name][0]}: the cheapest recipe that is not worse than the paper's by more than a standard "
            f"error is *{best['recipe']}*, with {100 * best['share']:.1f} % of its evaluations"
            f" ({'at most' if best['within_a_quarter'] else 'more than'} a quarter).\n"
        )
    if len(results["variants"]) > 1:
        name = results["variants"][0]["name"]
        text += f"\nOne change each of *{name}*:\n\n{table(results['variants'], 'the first')}"
    return text


def cost_figure(recipes: Sequence[Mapping[str, Any]]) -> str:
    """Each score against all evaluations, a whisker a recipe."""
    panels = []
    ends = (min(row["evaluations"] for row in recipes) / 1.3, max(row["evaluations"] for row in recipes) * 1.3)
    for name in SCORES:
        values = [scaled(name, row["metrics"][name]) for row in recipes]
        ticks = whisker_ticks(values)
        plot = Plot(ends, (ticks[0], ticks[-1]), x_log=True)
        marks = "".join(
            whisker(plot, row["evaluations"], each, color(number))
            for number, (row, each) in enumerate(zip(recipes, values, strict=True))
        )
        chart = plot.svg(marks, "denoiser evaluations (logarithmic)", ticks, log_ticks(*ends), METRICS[name][0])
        keys = [(row["name"], color(number)) for number, row in enumerate(recipes)]
        panels.append(Panel(METRICS[name][0], METRICS[name][1], chart, keys))
    return figure(panels)
