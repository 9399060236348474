"""Record, verify, replay, distill and generate with every kind of video pipeline, none of which the code knows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import accvideo.record as stage
from accvideo.call import replay
from accvideo.distill import DistillConfig, distill
from accvideo.flow import euler_step
from accvideo.generate import load_model, sample_clips, with_arguments
from accvideo.media import load_media
from accvideo.record import RecordConfig, record
from accvideo.teacher import denoisers, fingerprint
from accvideo.trajectory import TrajectoryFolder, verify
from tests.families import FAMILIES, Family, write_media

NUM_STEPS = 2
PROMPTS = ("a red square", "two dots")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    family = FAMILIES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in family.constants.items():
            setting = property(lambda self, value=value: value, lambda self, _: None)
            patch.setattr(family.pipeline_class, name, setting, raising=False)
        yield family


@pytest.fixture(scope="module")
def folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline, a file of prompts with images or videos, and a data set recorded with guidance."""
    folder = tmp_path_factory.mktemp("family")
    write_media(folder)
    pipeline = family.make()
    pipeline.save_pretrained(folder / "teacher")
    rows = [{"prompt": prompt, **family.media} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "load_pipeline", lambda *_: pipeline)
        record(configuration(family, folder, "plain", 1.0))
        record(configuration(family, folder, "guided", family.guidance_scale, **family.guided))
    return folder


def configuration(family: Family, folder: Path, out: str, guidance_scale: float, **guided: Any) -> RecordConfig:
    return RecordConfig(
        teacher=str(folder / "teacher"),
        prompts=folder / "prompts.jsonl",
        out=folder / out,
        num_steps=NUM_STEPS,
        num_student_steps=NUM_STEPS,
        guidance_scale=guidance_scale,
        pipeline_arg=tuple(f"{name}={json.dumps(value)}" for name, value in {**family.arguments, **guided}.items()),
    )


@torch.no_grad()
def test_replay_is_the_recording(family, folder):
    """The teacher's own weights as the student, all steps, guidance off: each state bit for bit, up to the video."""
    assert verify(folder / "plain") == []
    data, networks = TrajectoryFolder(folder / "plain"), denoisers(family.make())
    assert data.manifest.denoiser_calls == NUM_STEPS
    euler = "Euler" in data.manifest.scheduler["class"]
    sigmas = data.manifest.key_sigmas.tolist()
    for index in range(len(PROMPTS)):
        trajectory = data[index]
        state = trajectory.states[:1]
        for k, call in enumerate(trajectory.calls):
            velocity = replay(networks[trajectory.denoisers[k]], call, state)
            state = euler_step(state, velocity, sigmas[k], sigmas[k + 1])
            if euler:
                assert torch.equal(state, trajectory.states[k + 1 : k + 2])
            elif k == 0:  # from its second step on UniPC is no Euler step
                assert torch.allclose(state, trajectory.states[k + 1 : k + 2], atol=1e-5)
    assert not torch.equal(data[0].states[-1], data[1].states[-1])


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_student_is_made_and_runs(family, folder, full):
    """From guided trajectories, two iterations, saved, loaded; it runs in its pipeline without guidance."""
    assert verify(folder / "guided") == []
    manifest, out = TrajectoryFolder(folder / "guided").manifest, folder / f"student-{full}"
    assert manifest.denoiser_calls == family.num_guided_calls * NUM_STEPS
    distill(
        DistillConfig(
            data=folder / "guided", out=out, num_iterations=2, batch_size=2, full=full, lora_rank=2, num_validation=0,
            device="cpu",
        )
    )  # fmt: skip
    model = load_model(str(out))
    model = with_arguments(model, load_media(family.media, folder))
    [clips] = sample_clips(model, PROMPTS[:1], [0])
    assert clips.denoiser_calls == clips.frames.shape[0] * NUM_STEPS
    assert clips.sigmas == pytest.approx(manifest.key_sigmas.tolist())
    assert clips.latents.isfinite().all()
    teacher = denoisers(family.make())
    for name, denoiser in denoisers(model.pipeline).items():
        assert fingerprint(denoiser) != fingerprint(teacher[name]), "it is trained, and what was trained is loaded"
