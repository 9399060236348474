"""Files of prompts are read as they are meant, and mistakes in them are told before any work."""

import csv
import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accvideo.command import MAX_ARGUMENT_DEPTH, Prompt, parse_pipeline_args, read_prompt_file
from accvideo.media import load_media
from accvideo.types import UserError
from tests.test_trajectory import JSON


def test_plain_text_has_one_prompt_a_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa red square\n\n  two, dots \n", "utf-8")
    assert [prompt.text for prompt in read_prompt_file(tmp_path / "prompts.txt")] == ["a red square", "two, dots"]


def test_tables_and_json_lines_say_the_same(tmp_path):
    """A cell that is JSON is its value, but prompts stay text; an empty cell is no argument."""
    (tmp_path / "a.csv").write_text('prompt,image,strength,negative_prompt\n"red, square",a.png,0.5,7\ndots,,,\n')
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "red, square", "image": "a.png", "strength": 0.5, "negative_prompt": "7"}\n\n{"prompt": "dots"}\n'
    )
    expected = [
        Prompt("red, square", {"image": "a.png", "strength": 0.5, "negative_prompt": "7"}, tmp_path),
        Prompt("dots", {}, tmp_path),
    ]
    assert read_prompt_file(tmp_path / "a.csv") == read_prompt_file(tmp_path / "a.jsonl") == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", " \n", "holds no prompts"),
        ("a.csv", "prompt,image\n", "holds no prompts"),
        ("a.csv", "text,image\nred,a.png\n", "row 1: no `prompt`; the columns here are text, image"),
        ("a.csv", "prompt,image\nred,a.png\n,b.png\n", "row 2: no `prompt`"),
        ("a.csv", "prompt,image\nred, square,a.png\n", "row 1: more cells than columns"),
        ("a.jsonl", '{"prompt": "red"}\nred\n', "line 2: not a JSON object"),
        ("a.jsonl", '["red"]\n', "line 1: not a JSON object"),
        ("a.jsonl", '{"prompt": 7}\n', "line 1: no `prompt`"),
        ("a.csv", "prompt,size\nred,1\ntwo," + "[" * 100_000, "row 2: the cell of `size` holds lists .* 20 deep"),
        ("a.jsonl", '{"prompt": "red", "size": ' + "[" * 600 + "]" * 600 + "}", "line 1: lists or objects more than"),
        ("a.jsonl", '{"prompt": "red", "size": ' + "[" * 100_000, "line 1: lists or objects more than"),
    ],
)
def test_mistakes_in_files_are_told(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_prompt_file(tmp_path / name)
    assert len(str(error.value).splitlines()) <= 2


def test_arguments_as_deep_as_allowed_are_read_and_used(tmp_path):
    """What is done with them calls itself for each list in a list, so that the text alone does not tell how deep."""
    deep = "[" * MAX_ARGUMENT_DEPTH + "]" * MAX_ARGUMENT_DEPTH
    (tmp_path / "a.csv").write_text(f"prompt,size\nred,{deep}\n")
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "red", "size": {deep}}}\n')
    (from_csv,), (from_jsonl,) = read_prompt_file(tmp_path / "a.csv"), read_prompt_file(tmp_path / "a.jsonl")
    assert from_csv == from_jsonl and from_csv.arguments == parse_pipeline_args([f"size={deep}"])
    assert load_media(from_csv.arguments) == {"size": json.loads(deep)}
    with pytest.raises(UserError, match="--pipeline-arg size holds lists or objects more than 20 deep"):
        parse_pipeline_args([f"size=[{deep}]"])


def test_reading_prompts_lets_no_other_table_have_shorter_cells(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\nred\n")
    before = csv.field_size_limit()
    read_prompt_file(tmp_path / "a.csv")
    assert csv.field_size_limit() >= before


LETTERS = st.characters(exclude_categories=())
"""All of Unicode, halves of characters too."""
VALUES = JSON.map(json.dumps) | st.text(LETTERS, max_size=8).map(json.dumps)
CELLS = VALUES | st.text(LETTERS, max_size=8) | st.sampled_from(["prompt", "image", '"', "[", "{", "\r", "a.png"])
TABLES = st.lists(st.lists(CELLS, max_size=4).map(",".join), max_size=4).map("\n".join)
OBJECTS = st.lists(st.dictionaries(st.sampled_from(["prompt", "image", "size"]), JSON | st.text(LETTERS), max_size=3))
BYTES = (
    st.binary(max_size=100)
    | st.tuples(
        st.sampled_from(["", "prompt,image,size\n", "\ufeffprompt\n"]),
        TABLES,
        st.sampled_from(["", "\nred," + "[" * 9999]),
    ).map(lambda parts: "".join(parts).encode("utf-8", "surrogatepass"))
    | OBJECTS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
)
"""Of tables that anybody may have written."""


@settings(max_examples=300, deadline=None)
@given(BYTES, st.sampled_from([".txt", ".csv", ".jsonl"]))
def test_a_file_of_prompts_of_anybody_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, data, suffix):
    path: Path = tmp_path_factory.getbasetemp() / f"anybody{suffix}"
    path.write_bytes(data)
    with suppress(UserError):
        prompts = read_prompt_file(path)
        assert prompts and all(prompt.text.strip() for prompt in prompts)
