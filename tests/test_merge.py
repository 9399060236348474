"""A merged data set holds all trajectories of its parts, and no mixture of teachers."""

from dataclasses import replace
from pathlib import Path

import pytest

from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.manifest import Manifest
from accvideo.data.merge import MergeConfig, merge
from accvideo.data.pack import PackConfig, pack
from accvideo.data.verify import problems
from accvideo.trajectory import trajectory_name, write_trajectory
from accvideo.types import UserError
from tests.test_trajectory import assert_equal, make_manifest, make_trajectory


def write_part(folder: Path, number: int, seed: int, first: int, **changes: object) -> Path:
    """A recording with a seed, whose noises are those of `make_trajectory` from `first` on."""
    folder.mkdir()
    manifest: Manifest = replace(make_manifest(number), seed=seed, **changes)
    (folder / "manifest.json").write_text(manifest.to_json())
    for index in range(number):
        one = replace(make_trajectory(first + index), index=index, seed=seed, settings=manifest.settings)
        write_trajectory(folder, one)
    return folder


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Three, two and one trajectories; the second and third of one seed."""
    return [
        write_part(tmp_path / "a", 3, seed=0, first=0),
        write_part(tmp_path / "b", 2, seed=7, first=10),
        write_part(tmp_path / "c", 1, seed=7, first=20, versions={"torch": "3"}, denoiser_calls=8),
    ]


def merged(parts: list[Path], out: Path) -> TrajectoryFolder:
    merge(MergeConfig(data=tuple(map(str, parts)), out=out))
    return TrajectoryFolder(out)


def test_all_are_there_in_order_with_their_seeds(parts, tmp_path):
    data = merged(parts, tmp_path / "out")
    assert problems(tmp_path / "out") == [] and len(data) == 6
    assert [data[index].seed for index in range(6)] == [0, 0, 0, 7, 7, 7]
    originals = [TrajectoryFolder(part)[index] for part in parts for index in range(len(TrajectoryFolder(part)))]
    for index, original in enumerate(originals):
        assert_equal(data[index], replace(original, index=index))


def test_merging_is_associative_and_takes_shards(parts, tmp_path):
    """Byte for byte."""
    merged(parts, tmp_path / "out")
    pack(PackConfig(data=str(parts[1]), out=tmp_path / "packed"))
    merged([parts[0], tmp_path / "packed"], tmp_path / "two")
    merged([tmp_path / "two", parts[2]], tmp_path / "again")
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_swapped_files_are_found(parts, tmp_path):
    """Two that have the same number in their own recordings, too."""
    merged(parts, tmp_path / "out")
    one, other = (tmp_path / "out" / trajectory_name(index) for index in (3, 5))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    assert len(problems(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprints": {"transformer": "a", "transformer_2": "other"}},
        {"sigmas": [1.0, 0.9, 0.7, 0.5, 0.0]},
        {"guidance_scale": 6.0},
        {"num_frames": 9},
    ],
)
def test_other_teachers_and_schedules_are_refused_by_name(parts, tmp_path, changes):
    other = write_part(tmp_path / "other", 1, seed=9, first=30, **changes)
    with pytest.raises(UserError, match=next(iter(changes))) as error:
        merged([*parts, other], tmp_path / "out")
    assert len(str(error.value).splitlines()) == 2 and not (tmp_path / "out").exists()


def test_a_damaged_part_leaves_nothing(parts, tmp_path):
    (parts[1] / trajectory_name(1)).write_bytes(b"")
    with pytest.raises(UserError, match="b/000001"):
        merged(parts, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_the_same_recording_twice_is_refused(parts, tmp_path):
    """Packed or not: its noises and prompts would count twice."""
    pack(PackConfig(data=str(parts[1]), out=tmp_path / "packed"))
    for twice in (parts[1], tmp_path / "packed"):
        with pytest.raises(UserError, match="b/000000.* and .*000000.* have the same noise and prompt"):
            merged([parts[0], parts[1], twice], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_two_or_more_are_needed(tmp_path):
    with pytest.raises(UserError, match="1 data set to merge"):
        MergeConfig(data=("a",), out=tmp_path)
