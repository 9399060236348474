"""Each bad file is named, and no good one."""

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from accvideo.data.dataset import TrajectoryFolder, open_source
from accvideo.data.verify import VerifyConfig, check, problems, verify
from accvideo.recording.workers import Claims
from accvideo.trajectory import trajectory_name, write_trajectory
from accvideo.types import UserError
from tests.served import served
from tests.test_storage import copy_to_memory
from tests.test_trajectory import make_trajectory, write_data_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five trajectories."""
    return write_data_set(tmp_path / "data")


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
    found = problems(folder)
    assert len(found) == len(expected), found
    assert all(part in problem for part, problem in zip(expected, found, strict=True)), found


@pytest.mark.parametrize("fault", ["swapped", "other seed", "too few states", "other denoiser"])
def test_misplaced_files_do_not_reach_training(folder, fault):
    FAULTS[fault][0](folder)
    with pytest.raises(UserError, match="safetensors"):
        list(islice(TrajectoryFolder(folder).batches(1, 0), 5))


@pytest.mark.parametrize("fault", ["missing", "empty", "swapped", "duplicate", "not finite"])
def test_verify_reads_from_elsewhere(folder, fault):
    """An object store's folder has the same problems."""
    damage, expected = FAULTS[fault]
    damage(folder)
    address = copy_to_memory(folder, f"verify {fault}")
    found = problems(address)
    assert len(found) == len(expected) and all(problem.startswith(address) for problem in found)
    assert all(part in problem for part, problem in zip(expected, found, strict=True)), found


def test_verify_reads_what_cannot_be_listed(folder):
    """Where a web server shows a page of its own, what is missing is found by asking for it."""
    (folder / "index.html").write_text('nothing to see but <a href="about.html">links</a>')
    (folder / trajectory_name(1)).unlink()
    with served(folder) as (url, _):
        found = problems(url)
    assert len(found) == 1 and "000001.safetensors: No such file" in found[0]


def test_a_link_out_of_the_data_set_is_named(folder, tmp_path):
    (folder / trajectory_name(1)).rename(tmp_path / "elsewhere")
    (folder / trajectory_name(1)).symlink_to(tmp_path / "elsewhere")
    assert len(found := problems(folder)) == 1 and "000001.safetensors: a link to" in found[0]


class Pickled:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def test_a_pickle_is_named_and_not_loaded(folder, tmp_path):
    """In the place of a trajectory, and beside them."""
    (folder / trajectory_name(1)).write_bytes(pickle.dumps(Pickled(str(tmp_path / "executed"))))
    torch.save(Pickled(str(tmp_path / "executed")), folder / "model.pt")
    found = problems(folder)
    assert len(found) == 2 and "000001.safetensors: not a trajectory" in found[0] and "model.pt" in found[1]
    assert not (tmp_path / "executed").exists()
    pickle.loads((folder / trajectory_name(1)).read_bytes()).close()
    assert (tmp_path / "executed").exists(), "it would have been"


def test_one_prompt_with_other_noise_is_no_duplicate(folder):
    """Nor is one noise with other prompts: recordings of one seed that were merged share it."""
    write_trajectory(folder, replace(make_trajectory(1), index=4, prompt="another"))
    assert problems(folder) == []


def test_recorders_at_work_are_told_and_their_files_are_no_problem(folder, capsys):
    """What they leave when they die is one."""
    claims = Claims(folder, "w")
    claims.take("block-7")
    (folder / f".000007.safetensors{claims.writer}.tmp").touch()
    found = verify(VerifyConfig(data=str(folder)))
    who = f"process {os.getpid()} on {os.uname().nodename}"
    assert found["problems"] == [] and who in found["recorders"] and who in capsys.readouterr().err
    for path in folder.glob(".*"):
        os.utime(path, (0, 0))
    assert [problem.split(":")[0] for problem in problems(folder)] == [
        *(str(folder / name) for name in (f".000007.safetensors{claims.writer}.tmp", ".block-7.claim"))
    ]
    claims.close()


def test_what_is_gone_when_it_is_looked_at_is_no_problem(folder):
    """A claim that was given back while the trajectories were read."""
    claims = Claims(folder, "w")
    claims.take("block-7")
    source = open_source(folder)
    claims.close()
    assert check(source).problems == []


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"owner": 3}', b"[" * 4000, b"\xff\x80"])
def test_no_text_of_a_claim_disturbs(folder, text):
    """Neither who reads the folder, nor who records to it."""
    (folder / ".block-1.claim").write_bytes(text)
    assert problems(folder) == []
    claims = Claims(folder, "w")
    assert claims.rivals() == [] and not claims.take("block-1")
    claims.close()


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_only_a_file_is_taken_for_a_claim(folder, kind):
    path = folder / ".block-1.claim"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    assert len(found := problems(folder)) == 1 and ".block-1.claim: does not belong" in found[0]
