"""The world: the same for everybody, inside the frame, and drawn as its formulas say."""

import math
from dataclasses import fields

import pytest
import torch

from accvideo.playground import world
from accvideo.playground.world import MOTIONS, SHAPES, SIZE, Requests, Scenes
from accvideo.types import UserError


def object_of(x: float, y: float, radius: float, angle: float = 0, amount: float = 0, phase: float = 0) -> torch.Tensor:
    return torch.tensor([[x, y, radius, angle, amount, phase]], dtype=torch.float32)


def path_of(motion: str, numbers: torch.Tensor) -> torch.Tensor:
    return world.object_paths(torch.tensor([MOTIONS.index(motion)]), numbers)[0]


def test_same_seed_same_prompts_and_clips():
    prompts = world.sample_prompts(20, seed=4)
    assert prompts == world.sample_prompts(20, seed=4) != world.sample_prompts(20, seed=5)
    clips, again = (world.draw(world.scenes_of(prompts, seed=1)) for _ in range(2))
    assert torch.equal(clips, again)
    assert not torch.equal(clips, world.draw(world.scenes_of(prompts, seed=2)))


def test_a_clip_depends_on_its_own_place_only():
    prompts = world.sample_prompts(6, seed=4)
    long, short = world.scenes_of(prompts, seed=1), world.scenes_of(prompts[:3], seed=1)
    assert torch.equal(long.objects[:3], short.objects)


def test_prompts_are_distinct_and_of_their_split():
    for split in ("train", "held_out"):
        prompts = world.sample_prompts(400, seed=0, split=split)
        assert len(set(prompts)) == 400
        assert (world.parse_captions(prompts).held_out() == (split == "held_out")).all()


def test_held_out_split_is_about_a_tenth():
    requests = world.random_requests(20_000, torch.Generator().manual_seed(0), split=None)
    assert requests.held_out().float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_parsing_inverts_captioning():
    requests = world.random_requests(500, torch.Generator().manual_seed(1), split=None)
    captions = world.captions_of(requests)
    parsed = world.parse_captions(captions)
    assert world.captions_of(parsed) == captions
    assert torch.equal(parsed.count, requests.count) and torch.equal(parsed.code(), requests.code())
    pairs = requests.count == 2
    for field in fields(Requests):
        assert torch.equal(getattr(parsed, field.name)[pairs], getattr(requests, field.name)[pairs]), field.name


def test_articles_follow_the_sound():
    for caption in world.sample_prompts(200, seed=2):
        assert "a orange" not in caption
        assert all(f"an {color}" not in caption for color in world.COLORS if color != "orange")
    assert any("an orange" in caption for caption in world.sample_prompts(200, seed=2))


def test_different_captions_have_different_codes():
    requests = world.random_requests(5_000, torch.Generator().manual_seed(3), split=None)
    assert len(requests.code().unique()) == len(set(world.captions_of(requests)))


def test_nothing_round_spins_and_colors_of_a_pair_differ():
    requests = world.random_requests(2_000, torch.Generator().manual_seed(5), split=None)
    spins = requests.motion == MOTIONS.index("spins")
    for name in ("circle", "ring"):
        assert not (spins & (requests.shape == SHAPES.index(name))).any()
    assert (requests.color[:, 0] != requests.color[:, 1]).all()


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "a red blob moves left on a plain gray background",
        "a red star moves left",
        "a red star moves left and a blue ring spins and a green star grows on a plain gray background",
    ],
)
def test_a_prompt_outside_the_grammar_is_refused(prompt: str):
    with pytest.raises(UserError, match="cannot read the prompt"):
        world.parse_captions([prompt])


def test_objects_stay_in_the_frame():
    scenes = world.random_scenes(300, torch.Generator().manual_seed(6))
    path = world.object_paths(scenes.requests.motion, scenes.objects)
    covered = torch.stack([world.draw_coverage(scenes.requests.shape[:, i], path[:, i]) for i in range(2)])
    edges = [covered[..., 0, :], covered[..., -1, :], covered[..., :, 0], covered[..., :, -1]]
    assert all((edge == 0).all() for edge in edges)
    assert (covered.sum((-1, -2)) > 20).all()


def test_pairs_seldom_hide_each_other():
    scenes = world.random_scenes(500, torch.Generator().manual_seed(7))
    pairs = scenes[scenes.requests.count == 2]
    path = world.object_paths(pairs.requests.motion, pairs.objects)
    distance = (path[:, 0, :, :2] - path[:, 1, :, :2]).norm(dim=-1)
    touching = (distance < 0.8 * path[..., 2].sum(1)).sum(1)
    assert (touching <= 5).float().mean() > 0.97
    assert (touching > 0).float().mean() > 0.1  # but some pass in front of each other


def test_sliding_is_straight_and_even():
    numbers = object_of(30, 34, 9, amount=20)
    for motion, axis, sign in (("moves left", 0, -1), ("moves right", 0, 1), ("moves up", 1, -1), ("moves down", 1, 1)):
        path = path_of(motion, numbers)
        expected = numbers[0, axis] + sign * 20 * torch.linspace(-0.5, 0.5, world.NUM_FRAMES)
        assert torch.allclose(path[:, axis], expected, atol=1e-4)
        assert torch.equal(path[:, 1 - axis], numbers[0, 1 - axis].expand(world.NUM_FRAMES))


def test_growing_and_shrinking_mirror_each_other():
    numbers = object_of(30, 34, 10, amount=0.6)
    grows, shrinks = path_of("grows", numbers)[:, 2], path_of("shrinks", numbers)[:, 2]
    assert torch.allclose(grows, shrinks.flip(0), atol=1e-5)
    assert (grows[0].item(), grows[-1].item()) == pytest.approx((7.0, 13.0), abs=1e-4)


def test_spinning_turns_by_the_amount_and_nothing_else():
    path = path_of("spins", object_of(30, 34, 10, angle=0.3, amount=-3.0))
    assert (path[0, 3] - path[-1, 3]).item() == pytest.approx(3.0, abs=1e-4)
    assert torch.equal(path[:, :3], torch.tensor([30.0, 34.0, 10.0]).expand(world.NUM_FRAMES, 3))


def test_bouncing_hops_twice_to_its_height():
    y = path_of("bounces", object_of(30, 34, 10, amount=16, phase=0.0))[:, 1]
    lowest, highest = 34 + 8, 34 - 8  # y points down
    expected = lowest - 16 * (2 * math.pi * torch.linspace(0, 1, world.NUM_FRAMES)).sin().abs()
    assert torch.allclose(y, expected, atol=1e-4)
    assert (y < highest + 0.1).sum() == 2


def test_a_still_object_stays_still():
    path = path_of("stays still", object_of(30, 34, 10, amount=9.0, phase=0.4))
    assert torch.equal(path, path[:1].expand_as(path))


def test_areas_are_those_of_the_shapes():
    """Covered pixels add up to the area of each outline, from elementary geometry."""
    radius, star = 20.0, 5 * 1.1 * 0.46 * math.sin(math.pi / 5)
    areas = {
        "circle": math.pi * 0.88**2,
        "square": 1.56**2,
        "triangle": 3 * math.sqrt(3) * 0.55**2,
        "star": star,
        "cross": 2 * 2 * 0.66 - 0.66**2,
        "ring": math.pi * (0.99**2 - 0.51**2),
    }
    for index, name in enumerate(SHAPES):
        path = torch.tensor([[[32.3, 31.8, radius, 0.2]]])
        covered = world.draw_coverage(torch.tensor([index]), path).sum().item()
        assert covered == pytest.approx(areas[name] * radius**2, rel=0.01), name


def test_shapes_have_the_stated_symmetry():
    for index, name in enumerate(SHAPES):
        order = world.ROTATIONAL_SYMMETRY.get(name, 7)  # a circle and a ring have every symmetry
        path = torch.tensor([[[32.0, 32.0, 18.0, 0.3], [32.0, 32.0, 18.0, 0.3 + 2 * math.pi / order]]])
        first, turned = world.draw_coverage(torch.tensor([index]), path)[0]
        assert torch.allclose(first, turned, atol=1e-3), name


def test_the_first_object_is_in_front():
    caption = "a red square stays still and a blue square stays still on a plain black background"
    numbers = torch.stack([object_of(32, 32, 9), object_of(36, 32, 9)], 1)
    requests = world.parse_captions([caption])
    clip = world.to_uint8(world.draw(Scenes(requests, numbers, torch.zeros(1, 2))))[0, 0]
    assert clip[32, 35].tolist() == list(world.COLORS["red"])
    assert clip[32, 42].tolist() == list(world.COLORS["blue"])
    assert clip[5, 5].tolist() == list(world.BACKGROUNDS["black"])


def test_bytes_are_channels_last():
    clips = world.to_uint8(world.draw(world.scenes_of(world.sample_prompts(2, seed=0), seed=0)))
    assert clips.shape == (2, world.NUM_FRAMES, SIZE, SIZE, 3) and clips.dtype == torch.uint8


def test_drawing_can_be_differentiated():
    scenes = world.scenes_of(world.sample_prompts(4, seed=9), seed=0)
    objects = scenes.objects.requires_grad_()
    world.draw(Scenes(scenes.requests, objects, scenes.phase)).square().sum().backward()
    assert objects.grad is not None and objects.grad.isfinite().all() and (objects.grad[:, 0, :3] != 0).all()
