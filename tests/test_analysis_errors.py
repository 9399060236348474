import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from accvideo.analysis.errors import ErrorsConfig, errors
from accvideo.distill import distill
from accvideo.training.recipe import DistillConfig
from accvideo.types import UserError
from tests.recorded import record_tiny


def make_student(tmp_path: Path, name: str, learning_rate: float, **settings: object) -> str:
    out = tmp_path / name
    distill(
        DistillConfig(
            data=str(tmp_path / "data"), out=out, num_iterations=2, batch_size=2, num_validation=0,
            learning_rate=learning_rate, lora_rank=2, adversarial_weight=0, precision="float32", device="cpu",
            **settings,  # pyright: ignore[reportArgumentType]
        )
    )  # fmt: skip
    return str(out)


def test_a_student_that_is_its_teacher_makes_no_error(tmp_path: Path):
    """With all of the teacher's own steps and no guidance, and nothing learnt."""
    record_tiny(tmp_path, num_student_steps=10, guidance_scale=1.0)
    same, other = (make_student(tmp_path, name, rate) for name, rate in (("same", 0.0), ("other", 0.1)))
    config = ErrorsConfig(
        data=str(tmp_path / "data"), students=(same, other), out=tmp_path / "out", batch_size=4, device="cpu"
    )
    results = errors(config)
    none, some = (each["rows"] for each in results["students"])
    assert len(none) == 11 and results["num_trajectories"] == 6
    assert max(row["error"] for row in none) < 1e-8 and max(row["step_error"] for row in none[:-1]) < 1e-8
    # At the video there is nothing left to do; one step before it, the video is where the first step leads.
    assert some[-1]["error"] == 0 and some[-1]["step_error"] is None and some[-1]["sigma"] == 0
    assert some[-2]["error"] == pytest.approx(some[-2]["step_error"], rel=1e-5) and some[-2]["error"] > 1e-6
    assert some[0]["error"] > some[-2]["error"]
    assert json.loads((tmp_path / "out/errors.json").read_text())["students"] == results["students"]
    ElementTree.parse(tmp_path / "out/errors.svg")
    assert (tmp_path / "out/errors.md").read_text().count("| 0 |") == 2


def test_key_points_are_found_among_more_recorded_ones(tmp_path: Path):
    """Students of 5 steps on a recording with all 10 states do as on the recording with 5 steps of the same."""
    for number in (5, 10):
        record_tiny(tmp_path / str(number), num_student_steps=number)
    student = make_student(tmp_path / "5", "student", 0.1)
    found = []
    for number in (5, 10):
        data = str(tmp_path / str(number) / "data")
        config = ErrorsConfig(data=data, students=(student,), out=tmp_path / f"out{number}", device="cpu")
        [rows] = (each["rows"] for each in errors(config)["students"])
        found.append([row["error"] for row in rows])
    assert len(found[0]) == 6
    torch.testing.assert_close(*map(torch.tensor, found))


def test_students_that_do_not_go_with_the_data_are_refused_before_anything_is_written(tmp_path: Path):
    record_tiny(tmp_path)
    several = make_student(tmp_path, "several", 0.1, num_student_steps=(5, 1))
    record_tiny(tmp_path / "all", num_student_steps=10)
    fine = make_student(tmp_path / "all", "student", 0.1)
    for name, message in (
        ("playground-student", "is a student of playground"),
        (several, "takes several numbers of steps"),
        (fine, "the data set lacks key points"),
        (str(tmp_path), "holds no finished student"),
    ):
        with pytest.raises(UserError, match=message):
            errors(ErrorsConfig(data=str(tmp_path / "data"), students=(name,), out=tmp_path / "out", device="cpu"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="give one or more"):
        ErrorsConfig(data="data", students=(), out=tmp_path)
