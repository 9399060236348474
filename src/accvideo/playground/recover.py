"""Reads the numbers of a scene back from the pixels of a clip, by image analysis alone: nothing learned, no caption.

1. The background: of all colors, patterns and phases the one nearest to the median frame, objects ignored.
2. The objects: pixels that differ from it, by palette color, joined over space and time into blobs.
3. Each object's center, area and n-fold moments in each frame, which give its motion and, for each shape, its size and
   angle; the shape is the one that fits best, however blurred.
4. All free numbers of an object refined together by Gauss-Newton on the coverage of the pixels at its outline.

Colors are in levels (0 to 255), lengths in pixels, angles in radians, time runs from -0.5 to 0.5 over the clip.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from accvideo.playground import world
from accvideo.playground.world import MOTIONS, NUM_FRAMES, PATTERNS, SHAPES, SIZE, Requests

_PIXELS = NUM_FRAMES * SIZE * SIZE
MAX_OBJECTS = 3
"""Objects of a clip that are fitted; the largest ones. A clip of more has the wrong count anyway."""
_FOREGROUND = 30.0
"""Distance from the background's color, in levels, from which a pixel is looked at; the palette stays 100 away."""
_MIN_CORE = 4 * NUM_FRAMES
"""Pixels of a color with all four neighbors of that color that a clip needs for the color to be looked for."""
_MIN_AREA = 40.0
"""Mean area of an object; the smallest of the world's have 96, a third of the mean one is 66."""
_MIN_FRAME_AREA, _MIN_FRAMES = 12.0, 10
"""An object has that area in that many frames."""
_USUAL_AMOUNT = {"slide": 25.0, "resize": 0.7, "spin": 3.25, "hop": 20.0}
"""The world's mean amount of each kind of motion."""
_MIN_MOTION = 0.35
"""Smallest amount of motion, in usual amounts; below, an object stays still. The world's are at least 0.6."""
_MAX_PATH_ERROR = 2.5
"""Root mean square distance of an object from its fitted path, in pixels, from which it moves like nothing known."""
_NUM_PHASES = 128
_CANVAS, _CANVAS_WIDTH = 44, 5.5
"""Pixels along a side of the canvas on which shapes are compared, and its width in radii of the disk of their area."""
_SCALES = (0.86, 0.93, 1.0, 1.07, 1.14, 1.22, 1.3)
_BLURS = (0.0, 0.06, 0.12, 0.18, 0.24, 0.3, 0.36, 0.42, 0.5)
"""Standard deviations of the blur with which shapes are compared, in the same radii: up to four pixels."""
_MAX_TILT = 0.4
"""How far from upright an object that does not spin is looked for, in radians; the world's are within 0.3."""
_MAX_STEPS = 12


@dataclass(frozen=True)
class Findings:
    """What is seen in each clip of a batch; objects from the largest to the smallest, -1 where there is none."""

    count: Int[Tensor, " batch"]
    """Number of objects, also beyond `MAX_OBJECTS`."""
    shape: Int[Tensor, "batch 3"]
    color: Int[Tensor, "batch 3"]
    motion: Int[Tensor, "batch 3"]
    """The nearest motion of the world."""
    erratic: Bool[Tensor, "batch 3"]
    """Whether an object moves like nothing in the world."""
    objects: Float[Tensor, "batch 3 6"]
    """`world.PARAMETERS` of each object; some harmless ones where there is none."""
    background: Int[Tensor, " batch"]
    pattern: Int[Tensor, " batch"]
    phase: Float[Tensor, "batch 2"]


@dataclass(frozen=True)
class _Background:
    color: Int[Tensor, " batch"]
    pattern: Int[Tensor, " batch"]
    phase: Float[Tensor, "batch 2"]
    image: Float[Tensor, "batch 3 64 64"]
    """With the color as it is in the clip, not the world's."""


@dataclass(frozen=True)
class _Blobs:
    """The objects of all clips of a batch, `M` in all, sorted by clip and from the largest to the smallest."""

    clip: Int[Tensor, " M"]
    rank: Int[Tensor, " M"]
    color: Int[Tensor, " M"]
    measured: Float[Tensor, "M 3"]
    """Color as it is in the clip, in levels."""
    count: Int[Tensor, " batch"]
    owner: UInt8[Tensor, " pixels"]
    """`rank + 1` of the object that a pixel belongs to, flat; 0 where there is none."""
    pixel_object: Int[Tensor, " P"]
    pixel: Int[Tensor, " P"]
    """Index into `owner` of the pixels of objects."""
    coverage: Float[Tensor, " P"]


@dataclass(frozen=True)
class _Tracks:
    """Measurements of each object in each frame."""

    weight: Float[Tensor, "M 17"]
    """1 where the object is seen whole, next to 0 where it touches another one, 0 where it is not seen."""
    x: Float[Tensor, "M 17"]
    y: Float[Tensor, "M 17"]
    area: Float[Tensor, "M 17"]
    turn: dict[int, tuple[Tensor, Tensor]]
    """For each order of symmetry: phase of the n-fold moment at half time, and radians turned, of each object."""
    still_phase: dict[int, Tensor]
    """The same phase if the object does not turn."""


def recover(clip: Float[Tensor, "batch 3 17 64 64"]) -> Findings:
    """What is seen in clips, given in levels."""
    background = _fit_background(clip)
    blobs = _find_blobs(clip, background)
    tracks = _track(blobs)
    support = _Support.of(clip, background, blobs, tracks)
    shape = _fit_shapes(support, tracks)
    motion, objects, erratic = _fit_motions(tracks, shape)
    objects = _refine(support, shape, motion, objects)

    def table(values: Tensor, missing: Tensor) -> Tensor:
        result = missing.to(values).expand(len(clip), MAX_OBJECTS, *values.shape[1:]).clone()
        result[blobs.clip, blobs.rank] = values
        return result

    nothing, speck = torch.tensor(-1), torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    return Findings(
        blobs.count,
        table(shape, nothing),
        table(blobs.color, nothing),
        table(motion, nothing),
        table(erratic, torch.tensor(False)),
        table(objects, speck),
        background.color,
        background.pattern,
        background.phase,
    )


# ---------------------------------------------------------------------------------------------------------- background


@lru_cache
def _textures() -> tuple[Tensor, Tensor, Tensor]:
    """Stripes along x and one side of checks at each phase `[phases, 64]`, and the gradient `[64]` along y."""
    phases = torch.arange(_NUM_PHASES) / _NUM_PHASES
    zero = torch.zeros(_NUM_PHASES, dtype=torch.long)
    pair = torch.zeros(_NUM_PHASES, 2, dtype=torch.long)

    def texture(pattern: str) -> Tensor:
        requests = Requests(zero, pair, pair, pair, zero, zero + PATTERNS.index(pattern))
        image = world.draw_backgrounds(requests, torch.stack([phases, torch.full_like(phases, 0.25)], 1))
        base = torch.tensor(next(iter(world.BACKGROUNDS.values()))) / 255
        return (image[:, 0] - base[0]) / world.PATTERN_AMPLITUDE

    return texture("striped")[:, 0], texture("checkered")[:, 0], texture("gradient")[0, :, 0]


def _fit_background(clip: Tensor) -> _Background:
    image = clip[:, :, ::4].median(2).values
    base = torch.tensor(list(world.BACKGROUNDS.values()), dtype=torch.float32, device=clip.device)
    amplitude = 255 * world.PATTERN_AMPLITUDE

    # Patterns only make a color lighter or darker: distance to that line, in levels.
    offset = image[:, None] - base[:, :, None, None]
    gray = offset.mean(2)
    distance = (offset - gray[:, :, None]).square().sum(2) + 3 * (gray.abs() - amplitude).clamp(min=0).square()
    color = distance.clamp(max=40.0**2).mean((2, 3)).argmin(1)
    rows = torch.arange(len(clip), device=clip.device)
    weight = (1 + distance[rows, color] / 20**2) ** -2  # next to 0 on objects
    gray, offset = gray[rows, color], offset[rows, color]

    # Weighted squared error of each pattern and phase, with the best constant: sums of weight * (gray - texture)^2.
    stripes, checks, gradient = (t.to(clip.device) * amplitude for t in _textures())
    total = weight.sum((1, 2))
    weighted = weight * gray
    power, mean = (weighted * gray).sum((1, 2)), weighted.sum((1, 2))

    def error(product: Tensor, square: Tensor, first: Tensor) -> Tensor:
        """Least error from sums over pixels of weight times gray * texture, texture^2 and texture."""
        view = (-1,) + (1,) * (product.dim() - 1)
        return power.view(view) - 2 * product + square - (mean.view(view) - first).square() / total.view(view)

    by_x, by_y = weighted.sum(1), weighted.sum(2)
    zero = torch.zeros_like(total)
    striped = error(by_x @ stripes.T, weight.sum(1) @ stripes.T.square(), weight.sum(1) @ stripes.T)
    unit = checks / amplitude
    # [batch, phase along y, phase along x]
    checkered = error(unit @ weighted @ checks.T, unit.square() @ weight @ checks.T.square(), unit @ weight @ checks.T)
    graded = error(by_y @ gradient, weight.sum(2) @ gradient.square(), weight.sum(2) @ gradient)
    best = checkered.flatten(1).argmin(1)
    stripe_at, check_y, check_x = striped.argmin(1), best // _NUM_PHASES, best % _NUM_PHASES
    errors = {
        "plain": error(zero, zero, zero),
        "striped": striped[rows, stripe_at],
        "checkered": checkered[rows, check_y, check_x],
        "gradient": graded,
    }
    pattern = torch.stack([errors[name] for name in PATTERNS], 1).argmin(1)

    phase = torch.zeros(len(clip), 2, device=clip.device)
    is_striped, is_checkered = pattern == PATTERNS.index("striped"), pattern == PATTERNS.index("checkered")
    along_x = torch.where(is_striped, _vertex(striped, stripe_at), _vertex(checkered[rows, check_y], check_x))
    phase[:, 0] = along_x.masked_fill(~(is_striped | is_checkered), 0.0)
    phase[:, 1] = _vertex(checkered[rows, :, check_x], check_y).masked_fill(~is_checkered, 0.0)

    pair = torch.zeros(len(clip), 2, dtype=torch.long, device=clip.device)
    requests = Requests(pair[:, 0], pair, pair, pair, color, pattern)
    fitted = 255 * world.draw_backgrounds(requests, phase)
    shift = (weight[:, None] * (image - fitted)).sum((2, 3)) / total[:, None]
    return _Background(color, pattern, phase, fitted + shift[:, :, None, None])


def _vertex(errors: Float[Tensor, "batch phases"], at: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Phase of least error between the grid's points: vertex of the parabola through the best one's neighbors."""
    rows = torch.arange(len(errors), device=errors.device)
    below, here, above = (errors[rows, (at + i) % _NUM_PHASES] for i in (-1, 0, 1))
    step = 0.5 * (below - above) / (below - 2 * here + above).clamp(min=1e-6)
    return ((at + step.clamp(-0.5, 0.5)) / _NUM_PHASES) % 1.0


# -------------------------------------------------------------------------------------------------------------- blobs


def _find_blobs(clip: Tensor, background: _Background) -> _Blobs:
    batch, num_slots = len(clip), 3
    palette = torch.tensor(list(world.COLORS.values()), dtype=torch.float32, device=clip.device)
    difference = (clip - background.image[:, :, None]).square_()
    distance = (difference[:, 0] + difference[:, 1] + difference[:, 2]).flatten()
    pixel = (distance > _FOREGROUND**2).nonzero()[:, 0]
    row = pixel // _PIXELS
    value = _gather(clip, row, pixel % _PIXELS)
    behind = _gather(background.image, row, pixel % SIZE**2)

    # Colors that fill some area: pixels whose four neighbors have the same nearest color.
    to_palette = value.square().sum(1, keepdim=True) - 2 * value @ palette.T + palette.square().sum(1)
    near, nearest = to_palette.min(1)
    label = torch.zeros(batch * _PIXELS, dtype=torch.uint8, device=clip.device)
    own = (nearest + 1).to(torch.uint8) * (near < distance[pixel])
    label[pixel] = own
    core = own > 0
    for step in (-1, 1, -SIZE, SIZE):
        core &= label[(pixel + step).clamp(0, len(label) - 1)] == own
    key = row * len(palette) + nearest
    cores = _sums(key, core.float(), batch * len(palette))
    measured = torch.zeros(batch * len(palette), 3, device=clip.device).index_add_(0, key, value * core[:, None])
    measured = (measured / cores.clamp(min=1)[:, None]).view(batch, len(palette), 3)
    cores = cores.view(batch, len(palette))
    top, color = cores.topk(num_slots, dim=1)
    measured = measured.gather(1, color[..., None].expand(-1, -1, 3))
    present = top >= _MIN_CORE
    for i in range(1, num_slots):  # one object's color between two of the palette's
        for j in range(i):
            present[:, i] &= ~(present[:, j] & ((measured[:, i] - measured[:, j]).norm(dim=1) < 55))

    # Each pixel to the color between which and the background it lies best, and how far along it lies.
    reach = measured[row] - behind[:, None]  # [P, slots, 3]
    ahead = value - behind
    along = (reach @ ahead[:, :, None])[..., 0] / reach.square().sum(2).clamp(min=1.0)
    miss = (ahead[:, None] - along.clamp(0, 1)[..., None] * reach).square().sum(2)
    miss = miss.masked_fill(~present[row], torch.inf)
    miss, slot = miss.min(1)
    along = along.gather(1, slot[:, None])[:, 0]
    keep = ((along > 0.3) & (miss < 70.0**2)).nonzero()[:, 0]
    pixel, slot, coverage = pixel[keep], slot[keep], along[keep].clamp(max=1.0)

    component, slot_of = _components(pixel, slot, batch, num_slots)
    frame = pixel % _PIXELS // SIZE**2
    blob_of = _join(component, slot_of, frame, coverage, batch * num_slots)
    num = len(slot_of)
    in_blob = coverage * (blob_of >= 0)
    mass = _sums(blob_of.clamp(min=0) * NUM_FRAMES + frame, in_blob, num * NUM_FRAMES).view(num, NUM_FRAMES)
    valid = (mass.mean(1) >= _MIN_AREA) & ((mass >= _MIN_FRAME_AREA).sum(1) >= _MIN_FRAMES)
    clip_of = slot_of // num_slots
    order = torch.argsort(clip_of * 1e6 - mass.sum(1) + 1e12 * ~valid)[: int(valid.sum())]
    count = torch.bincount(clip_of[order], minlength=batch)
    rank = torch.arange(len(order), device=clip.device) - (count.cumsum(0) - count)[clip_of[order]]
    order, rank = order[rank < MAX_OBJECTS], rank[rank < MAX_OBJECTS]

    index = torch.full((num + 1,), -1, dtype=torch.long, device=clip.device)
    index[order] = torch.arange(len(order), device=clip.device)
    pixel_object = index[blob_of]
    kept = pixel_object >= 0
    pixel, pixel_object, coverage = pixel[kept], pixel_object[kept], coverage[kept]
    owner = torch.zeros(batch * _PIXELS, dtype=torch.uint8, device=clip.device)
    owner[pixel] = (rank[pixel_object] + 1).to(torch.uint8)
    color, measured = color.flatten()[slot_of[order]], measured.flatten(0, 1)[slot_of[order]]
    return _Blobs(clip_of[order], rank, color, measured, count, owner, pixel_object, pixel, coverage)


def _sums(key: Int[Tensor, " P"], values: Float[Tensor, " P"], size: int) -> Float[Tensor, " size"]:
    """Sum of the values of each key."""
    return torch.zeros(size, device=values.device).index_add_(0, key, values)


def _gather(images: Float[Tensor, "batch 3 *rest"], row: Tensor, place: Tensor) -> Float[Tensor, "P 3"]:
    flat = images.flatten(2)
    size = flat.shape[2]
    start = row * (3 * size) + place
    return torch.stack([flat.flatten()[start + i * size] for i in range(3)], 1)


def _components(pixel: Tensor, slot: Tensor, batch: int, num_slots: int) -> tuple[Tensor, Tensor]:
    """Connected parts, over space and time, of the pixels of one color of a clip, on cells of 2 x 2 pixels.

    Returns:
        The component of each pixel, and the `clip * num_slots + slot` of each component.
    """
    half = SIZE // 2
    row, frame = pixel // _PIXELS, pixel % _PIXELS // SIZE**2
    cell_y, cell_x = pixel % SIZE**2 // SIZE // 2, pixel % SIZE // 2
    key = (((row * num_slots + slot) * NUM_FRAMES + frame) * half + cell_y) * half + cell_x
    cell, cell_of = torch.unique(key, return_inverse=True)
    number = torch.full((batch * num_slots * NUM_FRAMES * half**2,), -1, device=pixel.device)
    number[cell] = torch.arange(len(cell), device=pixel.device)
    starts, ends = [], []
    for step, inside in (
        (1, cell % half < half - 1),
        (half, cell // half % half < half - 1),
        (half**2, cell // half**2 % NUM_FRAMES < NUM_FRAMES - 1),
    ):
        start = inside.nonzero()[:, 0]
        end = number[cell[start] + step]
        starts.append(start[end >= 0])
        ends.append(end[end >= 0])
    start, end = torch.cat(starts), torch.cat(ends)
    label = torch.arange(len(cell), device=pixel.device)
    while True:
        a, b = label[start], label[end]
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        if bool((low == high).all()):
            break
        label.scatter_reduce_(0, high, low, "amin")  # hang the greater root below the smaller one
        while not torch.equal(label, label[label]):
            label = label[label]
    roots, component = torch.unique(label, return_inverse=True)
    return component[cell_of], cell[roots] // (NUM_FRAMES * half**2)


def _join(component: Tensor, slot_of: Tensor, frame: Tensor, coverage: Tensor, num_slots: int) -> Tensor:
    """The blob of each pixel: the components of a color are one object, unless they are large and side by side.

    An object falls into several components where another one passes in front of it or it moves fast; these do not
    exist together for long. Specks belong to no blob: -1.
    """
    num = len(slot_of)
    mass = _sums(component * NUM_FRAMES + frame, coverage, num * NUM_FRAMES).view(num, NUM_FRAMES)
    total = mass.sum(1)
    largest = torch.zeros(num_slots, device=total.device).scatter_reduce_(0, slot_of, total, "amax")
    main_of = torch.zeros(num_slots, dtype=torch.long, device=total.device)
    is_main = (total == largest[slot_of]).nonzero()[:, 0]
    main_of[slot_of[is_main]] = is_main
    main = main_of[slot_of]
    together = ((mass >= _MIN_FRAME_AREA) & (mass[main] >= _MIN_FRAME_AREA)).sum(1) >= _MIN_FRAMES
    apart = together & (mass.mean(1) >= _MIN_AREA)
    index = torch.arange(num, device=total.device)
    blob = torch.where(apart, index, main)
    blob = blob.masked_fill((total < 0.05 * total[main]) & (index != main), -1)
    return blob[component]


# ------------------------------------------------------------------------------------------------------------- tracks


def _time(device: torch.device) -> Tensor:
    return torch.linspace(-0.5, 0.5, NUM_FRAMES, device=device)


def _track(blobs: _Blobs) -> _Tracks:
    num, device = len(blobs.clip), blobs.coverage.device
    place = blobs.pixel % SIZE**2
    x, y = place % SIZE + 0.5, place // SIZE + 0.5
    key = blobs.pixel_object * NUM_FRAMES + blobs.pixel % _PIXELS // SIZE**2

    def add(values: Tensor) -> Tensor:
        return _sums(key, values, num * NUM_FRAMES).view(num, NUM_FRAMES)

    area = add(blobs.coverage)
    center_x, center_y = (add(blobs.coverage * v) / area.clamp(min=1e-3) for v in (x, y))

    own = blobs.owner[blobs.pixel]
    touches = torch.zeros_like(own, dtype=torch.bool)
    for step in (-2, 2, -2 * SIZE, 2 * SIZE, -SIZE - 1, -SIZE + 1, SIZE - 1, SIZE + 1):
        other = blobs.owner[(blobs.pixel + step).clamp(0, len(blobs.owner) - 1)]
        touches |= (other != own) & (other > 0)
    seen = area >= _MIN_FRAME_AREA
    whole = seen & (add(touches.float()) == 0)
    whole = torch.where((whole.sum(1) >= 5)[:, None], whole, seen)
    weight = whole + 1e-3 * seen

    time = _time(device)
    turns = torch.linspace(-6, 6, 121, device=device)
    dx, dy = x - center_x.flatten()[key], y - center_y.flatten()[key]
    angle, size = torch.atan2(dy, dx), blobs.coverage * (dx.square() + dy.square())
    spread = add(size).clamp(min=1e-3)
    turn, still = {}, {}
    for order in sorted(set(world.ROTATIONAL_SYMMETRY.values())):
        moment = torch.complex(add(size * (order * angle).cos()), add(size * (order * angle).sin())) / spread
        moment = moment * weight
        unwind = torch.polar(torch.ones(121, NUM_FRAMES, device=device), -order * turns[:, None] * time)
        spectrum = moment @ unwind.T  # [M, turns]
        best = spectrum.abs().argmax(1)
        turn[order] = (spectrum.gather(1, best[:, None])[:, 0].angle(), turns[best])
        still[order] = moment.sum(1).angle()
    return _Tracks(weight, center_x, center_y, area, turn, still)


@lru_cache
def _shape_constants() -> tuple[Tensor, Tensor]:
    """Area over squared radius of each shape, and phase of its n-fold moment at angle 0 (0 for round ones)."""
    radius = 24.0
    path = torch.tensor([SIZE / 2, SIZE / 2, radius, 0.0]).expand(len(SHAPES), 1, 4)
    coverage = world.draw_coverage(torch.arange(len(SHAPES)), path)[:, 0]
    place = torch.arange(SIZE) + 0.5 - SIZE / 2
    dy, dx = torch.meshgrid(place, place, indexing="ij")
    phases = []
    for image, name in zip(coverage, SHAPES, strict=True):
        angle = world.ROTATIONAL_SYMMETRY.get(name, 0) * torch.atan2(dy, dx)
        size = image * (dx.square() + dy.square())
        phases.append(torch.atan2((size * angle.sin()).sum(), (size * angle.cos()).sum()))
    return coverage.sum((1, 2)) / radius**2, torch.stack(phases)


# -------------------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class _Support:
    """The pixels on and around each object, with how much of each it covers; hidden ones are left out."""

    object: Int[Tensor, " P"]
    frame: Int[Tensor, " P"]
    x: Float[Tensor, " P"]
    y: Float[Tensor, " P"]
    coverage: Float[Tensor, " P"]

    @staticmethod
    def of(clip: Tensor, background: _Background, blobs: _Blobs, tracks: _Tracks) -> "_Support":
        # Where an object is not seen whole, its place and size are bridged from the frames where it is.
        line = _time(clip.device)
        center_x, center_y, area = (_bridge(v, tracks.weight, line) for v in (tracks.x, tracks.y, tracks.area))
        reach = 0.95 * area.clamp(min=_MIN_FRAME_AREA).sqrt() + 2.5
        place = torch.arange(SIZE, device=clip.device) + 0.5
        dx, dy = (place - center_x[..., None]).square(), (place - center_y[..., None]).square()
        near = dx[:, :, None, :] + dy[..., None] < reach.square()[..., None, None]
        number = near.flatten().nonzero()[:, 0]
        object_, inside = number // _PIXELS, number % _PIXELS
        pixel = blobs.clip[object_] * _PIXELS + inside
        own = (blobs.rank[object_] + 1).to(torch.uint8)
        hidden = torch.zeros_like(own, dtype=torch.bool)
        for step in (0, -1, 1, -SIZE, SIZE):
            other = blobs.owner[(pixel + step).clamp(0, len(blobs.owner) - 1)]
            hidden |= (other != own) & (other > 0)
        seen = (~hidden).nonzero()[:, 0]
        object_, inside = object_[seen], inside[seen]
        row = blobs.clip[object_]
        behind = _gather(background.image, row, inside % SIZE**2)
        reach_ = blobs.measured[object_] - behind
        coverage = ((_gather(clip, row, inside) - behind) * reach_).sum(1) / reach_.square().sum(1).clamp(min=1.0)
        spot = inside % SIZE**2
        return _Support(object_, inside // SIZE**2, spot % SIZE + 0.5, spot // SIZE + 0.5, coverage)

    def __getitem__(self, rows: Tensor) -> "_Support":
        return _Support(*(getattr(self, field.name)[rows] for field in fields(self)))

    def distance(self, name: str, path: Float[Tensor, "P 4"]) -> Float[Tensor, " P"]:
        """Distance of the pixels to the outline of a shape, in pixels, given their object's path in their frame."""
        x, y, radius, angle = path.unbind(-1)
        dx, dy, cos, sin = (self.x - x) / radius, (self.y - y) / radius, angle.cos(), angle.sin()
        return world.signed_distance(name, cos * dx + sin * dy, cos * dy - sin * dx) * radius


def _bridge(values: Tensor, weight: Tensor, time: Tensor) -> Tensor:
    """Values per frame, where their weight is small replaced by linear interpolation between those where it is not."""
    good = weight > 0.5
    index = torch.arange(NUM_FRAMES, device=values.device).expand_as(values)
    before = torch.where(good, index, -1).cummax(1).values
    after = NUM_FRAMES - 1 - torch.where(good.flip(1), index, -1).cummax(1).values.flip(1)
    after = torch.where(after >= NUM_FRAMES, before, after)
    before = torch.where(before < 0, after, before).clamp(0, NUM_FRAMES - 1)
    after = after.clamp(0, NUM_FRAMES - 1)
    share = ((index - before) / (after - before).clamp(min=1)).clamp(0, 1)
    return torch.lerp(values.gather(1, before), values.gather(1, after), share)


@lru_cache
def _templates() -> Float[Tensor, "shapes variants pixels"]:
    """Each shape on its canvas at each scale and blur, as `_fit_shapes` compares them with what is seen."""
    fine, step = 4 * _CANVAS, _CANVAS_WIDTH / (4 * _CANVAS)
    place = (torch.arange(fine) + 0.5) * step - _CANVAS_WIDTH / 2
    reach = torch.arange(-fine // 4, fine // 4 + 1) * step
    bells = [torch.exp(-reach.square() / (2 * max(blur, 1e-3) ** 2)) for blur in _BLURS]
    shapes = []
    for name, area in zip(SHAPES, _shape_constants()[0], strict=True):
        radii = [scale * (math.pi / area) ** 0.5 for scale in _SCALES]
        distance = torch.stack(
            [radius * world.signed_distance(name, place / radius, place[:, None] / radius) for radius in radii]
        )
        sharp = (0.5 - distance / step).clamp(0, 1)[:, None]
        blurred = []
        for bell in bells:
            kernel = bell / bell.sum()
            rows = conv2d(sharp, kernel.view(1, 1, 1, -1), padding="same")
            blurred.append(conv2d(rows, kernel.view(1, 1, -1, 1), padding="same"))
        shapes.append(avg_pool2d(torch.cat(blurred), 4).flatten(1))
    return torch.stack(shapes)


def _fit_shapes(support: _Support, tracks: _Tracks) -> Int[Tensor, " M"]:
    """Shape of each object whose coverage is nearest to the observed, at the best size, angle and blur.

    All frames of an object are laid over each other on a canvas, moved to the measured centers, scaled to the measured
    areas and turned back by the measured angles. An object that does not spin stands nearly upright.
    """
    num, device = len(tracks.x), tracks.x.device
    use = (tracks.weight[support.object, support.frame] > 0.5).nonzero()[:, 0]
    support = support[use]
    of, coverage = (support.object, support.frame), support.coverage.clamp(-0.5, 1.5)
    scale = (tracks.area.clamp(min=_MIN_FRAME_AREA) / math.pi).rsqrt()[of]
    dx, dy = (support.x - tracks.x[of]) * scale, (support.y - tracks.y[of]) * scale
    phases, templates = _shape_constants()[1].tolist(), _templates().to(device)

    def least_error(shape: int, angle: Float[Tensor, "M 17"]) -> Float[Tensor, " M"]:
        """Squared error of the best variant, less the sum of squares of the coverage, the same for all."""
        cos, sin = angle[of].cos(), angle[of].sin()
        across, down = (
            ((value / _CANVAS_WIDTH + 0.5) * _CANVAS).long().clamp(0, _CANVAS - 1)
            for value in (cos * dx + sin * dy, cos * dy - sin * dx)
        )
        key = (support.object * _CANVAS + down) * _CANVAS + across
        pixels = _sums(key, torch.ones_like(coverage), num * _CANVAS**2).view(num, _CANVAS**2)
        covered = _sums(key, coverage, num * _CANVAS**2).view(num, _CANVAS**2)
        variants = templates[shape].T
        return (pixels @ variants.square() - 2 * covered @ variants).amin(1)

    errors, upright = [], torch.zeros_like(tracks.x)
    for i, name in enumerate(SHAPES):
        if (order := world.ROTATIONAL_SYMMETRY.get(name)) is None:
            errors.append(least_error(i, upright))
            continue
        tilt, period = (tracks.still_phase[order] - phases[i]) / order, 2 * math.pi / order
        tilt = (tilt - period * (tilt / period).round()).clamp(-_MAX_TILT, _MAX_TILT)
        phase, turn = tracks.turn[order]
        turned = ((phase - phases[i]) / order)[:, None] + turn[:, None] * _time(device)
        spinning = least_error(i, turned).masked_fill(turn.abs() < _MIN_MOTION * _USUAL_AMOUNT["spin"], torch.inf)
        errors.append(torch.minimum(least_error(i, upright + tilt[:, None]), spinning))
    return torch.stack(errors, 1).argmin(1)


# -------------------------------------------------------------------------------------------------------------- motion


def _regress(values: Tensor, basis: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted fit `values = constant + slope * basis` over frames: constant, slope and squared error explained."""
    total = weight.sum(-1)
    mean_b, mean_v = (weight * basis).sum(-1) / total, (weight * values).sum(-1) / total
    db, dv = basis - mean_b[..., None], values - mean_v[..., None]
    covariance, variance = (weight * db * dv).sum(-1), (weight * db.square()).sum(-1).clamp(min=1e-6)
    slope = covariance / variance
    return mean_v - slope * mean_b, slope, covariance.square() / variance


def _fit_motions(tracks: _Tracks, shape: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Motion and free numbers of each object, and whether it moves like nothing known."""
    device, num = shape.device, len(shape)
    areas, phases = (t.to(device) for t in _shape_constants())
    time, weight = _time(device), tracks.weight
    radius = (tracks.area / areas[shape][:, None]).sqrt()
    x0, slope_x, _ = _regress(tracks.x, time.expand_as(weight), weight)
    y0, slope_y, linear = _regress(tracks.y, time.expand_as(weight), weight)
    r0, slope_r, _ = _regress(radius, time.expand_as(weight), weight)
    grown = slope_r / r0.clamp(min=1.0)

    # Hops of unit height at many phases.
    num_phases = 48
    hop_phase = torch.arange(num_phases, device=device) / num_phases
    unit = torch.zeros(num_phases, len(world.PARAMETERS), device=device)
    unit[:, 2], unit[:, 4], unit[:, 5] = 1.0, 1.0, hop_phase
    hops = world.object_paths(torch.full((num_phases,), MOTIONS.index("bounces"), device=device), unit)[..., 1]
    hop_y, hop_height, hop_gain = _regress(tracks.y[:, None], hops.expand(num, -1, -1), weight[:, None])
    hop_gain = hop_gain * (hop_height > 0)
    best = hop_gain.argmax(1, keepdim=True)
    hop_y, hop_height, hop_gain = (v.gather(1, best)[:, 0] for v in (hop_y, hop_height, hop_gain))
    hop_phase = hop_phase[best[:, 0]]

    turn, turn_phase, still_phase = (torch.zeros(num, device=device) for _ in range(3))
    symmetry = torch.ones(num, device=device)
    for i, name in enumerate(SHAPES):
        if order := world.ROTATIONAL_SYMMETRY.get(name):
            is_shape = shape == i
            symmetry[is_shape] = order
            turn_phase = torch.where(is_shape, tracks.turn[order][0] - phases[i], turn_phase)
            turn = torch.where(is_shape, tracks.turn[order][1], turn)
            still_phase = torch.where(is_shape, tracks.still_phase[order] - phases[i], still_phase)

    hopping = hop_gain > linear
    zero = torch.zeros(num, device=device)
    strength = {
        "moves left": -slope_x / _USUAL_AMOUNT["slide"],
        "moves right": slope_x / _USUAL_AMOUNT["slide"],
        "moves up": torch.where(hopping, zero, -slope_y) / _USUAL_AMOUNT["slide"],
        "moves down": torch.where(hopping, zero, slope_y) / _USUAL_AMOUNT["slide"],
        "grows": grown / _USUAL_AMOUNT["resize"],
        "shrinks": -grown / _USUAL_AMOUNT["resize"],
        "spins": turn.abs() / _USUAL_AMOUNT["spin"],
        "bounces": torch.where(hopping, hop_height, zero) / _USUAL_AMOUNT["hop"],
        "stays still": zero + _MIN_MOTION,
    }
    motion = torch.stack([strength[name] for name in MOTIONS], 1).argmax(1)

    def when(names: str, values: Tensor, otherwise: Tensor) -> Tensor:
        chosen = sum((motion == MOTIONS.index(name)) for name in names.split(", "))
        return torch.where(chosen.bool(), values, otherwise)  # type: ignore[union-attr]

    def mean(values: Tensor) -> Tensor:
        return (weight * values).sum(1) / weight.sum(1)

    x = when("moves left, moves right", x0, mean(tracks.x))
    y = when("moves up, moves down", y0, when("bounces", hop_y, mean(tracks.y)))
    size = when("grows, shrinks", r0, mean(radius)).clamp(min=2.0)
    angle = when("spins", turn_phase, still_phase) / symmetry
    amount = when("moves left, moves right", slope_x.abs(), zero)
    amount = when("moves up, moves down", slope_y.abs(), amount)
    amount = when("grows, shrinks", grown.abs().clamp(max=1.2), amount)
    amount = when("bounces", hop_height, when("spins", turn, amount))
    objects = torch.stack([x, y, size, angle, amount, when("bounces", hop_phase, zero)], 1)
    path = world.object_paths(motion, objects)
    error = mean((path[..., 0] - tracks.x).square() + (path[..., 1] - tracks.y).square()).sqrt()
    return motion, objects, error > _MAX_PATH_ERROR


# -------------------------------------------------------------------------------------------------------------- refine


def _refine(support: _Support, shape: Tensor, motion: Tensor, objects: Tensor) -> Tensor:
    """Free numbers of least squared error in coverage, by damped Gauss-Newton until it falls no more."""
    path = world.object_paths(motion, objects)
    parts = []
    for i, name in enumerate(SHAPES):  # only pixels near the outline say anything
        part = support[(shape[support.object] == i).nonzero()[:, 0]]
        distance = part.distance(name, path[part.object, part.frame])
        parts.append(part[(distance.abs() < 2.5).nonzero()[:, 0]])

    limit = objects.new_tensor([2.0, 2.0, 1.0, 0.3, 2.0, 0.05])
    best, least = objects, torch.full((len(shape),), torch.inf, device=shape.device)
    active = torch.ones_like(shape, dtype=torch.bool)
    for _ in range(_MAX_STEPS):
        error, normal, gradient = _linearize(parts, motion, objects)
        best = torch.where((active & (error < least))[:, None], objects, best)
        active &= error < 0.98 * least
        least = torch.where(active, error, least)
        if not active.any():
            break
        parts = [part[active[part.object].nonzero()[:, 0]] for part in parts]
        damping = 1e-2 * normal.diagonal(dim1=1, dim2=2) + 1e-3
        change = torch.linalg.solve(normal + torch.diag_embed(damping), gradient).float()
        objects = objects + change.clamp(-limit, limit)
        objects[:, 2].clamp_(min=2.0)
    return best


def _linearize(parts: list[_Support], motion: Tensor, objects: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error of each object, and the matrix and right side of its normal equations, in double precision."""
    num, device = len(objects), objects.device
    path = world.object_paths(motion, objects)
    error = torch.zeros(num, device=device)
    square = torch.zeros(num * NUM_FRAMES, 16, device=device)
    product = torch.zeros(num * NUM_FRAMES, 4, device=device)
    for name, part in zip(SHAPES, parts, strict=True):
        if len(part.object) == 0:
            continue
        with torch.enable_grad():
            at = path[part.object, part.frame].requires_grad_()
            distance = part.distance(name, at)
            (slope,) = torch.autograd.grad(distance.sum(), at)
        distance = distance.detach()
        miss = (part.coverage - (0.5 - distance).clamp(0, 1)).clamp(-0.7, 0.7)
        slope = -slope * (distance.abs() < 0.5)[:, None]
        key = part.object * NUM_FRAMES + part.frame
        error.index_add_(0, part.object, miss.square())
        square.index_add_(0, key, (slope[:, :, None] * slope[:, None, :]).flatten(1))
        product.index_add_(0, key, slope * miss[:, None])
    jacobian = _path_jacobian(motion, objects)
    square, product = square.view(num, NUM_FRAMES, 4, 4).double(), product.view(num, NUM_FRAMES, 4).double()
    normal = torch.einsum("mtij,mtik,mtkl->mjl", jacobian, square, jacobian)
    return error, normal, torch.einsum("mtij,mti->mj", jacobian, product)


def _path_jacobian(motion: Tensor, objects: Tensor) -> Float[Tensor, "M 17 4 6"]:
    """Derivative of paths by free numbers, in double precision, by central differences."""
    step = 1e-5 * torch.eye(len(world.PARAMETERS), dtype=torch.float64, device=objects.device)
    both = torch.stack([objects[:, None] + step, objects[:, None] - step])
    after, before = world.object_paths(motion[:, None].expand(both.shape[:-1]), both)
    return ((after - before) / 2e-5).permute(0, 2, 3, 1)
