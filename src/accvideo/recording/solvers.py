"""Solvers of the denoising ODE that use nothing but velocities, over whatever noise levels a scheduler has set."""

from collections.abc import Callable
from typing import Literal, get_args

from accvideo.flow import euler_step
from accvideo.types import Latents

Solver = Literal["own", "euler", "adams2"]
"""How the steps of a run are taken: by the pipeline's own scheduler, by Euler's method, or by one of second order."""

SOLVERS: tuple[Solver, ...] = get_args(Solver)

Step = Callable[[Latents, Latents, float, float], Latents]
"""The next state, from a state, its velocity, its noise level and the next; called for all steps of a run in order."""


class AdamsStep:
    """Steps of the two-step Adams-Bashforth method: second order with one velocity a step, whatever the levels.

    An Euler step along the velocity in the middle of the step, as a straight line through this and the last velocity
    has it (Hairer, Nørsett & Wanner 1993, Solving Ordinary Differential Equations I, section III.5). The first step is
    Euler's. Unlike solvers in the logarithm of the signal-to-noise ratio (DPM-Solver++, arXiv:2211.01095; UniPC,
    arXiv:2302.04867), for which the first and the last of evenly spaced levels are far apart, it needs no special case
    at noise or at video, and works where sigmas run the other way.
    """

    def __init__(self) -> None:
        self.last: tuple[Latents, float] | None = None

    def __call__(self, latents: Latents, velocity: Latents, sigma: float, next_sigma: float) -> Latents:
        """The next state; all in float32."""
        middle = velocity
        if self.last is not None:
            last_velocity, last_sigma = self.last
            middle = velocity + (next_sigma - sigma) / 2 * (velocity - last_velocity) / (sigma - last_sigma)
        self.last = (velocity, sigma)
        return euler_step(latents, middle, sigma, next_sigma)


def solver_step(solver: Solver) -> Step | None:
    """What takes the steps of one run in place of the scheduler; None for its own."""
    return {"own": None, "euler": euler_step, "adams2": AdamsStep()}[solver]
