"""A file that is not exactly what was written is never read, and batches are the same whoever asks."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from accvideo.call import DenoiserCall
from accvideo.trajectory import (
    Manifest,
    Trajectory,
    TrajectoryFolder,
    collate_trajectories,
    read_trajectory,
    trajectory_name,
    verify,
    write_trajectory,
)
from accvideo.types import UserError

NUM_STUDENT_STEPS = 2


def make_trajectory(index: int, prompt: str = "a red square") -> Trajectory:
    """Random states; prompt embeddings shared by the key points, timesteps not."""
    generator = torch.Generator().manual_seed(index)
    embeds = torch.randn(1, 3, 4, generator=generator).bfloat16()
    condition = torch.randn(1, 2, 2, 3, 3, generator=generator)
    calls = tuple(
        DenoiserCall(
            {
                "timestep": torch.tensor([999 - 100 * k]),
                "encoder_hidden_states": embeds,
                "mask": torch.ones(1, 3).bool(),
            },
            {"return_dict": False, "rope": [0.1, 8], "attention_kwargs": None},
            condition,
            torch.bfloat16,
            (0, 1, 0, 0),
            {"positions.0": torch.arange(3), "padding": torch.full((1, 2), float(k))},
        )
        for k in range(NUM_STUDENT_STEPS)
    )
    states = torch.randn(NUM_STUDENT_STEPS + 1, 4, 2, 3, 3, generator=generator)
    return Trajectory(index, 0, prompt, states, calls, ("transformer", "transformer_2"))


def make_manifest(num_trajectories: int) -> Manifest:
    return Manifest(
        teacher="t",
        revision=None,
        license=None,
        pipeline_class="WanPipeline",
        fingerprints={"transformer": "a", "transformer_2": "b"},
        num_steps=4,
        num_student_steps=NUM_STUDENT_STEPS,
        keypoints=[0, 2, 4],
        sigmas=[1.0, 0.9, 0.8, 0.5, 0.0],
        guidance_scale=5.0,
        height=24,
        width=24,
        num_frames=5,
        fps=16,
        pipeline_args={"max_sequence_length": 3},
        dtype="float32",
        seed=0,
        num_trajectories=num_trajectories,
        batch_size=1,
        scheduler={"class": "S", "config": {"shift": 5.0}},
        nested_schedule=True,
        versions={},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five trajectories."""
    (tmp_path / "manifest.json").write_text(make_manifest(5).to_json())
    for index in range(5):
        write_trajectory(tmp_path, make_trajectory(index))
    return tmp_path


def assert_equal(one: Trajectory, other: Trajectory) -> None:
    assert (one.index, one.seed, one.prompt, one.denoisers) == (other.index, other.seed, other.prompt, other.denoisers)
    assert torch.equal(one.states, other.states)
    for a, b in zip(one.calls, other.calls, strict=True):
        assert a.constants == b.constants and a.dtype == b.dtype and a.tensors.keys() == b.tensors.keys()
        assert a.starts == b.starts and a.shared.keys() == b.shared.keys()
        assert all(torch.equal(tensor, b.shared[name]) for name, tensor in a.shared.items())
        assert a.condition is not None and b.condition is not None and torch.equal(a.condition, b.condition)
        for name, tensor in a.tensors.items():
            assert tensor.dtype == b.tensors[name].dtype and torch.equal(tensor, b.tensors[name])


@pytest.mark.parametrize("prompt", ["a red square", "", "0" * 64, "\x00\x1b[31m \u202e 红色 🟥", "x" * 100_000])
def test_reading_gives_what_was_written(tmp_path, prompt):
    trajectory = make_trajectory(3, prompt)
    assert_equal(read_trajectory(write_trajectory(tmp_path, trajectory)), trajectory)


def test_equal_trajectories_give_equal_bytes(tmp_path):
    first = write_trajectory(tmp_path, make_trajectory(3)).read_bytes()
    assert write_trajectory(tmp_path, make_trajectory(3)).read_bytes() == first
    assert [each.name for each in tmp_path.iterdir()] == ["000003.safetensors"]


def test_what_the_key_points_share_is_stored_once(tmp_path):
    """On disk, and in memory."""
    path = write_trajectory(tmp_path, make_trajectory(0))
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert {*header} == {
        *("__metadata__", "states", "step.timestep", "call.encoder_hidden_states", "call.mask", "call.hidden_states"),
        *("shared.positions.0", "shared_step.padding"),
    }
    calls = read_trajectory(path).calls
    assert calls[0].tensors["encoder_hidden_states"] is calls[1].tensors["encoder_hidden_states"]
    batch = collate_trajectories([read_trajectory(path)] * 2)
    assert batch.calls[0].tensors["encoder_hidden_states"] is batch.calls[1].tensors["encoder_hidden_states"]


def test_every_flipped_bit_is_found(tmp_path):
    """One flip anywhere in the file, 600 of them, and the whole header."""
    path = write_trajectory(tmp_path, make_trajectory(0))
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    draw = random.Random(0)
    flips = [(byte, draw.randrange(8)) for byte in range(header)]
    flips += [(draw.randrange(len(data)), draw.randrange(8)) for _ in range(600)]
    for byte, bit in flips:
        data[byte] ^= 1 << bit
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"000000\.safetensors"):
            read_trajectory(path)
        data[byte] ^= 1 << bit


def test_every_truncation_is_found(tmp_path):
    path = write_trajectory(tmp_path, make_trajectory(0))
    data = path.read_bytes()
    for length in [*range(0, 40), *range(40, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="truncated"):
            read_trajectory(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(UserError, match="changed"):
        read_trajectory(path)


def test_foreign_files_are_refused(tmp_path):
    """Pickles, a header that claims terabytes, deep JSON: nothing is executed, nothing allocated."""
    path = tmp_path / "000000.safetensors"
    deep = b"[" * 100_000
    for data in (
        b"\x80\x04cos\nsystem\n.",
        (1 << 45).to_bytes(8, "little") + b"{}",
        len(deep).to_bytes(8, "little") + deep,
        b"\x02\0\0\0\0\0\0\0{}",
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match="not a trajectory"):
            read_trajectory(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_trajectory(tmp_path, make_trajectory(0))
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_trajectory(tmp_path, replace(make_trajectory(0), prompt="other"))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_manifest_round_trip():
    manifest = make_manifest(7)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert torch.equal(manifest.key_sigmas, torch.tensor([1.0, 0.8, 0.0]))
    assert manifest.differences(replace(manifest, seed=1, dtype="bfloat16")) == ["dtype", "seed"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"keypoints": [0, 1, 4]}, "key points"),
        ({"sigmas": [1.0, 0.0]}, "2 sigmas for 4 steps"),
        ({"surprise": 1}, "surprise"),
        ({"num_student_steps": 3}, "choose one of"),
    ],
)
def test_bad_manifests_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Manifest.from_json(json.dumps(json.loads(make_manifest(1).to_json()) | change))
    with pytest.raises(UserError, match="cannot be read"):
        Manifest.from_json("{")


def test_batches_are_deterministic_and_resumable(folder):
    """Batch n is the same from the start, from n, and from another object; each epoch holds each item once."""
    data = TrajectoryFolder(folder)
    run = [batch.indices for batch in islice(data.batches(2, seed=3), 20)]
    for start in (1, 4, 13):
        again = TrajectoryFolder(folder).batches(2, seed=3, start=start)
        assert [batch.indices for batch in islice(again, 20 - start)] == run[start:]
    drawn = [index for indices in run for index in indices]
    epochs = [drawn[i : i + 5] for i in range(0, 40, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4, "epochs differ"
    assert run != [batch.indices for batch in islice(data.batches(2, seed=4), 20)]


def test_batches_of_some_indices(folder):
    drawn = [i for batch in islice(TrajectoryFolder(folder).batches(3, 0, indices=[1, 4]), 4) for i in batch.indices]
    assert all(sorted(drawn[i : i + 2]) == [1, 4] for i in range(0, 12, 2))


def test_a_batch_holds_its_trajectories(folder):
    data = TrajectoryFolder(folder)
    batch = next(data.batches(3, seed=0))
    assert batch.states.shape == (3, 3, 4, 2, 3, 3) and batch.denoisers == ("transformer", "transformer_2")
    for row, index in enumerate(batch.indices):
        alone = data[index]
        assert torch.equal(batch.states[row], alone.states) and batch.prompts[row] == alone.prompt
        for call, own in zip(batch.calls, alone.calls, strict=True):
            mine = call.select(slice(row, row + 1))
            assert all(torch.equal(mine.tensors[name], own.tensors[name]) for name in own.tensors)


def test_a_small_data_set_is_read_once(folder):
    data = TrajectoryFolder(folder)
    for _ in islice(data.batches(2, 0), 5):
        pass
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert len(list(islice(data.batches(2, 0), 5))) == 5


def test_only_the_files_needed_are_read(folder):
    (folder / trajectory_name(0)).write_bytes(b"damaged")
    assert len(list(islice(TrajectoryFolder(folder).batches(1, 0, indices=[1, 2]), 8))) == 8


def test_an_incomplete_data_set_is_refused(folder):
    (folder / trajectory_name(2)).unlink()
    with pytest.raises(UserError, match="lacks 1 of 5 trajectories, the first is 000002") as error:
        TrajectoryFolder(folder)
    assert len(str(error.value).splitlines()) == 2
    with pytest.raises(UserError, match="no manifest.json"):
        TrajectoryFolder(folder / "elsewhere")


def swap(folder: Path) -> None:
    one, other = folder / trajectory_name(1), folder / trajectory_name(2)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "none": (lambda folder: None, []),
    "missing": (lambda folder: (folder / trajectory_name(1)).unlink(), ["000001.safetensors: missing"]),
    "empty": (lambda folder: (folder / trajectory_name(1)).write_bytes(b""), ["000001.safetensors: not a trajectory"]),
    "swapped": (swap, ["000001.safetensors: holds trajectory 2", "000002.safetensors: holds trajectory 1"]),
    "other seed": (
        lambda folder: write_trajectory(folder, replace(make_trajectory(1), seed=9)),
        ["000001.safetensors: was recorded with seed 9"],
    ),
    "duplicate": (
        lambda folder: write_trajectory(folder, replace(make_trajectory(1), index=4)),
        ["000004.safetensors: has the noise and the prompt of 000001.safetensors"],
    ),
    "wrong shape": (
        lambda folder: write_trajectory(folder, replace(make_trajectory(3), states=torch.ones(3, 4, 2, 3, 5))),
        ["000003.safetensors: states [3, 4, 2, 3, 5], most others [3, 4, 2, 3, 3]"],
    ),
    "too few states": (
        lambda folder: write_trajectory(folder, replace(make_trajectory(3), states=torch.ones(2, 4, 2, 3, 3))),
        ["000003.safetensors: has 2 states and 2 calls, not 3 and 2"],
    ),
    "not finite": (
        lambda folder: write_trajectory(folder, replace(make_trajectory(3), states=torch.full((3, 4, 2, 3, 3), 1e999))),
        ["000003.safetensors: states that are not finite"],
    ),
    "other denoiser": (
        lambda folder: write_trajectory(folder, replace(make_trajectory(3), denoisers=("unet", "unet"))),
        ["000003.safetensors: was recorded with the denoisers ['unet']"],
    ),
    "stray": (
        lambda folder: (folder / ".000007.safetensors.tmp").write_bytes(b""),
        [".000007.safetensors.tmp: does not belong"],
    ),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), ["is not a data set"]),
    "bad manifest": (lambda folder: (folder / "manifest.json").write_text("{"), ["manifest.json cannot be read"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_names_what_is_wrong(folder, fault):
    """Each bad file is named, and no good one."""
    damage, expected = FAULTS[fault]
    damage(folder)
    problems = verify(folder)
    assert len(problems) == len(expected)
    assert all(part in problem for part, problem in zip(expected, problems, strict=True)), problems


@pytest.mark.parametrize("fault", ["swapped", "other seed", "too few states", "other denoiser"])
def test_misplaced_files_do_not_reach_training(folder, fault):
    FAULTS[fault][0](folder)
    with pytest.raises(UserError, match="safetensors"):
        list(islice(TrajectoryFolder(folder).batches(1, 0), 5))
