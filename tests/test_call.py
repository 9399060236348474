"""Replaying a recorded call asks the denoiser exactly what the pipeline asked it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from accvideo.call import capture_call, collate_calls, denoiser_blocks, layer_features, replay, replay_with_features
from accvideo.flow import euler_step
from accvideo.teacher import WatchedStep, denoisers, item_generator, watch
from accvideo.types import UserError
from tests.tiny import TINY_CALL, TINY_FAMILIES, tiny_hunyuan_pipeline, tiny_wan_pipeline

FAMILIES = pytest.mark.parametrize("family", TINY_FAMILIES)
TWO_CALLS = ["wan-euler", "wan-unipc", "wan-dpm", "wan-experts", "wan-i2v"]
PROMPTS = ["red square", "a blue circle!"]


def run(family: str, guidance_scale: float, num_steps: int = 6) -> tuple[Any, list[WatchedStep]]:
    """A watched run of two prompts; image-to-video takes one prompt an image."""
    make, arguments = TINY_FAMILIES[family]
    pipeline, prompts = make(), PROMPTS[:1] if "image" in arguments else PROMPTS
    with watch(pipeline) as seen:
        pipeline(
            prompt=prompts,
            generator=[item_generator(0, i) for i in range(len(prompts))],
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            output_type="latent",
            **arguments,
        )
    return pipeline, seen.steps


@FAMILIES
@torch.no_grad()
def test_replay_is_bit_for_bit(family):
    """Guidance off: the replayed velocity is the recorded one, at each step."""
    pipeline, steps = run(family, 1.0)
    assert len(steps) == 6
    for step in steps:
        assert torch.equal(replay(denoisers(pipeline)[step.denoiser], step.call, step.state), step.velocity)


@pytest.mark.parametrize("family", ["wan-euler", "wan-experts", "hunyuan", "ltx", "mochi"])
@torch.no_grad()
def test_replayed_euler_trajectory_is_the_recorded_one(family):
    """The teacher's own weights, all steps, from the recorded noise: every state bit for bit."""
    pipeline, steps = run(family, 1.0)
    state = steps[0].state
    for step in steps:
        assert torch.equal(state, step.state)
        velocity = replay(denoisers(pipeline)[step.denoiser], step.call, state)
        state = euler_step(state, velocity, step.sigma, step.next_sigma)
    assert torch.equal(state, steps[-1].next_state)


@pytest.mark.parametrize("family", TWO_CALLS)
@torch.no_grad()
def test_guided_replay_is_bit_for_bit(family):
    """Both calls of a guided step, replayed and combined, give what the scheduler was given."""
    make, arguments = TINY_FAMILIES[family]
    pipeline, prompts = make(), PROMPTS[:1] if "image" in arguments else PROMPTS
    unconditional: list[dict[str, Any]] = []

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        unconditional.append(dict(kwargs))

    for denoiser in denoisers(pipeline).values():
        denoiser.register_forward_pre_hook(see, with_kwargs=True)
    with watch(pipeline) as seen:
        pipeline(
            prompt=prompts,
            generator=[item_generator(0, i) for i in range(len(prompts))],
            num_inference_steps=6,
            guidance_scale=3.0,
            output_type="latent",
            **arguments,
        )
    assert len(unconditional) == seen.num_calls == 12
    for step, arguments in zip(seen.steps, unconditional[1::2].copy(), strict=True):
        denoiser = denoisers(pipeline)[step.denoiser]
        without_prompt = replay(denoiser, capture_call(arguments, step.state)[0], step.state)
        with_prompt = replay(denoiser, step.call, step.state)
        assert not torch.equal(with_prompt, without_prompt)
        assert torch.equal(without_prompt + 3.0 * (with_prompt - without_prompt), step.velocity)


@pytest.mark.parametrize("family", ["ltx", "mochi"])
@torch.no_grad()
def test_doubled_batch_keeps_the_conditional_half(family):
    """Guidance by a doubled batch, unconditional first: the replay is the second half of the denoiser's output."""
    make, arguments = TINY_FAMILIES[family]
    pipeline, outputs = make(), []
    pipeline.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    with watch(pipeline) as seen:
        pipeline(prompt=PROMPTS, num_inference_steps=4, guidance_scale=3.0, output_type="latent", **arguments)
    assert seen.num_calls == 8
    for step, output in zip(seen.steps, list(outputs), strict=True):
        half = output[2:]
        assert torch.allclose(replay(pipeline.transformer, step.call, step.state), half, atol=1e-5 * half.abs().max())


@FAMILIES
@torch.no_grad()
def test_samples_do_not_mix(family):
    """Split into single samples and put together again a call is itself; alone, a sample gets the same velocity."""
    pipeline, steps = run(family, 3.0, num_steps=2)
    denoiser, call, state = denoisers(pipeline)[steps[0].denoiser], steps[0].call, steps[0].state
    parts = [call.select(slice(i, i + 1)) for i in range(len(state))]
    together = collate_calls(parts)
    assert all(torch.equal(together.tensors[name], call.tensors[name]) for name in call.tensors)
    velocity = replay(denoiser, together, state)
    alone = torch.cat([replay(denoiser, part, state[i : i + 1]) for i, part in enumerate(parts)])
    assert torch.allclose(alone, velocity, atol=1e-5 * velocity.abs().max().item())


def test_image_condition_is_apart_from_the_state():
    _, steps = run("wan-i2v", 1.0, num_steps=2)
    assert steps[0].state.shape[1] == 4
    condition = steps[0].call.condition
    assert condition is not None and condition.shape[1] == 12
    assert not condition[:, :4].any() and condition[:, 4:].any()


def test_replay_in_another_type():
    """A bfloat16 denoiser takes float32 latents and calls, the timestep stays as it is, and the result is float32."""
    pipeline, steps = run("hunyuan", 1.0, num_steps=2)
    seen: list[dict[str, Tensor]] = []
    pipeline.transformer.to(torch.bfloat16)
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
    )
    assert replay(pipeline.transformer, steps[0].call, steps[0].state).dtype == torch.float32
    assert seen[0]["hidden_states"].dtype == seen[0]["encoder_hidden_states"].dtype == torch.bfloat16
    assert seen[0]["timestep"].dtype == torch.float32


def test_calls_of_different_lengths_cannot_share_a_batch():
    _, steps = run("wan-euler", 1.0, num_steps=1)
    call = steps[0].call
    call.tensors["encoder_hidden_states"] = call.tensors["encoder_hidden_states"][:, :5]
    with pytest.raises(UserError, match="encoder_hidden_states"):
        collate_calls([call, run("wan-euler", 1.0, num_steps=1)[1][0].call])


@pytest.mark.parametrize("family", ["wan-euler", "hunyuan", "ltx", "mochi"])
def test_layer_features_are_the_blocks_own(family):
    """They equal what the block gives in a full forward, cost no later block, and let gradients through."""
    pipeline, steps = run(family, 1.0, num_steps=2)
    denoiser, state = pipeline.transformer, steps[0].state.requires_grad_()
    blocks, outputs, order = denoiser_blocks(denoiser), [], []
    hooks = [block.register_forward_hook(lambda m, args, output: outputs.append(output)) for block in blocks]
    replay(denoiser, steps[0].call, state)
    for hook in hooks:
        hook.remove()
    for number, block in enumerate(blocks, start=1):
        block.register_forward_pre_hook(lambda module, args, number=number: order.append(number))
    for layer in range(1, len(blocks) + 1):
        order.clear()
        features = layer_features(denoiser, steps[0].call, state, layer)
        assert order == list(range(1, layer + 1))
        full = outputs[layer - 1]
        assert torch.equal(features, full[0] if isinstance(full, tuple) else full)
        assert len(features) == len(state) and features.ndim == 3
        (gradient,) = torch.autograd.grad(features.square().sum(), state)
        assert gradient.abs().sum() > 0
        velocity, seen = replay_with_features(denoiser, steps[0].call, state, layer)
        assert torch.equal(seen, features) and torch.equal(velocity, replay(denoiser, steps[0].call, state))
        assert not blocks[layer - 1]._forward_hooks, "the way out is removed"


def test_layer_features_under_gradient_checkpointing():
    """The same features and gradients, and the denoiser works as before afterwards."""
    pipeline, steps = run("wan-euler", 1.0, num_steps=1)
    denoiser, state = pipeline.transformer.train(), steps[0].state.requires_grad_()
    expected = layer_features(denoiser, steps[0].call, state, 2)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), state)
    denoiser.enable_gradient_checkpointing()
    features = layer_features(denoiser, steps[0].call, state, 2)
    (gradient,) = torch.autograd.grad(features.square().sum(), state)
    assert torch.equal(features, expected) and torch.equal(gradient, expected_gradient)
    velocity = replay(denoiser, steps[0].call, state)
    denoiser.disable_gradient_checkpointing()
    assert torch.equal(velocity, replay(denoiser, steps[0].call, state))


def test_hunyuan_blocks_run_double_then_single():
    names = [type(block).__name__ for block in denoiser_blocks(tiny_hunyuan_pipeline().transformer)]
    assert names == ["HunyuanVideoTransformerBlock"] * 2 + ["HunyuanVideoSingleTransformerBlock"] * 2


def test_what_cannot_be_replayed_is_refused():
    """A call that does not hold the scheduler's state, or arguments that cannot be kept."""
    state = torch.randn(2, 4, 2, 4, 4)
    good = {"hidden_states": state, "timestep": torch.ones(2)}
    assert capture_call(good, state)[0].condition is None
    for bad, message in (
        ({"sample": state}, "hidden_states"),
        (good | {"hidden_states": state * 0.5}, "unscaled"),
        (good | {"hidden_states": torch.cat([state] * 3)}, "twice the batch"),
        (good | {"hidden_states": state.flatten(3)}, "same shape"),
        (good | {"cache": object()}, "cache"),
    ):
        with pytest.raises(UserError, match=message) as error:
            capture_call(bad, state)
        assert len(str(error.value).splitlines()) <= 2


def test_kept_tensors_are_copies():
    """A pipeline may reuse its buffers."""
    state, timestep = torch.randn(1, 4, 2, 4, 4), torch.ones(1)
    call, _ = capture_call({"hidden_states": state, "timestep": timestep}, state)
    timestep.zero_()
    assert call.tensors["timestep"].item() == 1


def test_positional_arguments_are_named():
    """A pipeline that passes its denoiser positional arguments is watched as well."""
    pipeline = tiny_wan_pipeline()
    forward = pipeline.transformer.forward

    with watch(pipeline) as seen:
        call = type(pipeline.transformer).__call__

        def positional(self: Any, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **rest: Any):
            return call(self, hidden_states, timestep, encoder_hidden_states, **rest)

        patched = type("Positional", (type(pipeline.transformer),), {"__call__": positional})
        pipeline.transformer.__class__ = patched
        pipeline("red", num_inference_steps=1, guidance_scale=1.0, output_type="latent", **TINY_CALL)
    assert seen.steps[0].call.tensors.keys() == {"timestep", "encoder_hidden_states"}
    assert forward.__name__ == "forward"
