import io
import json
import sys
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from accvideo.command import Prompt, read_prompt_file
from accvideo.recording.prompts import PromptsConfig, is_held_out, near_duplicates, normal_form, prompts
from accvideo.types import UserError
from tests.test_command import BYTES, LETTERS
from tests.test_trajectory import JSON
from tests.tiny import tiny_image

WORDS = ["red", "blue", "tall", "small", "quick", "calm", "round", "bright"]
THINGS = ["a fox crosses the river", "一只猫在跳舞", "собака бежит", "बिल्ली नाचती है", "قطة ترقص", "a 🚀 takes off"]
MANY = [f"{word} {number}: {thing}" for number in range(25) for word in WORDS for thing in THINGS]


def lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def png(seed: int) -> bytes:
    sink = io.BytesIO()
    tiny_image(seed).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "many.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in MANY), "utf-8")
    return path


def test_every_prompt_is_in_one_part_and_more_prompts_move_none(source: Path, tmp_path: Path):
    """In any order, and beside any others."""
    config = PromptsConfig(sources=(source,), out=tmp_path / "a.txt", held_out=tmp_path / "b.txt", held_out_share=0.2)
    summary = prompts(config)
    kept, held_out = set(lines(tmp_path / "a.txt")), set(lines(tmp_path / "b.txt"))
    assert kept | held_out == set(MANY) and not kept & held_out
    assert summary["num_prompts"] + summary["num_held_out"] == len(MANY) == 1200
    assert 0.15 < summary["num_held_out"] / len(MANY) < 0.25
    more = tmp_path / "more.txt"
    more.write_text("".join(f"{prompt} again\n" for prompt in MANY) + "\n".join(reversed(MANY)), "utf-8")
    prompts(replace(config, sources=(more, source), out=tmp_path / "c.txt", held_out=tmp_path / "d.txt"))
    assert kept < set(lines(tmp_path / "c.txt")) and held_out < set(lines(tmp_path / "d.txt"))


def test_case_spaces_and_punctuation_make_no_other_prompt(tmp_path: Path):
    same = ["A red fox.", "a  red fox", "“A red — FOX!”", "a red\tfox", "a red f\u043ex"]  # the last has a Cyrillic o
    (tmp_path / "in.txt").write_text("\n".join(same), "utf-8")
    summary = prompts(PromptsConfig(sources=(tmp_path / "in.txt",), out=tmp_path / "out.txt"))
    assert lines(tmp_path / "out.txt") == ["A red fox.", "a red f\u043ex"]
    assert summary["num_read"] == 5 and summary["num_duplicates"] == 3
    assert is_held_out(same[0], 0.5) == is_held_out(same[2], 0.5)
    assert normal_form("बिल्ली नाचती") != normal_form("बिल्ला नाचता")  # vowel signs are letters, not punctuation


def test_near_duplicates_are_those_that_an_exact_comparison_finds():
    """By brute force over all pairs, where the first of those that are alike stays."""
    base = "a tall lighthouse stands on a rocky cliff above the sea while gulls circle in the wind at dawn"
    texts = [base, base.replace("dawn", "dusk"), base.replace("gulls", "crows").replace("cliff", "shore")]
    texts += [base[i:] + base[:i] for i in range(5, 60, 5)] + [prompt for prompt in MANY[:60]] + ["ab", "ab ", "abc"]

    def runs(text: str) -> set[str]:
        text = text.ljust(5)
        return {text[i : i + 5] for i in range(len(text) - 4)}

    for similarity in (0.6, 0.8, 1.0):
        kept: list[str] = []
        expected = []
        for text in texts:
            alike = any(len(runs(text) & runs(k)) / len(runs(text) | runs(k)) >= similarity for k in kept)
            expected.append(alike)
            kept += [] if alike else [text]
        assert near_duplicates(texts, similarity) == expected
    assert near_duplicates(texts, 0.8)[:2] == [False, True]


def test_near_duplicates_are_left_out_only_when_asked(tmp_path: Path):
    base = "a tall lighthouse stands on a rocky cliff above the sea while gulls circle in the wind at "
    (tmp_path / "in.txt").write_text(f"{base}dawn\n{base}dusk\n")
    config = PromptsConfig(sources=(tmp_path / "in.txt",), out=tmp_path / "out.txt")
    assert prompts(config)["num_prompts"] == 2
    assert prompts(replace(config, near_duplicates=0.8)) | {"prompts": ""} == {
        "prompts": "",
        "num_prompts": 1,
        "num_read": 2,
        "num_duplicates": 0,
        "num_near_duplicates": 1,
        "num_bad": 0,
    }


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "parquet of bytes", "parquet as on the hub"])
def test_kept_columns_reach_what_record_reads(tmp_path: Path, kind: str, suffix: str):
    """From each kind of table, in another folder; images by name or in the table itself."""
    folder = tmp_path / "in"
    (folder / "frames").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for number in range(3):
        (folder / f"frames/{number}.png").write_bytes(png(number))
        rows.append({"text": f'say "{number}", twice', "first": f"frames/{number}.png", "frames": 5, "other": "x"})
    rows[2]["first"] = None
    path = folder / f"table.{kind.split()[0]}"
    if kind == "csv":
        cells = "".join(f'"{r["text"].replace(chr(34), chr(34) * 2)}",{r["first"] or ""},5,x\n' for r in rows)
        path.write_text("text,first,frames,other\n" + cells)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        for row in rows[:2]:
            data = (folder / row["first"]).read_bytes()
            if kind.endswith("bytes"):
                row["first"] = data
            elif kind.endswith("hub"):
                row["first"] = {"bytes": data, "path": "../../frame.png"}
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    out = tmp_path / f"out/prompts{suffix}"
    prompts(PromptsConfig(sources=(path,), out=out, column="text", keep=("image=first", "num_frames=frames")))
    found = read_prompt_file(out)
    assert [prompt.text for prompt in found] == [row["text"] for row in rows]
    assert [prompt.arguments.get("num_frames") for prompt in found] == [5, 5, 5]
    images = [prompt.arguments.get("image") for prompt in found]
    assert images[2] is None
    for number, name in enumerate(images[:2]):
        assert isinstance(name, str)
        with Image.open(out.parent / name) as image:
            assert list(image.getdata()) == list(tiny_image(number).getdata())
    if kind.endswith(("bytes", "hub")):  # nothing is written elsewhere, whatever names the table has
        assert {path.parent for path in tmp_path.rglob("*.png")} == {folder / "frames", out.parent / "prompts-media"}


def test_the_same_prompt_with_another_image_is_another(tmp_path: Path):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "in.csv").write_text("prompt,image\na fox,0.png\na fox,1.png\nA fox,1.png\n")
    prompts(PromptsConfig(sources=(tmp_path / "in.csv",), out=tmp_path / "out.csv", keep=("image",)))
    assert read_prompt_file(tmp_path / "out.csv") == [
        Prompt("a fox", {"image": f"{number}.png"}, tmp_path) for number in range(2)
    ]


BAD = {
    "long": ("x" * 100_000, "100000 characters; at most 4000"),
    "control": ("a \x07 bell", "control character U\\+0007 at position 2"),
    "null": ("a \x00", "control character U\\+0000"),
    "separator": ("a \x1c b", "control character U\\+001C"),
    "empty": ("   ", "an empty prompt"),
    "no words": ("?!…", "no words"),
    "a number": (3, "not text but int"),
    "nothing": (None, "an empty prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_prompt_is_named_or_skipped(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]):
    text, message = BAD[name]
    rows = [{"prompt": "a fox"}, {"prompt": text}, {"prompt": "a hen"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PromptsConfig(sources=(tmp_path / "in.jsonl",), out=tmp_path / "out.txt")
    with pytest.raises(UserError, match=f"in.jsonl, line 2: .*{message}"):
        prompts(config)
    assert not (tmp_path / "out.txt").exists()
    summary = prompts(replace(config, skip_bad=True))
    assert summary["num_bad"] == 1 and lines(tmp_path / "out.txt") == ["a fox", "a hen"]
    assert "line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"caption\na fox\n", "no column `prompt`; the columns are caption"),
        ("a.csv", b"prompt,image\na fox, brown,a.png\n", "row 1: more cells than columns"),
        ("a.csv", b'prompt\n"' + b"x" * 200_000 + b'"\n', "row 1: 200000 characters; at most 4000"),
        ("a.csv", b"prompt,size\na," + b"[" * 100_000, "row 1: the cell of `size` holds lists or objects"),
        ("a.csv", b"", "holds no prompts"),
        ("a.txt", b"\n\n", "holds no prompts"),
        ("a.txt", b"caf\xe9\n", "cannot read .*utf-8"),
        ("a.jsonl", b'{"prompt": "a"}\n["b"]\n', "line 2: not a JSON object"),
        ("a.jsonl", b'{"prompt": ' * 100_000, "line 1: lists or objects more than"),
        ("a.parquet", b"PAR1 no more", "cannot read"),
        ("a.xlsx", b"", "cannot read .*ending in one of"),
        ("missing.txt", None, "No such file"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(tmp_path: Path, name: str, data: bytes | None, message: str):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        prompts(PromptsConfig(sources=(tmp_path / name,), out=tmp_path / "out.txt"))


def test_images_that_are_none_are_bad(tmp_path: Path):
    rows = [{"prompt": "a fox", "image": b"no image"}, {"prompt": "a hen", "image": png(0)}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    (tmp_path / "in.csv").write_text("prompt,image\na fox,gone.png\n")
    config = PromptsConfig(sources=(tmp_path / "in.parquet",), out=tmp_path / "out.csv", keep=("image",))
    with pytest.raises(UserError, match="row 1: 8 bytes that are no image"):
        prompts(config)
    assert prompts(replace(config, skip_bad=True))["num_bad"] == 1
    with pytest.raises(UserError, match="row 1: there is no file .*gone.png"):
        prompts(replace(config, sources=(tmp_path / "in.csv",)))
    with pytest.raises(UserError, match="no column `picture`; the columns are prompt, image"):
        prompts(replace(config, sources=(tmp_path / "in.csv",), keep=("image=picture",)))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"accvideo\[prompts\]"):
        prompts(PromptsConfig(sources=(tmp_path / "a.parquet",), out=tmp_path / "out.txt"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out": Path("a.txt"), "keep": ("image",)}, "ends in one of .csv, .jsonl, for the columns that are kept"),
        ({"out": Path("a.md")}, "ends in one of .txt, .csv, .jsonl"),
        ({"out": Path("a.txt"), "held_out": Path("a.txt")}, "give them two names"),
        ({"out": Path("a.txt"), "held_out_share": 1.0}, "between 0 and 1"),
        ({"out": Path("a.txt"), "near_duplicates": 0.3}, "from 0.5 to 1"),
        ({"out": Path("a.txt"), "num_frames": 0}, "the least is 1"),
        ({"out": Path("a.txt"), "sources": ()}, "no source"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        PromptsConfig(**{"sources": (Path("in.txt"),)} | settings)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (datetime(2025, 1, 1), "the value for `size` cannot be written as JSON"),
        ([b"a"], "the value for `size` cannot be written as JSON"),
        ("\ud800", "the value for `size` holds half of a character"),
        ("a" * 300 + ".png", "there is no file"),
    ],
)
def test_kept_values_that_no_file_of_prompts_can_hold_are_bad(tmp_path: Path, value: Any, message: str, suffix: str):
    rows = [{"prompt": "a fox"}, {"prompt": "a hen", "size": value}]
    if isinstance(value, str):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps({"size": None} | row) + "\n" for row in rows))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows[::-1]), tmp_path / "in.parquet")
    (source,) = tmp_path.glob("in.*")
    config = PromptsConfig(sources=(source,), out=tmp_path / f"out{suffix}", keep=("size",))
    with pytest.raises(UserError, match=message):
        prompts(config)
    assert prompts(replace(config, skip_bad=True))["num_bad"] == 1


def gather(folder: Path, name: str, data: bytes, skip_bad: bool, suffix: str) -> None:
    """Prompts and images of a table of anybody: written so that they are read again, or refused."""
    (folder / name).write_bytes(data)
    config = PromptsConfig(
        sources=(folder / name,), out=folder / f"out{suffix}", keep=("image", "size"), skip_bad=skip_bad
    )
    with suppress(UserError):
        assert prompts(config)["num_prompts"] == len(read_prompt_file(config.out))


ENDS = st.sampled_from([".csv", ".jsonl"])


@settings(max_examples=200, deadline=None)
@given(BYTES, ENDS, st.booleans(), ENDS)
def test_a_table_of_anybody_is_refused_or_gathered(tmp_path_factory: pytest.TempPathFactory, data, kind, skip, out):
    gather(tmp_path_factory.getbasetemp(), f"anybody{kind}", data, skip, out)


IMAGES = st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "DDS", "TIFF"])
EDITS = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), min_size=1, max_size=8)


def edited(data: bytes, edits: list[tuple[int, int]]) -> bytes:
    """With other bytes at some places."""
    changed = bytearray(data)
    for place, byte in edits:
        changed[place % len(data)] = byte
    return bytes(changed)


@settings(max_examples=200, deadline=None)
@given(IMAGES, EDITS, st.booleans(), ENDS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_images_of_anybody_are_refused_or_gathered(tmp_path_factory: pytest.TempPathFactory, kind, edits, skip, out):
    sink, table = io.BytesIO(), io.BytesIO()
    tiny_image(0).save(sink, kind)
    rows = [{"prompt": "a fox", "image": edited(sink.getvalue(), edits), "size": 1}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    gather(tmp_path_factory.getbasetemp(), "images.parquet", table.getvalue(), skip, out)


@settings(max_examples=200, deadline=None)
@given(JSON | st.text(LETTERS, max_size=4) | st.dates() | st.decimals(), EDITS | st.just([]), st.booleans(), ENDS)
@example("\r0", [], False, ".csv")
def test_parquet_of_anybody_is_refused_or_gathered(tmp_path_factory: pytest.TempPathFactory, value, edits, skip, out):
    """Any value in a column, and bytes of the file changed."""
    table, size = io.BytesIO(), None
    with suppress(pyarrow.ArrowException, OverflowError, UnicodeError, TypeError):
        size = pyarrow.array([None, value])
    assume(size is not None)
    with suppress(pyarrow.ArrowException):
        parquet.write_table(pyarrow.table({"prompt": ["a fox", "a hen"], "image": ["", None], "size": size}), table)
    places = [(place * len(table.getvalue()) // 120, byte) for place, byte in edits] if table.getvalue() else []
    gather(tmp_path_factory.getbasetemp(), "any.parquet", edited(table.getvalue(), places), skip, out)
