"""The whole loop on the embedded playground: record, distill, evaluate, and a page to look at."""

import time
from dataclasses import replace
from typing import Any

from rich.console import Console

from accvideo.distill import distill
from accvideo.evaluate import evaluate
from accvideo.playground.config import DemoConfig
from accvideo.playground.prompts import PromptsConfig, prompts
from accvideo.record import record
from accvideo.recording.config import RecordConfig
from accvideo.reporting.config import EvaluateConfig
from accvideo.training.recipe import playground

NUM_STEPS = 25
"""Steps of a recording, of second order: as good for a student as the teacher's own 50 (docs/recording.md)."""


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run all stages; returns the report, the seconds of each stage and where the page is."""
    console, seconds, clock = Console(stderr=True), {}, time.perf_counter()

    def finished(stage: str) -> None:
        nonlocal clock
        seconds[stage], clock = time.perf_counter() - clock, time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[bold]{text}[/bold]", highlight=False)

    data, student, report = config.out / "trajectories", config.out / "student", config.out / "report"
    file = config.out / "prompts.txt"
    say(f"1/3  Record {config.num_trajectories} trajectories of the teacher: {NUM_STEPS} steps of second order each")
    prompts(PromptsConfig(out=file, num=config.num_trajectories, seed=config.seed))
    record(
        RecordConfig(
            teacher="playground",
            prompts=file,
            out=data,
            num_trajectories=config.num_trajectories,
            solver="adams2",
            num_steps=NUM_STEPS,
            batch_size=16,
            seed=config.seed,
        )
    )
    finished("record")

    say("2/3  Distill a student of 5 steps, 5 denoiser calls")
    recipe = playground(str(data), student)
    share = config.num_iterations / recipe.num_iterations
    distill(
        replace(
            recipe,
            num_iterations=config.num_iterations,
            adversarial_start=round(share * recipe.first_adversarial),
            seed=config.seed,
        )
    )
    finished("distill")

    say(f"3/3  Compare them on {config.num_prompts} prompts that neither has seen")
    result = evaluate(
        EvaluateConfig(
            student=str(student),
            out=report,
            num_prompts=config.num_prompts,
            seed=config.seed,
            also=("playground-student",),
        )
    )
    finished("evaluate")
    page = (report / "index.html").resolve()
    say(f"Look at {page}")
    return {"page": str(page), "seconds": seconds | {"total": sum(seconds.values())}, "report": result}
