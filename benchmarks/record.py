"""Time that recording takes over the bare denoising loop of the pipeline that is recorded.

    python benchmarks/record.py [TEACHER] [--num-steps 50] [--batch-size 1] [--pairs 20] [--out FOLDER]

Both denoise the same blocks of items with the same pipeline object, in turns. Recording watches the pipeline, encodes,
checks, writes and flushes each trajectory; bare is a call of the pipeline with the same arguments and nothing kept. A
block is written while the next one is denoised, so a measurement is a run of `--blocks` blocks, the last of which is
waited for. One JSON object on stdout: medians of both in seconds of the clock, and the median ratio of neighbors with
its 95 % interval. On a machine that is busy with other work `--processor-time` counts seconds of the processor, of all
threads, instead: then writing counts in full, as if nothing overlapped.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accvideo.metrics import bootstrap_interval
from accvideo.record import Block, Recorder
from accvideo.recording.config import RecordConfig
from accvideo.recording.setup import items_arguments
from accvideo.recording.workers import Place

PROMPTS = ["a red star spins on a plain navy background", "a blue circle moves left", "two green squares grow"]


def main() -> None:
    """Time both in turns and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?", default="playground")
    parser.add_argument("--num-steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="on the disk to write to; a temporary folder by default")
    parser.add_argument("--processor-time", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if arguments.processor_time else time.perf_counter
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS))
        config = RecordConfig(
            teacher=arguments.teacher,
            prompts=prompts,
            out=Path(folder) / "trajectories",
            num_steps=arguments.num_steps,
            num_trajectories=arguments.blocks * arguments.batch_size * (arguments.pairs + 1),
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            device=arguments.device,
        )
        with Recorder(config, Place()) as recorder:
            blocks = recorder.missing()
            rounds = [blocks[start : start + arguments.blocks] for start in range(0, len(blocks), arguments.blocks)]

            def recorded(blocks: list[Block]) -> float:
                began = clock()
                for block in blocks:
                    recorder.record(block)
                recorder.writer.wait()
                return clock() - began

            def bare(blocks: list[Block]) -> float:
                pipeline: Any = recorder.pipeline
                began = clock()
                for block in blocks:
                    items = items_arguments(config, recorder.arguments, recorder.prompts, block.missing)
                    pipeline(num_inference_steps=config.num_steps, output_type="latent", **items).frames.cpu()
                return clock() - began

            recorded(rounds[0]), bare(rounds[0])  # both are warm now
            gc.disable()  # a collection would fall on one of them
            pairs = []
            for number, blocks in enumerate(rounds[1:]):
                order = (recorded, bare) if number % 2 else (bare, recorded)
                pairs.append({run.__name__: run(blocks) for run in order})
        sizes = [path.stat().st_size for path in config.out.glob("*.safetensors")]
    ratios = np.array([pair["recorded"] / pair["bare"] for pair in pairs])
    interval = bootstrap_interval(ratios, statistic=np.median)
    result = {
        **{name: value for name, value in vars(arguments).items() if name != "out"},
        "seconds": {name: statistics.median(pair[name] for pair in pairs) for name in ("recorded", "bare")},
        "bytes_per_trajectory": statistics.mean(sizes),
        "overhead": interval.mean - 1,
        "interval_95": [interval.low - 1, interval.high - 1],
        "quartiles": [float(np.quantile(ratios, q)) - 1 for q in (0.25, 0.75)],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
