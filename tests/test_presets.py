import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from accvideo import cli
from accvideo.data.manifest import read_manifest
from accvideo.flow import keypoint_indices
from accvideo.presets import PRESETS, defaults, distill_defaults, find_preset
from accvideo.recording.config import RecordConfig
from accvideo.teacher import watch
from accvideo.training.recipe import paper
from accvideo.types import UserError
from tests.tiny import (
    TINY_CALL,
    TINY_HUNYUAN_CALL,
    tiny_hunyuan_pipeline,
    tiny_image,
    tiny_ltx_pipeline,
    tiny_mochi_pipeline,
    tiny_wan_i2v_pipeline,
    tiny_wan_pipeline,
)

PARAMETERS = {
    "hunyuan-544p": 12.8e9,
    "hunyuan-720p": 12.8e9,
    "wan21-t2v-14b": 14.3e9,
    "wan21-t2v-1.3b": 1.42e9,
    "wan21-i2v-14b": 16.4e9,
    "wan22-t2v-a14b": 14.3e9,
    "wan22-ti2v-5b": 5.0e9,
    "ltx": 1.92e9,
    "mochi": 10.0e9,
}
"""Of one denoiser, as its authors give them."""


@pytest.mark.parametrize("name", PRESETS)
def test_denoiser_has_the_published_size_and_its_blocks_hold_the_feature_layers(name: str):
    preset = PRESETS[name]
    denoiser = preset.denoiser.build()
    assert sum(p.numel() for p in denoiser.parameters()) == pytest.approx(PARAMETERS[name], rel=0.01)
    depth = sum(preset.denoiser.config[entry] for entry in preset.denoiser.depth)
    assert preset.feature_layers == (depth, round(depth * 2 / 3))
    keypoint_indices(preset.num_steps, preset.num_student_steps)


@pytest.mark.parametrize("name", PRESETS)
def test_latents_are_those_of_the_vae(name: str):
    preset = PRESETS[name]
    vae: Any = preset.vae.build()
    channels, frames, height, width = preset.latent_shape
    assert channels == vae.config.get("latent_channels", vae.config.get("z_dim"))
    assert (height, width) == (preset.height // preset.space_stride, preset.width // preset.space_stride)
    stride = getattr(vae.config, "scale_factor_spatial", None) or vae.spatial_compression_ratio
    assert preset.space_stride == stride
    stride = getattr(vae.config, "scale_factor_temporal", None) or vae.temporal_compression_ratio
    assert preset.time_stride == stride
    assert (frames - 1) * stride + 1 == preset.num_frames


@pytest.mark.parametrize(
    ("name", "make", "arguments"),
    [
        ("wan21-t2v-14b", lambda: tiny_wan_pipeline("unipc"), TINY_CALL),
        ("wan21-i2v-14b", tiny_wan_i2v_pipeline, {**TINY_CALL, "image": tiny_image()}),
        ("hunyuan-544p", tiny_hunyuan_pipeline, TINY_HUNYUAN_CALL),
        ("ltx", tiny_ltx_pipeline, TINY_CALL),
        ("mochi", tiny_mochi_pipeline, TINY_CALL),
    ],
)
def test_call_is_the_one_that_the_pipeline_makes(name: str, make: Any, arguments: dict[str, Any]):
    """Names, types and numbers of axes of a real pipeline's call; bfloat16 where that one has its float32."""
    pipeline, planned = make(), PRESETS[name].call()
    with watch(pipeline) as seen:
        pipeline(prompt="red", num_inference_steps=2, output_type="latent", **arguments)
    call = seen.steps[0].call
    assert call.tensors.keys() == planned.tensors.keys()
    for key, tensor in call.tensors.items():
        assert tensor.ndim == planned.tensors[key].ndim, key
        assert tensor.is_floating_point() == planned.tensors[key].is_floating_point(), key
    assert (call.condition is None) == (planned.condition is None)
    assert planned.constants.keys() <= call.constants.keys()
    assert seen.steps[0].state.ndim == 1 + len(PRESETS[name].state_shape)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("hunyuan-544p", (None, None, 92), "89 and 93"),
        ("ltx", (None, None, 160), "153 and 161"),
        ("mochi", (None, None, 162), "157 and 163"),
        ("wan22-ti2v-5b", (720, None, None), "multiple of 32 pixels; the nearest is 704"),
        ("wan21-t2v-14b", (None, 840, None), "multiple of 16"),
    ],
)
def test_a_size_that_the_teacher_cannot_make_is_refused(name: str, size: tuple[Any, ...], message: str):
    with pytest.raises(UserError, match=message):
        PRESETS[name].check_size(*size)


def test_an_unknown_preset_is_answered_by_their_names():
    for command in ("record", "distill"):
        with pytest.raises(UserError, match="hunyuan-544p.*mochi"):
            defaults(command, "hunyuan")
    with pytest.raises(UserError, match="hunyuan-544p.*mochi"):
        find_preset("hunyuan")


def test_distilling_starts_from_the_papers_settings():
    config = distill_defaults(PRESETS["hunyuan-720p"], Path("data"), Path("out"))
    assert config == replace(paper(Path("data"), Path("out")), feature_layers=(60, 40))
    assert (config.learning_rate, config.batch_size, config.num_iterations) == (5e-6, 32, 1200)
    assert config.adversarial_weight == 0.1


def test_recording_with_a_preset_takes_its_settings_and_the_command_lines(tmp_path: Path):
    tiny_wan_pipeline("unipc").save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("red\n")
    places = [str(tmp_path / "teacher"), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "data")]
    own = ["--height", "32", "--width=32", "--num-frames", "5", "--num-steps", "10"]
    own += ["--pipeline-arg", "max_sequence_length=12", "--pipeline-arg", 'negative_prompt="blurry"']
    assert cli.run(["record", *places, "--preset", "wan21-t2v-1.3b", *own, "--json"]) == 0
    manifest, preset = read_manifest(tmp_path / "data"), PRESETS["wan21-t2v-1.3b"]
    assert manifest.scheduler["config"]["flow_shift"] == preset.shift == 8
    expected = torch.tensor([8 * u / (1 + 7 * u) for u in (1 - i / 10 for i in range(10))])
    assert torch.allclose(torch.tensor(manifest.sigmas[:-1]), expected, atol=3e-3)  # its levels end a little above 0
    assert (manifest.guidance_scale, manifest.fps, manifest.dtype) == (6, 16, "bfloat16")
    assert (manifest.num_steps, manifest.num_student_steps, manifest.num_frames) == (10, 10, 5)
    assert manifest.pipeline_args == {"negative_prompt": "blurry", "max_sequence_length": 12}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_what_recording_starts_from(name: str):
    config, preset = defaults("record", name), PRESETS[name]
    assert isinstance(config, RecordConfig)
    assert (config.teacher, config.shift, config.num_frames) == (preset.teacher, preset.shift, preset.num_frames)
    assert {text.partition("=")[0] for text in config.pipeline_arg} == preset.pipeline_args.keys()
    assert all(json.loads(text.partition("=")[2]) for text in config.pipeline_arg)


def test_a_shift_that_the_pipeline_computes_cannot_be_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny_ltx_pipeline().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("red\n")
    places = [str(tmp_path / "teacher"), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "data")]
    assert cli.run(["record", *places, "--shift", "3"]) == 1
    assert "leave --shift out" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
