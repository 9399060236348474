"""How long a training step waits for its data: from files, from shards, from a web server.

    python benchmarks/reading.py [--step-seconds 1] [--num-steps 20] [--num-trajectories 6]

Records of the size of Wan at 480x832x81 (51 MB each) are written to a temporary folder, and nothing is kept in memory
between reads: each step reads its batch, checks its SHA-256 and collates it. A step of training is stood in for by
matrix products of a given time in the main thread. "alone" is what reading takes if nothing is read ahead.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from record_bytes import sample

from accvideo import dataset
from accvideo.dataset import TrajectoryFolder
from accvideo.manifest import Manifest
from accvideo.pack import PackConfig, pack
from accvideo.trajectory import TrajectoryBatch, trajectory_name, write_trajectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.served import served  # noqa: E402
from tests.test_trajectory import make_manifest  # noqa: E402


def write_data_set(folder: Path, number: int) -> None:
    """Random trajectories of Wan's shapes."""
    values = {"num_steps": 50, "num_student_steps": 5, "keypoints": list(range(0, 51, 10))}
    manifest = Manifest(**vars(make_manifest(number)) | values | {"sigmas": [1 - i / 50 for i in range(51)]})
    (folder / "manifest.json").write_text(manifest.to_json())
    one = sample(120, torch.float32)
    for index in range(number):
        write_trajectory(folder, type(one)(**vars(one) | {"index": index}))
        print(f"\rwriting {trajectory_name(index)}", end="", file=sys.stderr)
    print(file=sys.stderr)


def work(seconds: float) -> None:
    """Matrix products for a time."""
    ended, matrix = time.perf_counter() + seconds, torch.randn(256, 256)
    while time.perf_counter() < ended:
        matrix = torch.nn.functional.normalize(matrix @ matrix)


def waited(batches: Iterator[TrajectoryBatch], num_steps: int, step_seconds: float) -> list[float]:
    """Seconds before each step, but for the first two, which nothing was read ahead of."""
    times = []
    for _ in range(num_steps + 2):
        began = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - began)
        work(step_seconds)
    return times[2:]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-seconds", type=float, default=1.0)
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--num-trajectories", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset.CACHE_BYTES = 1
    with tempfile.TemporaryDirectory() as temporary:
        folder, shards = Path(temporary) / "data", Path(temporary) / "shards"
        folder.mkdir()
        write_data_set(folder, options.num_trajectories)
        pack(PackConfig(data=str(folder), out=shards, shard_size=160_000_000))
        with served(shards) as (url, _):
            print(f"{'from':>8} {'MB/s alone':>10} {'s alone':>8} {'s waited':>9} {'share of a step':>15}")
            for name, address in (("files", str(folder)), ("shards", str(shards)), ("http", url)):
                data = TrajectoryFolder(address)
                began = time.perf_counter()
                for index in islice(range(len(data)), 4):
                    dataset.collate_trajectories([data[index]])
                alone = (time.perf_counter() - began) / 4
                size = (data.source.num_bytes or 0) / len(data)
                times = waited(data.batches(1, seed=0), options.num_steps, options.step_seconds)
                mean = sum(times) / len(times)
                share = mean / (mean + options.step_seconds)
                print(f"{name:>8} {size / alone / 1e6:10.0f} {alone:8.3f} {mean:9.4f} {share:15.2%}")


if __name__ == "__main__":
    main()
