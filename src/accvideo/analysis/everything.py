"""All analyses of the playground one after the other: an estimate first, then each part, then one page of results."""

import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accvideo.analysis.ablation import BEYOND, FIGURE_7, FRACTIONS
from accvideo.analysis.budget import JUDGED, PAIRED
from accvideo.analysis.comparison import METHODS
from accvideo.analysis.cost import CostConfig, plan_recipes, plan_variants, work_left
from accvideo.analysis.coverage import NUM_FOLLOWED_LEVELS
from accvideo.analysis.estimate import CALLS, PLAYGROUND, Work, duration, show_estimate
from accvideo.analysis.folder import open_analysis
from accvideo.analysis.keypoints import CHOICES, write_part
from accvideo.analysis.toy import estimate_seconds
from accvideo.analysis.toy_training import Study
from accvideo.cli import COMMANDS, execute
from accvideo.command import choose_device
from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.manifest import MANIFEST
from accvideo.flow import even_grid
from accvideo.inference.acceleration import check_compiler
from accvideo.playground.prompts import PromptsConfig, prompts
from accvideo.playground.select import SelectConfig, select
from accvideo.record import record
from accvideo.recording.config import RecordConfig
from accvideo.teacher import PLAYGROUND_TEACHER, teacher_path
from accvideo.trajectory import write_whole
from accvideo.types import UserError

STUDENT_STEPS = 5
"""Of the students that the ablation compares, and of those that other methods are tuned for."""

ADVERSARIAL = 0.4
"""Share of the iterations in which the adversarial half takes part, as in the preset `playground`."""


@dataclass(frozen=True, kw_only=True)
class AllConfig:
    """Runs every analysis on the playground, one after the other, and writes one page of what they found.

    Says how long each will take first. What is done is kept: the same command goes on where a killed run stopped.
    """

    out: Path
    """Folder with a folder for each analysis, and the page `results.md`."""
    data: Path | None = None
    """Recording of the playground's teacher with all of its 50 states (`accvideo record ... --num-student-steps 50`);
    None: made here."""
    short: bool = False
    """The same in a few minutes, for a test: as few samples as there can be, numbers that mean nothing."""
    page: Path | None = None
    """Also fill a Markdown page of one's own: what stands between `<!-- NAME -->` and `<!-- /NAME -->` is replaced by
    the results of that analysis; figures and numbers go to the folder of the page's name beside it."""
    compile: bool = False
    """As for `accvideo distill`: training takes more than half of the time."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    num_trajectories: int = 512
    num_steps: int = 50
    """Of the teacher, all of whose states are recorded."""
    num_student_steps: tuple[int, ...] = (1, 2, 3, 4, 5, 8, 10)
    chosen: tuple[int, ...] = (2, 5, 8)
    """Numbers of steps for which students of all choices of key points are distilled."""
    num_seeds: int = 3
    toy_seeds: int = 5
    toy_iterations: tuple[int, int] = (10_000, 1500)
    """Of the 1-D study's teachers and students."""
    toy_trajectories: int = 8192
    num_step_seeds: int = 2
    """Of the students against their number of steps, which take as long as all ablations."""
    num_iterations: int = 200
    num_ablation_iterations: int = 100
    """Of the full method; others get as many evaluations."""
    batch_size: int = 16
    num_prompts: int = 500
    num_trial_prompts: int = 100
    figure_7: bool = False
    """Of the ablations, only the paper's own."""
    methods: tuple[str, ...] = (*METHODS, "every_state")
    method_steps: tuple[int, ...] = (STUDENT_STEPS, 2, 8)
    """Numbers of steps at which methods are compared; learning rates are tried at the first."""
    learning_rates: tuple[float, ...] = (5e-5, 2e-4, 8e-4)
    training_budget: int = 30_000
    """Denoiser evaluations of each student of the baselines, beside the recording's."""
    stretches: tuple[float, ...] = (0.0, 0.125, 0.25, 0.375, 0.5)
    num_followed: int = 64
    solver_prompts: int = 16
    solver_steps: tuple[int, ...] = (10, 15, 20, 25, 50)
    reference_steps: int = 500
    cost: tuple[int, int, int, int] = (480, 400, 600, 32)
    """Records, iterations, and the paper's iterations and batch size, of the comparison of costs."""
    cost_variants: bool = True

    @property
    def recording(self) -> int:
        """Denoiser evaluations of the recording."""
        return self.num_trajectories * self.num_steps * CALLS


SHORT = Sizes(
    num_trajectories=8,
    num_steps=10,
    num_student_steps=(1, 5),
    chosen=(5,),
    num_seeds=1,
    num_step_seeds=1,
    toy_seeds=1,
    toy_iterations=(20, 10),
    toy_trajectories=256,
    num_iterations=5,
    num_ablation_iterations=5,
    batch_size=2,
    num_prompts=2,
    num_trial_prompts=2,
    figure_7=True,
    methods=("trajectory", "dmd2"),
    method_steps=(STUDENT_STEPS, 1),
    learning_rates=(2e-4,),
    training_budget=200,
    stretches=(0.0, 0.5),
    num_followed=2,
    solver_prompts=1,
    solver_steps=(10,),
    reference_steps=20,
    cost=(4, 5, 5, 2),
    cost_variants=False,
)


@dataclass(frozen=True)
class Place:
    """Where the parts read and write."""

    data: Path
    """With every state."""
    cut: Path
    """The same with `STUDENT_STEPS` alone."""
    right: Path
    """Numbers of the trajectories that the judge finds right."""
    rows: Path
    """Rows of the teacher and of students, which all parts share."""
    out: Path


@dataclass(frozen=True)
class Part:
    """One analysis: the arguments of its command, but for `--out`, and its work."""

    arguments: list[str]
    work: Work


def words(*arguments: Any) -> list[str]:
    """Arguments of a command line."""
    return [str(each) for argument in arguments for each in (argument if isinstance(argument, tuple) else (argument,))]


def teacher_work(sizes: Sizes, numbers: Sequence[int]) -> Work:
    """The teacher's rows at some numbers of steps: at each guided, with equal calls (two ways), and by UniPC."""
    few = [CALLS * number + number + CALLS * (number // 2) + CALLS * number for number in numbers]
    rows = sum(4 if number > 1 else 3 for number in numbers)
    return Work(sampled=sum(few), clips=rows).times(sizes.num_prompts)


def whole_teacher_work(sizes: Sizes) -> Work:
    """The teacher's row at all of its steps."""
    return Work(sampled=CALLS * sizes.num_steps, clips=1).times(sizes.num_prompts)


def toy_part(sizes: Sizes, place: Place) -> Part:
    """The 1-D study, which estimates itself by a few of its iterations."""
    teacher, students = sizes.toy_iterations
    study = Study(
        seeds=range(sizes.toy_seeds),
        teacher_iterations=teacher,
        iterations=students,
        num_trajectories=sizes.toy_trajectories,
    )
    arguments = words("--num-seeds", sizes.toy_seeds, "--teacher-iterations", teacher, "--iterations", students)
    seconds = 0.0 if is_done(place.out, "toy") else estimate_seconds(study)
    return Part([*arguments, *words("--num-trajectories", sizes.toy_trajectories)], Work(seconds=seconds))


def coverage_part(sizes: Sizes, place: Place) -> Part:
    """Useless data points in latent space."""
    followed = sizes.num_followed * len(sizes.stretches) * NUM_FOLLOWED_LEVELS
    arguments = words(place.data, "--stretches", sizes.stretches, "--num-followed", sizes.num_followed)
    # From levels spaced evenly the teacher has half of its steps to go.
    work = Work(sampled=CALLS * sizes.num_steps / 2 * followed, clips=followed)
    return Part([*arguments, *words("--batch-size", sizes.batch_size)], work)


def keypoints_part(sizes: Sizes, place: Place) -> Part:
    """Key points: choosing them, and students of all choices."""
    num_students = len(CHOICES) * sizes.num_seeds
    arguments = words(place.data, "--num-student-steps", sizes.num_student_steps, "--distill", sizes.chosen)
    work = whole_teacher_work(sizes)
    work += Work(seconds=sizes.num_trajectories * sizes.num_steps**2 * 4e-5)
    for number in sizes.chosen:
        work += student_work(sizes, number).times(num_students)
    return Part([*arguments, *student_arguments(sizes), *words("--rows", place.rows)], work)


def ablation_part(sizes: Sizes, place: Place) -> Part:
    """The paper's Figure 7, and beyond."""
    sizes = replace(sizes, num_iterations=sizes.num_ablation_iterations)
    # Beyond them, another start of the adversarial half and chosen trajectories.
    num_variants = len(FIGURE_7) + (0 if sizes.figure_7 else len(BEYOND) + len(FRACTIONS) + 2)
    options = ("--figure-7",) if sizes.figure_7 else ("--keep", place.right)
    return Part(
        words(place.cut, options, *student_arguments(sizes), "--rows", place.rows),
        student_work(sizes, STUDENT_STEPS, adversarial=1.0).times(num_variants * sizes.num_seeds)
        + student_work(sizes, STUDENT_STEPS, adversarial=0.0).times(sizes.num_seeds)  # the one that is cut short
        + teacher_work(sizes, [STUDENT_STEPS]),
    )


def baselines_part(sizes: Sizes, place: Place) -> Part:
    """Other methods; what was tried with the best learning rate is used again."""
    num_tried = len(sizes.learning_rates) if len(sizes.learning_rates) > 1 else 0
    student = Work(trained=sizes.training_budget)
    work = student.times(len(sizes.methods) * (max(num_tried, 1) - 1))
    for number in sizes.method_steps:
        clips = Work(sampled=number, clips=1).times(sizes.num_prompts)
        work += (student + clips).times(len(sizes.methods) * sizes.num_seeds)
    if num_tried:
        trial = replace(sizes, num_prompts=sizes.num_trial_prompts)
        work += whole_teacher_work(trial) + teacher_work(trial, [STUDENT_STEPS])
        work += Work(sampled=STUDENT_STEPS, clips=1).times(num_tried * trial.num_prompts * len(sizes.methods))
    # At the first number the ablation has made the teacher's rows.
    work += teacher_work(sizes, sizes.method_steps[1:])
    arguments = words(
        place.data,
        "--budget", sizes.recording + sizes.training_budget,
        "--num-student-steps", sizes.method_steps,
        "--methods", sizes.methods,
        "--learning-rates", sizes.learning_rates,
        "--num-seeds", sizes.num_seeds,
        "--batch-size", sizes.batch_size,
        "--num-prompts", sizes.num_prompts,
        "--num-trial-prompts", sizes.num_trial_prompts,
        "--rows", place.rows,
    )  # fmt: skip
    return Part(arguments, work)


def steps_part(sizes: Sizes, place: Place) -> Part:
    """Students against their number of steps."""
    sizes = replace(sizes, num_seeds=sizes.num_step_seeds)
    numbers = sizes.num_student_steps
    # One for each number, and two kinds of one for all with as many iterations as these together.
    iterations = 3 * len(numbers) * sizes.num_iterations
    trained = Work(trained=iterations * sizes.batch_size * (PAIRED + ADVERSARIAL * JUDGED))
    tested = Work(sampled=3 * sum(numbers), clips=3 * len(numbers)).times(sizes.num_prompts)
    arguments = words(place.data, "--num-student-steps", numbers, *student_arguments(sizes))
    found = place.out / "baselines" / "baselines.json"
    return Part(
        [*arguments, *words("--baselines", found, "--rows", place.rows)],
        (trained + tested).times(sizes.num_seeds)
        + teacher_work(sizes, [number for number in numbers if number not in sizes.method_steps]),
    )


def errors_part(sizes: Sizes, place: Place) -> Part:
    """In which of its steps the student that ships goes wrong."""
    num_trajectories = sizes.num_trajectories // 2
    arguments = words(place.cut, "--students", "playground-student", "--num-trajectories", num_trajectories)
    work = Work(sampled=STUDENT_STEPS * (STUDENT_STEPS + 1) / 2, clips=STUDENT_STEPS + 1).times(num_trajectories)
    return Part([*arguments, *words("--batch-size", sizes.batch_size)], work)


def student_work(sizes: Sizes, num_student_steps: int, adversarial: float = ADVERSARIAL) -> Work:
    """Distilling and evaluating a student by the preset `playground`, or with another share of the adversarial half."""
    trained = sizes.num_iterations * sizes.batch_size * (PAIRED + adversarial * JUDGED)
    return Work(sizes.num_prompts * num_student_steps, trained, sizes.num_prompts)


def student_arguments(sizes: Sizes) -> list[str]:
    """What key points, ablation and steps are asked for alike."""
    names = ("num_seeds", "num_iterations", "batch_size", "num_prompts")
    return words(*((f"--{name.replace('_', '-')}", getattr(sizes, name)) for name in names))


def solvers_part(sizes: Sizes, place: Place) -> Part:
    """Recording by other solvers: four of them, and one for reference."""
    steps = 4 * sum({*sizes.solver_steps, 50}) + sizes.reference_steps
    arguments = words(
        PLAYGROUND,
        "--num-steps", sizes.solver_steps,
        "--reference-steps", sizes.reference_steps,
        "--num-prompts", sizes.solver_prompts,
        "--seed", 1,  # other prompts than the recording's
    )  # fmt: skip
    return Part(arguments, Work(sampled=CALLS * steps).times(sizes.solver_prompts))


def cost_part(sizes: Sizes, place: Place) -> Part:
    """What students cost; it counts for itself what is left."""
    records, iterations, paper_iterations, paper_batch = sizes.cost
    config = CostConfig(
        out=place.out / "cost",
        num_trajectories=records,
        num_iterations=iterations,
        paper_iterations=paper_iterations,
        paper_batch_size=paper_batch,
        batch_size=sizes.batch_size,
        num_seeds=sizes.num_seeds,
        num_prompts=sizes.num_prompts,
        variants=sizes.cost_variants,
    )
    recipes = plan_recipes(config)
    left = work_left(config, recipes + plan_variants(config, recipes), config.out / "cache")
    names = ("num_trajectories", "num_iterations", "paper_iterations", "paper_batch_size")
    names += ("batch_size", "num_seeds", "num_prompts")
    arguments = words(*((f"--{name.replace('_', '-')}", getattr(config, name)) for name in names))
    arguments += words("--rows", place.rows)
    if not config.variants:
        arguments += ["--no-variants"]
    return Part(arguments, sum(left.values(), Work()))


PARTS: dict[str, Callable[[Sizes, Place], Part]] = {
    "toy": toy_part,
    "coverage": coverage_part,
    "keypoints": keypoints_part,
    "solvers": solvers_part,
    "ablation": ablation_part,
    "baselines": baselines_part,
    "steps": steps_part,
    "errors": errors_part,
    "cost": cost_part,
}
"""By the name of the command `accvideo analyze NAME`, in the order in which they run. A new analysis takes a line here
and a function that says what it is asked for and how much that is, without the rows that an earlier one leaves it."""

DISTILLING = ("keypoints", "ablation", "baselines", "steps", "cost")
"""Those that train students."""


def all(config: AllConfig) -> dict[str, Any]:  # noqa: A001 - named as the command is
    """Record, run what is missing, and write the page.

    Raises:
        UserError: the folder holds something else, the recording is not of the playground's, or a page has no marks.
    """
    sizes = SHORT if config.short else Sizes()
    if config.page is not None:
        check_page(config.page)
    if config.data is not None:
        sizes = replace(sizes, num_trajectories=len(check_data(config.data, sizes)))
    cache = open_analysis(config.out, {"short": config.short, "data": str(config.data or "recorded here")})
    cache.mkdir(exist_ok=True)
    device = choose_device(config.device)
    if config.compile:
        check_compiler(device)
    place = Place(
        data=config.data or config.out / "data",
        cut=config.out / "data-5",
        right=config.out / "right.txt",
        rows=config.out / "rows",
        out=config.out,
    )
    parts = {name: make(sizes, place) for name, make in PARTS.items() if f"analyze {name}" in COMMANDS}
    missing = [name for name in parts if not is_done(config.out, name)]
    if missing:
        works = {name: parts[name].work for name in missing}
        if config.data is None and not (place.cut / MANIFEST).exists():
            works = {"recording": Work(sampled=sizes.recording), **works}
        show_estimate(works, sizes.batch_size, device, config.compile)
        prepare_data(config, sizes, place, device)
    for number, name in enumerate(missing, 1):
        print(f"{number} of {len(missing)}: accvideo analyze {name}", file=sys.stderr, flush=True)
        options = [] if name == "toy" else ["--device", device]  # the 1-D study runs on the CPU
        options += ["--compile"] if config.compile and name in DISTILLING else []
        with timed(cache / f"{name}.json"):
            execute(f"analyze {name}", [*parts[name].arguments, "--out", str(config.out / name), *options])
    sections = {name: section(config.out, name, part.arguments, cache) for name, part in parts.items()}
    page = config.out / "results.md"
    write_whole(page, fill(template(list(parts)), sections, "{name}/{name}").encode())
    if config.page is not None:
        fill_page(config.page, sections, config.out)
    return {"page": str(page), "folder": str(config.out), "parts": ", ".join(parts)}


def is_done(out: Path, name: str) -> bool:
    """Whether an analysis has written its results."""
    return (out / name / f"{name}.json").exists()


# Data


def check_data(data: Path, sizes: Sizes) -> TrajectoryFolder:
    """The data set, if all analyses can use it.

    Raises:
        UserError: it is not the playground's, or lacks states.
    """
    folder = TrajectoryFolder(data)
    manifest = folder.manifest
    if teacher_path(manifest.teacher) != PLAYGROUND_TEACHER or manifest.num_student_steps != sizes.num_steps:
        raise UserError(
            f"{data} is of {manifest.teacher} with {manifest.num_student_steps} of {sizes.num_steps} steps kept; all "
            f"analyses need the playground's with each\n"
            f"Record with --num-steps {sizes.num_steps} --num-student-steps {sizes.num_steps}, or leave --data out"
        )
    return folder


def prepare_data(config: AllConfig, sizes: Sizes, place: Place, device: str) -> None:
    """Record what is missing, cut it to the key points of `STUDENT_STEPS`, and judge it."""
    if config.data is None:
        file = config.out / "prompts.txt"
        prompts(PromptsConfig(out=file, num=sizes.num_trajectories))
        record(
            RecordConfig(
                teacher=PLAYGROUND,
                prompts=file,
                out=place.data,
                num_steps=sizes.num_steps,
                num_student_steps=sizes.num_steps,
                num_trajectories=sizes.num_trajectories,
                batch_size=min(16, sizes.num_trajectories),
                device=device,
            )
        )
    if not (place.cut / MANIFEST).exists():
        write_part(TrajectoryFolder(place.data), even_grid(sizes.num_steps, STUDENT_STEPS), place.cut)
    if not (place.right.exists() or sizes.figure_7):
        select(SelectConfig(data=str(place.cut), out=place.right, device=device))


@contextmanager
def timed(path: Path) -> Iterator[None]:
    """Adds the seconds of a context to those in a file, also where it is left by an error or Ctrl-C."""
    began = time.perf_counter()
    try:
        yield
    finally:
        before = json.loads(path.read_text("utf-8"))["seconds"] if path.exists() else 0.0
        write_whole(path, json.dumps({"seconds": before + time.perf_counter() - began}).encode())


# The page


def section(out: Path, name: str, arguments: Sequence[str], cache: Path) -> str:
    """What an analysis has found, in Markdown: its figure at `FIGURE`, and its table."""
    results = json.loads((out / name / f"{name}.json").read_text("utf-8"))
    seconds = json.loads((cache / f"{name}.json").read_text("utf-8"))["seconds"]
    command = shlex.join(["accvideo", "analyze", name, *(relative(each, out) for each in arguments), "--out", name])
    settings = results.get("settings", {})
    num_seeds = len(results["seeds"]) if "seeds" in results else settings.get("num_seeds", 1)
    facts = {
        "command": f"`{command}`",
        "commit": results["commit"],
        "device": results["device"],
        "seeds": num_seeds,
        "time": duration(seconds),
    }
    lines = "\n".join(f"* {fact}: {value}" for fact, value in facts.items())
    table = (out / name / f"{name}.md").read_text("utf-8")
    return f"{lines}\n\n![{COMMANDS[f'analyze {name}'][1]}](FIGURE.svg)\n\n[Numbers](FIGURE.json)\n\n{table}"


def relative(argument: str, out: Path) -> str:
    """An argument of a command line as it reads from inside the folder of all analyses."""
    path = Path(argument)
    return str(path.relative_to(out)) if path.is_relative_to(out) else argument


def template(names: Sequence[str]) -> str:
    """A page with a place for each analysis."""
    purposes = {name: COMMANDS[f"analyze {name}"][1] for name in names}
    parts = [
        f"## {purpose[0].upper()}{purpose[1:]}\n\n<!-- {name} -->\n<!-- /{name} -->\n"
        for name, purpose in purposes.items()
    ]
    return "\n".join(["# Results\n\nWritten by `accvideo analyze all`.\n", *parts])


def fill(text: str, sections: Mapping[str, str], figures: str) -> str:
    """A page whose marked places hold these sections; `figures` says where figures are, `{name}` in it for a name."""
    for name, found in sections.items():
        content = found.replace("(FIGURE.", f"({figures.format(name=name)}.")
        marked = f"<!-- {name} -->\n\n{content}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, marked=marked: marked, text, flags=re.DOTALL)
    return text


def check_page(page: Path) -> str:
    """The text of a page of the user's.

    Raises:
        UserError: it cannot be read, or has no place for any analysis.
    """
    try:
        text = page.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read the page {page}: {error}") from error
    if not any(f"<!-- {name} -->" in text and f"<!-- /{name} -->" in text for name in PARTS):
        raise UserError(
            f"{page} has no marks; put <!-- steps --> and <!-- /steps --> where results of steps shall stand"
        )
    return text


def fill_page(page: Path, sections: Mapping[str, str], out: Path) -> None:
    """Fill a page of the user's, and copy figures and numbers to the folder of its name beside it."""
    text, folder = check_page(page), page.with_suffix("")
    folder.mkdir(exist_ok=True)
    shown = {name: found for name, found in sections.items() if f"<!-- {name} -->" in text}
    for name in shown:
        for ending in ("svg", "json"):
            shutil.copyfile(out / name / f"{name}.{ending}", folder / f"{name}.{ending}")
    write_whole(page, fill(text, shown, f"{folder.name}/{{name}}").encode())
