"""Watching changes nothing, leaves nothing behind, and refuses what does not obey the rule."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UNet2DModel,
    WanPipeline,
)
from peft import LoraConfig

from accvideo.teacher import (
    denoisers,
    denoising_grid,
    fingerprint,
    item_generator,
    load_pipeline,
    pipeline_defaults,
    provenance,
    watch,
)
from accvideo.types import UserError
from tests.tiny import TINY_CALL, TINY_FAMILIES, tiny_wan_pipeline


def generate(pipeline: Any, num_steps: int = 4, **arguments: Any) -> torch.Tensor:
    return pipeline(
        prompt="red square",
        num_inference_steps=num_steps,
        generator=item_generator(0, 0),
        output_type="latent",
        **TINY_CALL | arguments,
    ).frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    tiny_wan_pipeline("unipc").save_pretrained(path)
    return path


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_watching_changes_nothing(family):
    make, arguments = TINY_FAMILIES[family]
    expected = generate(make(), **arguments)
    pipeline = make()
    with watch(pipeline) as seen:
        assert torch.equal(generate(pipeline, **arguments), expected)
    assert seen.final is not None and torch.equal(seen.final, expected)
    assert seen.num_steps == len(seen.steps) == 4 and len(seen.sigmas) == 5
    assert [(step.sigma, step.next_sigma) for step in seen.steps] == list(
        zip(seen.sigmas, seen.sigmas[1:], strict=False)
    )


def test_two_experts_are_told_apart():
    make, arguments = TINY_FAMILIES["wan-experts"]
    pipeline = make()
    with watch(pipeline) as seen:
        generate(pipeline, 10, **arguments)
    names = [step.denoiser for step in seen.steps]
    assert names == sorted(names) and set(names) == {"transformer", "transformer_2"}


def test_only_the_steps_asked_for_are_kept():
    pipeline, counted = tiny_wan_pipeline(), []
    with watch(pipeline) as everything:
        generate(pipeline)
    with watch(pipeline, keep=[1, 3], on_step=counted.append) as seen:
        generate(pipeline)
    assert [step.sigma for step in seen.steps] == [everything.steps[1].sigma, everything.steps[3].sigma]
    assert torch.equal(seen.steps[1].state, everything.steps[3].state)
    assert counted == [1, 2, 3, 4] and seen.num_calls == 8


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_watching_ends_cleanly(error):
    """No hook and no wrapper is left, whatever happens."""
    pipeline = tiny_wan_pipeline(scheduler="dpm")

    def fail(step: int) -> None:
        if step == 2:
            raise error

    with pytest.raises(error), watch(pipeline, on_step=fail):
        generate(pipeline)
    assert not pipeline.transformer._forward_pre_hooks
    assert "step" not in vars(pipeline.scheduler)
    assert torch.equal(generate(pipeline), generate(tiny_wan_pipeline(scheduler="dpm")))


def test_bfloat16_steps_obey_the_rule():
    pipeline = tiny_wan_pipeline("euler").to(torch.bfloat16)
    with watch(pipeline) as seen:
        generate(pipeline, 50)
    assert seen.steps[0].call.dtype == torch.bfloat16 and seen.steps[0].state.dtype == torch.float32


@pytest.mark.parametrize(
    ("scheduler", "message", "num_calls"),
    [
        (DDIMScheduler(), "DDIMScheduler.*no noise levels", 0),
        (FlowMatchHeunDiscreteScheduler(), "2 calls a step", 0),
        (DPMSolverMultistepScheduler(prediction_type="epsilon"), r"\(epsilon\) is not next = state", 1),
        (DPMSolverMultistepScheduler(prediction_type="v_prediction"), r"\(v_prediction\) is not next = state", 1),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "is not next = state", 1),
    ],
)
def test_other_schedulers_are_refused(scheduler, message, num_calls):
    """In at most two lines that say what was found and what is supported, after one denoiser call at most."""
    pipeline, calls = tiny_wan_pipeline(), []
    pipeline.scheduler = scheduler
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(UserError, match=message) as error, watch(pipeline):
        generate(pipeline, 50, guidance_scale=1.0)
    assert len(calls) <= num_calls
    assert len(str(error.value).splitlines()) <= 2 and "upported" in str(error.value)


def test_grid_is_the_pipelines_own_and_free():
    """The noise levels found without a denoiser call are those of the run."""
    for make, arguments in TINY_FAMILIES.values():
        pipeline, calls = make(), []
        for denoiser in denoisers(pipeline).values():
            denoiser.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        sigmas, timesteps = denoising_grid(pipeline, 4, prompt="red square", **arguments)
        assert not calls and len(timesteps) == 4
        with watch(pipeline) as seen:
            generate(pipeline, **arguments)
        assert seen.sigmas == sigmas


def test_arguments_that_the_pipeline_refuses():
    with pytest.raises(UserError, match="WanPipeline refuses.*divisible by 16"):
        denoising_grid(tiny_wan_pipeline(), 4, prompt="red", height=33, width=32)


def test_fingerprint_tells_teachers_apart(folder):
    """And neither a reload, nor another floating-point type, nor a LoRA on top."""
    pipeline = tiny_wan_pipeline("unipc")
    own = fingerprint(pipeline.transformer)
    assert own == fingerprint(load_pipeline(str(folder)).transformer)
    assert own == fingerprint(load_pipeline(str(folder), torch.bfloat16).transformer)
    assert own != fingerprint(tiny_wan_pipeline("unipc", seed=1).transformer)
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ffn.net.2"]))
    assert own == fingerprint(pipeline.transformer)
    with torch.no_grad():
        pipeline.transformer.blocks[1].ffn.net[2].base_layer.bias.add_(1)
    assert own != fingerprint(pipeline.transformer)


def test_noise_of_an_item_depends_on_seed_and_index_only():
    noise = {key: torch.randn(8, generator=item_generator(*key)) for key in [(0, 0), (0, 1), (1, 0), (1, 1), (11, 1)]}
    assert len({tuple(each.tolist()) for each in noise.values()}) == 5
    torch.manual_seed(7)
    assert torch.equal(noise[0, 1], torch.randn(8, generator=item_generator(0, 1)))


def test_load_pipeline(folder):
    assert isinstance(load_pipeline(str(folder)), WanPipeline)


def test_what_is_no_teacher_is_refused(tmp_path):
    with pytest.raises(UserError, match="no model_index.json"):
        load_pipeline(str(tmp_path))
    with pytest.raises(UserError, match="cannot load the pipeline nobody/nothing"):
        load_pipeline("nobody/nothing")
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="DDPMPipeline without a `transformer`"):
        load_pipeline(str(tmp_path))


def test_defaults_and_provenance_of_a_folder(folder, tmp_path):
    assert pipeline_defaults(str(folder)) == {} and pipeline_defaults("nobody/nothing") == {}
    assert provenance(str(tmp_path)) == provenance("nobody/nothing") == (None, None)
    (tmp_path / "accvideo.json").write_text(json.dumps({"height": 64}))
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher\n")
    assert pipeline_defaults(str(tmp_path)) == {"height": 64}
    assert provenance(str(tmp_path)) == (None, "apache-2.0")
    for text in ("{", "[" * 100_000):
        (tmp_path / "accvideo.json").write_text(text)
        with pytest.raises(UserError, match="accvideo.json is not JSON"):
            pipeline_defaults(str(tmp_path))
