"""Batches are the same whoever asks, wherever the data set lies."""

import json
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import safetensors.torch
import torch

from accvideo.data import dataset
from accvideo.data.dataset import TrajectoryFolder, ahead
from accvideo.data.pack import PackConfig, pack
from accvideo.distill import DistillConfig, distill
from accvideo.trajectory import trajectory_name, write_trajectory
from accvideo.types import UserError
from tests.recorded import PROMPTS, record_tiny
from tests.served import served
from tests.test_storage import copy_to_memory
from tests.test_trajectory import make_trajectory, padded, write_data_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five trajectories."""
    return write_data_set(tmp_path / "data")


def test_batches_are_deterministic_and_resumable(folder):
    """Batch n is the same from the start, from n, and from another object; each epoch holds each item once."""
    data = TrajectoryFolder(folder)
    run = [batch.indices for batch in islice(data.batches(2, seed=3), 20)]
    for start in (1, 4, 13):
        again = TrajectoryFolder(folder).batches(2, seed=3, start=start)
        assert [batch.indices for batch in islice(again, 20 - start)] == run[start:]
    drawn = [index for indices in run for index in indices]
    epochs = [drawn[i : i + 5] for i in range(0, 40, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4, "epochs differ"
    assert run != [batch.indices for batch in islice(data.batches(2, seed=4), 20)]


def test_batches_of_some_indices(folder):
    drawn = [i for batch in islice(TrajectoryFolder(folder).batches(3, 0, indices=[1, 4]), 4) for i in batch.indices]
    assert all(sorted(drawn[i : i + 2]) == [1, 4] for i in range(0, 12, 2))


def test_a_batch_holds_its_trajectories(folder):
    data = TrajectoryFolder(folder)
    batch = next(data.batches(3, seed=0))
    assert batch.states.shape == (3, 3, 4, 2, 3, 3) and batch.denoisers == ("transformer", "transformer_2")
    for row, index in enumerate(batch.indices):
        alone = data[index]
        assert torch.equal(batch.states[row], alone.states) and batch.prompts[row] == alone.prompt
        for call, own in zip(batch.calls, alone.calls, strict=True):
            mine = call.select(slice(row, row + 1))
            assert all(torch.equal(mine.tensors[name], own.tensors[name]) for name in own.tensors)


def test_a_small_data_set_is_read_once(folder):
    data = TrajectoryFolder(folder)
    for _ in islice(data.batches(2, 0), 5):
        pass
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert len(list(islice(data.batches(2, 0), 5))) == 5


def test_only_the_files_needed_are_read(folder):
    (folder / trajectory_name(0)).write_bytes(b"damaged")
    assert len(list(islice(TrajectoryFolder(folder).batches(1, 0, indices=[1, 2]), 8))) == 8


def test_an_incomplete_data_set_is_refused(folder):
    (folder / trajectory_name(2)).unlink()
    with pytest.raises(UserError, match="lacks 1 of 5 trajectories, the first is 000002") as error:
        TrajectoryFolder(folder)
    assert len(str(error.value).splitlines()) == 2
    with pytest.raises(UserError, match="no manifest.json"):
        TrajectoryFolder(folder / "elsewhere")


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record is read each time."""
    monkeypatch.setattr(dataset, "CACHE_BYTES", 1)


@pytest.mark.parametrize("kind", ["memory", "http", "shards", "shards in memory", "shards over http"])
def test_batches_are_the_same_from_everywhere(folder, tmp_path, no_cache, kind):
    """A folder and its shards, on disk, in an object store, behind a web server; from any batch on."""
    expected = list(islice(TrajectoryFolder(folder).batches(2, seed=1), 7))
    if "shards" in kind:
        pack(PackConfig(data=str(folder), out=tmp_path / "shards", shard_size=12_000))
        folder = tmp_path / "shards"
        assert len(list(folder.glob("*.tar"))) > 1
    with served(folder) as (url, _):
        address = url if "http" in kind else copy_to_memory(folder, kind) if "memory" in kind else str(folder)
        for start in (0, 4):
            found = list(islice(TrajectoryFolder(address).batches(2, 1, start), 7 - start))
            for one, other in zip(found, expected[start:], strict=True):
                assert one.indices == other.indices and torch.equal(one.states, other.states)
                for mine, theirs in zip(one.calls, other.calls, strict=True):
                    assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in mine.tensors.items())


@pytest.mark.parametrize(("num_ranks", "batch_size"), [(2, 3), (3, 2), (6, 1)])
def test_ranks_share_each_batch(folder, num_ranks, batch_size):
    """The parts of all ranks, in order, are the batch of one rank that takes them all: from any batch on."""
    whole = [batch.indices for batch in islice(TrajectoryFolder(folder).batches(6, seed=2), 8)]
    for start in (0, 3):
        ranks = [
            islice(TrajectoryFolder(folder).batches(batch_size, 2, start, rank=rank, num_ranks=num_ranks), 8 - start)
            for rank in range(num_ranks)
        ]
        parts = [[index for part in batch for index in part.indices] for batch in zip(*ranks, strict=True)]
        assert parts == [list(indices) for indices in whole[start:]]


def test_results_come_in_order_and_ahead_of_their_use():
    """The first alone, so that who wants one reads one; then some more than were asked for, and no others."""
    started, lock = [], threading.Lock()
    done = threading.Semaphore(0)

    def work(item: int) -> int:
        with lock:
            started.append(item)
        done.release()
        return item * item

    results = ahead(work, iter(range(100)), 3)
    assert next(results) == 0 and started == [0]
    assert next(results) == 1
    for _ in range(5):
        assert done.acquire(timeout=20)
    assert sorted(started) == [0, 1, 2, 3, 4]
    assert [next(results) for _ in range(10)] == [item * item for item in range(2, 12)]
    results.close()
    assert max(started) <= 14
    assert list(ahead(work, [3, 1, 2], 2)) == [9, 1, 4] and list(ahead(work, [], 2)) == []


def test_an_error_comes_where_its_batch_would(folder, no_cache):
    """Not earlier, although it is met earlier; and no batch after it."""
    order = [i for batch in islice(TrajectoryFolder(folder).batches(1, seed=5), 5) for i in batch.indices]
    path = folder / trajectory_name(order[3])
    path.write_bytes(path.read_bytes()[:-1])
    batches = TrajectoryFolder(folder).batches(1, seed=5)
    assert [next(batches).indices[0] for _ in range(3)] == order[:3]
    with pytest.raises(UserError, match=path.name):
        next(batches)
    assert next(batches, None) is None


def test_only_a_small_data_set_stays_in_memory(folder, monkeypatch):
    """Whether the sizes are known beforehand or not."""
    size, reads = sum(path.stat().st_size for path in folder.glob("*.safetensors")), []
    read = dataset.Source.read_bytes
    monkeypatch.setattr(dataset.Source, "read_bytes", lambda source, i: reads.append(i) or read(source, i))
    with served(folder) as (url, _):
        for room, address, num_reads in (
            (size + 1, str(folder), 5),
            (size + 1, url, 5),
            (size, str(folder), 10),
            (size // 2, str(folder), 10),
            (1, url, 10),
        ):
            monkeypatch.setattr(dataset, "CACHE_BYTES", room)
            data = TrajectoryFolder(address)
            reads.clear()
            for index in [*range(5), *range(5)]:
                assert data[index].index == index
            assert len(reads) == num_reads


def test_what_padding_takes_in_memory_counts(folder, monkeypatch):
    """A data set may be small on disk only; what the key points share counts once."""
    embeds = padded(torch.ones(1, 4, 16), [1, 512, 16], [0, 0, 0])
    for index in range(5):
        trajectory = make_trajectory(index)
        calls = tuple(replace(call, tensors={"embeds": embeds}) for call in trajectory.calls)
        write_trajectory(folder, replace(trajectory, calls=calls))
    reads, read = [], dataset.Source.read_bytes
    monkeypatch.setattr(dataset.Source, "read_bytes", lambda source, i: reads.append(i) or read(source, i))
    whole = sum(dataset.num_bytes(TrajectoryFolder(folder)[index]) for index in range(5))
    assert 5 * embeds.nbytes < whole < 1.5 * 5 * embeds.nbytes
    for room, num_reads in ((whole + 1, 5), (whole - 1, 10)):
        monkeypatch.setattr(dataset, "CACHE_BYTES", room)
        data = TrajectoryFolder(folder)
        reads.clear()
        for index in [*range(5), *range(5)]:
            assert data[index].index == index
        assert len(reads) == num_reads


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryFolder:
    """What a tiny Wan pipeline did on prompts of several lengths."""
    return record_tiny(tmp_path_factory.mktemp("recorded"))


def test_a_recorded_prompt_takes_no_more_rows_than_it_has_tokens(recorded):
    """Of the 12 that Wan pads it to with zeros; the denoiser is given all 12."""
    index = PROMPTS.index("green")
    stored = safetensors.torch.load((Path(recorded.path) / trajectory_name(index)).read_bytes())
    assert stored["call.encoder_hidden_states"].shape == (1, len("_green") + 1, 16)
    assert {name for name in stored if "encoder_hidden_states" in name} == {"call.encoder_hidden_states"}
    for call in recorded[index].calls:
        assert call.tensors["encoder_hidden_states"].shape == (1, 12, 16)


def test_a_student_is_distilled_from_shards_elsewhere(recorded, tmp_path):
    """With the same metrics as from the folder that was recorded."""
    pack(PackConfig(data=str(recorded.path), out=tmp_path / "shards", shard_size=30_000))
    losses = []
    for name, address in (("a", str(recorded.path)), ("b", copy_to_memory(tmp_path / "shards", "distilled"))):
        out = tmp_path / name
        distill(DistillConfig(data=address, out=out, num_iterations=2, batch_size=2, num_validation=1, lora_rank=2))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["trajectory_loss"] for line in lines if "trajectory_loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 2
