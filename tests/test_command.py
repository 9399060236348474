"""Files of prompts are read as they are meant, and mistakes in them are told before any work."""

import pytest

from accvideo.command import Prompt, read_prompt_file, read_prompts
from accvideo.types import UserError


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
    ],
)
def test_mistakes_in_files_are_told(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_prompt_file(tmp_path / name)
    assert len(str(error.value).splitlines()) <= 2


def test_where_only_prompts_are_read_other_columns_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,image\nred,a.png\n")
    with pytest.raises(UserError, match="column image"):
        read_prompts(tmp_path / "a.csv")
