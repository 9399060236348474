"""Record, verify, replay, distill and generate with every kind of video pipeline, none of which the code knows."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from accvideo.call import replay
from accvideo.distill import DistillConfig, distill
from accvideo.flow import euler_step
from accvideo.generate import load_model, sample_clips, with_arguments
from accvideo.media import load_media
from accvideo.record import RecordConfig, record
from accvideo.teacher import denoisers, load_pipeline
from accvideo.trajectory import TrajectoryFolder, verify
from tests.families import FAMILIES, Family, write_media

NUM_STEPS = 4


@pytest.fixture(scope="module", params=FAMILIES)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Family, Path]]:
    """A family and the folder of its pipeline, with a file of prompts, images and videos beside it."""
    folder, family = tmp_path_factory.mktemp(request.param), FAMILIES[request.param]
    write_media(folder)
    family.make().save_pretrained(folder / "teacher")
    rows = [{"prompt": prompt, **family.media} for prompt in ("a red square", "two dots")]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    yield family, folder


def configuration(family: Family, folder: Path, **guided: Any) -> RecordConfig:
    return RecordConfig(
        teacher=str(folder / "teacher"),
        prompts=folder / "prompts.jsonl",
        out=folder / "data",
        num_steps=NUM_STEPS,
        num_student_steps=NUM_STEPS,
        guidance_scale=1.0,
        pipeline_arg=tuple(f"{name}={json.dumps(value)}" for name, value in {**family.arguments, **guided}.items()),
    )


@torch.no_grad()
def test_recorded_and_replayed(teacher):
    """The teacher's own weights as the student, all steps, guidance off: each state bit for bit, up to the video."""
    family, folder = teacher
    config = configuration(family, folder)
    record(config)
    assert verify(config.out) == []
    data, networks = TrajectoryFolder(config.out), denoisers(load_pipeline(config.teacher))
    assert data.manifest.denoiser_calls == NUM_STEPS
    euler = data.manifest.scheduler["class"] == "FlowMatchEulerDiscreteScheduler"
    sigmas = data.manifest.key_sigmas.tolist()
    for index in range(2):
        trajectory = data[index]
        state = trajectory.states[:1]
        for k, call in enumerate(trajectory.calls):
            velocity = replay(networks[trajectory.denoisers[k]], call, state)
            state = euler_step(state, velocity, sigmas[k], sigmas[k + 1])
            if k == 0 or euler:  # from its second step on UniPC is no Euler step
                exact = {} if euler else {"atol": 1e-6}
                torch.testing.assert_close(state, trajectory.states[k + 1 : k + 2], rtol=0, **{"atol": 0.0} | exact)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_distilled_and_generated(teacher, full):
    """From guided trajectories, two iterations, saved, loaded; the student runs without guidance in its pipeline."""
    family, folder = teacher
    guided = folder / "guided"
    config = replace(
        configuration(family, folder, **family.guided),
        out=guided,
        num_student_steps=2,
        guidance_scale=family.guidance_scale,
    )
    record(config)
    manifest = TrajectoryFolder(guided).manifest
    assert manifest.denoiser_calls == family.num_guided_calls * NUM_STEPS
    out = folder / f"student-{full}"
    distill(
        DistillConfig(
            data=guided, out=out, num_iterations=2, batch_size=2, full=full, lora_rank=2, num_validation=0, device="cpu"
        )
    )
    model: Any = with_arguments(load_model(str(out)), load_media(family.media, folder))
    before = load_pipeline(config.teacher)
    [clips] = sample_clips(model, ["a red square"], [0], num_steps=2)
    assert clips.denoiser_calls == 2
    assert clips.sigmas == pytest.approx(manifest.key_sigmas.tolist())
    assert clips.frames.shape[0] == 1 and clips.latents.isfinite().all()
    del before
