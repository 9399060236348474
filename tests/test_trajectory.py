"""A file that is not exactly what was written is never read."""

import hashlib
import json
import os
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accvideo.call import DenoiserCall
from accvideo.data.manifest import Manifest
from accvideo.trajectory import (
    Trajectory,
    bits,
    collate_trajectories,
    decode_trajectory,
    encode_trajectory,
    narrow,
    read_trajectory,
    write_trajectory,
    write_whole,
)
from accvideo.types import UserError
from tests.test_workers import end_within

NUM_STUDENT_STEPS = 2


def make_trajectory(index: int, prompt: str = "a red square") -> Trajectory:
    """Random states; prompt embeddings shared by the key points, timesteps not."""
    generator = torch.Generator().manual_seed(index)
    embeds = torch.randn(1, 3, 4, generator=generator).bfloat16()
    condition = torch.randn(1, 2, 2, 3, 3, generator=generator)
    calls = tuple(
        DenoiserCall(
            {
                "timestep": torch.tensor([999 - 200 * k]),
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
    names = ("transformer", "transformer_2")
    return Trajectory(index, 0, prompt, states, calls, names, settings=make_manifest(1).settings)


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


def write_data_set(folder: Path, number: int = 5) -> Path:
    """A folder of random trajectories."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(make_manifest(number).to_json())
    for index in range(number):
        write_trajectory(folder, make_trajectory(index))
    return folder


def assert_equal(one: Trajectory, other: Trajectory) -> None:
    assert (one.index, one.seed, one.prompt, one.denoisers) == (other.index, other.seed, other.prompt, other.denoisers)
    assert one.settings == other.settings
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


def test_a_prompt_that_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(UserError, match="of trajectory 3 take .* bytes as JSON"):
        write_trajectory(tmp_path, make_trajectory(3, "\x00" * 2_500_000))
    assert not list(tmp_path.iterdir())


def test_equal_trajectories_give_equal_bytes(tmp_path):
    first = write_trajectory(tmp_path, make_trajectory(3)).read_bytes()
    assert write_trajectory(tmp_path, make_trajectory(3)).read_bytes() == first
    assert [each.name for each in tmp_path.iterdir()] == ["000003.safetensors"]


def test_what_the_key_points_share_is_stored_once(tmp_path):
    """On disk, and in memory."""
    path = write_trajectory(tmp_path, make_trajectory(0))
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert {*header} == {
        *("__metadata__", "state.0", "state.1", "state.2", "step.timestep", "call.encoder_hidden_states", "call.mask"),
        *("call.hidden_states", "shared.positions.0", "shared_step.padding"),
    }
    calls = read_trajectory(path).calls
    assert calls[0].tensors["encoder_hidden_states"] is calls[1].tensors["encoder_hidden_states"]
    batch = collate_trajectories([read_trajectory(path)] * 2)
    assert batch.calls[0].tensors["encoder_hidden_states"] is batch.calls[1].tensors["encoder_hidden_states"]


def test_a_device_gets_only_what_is_asked_for(tmp_path):
    path = write_trajectory(tmp_path, make_trajectory(0))
    batch = collate_trajectories([read_trajectory(path)] * 2)
    moved = batch.to("meta")
    state, call = moved.state(1), moved.call(1)
    held = [state, *call.tensors.values(), *call.shared.values(), call.condition]
    assert len(held) > 4 and {tensor.device.type for tensor in held} == {"meta"}
    kept = [moved.states, *(tensor for call in moved.calls for tensor in call.tensors.values())]
    assert {tensor.device.type for tensor in kept} == {"cpu"}
    assert torch.equal(batch.state(-1), batch.states[:, -1])


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
        (3 << 23).to_bytes(8, "little") + b"[" + b"[]," * (1 << 23) + b"[]]",
        b"\x02\0\0\0\0\0\0\0{}",
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match="not a trajectory"):
            read_trajectory(path)


def test_each_state_takes_no_more_bits_than_it_needs(tmp_path):
    """Noise of 32 bits and steps of 16, as HunyuanVideo's are; all come back as they were, signs of zeros included."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    states = torch.randn(3, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    states = torch.stack([state.to(dtype).float() for state, dtype in zip(states, dtypes, strict=True)])
    states[:, 0, 0, 0, 0], states[:, 0, 0, 0, 1] = -0.0, 0.0
    path = write_trajectory(tmp_path, replace(make_trajectory(0), states=states))
    stored = safetensors.torch.load(path.read_bytes())
    assert [stored[f"state.{number}"].dtype for number in range(3)] == dtypes
    back = read_trajectory(path).states
    assert back.dtype == torch.float32 and torch.equal(back.view(torch.int32), states.view(torch.int32))


def padded(tensor: torch.Tensor, shape: list[int], starts: list[int]) -> torch.Tensor:
    whole = torch.zeros(shape, dtype=tensor.dtype)
    whole[tuple(slice(start, start + size) for start, size in zip(starts, tensor.shape, strict=True))] = tensor
    return whole


@pytest.mark.parametrize(
    "tensor",
    [
        padded(torch.randn(1, 9, 16).bfloat16(), [1, 512, 16], [0, 0, 0]),  # a prompt's embeddings
        padded(torch.randn(1, 20, 3, 8, 8), [1, 36, 9, 8, 8], [0, 16, 0, 0, 0]),  # channels of a first frame
        padded(torch.ones(1, 7).bool(), [1, 512], [0, 0]),
        padded(torch.full((1, 1), -0.0), [1, 512], [0, 80]),
        torch.zeros(1, 300, 4),
        torch.randn(1, 300, 4),
        torch.zeros(1, 0, 4),
        padded(torch.randn(1, 4, 4).to(torch.float8_e4m3fn), [1, 512, 8], [0, 100, 2]),
        torch.tensor([999]),
        torch.tensor(999).expand(1),  # as pipelines make a timestep of a scalar
    ],
)
def test_padding_is_not_stored(tmp_path, tensor):
    """Neither of what the key points share nor of what varies, and every bit comes back."""
    trajectory = make_trajectory(0)
    other = padded(torch.randn(1, 3), [1, 400], [0, 50])
    calls = tuple(
        replace(call, tensors={"embeds": tensor, "varies": other * (k + 1)}, shared={"same": other})
        for k, call in enumerate(trajectory.calls)
    )
    path = write_trajectory(tmp_path, replace(trajectory, calls=calls))
    for call, own in zip(read_trajectory(path).calls, calls, strict=True):
        for group, expected in ((call.tensors, own.tensors), (call.shared, own.shared)):
            assert group.keys() == expected.keys()
            for name, value in expected.items():
                assert group[name].shape == value.shape and group[name].dtype == value.dtype
                assert torch.equal(bits(group[name]), bits(value))
    stored = safetensors.torch.load(path.read_bytes())
    assert stored["step.varies"].shape == (2, 3) and stored["shared.same"].shape == (1, 3)
    filled = bits(tensor).count_nonzero()
    assert stored["call.embeds"].nbytes < max(2 * filled, 256) or tensor.count_nonzero() == tensor.numel()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda call: replace(call, tensors=call.tensors | {"pooled": torch.ones(1, 3)}), "pooled"),
        (lambda call: replace(call, shared={"padding": call.shared["padding"]}), "positions.0"),
        (lambda call: replace(call, condition=None, starts=()), "hidden_states"),
        (lambda call: replace(call, dtype=torch.float32), "torch.bfloat16, torch.float32"),
    ],
)
def test_calls_with_other_arguments_at_other_key_points_are_refused(change, named):
    """Else a replayed call would lack what the recorded one was given."""
    trajectory = make_trajectory(0)
    for calls in (
        (trajectory.calls[0], change(trajectory.calls[1])),
        (change(trajectory.calls[0]), trajectory.calls[1]),
    ):
        with pytest.raises(UserError, match=f"is given .*{named}"):
            encode_trajectory(replace(trajectory, calls=calls))


def as_format_1(data: bytes) -> bytes:
    """A file with the zeros around its tensors, as the first format had it."""
    tensors, header = contents_of(as_format_2(data))
    tensors |= {name: padded(tensors[name], *box) for name, box in header.pop("boxes").items()}
    tensors["states"] = tensors["states"].float()
    del header["media"]
    return sealed(tensors, header | {"format": 1})


def as_format_2(data: bytes) -> bytes:
    """A file with all states in one tensor of one type, as the second format had it."""
    tensors, header = contents_of(as_format_3(data))
    states = [tensors.pop(f"state.{number}") for number in range(len(header["constants"]) + 1)]
    return sealed(
        tensors | {"states": narrow(torch.stack([state.float() for state in states]))}, header | {"format": 2}
    )


def as_format_3(data: bytes) -> bytes:
    """A file that does not say with which settings it was recorded, as the third format had it."""
    tensors, header = contents_of(data)
    del header["settings"]
    return sealed(tensors, header | {"format": 3})


def contents_of(data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the header of a file."""
    size = int.from_bytes(data[:8], "little")
    return safetensors.torch.load(data), json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["accvideo"])


def sealed(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> bytes:
    """A file of these tensors and this header, with a checksum that is right."""
    header = {"sha256": "0" * 64} | {name: value for name, value in header.items() if name != "sha256"}
    data = safetensors.torch.save(tensors, {"accvideo": json.dumps(header)})
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)


def test_earlier_formats_are_read():
    trajectory = make_trajectory(3)
    embeds = padded(torch.randn(1, 9, 16).bfloat16(), [1, 512, 16], [0, 0, 0])
    calls = [replace(call, tensors=call.tensors | {"encoder_hidden_states": embeds}) for call in trajectory.calls]
    trajectory = replace(trajectory, calls=tuple(calls))
    trajectory = replace(
        trajectory, states=torch.cat([trajectory.states[:1], trajectory.states[1:].bfloat16().float()])
    )
    data = encode_trajectory(trajectory)
    first, second, third = as_format_1(data), as_format_2(data), as_format_3(data)
    assert len(first) > len(second) + 10_000 and len(second) > len(data)
    for old in (first, second, third):
        assert_equal(decode_trajectory(old, "here"), replace(trajectory, settings=""))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
WHOLE = encode_trajectory(make_trajectory(0))
TENSORS, HEADER = contents_of(WHOLE)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400))
def test_no_bytes_are_taken_for_a_trajectory(data):
    for each in (data, len(data).to_bytes(8, "little") + data, WHOLE + data[:1]):
        if each != WHOLE:
            with pytest.raises(UserError):
                decode_trajectory(each, "here")


@settings(max_examples=250, deadline=None)
@given(st.sampled_from([*HEADER, "boxes", "surprise"]), JSON)
def test_a_header_of_anybody_is_refused_or_read(name, value):
    """With a right checksum, any value in any field: a trajectory or a message, no other error."""
    with suppress(UserError):
        assert isinstance(decode_trajectory(sealed(TENSORS, HEADER | {name: value}), "here"), Trajectory)


NAMES = st.sampled_from([*TENSORS, "call.other", "step.other", "nothing", "shared.timestep", "state.3", "state.5"])
SHAPES = st.lists(st.integers(0, 5), max_size=5)


@settings(max_examples=150, deadline=None)
@given(NAMES, SHAPES, st.sampled_from([torch.float32, torch.int64, torch.bool]), st.booleans())
def test_tensors_of_anybody_are_refused_or_read(name, shape, dtype, instead):
    tensors = {} if instead else dict(TENSORS)
    with suppress(UserError):
        data = sealed(tensors | {name: torch.zeros(shape, dtype=dtype)}, HEADER)
        assert isinstance(decode_trajectory(data, "here"), Trajectory)


def test_boxes_that_claim_terabytes_are_refused():
    for shape in ([1, 1 << 40, 4], [1 << 70, 3, 4], [1, -3, 4]):
        header = HEADER | {"boxes": {"call.encoder_hidden_states": [shape, [0, 0, 0]]}}
        with pytest.raises(UserError, match="checksum matches, but"):
            decode_trajectory(sealed(TENSORS, header), "here")


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "load"},
        {"format": 5},
        {"settings": 4},
        {"format": 2},
        {"constants": [{}]},
        {"denoisers": 5},
        {"index": "0"},
        {"prompt": None},
    ],
)
def test_headers_that_fit_no_trajectory_are_refused(change):
    with pytest.raises(UserError, match="here: "):
        decode_trajectory(sealed(TENSORS, HEADER | change), "here")


def resealed(data: bytes) -> bytes:
    """The file with a checksum that is right, whatever else is in it."""
    place = data.find(b"sha256") + len(b'sha256\\": \\"')
    blank = data[:place] + b"0" * 64 + data[place + 64 :]
    return blank[:place] + hashlib.sha256(blank).hexdigest().encode() + blank[place + 64 :]


@pytest.mark.parametrize("number", [500, pytest.param(30_000, marks=pytest.mark.slow)])
def test_files_changed_on_purpose_are_refused_or_read(number):
    """Bytes replaced, removed or added anywhere, the header of safetensors included, under a right checksum."""
    assert resealed(WHOLE) == WHOLE
    draw, num_read = random.Random(0), 0
    header = 8 + int.from_bytes(WHOLE[:8], "little")
    for _ in range(number):
        data = bytearray(WHOLE)
        for _ in range(draw.randint(1, 3)):
            start = draw.randrange(header if draw.random() < 0.8 else len(data))
            length = draw.choice((0, 1, 1, 2, 5))
            data[start : start + length] = draw.choice(
                (b"", b"9", b"-1", b'"', b"[", b"]", b"{", b"}", b",", b"null", b"1e999", bytes([draw.randrange(256)]))
            )
        if draw.random() < 0.7:
            data[:8] = (header - 8 + len(data) - len(WHOLE)).to_bytes(8, "little")
        try:
            assert isinstance(decode_trajectory(resealed(bytes(data)), "here"), Trajectory)
            num_read += 1
        except UserError as error:
            assert str(error).startswith("here: ") and len(str(error).splitlines()) <= 2
    assert 0 < num_read < number / 2


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_nothing_is_written_through_what_lies_under_the_hidden_name(tmp_path, kind):
    """A link to a file outside keeps that as it is, a pipe is not waited for, a folder is told."""
    (folder := tmp_path / "data").mkdir()
    (outside := tmp_path / "outside").write_text("precious")
    hidden = folder / ".000000.safetensors.tmp"
    if kind == "folder":
        hidden.mkdir()
        with pytest.raises(UserError, match="cannot write"):
            write_trajectory(folder, make_trajectory(0))
        return
    hidden.symlink_to(outside) if kind == "link" else os.mkfifo(hidden)
    assert end_within(lambda: write_whole(folder / "000000.safetensors", encode_trajectory(make_trajectory(0)))) == 0
    assert_equal(read_trajectory(folder / "000000.safetensors"), make_trajectory(0))
    assert outside.read_text() == "precious" and len(list(folder.iterdir())) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_trajectory(tmp_path, make_trajectory(0))
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_trajectory(tmp_path, replace(make_trajectory(0), prompt="other"))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
