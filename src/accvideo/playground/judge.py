"""The playground's judge: whether a clip shows what its caption asks for.

The numbers of the scene are read back from the pixels (`accvideo.playground.recover`), the scene is drawn again from
them and compared with the clip, and what was found is compared with the caption.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import permutations

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from accvideo.playground import world
from accvideo.playground.recover import MAX_OBJECTS, Findings, recover
from accvideo.playground.world import PATTERNS, SHAPES, Requests, Scenes


@dataclass(frozen=True)
class Verdicts:
    """What the judge says of each clip.

    Objects of a clip are matched to the caption's as a set, in the way that makes most properties right (color first).
    A property is right if it is right for all matched objects; what is missing or too much is an error of `count`
    alone, except that a clip without any object is right in no property of objects.
    """

    shape: Bool[Tensor, " batch"]
    color: Bool[Tensor, " batch"]
    background: Bool[Tensor, " batch"]
    """Color and pattern."""
    motion: Bool[Tensor, " batch"]
    count: Bool[Tensor, " batch"]
    all_right: Bool[Tensor, " batch"]
    rerender_psnr_db: Float[Tensor, " batch"]
    """PSNR of the clip against `scenes` drawn again, over all pixels and frames, in dB."""
    flicker: Float[Tensor, " batch"]
    """Mean absolute second difference over time of clip minus re-render, in levels (0 to 255): what changes from frame
    to frame beyond the motion that was recognized. Below 0.2 for the world's own clips, whether they move or not."""
    scenes: Scenes
    """What was found. `requests.count` may be 0, or 3 for three or more; the two largest objects are kept."""


@torch.no_grad()
def judge(frames: UInt8[Tensor, "batch 17 64 64 3"], captions: Sequence[str], batch_size: int = 8) -> Verdicts:
    """Judge clips against their captions.

    Args:
        frames: Clips as bytes.
        captions: What each clip should show, in the world's grammar.
        batch_size: Clips analyzed together; the result does not depend on it.

    Raises:
        UserError: A caption is not in the grammar.
    """
    requests = world.parse_captions(captions)
    parts = [
        _judge_batch(frames[i : i + batch_size], requests[slice(i, i + batch_size)])
        for i in range(0, len(captions), batch_size)
    ]
    names = [field.name for field in fields(Verdicts) if field.name != "scenes"]
    scenes = [part.scenes for part in parts]
    found = Requests(*(torch.cat([getattr(s.requests, f.name) for s in scenes]) for f in fields(Requests)))
    objects, phase = torch.cat([s.objects for s in scenes]), torch.cat([s.phase for s in scenes])
    columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Verdicts(**columns, scenes=Scenes(found, objects, phase))


def _judge_batch(frames: Tensor, requests: Requests) -> Verdicts:
    clip = frames.permute(0, 4, 1, 2, 3).contiguous().float()
    findings = recover(clip)
    shape, color, motion = (v[:, :2].clamp(min=0) for v in (findings.shape, findings.color, findings.motion))
    count = findings.count.clamp(max=MAX_OBJECTS)
    found = Requests(count, shape, color, motion, findings.background, findings.pattern)
    scenes, residual = _draw_best_order(Scenes(found, findings.objects[:, :2], findings.phase), clip)

    right = _match(findings, requests)
    right["background"] = (found.background == requests.background) & (found.pattern == requests.pattern)
    right["count"] = findings.count == requests.count
    all_right = torch.stack(list(right.values())).all(0)
    psnr = 10 * (255**2 / residual.square().flatten(1).mean(1).clamp(min=1e-3)).log10()
    flicker = residual.diff(n=2, dim=2).abs().flatten(1).mean(1)
    return Verdicts(**right, all_right=all_right, rerender_psnr_db=psnr, flicker=flicker, scenes=scenes)


def _match(findings: Findings, requests: Requests) -> dict[str, Bool[Tensor, " batch"]]:
    """Which properties are right for all objects, under the best assignment of found objects to the caption's."""

    def same(found: Tensor, wanted: Tensor) -> Tensor:  # [batch, found, wanted]
        return found[:, :, None] == wanted[:, None, :]

    equal = {
        "shape": same(findings.shape, requests.shape),
        "color": same(findings.color, requests.color),
        "motion": same(findings.motion, requests.motion) & ~findings.erratic[:, :, None],
    }
    asked = torch.arange(2, device=requests.count.device) < requests.count[:, None]
    exists = (findings.color >= 0)[:, :, None] & asked[:, None, :]
    # A pair counts by itself, so that as many objects as possible are matched; color breaks ties.
    worth = exists * (10 + equal["shape"] + 1.1 * equal["color"] + equal["motion"])
    orders = torch.tensor(list(permutations(range(MAX_OBJECTS), 2)), device=asked.device)
    best = orders[(worth[:, orders[:, 0], 0] + worth[:, orders[:, 1], 1]).argmax(1)]  # object found for each wanted one

    def chosen(table: Tensor) -> Tensor:  # [batch, wanted]
        return table.gather(1, best[:, None, :])[:, 0]

    matched = chosen(exists)
    return {name: (chosen(table) | ~matched).all(1) & matched.any(1) for name, table in equal.items()}


def _draw_best_order(scenes: Scenes, clip: Tensor) -> tuple[Scenes, Tensor]:
    """The scenes with the right one of two objects in front, and the clips minus them drawn again, in levels."""
    residual = clip - _draw_levels(scenes)
    path = world.object_paths(scenes.requests.motion, scenes.objects)
    distance = (path[:, 0, :, :2] - path[:, 1, :, :2]).norm(dim=-1)
    overlaps = ((distance < 1.1 * path[..., 2].sum(1)).any(1) & (scenes.requests.count >= 2)).nonzero()[:, 0]
    if len(overlaps):
        swapped = _swap(scenes[overlaps])
        other = clip[overlaps] - _draw_levels(swapped)
        better = other.square().flatten(1).mean(1) < residual[overlaps].square().flatten(1).mean(1)
        rows = overlaps[better]
        residual[rows] = other[better]
        order = torch.tensor([0, 1], device=clip.device).expand(len(clip), 2).clone()
        order[rows] = order[rows].flip(1)
        scenes = _reorder(scenes, order)
    return scenes, residual


def _swap(scenes: Scenes) -> Scenes:
    return _reorder(scenes, torch.tensor([1, 0], device=scenes.phase.device).expand(len(scenes.phase), 2))


def _reorder(scenes: Scenes, order: Int[Tensor, "batch 2"]) -> Scenes:
    r = scenes.requests
    shape, color, motion = (value.gather(1, order) for value in (r.shape, r.color, r.motion))
    objects = scenes.objects.gather(1, order[..., None].expand_as(scenes.objects))
    return Scenes(replace(r, shape=shape, color=color, motion=motion), objects, scenes.phase)


def _draw_levels(scenes: Scenes) -> Tensor:
    return (world.draw(scenes) * 255).round_()


def diversity_of_samples(verdicts: Verdicts) -> Callable[[Int[Tensor, " sample"]], float]:
    """How far the free numbers of clips are from the world's own distribution, in standard deviations.

    Mean over the free numbers (position, size, angle, amount, phases) of the 1-D Wasserstein distance between those
    recovered and fresh draws of the world for the same requests. Each number is first measured in means and standard
    deviations of the world's draws for its own request, and cut off at 3 of them. About 0.06 for 500 of the world's own
    clips, 0.03 for 2,000; more where diversity is lost. A number of which there is no sample counts 1.

    Returns:
        The distance as a function of which of the clips are taken, each as often as it is named. The world is asked
        once, here: a clip brings its own draws along wherever it is taken.
    """
    is_asked = verdicts.scenes.requests.count > 0
    if not is_asked.any():
        return lambda sample: 1.0
    asked = is_asked.nonzero()[:, 0]
    place = is_asked.cumsum(0) - 1
    found = verdicts.scenes[asked]
    requests = replace(found.requests, count=found.requests.count.clamp(max=2))
    num_draws = 32  # half of them for means and deviations, half to compare with
    generator = torch.Generator().manual_seed(0)
    repeated = requests[torch.arange(len(asked)).repeat_interleave(num_draws)]
    uniforms = torch.rand(len(asked) * num_draws, world.NUM_CANDIDATES, world.NUM_UNIFORMS, generator=generator)
    fresh = _free_numbers(world.place(repeated, uniforms))
    numbers = []
    for name, (value, means_something) in _free_numbers(Scenes(requests, found.objects, found.phase)).items():
        drawn = fresh[name][0].unflatten(0, (len(asked), num_draws))
        drawn, yardstick = drawn[:, : num_draws // 2], drawn[:, num_draws // 2 :]
        mean, spread = yardstick.mean(1), yardstick.std(1)
        scaled = ((value - mean) / spread).clamp(-3, 3)
        expected = ((drawn - mean[:, None]) / spread[:, None]).movedim(1, -1).clamp(-3, 3)
        numbers.append((scaled, expected, means_something & (spread > 1e-6)))

    def distance(sample: Tensor) -> float:
        rows = place[sample[is_asked[sample]]]
        return sum(_distance(*(values[rows] for values in number)) for number in numbers) / len(numbers)

    return distance


def _distance(scaled: Tensor, expected: Tensor, mask: Tensor) -> float:
    """1-D Wasserstein distance of one free number, where it means something, to the world's draws."""
    if not mask.any():
        return 1.0
    at = (torch.arange(2000) + 0.5) / 2000
    return (_quantiles(scaled[mask], at) - _quantiles(expected[mask].flatten(), at)).abs().mean().item()


def _quantiles(values: Tensor, at: Tensor) -> Tensor:
    return values.sort().values[(at * len(values)).long()]


def _free_numbers(scenes: Scenes) -> dict[str, tuple[Tensor, Tensor]]:
    """Free numbers by name `[batch, 1 or 2]`, each in one of its equivalent forms, and where they mean something."""
    requests = scenes.requests
    there = torch.arange(2) < requests.count[:, None]
    symmetry = torch.tensor([world.ROTATIONAL_SYMMETRY.get(name, 0) for name in SHAPES])[requests.shape]
    period = 2 * math.pi / symmetry.clamp(min=1)
    numbers = {}
    for name, value in zip(world.PARAMETERS, scenes.objects.unbind(-1), strict=True):
        mask = there
        if name == "angle":
            value, mask = value - period * (value / period).round(), there & (symmetry > 0)
        if name == "phase":
            value = value % 1.0
        numbers[name] = (value, mask)
    striped, checkered = (requests.pattern == PATTERNS.index(name) for name in ("striped", "checkered"))
    phase_x, phase_y = (scenes.phase % 1.0).unbind(1)
    turned = checkered & (phase_y >= 0.5)  # checks are the same after half a period along both axes
    phase_x, phase_y = ((p + 0.5 * turned) % 1.0 for p in (phase_x, phase_y))
    numbers["pattern x"] = (phase_x[:, None], (striped | checkered)[:, None])
    numbers["pattern y"] = (phase_y[:, None], checkered[:, None])
    return numbers
