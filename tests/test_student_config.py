"""What a student's folder says of it is read if it is of the right types, whoever wrote it."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accvideo.exporting.card import model_card
from accvideo.inference.model import PLAYGROUND_STUDENTS
from accvideo.inference.schedulers import make_scheduler
from accvideo.inference.student_config import read_student_config
from accvideo.types import UserError
from tests.test_trajectory import JSON

WHOLE: dict[str, Any] = json.loads((PLAYGROUND_STUDENTS["playground-student"] / "student.json").read_text("utf-8"))


def written(folder: Path, text: str | bytes) -> Path:
    """The folder with a `student.json`."""
    (folder / "student.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.mark.parametrize(
    "later", [(), ("other_num_steps",), ("other_num_steps", "recorded_num_steps", "solver", "teacher_scheduler")]
)
def test_the_students_of_all_versions_are_read(tmp_path: Path, later: tuple[str, ...]):
    """Fields were added three times; what has them no default was in each."""
    old = {name: value for name, value in WHOLE.items() if name not in later}
    config = read_student_config(written(tmp_path, json.dumps(old)))
    assert {name: getattr(config, name) for name in old} == old
    assert {name: getattr(config, name) for name in later} == {
        name: {"other_num_steps": [], "solver": "own"}.get(name) for name in later
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": "5"}, "num_steps is '5', not of type"),
        ({"num_steps": True}, "num_steps is 'True', not of type"),
        ({"sigmas": "high"}, "sigmas is 'high'"),
        ({"sigmas": [1.0, None]}, "sigmas is"),
        ({"num_steps": 4}, "6 sigmas and 5 timesteps for num_steps=4"),
        ({"num_steps": 0, "sigmas": [1.0], "timesteps": []}, "1 sigmas and 0 timesteps for num_steps=0"),
        ({"sigmas": [float("nan"), *WHOLE["sigmas"][1:]]}, "a sigma of nan"),
        ({"fingerprints": ["a"]}, "fingerprints is"),
        ({"fps": None}, "fps is 'None'"),
        ({"scheduler": {}}, "scheduler is not a `class` of diffusers"),
        ({"teacher_scheduler": {"class": 7, "config": {}}}, "teacher_scheduler is not a `class` of diffusers"),
        ({"surprise": 1}, "unknown field 'surprise'"),
    ],
)
def test_values_of_other_types_are_refused(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"student.json is damaged: {message}") as error:
        read_student_config(written(tmp_path, json.dumps(WHOLE | change)))
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize("text", ["[" * 100_000, '{"teacher": ' * 100_000, '{"recipe": ' + "[" * 300 + "]" * 300 + "}"])
def test_deep_json_is_refused(tmp_path: Path, text: str):
    with pytest.raises(UserError, match="damaged: lists or objects more than 100 deep"):
        read_student_config(written(tmp_path, text))


def test_what_is_no_file_is_refused(tmp_path: Path):
    (tmp_path / "student.json").mkdir()
    with pytest.raises(UserError, match="is damaged"):
        read_student_config(tmp_path)


@pytest.mark.parametrize("name", ["NoScheduler", "DiffusionPipeline", "__version__"])
def test_a_scheduler_that_diffusers_does_not_have_is_refused(name: str):
    with pytest.raises(UserError, match=f"has no scheduler {name}"):
        make_scheduler({"class": name, "config": {}})


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*WHOLE, "surprise"]), JSON | JSON.map(lambda value: [value] * 6) | st.just({"class": "a"}))
def test_a_student_of_anybody_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, name, value):
    with suppress(UserError):
        folder = written(tmp_path_factory.getbasetemp(), json.dumps(WHOLE | {name: value}))
        config = read_student_config(folder)
        assert len(config.sigmas) == len(config.timesteps) + 1 == config.num_steps + 1
        assert model_card(config, "A LoRA", "", {}, lora=True)


@settings(max_examples=100, deadline=None)
@given(JSON | st.binary(max_size=50))
def test_no_json_is_taken_for_a_student(tmp_path_factory: pytest.TempPathFactory, value):
    with pytest.raises(UserError):
        data = value if isinstance(value, bytes) else json.dumps(value)
        read_student_config(written(tmp_path_factory.getbasetemp(), data))
