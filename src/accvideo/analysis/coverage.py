"""How often a forward-diffused point lies off every recorded trajectory, and what the teacher makes of it there.

The paper's useless data points (arXiv:2503.19462, section 3.2), which it counts in one dimension, in as many as videos
have. There no point lies on a trajectory that was recorded from other noise, not even a new one of the teacher's own.
So a point counts as off if it is farther from the nearest recorded trajectory, at its noise level, than all but a given
share of the teacher's own new states are.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tyro.conf import Positional

from accvideo.analysis.baselines.perflow import solve
from accvideo.analysis.baselines.training import Recipe, start
from accvideo.analysis.figure import Panel, color, dot, figure, markdown_table, polyline
from accvideo.analysis.folder import open_analysis, origin, settings_of, write_results
from accvideo.command import choose_device, progress_bar
from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.manifest import Manifest
from accvideo.flow import even_grid, noised
from accvideo.generate import batches
from accvideo.metrics import Clips, wilson_interval
from accvideo.playground.judge import judge
from accvideo.reporting.charts import Plot, nice_ticks
from accvideo.teacher import PLAYGROUND_TEACHER, load_pipeline, teacher_path
from accvideo.training.guidance import GuidedTeacher
from accvideo.trajectory import TrajectoryBatch, collate_trajectories, write_whole
from accvideo.types import Latents, UserError

NUM_FOLLOWED_LEVELS = 4
"""Noise levels, spaced evenly among the recorded ones, from which the teacher is followed to the video."""


@dataclass(frozen=True, kw_only=True)
class CoverageConfig:
    """Measures how far forward-diffused videos lie from recorded trajectories, and where the teacher leads from there.

    One half of the trajectories covers; the videos of the other are noised anew, as they are and moved away from the
    mean of all videos, as the paper's 1-D study moves its two points. Writes coverage.json, .md, .svg.
    """

    data: Positional[Path]
    """Data set that `accvideo record` made."""
    out: Path
    """Folder for numbers, table and figure."""
    stretches: tuple[float, ...] = (0.0, 0.125, 0.25, 0.375, 0.5)
    """How far videos are moved from their mean, as a share of their distance from it. The defaults are those of the 1-D
    study at M = 0, 0.75, 1.5, 2.25 and 3."""
    beyond: float = 0.01
    """Share of the teacher's own new states that count as off, by which the distance is set."""
    num_followed: int = 64
    """Videos from whose noised points the teacher is followed, at each of four levels and each stretch; 0: none."""
    batch_size: int = 16
    """Videos denoised together."""
    seed: int = 0
    """Of the noise."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one."""

    def __post_init__(self) -> None:
        if not self.stretches or min(self.stretches) < 0:
            raise UserError(f"stretches is {self.stretches}; give numbers from 0")
        if not 0 < self.beyond < 1 or self.num_followed < 0 or self.batch_size < 1:
            raise UserError(
                f"beyond {self.beyond}, num_followed {self.num_followed}, batch_size {self.batch_size}: give a share "
                "between 0 and 1, a number from 0, and one from 1"
            )


def coverage(config: CoverageConfig) -> dict[str, Any]:
    """Measure, and write numbers, table and figure.

    Raises:
        UserError: there are too few trajectories; what loading the teacher refuses.
    """
    folder = TrajectoryFolder(config.data)
    if len(folder) < 4:
        raise UserError(f"{config.data} holds {len(folder)} trajectories; two halves need at least 4")
    cache = open_analysis(config.out, settings_of(config))
    cache.mkdir(exist_ok=True)
    covering, probing = range(len(folder) // 2), range(len(folder) // 2, len(folder))
    sigmas = folder.manifest.key_sigmas[:-1].tolist()
    center = states_at(folder, covering, -1).mean(0)
    rows = []
    for stretch in config.stretches:
        videos = stretched(states_at(folder, probing, -1), center, stretch)
        levels = [
            measure_level(
                states_at(folder, covering, level),
                states_at(folder, probing, level),
                noised(videos, noise_of(config.seed, level, videos), sigma),
                config.beyond,
            )
            for level, sigma in enumerate(sigmas)
        ]
        rows.append({"stretch": stretch, "share": statistics.fmean(each["share"] for each in levels), "levels": levels})
    results = {
        "command": f"accvideo analyze coverage {config.data} --out DIR",
        **origin(choose_device(config.device)),
        "settings": settings_of(config),
        "num_trajectories": {"covering": len(covering), "probing": len(probing)},
        "sigmas": sigmas,
        "rows": rows,
        "followed": follow_all(config, folder, probing[: config.num_followed], center, cache),
    }
    return write_results(config.out, "coverage", results, coverage_table(results), coverage_figure(results))


def states_at(folder: TrajectoryFolder, indices: Sequence[int], level: int) -> Latents:
    """The states of some trajectories at one of the recorded levels."""
    return torch.stack([folder[index].states[level] for index in indices])


def noise_of(seed: int, level: int, like: Latents) -> Latents:
    """Fresh noise for a batch at a noise level."""
    generator = torch.Generator().manual_seed((seed << 16) + level)
    return torch.randn(like.shape, generator=generator)


def stretched(videos: Latents, center: Latents, stretch: float) -> Latents:
    """Videos moved away from a center by a share of their distance from it."""
    return center + (1 + stretch) * (videos - center)


def nearest(points: Latents, states: Latents) -> Float[Tensor, " batch"]:
    """Root mean squared distance from each point to the nearest of some states."""
    flat, others = points.flatten(1), states.flatten(1)
    return torch.cdist(flat, others).min(1).values / flat.shape[1] ** 0.5


def off_share(distances: Tensor, own: Tensor, beyond: float) -> float:
    """Share of the distances that are larger than all but a share `beyond` of the teacher's own."""
    return float((distances > own.quantile(1 - beyond)).float().mean())


def measure_level(covering: Latents, own: Latents, points: Latents, beyond: float) -> dict[str, float]:
    """At one noise level: the share of points that are off, and mean distances of these and of the teacher's own."""
    distances, reference = nearest(points, covering), nearest(own, covering)
    return {
        "share": off_share(distances, reference, beyond),
        "distance": float(distances.mean()),
        "own_distance": float(reference.mean()),
    }


# Where the teacher leads


def follow_all(
    config: CoverageConfig, folder: TrajectoryFolder, indices: Sequence[int], center: Latents, cache: Path
) -> list[dict[str, Any]]:
    """How the teacher goes on from noised points; the rows are kept in the folder `cache`.

    Each has the noise level, the stretch, the error, and the share of right clips where they are judged. The error is
    the mean squared distance of the video that the teacher arrives at from the one that was noised, as a share of that
    between two videos: 0 for the teacher's own states, 1 where nothing of the video is left. The first row is that of
    the recorded videos themselves.
    """
    if not indices:
        return []
    manifest, device = folder.manifest, choose_device(config.device)
    teacher = start(Recipe(method="perflow", learning_rate=0.0, budget=0, device=device), folder).teacher
    pipeline: Any = None
    if teacher_path(manifest.teacher) == PLAYGROUND_TEACHER:
        pipeline = load_pipeline(manifest.teacher, getattr(torch, manifest.dtype), device, revision=manifest.revision)
    videos, prompts = states_at(folder, indices, -1), [folder[index].prompt for index in indices]
    apart = float((videos - videos.roll(1, 0)).square().mean())
    num_steps = manifest.num_student_steps
    points = even_grid(num_steps, min(num_steps, NUM_FOLLOWED_LEVELS + 1))[1:-1]
    rows: list[dict[str, Any]] = [
        {"sigma": 0.0, "stretch": None, "error": 0.0, **judged(pipeline, videos, prompts, config.batch_size)}
    ]
    with progress_bar() as progress:
        bar = progress.add_task("following the teacher", total=len(points) * len(config.stretches) * len(indices))
        for point in points:
            for stretch in config.stretches:
                path = cache / f"{point}-{stretch:g}.json"
                if not path.exists():
                    sigma, moved = float(manifest.key_sigmas[point]), stretched(videos, center, stretch)
                    begun = noised(moved, noise_of(config.seed, point, videos), sigma)
                    ends = []
                    for block in batches(len(indices), config.batch_size):
                        batch = collate_trajectories([folder[indices[i]] for i in block]).to(device)
                        latents = begun[block.start : block.stop].to(device)
                        ends.append(follow(teacher, manifest, batch, latents, point).cpu())
                        progress.advance(bar, len(block))
                    reached = torch.cat(ends)
                    row = {
                        "sigma": sigma,
                        "stretch": stretch,
                        "error": float((reached - moved).square().mean()) / apart,
                        **judged(pipeline, reached, prompts, config.batch_size),
                    }
                    write_whole(path, json.dumps(row).encode())
                rows.append(json.loads(path.read_text("utf-8")))
    return rows


def follow(
    teacher: GuidedTeacher, manifest: Manifest, batch: TrajectoryBatch, latents: Latents, keypoint: int
) -> Latents:
    """Where the teacher's own steps lead from latents at a key point: a video."""
    for number in range(keypoint, len(batch.calls)):
        first, last = manifest.keypoints[number : number + 2]
        levels = torch.tensor(manifest.sigmas[first : last + 1], device=latents.device)
        latents = solve(teacher.field(batch, number), latents, levels)
    return latents


def judged(pipeline: Any, videos: Latents, prompts: Sequence[str], batch_size: int) -> dict[str, Any]:
    """The share of videos of the playground's that are right; nothing without its pipeline."""
    if pipeline is None:
        return {}
    right = [
        judge(decoded(pipeline, videos[block.start : block.stop]), prompts[block.start : block.stop]).all_right
        for block in batches(len(videos), batch_size)
    ]
    return {"all_right": asdict(wilson_interval(int(torch.cat(right).sum()), len(videos)))}


@torch.no_grad()
def decoded(pipeline: Any, latents: Latents) -> Clips:
    """The frames of a Wan pipeline's latents."""
    settings = pipeline.vae.config
    mean, std = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (settings.latents_mean, settings.latents_std))
    frames = pipeline.vae.decode((latents * std + mean).to(pipeline.vae.device), return_dict=False)[0]
    clips = pipeline.video_processor.postprocess_video(frames, output_type="pt")
    return (clips.permute(0, 1, 3, 4, 2) * 255).round().to(torch.uint8).cpu()


# What is written


def coverage_table(results: Mapping[str, Any]) -> str:
    """Shares of points that are off, and where the teacher leads, in Markdown."""
    settings, counts = results["settings"], results["num_trajectories"]
    sigmas = results["sigmas"]
    some = sorted({round(k * (len(sigmas) - 1) / 5) for k in range(6)})
    header = ["moved away by, %", "off, %", *(f"at noise level {sigmas[level]:.3g}" for level in some)]
    lines = [
        [f"{100 * row['stretch']:g}", f"{100 * row['share']:.2f}"]
        + [f"{100 * row['levels'][level]['share']:.2f}" for level in some]
        for row in results["rows"]
    ]
    text = (
        f"Noised points that lie off all of {counts['covering']} recorded trajectories, in %: farther from the "
        f"nearest, at their noise level, than all but {100 * settings['beyond']:g} % of {counts['probing']} new states "
        f"of the teacher's own. Mean over {len(sigmas)} noise levels, and some of them.\n\n"
        f"{markdown_table(header, lines)}"
    )
    if followed := results["followed"]:
        header = ["noise level", "moved away by, %", "error, share of two videos' distance", "right, %"]
        lines = [
            [
                f"{row['sigma']:.3g}",
                "the recorded videos" if row["stretch"] is None else f"{100 * row['stretch']:g}",
                f"{row['error']:.3f}",
                interval(row["all_right"]) if "all_right" in row else "–",
            ]
            for row in followed
        ]
        text += f"\nWhere the teacher leads from such points:\n\n{markdown_table(header, lines)}"
    return text


def interval(estimate: Mapping[str, float]) -> str:
    """A share in %, with its 95 % interval."""
    return f"{100 * estimate['mean']:.1f} ({100 * estimate['low']:.1f} to {100 * estimate['high']:.1f})"


def coverage_figure(results: Mapping[str, Any]) -> str:
    """Shares and distances against the noise level, and where the teacher leads."""
    rows, sigmas = results["rows"], results["sigmas"]
    shares = {
        f"moved by {100 * row['stretch']:g} %": [
            (sigma, 100 * level["share"]) for sigma, level in zip(sigmas, row["levels"], strict=True)
        ]
        for row in rows
    }
    ratios = {
        name: [
            (sigma, level["distance"] / max(level["own_distance"], 1e-12))
            for sigma, level in zip(sigmas, row["levels"], strict=True)
        ]
        for name, row in zip(shares, rows, strict=True)
    }
    panels = [
        curve_panel("Points off every trajectory", "% at each noise level", shares, (0, 100)),
        curve_panel("Distance to the nearest trajectory", "over that of the teacher's own new states", ratios),
    ]
    followed = [row for row in results["followed"] if row["stretch"] is not None]
    if followed:
        errors = {name: [] for name in shares}
        right = {name: [] for name in shares}
        for row in followed:
            name = f"moved by {100 * row['stretch']:g} %"
            errors[name].append((row["sigma"], row["error"]))
            if "all_right" in row:
                right[name].append((row["sigma"], 100 * row["all_right"]["mean"]))
        panels.append(curve_panel("Where the teacher leads from there", "error, share of two videos' distance", errors))
        if any(right.values()):
            right["the recorded videos"] = [(1.0, right_share(results)), (0.0, right_share(results))]
            panels.append(curve_panel("Clips that it arrives at", "% right by the judge", right))
    return figure(panels)


def right_share(results: Mapping[str, Any]) -> float:
    """Share of the recorded videos that are right, in %."""
    return 100 * results["followed"][0]["all_right"]["mean"]


def curve_panel(
    title: str,
    note: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    limits: tuple[float, float] | None = None,
) -> Panel:
    """Curves against the noise level, from noise to video."""
    values = [y for points in curves.values() for _, y in points]
    low, high = limits or (min(values), max(values) if max(values) > min(values) else min(values) + 1)
    ticks = nice_ticks(low, high)
    plot = Plot((1, 0), (ticks[0], ticks[-1]))
    marks = "".join(
        polyline(plot, points, color(i)) + "".join(dot(plot, x, y, color(i), 2) for x, y in points)
        for i, points in enumerate(curves.values())
    )
    keys = [(name, color(i)) for i, name in enumerate(curves)]
    return Panel(title, note, plot.svg(marks, "noise level", ticks, (1, 0.8, 0.6, 0.4, 0.2, 0), title), keys)
