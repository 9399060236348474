"""Solvers of the denoising ODE that use nothing but velocities, over whatever noise levels a scheduler has set."""

from collections.abc import Callable
from typing import Literal, get_args

from accvideo.flow import euler_step
from accvideo.types import Latents

Solver = Literal["own", "euler", "adams2"]
"""How the steps of a run are taken: by the pipeline's own scheduler, by Euler's method, or by one of second order."""

SOLVERS: tuple[Solver, ...] = get_args(Solver)

Step = Callable[[Latents, Latents, float, float], tuple[Latents, Latents]]
"""From a state, its velocity, its noise level and the next one: the state, better known by now, and the next one.

It is called for all steps of a run in order."""


def plain_step(latents: Latents, velocity: Latents, sigma: float, next_sigma: float) -> tuple[Latents, Latents]:
    """The state as it is, and one Euler step on."""
    return latents, euler_step(latents, velocity, sigma, next_sigma)


class AdamsStep:
    """Steps of the Adams-Bashforth-Moulton method of second order: one velocity a step, on any noise levels.

    A step goes along the velocity in its middle, as a straight line through this and the last velocity has it. Once
    the velocity at its end is known, that state is corrected to where the mean of both ends would have led, and the
    next step starts there; the velocity is not asked for again (Hairer, Nørsett & Wanner 1993, Solving Ordinary
    Differential Equations I, sections III.1 and III.5: PEC mode, variable steps). The first step is Euler's.

    Solvers in the logarithm of the signal-to-noise ratio (DPM-Solver++, arXiv:2211.01095; UniPC, arXiv:2302.04867)
    find the first and the last of evenly spaced levels far apart. In sigma there is no special case at noise or at
    video, and it may run either way.
    """

    def __init__(self) -> None:
        self.last: tuple[Latents, Latents, float] | None = None

    def __call__(self, latents: Latents, velocity: Latents, sigma: float, next_sigma: float) -> tuple[Latents, Latents]:
        """The state, corrected, and the next one; all in float32."""
        middle = velocity
        if self.last is not None:
            last_middle, last_velocity, last_sigma = self.last
            # What the pipeline has changed in the state since, such as frames that it is given, stays.
            latents = euler_step(latents, (last_velocity + velocity) / 2 - last_middle, last_sigma, sigma)
            middle = velocity + (next_sigma - sigma) / 2 * (velocity - last_velocity) / (sigma - last_sigma)
        self.last = (middle, velocity, sigma)
        return latents, euler_step(latents, middle, sigma, next_sigma)


def solver_step(solver: Solver) -> Step | None:
    """What takes the steps of one run in place of the scheduler; None for its own."""
    return {"own": None, "euler": plain_step, "adams2": AdamsStep()}[solver]
