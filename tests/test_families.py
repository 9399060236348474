"""Record, verify, replay, distill and generate with every kind of video pipeline, none of which the code knows."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LTXConditionPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    WanPipeline,
)
from peft.tuners.lora import LoraLayer

import accvideo.record as stage
from accvideo.call import replay
from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.verify import problems
from accvideo.decode import load_recorded_teacher, recorded_clips
from accvideo.distill import DistillConfig, distill
from accvideo.flow import euler_step, secant_velocity
from accvideo.generate import load_model, sample_clips, with_arguments
from accvideo.media import load_media
from accvideo.record import record
from accvideo.student import Student, add_lora
from accvideo.teacher import denoisers, fingerprint
from accvideo.training.guidance import GuidedTeacher, find_practice
from accvideo.trajectory import collate_trajectories
from accvideo.types import UserError
from tests.families import (
    FAMILIES,
    IMAGE,
    NUM_STEPS,
    PROMPTS,
    SIZE,
    VIDEO,
    Family,
    anyflow,
    configuration,
    framepack,
    installed,
    ltx_image,
    skyreels_transformer,
    wan_parts,
    wan_ti2v_image,
    wan_vace,
    wan_video,
    write_media,
    write_teacher,
)
from tests.tiny import TINY_CALL, TINY_HUNYUAN_CALL, quiet, t5_encoder, t5_tokenizer, wan_transformer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    with installed(FAMILIES[request.param]) as family:
        yield family


@pytest.fixture(scope="module")
def folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline, a file of prompts with images or videos, and a data set recorded with guidance."""
    folder = tmp_path_factory.mktemp("family")
    write_teacher(family, folder)
    pipeline = family.make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "load_pipeline", lambda *_: pipeline)
        record(configuration(family, folder, "plain", 1.0))
        record(configuration(family, folder, "guided", family.guidance_scale, **family.guided))
    return folder


@torch.no_grad()
def test_replay_is_the_recording(family, folder):
    """The teacher's own weights as the student, all steps, guidance off: each state bit for bit, up to the video."""
    assert problems(folder / "plain") == []
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
            if euler or k == 0:  # from its second step on UniPC is no Euler step
                tolerance = family.tolerance if euler else 1e-5
                torch.testing.assert_close(state, trajectory.states[k + 1 : k + 2], rtol=0, atol=tolerance)
    assert not torch.equal(data[0].states[-1], data[1].states[-1])


def test_recorded_videos_are_decoded_as_the_teacher_does(family, folder):
    """From the last recorded state alone; with another image or video than the recorded one it is refused."""
    data = TrajectoryFolder(folder / "plain")
    teacher = load_recorded_teacher(data.manifest, "cpu")
    decoded = recorded_clips(teacher, [data[0]], folder)
    own = with_arguments(load_model(str(folder / "teacher")), family.arguments | load_media(family.media, folder))
    [clips] = sample_clips(own, PROMPTS[:1], [0], num_steps=NUM_STEPS, guidance_scale=data.manifest.guidance_scale)
    torch.testing.assert_close(decoded, clips.frames, rtol=0, atol=1)
    assert (decoded != clips.frames).float().mean() < 1e-3
    for name in family.media:
        other = replace(data[0], media=data[0].media | {name: "0"})
        with pytest.raises(UserError, match=f"the {name} of trajectory 0 .* is not the one"):
            recorded_clips(teacher, [other], folder)


def test_the_guided_teacher_takes_the_recorded_steps(family, folder):
    """Asked anew at recorded states, with the second call and its weight as found in a run: the same velocities."""
    data = TrajectoryFolder(folder / "guided")
    manifest, trajectory = data.manifest, data[1]
    guidance = find_practice(manifest, trajectory, folder).guidance
    assert (guidance is None) == (family.num_guided_calls == 1)
    student = Student(denoisers(family.make()), None, keep_teacher=False)
    teacher, batch = GuidedTeacher(student, manifest.key_sigmas, guidance), collate_trajectories([trajectory])
    for k, (sigma, next_sigma) in enumerate(pairwise(manifest.key_sigmas.tolist())):
        velocity = teacher.field(batch, k)(batch.states[:, k], torch.tensor([sigma]))
        expected = secant_velocity(batch.states[:, k], batch.states[:, k + 1], sigma, next_sigma)
        if k == 0 or "Euler" in manifest.scheduler["class"]:  # from its second step on UniPC is no Euler step
            torch.testing.assert_close(velocity, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_student_is_made_and_runs(family, folder, full):
    """From guided trajectories, by either loss, saved, loaded; it runs in its pipeline without guidance."""
    assert problems(folder / "guided") == []
    manifest, out = TrajectoryFolder(folder / "guided").manifest, folder / f"student-{full}"
    assert manifest.denoiser_calls == family.num_guided_calls * NUM_STEPS
    config = DistillConfig(data=folder / "guided", out=out, num_iterations=2, batch_size=2, full=full, lora_rank=2,
                           loss="trajectory" if full else "consistency", media_folder=folder,
                           adversarial_start=0, num_validation=0, device="cpu")  # fmt: skip
    if not family.has_lora and not full:
        with pytest.raises(UserError, match="--full"):
            distill(config)
        return
    distill(config)
    model = load_model(str(out))
    model = with_arguments(model, load_media(family.media, folder))
    [clips] = sample_clips(model, PROMPTS[:1], [0])
    assert clips.denoiser_calls == clips.frames.shape[0] * NUM_STEPS
    assert clips.sigmas == pytest.approx(manifest.key_sigmas.tolist())
    assert clips.latents.isfinite().all()
    teacher = denoisers(family.make())
    for name, denoiser in denoisers(model.pipeline).items():
        assert fingerprint(denoiser) != fingerprint(teacher[name]), "it is trained, and what was trained is loaded"


TABLE = {
    name: (works, why)
    for name, works, why in re.findall(
        r"^\| `(\w+)` \| (\w+) \| *(.*?) *\|$", (ROOT / "docs" / "families.md").read_text("utf-8"), re.MULTILINE
    )
}
"""The rows of docs/families.md: class -> whether it works, and how or why not."""


def video_pipelines() -> dict[str, Path]:
    """The classes of diffusers whose output has frames, and their files; found in the sources, importing none."""
    folder, found = Path(diffusers.__file__).parent / "pipelines", {}
    for path in folder.rglob("pipeline_*.py"):
        text = path.read_text("utf-8")
        if re.search(r"Output\(\s*(frames|video)=", text):
            found |= {name: path for name in re.findall(r"^class (\w+Pipeline)\(", text, re.MULTILINE)}
    return {name: path for name, path in found.items() if name in dir(diffusers)}


def test_the_table_is_complete():
    """Each video pipeline of diffusers has a row; those that work are those that pass the chain here."""
    assert TABLE.keys() == video_pipelines().keys()
    works = {name for name, (works, _) in TABLE.items() if works == "yes"}
    assert works == {family.pipeline_class.__name__ for family in FAMILIES.values()}
    assert all(why for works, why in TABLE.values() if works == "no")


ADAPTED = (
    {f"attn{n}.to_{part}" for n in ("", 1, 2) for part in ("q", "k", "v", "out.0", "add_out")}
    | {f"attn{n}.add_{part}_proj" for n in ("", 1, 2) for part in "qkv"}
    | {f"{ff}.net.{layer}" for ff in ("ff", "ffn", "ff_context") for layer in ("0.proj", "2")}
    | {
        f"{kind}_attention.{part}"
        for kind in ("self", "cross")
        for part in ("to_query", "to_key", "to_value", "out_layer")
    }
    | {"feed_forward.in_layer", "feed_forward.out_layer"}  # Kandinsky
    | {"proj_mlp", "proj_out", "proj_in"}  # single blocks; VACE
)
"""Linear layers of blocks, without the block's name, that a LoRA adapts."""

NOT_ADAPTED = {
    *(f"norm{n}.linear{m}" for n in ("", 1, 2, 3) for m in ("", "_1", "_2")),
    *("norm1_context.linear", "norm1_context.linear_1", "text_modulation.out_layer", "visual_modulation.out_layer"),
}
"""The others: scales and shifts from the timestep."""

BLOCK = re.compile(r"((single_|text_|visual_)?transformer_blocks|(vace_)?blocks)\.\d+\.")


def test_a_lora_adapts_attention_and_feed_forward_of_the_blocks_and_nothing_else(family):
    for denoiser in denoisers(family.make()).values():
        if not family.has_lora:
            with pytest.raises(UserError, match="no adapters"):
                add_lora(denoiser, 2)
            return
        linear = {path for path, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
        in_blocks = {path: path[match.end() :] for path in linear if (match := BLOCK.match(path))}
        assert set(in_blocks.values()) <= ADAPTED | NOT_ADAPTED
        add_lora(denoiser, 2)
        found = {path for path, module in denoiser.named_modules() if isinstance(module, LoraLayer)}
        assert found == {path for path, layer in in_blocks.items() if layer in ADAPTED} != set()


REASONS = {
    r"no `transformer`": r"^(?!.*\n        transformer: )",
    r"copies of the scheduler": r"deepcopy\(self\.scheduler\)",
    r"a noise level for each token": r"per_token_timesteps=",
    r"no `hidden_states`": r"vision_tokens=",
    r"DDIM": r"DDIMScheduler",
    r"above 1": r"scale_model_input|EulerAncestral|c_in = 1 - current_t",
    r"several runs": r"\n {16,}for (\w+, )?t in",
    r"as a tensor": r"video: torch\.\w*Tensor",
}
"""What a reason in the table says, and what then stands in the pipeline's source."""


@pytest.mark.parametrize("name", [name for name, (works, _) in TABLE.items() if works == "no"])
def test_the_reasons_hold(name):
    """A pipeline that changes what it is refused for must be looked at again."""
    [pattern] = [source for reason, source in REASONS.items() if reason in TABLE[name][1]]
    assert re.search(pattern, video_pipelines()[name].read_text("utf-8"), re.DOTALL)


def cogvideox() -> CogVideoXPipeline:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, text_embed_dim=16
    )
    widths: Any = (8, 8, 8, 8)
    vae = AutoencoderKLCogVideoX(latent_channels=4, block_out_channels=widths, layers_per_block=1, norm_num_groups=2)
    return CogVideoXPipeline(t5_tokenizer(), t5_encoder(), vae, transformer, CogVideoXDDIMScheduler())


def skyreels_forcing() -> SkyReelsV2DiffusionForcingPipeline:
    return SkyReelsV2DiffusionForcingPipeline(**wan_parts("unipc"), transformer=skyreels_transformer())


def ltx_condition() -> LTXConditionPipeline:
    parts: dict[str, Any] = ltx_image().components | {"scheduler": FlowMatchEulerDiscreteScheduler()}
    return LTXConditionPipeline(**parts)


def wan_with(scheduler: Any) -> WanPipeline:
    return WanPipeline(**wan_parts() | {"scheduler": scheduler}, transformer=wan_transformer())


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, str], str, int]] = {
    "DDIM": (cogvideox, TINY_CALL, {}, "CogVideoXDDIMScheduler, which has no noise levels", 0),
    "two calls a step": (lambda: wan_with(FlowMatchHeunDiscreteScheduler()), TINY_CALL, {}, "2 calls a step", 0),
    "noise without end": (lambda: wan_with(EulerAncestralDiscreteScheduler()), TINY_CALL, {}, "a flow's are from 0", 0),
    "copies": (skyreels_forcing, TINY_CALL, {}, "several copies of its scheduler", 0),
    "told the next level": (anyflow, TINY_CALL, {}, "tells its denoiser r_timestep", 0),
    "list of one": (wan_vace, TINY_CALL, {**VIDEO, "image": "image.png"}, "takes no image", 0),
    "wrong size": (wan_video, {"height": 33, "width": 32}, VIDEO, "refuses its arguments.*divisible by 16", 0),
    "no image": (wan_ti2v_image, TINY_CALL, {}, "refuses its arguments.*image", 0),
    "missing image": (wan_ti2v_image, TINY_CALL, {"image": "nowhere.png"}, "cannot read the image .*nowhere.png", 0),
    "per token": (ltx_condition, TINY_CALL, {}, "a noise level of its own", 1),
    "from a video": (wan_video, {**SIZE, "strength": 0.5}, VIDEO, "from a noised video", 1),
    "sections": (framepack, {**TINY_HUNYUAN_CALL, "latent_window_size": 2, "num_frames": 9}, IMAGE, "several runs", 5),
}
"""A pipeline, its arguments and files; what it is refused with, after how many denoiser calls."""


@pytest.mark.parametrize("case", REFUSED)
def test_the_others_are_refused(case, tmp_path, monkeypatch):
    """In at most two lines that say why, before the first denoiser call where it can be known; no data set is left."""
    make, arguments, media, message, num_calls = REFUSED[case]
    write_media(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a red square", **media}))
    pipeline, calls = quiet(make()), []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(stage, "load_pipeline", lambda *_: pipeline)
    (tmp_path / "teacher").mkdir()
    config = configuration(Family(type(pipeline), make, arguments), tmp_path, "data", 1.0)
    with pytest.raises(UserError, match=message) as error:
        record(replace(config, num_steps=4))
    assert len(calls) <= num_calls
    assert len(str(error.value).splitlines()) <= 2
    assert not list((tmp_path / "data").glob("*"))
