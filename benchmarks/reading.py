"""How long a training step waits for its data: from files, from shards, from a web server.

    python benchmarks/reading.py [--step-seconds 2] [--num-steps 10] [--num-trajectories 6] [--busy]

Records of the size of Wan at 480x832x81 (51 MB each) are written to a temporary folder, and nothing is kept in memory
between reads: each step reads its batch, checks its SHA-256 and collates it. In place of a step of training the main
thread waits, as it does for an accelerator; with --busy it multiplies matrices meanwhile. "alone" is what reading takes
if nothing is read ahead, with the processor's share of it.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from record_bytes import MODELS, sample

from accvideo.data import dataset
from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.pack import PackConfig, pack
from accvideo.trajectory import TrajectoryBatch, trajectory_name, write_trajectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.served import served  # noqa: E402
from tests.test_trajectory import make_manifest  # noqa: E402


def write_data_set(folder: Path, number: int) -> None:
    """Random trajectories of Wan's shapes."""
    values: dict[str, Any] = {"num_steps": 50, "num_student_steps": 5, "keypoints": list(range(0, 51, 10))}
    manifest = replace(make_manifest(number), sigmas=[1 - i / 50 for i in range(51)], **values)
    (folder / "manifest.json").write_text(manifest.to_json())
    one = replace(sample(MODELS[0], 120), settings=manifest.settings)
    for index in range(number):
        write_trajectory(folder, replace(one, index=index))
        print(f"\rwriting {trajectory_name(index)}", end="", file=sys.stderr)
    print(file=sys.stderr)


def work(seconds: float, busy: bool) -> None:
    """A step's time, with or without matrix products."""
    if not busy:
        time.sleep(seconds)
        return
    ended, matrix = time.perf_counter() + seconds, torch.randn(256, 256)
    while time.perf_counter() < ended:
        matrix = torch.nn.functional.normalize(matrix @ matrix)


def waited(batches: Iterator[TrajectoryBatch], options: argparse.Namespace) -> tuple[float, float]:
    """Mean seconds before a step, and those that the main thread worked, but for the first two, not read ahead."""
    times, worked = [], []
    for _ in range(options.num_steps + 2):
        began, began_work = time.perf_counter(), time.thread_time()
        next(batches)
        times.append(time.perf_counter() - began)
        worked.append(time.thread_time() - began_work)
        work(options.step_seconds, options.busy)
    return sum(times[2:]) / options.num_steps, sum(worked[2:]) / options.num_steps


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-seconds", type=float, default=2.0)
    parser.add_argument("--num-steps", type=int, default=10)
    parser.add_argument("--num-trajectories", type=int, default=6)
    parser.add_argument("--busy", action="store_true", help="keep the processor busy during a step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset.CACHE_BYTES = 1
    with tempfile.TemporaryDirectory() as temporary:
        folder, shards = Path(temporary) / "data", Path(temporary) / "shards"
        folder.mkdir()
        write_data_set(folder, options.num_trajectories)
        pack(PackConfig(data=str(folder), out=shards, shard_size=160_000_000))
        with served(shards) as (url, _):
            print(
                f"{'from':>7} {'s alone':>8} {'of it CPU':>9} {'s waited':>9} {'of it CPU':>9} {'share of a step':>15}"
            )
            for name, address in (("files", str(folder)), ("shards", str(shards)), ("http", url)):
                data = TrajectoryFolder(address)
                began, began_cpu = time.perf_counter(), time.process_time()
                for index in range(4):
                    dataset.collate_trajectories([data[index]])
                alone, cpu = (time.perf_counter() - began) / 4, (time.process_time() - began_cpu) / 4
                mean, worked = waited(data.batches(1, seed=0), options)
                share = mean / (mean + options.step_seconds)
                print(f"{name:>7} {alone:8.3f} {cpu:9.3f} {mean:9.4f} {worked:9.4f} {share:15.2%}", flush=True)


if __name__ == "__main__":
    main()
