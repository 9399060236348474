"""Train well and badly on the embedded playground, and draw the pictures of docs/healthy-training.md.

    accvideo playground prompts --num 256 --out prompts.txt
    accvideo record playground --prompts prompts.txt --batch-size 32 --out trajectories
    python benchmarks/healthy_training.py trajectories

Four runs that differ in one setting each, one after the other, about a second an iteration on one core; those that went
wrong are stopped soon after it showed. Their metrics go to docs/healthy-training/metrics.json, which the tests of the
alarms read too, and the pictures beside it. `--only NAME` makes one run, `--draw` none: it draws what
metrics.json holds.
"""

import argparse
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from accvideo.distill import DistillConfig, distill
from accvideo.reporting.charts import Plot, log_ticks, nice_ticks
from accvideo.training.checkpoint import read_metrics
from accvideo.training.health import CHANCE_LOSSES, Watch

FOLDER = Path(__file__).parents[1] / "docs" / "healthy-training"

RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "healthy": ({}, 60),
    "learning rate x 100": ({"learning_rate": 2e-2}, 20),
    "adversarial weight 10": ({"adversarial_weight": 10.0}, 35),
    "frozen heads": ({"head_learning_rate": 0.0}, 42),
}
"""What differs from the healthy recipe, and the iteration at which the run is stopped."""

COLORS = (
    ("#1a7f37", "#3fb950"),
    ("#cf222e", "#ff7b72"),
    ("#8250df", "#d2a8ff"),
    ("#9a6700", "#d29922"),
    ("#0969da", "#58a6ff"),
)
"""Of the curves, in their order, on a light page and on a dark one."""


def recipe(data: Path, out: Path) -> DistillConfig:
    """Few iterations, so that the whole takes minutes; the heads come in after two sweeps."""
    return DistillConfig(
        data=data,
        out=out,
        num_iterations=60,
        batch_size=16,
        full=True,
        learning_rate=2e-4,
        schedule="cosine",
        adversarial_start=10,
        num_validation=8,
        validate_every=10,
        device="cpu",
    )


def make(name: str, data: Path, out: Path) -> None:
    """Train until the iteration at which the run is stopped."""
    changes, stop = RUNS[name]
    config = replace(recipe(data, out), **changes)
    process = multiprocessing.get_context("spawn").Process(target=distill, args=(config,))
    process.start()
    while process.is_alive() and not any(line["iteration"] >= stop for line in read_metrics(out / "metrics.jsonl")):
        process.join(1)
    process.terminate()
    process.join()


def lines_of(name: str, out: Path) -> list[dict[str, Any]]:
    """The metrics of a run without its alarms, in four digits."""
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "alarm" not in line]
    return json.loads(
        json.dumps([line for line in lines if line["iteration"] < RUNS[name][1]]),
        parse_float=lambda text: float(f"{float(text):.4g}"),
    )


def alarms_of(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The alarms that ring at these lines."""
    watch = Watch(5, CHANCE_LOSSES["nonsaturating"])
    return [alarm for line in lines for alarm in watch.look(line)]


# --- Pictures ---

Points = list[tuple[float, float]]

STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #57606a } .title { font-size: 14px; font-weight: 600; fill: #1f2328 }
.axis { stroke: #d0d7de } .limit { stroke: #57606a; stroke-dasharray: 3 4 } polyline { fill: none; stroke-width: 2 }
%s
@media (prefers-color-scheme: dark) {
text { fill: #9198a1 } .title { fill: #f0f6fc } .axis { stroke: #3d444d } .limit { stroke: #9198a1 }
%s
}
</style>"""


def style() -> str:
    """Colors for a light page and for a dark one."""
    sides = []
    for side in range(2):
        rules = [
            f".run{i} {{ stroke: {colors[side]} }} .bell{i} {{ fill: {colors[side]} }}"
            for i, colors in enumerate(COLORS)
        ]
        sides.append("\n".join(rules))
    return STYLE % tuple(sides)


def picture(
    title: str,
    curves: dict[str, Points],
    bells: dict[str, list[int]],
    limits: Sequence[float] = (),
    logarithmic: bool = True,
) -> str:
    """One chart: a curve a run or key point, a bell where its alarm rang, dotted lines at the limits."""
    ys = [y for points in curves.values() for _, y in points if math.isfinite(y)] + list(limits)
    low, high = (min(ys) / 1.2, max(ys) * 1.2) if logarithmic else (min(ys), max(ys))
    ticks = log_ticks(low, high) if logarithmic else nice_ticks(low, high)
    plot = Plot((0, 60), (low, high) if logarithmic else (ticks[0], ticks[-1]), y_log=logarithmic)
    marks = [f'<line class="limit" x1="44" x2="428" y1="{plot.y(y):.1f}" y2="{plot.y(y):.1f}"/>' for y in limits]
    for i, name in enumerate(curves):
        if not (points := [(x, y) for x, y in curves[name] if math.isfinite(y)]):
            continue
        path = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in points)
        marks.append(f'<polyline class="run{i}" points="{path}"><title>{escape(name)}</title></polyline>')
        for bell in bells.get(name, ()):
            x, y = min(points, key=lambda point: abs(point[0] - bell))
            marks.append(
                f'<circle class="bell{i}" cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="5"><title>alarm at iteration '
                f"{bell}</title></circle>"
            )
    num_columns = 2 if len(curves) <= 4 else 5
    keys = []
    for i, name in enumerate(curves):
        x, y = 44 + 400 // num_columns * (i % num_columns), 290 + 18 * (i // num_columns)
        keys.append(f'<line class="run{i}" x1="{x}" x2="{x + 20}" y1="{y}" y2="{y}" stroke-width="2"/>')
        keys.append(f'<text x="{x + 26}" y="{y + 4}">{escape(name)}</text>')
    chart = plot.svg("".join(marks), "iteration", ticks, range(0, 61, 10), title)
    body = chart[chart.index(">") + 1 : -len("</svg>")]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -24 440 340" role="img" aria-label="{escape(title)}">'
        f'{style()}<text class="title" x="8" y="-8">{escape(title)}</text>{body}{"".join(keys)}</svg>\n'
    )


def sweeps(lines: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> Points:
    """Means over whole sweeps of the five key points, for lines that have the value."""
    found = []
    for line in lines:
        try:
            found.append((line["iteration"], value(line)))
        except KeyError:
            continue
    groups = [found[i : i + 5] for i in range(0, len(found) - 4, 5)]
    return [(group[-1][0], sum(y for _, y in group) / 5) for group in groups]


def validations(lines: Sequence[dict[str, Any]], name: str) -> Points:
    """A value at the start and at each validation."""
    start = [(0.0, line["start"][name]) for line in lines if "start" in line]
    return start + [(line["iteration"], line[name]) for line in lines if "latent_error" in line]


def draw(runs: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """The pictures by file name."""
    alarms = {name: alarms_of(lines) for name, lines in runs.items()}

    def bells(*kinds: str) -> dict[str, list[int]]:
        return {
            name: [alarm["iteration"] for alarm in rung if alarm["alarm"] in kinds] for name, rung in alarms.items()
        }

    starts = {
        name: next(line["start"]["validation_loss"] for line in lines if "start" in line)
        for name, lines in runs.items()
    }

    def pull(line: dict[str, Any]) -> float:
        return math.log(line["adversarial_gradient_norm"] / line["trajectory_gradient_norm"])

    def each(points: Callable[[str, list[dict[str, Any]]], Points]) -> dict[str, Points]:
        return {name: points(name, lines) for name, lines in runs.items()}

    loss = each(
        lambda name, lines: sweeps(lines, lambda line: line["trajectory_loss"] / starts[name][line["keypoint"]])
    )
    pulls = each(lambda name, lines: [(x, math.exp(y)) for x, y in sweeps(lines, pull)])
    heads = each(lambda name, lines: sweeps(lines, lambda line: line["head_loss"]))

    def judged_right(line: dict[str, Any]) -> float:
        return 50 * (line["real_accuracy"] + line["fake_accuracy"])

    def by_keypoint(value: Callable[[dict[str, Any]], float]) -> dict[str, Points]:
        """Of the healthy run, for each key point that a step ends at: 1 follows the noise, 5 is the video."""
        judged = [line for line in runs["healthy"] if "head_loss" in line]
        return {
            f"{number + 1}": [(line["iteration"], value(line)) for line in judged if line["keypoint"] == number]
            for number in range(5)
        }

    pictures = {
        "trajectory-loss": picture("Trajectory loss over the teacher's own at 5 steps", loss, bells("diverging"), [2]),
        "pull": picture("Adversarial over trajectory gradient norm", pulls, bells("adversarial_pull"), [1]),
        "head-loss": picture("Loss of the heads", heads, bells("heads_idle"), [CHANCE_LOSSES["nonsaturating"]], False),
        "accuracy": picture(
            "Tokens that the heads judge right, %",
            each(lambda name, lines: sweeps(lines, judged_right)),
            {},
            [50],
            False,
        ),
        "accuracy-by-key-point": picture(
            "Healthy: tokens judged right by key point, %",
            by_keypoint(judged_right),
            {},
            [50],
            False,
        ),
        "logit-gap": picture(
            "Logit gap, the teacher's less the student's",
            each(lambda name, lines: sweeps(lines, lambda line: line["logit_gap"])),
            {},
            [0],
            False,
        ),
        "logit-gap-by-key-point": picture(
            "Healthy: logit gap by key point", by_keypoint(lambda line: line["logit_gap"]), {}, [0], False
        ),
        "latent-error": picture(
            "Distance to the teacher's held-out latents",
            each(lambda name, lines: validations(lines, "latent_error")),
            bells("worse_than_start"),
        ),
        "saturation": picture(
            "Values beyond the teacher's usual range, %",
            each(lambda name, lines: [(x, 100 * y) for x, y in validations(lines, "saturation")]),
            bells("saturation"),
            [2],
        ),
    }
    for name in ("contrast", "motion", "diversity"):
        curves = each(lambda run, lines, name=name: validations(lines, name))
        title = f"{name.capitalize()} over the teacher's"
        pictures[name] = picture(title, curves, bells(name), [1], logarithmic=name == "motion")
    return pictures


def main() -> None:
    """Make the runs that are asked for, gather their metrics, draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder of recorded trajectories of the playground")
    parser.add_argument("--out", type=Path, default=Path("runs/healthy-training"), help="folder of the students")
    parser.add_argument("--only", choices=RUNS, help="the one run to make")
    parser.add_argument("--draw", action="store_true", help="make no run, draw metrics.json again")
    arguments = parser.parse_args()
    metrics = FOLDER / "metrics.json"
    if not arguments.draw:
        if arguments.data is None:
            parser.error("give the folder of trajectories, or --draw")
        folders = {name: arguments.out / name.replace(" ", "-") for name in RUNS}
        for name in [arguments.only] if arguments.only else RUNS:
            make(name, arguments.data, folders[name])
        if arguments.only:
            return
        lines = {name: lines_of(name, folder) for name, folder in folders.items()}
        tables = {name: ",\n".join(map(json.dumps, each)) for name, each in lines.items()}
        rows = ",\n".join(f"{json.dumps(name)}: [\n{table}\n]" for name, table in tables.items())
        FOLDER.mkdir(parents=True, exist_ok=True)
        metrics.write_text(f"{{\n{rows}\n}}\n", "utf-8")
    runs = json.loads(metrics.read_text("utf-8"))
    for name, text in draw(runs).items():
        (FOLDER / f"{name}.svg").write_text(text, "utf-8")
    for name, lines in runs.items():
        for alarm in alarms_of(lines):
            print(f"{name}, iteration {alarm['iteration']}, {alarm['alarm']}: {alarm['message']}", file=sys.stderr)


if __name__ == "__main__":
    main()
