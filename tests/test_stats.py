"""Figures of a data set are those of its trajectories."""

from dataclasses import replace

import pytest
import torch

from accvideo.data.pack import PackConfig, pack
from accvideo.data.stats import StatsConfig, stats
from accvideo.trajectory import trajectory_name, write_trajectory
from tests.test_trajectory import make_trajectory, write_data_set


def test_figures(tmp_path, capsys):
    """Of states whose norms are known, and prompts whose lengths are; the same of the folder and its shards."""
    folder = write_data_set(tmp_path / "data", 3)
    for index, prompt in enumerate(["a b c", "a", "a"]):
        states = torch.tensor([3.0, 2.0, 0.5]).reshape(3, 1, 1, 1, 1).expand(3, 4, 2, 3, 3).clone() * (index + 1)
        write_trajectory(folder, replace(make_trajectory(index, prompt), states=states))
    found = stats(StatsConfig(data=str(folder)))
    assert (found["num_trajectories"], found["num_prompts"], found["num_shards"]) == (3, 2, 0)
    sizes = [(folder / trajectory_name(index)).stat().st_size for index in range(3)]
    assert found["bytes"] == sum(sizes) and found["bytes_each"]["max"] == max(sizes)
    assert found["prompt_words"] == {"min": 1, "mean": pytest.approx(5 / 3), "median": 1, "max": 3}
    assert found["prompt_characters"]["max"] == 5
    assert [row["sigma"] for row in found["keypoints"]] == [1.0, 0.8, 0.0]
    assert [row["rms"]["mean"] for row in found["keypoints"]] == pytest.approx([6, 4, 1])
    assert [row["rms"]["max"] for row in found["keypoints"]] == pytest.approx([9, 6, 1.5])
    assert found["keypoints"][1]["rms_to_next"]["mean"] == pytest.approx(3)
    assert found["keypoints"][2]["rms_to_next"] is None
    shown = capsys.readouterr()
    assert "RMS" in shown.err and "0.8000" in shown.err and not shown.out
    pack(PackConfig(data=str(folder), out=tmp_path / "shards"))
    packed = stats(StatsConfig(data=str(tmp_path / "shards")))
    assert packed | {"folder": 0, "num_shards": 0} == found | {"folder": 0}
