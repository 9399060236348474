"""Time that generation by accvideo takes over the bare diffusers pipeline that it runs.

    python benchmarks/generate.py [MODEL] [--num-steps 5] [--guidance-scale 1] [--device cpu] [--pairs 40]

Both make the same clip from the same noise with the same pipeline object, in turns; the frames are compared, too. Then
text encoder, denoiser and decoder only return what they returned before, and the difference that is left is accvideo's
own work. One JSON object on stdout: medians of both, the median ratio of neighbors and the median of their difference
in the second part, each with its 95 % interval.
"""

import argparse
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from accvideo.generate import sample_clips
from accvideo.inference.model import load_model
from accvideo.metrics import bootstrap_interval
from accvideo.teacher import item_generator

PROMPT = "a red star spins on a plain navy background"


def remember(owner: Any, name: str) -> None:
    """Let a method return for ever what it returns the next time."""
    original, results = getattr(owner, name), []

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        if not results:
            results.append(original(*args, **kwargs))
        return results[0]

    setattr(owner, name, method)


def main() -> None:
    """Time both in turns and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="playground")
    parser.add_argument("--num-steps", type=int, default=5)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pairs", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(arguments.model, getattr(torch, arguments.dtype), arguments.device)
    settings: dict[str, Any] = {"num_steps": arguments.num_steps, "guidance_scale": arguments.guidance_scale}

    def ours() -> np.ndarray:
        [batch] = sample_clips(model, [PROMPT], [0], **settings)
        return batch.frames.numpy()

    def bare() -> np.ndarray:
        pipeline: Any = model.pipeline
        output = pipeline(
            prompt=[PROMPT],
            generator=[item_generator(0, 0)],
            num_inference_steps=arguments.num_steps,
            guidance_scale=arguments.guidance_scale,
            output_type="np",
            **model.arguments,
        )
        return (output.frames * 255).round().astype(np.uint8)

    def seconds(run: Callable[[], np.ndarray]) -> float:
        """Of the processor where that computes, so that other work on the machine does not count."""
        clock = time.process_time if arguments.device == "cpu" else time.perf_counter
        began = clock()
        run()  # frames come back to the processor: nothing is left to wait for
        return clock() - began

    assert np.array_equal(ours(), bare())  # and both are warm now
    gc.disable()  # a collection would fall on one of them

    def measure(num_pairs: int) -> list[dict[str, float]]:
        orders = [(ours, bare) if index % 2 else (bare, ours) for index in range(num_pairs)]
        return [{run.__name__: seconds(run) for run in order} for order in orders]

    pairs = measure(arguments.pairs)
    ratios = np.array([pair["ours"] / pair["bare"] for pair in pairs])
    interval = bootstrap_interval(ratios, statistic=np.median)
    parts: Any = model.pipeline
    for owner, name in ((parts.text_encoder, "forward"), (parts.transformer, "forward"), (parts.vae, "decode")):
        remember(owner, name)
    ours(), bare()
    rest = measure(5 * arguments.pairs)
    own = bootstrap_interval(np.array([pair["ours"] - pair["bare"] for pair in rest]), statistic=np.median)
    result = {
        **vars(arguments),
        "seconds": {name: statistics.median(pair[name] for pair in pairs) for name in ("ours", "bare")},
        "overhead": interval.mean - 1,
        "interval_95": [interval.low - 1, interval.high - 1],
        "own_seconds": asdict(own),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
