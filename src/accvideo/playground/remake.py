"""What a student makes of real clips: their latents noised, then denoised by its last steps.

A decoder trained on an encoder's latents reads those of a sampler worse; on latents with a sampler's own errors, whose
clips are known exactly, it learns to read both.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from accvideo.flow import euler_step
from accvideo.inference.model import Model, load_model
from accvideo.playground.networks import MAX_TOKENS
from accvideo.types import Latents, UserError

NUM_STEPS = (1, 0, 1, 2, 1, 0, 1, 1)
"""Last steps that the student takes in each of eight batches; 0: the latents get plain noise instead."""


def load_remaker(name: str, vae: nn.Module, device: torch.device) -> Model:
    """The student called `name`, on a device, if its latents are those of an autoencoder.

    Raises:
        UserError: it is no student, or one of other latents.
    """
    model = load_model(name, torch.float32, str(device))
    if model.student is None:
        raise UserError(f"{name} is a teacher; give --refine-by a student of the playground, or playground-student")
    own, other = (each.encoder.state_dict() for each in (vae, model.pipeline.components["vae"]))  # type: ignore[union-attr]
    if own.keys() != other.keys() or not all(torch.equal(weight, other[key]) for key, weight in own.items()):
        raise UserError(
            f"{name} makes latents of another encoder\nGive --start-from the teacher that it is a student of"
        )
    return model


@torch.no_grad()
def remade(model: Model, latents: Latents, captions: Sequence[str], noise: Tensor, num_steps: int) -> Latents:
    """Latents that a student's last steps make of noised ones.

    Args:
        model: a student of the playground.
        latents: of clips, of mean 0 and deviation 1.
        captions: what they show.
        noise: that they are mixed with, up to the student's noise level before those steps.
        num_steps: steps that it takes.
    """
    config, pipeline = model.student, model.pipeline
    assert config is not None
    denoiser: Any = pipeline.components["transformer"]
    encode: Any = getattr(pipeline, "encode_prompt")  # noqa: B009 - diffusers' base class has none
    embeds, _ = encode(
        list(captions), do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS, device=latents.device
    )
    levels = pairwise(config.sigmas[-num_steps - 1 :])
    state = torch.lerp(latents, noise, config.sigmas[-num_steps - 1])
    for (sigma, next_sigma), timestep in zip(levels, config.timesteps[-num_steps:], strict=True):
        told = state.new_full((len(state),), timestep)
        velocity = denoiser(hidden_states=state, timestep=told, encoder_hidden_states=embeds, return_dict=False)[0]
        state = euler_step(state, velocity.float(), sigma, next_sigma)
    return state
