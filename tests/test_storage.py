"""A folder is read wherever it is, and nothing outside of it."""

import os
import threading
import tracemalloc
from pathlib import Path

import fsspec
import pytest

from accvideo.data import storage
from accvideo.data.storage import open_storage
from accvideo.types import UserError
from tests.served import served


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of ten bytes."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.bin").write_bytes(b"0123456789")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed requests are tried again at once."""
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)


def copy_to_memory(folder: Path, name: str) -> str:
    filesystem = fsspec.filesystem("memory")
    for path in folder.iterdir():
        filesystem.pipe_file(f"/{name}/{path.name}", path.read_bytes())
    return f"memory://{name}"


@pytest.mark.parametrize("kind", ["path", "text", "file", "memory", "http"])
def test_the_same_is_read_from_everywhere(folder: Path, kind: str):
    with served(folder) as (url, _):
        addresses = {"path": folder, "text": str(folder), "file": f"file://{folder}", "http": url}
        address = copy_to_memory(folder, "read") if kind == "memory" else addresses[kind]
        place = open_storage(address)
        assert {*(place.sizes() or {})} == {"a.bin"}
        assert place.read("a.bin") == b"0123456789"
        assert place.read("a.bin", 3, 4) == b"3456"
        assert place.read("a.bin", 8, 5) == b"89"
        with pytest.raises(UserError, match=r"b\.bin: No such file"):
            place.read("b.bin")
        with pytest.raises(UserError, match="10 bytes; the most that is read is 9"):
            place.read("a.bin", limit=9)


def test_a_part_of_a_file_is_all_that_is_asked_for(folder: Path):
    with served(folder) as (url, server):
        open_storage(url).read("a.bin", 3, 4)
        assert server.asked[-1] == ("/a.bin", (3, 6))


def test_a_server_without_parts_is_refused(folder: Path):
    with served(folder, ranges=False) as (url, _), pytest.raises(UserError, match="whole files where parts are asked"):
        open_storage(url).read("a.bin", 3, 4)


def test_what_a_network_disturbs_is_tried_again(folder: Path):
    (folder / "a.tar").write_bytes(b"abc")
    with served(folder, num_failures=3) as (url, _):
        assert open_storage(url).read("a.tar", 0, 2) == b"ab"
    with served(folder, num_failures=4) as (url, _), pytest.raises(UserError, match=r"a\.tar: .*503"):
        open_storage(url).read("a.tar", 0, 2)


def test_links_out_of_the_folder_are_refused(folder: Path):
    secret = folder.parent / "secret.bin"
    secret.write_bytes(b"secret")
    (folder / "out.bin").symlink_to(secret)
    (folder / "up.bin").symlink_to("../secret.bin")
    (folder / "in.bin").symlink_to("a.bin")
    place = open_storage(folder)
    for name in ("out.bin", "up.bin", "../secret.bin", str(secret)):
        with pytest.raises(UserError, match="outside the data set"):
            place.read(name)
    assert place.read("in.bin") == b"0123456789"


def test_a_link_to_the_folder_itself_is_followed(folder: Path):
    (folder.parent / "link").symlink_to(folder)
    assert open_storage(folder.parent / "link").read("a.bin") == b"0123456789"


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop"])
def test_only_regular_files_are_read(folder: Path, kind: str):
    """A named pipe would be waited for without end."""
    path = folder / "b.bin"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
    with pytest.raises(UserError, match=r"b\.bin"):
        open_storage(folder).read("b.bin")


def test_a_sparse_file_of_terabytes_is_not_read(folder: Path):
    with (folder / "b.bin").open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(UserError, match="4,398,046,511,104 bytes; the most"):
        open_storage(folder).read("b.bin")


def test_no_more_is_allocated_than_is_there(folder: Path):
    """Whatever an index claims."""
    tracemalloc.start()
    try:
        assert open_storage(folder).read("a.bin", 4, 1 << 33) == b"456789"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_folder_that_changes_is_listed(folder: Path):
    """A recorder's claims come and go while `verify` and training look on."""
    stop = threading.Event()

    def claim() -> None:
        while not stop.is_set():
            for number in range(50):
                (folder / f".block-{number}.claim").touch()
            for number in range(50):
                (folder / f".block-{number}.claim").unlink()

    thread = threading.Thread(target=claim)
    thread.start()
    try:
        place = open_storage(folder)
        for _ in range(300):
            assert (place.sizes() or {})["a.bin"] == 10
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("address", ["nowhere://x", "gibberish::memory://x"])
def test_unknown_addresses_are_refused(address: str):
    with pytest.raises(UserError, match="cannot open") as error:
        open_storage(address)
    assert len(str(error.value).splitlines()) == 2
