"""The judge is right on the world's own clips, and wrong where, and only where, a clip is wrong."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from accvideo.playground import world
from accvideo.playground.judge import Verdicts, diversity_of_samples, judge
from accvideo.playground.world import COLORS, MOTIONS, PATTERNS, SHAPES, Requests, Scenes

PROPERTIES = ("shape", "color", "background", "motion", "count")
NUM = 40


def world_clips(captions: list[str], seed: int) -> Tensor:
    scenes = world.scenes_of(captions, seed)
    return torch.cat([clips_of(scenes[slice(i, i + 50)]) for i in range(0, len(captions), 50)])


def clips_of(scenes: Scenes) -> Tensor:
    return world.to_uint8(world.draw(scenes))


def to_bytes(clips: Tensor) -> Tensor:
    return clips.round().clamp(0, 255).to(torch.uint8)


def share(verdicts: Verdicts) -> dict[str, float]:
    return {name: getattr(verdicts, name).float().mean().item() for name in PROPERTIES}


def assert_only_wrong(verdicts: Verdicts, *wrong: str) -> None:
    """The properties `wrong` are wrong in all clips, the others right in all but a few."""
    for name, right in share(verdicts).items():
        assert right == 0 if name in wrong else right >= 0.95, (name, right)
    assert not verdicts.all_right.any()


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return world.sample_prompts(NUM, seed=31, split="held_out")


@pytest.fixture(scope="module")
def scenes(captions: list[str]) -> Scenes:
    return world.scenes_of(captions, seed=31)


@pytest.fixture(scope="module")
def frames(scenes: Scenes) -> Tensor:
    return clips_of(scenes)


@pytest.fixture(scope="module")
def verdicts(frames: Tensor, captions: list[str]) -> Verdicts:
    return judge(frames, captions)


def blur(frames: Tensor, sigma: float) -> Tensor:
    place = torch.arange(-4, 5)
    kernel = torch.exp(-place.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    images = torch.nn.functional.pad(
        frames.float().permute(0, 1, 4, 2, 3).flatten(0, 2)[:, None], (4,) * 4, "replicate"
    )
    images = torch.nn.functional.conv2d(images, kernel.view(1, 1, 1, -1))
    images = torch.nn.functional.conv2d(images, kernel.view(1, 1, -1, 1))
    batch, time, height, width, channels = frames.shape
    return to_bytes(images.view(batch, time, channels, height, width).permute(0, 1, 3, 4, 2))


# --------------------------------------------------------------------------------------------------- the world's clips


def test_own_clips_are_right(verdicts: Verdicts):
    assert verdicts.all_right.float().mean() >= 0.98
    assert verdicts.rerender_psnr_db.mean() >= 45
    assert verdicts.flicker.max() < 0.5


@pytest.mark.slow
def test_two_thousand_own_clips_are_right():
    captions = world.sample_prompts(2000, seed=77, split="held_out")
    verdicts = judge(world_clips(captions, seed=77), captions)
    for name, right in share(verdicts).items():
        assert right >= 0.99, name
    assert verdicts.rerender_psnr_db.mean() >= 45
    assert verdicts.rerender_psnr_db.quantile(0.01) >= 35
    assert diversity_distance(verdicts) < 0.05


def test_numbers_of_the_scene_are_recovered(verdicts: Verdicts, scenes: Scenes):
    """Center, radius and amount to a few hundredths of a pixel, pattern phases to a hundredth of a period."""
    single = verdicts.all_right & (scenes.requests.count == 1)
    found, drawn = verdicts.scenes.objects[single, 0], scenes.objects[single, 0]
    assert (found[:, :3] - drawn[:, :3]).abs().max() < 0.05
    assert (found[:, 4] - drawn[:, 4]).abs().max() < 0.1
    striped = single & (scenes.requests.pattern == PATTERNS.index("striped"))
    shift = verdicts.scenes.phase[striped, 0] - scenes.phase[striped, 0]
    assert (shift - shift.round()).abs().max() < 0.01


def test_the_object_in_front_is_found():
    caption = "a {} square stays still and a {} circle moves right on a plain black background"
    numbers = torch.tensor([[[32.0, 32, 9, 0.1, 0, 0], [32.0, 30, 9, 0.0, 30, 0]]])
    for colors in (("red", "blue"), ("blue", "red")):
        requests = world.parse_captions([caption.format(*colors)])
        found = judge(clips_of(Scenes(requests, numbers, torch.zeros(1, 2))), [caption.format(*colors)])
        assert found.all_right.all() and found.rerender_psnr_db.item() > 40
        assert found.scenes.requests.color.tolist() == [[list(COLORS).index(color) for color in colors]]


def test_the_batch_size_and_the_order_of_objects_do_not_matter(frames: Tensor, captions: list[str], verdicts: Verdicts):
    flipped = []
    for caption in captions[:24]:
        subject, _, rest = caption.partition(" on a ")
        flipped.append(" and ".join(reversed(subject.split(" and "))) + " on a " + rest)
    again = judge(frames[:24], flipped, batch_size=5)
    assert torch.equal(again.all_right, verdicts.all_right[:24])
    assert torch.allclose(again.rerender_psnr_db, verdicts.rerender_psnr_db[:24], atol=0.5)


# ------------------------------------------------------------------------------------------ captions that say otherwise


def changed(requests: Requests, name: str) -> Requests:
    """The requests with the property `name` of the first object, or of the background, replaced by another."""
    if name in ("background", "pattern"):
        size = len(world.BACKGROUNDS) if name == "background" else len(PATTERNS)
        return replace(requests, **{name: (getattr(requests, name) + 1) % size})
    value = getattr(requests, name).clone()
    if name == "color":  # not the other object's either
        value[:, 0] = (value[:, 0] + 1) % len(COLORS)
        value[:, 0] = torch.where(value[:, 0] == value[:, 1], (value[:, 0] + 1) % len(COLORS), value[:, 0])
    else:
        value[:, 0] = (value[:, 0] + 1) % len(SHAPES if name == "shape" else MOTIONS)
    return replace(requests, **{name: value})


@pytest.mark.parametrize("name", ["shape", "color", "motion", "background", "pattern"])
def test_one_property_of_the_caption_differs(name: str, frames: Tensor, scenes: Scenes):
    wrong = "background" if name == "pattern" else name
    assert_only_wrong(judge(frames, world.captions_of(changed(scenes.requests, name))), wrong)


@pytest.mark.parametrize("name", ["shape", "color", "motion"])
def test_one_property_of_the_clip_differs(name: str, captions: list[str], scenes: Scenes):
    requests = changed(scenes.requests, name)
    drawable = (requests.motion[:, 0] != MOTIONS.index("spins")) | (requests.shape[:, 0] % (len(SHAPES) - 1) > 0)
    rows = drawable.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(2)
    uniforms = torch.rand(len(rows), world.NUM_CANDIDATES, world.NUM_UNIFORMS, generator=generator)
    clips = clips_of(world.place(requests[rows], uniforms))
    assert_only_wrong(judge(clips, [captions[i] for i in rows]), name)


# ------------------------------------------------------------------------------------------------- too few, too many


def test_an_object_is_missing(captions: list[str], scenes: Scenes):
    rows = (scenes.requests.count == 2).nonzero()[:, 0]
    alone = replace(scenes[rows].requests, count=torch.ones_like(rows))
    clips = clips_of(replace(scenes[rows], requests=alone))
    assert_only_wrong(judge(clips, [captions[i] for i in rows]), "count")


def with_extra(frames: Tensor, scenes: Scenes, color: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Clips with one more square that stays still where nothing else comes, and which clips have such a place."""
    path = world.object_paths(scenes.requests.motion, scenes.objects)
    covered = torch.zeros(len(frames), 17, 64, 64)
    for i in range(2):
        coverage = world.draw_coverage(scenes.requests.shape[:, i], path[:, i])
        covered += coverage * (scenes.requests.count > i)[:, None, None, None]
    taken = torch.nn.functional.max_pool2d(covered.amax(1), 21, stride=1, padding=10)[:, 10:-10, 10:-10]
    free, place = taken.flatten(1).min(1)
    x, y = place % 44 + 10.5, place // 44 + 10.5
    numbers = torch.stack([x, y, *(torch.full_like(x, value) for value in (radius, 0.0))], 1)
    square = world.draw_coverage(torch.full_like(place, SHAPES.index("square")), numbers[:, None])
    palette = torch.tensor(list(COLORS.values()), dtype=torch.float32)[color]
    clips = torch.lerp(frames.float(), palette[:, None, None, None], square[..., None])
    return to_bytes(clips), free == 0


@pytest.mark.parametrize("same_color", [False, True])
def test_one_object_too_many(same_color: bool, frames: Tensor, captions: list[str], scenes: Scenes):
    color = scenes.requests.color[:, 0]
    if not same_color:
        color = torch.tensor([({0, 1, 2} - set(pair)).pop() for pair in scenes.requests.color.tolist()])
    clips, possible = with_extra(frames, scenes, color, radius=6.5)
    rows = possible.nonzero()[:, 0]
    assert len(rows) > NUM / 2
    assert_only_wrong(judge(clips[rows], [captions[i] for i in rows]), "count")


def test_a_speck_is_no_object(frames: Tensor, captions: list[str], scenes: Scenes):
    clips, _ = with_extra(frames, scenes, torch.full((NUM,), 7), radius=2.0)
    assert judge(clips, captions).count.float().mean() >= 0.95


def test_a_blob_for_a_quarter_of_the_clip_is_no_object(frames: Tensor, captions: list[str], scenes: Scenes):
    clips, _ = with_extra(frames, scenes, (scenes.requests.color[:, 0] + 3) % len(COLORS), radius=6.0)
    clips[:, 4:] = frames[:, 4:]
    assert judge(clips, captions).count.float().mean() >= 0.95


def test_a_clip_without_objects_has_none(captions: list[str], scenes: Scenes):
    nothing = replace(scenes.requests, count=torch.zeros(NUM, dtype=torch.long))
    verdicts = judge(clips_of(replace(scenes, requests=nothing)), captions)
    assert_only_wrong(verdicts, "count", "shape", "color", "motion")
    assert (verdicts.scenes.requests.count == 0).all()
    assert verdicts.rerender_psnr_db.min() > 40


# ------------------------------------------------------------------------------------------------------- spoiled clips


def test_noise_is_nothing(captions: list[str]):
    noise = torch.randint(256, (16, 17, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    verdicts = judge(noise, captions[:16])
    assert not verdicts.all_right.any()
    assert verdicts.rerender_psnr_db.max() < 15
    assert verdicts.flicker.min() > 50


def test_blur_lowers_psnr_and_nothing_else(frames: Tensor, captions: list[str], verdicts: Verdicts):
    means = [verdicts.rerender_psnr_db[:20].mean()]
    for sigma in (0.7, 1.2):
        blurred = judge(blur(frames[:20], sigma), captions[:20])
        assert blurred.all_right.float().mean() >= 0.97
        means.append(blurred.rerender_psnr_db.mean())
    assert means[0] > means[1] + 5 > means[2] + 5


def test_shapes_are_told_apart_under_heavy_blur(frames: Tensor, captions: list[str]):
    """At two pixels the points of a star and the arms of a cross are blobs, but still five and four."""
    assert judge(blur(frames, 2.0), captions).shape.float().mean() >= 0.9


def test_noise_of_some_levels_is_borne(frames: Tensor, captions: list[str]):
    noise = 6 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    noisy = judge(to_bytes(frames + noise), captions)
    assert noisy.all_right.float().mean() >= 0.97
    # Noise of 6 levels is 32.6 dB; the second difference of white noise has sqrt(6) its deviation.
    assert noisy.rerender_psnr_db.mean().item() == pytest.approx(32.6, abs=0.3)
    assert noisy.flicker.mean().item() == pytest.approx(6 * 6**0.5 * (2 / torch.pi) ** 0.5, rel=0.05)


def test_a_slight_shift_of_color_lowers_psnr_and_nothing_else(frames: Tensor, captions: list[str]):
    shift = torch.tensor([12.0, -10.0, 8.0])
    shifted = judge(to_bytes(frames + shift), captions)
    assert shifted.all_right.float().mean() >= 0.97
    assert shifted.rerender_psnr_db.max() < 32


def test_a_frozen_clip_moves_wrongly_unless_it_should_stay_still(frames: Tensor, captions: list[str], scenes: Scenes):
    frozen = judge(frames[:, 8:9].expand_as(frames), captions)
    still = (scenes.requests.motion == MOTIONS.index("stays still")) | (
        torch.arange(2) >= scenes.requests.count[:, None]
    )
    assert (frozen.motion == still.all(1)).float().mean() >= 0.97
    assert share(frozen)["color"] >= 0.95 and share(frozen)["count"] >= 0.95 and share(frozen)["background"] == 1
    assert frozen.flicker.max() < 0.5


def test_time_reversed_motions_are_told_apart(frames: Tensor, captions: list[str], scenes: Scenes):
    backwards = judge(frames.flip(1), captions)
    same = [MOTIONS.index(name) for name in ("spins", "bounces", "stays still")]
    unchanged = torch.isin(scenes.requests.motion, torch.tensor(same))
    unchanged |= torch.arange(2) >= scenes.requests.count[:, None]
    assert (backwards.motion == unchanged.all(1)).float().mean() >= 0.97


def test_jumping_about_is_no_motion(captions: list[str], frames: Tensor, scenes: Scenes):
    """Shuffled frames show each object everywhere on its path; only what stays in its place moves as it should."""
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1))
    travels = [MOTIONS.index(name) for name in ("moves left", "moves right", "moves up", "moves down", "bounces")]
    rows = torch.isin(scenes.requests.motion[:, 0], torch.tensor(travels)).nonzero()[:, 0]
    shuffled = judge(frames[rows][:, order], [captions[i] for i in rows])
    assert shuffled.motion.float().mean() <= 0.05


def test_flicker_rises_with_flickering_only(frames: Tensor, captions: list[str], verdicts: Verdicts):
    pulse = torch.tensor([1.0, -1.0]).repeat(9)[:17, None, None, None]
    flickering = judge(to_bytes(frames + 4 * pulse), captions)
    assert flickering.flicker.mean().item() == pytest.approx(16, rel=0.05)  # |1 - 2 * -1 + 1| * 4
    assert flickering.all_right.float().mean() >= 0.97


# ----------------------------------------------------------------------------------------------------------- diversity


def verdicts_of(scenes: Scenes) -> Verdicts:
    right, number = torch.ones(len(scenes.phase), dtype=torch.bool), torch.zeros(len(scenes.phase))
    return Verdicts(right, right, right, right, right, right, number, number, scenes)


def diversity_distance(verdicts: Verdicts) -> float:
    return diversity_of_samples(verdicts)(torch.arange(len(verdicts.count)))


def test_diversity_distance_is_small_for_the_world_and_grows_as_diversity_is_lost():
    scenes = world.scenes_of(world.sample_prompts(500, seed=8), seed=8)

    def squeezed(scale: float, column: slice) -> float:
        objects = scenes.objects.clone()
        middle = objects[..., column].mean((0, 1))
        objects[..., column] = middle + scale * (objects[..., column] - middle)
        return diversity_distance(verdicts_of(replace(scenes, objects=objects)))

    own = squeezed(1.0, slice(0, 2))
    assert own < 0.09
    assert squeezed(0.5, slice(0, 2)) > own + 0.07
    assert squeezed(0.0, slice(0, 2)) > squeezed(0.5, slice(0, 2)) + 0.05
    assert squeezed(0.0, slice(2, 3)) > own + 0.05
    one_phase = replace(scenes, phase=torch.full_like(scenes.phase, 0.3))
    assert diversity_distance(verdicts_of(one_phase)) > own + 0.1


def test_diversity_distance_does_not_mind_equivalent_numbers():
    """Turned by a symmetry, or checks shifted by half a period along both axes: the same clips."""
    scenes = world.scenes_of(world.sample_prompts(100, seed=9), seed=9)
    symmetry = torch.tensor([world.ROTATIONAL_SYMMETRY.get(name, 1) for name in SHAPES])[scenes.requests.shape]
    objects = scenes.objects.clone()
    objects[..., 3] += 2 * torch.pi / symmetry
    checkered = scenes.requests.pattern == PATTERNS.index("checkered")
    phase = scenes.phase + 0.5 * checkered[:, None]
    same = diversity_distance(verdicts_of(Scenes(scenes.requests, objects, phase)))
    assert same == pytest.approx(diversity_distance(verdicts_of(scenes)), abs=1e-4)


def test_diversity_distance_without_objects_is_large():
    scenes = world.scenes_of(world.sample_prompts(10, seed=9), seed=9)
    nothing = replace(scenes.requests, count=torch.zeros(10, dtype=torch.long))
    assert diversity_distance(verdicts_of(replace(scenes, requests=nothing))) == 1.0


def test_diversity_of_samples_is_that_of_the_clips_taken():
    """Every third clip has no object and has no say; of the others every second one stands in the middle."""
    scenes = world.scenes_of(world.sample_prompts(600, seed=8), seed=8)
    objects, count, number = scenes.objects.clone(), scenes.requests.count.clone(), torch.arange(600)
    middle, empty = number % 2 == 0, number % 3 == 0
    objects[middle, :, :2] = objects[..., :2].mean((0, 1))
    count[empty] = 0
    verdicts = verdicts_of(replace(scenes, objects=objects, requests=replace(scenes.requests, count=count)))
    distance = diversity_of_samples(verdicts)
    assert distance(number.flip(0)) == distance(number) == distance(number[~empty])
    assert distance(number[~middle]) < 0.13
    assert distance(number[middle]) > distance(number[~middle]) + 0.1
    assert distance(number[empty]) == 1.0
