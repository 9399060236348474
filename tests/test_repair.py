"""What is bad is recorded again, to the byte, and nothing else is touched."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from accvideo.data.merge import MergeConfig, merge
from accvideo.data.pack import PackConfig, pack
from accvideo.data.repair import RepairConfig, repair
from accvideo.data.verify import problems
from accvideo.trajectory import read_trajectory, trajectory_name, write_trajectory
from accvideo.types import UserError
from tests.recorded import record_tiny
from tests.test_trajectory import as_format_1


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
    found = repair(RepairConfig(folder=folder, prompts=recorded / "prompts.txt"))
    assert (found["num_bad"], found["num_recorded"], found["problems"]) == (4, 4, [])
    after = state(folder)
    assert {name: data for name, (_, data) in after.items()} == {name: data for name, (_, data) in before.items()}
    assert all(after[name][0] == before[name][0] for name in ("manifest.json", names[1], names[4]))
    aside = {path.name: path.read_bytes() for path in (tmp_path / "data.bad").iterdir()}
    assert aside == {names[0]: bytes(flipped), names[3]: b"", names[5]: swapped}


def test_a_whole_data_set_is_left_alone(recorded, tmp_path):
    folder = copied(recorded, tmp_path)
    before = state(folder)
    found = repair(RepairConfig(folder=folder, prompts=recorded / "prompts.txt"))
    assert found["num_bad"] == found["num_recorded"] == 0 and state(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_of_two_copies_both_are_recorded_again(recorded, tmp_path):
    """Which of them is the true one cannot be told."""
    folder = copied(recorded, tmp_path)
    before = state(folder)
    copy = replace(read_trajectory(folder / trajectory_name(4)), index=1)
    write_trajectory(folder, copy)
    assert len(problems(folder)) == 1
    found = repair(RepairConfig(folder=folder, prompts=recorded / "prompts.txt"))
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
    found = repair(RepairConfig(folder=folder, prompts=recorded / "prompts.txt"))
    assert (found["num_recorded"], found["problems"]) == (1, [])
    after = {name: data for name, (_, data) in state(folder).items()}
    assert after.pop("000002.safetensors") == before["000002.safetensors"][1]
    assert after == {name: data for name, (_, data) in old.items() if name in after}


def test_other_prompts_are_refused(recorded, tmp_path):
    folder = copied(recorded, tmp_path)
    (folder / trajectory_name(0)).write_bytes(b"")
    (tmp_path / "prompts.txt").write_text("another\n" * 6)
    with pytest.raises(UserError, match="recorded on the prompt"):
        repair(RepairConfig(folder=folder, prompts=tmp_path / "prompts.txt"))


def test_packed_and_merged_data_sets_are_refused(recorded, tmp_path):
    data = str(recorded / "data")
    pack(PackConfig(data=data, out=tmp_path / "packed"))
    merge(MergeConfig(data=(data, data), out=tmp_path / "merged"))
    for kind in ("packed", "merged"):
        with pytest.raises(UserError, match=f"was {kind}: repair what it was made from"):
            repair(RepairConfig(folder=tmp_path / kind, prompts=recorded / "prompts.txt"))
