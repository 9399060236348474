"""Conventions and shapes, stated once.

* ``sigma`` is 1 at noise and 0 at video unless a pipeline's own scheduler says otherwise.
* ``velocity = dx/dsigma = noise - video``; one Euler step is ``x + (next_sigma - sigma) * velocity``.
* ``guidance_scale = 1`` is off; tensors are batch first; latents are whatever the pipeline's scheduler steps on
  (``[batch, channels, frames, height, width]``, or ``[batch, tokens, channels]`` where a pipeline packs them).
* A teacher trajectory has S + 1 states (S denoising steps); K + 1 of them, from noise to video, are its key points.
"""

from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "batch *state"]
"""A batch of states of the denoising ODE, float32."""

Sigmas = Float[Tensor, " levels"]
"""Noise levels, from noise to video."""

PerSample = Float[Tensor, " batch"]
"""One value a sample."""


class UserError(Exception):
    """A mistake of the user: the command line prints it in at most two lines and exits with code 1."""
