"""What a manifest says is consistent, and was not changed."""

import json
import math
import random
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accvideo.data.manifest import Manifest
from accvideo.types import UserError
from tests.test_trajectory import JSON, make_manifest


def unsealed(manifest: Manifest) -> dict[str, Any]:
    """What is in a manifest's file, without the checksum."""
    return {name: value for name, value in json.loads(manifest.to_json()).items() if name != "sha256"}


def test_manifest_round_trip():
    manifest = make_manifest(7)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert torch.equal(manifest.key_sigmas, torch.tensor([1.0, 0.8, 0.0]))
    assert manifest.differences(replace(manifest, seed=1, dtype="bfloat16")) == ["dtype", "seed"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"keypoints": [0, 4, 2]}, "key points"),
        ({"keypoints": [0, 2, 3]}, "key points"),
        ({"keypoints": [0], "num_student_steps": 0, "num_steps": 0, "sigmas": [1.0]}, "key points"),
        ({"sigmas": [1.0, 0.0]}, "2 sigmas for 4 steps"),
        ({"sigmas": [1.0, math.nan, 0.8, 0.5, 0.0]}, "a sigma of nan"),
        ({"sigmas": [10**400, 0.9, 0.8, 0.5, 0.0]}, "a sigma of"),
        ({"sigmas": [1.0, 0.9, 0.8, 0.5, -0.1]}, "a sigma of -0.1"),
        ({"surprise": 1}, "surprise"),
        ({"num_student_steps": 3}, "are not 3 steps from 0 to 4"),
        ({"num_trajectories": 10**12}, "1000000000000 trajectories; allowed are 1 to 10,000,000"),
        ({"num_steps": 10**12}, "5 sigmas for 1000000000000 steps"),
        ({"num_trajectories": True}, "num_trajectories is 'True', not of type"),
        ({"sigmas": "high"}, "sigmas is 'high'"),
        ({"parts": [{"seed": 0, "num_trajectories": 2}]}, "the parts are not 1 trajectories"),
        ({"parts": [{"seed": 0}]}, "the parts are not"),
    ],
)
def test_bad_manifests_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Manifest.from_json(json.dumps(unsealed(make_manifest(1)) | change))
    with pytest.raises(UserError, match="cannot be read"):
        Manifest.from_json("{")


def test_the_first_format_is_read():
    """It had no checksum and no parts; what is added to it is of the present format."""
    old = unsealed(make_manifest(1)) | {"format": 1}
    del old["parts"]
    assert Manifest.from_json(json.dumps(old)) == make_manifest(1)


def test_each_flipped_bit_is_found():
    """700 of them: the text is JSON no more, or its checksum is wrong; or it says the same."""
    data, draw = bytearray(make_manifest(3).to_json().encode()), random.Random(0)
    for _ in range(700):
        byte, bit = draw.randrange(len(data)), draw.randrange(8)
        data[byte] ^= 1 << bit
        try:
            assert Manifest.from_json(bytes(data)) == make_manifest(3)
        except UserError:
            pass
        data[byte] ^= 1 << bit


def test_seeds_of_merged_recordings():
    parts = [{"seed": 4, "num_trajectories": 2}, {"seed": 9, "num_trajectories": 1}]
    assert [replace(make_manifest(3), parts=parts).seed_of(index) for index in range(3)] == [4, 4, 9]
    assert make_manifest(3).seed_of(2) == 0


@settings(max_examples=250, deadline=None)
@given(st.sampled_from([*unsealed(make_manifest(1)), "surprise"]), JSON)
def test_a_manifest_of_anybody_is_refused_or_read(name, value):
    with suppress(UserError):
        assert isinstance(Manifest.from_json(json.dumps(unsealed(make_manifest(1)) | {name: value})), Manifest)


@settings(max_examples=100, deadline=None)
@given(JSON | st.binary())
def test_no_json_is_taken_for_a_manifest(value):
    with pytest.raises(UserError):
        Manifest.from_json(value if isinstance(value, bytes) else json.dumps(value))


def test_deep_json_is_refused():
    for text in ("[" * 200_000, '{"a":' * 200_000, "1" * 100_000):
        with pytest.raises(UserError, match="cannot be read"):
            Manifest.from_json(text)
