"""Record, distill and sample on a device that is not the CPU: nothing lies on the wrong one, the numbers are the CPU's.

Torch learns of such a device before its first backward pass or never, so all runs are in one process of their own.
"""

import multiprocessing
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import accvideo.record as stage
from accvideo.data.dataset import TrajectoryFolder
from accvideo.distill import DistillConfig, distill
from accvideo.generate import load_model, sample_clips, with_arguments
from accvideo.media import load_media
from accvideo.record import record
from accvideo.types import Latents
from tests.accelerator import accelerator
from tests.families import FAMILIES, PROMPTS, Family, configuration, installed, write_teacher
from tests.metrics import numbers_of

CHOSEN = ("wan-experts", "wan-vace", "hunyuan-i2v", "kandinsky5-i2v", "cosmos-i2v", "mochi")
"""Two experts; a given video, images, frames; guidance embedded and by a second call; noise levels that rise."""

LESSONS: dict[str, dict[str, Any]] = {
    "consistency": {"full": True, "loss": "consistency"},
    "trajectory": {"update": "shared", "num_validation": 1, "lora_rank": 2},
}


def run(family: Family, folder: Path, device: str) -> tuple[Latents, list[tuple[str, float]], Latents]:
    """Recorded states, the metrics of two distillations, and the latents of a clip of the last student."""
    pipeline, data = family.make().to(device), folder / device
    guided = configuration(family, folder, device, family.guidance_scale, **family.guided)
    with patch.object(stage, "load_pipeline", lambda *_: pipeline):
        record(replace(guided, device=device))
    metrics = []
    for name, settings in LESSONS.items():
        out = folder / f"{name}-{device}"
        config = DistillConfig(data=data, out=out, num_iterations=2, batch_size=1, num_validation=0, device=device)
        config = replace(config, adversarial_start=0)
        distill(replace(config, media_folder=folder, precision="float32", **settings))
        metrics += numbers_of(out)
    model = load_model(str(folder / f"trajectory-{device}"), device=device)
    [clips] = sample_clips(with_arguments(model, load_media(family.media, folder)), PROMPTS[:1], [0])
    return TrajectoryFolder(data)[0].states, metrics, clips.latents.cpu()


def compare(name: str, folder: Path, device: str) -> None:
    """One family on both devices. Attention sums in another order there, so that numbers differ by rounding."""
    folder.mkdir()
    with installed(FAMILIES[name]) as family:
        write_teacher(family, folder)
        (states, metrics, latents), (own, own_metrics, own_latents) = (
            run(family, folder, each) for each in (device, "cpu")
        )
    torch.testing.assert_close(states, own, rtol=1e-4, atol=1e-4)
    for (key, value), (own_key, own_value) in zip(metrics, own_metrics, strict=True):
        assert key == own_key
        if not key.endswith("saturation"):  # counts values beyond the teacher's, where rounding is enough
            assert value == pytest.approx(own_value, rel=1e-2, abs=1e-3), key
    torch.testing.assert_close(latents, own_latents, rtol=0.05, atol=0.05)  # after two of Adam's steps


def compare_all(folder: Path) -> None:
    """Write what went wrong with each family to a file of its name."""
    with accelerator() as device:
        for name in CHOSEN:
            try:
                compare(name, folder / name, device)
            except Exception:
                (folder / f"{name}.txt").write_text(traceback.format_exc())
    (folder / "done").touch()


@pytest.mark.slow
def test_every_stage_runs_on_another_device_and_gives_the_numbers_of_the_cpu(tmp_path: Path):
    process = multiprocessing.get_context("spawn").Process(target=compare_all, args=(tmp_path,))
    process.start()
    process.join()
    errors = [f"{path.stem}:\n{path.read_text()}" for path in sorted(tmp_path.glob("*.txt"))]
    assert (tmp_path / "done").exists()
    assert not errors, "\n".join(errors)
