"""A manifest is not taken for that of trajectories which were recorded with other settings."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.manifest import SETTINGS, Manifest, read_manifest
from accvideo.data.merge import MergeConfig, merge
from accvideo.data.pack import PackConfig, pack
from accvideo.data.repair import Recording, RepairConfig, repair, settings_of
from accvideo.data.verify import problems
from accvideo.distill import DistillConfig, distill
from accvideo.record import Recorder
from accvideo.recording.workers import Place
from accvideo.trajectory import told_otherwise, trajectory_name
from accvideo.types import UserError
from tests.recorded import record_tiny
from tests.test_merge import write_part
from tests.test_trajectory import as_format_3, make_manifest, make_trajectory

PLACES = {"files": 3, "shards": 3, "merged": 5, "merged shards": 5}
"""Data sets with their trajectories."""
OTHERS = {
    *("teacher", "revision", "license", "fps", "seed", "num_trajectories", "teacher_num_steps", "denoiser_calls"),
    *("parts", "versions", "format"),
}
"""What a manifest may say otherwise; seeds, numbers and parts are compared by themselves."""


def longer(manifest: Manifest) -> Manifest:
    """One step more, at the start."""
    keypoints = [0, *(point + 1 for point in manifest.keypoints[1:])]
    sigmas = [manifest.sigmas[0], *manifest.sigmas]
    return replace(manifest, num_steps=manifest.num_steps + 1, sigmas=sigmas, keypoints=keypoints)


def with_fewer_keypoints(manifest: Manifest) -> Manifest:
    keypoints = [manifest.keypoints[0], *manifest.keypoints[2:]]
    return replace(manifest, num_student_steps=len(keypoints) - 1, keypoints=keypoints)


CHANGES: dict[str, Callable[[Manifest], Manifest]] = {
    "pipeline_class": lambda manifest: replace(manifest, pipeline_class="MochiPipeline"),
    "fingerprints": lambda manifest: replace(manifest, fingerprints={name: "0" for name in manifest.fingerprints}),
    "dtype": lambda manifest: replace(manifest, dtype="bfloat16"),
    "batch_size": lambda manifest: replace(manifest, batch_size=manifest.batch_size + 1),
    "height": lambda manifest: replace(manifest, height=48),
    "width": lambda manifest: replace(manifest, width=48),
    "num_frames": lambda manifest: replace(manifest, num_frames=9),
    "pipeline_args": lambda manifest: replace(manifest, pipeline_args={"max_sequence_length": 4}),
    "guidance_scale": lambda manifest: replace(manifest, guidance_scale=6.0),
    "num_steps": longer,
    "num_student_steps": with_fewer_keypoints,
    "keypoints": lambda manifest: replace(manifest, keypoints=[0, 1, *manifest.keypoints[2:]]),
    "sigmas": lambda manifest: replace(manifest, sigmas=[sigma * 0.999 for sigma in manifest.sigmas]),
    "scheduler": lambda manifest: replace(manifest, scheduler=manifest.scheduler | {"class": "Other"}),
    "nested_schedule": lambda manifest: replace(manifest, nested_schedule=not manifest.nested_schedule),
    "solver": lambda manifest: replace(manifest, solver="euler"),
}


@contextmanager
def changed(folder: Path, change: Callable[[Manifest], Manifest]) -> Iterator[None]:
    """A folder whose manifest is changed under a right checksum for as long as the context lasts."""
    path = folder / "manifest.json"
    before = path.read_bytes()
    path.write_text(change(read_manifest(folder)).to_json())
    try:
        yield
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `PLACES`."""
    folder = tmp_path_factory.mktemp("places")
    files, other = write_part(folder / "files", 3, seed=0, first=0), write_part(folder / "other", 2, seed=7, first=10)
    merge(MergeConfig(data=(str(files), str(other)), out=folder / "merged"))
    for name, packed in (("files", "shards"), ("merged", "merged shards")):
        pack(PackConfig(data=str(folder / name), out=folder / packed))
    return folder


def test_each_field_of_a_manifest_says_what_the_states_are_or_not():
    """A new one must be put on one side."""
    assert {*SETTINGS} == CHANGES.keys() and not OTHERS & {*SETTINGS}
    assert {each.name for each in fields(Manifest)} == OTHERS | {*SETTINGS}


def test_the_digest_of_settings_is_the_same_in_later_versions():
    """Else what was recorded before could not be read."""
    manifest = make_manifest(1)
    assert manifest.settings == "7c1be4f279eee04fdaf0dc2c5f8c59d32915cfa90d1b654522e35692d8b66fca"
    assert Manifest.from_json(manifest.to_json()).settings == manifest.settings
    assert manifest.guidance_scale == 5.0 and replace(manifest, guidance_scale=5).settings == manifest.settings


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("field", CHANGES)
def test_each_setting_changed_under_a_right_checksum_is_found(places, place, field):
    """By `verify`, which names each trajectory, and where they are read for training."""
    before = read_manifest(places / place)
    with changed(places / place, CHANGES[field]):
        assert field in before.differences(read_manifest(places / place))
        found = problems(places / place)
        assert len(found) == PLACES[place] and all("was recorded with other settings" in each for each in found)
        with pytest.raises(UserError, match="safetensors: was recorded with other settings"):
            next(TrajectoryFolder(places / place).batches(1, 0))
    assert problems(places / place) == []


def test_what_does_not_say_what_the_states_are_may_change(places):
    """The teacher has moved, the frames a second are put right, students are compared with more steps."""
    values = {"teacher": "elsewhere", "revision": "1", "license": "mit", "fps": 8, "teacher_num_steps": 50}
    for name, value in ({**values, "denoiser_calls": 8, "versions": {"torch": "3"}}).items():
        with changed(places / "files", lambda manifest, name=name, value=value: replace(manifest, **{name: value})):
            assert problems(places / "files") == [], name


def test_nothing_is_made_of_a_data_set_with_another_manifest(places, tmp_path):
    with changed(places / "files", CHANGES["sigmas"]), changed(places / "other", CHANGES["sigmas"]):
        with pytest.raises(UserError, match="files/000000.*other settings"):
            pack(PackConfig(data=str(places / "files"), out=tmp_path / "out"))
        with pytest.raises(UserError, match="files/000000.*other settings"):
            merge(MergeConfig(data=(str(places / "files"), str(places / "other")), out=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trajectories each of one teacher with two shifts, and of another, on the same prompts and noises."""
    folder = tmp_path_factory.mktemp("recordings")
    record_tiny(folder / "own", shift=3.0, num_trajectories=3)
    record_tiny(folder / "shift", shift=7.0, num_trajectories=3)
    record_tiny(folder / "teacher", shift=3.0, num_trajectories=3, teacher_seed=1)
    return folder


def copied(recordings: Path, tmp_path: Path) -> Path:
    shutil.copytree(recordings / "own/data", tmp_path / "data")
    return tmp_path / "data"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused_in_training(data: Path, out: Path) -> None:
    """Before the teacher is loaded."""
    with pytest.raises(UserError, match="safetensors: was recorded with other settings"):
        distill(DistillConfig(data=str(data), out=out, num_iterations=1, batch_size=1, num_validation=1, device="cpu"))
    assert [path.name for path in out.iterdir()] == ["config.json"]


@pytest.mark.parametrize("other", ["shift", "teacher"])
def test_the_manifest_of_another_recording_is_refused(recordings, tmp_path, other):
    """Of the same prompts, seed and number of steps: by whoever reads the data set, and nothing is changed."""
    folder, prompts = copied(recordings, tmp_path), recordings / other / "prompts.txt"
    shutil.copy(recordings / other / "data/manifest.json", folder)
    before = contents(folder)
    found = problems(folder)
    assert len(found) == 3 and all("was recorded with other settings" in each for each in found)
    refused_in_training(folder, tmp_path / "student")
    mending = RepairConfig(folder=folder, prompts=(prompts,), device="cpu")
    with pytest.raises(UserError, match=r"no trajectory that was recorded with the settings in its manifest\.json"):
        repair(mending)
    config = settings_of(Recording(0, read_manifest(folder), prompts), mending, folder)
    for rank in (0, 1):  # which reads the first file whole, or its header
        with Recorder(config, Place(rank, 2)) as recorder, pytest.raises(UserError, match="000000.*other set") as error:
            recorder.missing()
        assert len(str(error.value).splitlines()) == 2
    assert contents(folder) == before and {path.name for path in tmp_path.iterdir()} == {"data", "student"}


@pytest.mark.parametrize("field", CHANGES)
def test_no_changed_setting_reaches_training(recordings, tmp_path, field):
    with changed(recordings / "own/data", CHANGES[field]):
        refused_in_training(recordings / "own/data", tmp_path / "student")


def test_a_single_file_of_another_recording_is_recorded_again(recordings, tmp_path):
    folder = copied(recordings, tmp_path)
    before, foreign = contents(folder), recordings / "shift/data" / trajectory_name(1)
    shutil.copy(foreign, folder)
    assert len(problems(folder)) == 1
    found = repair(RepairConfig(folder=folder, prompts=(recordings / "own/prompts.txt",), device="cpu"))
    assert (found["num_recorded"], found["problems"]) == (1, []) and contents(folder) == before
    assert (tmp_path / "data.bad" / trajectory_name(1)).read_bytes() == foreign.read_bytes()


def test_of_an_earlier_format_other_noise_levels_are_found(recordings, tmp_path):
    """Its timesteps tell them; what they do not tell is not noticed."""
    folder = copied(recordings, tmp_path)
    for index in range(3):
        path = folder / trajectory_name(index)
        path.write_bytes(as_format_3(path.read_bytes()))
    assert problems(folder) == [] and TrajectoryFolder(folder)[0].settings == ""
    with changed(folder, CHANGES["guidance_scale"]):
        assert problems(folder) == []
    shutil.copy(recordings / "shift/data/manifest.json", folder)
    assert len(problems(folder)) == 3
    refused_in_training(folder, tmp_path / "student")


def test_merging_says_no_more_of_a_trajectory_than_it_did(places, tmp_path):
    """One that does not say with which settings it was recorded does not say so afterwards."""
    old = tmp_path / "old"
    shutil.copytree(places / "other", old)
    for index in range(2):
        (old / trajectory_name(index)).write_bytes(as_format_3((old / trajectory_name(index)).read_bytes()))
    merge(MergeConfig(data=(str(places / "files"), str(old)), out=tmp_path / "out"))
    own = make_manifest(1).settings
    assert [TrajectoryFolder(tmp_path / "out")[index].settings for index in range(5)] == [own] * 3 + [""] * 2
    assert problems(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("sigmas", "told", "expected"),
    [
        ([1.0, 0.8], [1000, 800], False),
        ([1.0, 0.8], [1000, 900], True),
        ([0.999, 0.833], [999, 832], False),  # rounded down
        ([1.0, 0.8], [1.0, 0.8], False),  # Cosmos
        ([1.0, 0.8], [1.0, 0.9], True),
        ([0.0, 0.2], [0.0, 200.0], False),  # Mochi: rising
        ([0.0, 0.2], [0.0, 0.2], False),
        ([0.0, 0.2], [0.0, 0.3], True),
        ([1.0, 0.8], [0.25, 0.4], False),  # neither convention: nothing is known
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timesteps_tell_other_noise_levels(sigmas, told, expected, dtype):
    manifest = replace(make_manifest(1), num_steps=2, keypoints=[0, 1, 2], sigmas=[*sigmas, 1 - round(sigmas[0])])
    calls = tuple(
        replace(call, tensors={"timestep": torch.tensor([level]).to(dtype)})
        for call, level in zip(make_trajectory(0).calls, told, strict=True)
    )
    assert told_otherwise(replace(make_trajectory(0), calls=calls), manifest) is expected
    silent = tuple(replace(call, tensors={}) for call in calls)
    assert not told_otherwise(replace(make_trajectory(0), calls=silent), manifest)
