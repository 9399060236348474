"""What is bad is recorded again, to the byte, and nothing else is touched."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.manifest import read_manifest
from accvideo.data.merge import MergeConfig, merge
from accvideo.data.pack import PackConfig, pack
from accvideo.data.repair import Recording, RepairConfig, repair, settings_of
from accvideo.data.shards import read_index, shard_name
from accvideo.data.storage import open_storage
from accvideo.data.verify import problems
from accvideo.record import record
from accvideo.recording.workers import Claims
from accvideo.trajectory import read_trajectory, trajectory_name, write_trajectory
from accvideo.types import UserError
from tests.recorded import record_tiny
from tests.test_trajectory import as_format_1
from tests.test_workers import end_of, fork


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six trajectories with settings that are not the pipeline's own, in `data`; the teacher and prompts beside it."""
    folder = tmp_path_factory.mktemp("recorded")
    record_tiny(folder, shift=3.0, seed=5, batch_size=2, fps=12)
    return folder


def copied(recorded: Path, tmp_path: Path) -> Path:
    """A copy of the data set beside which nothing lies; its teacher stays where it was."""
    shutil.copytree(recorded / "data", tmp_path / "data")
    return tmp_path / "data"


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}


def test_only_what_is_bad_is_recorded_again(recorded, tmp_path):
    """A flipped bit, a missing, an empty file, a copy under another number; the bad files are kept aside."""
    folder = copied(recorded, tmp_path)
    before = state(folder)
    names = [trajectory_name(index) for index in range(6)]
    flipped = bytearray(before[names[0]][1])
    flipped[-5] ^= 4
    (folder / names[0]).write_bytes(flipped)
    (folder / names[2]).unlink()
    (folder / names[3]).write_bytes(b"")
    swapped = before[names[4]][1]
    (folder / names[5]).write_bytes(swapped)
    found = repair(RepairConfig(folder=folder, prompts=(recorded / "prompts.txt",)))
    assert (found["num_bad"], found["num_recorded"], found["problems"]) == (4, 4, [])
    after = state(folder)
    assert {name: data for name, (_, data) in after.items()} == {name: data for name, (_, data) in before.items()}
    assert all(after[name][0] == before[name][0] for name in ("manifest.json", names[1], names[4]))
    aside = {path.name: path.read_bytes() for path in (tmp_path / "data.bad").iterdir()}
    assert aside == {names[0]: bytes(flipped), names[3]: b"", names[5]: swapped}


def test_a_whole_data_set_is_left_alone(recorded, tmp_path):
    folder = copied(recorded, tmp_path)
    before = state(folder)
    found = repair(RepairConfig(folder=folder, prompts=(recorded / "prompts.txt",)))
    assert found["num_bad"] == found["num_recorded"] == 0 and state(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_of_two_copies_both_are_recorded_again(recorded, tmp_path):
    """Which of them is the true one cannot be told."""
    folder = copied(recorded, tmp_path)
    before = state(folder)
    copy = replace(read_trajectory(folder / trajectory_name(4)), index=1)
    write_trajectory(folder, copy)
    assert len(problems(folder)) == 1
    found = repair(RepairConfig(folder=folder, prompts=(recorded / "prompts.txt",)))
    assert (found["num_bad"], found["num_recorded"], found["problems"]) == (2, 2, [])
    assert {name: data for name, (_, data) in state(folder).items()} == {
        name: data for name, (_, data) in before.items()
    }


def test_a_data_set_of_the_first_format_is_gone_on_with(recorded, tmp_path):
    """What is new in it is of the present format; the rest is left alone, and reads the same."""
    folder = copied(recorded, tmp_path)
    before = state(folder)
    values = {name: value for name, value in json.loads(before["manifest.json"][1]).items() if name != "sha256"}
    (folder / "manifest.json").write_text(json.dumps(values | {"format": 1}))
    for index in range(6):
        path = folder / trajectory_name(index)
        path.write_bytes(as_format_1(path.read_bytes()))
    old = state(folder)
    (folder / trajectory_name(2)).unlink()
    found = repair(RepairConfig(folder=folder, prompts=(recorded / "prompts.txt",)))
    assert (found["num_recorded"], found["problems"]) == (1, [])
    after = {name: data for name, (_, data) in state(folder).items()}
    assert after.pop("000002.safetensors") == before["000002.safetensors"][1]
    assert after == {name: data for name, (_, data) in old.items() if name in after}


def test_other_prompts_are_refused(recorded, tmp_path):
    folder = copied(recorded, tmp_path)
    (folder / trajectory_name(0)).write_bytes(b"")
    (tmp_path / "prompts.txt").write_text("another\n" * 6)
    with pytest.raises(UserError, match="recorded on the prompt"):
        repair(RepairConfig(folder=folder, prompts=(tmp_path / "prompts.txt",)))


@pytest.fixture(scope="module")
def other(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four trajectories of the same teacher, on three prompts of their own and with another seed."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "prompts.txt").write_text("one\ntwo\nthree")
    manifest = replace(read_manifest(recorded / "data"), seed=8, num_trajectories=4)
    repaired = RepairConfig(folder=folder, prompts=())
    record(settings_of(Recording(0, manifest, folder / "prompts.txt"), repaired, folder / "data"))
    return folder


@pytest.fixture
def merged(recorded: Path, other: Path, tmp_path: Path) -> Path:
    """Both, in `data`."""
    merge(MergeConfig(data=(str(recorded / "data"), str(other / "data")), out=tmp_path / "data"))
    return tmp_path / "data"


def break_some(folder: Path) -> list[int]:
    """One of the first recording that was merged, two of the second."""
    flipped = bytearray((folder / trajectory_name(1)).read_bytes())
    flipped[-5] ^= 4
    (folder / trajectory_name(1)).write_bytes(flipped)
    (folder / trajectory_name(6)).write_bytes(b"")
    (folder / trajectory_name(9)).unlink()
    return [1, 6, 9]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_of_a_merged_data_set_each_recording_is_mended(recorded, other, merged, tmp_path):
    """With its own seed, numbers and prompts; nothing else is touched."""
    before = state(merged)
    bad = break_some(merged)
    found = repair(RepairConfig(folder=merged, prompts=(recorded / "prompts.txt", other / "prompts.txt")))
    assert (found["num_bad"], found["num_recorded"], found["problems"]) == (3, 3, [])
    after = state(merged)
    assert {name: data for name, (_, data) in after.items()} == {name: data for name, (_, data) in before.items()}
    assert {name for name in after if after[name][0] != before[name][0]} <= {trajectory_name(index) for index in bad}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data.bad"]
    assert {*bytes_of(tmp_path / "data.bad")} == {"000001.safetensors", "000006.safetensors"}


@pytest.mark.parametrize("size", [1, 10**9])
def test_shards_are_mended_inside(recorded, other, merged, tmp_path, size):
    """Of a merged data set too: trajectories, what lies between them, and whole archives that are lost."""
    shards, files = tmp_path / "shards", (recorded / "prompts.txt", other / "prompts.txt")
    pack(PackConfig(data=str(merged), out=shards, shard_size=size))
    before, index = bytes_of(shards), read_index(open_storage(shards))
    for number, offset in ((1, 1000), (4, -300)):
        member = index.member(number)
        damage(shards / shard_name(member.shard), member.start + offset)
    damage(shards / shard_name(len(index.sizes) - 1), -1)
    if size == 1:
        (shards / shard_name(7)).unlink()
    found = repair(RepairConfig(folder=shards, prompts=files))
    assert found["problems"] == [] and found["num_recorded"] == (3 if size == 1 else 2)
    assert bytes_of(shards) == before
    assert {*bytes_of(tmp_path / "shards.bad")} == {"000001.safetensors", "000004.safetensors"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "shards", "shards.bad"]


def damage(path: Path, place: int) -> None:
    """Flips a bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_shards_of_an_earlier_format_are_mended(recorded, tmp_path):
    """What is recorded again has another size in the present format: the index follows."""
    folder, shards = copied(recorded, tmp_path), tmp_path / "shards"
    for index in range(6):
        path = folder / trajectory_name(index)
        path.write_bytes(as_format_1(path.read_bytes()))
    pack(PackConfig(data=str(folder), out=shards, shard_size=10**9))
    expected = {index: TrajectoryFolder(shards)[index] for index in range(6)}
    damage(shards / shard_name(0), read_index(open_storage(shards)).member(2).start + 1000)
    assert repair(RepairConfig(folder=shards, prompts=(recorded / "prompts.txt",)))["problems"] == []
    assert read_index(open_storage(shards)).sizes[0][2] == (recorded / "data" / trajectory_name(2)).stat().st_size
    for index, trajectory in expected.items():
        assert torch.equal(TrajectoryFolder(shards)[index].states, trajectory.states)


def test_an_interrupted_repair_goes_on(recorded, other, merged, monkeypatch):
    """What it has recorded is not recorded again."""
    before, config = (
        bytes_of(merged),
        RepairConfig(folder=merged, prompts=(recorded / "prompts.txt", other / "prompts.txt")),
    )
    break_some(merged)
    with monkeypatch.context() as patch:
        patch.setattr("accvideo.data.repair.encode_trajectory", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            repair(config)
    assert repair(config)["num_recorded"] == 0 and bytes_of(merged) == before


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_killed_repairs_go_on(recorded, other, merged, tmp_path, packed):
    """SIGKILL at six random moments of repairs, each begun where the last was; what comes out has the old bytes."""
    files, random = (recorded / "prompts.txt", other / "prompts.txt"), Random(0)
    if packed:
        pack(PackConfig(data=str(merged), out=tmp_path / "shards", shard_size=30_000))
    folder = tmp_path / ("shards" if packed else "data")
    config, before, num_killed = RepairConfig(folder=folder, prompts=files), bytes_of(folder), 0
    while num_killed < 6:
        if packed:
            for path in random.sample(sorted(folder.glob("*.tar")), 2):
                damage(path, random.randrange(path.stat().st_size))
        else:
            break_some(folder)
        for _ in range(2):
            pid = fork(lambda: int(repair(config)["num_problems"]))
            time.sleep(random.uniform(0.05, 0.7))
            os.kill(pid, signal.SIGKILL)
            num_killed += end_of(pid) == -signal.SIGKILL
        assert repair(config)["problems"] == []
        assert bytes_of(folder) == before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("other", "recorded"), "000000.safetensors in .* was not recorded on the prompt"),
        (("recorded",), "000007.safetensors in .* was not recorded on the prompt"),
        (("recorded", "other", "other"), "is made of 2 recordings, and 3 files of prompts are given"),
    ],
)
def test_prompts_of_other_recordings_are_refused(recorded, other, merged, files, message):
    break_some(merged)
    before = bytes_of(merged)
    folders = {"recorded": recorded, "other": other}
    with pytest.raises(UserError, match=message) as error:
        repair(RepairConfig(folder=merged, prompts=tuple(folders[name] / "prompts.txt" for name in files)))
    assert len(str(error.value).splitlines()) == 2 and bytes_of(merged) == before


def test_a_folder_that_is_being_recorded_is_left_alone(recorded, tmp_path):
    claims = Claims(folder := copied(recorded, tmp_path), "w")
    claims.take("block-1")
    (folder / trajectory_name(2)).unlink()
    with pytest.raises(UserError, match=f"is being recorded by process {os.getpid()}"):
        repair(RepairConfig(folder=folder, prompts=(recorded / "prompts.txt",)))
    claims.close()


def test_shards_without_their_index_are_not_recorded_again(recorded, tmp_path):
    pack(PackConfig(data=str(recorded / "data"), out=tmp_path / "shards"))
    (tmp_path / "shards" / "index.json").unlink()
    with pytest.raises(UserError, match=r"holds shards, but no index\.json"):
        repair(RepairConfig(folder=tmp_path / "shards", prompts=(recorded / "prompts.txt",)))
