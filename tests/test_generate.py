import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from accvideo.distill import DistillConfig, distill
from accvideo.generate import generate, sample_clips
from accvideo.inference.config import GenerateConfig
from accvideo.inference.model import Model, load_model, with_arguments
from accvideo.recording.setup import set_shift
from accvideo.teacher import item_generator
from accvideo.types import UserError
from accvideo.video import write_video
from tests.recorded import record_tiny
from tests.tiny import TINY_CALL, tiny_image, tiny_wan_i2v_pipeline, tiny_wan_pipeline

PROMPTS = ["a red square", "two blue dots", "green"]
ARGUMENTS = ("max_sequence_length=12",)
SIZES: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher` and `student`: a tiny Wan pipeline, and a student of it distilled for a moment."""
    folder = tmp_path_factory.mktemp("models")
    record_tiny(folder)
    settings: dict[str, Any] = {"num_iterations": 10, "num_validation": 2, "lora_rank": 4, "batch_size": 2}
    distill(DistillConfig(data=folder / "data", out=folder / "student", **settings))
    return folder


@pytest.fixture(scope="module")
def teacher() -> Model:
    """A tiny Wan pipeline in memory."""
    return Model("tiny", tiny_wan_pipeline("dpm"), "0", 4, 3.0, 8, dict(TINY_CALL))


def config(folders: Path, out: Path, **changes: Any) -> GenerateConfig:
    settings = {"model": str(folders / "teacher"), "prompt": PROMPTS[0], "num_steps": 3, **SIZES, **changes}
    return GenerateConfig(out=out, pipeline_arg=ARGUMENTS, **settings)


def test_clips_are_the_bare_pipelines_bit_for_bit(teacher: Model):
    """Watching, timing and counting change nothing: frames and latents are those of a plain diffusers call."""
    [batch] = sample_clips(teacher, PROMPTS[:2], [7, 8], seed=5, batch_size=2)
    arguments: dict[str, Any] = {"prompt": PROMPTS[:2], "num_inference_steps": 4, "guidance_scale": 3.0, **TINY_CALL}
    run: Any = tiny_wan_pipeline("dpm")
    frames = run(**arguments, generator=[item_generator(5, 7), item_generator(5, 8)]).frames
    latents = run(**arguments, generator=[item_generator(5, 7), item_generator(5, 8)], output_type="latent").frames
    assert torch.equal(batch.latents, latents)
    assert np.array_equal(batch.frames.numpy(), np.round(frames * 255).astype(np.uint8))


def test_noise_of_an_item_depends_on_seed_and_index_only(teacher: Model):
    """Any item can be made again alone; another index or seed is another clip."""
    latents = torch.cat([batch.latents for batch in sample_clips(teacher, PROMPTS, range(3), batch_size=2)])
    [alone] = sample_clips(teacher, PROMPTS[2:], [2])
    torch.testing.assert_close(alone.latents[0], latents[2], rtol=1e-4, atol=1e-4)
    [other] = sample_clips(teacher, PROMPTS[2:], [3])
    [reseeded] = sample_clips(teacher, PROMPTS[2:], [2], seed=1)
    assert (other.latents - alone.latents).abs().max() > 0.1
    assert (reseeded.latents - alone.latents).abs().max() > 0.1


def test_denoiser_calls_are_counted(teacher: Model):
    """Guidance takes two a step; for two clips in a batch, each clip still takes that many."""
    [guided] = sample_clips(teacher, PROMPTS[:2], [0, 1], num_steps=3, batch_size=2)
    [unguided] = sample_clips(teacher, PROMPTS[:1], [0], num_steps=3, guidance_scale=1.0)
    assert (guided.denoiser_calls, unguided.denoiser_calls) == (6, 3)
    assert len(guided.sigmas) == 4 and guided.sigmas[-1] == 0


def test_parts_of_the_time_are_told_apart(teacher: Model):
    """More steps take longer in the denoiser; all parts are positive and nothing stays hooked."""
    list(sample_clips(teacher, PROMPTS[:1], [0], num_steps=2))
    [short] = sample_clips(teacher, PROMPTS[:1], [0], num_steps=2)
    [long] = sample_clips(teacher, PROMPTS[:1], [0], num_steps=20)
    assert long.seconds.denoising > 2 * short.seconds.denoising
    assert min(long.seconds.text, long.seconds.decoding) > 0
    assert long.seconds.total == pytest.approx(long.seconds.text + long.seconds.denoising + long.seconds.decoding)
    pipeline: Any = teacher.pipeline
    assert "decode" not in vars(pipeline.vae) and "step" not in vars(pipeline.scheduler)
    assert not pipeline.transformer._forward_pre_hooks


def test_one_file(folders: Path, tmp_path: Path):
    """A video that can be looked at, and its story beside it."""
    result = generate(config(folders, tmp_path / "clip.mp4"))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = list(container.decode(video=0))
    assert (len(frames), frames[0].height, frames[0].width) == (5, 256, 256)
    assert (result["denoiser_calls"], len(result["sigmas"])) == (6, 4)
    assert set(result["videos"][0]["seconds"]) == {"text", "denoising", "decoding", "total"}
    assert result["peak_memory_bytes"] > 1e6
    stored = json.loads((tmp_path / "clip.json").read_text())
    assert stored["settings"]["seed"] == 0 and stored["videos"][0]["prompt"] == PROMPTS[0]


def test_generation_is_deterministic(folders: Path, tmp_path: Path):
    for name in ("first.webp", "second.webp"):
        generate(config(folders, tmp_path / name, seed=3))
    generate(config(folders, tmp_path / "third.webp", seed=4))
    first, second, third = ((tmp_path / f"{name}.webp").read_bytes() for name in ("first", "second", "third"))
    assert first == second != third


def test_folder_is_resumed(folders: Path, tmp_path: Path):
    """A deleted video is made again as it was; the others are not touched."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = config(folders, tmp_path / "videos", prompt=None, prompts=tmp_path / "prompts.txt", batch_size=2)
    assert generate(command)["num_generated"] == 3
    names = ["000000.mp4", "000001.mp4", "000002.mp4", "generation.json"]
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == names
    last = tmp_path / "videos" / names[2]
    content, first_written = last.read_bytes(), (tmp_path / "videos" / names[0]).stat().st_mtime_ns
    last.unlink()
    assert generate(command)["num_generated"] == 1
    assert last.read_bytes() == content
    assert (tmp_path / "videos" / names[0]).stat().st_mtime_ns == first_written
    assert generate(command)["num_generated"] == 0


def test_nothing_is_overwritten(folders: Path, tmp_path: Path):
    generate(config(folders, tmp_path / "videos"))
    with pytest.raises(UserError, match="other settings: seed 0 -> 1"):
        generate(config(folders, tmp_path / "videos", seed=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="something else \\(thesis.txt\\)"):
        generate(config(folders, tmp_path / "mine"))
    (tmp_path / "clip.mp4").write_text("mine")
    with pytest.raises(UserError, match="clip.mp4 exists"):
        generate(config(folders, tmp_path / "clip.mp4"))
    assert (tmp_path / "clip.mp4").read_text() == "mine"


def test_a_teacher_takes_the_shift_that_it_is_recorded_with(folders: Path, tmp_path: Path):
    sigmas = {}
    for shift in (None, 11.0):
        result = generate(config(folders, tmp_path / f"{shift}.mp4", shift=shift))
        sigmas[shift] = result["sigmas"]
    again = load_model(str(folders / "teacher"))
    set_shift(again.pipeline, 11.0)
    again.pipeline.scheduler.set_timesteps(3)
    assert sigmas[11.0] == pytest.approx(again.pipeline.scheduler.sigmas.tolist())
    assert sigmas[11.0] != pytest.approx(sigmas[None], abs=1e-2)


def test_student_runs_its_own_steps(folders: Path, tmp_path: Path):
    """A student takes K calls without being told, at the sizes it was recorded at."""
    result = generate(GenerateConfig(model=str(folders / "student"), prompt=PROMPTS[0], out=tmp_path / "clip.mp4"))
    assert (result["denoiser_calls"], result["settings"]["num_steps"]) == (5, 5)
    student = load_model(str(folders / "student"))
    assert result["sigmas"] == pytest.approx(student.student.sigmas if student.student else None, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 4}, "student of 5 steps and cannot take 4"),
        ({"guidance_scale": 3.0}, "guidance 3.0 is distilled"),
        ({"shift": 3.0}, "noise levels came with its weights"),
    ],
)
def test_student_refuses_other_steps_and_guidance(folders: Path, tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        generate(GenerateConfig(model=str(folders / "student"), prompt="a", out=tmp_path / "clip.mp4", **change))
    assert not list(tmp_path.iterdir())


def test_image_to_video(tmp_path: Path):
    """`--image` reaches the pipeline: another first frame, another clip."""
    tiny_wan_i2v_pipeline().save_pretrained(tmp_path / "teacher")
    tiny_image().save(tmp_path / "image.png")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    for name in ("image", "red"):
        generate(config(tmp_path, tmp_path / f"{name}.webp", image=tmp_path / f"{name}.png"))
    assert (tmp_path / "image.webp").read_bytes() != (tmp_path / "red.webp").read_bytes()


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_each_prompt_may_have_its_image(tmp_path: Path, form: str):
    """The columns of a prompt file are arguments of the call: the same videos as from one command for each."""
    tiny_wan_i2v_pipeline().save_pretrained(tmp_path / "teacher")
    tiny_image().save(tmp_path / "image.png")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    rows = [("a dog", "image.png"), ("a dog", "red.png")]
    lines = {
        "csv": ["prompt,image", *map(",".join, rows)],
        "jsonl": [json.dumps({"prompt": prompt, "image": image}) for prompt, image in rows],
    }
    (tmp_path / f"prompts.{form}").write_text("\n".join(lines[form]))
    changes: dict[str, Any] = {"prompt": None, "prompts": tmp_path / f"prompts.{form}", "num_steps": 2}
    command = config(tmp_path, tmp_path / "videos", **changes)
    assert generate(command)["num_generated"] == 2
    for index, (prompt, image) in enumerate(rows):
        [batch] = sample_clips(
            with_arguments(load_model(str(tmp_path / "teacher")), {**TINY_CALL, "max_sequence_length": 12}
                           | {"image": Image.open(tmp_path / image).convert("RGB")}),
            [prompt], [index], num_steps=2,
        )  # fmt: skip
        write_video(tmp_path / "alone.mp4", batch.frames[0], 16, 8)
        assert (tmp_path / "alone.mp4").read_bytes() == (tmp_path / "videos" / f"{index:06d}.mp4").read_bytes()
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "red.png")
    with pytest.raises(UserError, match="other settings: prompts"):
        generate(command)
    with pytest.raises(UserError, match="takes one a batch"):
        generate(config(tmp_path, tmp_path / "others", batch_size=2, **changes))


def test_several_videos_of_a_prompt(folders: Path, tmp_path: Path):
    """Each from other noise, and the first is that of a single video."""
    result = generate(config(folders, tmp_path / "videos", num_videos=3, batch_size=2))
    generate(config(folders, tmp_path / "single"))
    assert [video["prompt"] for video in result["videos"]] == [PROMPTS[0]] * 3
    videos = [(tmp_path / "videos" / f"{index:06d}.mp4").read_bytes() for index in range(3)]
    assert len(set(videos)) == 3
    with pytest.raises(UserError, match="one file for 3 videos"):
        generate(config(folders, tmp_path / "clip.mp4", num_videos=3))


def test_wrong_command_lines(folders: Path, tmp_path: Path):
    with pytest.raises(UserError, match="either --prompt TEXT or --prompts FILE"):
        config(folders, tmp_path, prompt=None)
    with pytest.raises(UserError, match=r"clip\.avi"):
        config(folders, tmp_path / "clip.avi")
    with pytest.raises(UserError, match="batch_size is 0"):
        config(folders, tmp_path, batch_size=0)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="one file for 2 videos"):
        generate(config(folders, tmp_path / "clip.mp4", prompt=None, prompts=tmp_path / "prompts.txt"))
    with pytest.raises(UserError, match="is no model"):
        generate(config(folders, tmp_path / "clip.mp4", model=str(tmp_path)))
    with pytest.raises(UserError, match="WanPipeline takes no image; it takes prompt, negative_prompt"):
        tiny_image().save(tmp_path / "image.png")
        generate(config(folders, tmp_path / "clip.mp4", image=tmp_path / "image.png"))
    with pytest.raises(UserError, match="refuses its arguments"):
        generate(config(folders, tmp_path / "clip.mp4", height=33))
    assert not (tmp_path / "clip.mp4").exists()


def test_a_folder_may_have_a_dot(folders: Path, tmp_path: Path):
    assert generate(config(folders, tmp_path / "run-1.5"))["videos"][0]["file"] == "000000.mp4"
