"""AccVideo beside other methods of distillation: the same data set, the same number of denoiser evaluations."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from accvideo.analysis.baselines.training import Baseline, Recipe, train_baseline
from accvideo.analysis.budget import CONSISTENT, JUDGED, PAIRED
from accvideo.analysis.figure import figure, markdown_table
from accvideo.analysis.folder import open_analysis, origin, settings_of, write_results
from accvideo.analysis.keypoints import write_part
from accvideo.analysis.students import (
    Evaluation,
    curves_of,
    curves_panel,
    evaluate_kinds,
    metric_figure,
    metric_table,
)
from accvideo.command import choose_device, progress_bar
from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.manifest import MANIFEST, Manifest
from accvideo.distill import distill
from accvideo.flow import even_grid
from accvideo.inference.acceleration import check_compiler
from accvideo.inference.student_config import read_student_config
from accvideo.reporting.wording import METRICS
from accvideo.training.recipe import DistillConfig, fast_precision
from accvideo.training.start import check_states
from accvideo.types import UserError

Method = Literal["trajectory", "every_state", "accvideo", "consistency"] | Baseline
METHODS: tuple[Method, ...] = ("trajectory", "accvideo", "perflow", "consistency", "dmd2")

WHOLE_TEACHER = "teacher"
"""The row of the teacher at all its steps, as `accvideo evaluate` names it."""

ADVERSARIAL_START = 0.6
"""Share of the iterations of AccVideo's before the adversarial half, as in the preset `playground`."""


@dataclass(frozen=True, kw_only=True)
class BaselinesConfig:
    """Trains students by AccVideo and by other methods with equal budgets, and evaluates them side by side.

    Each method is tried with all learning rates on the first seed, on prompts of their own; the best one is used for
    all seeds and numbers of steps. Finished students and rows are kept: the same command goes on where a killed run
    stopped.
    """

    data: Positional[str]
    """Data set that `accvideo record` made."""
    out: Path
    """Folder for students, numbers, table and figure."""
    budget: int
    """Denoiser evaluations for each student, for one sample each: forward 1, backward 2; the recording counts."""
    methods: tuple[Method, ...] = METHODS
    """What to compare. "trajectory" is AccVideo without its adversarial half, "every_state" the same from all recorded
    states: not by default, since it needs more of them than any K. Three more ask why consistency differs: from
    recorded noise instead of fresh, at key points' levels alone, and both."""
    num_student_steps: tuple[int, ...] = ()
    """Numbers of steps K, for each those of the recorded states that lie evenly; none: as recorded."""
    num_seeds: int = 3
    """Students of each method and number of steps."""
    learning_rates: tuple[float, ...] = (5e-5, 2e-4, 8e-4)
    """Tried for each method, at the first number of steps."""
    batch_size: int = 16
    """Trajectories an iteration."""
    num_prompts: int = 500
    """Clips of each row."""
    num_trial_prompts: int = 100
    """Clips of each row while learning rates are tried."""
    prompts: Path | None = None
    """As for `accvideo evaluate`; needed where the teacher is not the playground's."""
    rows: Path | None = None
    """As for `accvideo evaluate`: analyses that share it make the teacher's clips once."""
    compile: bool = False
    """As for `accvideo distill`."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one."""

    def __post_init__(self) -> None:
        for name in ("num_seeds", "batch_size", "num_prompts", "num_trial_prompts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not self.methods or not self.learning_rates:
            raise UserError("methods and learning_rates need at least one entry each")
        if len(set(self.num_student_steps)) < len(self.num_student_steps):
            raise UserError(f"num_student_steps is {self.num_student_steps}; give each number once")


@dataclass(frozen=True)
class Run:
    """One student to train."""

    method: Method
    num_steps: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.method}-{self.num_steps}-{self.learning_rate:g}-{self.seed}"


def baselines(config: BaselinesConfig) -> dict[str, Any]:
    """Train, evaluate, and write baselines.json, .md and .svg.

    Raises:
        UserError: the budget does not go beyond the recording, or whatever distillation and evaluation refuse.
    """
    folder = TrajectoryFolder(config.data)
    recorded = folder.manifest.num_student_steps
    grids = [even_grid(recorded, number) for number in config.num_student_steps or (recorded,)]
    check_budget(config, folder)
    for grid in grids if "every_state" in config.methods else ():
        check_states(config.data, recorded, (len(grid) - 1,))
    evaluation(config, Path(), config.num_prompts, seed=0).check_prompts(folder.manifest.teacher)
    if config.compile:
        check_compiler(choose_device(config.device))
    settings = settings_of(config)
    cache = open_analysis(config.out, settings)
    folders = {len(grid) - 1: part_of(folder, grid, cache) for grid in grids}
    first = next(iter(folders))
    trials, best = choose_rates(config, cache, first, folders[first])
    rows, spent = [], {method: {} for method in config.methods}
    for number, part in folders.items():
        kinds = {
            method: [
                train(config, Run(method, number, best[method], seed), cache, part) for seed in range(config.num_seeds)
            ]
            for method in config.methods
        }
        found = evaluate_kinds(kinds, evaluation(config, cache / f"report-{number}", config.num_prompts, seed=0))
        # The teacher at all its steps stands beside each number; once is enough.
        rows += [
            row | {"num_student_steps": number} for row in found if number == first or row["name"] != WHOLE_TEACHER
        ]
        for method, students in kinds.items():
            spent[method][number] = spent_evaluations(students[0], part)
    results = {
        "command": f"accvideo analyze baselines {config.data} --out DIR --budget {config.budget}",
        **origin(choose_device(config.device)),
        "settings": settings,
        "teacher": folder.manifest.teacher,
        "num_trajectories": len(folder),
        "recording": recording_of(folder),
        "learning_rates": best,
        "evaluations": spent,
        "trials": trials,
        "rows": rows,
    }
    return write_results(config.out, "baselines", results, baselines_table(results), baselines_figure(results))


def part_of(folder: TrajectoryFolder, points: Sequence[int], cache: Path) -> TrajectoryFolder:
    """The data set with these of its key points alone, written to the cache unless they are all that there are."""
    if len(points) - 1 == folder.manifest.num_student_steps:
        return folder
    out = cache / f"data-{len(points) - 1}"
    if not (out / MANIFEST).exists():
        write_part(folder, points, out)
    return TrajectoryFolder(out)


def recording_of(folder: TrajectoryFolder) -> int:
    """Denoiser evaluations that the recording took."""
    return folder.manifest.denoiser_calls * len(folder)


def evaluation(config: BaselinesConfig, out: Path, num_prompts: int, seed: int) -> Evaluation:
    """How students are evaluated, for trials or in the end."""
    return Evaluation(
        out=out, num_prompts=num_prompts, prompts=config.prompts, seed=seed, device=config.device, rows=config.rows
    )


def check_budget(config: BaselinesConfig, folder: TrajectoryFolder) -> None:
    """Refuses a budget that the recording alone spends.

    Raises:
        UserError: as said.
    """
    least = recording_of(folder) + 100 * config.batch_size
    if config.budget < least:
        raise UserError(f"budget is {config.budget}; recording alone took {recording_of(folder)}, the least is {least}")


def choose_rates(
    config: BaselinesConfig, cache: Path, num_steps: int, folder: TrajectoryFolder
) -> tuple[list[dict[str, Any]], dict[Method, float]]:
    """The trials, with what each led to, and the best learning rate of each method.

    Best is right most often by the judge, or, where nothing is judged, nearest to the teacher's own latents.
    """
    if len(config.learning_rates) == 1:
        return [], dict.fromkeys(config.methods, config.learning_rates[0])
    runs = [Run(method, num_steps, rate, 0) for method in config.methods for rate in config.learning_rates]
    kinds = {run.name: [train(config, run, cache, folder)] for run in runs}
    rows = evaluate_kinds(kinds, evaluation(config, cache / "trials", config.num_trial_prompts, seed=1))
    metrics = {row["name"]: row["metrics"] for row in rows}

    def score(run: Run) -> float:
        mine = metrics[run.name]
        return mine["all_right"][0] if "all_right" in mine else -mine["latent_mse"][0]

    trials = [asdict(run) | {"score": score(run)} for run in runs]
    best: dict[Method, float] = {
        method: max((run for run in runs if run.method == method), key=score).learning_rate for method in config.methods
    }
    return trials, best


def train(config: BaselinesConfig, run: Run, cache: Path, folder: TrajectoryFolder) -> Path:
    """Train a student of the key points of `folder`, or of every state, unless it is there already; its own folder."""
    out, device = cache / run.name, choose_device(config.device)
    if (out / "student.json").exists():
        return out
    if run.method in ("trajectory", "every_state", "accvideo", "consistency"):
        left = config.budget - recording_of(folder)
        start = ADVERSARIAL_START if run.method == "accvideo" else 1.0
        lesson = lesson_evaluations("consistency" if run.method == "consistency" else "trajectory", folder.manifest)
        num_iterations = round(left / (config.batch_size * (lesson + (1 - start) * JUDGED)))
        distill(
            DistillConfig(
                data=config.data if run.method == "every_state" else str(folder.path),
                out=out,
                num_student_steps=(run.num_steps,),
                num_iterations=num_iterations,
                batch_size=config.batch_size,
                full=True,
                learning_rate=run.learning_rate,
                loss="consistency" if run.method == "consistency" else "trajectory",
                every_state=run.method == "every_state",
                adversarial_weight=0.1 if run.method == "accvideo" else 0.0,
                adversarial_start=round(start * num_iterations),
                num_validation=0,
                compile=config.compile,
                device=device,
                seed=run.seed,
            )
        )
        return out
    recipe = Recipe(
        method=run.method,
        learning_rate=run.learning_rate,
        budget=config.budget,
        seed=run.seed,
        batch_size=config.batch_size,
        precision=fast_precision(device),
        compile=config.compile,
        device=device,
    )
    with progress_bar() as progress:
        train_baseline(recipe, str(folder.path), out, progress)
    return out


def lesson_evaluations(loss: str, manifest: Manifest) -> int:
    """Evaluations for a sample of the teacher-forced half; consistency asks the teacher for a step."""
    return CONSISTENT + manifest.denoiser_calls // manifest.num_steps if loss == "consistency" else PAIRED


def spent_evaluations(student: Path, folder: TrajectoryFolder) -> int:
    """Evaluations that a finished student took, recording included: by its own account, or by its recipe."""
    recipe = read_student_config(student).recipe
    if "evaluations" in recipe:
        return recipe["evaluations"]
    judged = recipe["num_iterations"] - recipe["adversarial_start"] if recipe["adversarial_weight"] else 0
    training = recipe["num_iterations"] * lesson_evaluations(recipe["loss"], folder.manifest) + judged * JUDGED
    return recording_of(folder) + recipe["batch_size"] * training


def baselines_table(results: Mapping[str, Any]) -> str:
    """All metrics of all rows, and the trials, in Markdown."""
    settings, spent = results["settings"], results["evaluations"]
    rates = {method: f"{rate:g}" for method, rate in results["learning_rates"].items()}
    given = [[method, rates[method], *(f"{each:,}" for each in spent[method].values())] for method in spent]
    numbers = [f"denoiser evaluations, K = {number}" for number in next(iter(spent.values()))]
    text = (
        f"Mean and deviation of {settings['num_seeds']} students; {settings['budget']:,} denoiser evaluations each, of "
        f"which recording took {results['recording']:,}.\n\n{metric_table(results['rows'])}\n"
        f"What each took:\n\n{markdown_table(['method', 'learning rate', *numbers], given)}"
    )
    trials = [[each["method"], f"{each['learning_rate']:g}", f"{each['score']:.4g}"] for each in results["trials"]]
    if trials:
        text += f"\nTrials, on other prompts:\n\n{markdown_table(['method', 'learning rate', 'score'], trials)}"
    return text


def baselines_figure(results: Mapping[str, Any]) -> str:
    """A line a row or, of several numbers of steps, each method's metrics against them.

    The teacher at so few steps is in the table: in the figure, methods would lie on one another below it.
    """
    rows = results["rows"]
    if len({row["num_student_steps"] for row in rows}) == 1:
        return metric_figure(rows)
    panels = []
    for name in METRICS:
        curves = curves_of(name, rows)
        level = next(((WHOLE_TEACHER, values) for values in curves.get(WHOLE_TEACHER, {}).values()), None)
        own = {method: curves[method] for method in results["learning_rates"] if method in curves}
        if own:
            panels.append(curves_panel(name, own, level, dodge=4))
    return figure(panels)
