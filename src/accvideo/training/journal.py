"""Where the metrics of a distillation go: a file, a progress bar, alarms and a tracker; and back from the file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from accvideo.training.checkpoint import metrics_log, read_metrics
from accvideo.training.distributed import rank
from accvideo.training.health import CHANCE_LOSSES, Watch
from accvideo.training.recipe import DistillConfig, settings
from accvideo.training.steps import Training
from accvideo.training.tracking import tracked


@contextmanager
def logged(
    config: DistillConfig, training: Training, num_steps: int, console: Console
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes each line of metrics, shows it, and rings alarms; on other ranks than the first, nothing.

    A resumed run goes on with the lines before `training.iteration`. The student has `num_steps` steps to train.
    """
    if rank() > 0:
        yield lambda line: None
        return
    path = config.out / "metrics.jsonl"
    begin = training.iteration
    with (
        tracked(config.track, config.out, settings(config), begin) as track,
        metrics_log(path, begin) as write,
        progress_bar(console, config, training) as show,
    ):
        watch = Watch(num_steps, CHANCE_LOSSES[config.adversarial_loss])
        for line in read_metrics(path):
            watch.look(line)

        def log(line: dict[str, Any]) -> None:
            write(line)
            track(line)
            show(line)
            for alarm in watch.look(line):
                write(alarm)
                track(alarm)
                console.print(f"alarm at iteration {alarm['iteration']}: {alarm['message']}")

        yield log


def last_validation(path: Path) -> dict[str, float]:
    """The last validation in a metrics file: loss by key point and latent error; empty if there is none."""
    for line in reversed(read_metrics(path)):
        if "latent_error" in line:
            losses = {f"validation_loss_{k}": loss for k, loss in enumerate(line["validation_loss"])}
            return losses | {"latent_error": line["latent_error"]}
    return {}


def last_count(path: Path) -> dict[str, int]:
    """How many iterations were skipped, by a metrics file; empty if an earlier version wrote it."""
    counts = [line["num_skipped"] for line in read_metrics(path) if "num_skipped" in line]
    return {"num_skipped": counts[-1]} if counts else {}


@contextmanager
def progress_bar(
    console: Console, config: DistillConfig, training: Training
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A live bar on stderr with smoothed losses and the time left; gives a function that takes each line of metrics."""
    columns = (
        TextColumn("distill"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    shown: dict[str, float] = {}
    labels = {
        "trajectory_loss": "trajectory",
        "consistency_loss": "consistency",
        "correction_loss": "correction",
        "generator_loss": "generator",
        "real_accuracy": "real right",
        "fake_accuracy": "fake right",
        "latent_error": "validation",
    }
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=config.num_iterations, completed=training.iteration)

        def show(line: dict[str, Any]) -> None:
            for name in labels.keys() & line.keys():
                share = 1.0 if name == "latent_error" else 0.1
                value = float(line[name])
                shown[name] = (1 - share) * shown.get(name, value) + share * value
            words = [f"{labels[name]} {shown[name]:.3f}" for name in labels if name in shown]
            if training.num_skipped:
                words.append(f"skipped {training.num_skipped}")
            progress.update(task, completed=line["iteration"] + 1, description="  ".join(words))

        yield show
