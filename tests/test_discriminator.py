from pathlib import Path

import pytest
import torch
from torch import Tensor

from accvideo.call import DenoiserCall, layer_features
from accvideo.data.dataset import TrajectoryFolder
from accvideo.discriminator import Discriminator, Head, at_final_timestep, head_width, token_grid
from accvideo.student import Student
from accvideo.trajectory import TrajectoryBatch
from accvideo.types import UserError
from tests.recorded import record_tiny
from tests.tiny import wan_transformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryFolder:
    return record_tiny(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def batch(folder: TrajectoryFolder) -> TrajectoryBatch:
    return next(folder.batches(2, seed=0))


def make(
    folder: TrajectoryFolder, batch: TrajectoryBatch, rank: int | None = 4, **options
) -> tuple[Student, Discriminator]:
    torch.manual_seed(0)
    student = Student({"transformer": wan_transformer()}, rank)
    return student, Discriminator(student, folder.manifest.key_sigmas, [batch], **options)


def randomize(student: Student) -> None:
    with torch.no_grad():
        for parameter in student.trained().values():
            parameter.add_(0.1 * torch.randn_like(parameter))


def test_one_logit_a_token_and_one_head_a_key_point(folder: TrajectoryFolder, batch: TrajectoryBatch):
    _, discriminator = make(folder, batch)
    assert len(discriminator.heads) == 5
    logits = [logits_of(discriminator, batch.states[:, 1], batch, keypoint) for keypoint in range(5)]
    assert all(each.shape == (2, 2 * 2 * 2) for each in logits)  # state [4, 2, 4, 4], patches of 1x2x2
    assert not torch.equal(logits[0], logits[1])


def logits_of(discriminator: Discriminator, latents: Tensor, batch: TrajectoryBatch, keypoint: int) -> Tensor:
    return discriminator.logits(discriminator.features(latents, batch, keypoint), keypoint)


def test_a_shared_head_is_one_head(folder: TrajectoryFolder, batch: TrajectoryBatch):
    _, discriminator = make(folder, batch, shared_head=True)
    features = discriminator.features(batch.states[:, 1], batch, 0)
    assert len(discriminator.heads) == 1
    discriminator.center.zero_()
    discriminator.scale.fill_(1.0)
    assert torch.equal(discriminator.logits(features, 0), discriminator.logits(features, 4))


def test_heads_see_channels_of_mean_0_and_deviation_1(folder: TrajectoryFolder):
    """Of the real features of all parts together, at each key point, however large a channel is."""
    batches = folder.batches(2, seed=0)
    parts = [next(batches) for _ in range(3)]
    student, _ = make(folder, parts[0])
    discriminator = Discriminator(student, folder.manifest.key_sigmas, parts)
    seen: list[Tensor] = []
    for head in discriminator.heads:
        head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].movedim(1, -1).flatten(0, -2)))
    for keypoint in range(5):
        seen.clear()
        for part in parts:
            discriminator.logits(discriminator.real_features(part, keypoint), keypoint)
        tokens = torch.cat(seen)
        assert torch.allclose(tokens.mean(0), torch.zeros(tokens.shape[1]), atol=1e-4)
        assert torch.allclose(tokens.std(0, correction=0), torch.ones(tokens.shape[1]), atol=1e-4)


def test_heads_are_only_where_steps_end(folder: TrajectoryFolder, batch: TrajectoryBatch):
    """Of many recorded states a student of few steps wants few heads, and few features to measure."""
    _, every = make(folder, batch)
    _, some = make(folder, batch, keypoints=(1, 4))
    assert len(some.heads) == 2 and torch.equal(some.center, every.center[[1, 4]])
    for head, keypoint in zip(some.heads, (1, 4), strict=True):
        every.heads[keypoint].load_state_dict(head.state_dict())
        latents = batch.states[:, 2]
        assert torch.equal(logits_of(some, latents, batch, keypoint), logits_of(every, latents, batch, keypoint))
    with pytest.raises(KeyError):
        logits_of(some, batch.states[:, 2], batch, 2)


@pytest.mark.parametrize("rank", [4, None])
def test_the_student_learns_through_a_frozen_teacher(
    folder: TrajectoryFolder, batch: TrajectoryBatch, rank: int | None
):
    """The adversarial loss gives no gradient to the teacher and some to the student."""
    student, discriminator = make(folder, batch, rank)
    randomize(student)
    for keypoint in range(5):
        velocity = student.velocity("transformer", batch.calls[keypoint], batch.states[:, keypoint])
        logits_of(discriminator, batch.states[:, keypoint] - 0.1 * velocity, batch, keypoint).sum().backward()
        assert all(parameter.grad is not None for parameter in discriminator.heads[keypoint].parameters())
    assert any(parameter.grad.abs().max() > 0 for parameter in student.trained().values() if parameter.grad is not None)
    trained = {id(parameter) for parameter in student.trained().values()}
    frozen = [p for model in student.teachers.values() for p in model.parameters() if id(p) not in trained]
    assert len(frozen) > 20 and all(parameter.grad is None for parameter in frozen)


@pytest.mark.parametrize("rank", [4, None])
def test_features_are_the_teachers_at_the_latents_own_noise_level(
    folder: TrajectoryFolder, batch: TrajectoryBatch, rank: int | None
):
    """Of the last block while noise is left, of the block at two thirds for the video; whatever the student became."""
    torch.manual_seed(0)
    teacher = wan_transformer()
    student, discriminator = make(folder, batch, rank)
    randomize(student)
    for keypoint in range(4):
        expected = layer_features(teacher, batch.calls[keypoint + 1], batch.states[:, 2], layer=3)
        assert torch.equal(discriminator.features(batch.states[:, 2], batch, keypoint), expected)
    clean = DenoiserCall(
        batch.calls[4].tensors | {"timestep": torch.zeros(2, dtype=torch.int64)}, batch.calls[4].constants
    )
    expected = layer_features(teacher, clean, batch.states[:, 2], layer=2)
    assert torch.equal(discriminator.features(batch.states[:, 2], batch, 4), expected)


def test_feature_layers_can_be_chosen_within_the_depth(folder: TrajectoryFolder, batch: TrajectoryBatch):
    _, discriminator = make(folder, batch, layers=(2, 1))
    assert discriminator.layers == [2, 2, 2, 2, 1]
    with pytest.raises(UserError, match="from 1 to 3"):
        make(folder, batch, layers=(4, 1))


@pytest.mark.parametrize(
    "timestep, ratio, expected",
    [
        (torch.tensor([555, 555]), 0.0, torch.tensor([0, 0])),
        (torch.tensor([[0.0, 636.4], [0.0, 636.4]]), 0.0, torch.zeros(2, 2)),  # Wan 2.2 5B: a timestep a token
        (torch.tensor([363.6364]), 1 / 0.3636364, torch.tensor([1000.0])),  # Mochi: sigma rises to 1
    ],
)
def test_final_timestep(timestep: Tensor, ratio: float, expected: Tensor):
    told = at_final_timestep(DenoiserCall({"timestep": timestep}, {}), ratio).tensors["timestep"]
    assert told.dtype == expected.dtype and torch.allclose(told, expected)


@pytest.mark.parametrize(
    "num_tokens, state, grid",
    [
        (24 * 34 * 60, (16, 24, 68, 120), (24, 34, 60)),  # HunyuanVideo at 544x960, 93 frames
        (80, (48, 5, 4, 4), (5, 4, 4)),  # the playground
        (15, (16, 5, 2, 2), (1, 15, 1)),  # does not divide by frame
        (96, (96, 128), (1, 96, 1)),  # packed
    ],
)
def test_token_grid(num_tokens: int, state: tuple[int, ...], grid: tuple[int, int, int]):
    assert token_grid(num_tokens, state) == grid


def test_heads_judge_each_frame_alone(folder: TrajectoryFolder, batch: TrajectoryBatch):
    """Exchanged frames of features give exchanged logits."""
    _, discriminator = make(folder, batch, kernel_size=3)
    features = torch.randn(2, 8, 24)
    first, second = discriminator.logits(features, 0).split(4, dim=1)
    swapped = discriminator.logits(torch.cat(features.split(4, dim=1)[::-1], dim=1), 0)
    assert torch.allclose(swapped, torch.cat([second, first], dim=1), atol=1e-6)


def test_a_1x1_head_exchanges_nothing_between_places_but_statistics():
    head = Head(24)
    frames = torch.randn(1, 24, 4, 4)
    rolled = head(frames.roll(1, dims=3))
    assert torch.allclose(rolled, head(frames).roll(1, dims=3), atol=1e-6)


@pytest.mark.parametrize("feature_width, width", [(24, 64), (192, 64), (1536, 512), (3072, 1024), (5120, 1024)])
def test_head_width(feature_width: int, width: int):
    assert head_width(feature_width) == width


def test_only_heads_are_parameters(folder: TrajectoryFolder, batch: TrajectoryBatch, tmp_path: Path):
    _, discriminator = make(folder, batch)
    assert {name.split(".")[0] for name, _ in discriminator.named_parameters()} == {"heads"}
    assert discriminator.state_dict().keys() - dict(discriminator.named_parameters()) == {"center", "scale"}
