"""Which states of a recorded trajectory a student should visit: grids of key points, and what each leaves to be bent.

A student's step leads along a secant, from one key point straight to the next. Between them the teacher's path bends.
The bend of a step is the squared difference of the teacher's velocity and the secant's, summed over the noise levels
of the step: nothing for a straight path, and additive over steps, so that the best grid of K steps is found exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Costs = Float[Tensor, "levels levels"]
"""Of a step from each level (row) to each later one (column), float64; the rest is not read."""


def secant_costs(states: Float[Tensor, "batch levels *state"], sigmas: Float[Tensor, " levels"]) -> Costs:
    """The bend of the teacher's path on each possible step of a student, as a mean over elements and trajectories.

    The sum over the teacher's steps n within a student's, `|gap_n| (v_n - s)^2` with the velocities v_n and the secant
    s, which is `sum_n |gap_n| v_n^2 - |gap| s^2`: the velocities' second moment without that of their mean.
    """
    gaps = sigmas.double()[None, :] - sigmas.double()[:, None]
    squares = squared_distances(states) / gaps.abs().fill_diagonal_(1)
    path = torch.cat([torch.zeros(1, dtype=torch.float64), squares.diagonal(1).cumsum(0)])
    return (path[None, :] - path[:, None] - squares).clamp(min=0)


def start_costs(states: Float[Tensor, "batch levels *state"], sigmas: Float[Tensor, " levels"]) -> Costs:
    """How far a student is from its next key point before it has learnt anything.

    It starts as the teacher, whose velocity at a key point is that of its own next step: the squared distance of where
    that leads from the teacher's state, as a mean over elements and trajectories.
    """
    flat, levels = states.flatten(2).double(), sigmas.double()
    costs = torch.zeros(len(levels), len(levels), dtype=torch.float64)
    for start in range(len(levels) - 1):
        velocity = (flat[:, start + 1] - flat[:, start]) / (levels[start + 1] - levels[start])
        reached = flat[:, start, None] + (levels[start + 1 :] - levels[start])[:, None] * velocity[:, None]
        costs[start, start + 1 :] = (reached - flat[:, start + 1 :]).square().mean((0, 2))
    return costs


def squared_distances(states: Float[Tensor, "batch levels *state"]) -> Float[Tensor, "levels levels"]:
    """Mean squared difference of the states at any two levels, in float64."""
    flat = states.flatten(2).double()
    return torch.stack([(flat - flat[:, level, None]).square().mean((0, 2)) for level in range(flat.shape[1])])


def grid_cost(costs: Costs, keypoints: Sequence[int]) -> float:
    """The cost of all steps of a grid."""
    return float(sum(costs[pair] for pair in zip(keypoints[:-1], keypoints[1:], strict=True)))


def best_grid(costs: Costs, num_student_steps: int) -> list[int]:
    """The key points of least cost, the first and last level among them, by dynamic programming (Bellman 1954)."""
    num_levels = len(costs)
    later = torch.ones(num_levels, num_levels, dtype=torch.bool).triu(1)
    costs = costs.masked_fill(~later, torch.inf)
    least, before = costs[0], []
    for _ in range(num_student_steps - 1):
        least, origin = (least[:, None] + costs).min(0)
        before.append(origin)
    keypoints = [num_levels - 1]
    for origin in reversed(before):
        keypoints.append(int(origin[keypoints[-1]]))
    return [0, *reversed(keypoints)]


@dataclass(frozen=True)
class ShiftedGrid:
    """Key points near even steps on a shifted grid."""

    keypoints: list[int]
    shift: float
    """Relative to the shift that the teacher's own levels have."""


def shifted_grid(num_steps: int, num_student_steps: int, shift: float) -> ShiftedGrid | None:
    """The recorded levels nearest to K even steps on a grid of another shift; None where two of them are the same.

    Shifts multiply: on the teacher's levels, themselves even steps with a shift, this is one more. A grid of a shift is
    what user interfaces can be asked for.
    """
    keypoints = [
        round(num_steps * (1 - shift * u / (1 + (shift - 1) * u)))
        for u in (1 - k / num_student_steps for k in range(num_student_steps + 1))
    ]
    return ShiftedGrid(keypoints, shift) if len(set(keypoints)) == len(keypoints) else None


def best_shift(num_steps: int, num_student_steps: int, cost: Callable[[Sequence[int]], float]) -> ShiftedGrid:
    """The shifted grid of least cost, among relative shifts from 1/32 to 32; of equal ones that nearest to 1."""
    shifts = sorted((2 ** (i / 20) for i in range(-100, 101)), key=lambda shift: max(shift, 1 / shift))
    grids = [shifted_grid(num_steps, num_student_steps, shift) for shift in shifts]
    return min((grid for grid in grids if grid is not None), key=lambda grid: cost(grid.keypoints))
