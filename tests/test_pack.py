"""Shards hold the files of a data set byte for byte, and nothing else is taken from them."""

import io
import json
import os
import random
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from accvideo.data.dataset import TrajectoryFolder, open_source
from accvideo.data.pack import PackConfig, UnpackConfig, groups, pack, unpack
from accvideo.data.schema import parse
from accvideo.data.shards import BLOCK, ShardIndex, end_of, padded
from accvideo.data.verify import problems
from accvideo.trajectory import trajectory_name
from accvideo.types import UserError
from tests.served import served
from tests.test_trajectory import JSON, write_data_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven trajectories."""
    return write_data_set(tmp_path / "data", 7)


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    """The same in archives of three, three and one."""
    three = 3 * (BLOCK + padded((folder / trajectory_name(0)).stat().st_size))
    size = three + len(end_of(three))
    pack(PackConfig(data=str(folder), out=tmp_path / "shards", shard_size=size))
    assert [path.name for path in sorted((tmp_path / "shards").iterdir())] == [
        *("000000.tar", "000001.tar", "000002.tar", "index.json", "manifest.json")
    ]
    return tmp_path / "shards"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_unpacking_gives_what_was_packed(folder, shards, tmp_path):
    """Byte for byte, from disk and from a web server; and packing that gives the same archives."""
    unpack(UnpackConfig(data=str(shards), out=tmp_path / "back"))
    assert contents(tmp_path / "back") == contents(folder)
    with served(shards) as (url, _):
        unpack(UnpackConfig(data=url, out=tmp_path / "from afar"))
        size = (shards / "000000.tar").stat().st_size
        pack(PackConfig(data=url, out=tmp_path / "again", shard_size=size))
    assert contents(tmp_path / "from afar") == contents(folder) and contents(tmp_path / "again") == contents(shards)


def test_tar_and_webdataset_read_shards(folder, shards):
    """The standard library finds the members; WebDataset one sample for each, under its number."""
    names = [name for path in sorted(shards.glob("*.tar")) for name in tarfile.open(path).getnames()]
    assert names == [trajectory_name(index) for index in range(7)]
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{index:06d}" for index in range(7)]
    for index, sample in enumerate(samples):
        assert sample["safetensors"] == (folder / trajectory_name(index)).read_bytes()


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([5, 5, 5], 10_240, [[5, 5, 5]]),
        ([9000] * 3, 10_240, [[9000]] * 3),
        ([30_000, 5, 5, 40_000, 5], 10_240, [[30_000], [5, 5], [40_000], [5]]),
        ([5] * 20, 10_240, [[5] * 9, [5] * 9, [5] * 2]),  # of 20 blocks, the last two are empty
    ],
)
def test_shards_are_as_large_as_allowed(sizes, limit, expected):
    assert groups(sizes, limit) == expected


def test_every_flipped_bit_in_shards_is_found(tmp_path):
    """550 anywhere: `verify` names the archive, and training reads what was recorded, or stops."""
    shards = tmp_path / "shards"
    pack(PackConfig(data=str(write_data_set(tmp_path / "data", 2)), out=shards, shard_size=1))
    source = open_source(shards)
    expected = {index: source.read(index) for index in range(2)}
    draw, num_read = random.Random(0), 0
    for _ in range(550):
        path = draw.choice(sorted(shards.glob("*.tar")))
        whole = path.read_bytes()
        byte = draw.randrange(len(whole))
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ (1 << draw.randrange(8))]) + whole[byte + 1 :])
        found = problems(shards)
        assert len(found) == 1 and path.name in found[0]
        for index, trajectory in expected.items():
            try:
                assert source.read(index).states.equal(trajectory.states)
                num_read += 1
            except UserError as error:
                assert path.name in str(error)
        path.write_bytes(whole)
    assert problems(shards) == [] and num_read > 550


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), "000001.tar: No such file"),
        (lambda path: path.write_bytes(b""), "000001.tar: changed around 000003.safetensors, or truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "000001.tar: changed after its last"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "000001.tar: changed after its last"),
        (lambda path: path.write_bytes((path.parent / "000000.tar").read_bytes()), "changed around 000003.safetensors"),
    ],
)
def test_verify_names_the_bad_shard(shards, damage, expected):
    damage(shards / "000001.tar")
    found = problems(shards)
    assert found and all("000001.tar" in problem for problem in found) and any(expected in each for each in found)


def test_a_missing_shard_is_noticed_before_training(shards):
    (shards / "000002.tar").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 3 shards, the first is 000002\.tar"):
        TrajectoryFolder(shards)


def hostile_archive(name: str, kind: bytes, content: bytes) -> bytes:
    """An archive whose only member would be written outside, or be a link there."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.linkname = kind, len(content), "../../outside"
        archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "000000.safetensors", "a/../../outside"])
def test_nothing_outside_is_written(folder, tmp_path, name, kind):
    """Names and kinds of members are compared with what they must be, and never used."""
    content = (folder / trajectory_name(0)).read_bytes() if kind == tarfile.REGTYPE else b""
    if (name, kind) == ("000000.safetensors", tarfile.REGTYPE):
        content = b"\x80\x04cos\nsystem\n."
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "000000.tar").write_bytes(hostile_archive(name, kind, content))
    (hostile / "index.json").write_text(ShardIndex.of([[len(content) or 1]]).to_json())
    (hostile / "manifest.json").write_text(
        (folder / "manifest.json").read_text().replace('"num_trajectories": 7', '"num_trajectories": 1')
    )
    values = json.loads((hostile / "manifest.json").read_text())
    del values["sha256"]
    (hostile / "manifest.json").write_text(json.dumps(values))
    before = {*tmp_path.rglob("*")}
    with pytest.raises(UserError, match=r"000000\.tar"):
        unpack(UnpackConfig(data=str(hostile), out=tmp_path / "out" / "deep"))
    assert {*tmp_path.rglob("*")} - before <= {tmp_path / "out"} and len(problems(hostile)) >= 1


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[" * 100_000,
        json.dumps({"sizes": [[1]], "sha256": "0" * 64}),
        json.dumps({"sizes": [["../x"]], "sha256": "0" * 64}),
        json.dumps({"sizes": [[1 << 70] * 7], "sha256": ShardIndex.checksum([[1 << 70] * 7])}),
    ],
)
def test_a_bad_index_is_refused(shards, index):
    (shards / "index.json").write_text(index)
    with pytest.raises(UserError, match=r"index\.json cannot be read"):
        TrajectoryFolder(shards)[0]
    assert problems(shards)


def test_an_index_of_another_data_set_is_refused(shards):
    (shards / "index.json").write_text(ShardIndex.of([[700] * 3]).to_json())
    with pytest.raises(UserError, match=r"index\.json lists 3 trajectories, manifest\.json 7"):
        TrajectoryFolder(shards)


def test_a_damaged_or_incomplete_data_set_is_not_packed(folder, tmp_path):
    path = folder / trajectory_name(3)
    whole = path.read_bytes()
    for damage in (lambda: path.write_bytes(whole[:-1] + b"!"), path.unlink):
        damage()
        with pytest.raises(UserError, match=path.name):
            pack(PackConfig(data=str(folder), out=tmp_path / "out"))
        assert sorted(each.name for each in tmp_path.iterdir()) == ["data"]


def test_a_folder_that_holds_something_is_left_alone(folder, shards):
    before = contents(folder)
    for run in (
        lambda: pack(PackConfig(data=str(shards), out=folder)),
        lambda: unpack(UnpackConfig(data=str(shards), out=folder)),
    ):
        with pytest.raises(UserError, match="holds something already"):
            run()
    assert contents(folder) == before


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(UserError, match="No space left"):
        pack(PackConfig(data=str(folder), out=tmp_path / "out"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data"]


def test_files_are_on_the_disk_before_their_folder_is_there(folder, tmp_path, monkeypatch):
    """A machine that dies leaves no folder of empty files."""
    flushed, fsync = set(), os.fsync

    def flush(descriptor: int) -> None:
        assert not (tmp_path / "out").exists()
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    pack(PackConfig(data=str(folder), out=tmp_path / "out"))
    assert {path.stat().st_ino for path in (tmp_path / "out").iterdir()} <= flushed


def test_a_link_inside_the_folder_is_packed(folder, shards, tmp_path):
    """As what it leads to."""
    (folder / trajectory_name(3)).rename(folder / "elsewhere")
    (folder / trajectory_name(3)).symlink_to("elsewhere")
    pack(PackConfig(data=str(folder), out=tmp_path / "again", shard_size=(shards / "000000.tar").stat().st_size))
    assert contents(tmp_path / "again") == contents(shards)


def test_an_archive_ends_on_a_whole_record():
    for size in (512, 10_240 - 1024, 10_240 - 512, 10_240):
        assert (size + len(end_of(size))) % tarfile.RECORDSIZE == 0 and len(end_of(size)) >= 2 * BLOCK


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries({}, optional={name: JSON for name in ("sizes", "sha256", "format", "other")}), st.booleans()
)
def test_an_index_of_anybody_is_refused_or_read(values, sealed):
    """With a right checksum, too."""
    if sealed and "sizes" in values:
        values["sha256"] = ShardIndex.checksum(values["sizes"])
    with suppress(UserError, ValueError):
        assert len(parse(ShardIndex, json.dumps(values))) >= 0
