"""The playground's world: short captioned clips of colored shapes, drawn exactly from a few numbers.

A clip shows one or two shapes on a background. The caption fixes how many there are, the shape, color and motion of
each, and the background; what it leaves open (position, size, angle, how far, how fast, phase) is drawn at random.
Everything is a batch of tensors, so that the same code draws one clip for a test and thousands a second on a GPU.

    a red star moves left and a blue ring bounces on a striped gray background

The first object named is in front. Lengths are in pixels, angles in radians, time runs from 0 to 1 over the clip.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from accvideo.types import UserError

SIZE = 64
"""Height and width of a frame in pixels."""
NUM_FRAMES = 17
FPS = 8

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
MOTIONS = (
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "grows",
    "shrinks",
    "spins",
    "bounces",
    "stays still",
)
COLORS = {
    "red": (225, 45, 45),
    "orange": (245, 140, 30),
    "yellow": (240, 220, 60),
    "green": (60, 190, 75),
    "cyan": (70, 205, 220),
    "blue": (55, 95, 235),
    "purple": (165, 70, 215),
    "white": (245, 245, 245),
}
BACKGROUNDS = {
    "black": (22, 22, 26),
    "gray": (112, 112, 116),
    "navy": (28, 36, 92),
    "brown": (100, 66, 42),
    "forest": (24, 78, 50),
}
PATTERNS = ("plain", "striped", "checkered", "gradient")

PATTERN_AMPLITUDE = 14 / 255
"""How far a pattern raises and lowers its background's color."""
STRIPE_PERIOD = 16.0
"""Width of a light and a dark stripe together; a check is as wide as that."""

ROTATIONAL_SYMMETRY = {"square": 4, "triangle": 3, "star": 5, "cross": 4}
"""Order of the symmetry of each shape that can be seen to spin; a circle and a ring cannot."""

PARAMETERS = ("x", "y", "radius", "angle", "amount", "phase")
"""Free numbers of an object: center (at half time) in pixels, radius in pixels (at half time), angle in radians, how
much of its motion it does (pixels traveled, fraction grown, radians turned, height of a hop in pixels), and the phase
of its hops as a fraction of one."""
_SPINS = MOTIONS.index("spins")
_ROUND = (SHAPES.index("circle"), SHAPES.index("ring"))
NUM_CANDIDATES = 8
"""Placements drawn for a clip, of which `place` takes one."""
NUM_UNIFORMS = 2 * len(PARAMETERS) + 2
"""Random numbers of a placement: the parameters of two objects and the shift of the pattern."""

_REACH = 1.12
"""Farthest point of any shape from its center, in radii."""


@dataclass(frozen=True)
class Requests:
    """What captions ask for, as indices into the tables above; of one object, the second column means nothing."""

    count: Int[Tensor, " batch"]
    shape: Int[Tensor, "batch 2"]
    color: Int[Tensor, "batch 2"]
    motion: Int[Tensor, "batch 2"]
    background: Int[Tensor, " batch"]
    pattern: Int[Tensor, " batch"]

    def __getitem__(self, rows: slice | Tensor) -> "Requests":
        return Requests(*(getattr(self, field.name)[rows] for field in fields(self)))

    def code(self) -> Int[Tensor, " batch"]:
        """One number for each distinct caption."""
        single = self.count == 1
        code = self.background * len(PATTERNS) + self.pattern
        for i in range(2):
            one = (self.shape[:, i] * len(COLORS) + self.color[:, i]) * len(MOTIONS) + self.motion[:, i] + 1
            code = code * (len(SHAPES) * len(COLORS) * len(MOTIONS) + 1) + (
                one if i == 0 else one.masked_fill(single, 0)
            )
        return code

    def held_out(self) -> Tensor:
        """Whether each caption belongs to the tenth that no teacher or student is ever trained on."""
        return (self.code() * 2654435761 % 2**32) % 10 == 0


@dataclass(frozen=True)
class Scenes:
    """Everything that is needed to draw a batch of clips."""

    requests: Requests
    objects: Float[Tensor, "batch 2 6"]
    """`PARAMETERS` of each object."""
    phase: Float[Tensor, "batch 2"]
    """Shift of the background's pattern along x and y, as a fraction of its period."""

    def __getitem__(self, rows: slice | Tensor) -> "Scenes":
        return Scenes(self.requests[rows], self.objects[rows], self.phase[rows])


def captions_of(requests: Requests) -> list[str]:
    """The caption of each request."""
    colors, backgrounds = list(COLORS), list(BACKGROUNDS)
    columns = (requests.count, requests.shape, requests.color, requests.motion, requests.background, requests.pattern)
    captions = []
    for count, shape, color, motion, background, pattern in zip(*(c.tolist() for c in columns), strict=True):
        words = [f"{colors[color[i]]} {SHAPES[shape[i]]} {MOTIONS[motion[i]]}" for i in range(count)]
        objects = [f"{'an' if text[0] in 'aeiou' else 'a'} {text}" for text in words]
        captions.append(f"{' and '.join(objects)} on a {PATTERNS[pattern]} {backgrounds[background]} background")
    return captions


def parse_captions(captions: Sequence[str]) -> Requests:
    """The requests of captions in the world's grammar; inverse of `captions_of`.

    Raises:
        UserError: A caption is not in the grammar.
    """
    rows = [_parse(caption) for caption in captions]
    count, shape, color, motion, background, pattern = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Requests(count, shape, color, motion, background, pattern)


def _parse(caption: str) -> tuple[int, list[int], list[int], list[int], int, int]:
    colors, backgrounds = list(COLORS), list(BACKGROUNDS)
    try:
        subject, _, rest = caption.strip().lower().partition(" on a ")
        pattern, background, _ = rest.split()
        objects = [text.split(maxsplit=3) for text in subject.split(" and ")]
        found = [(SHAPES.index(s), colors.index(c), MOTIONS.index(m)) for _, c, s, m in objects]
        found += found[: 2 - len(found)]
        shape, color, motion = (list(column) for column in zip(*found, strict=True))
        if len(found) != 2:
            raise ValueError
        return len(objects), shape, color, motion, backgrounds.index(background), PATTERNS.index(pattern)
    except ValueError:
        raise UserError(
            f"the playground's judge cannot read the prompt {caption!r}\n"
            "it knows prompts like 'a red star moves left and a blue ring bounces on a striped gray background'"
        ) from None


def random_requests(num: int, generator: torch.Generator, split: Literal["train", "held_out"] | None) -> Requests:
    """Requests drawn uniformly over objects and backgrounds, half of them with two objects of different colors.

    Args:
        num: How many.
        generator: Source of the draw; its device is the device of the result.
        split: Draw only captions of this split; None draws from both.
    """
    kept: list[Requests] = []
    while sum(len(part.count) for part in kept) < num:
        size = num if split != "held_out" else 12 * num + 64

        def draw(high: int, *shape: int, size: int = size) -> Tensor:
            return torch.randint(high, (size, *shape), generator=generator, device=generator.device)

        color = draw(len(COLORS), 2)
        color[:, 1] = (color[:, 0] + 1 + draw(len(COLORS) - 1)) % len(COLORS)
        shape, motion = draw(len(SHAPES), 2), draw(len(MOTIONS), 2)
        requests = Requests(draw(2) + 1, shape, color, motion, draw(len(BACKGROUNDS)), draw(len(PATTERNS)))
        is_round = (shape == _ROUND[0]) | (shape == _ROUND[1])
        good = ~((motion == _SPINS) & is_round).any(1)
        if split is not None:
            good &= requests.held_out() == (split == "held_out")
        kept.append(requests[good])
    return Requests(*(torch.cat([getattr(p, f.name) for p in kept])[:num] for f in fields(Requests)))


def sample_prompts(num: int, seed: int, split: Literal["train", "held_out"] = "train") -> list[str]:
    """Distinct prompts of one split; the same for the same arguments, whatever the machine."""
    generator = torch.Generator().manual_seed(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < num:
        prompts |= dict.fromkeys(captions_of(random_requests(num, generator, split)))
    return list(prompts)[:num]


def place(requests: Requests, uniforms: Float[Tensor, "batch candidates 14"]) -> Scenes:
    """Fill in what captions leave open, so that every object stays in the frame.

    Two objects may pass in front of each other, but not for long: of several candidates for a clip, the first in which
    they overlap in at most five frames is taken, or else the one with the fewest such frames.
    """
    batch, candidates, _ = uniforms.shape
    u = uniforms[..., :-2].reshape(batch, candidates, 2, len(PARAMETERS))
    motion = requests.motion[:, None].expand(batch, candidates, 2)
    pair = (requests.count == 2)[:, None, None]

    def between(low: float | Tensor, high: float | Tensor, name: str) -> Tensor:
        return low + u[..., PARAMETERS.index(name)] * (high - low)

    def is_motion(*names: str) -> Tensor:
        return sum((motion == MOTIONS.index(name)) for name in names).bool()  # type: ignore[union-attr]

    sideways, upright = is_motion("moves left", "moves right"), is_motion("moves up", "moves down")
    resizes, spins, hops = is_motion("grows", "shrinks"), is_motion("spins"), is_motion("bounces")
    radius = torch.where(pair, between(8.0, 11.0, "radius"), between(8.0, 13.0, "radius"))
    spread = u[..., PARAMETERS.index("amount")]
    turn = torch.where(spread < 0.5, -2.0 - 5.0 * spread, 2.0 + 5.0 * (spread - 0.5))
    amount = torch.where(sideways | upright, between(18.0, 32.0, "amount"), 0.0)
    amount = torch.where(resizes, between(0.5, 0.9, "amount"), amount)
    amount = torch.where(hops, between(14.0, 26.0, "amount"), amount)
    amount = torch.where(spins, turn, amount)
    angle = torch.where(spins, between(-math.pi, math.pi, "angle"), between(-0.3, 0.3, "angle"))

    margin = 1.4 + _REACH * radius * torch.where(resizes, 1 + amount / 2, 1.0)
    margin_x = margin + torch.where(sideways, amount / 2, 0.0)
    margin_y = margin + torch.where(upright | hops, amount / 2, 0.0)
    x, y = between(margin_x, SIZE - margin_x, "x"), between(margin_y, SIZE - margin_y, "y")
    phase = torch.where(hops, between(0.0, 1.0, "phase"), 0.0)
    objects = torch.stack([x, y, radius, angle, amount, phase], -1)

    path = object_paths(motion, objects)
    distance = (path[..., 0, :, :2] - path[..., 1, :, :2]).norm(dim=-1)
    touching = (distance < 0.8 * path[..., 2].sum(-2)).sum(-1)  # frames, for each candidate
    chosen = torch.where(touching.min(1).values > 5, touching.argmin(1), (touching <= 5).int().argmax(1))
    row = torch.arange(batch, device=chosen.device)
    return Scenes(requests, objects[row, chosen], uniforms[:, 0, -2:])


def random_scenes(num: int, generator: torch.Generator, split: Literal["train", "held_out"] | None = "train") -> Scenes:
    """Clips of random captions of one split, for training; on the generator's device."""
    requests = random_requests(num, generator, split)
    uniforms = torch.rand(num, NUM_CANDIDATES, NUM_UNIFORMS, generator=generator, device=generator.device)
    return place(requests, uniforms)


def scenes_of(captions: Sequence[str], seed: int) -> Scenes:
    """One clip for each caption; clip i depends on its caption, the seed and i alone."""
    uniforms = []
    for i, caption in enumerate(captions):
        digest = hashlib.sha256(f"{caption}/{seed}/{i}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        uniforms.append(torch.rand(NUM_CANDIDATES, NUM_UNIFORMS, generator=generator))
    return place(parse_captions(captions), torch.stack(uniforms))


def object_paths(motion: Int[Tensor, "*batch"], objects: Float[Tensor, "*batch 6"]) -> Float[Tensor, "*batch 17 4"]:
    """Center x, y, radius and angle of each object in each frame."""
    time = torch.linspace(0, 1, NUM_FRAMES, device=objects.device) - 0.5
    x, y, radius, angle, amount, phase = (value[..., None] for value in objects.unbind(-1))
    motion = motion[..., None]

    def when(name: str, value: Tensor) -> Tensor:
        return torch.where(motion == MOTIONS.index(name), value, 0.0)

    hop = amount * (0.5 - (math.pi * (2 * (time + 0.5) + phase)).sin().abs())
    x = x + when("moves right", amount * time) - when("moves left", amount * time)
    y = y + when("moves down", amount * time) - when("moves up", amount * time) + when("bounces", hop)
    radius = radius * (1 + when("grows", amount * time) - when("shrinks", amount * time))
    angle = angle + when("spins", amount * time)
    return torch.stack([x, y, radius, angle], -1)


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the outline of a shape of radius 1 around the origin, negative inside; y points down."""
    if shape == "circle":
        return (x.square() + y.square() + 1e-12).sqrt() - 0.88
    if shape == "ring":
        return ((x.square() + y.square() + 1e-12).sqrt() - 0.75).abs() - 0.24
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.78
    if shape == "cross":
        wide = torch.maximum(x.abs() - 1.0, y.abs() - 0.33)
        tall = torch.maximum(x.abs() - 0.33, y.abs() - 1.0)
        return torch.minimum(wide, tall)
    if shape == "triangle":
        side = math.sqrt(3) / 2
        return torch.maximum(y, side * x.abs() - y / 2) - 0.55
    # A star: fold the plane into half a point of it, then the distance to that one edge.
    outer, inner, sector = 1.1, 0.46, math.pi / 5
    turn = torch.atan2(x, -y)
    turn = (turn - 2 * sector * (turn / (2 * sector)).round()).abs()
    length = (x.square() + y.square() + 1e-12).sqrt()
    along, across = length * turn.cos() - outer, length * turn.sin()
    edge_x, edge_y = inner * math.cos(sector) - outer, inner * math.sin(sector)
    norm = math.hypot(edge_x, edge_y)
    return (along * edge_y - across * edge_x) / norm


def draw_backgrounds(requests: Requests, phase: Float[Tensor, "batch 2"]) -> Float[Tensor, "batch 3 64 64"]:
    """The backgrounds alone, in [0, 1]."""
    device = phase.device
    place_ = torch.arange(SIZE, device=device) + 0.5

    def wave(shift: Tensor, period: float) -> Tensor:  # a square wave with edges one pixel wide
        angle = 2 * math.pi * (place_ / period + shift[:, None])
        return (angle.sin() * (period / math.pi)).clamp(-1, 1)

    striped = wave(phase[:, 0], STRIPE_PERIOD)[:, None, :].expand(-1, SIZE, -1)
    check_x, check_y = wave(phase[:, 0], 2 * STRIPE_PERIOD), wave(phase[:, 1], 2 * STRIPE_PERIOD)
    checkered = check_y[:, :, None] * check_x[:, None, :]
    gradient = (2 * place_ / SIZE - 1)[None, :, None].expand(len(phase), -1, SIZE)
    textures = torch.stack([torch.zeros_like(striped), striped, checkered, gradient], 1)
    texture = textures[torch.arange(len(phase), device=device), requests.pattern]
    base = torch.tensor(list(BACKGROUNDS.values()), device=device)[requests.background] / 255
    return base[:, :, None, None] + PATTERN_AMPLITUDE * texture[:, None]


def draw_coverage(
    shape: Int[Tensor, " batch"], path: Float[Tensor, "batch frames 4"]
) -> Float[Tensor, "batch frames 64 64"]:
    """How much of each pixel one object covers in each frame, in [0, 1], for objects with the given paths."""
    place_ = torch.arange(SIZE, device=path.device) + 0.5
    coverage = path.new_zeros(*path.shape[:2], SIZE, SIZE)
    for index, name in enumerate(SHAPES):
        rows = (shape == index).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        x, y, radius, angle = (value[..., None, None] for value in path[rows].unbind(-1))
        dx, dy = (place_ - x) / radius, (place_[:, None] - y) / radius
        cos, sin = angle.cos(), angle.sin()
        distance = signed_distance(name, cos * dx + sin * dy, cos * dy - sin * dx) * radius
        coverage = coverage.index_copy(0, rows, (0.5 - distance).clamp(0, 1))
    return coverage


def draw_foreground(scenes: Scenes) -> Float[Tensor, "batch 17 64 64"]:
    """How much of each pixel the objects cover, in [0, 1]."""
    requests, paths = scenes.requests, object_paths(scenes.requests.motion, scenes.objects)
    first, second = (draw_coverage(requests.shape[:, i], paths[:, i]) for i in range(2))
    return torch.maximum(first, second * (requests.count > 1)[:, None, None, None])


def draw(scenes: Scenes) -> Float[Tensor, "batch 3 17 64 64"]:
    """The clips of scenes, in [0, 1]."""
    requests = scenes.requests
    clip = draw_backgrounds(requests, scenes.phase)[:, :, None].expand(-1, -1, NUM_FRAMES, -1, -1)
    paths = object_paths(requests.motion, scenes.objects)
    palette = torch.tensor(list(COLORS.values()), device=clip.device) / 255
    for i in (1, 0):  # the first object named is in front
        coverage = draw_coverage(requests.shape[:, i], paths[:, i]) * (requests.count > i)[:, None, None, None]
        color = palette[requests.color[:, i]][:, :, None, None, None]
        clip = torch.lerp(clip, color, coverage[:, None])
    return clip


def to_uint8(clips: Float[Tensor, "batch 3 frames height width"]) -> Tensor:
    """Clips in [0, 1] as bytes `[batch, frames, height, width, 3]`."""
    return (clips.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()
