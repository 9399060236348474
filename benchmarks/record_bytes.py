"""Bytes of one recorded trajectory in accvideo's layout, against layouts of others.

    python benchmarks/record_bytes.py [--num-tokens 120] [--num-seeds 5]

Samples have the shapes and types that diffusers' pipelines have in bfloat16 (latents, prompt embeddings and their
padding, image conditions); values are random. Each is written by the recorder's own code, and read back to the bit. The
last columns say what would be saved if all that is the same for a prompt, or its image, were stored once for
`--num-seeds` records of it.
"""

import argparse
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from accvideo.call import DenoiserCall
from accvideo.trajectory import Trajectory, read_trajectory, write_trajectory

NUM_STUDENT_STEPS = 5


@dataclass(frozen=True)
class Model:
    """What a pipeline leaves of a clip."""

    name: str
    state: tuple[int, ...]
    noise: torch.dtype
    steps: torch.dtype
    """Of the states after the noise, as the pipeline's scheduler leaves them."""
    num_embeds: int
    """Rows of prompt embeddings, padding included."""
    width: int
    """Of a row."""
    image: tuple[tuple[int, ...], ...] = ()
    """Shapes of what an image adds to each call."""
    padding_counts: bool = False
    """Whether the denoiser sees the padding: then it is stored."""

    def num_rows(self, num_tokens: int) -> int:
        """Rows of prompt embeddings that are stored."""
        return self.num_embeds if self.padding_counts else num_tokens


WIDE, NARROW = torch.float32, torch.bfloat16
WAN = (16, 21, 60, 104)
MODELS = (
    Model("Wan 2.1, 480x832x81, UniPC", WAN, WIDE, WIDE, 512, 4096),
    Model("Wan 2.1, 480x832x81, Euler or DPM", WAN, WIDE, NARROW, 512, 4096),
    Model("Wan 2.1 image-to-video, UniPC", WAN, WIDE, WIDE, 512, 4096, ((1, 20, 21, 60, 104), (1, 257, 1280))),
    Model("HunyuanVideo, 544x960x93", (16, 24, 68, 120), WIDE, NARROW, 256, 4096),
    Model("HunyuanVideo 1.5, 480x848x121", (32, 31, 30, 53), NARROW, NARROW, 1000, 3584),
    Model("LTX-Video, 480x704x161", (128, 21, 15, 22), WIDE, WIDE, 128, 4096),
    Model("Cosmos-Predict 2.5, 704x1280x93", (16, 24, 88, 160), WIDE, WIDE, 512, 28 * 3584, padding_counts=True),
)


def sample(model: Model, num_tokens: int) -> Trajectory:
    """A trajectory whose prompt has a number of tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    embeds = torch.zeros(1, model.num_embeds, model.width, dtype=NARROW)
    embeds[:, : model.num_rows(num_tokens)] = draw(1, model.num_rows(num_tokens), model.width).to(NARROW)
    given = {f"image.{number}": draw(*shape).to(NARROW) for number, shape in enumerate(model.image)}
    calls = tuple(
        DenoiserCall(
            {"timestep": torch.tensor([999 - 100 * k]), "encoder_hidden_states": embeds, **given},
            {"return_dict": False, "attention_kwargs": None},
            dtype=NARROW,
        )
        for k in range(NUM_STUDENT_STEPS)
    )
    states = [draw(*model.state).to(model.steps if k else model.noise).float() for k in range(NUM_STUDENT_STEPS + 1)]
    names = ("transformer",) * NUM_STUDENT_STEPS
    text = "a prompt " * (num_tokens // 2)
    return Trajectory(0, 0, text, torch.stack(states), calls, names, settings="f" * 64)


def written(trajectory: Trajectory) -> int:
    """Bytes of its file, which is read back and compared."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_trajectory(Path(folder), trajectory)
        back = read_trajectory(path)
        assert torch.equal(back.states, trajectory.states)
        for call, own in zip(back.calls, trajectory.calls, strict=True):
            assert all(torch.equal(call.tensors[name], tensor) for name, tensor in own.tensors.items())
        return path.stat().st_size


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tokens", type=int, default=120, help="of the prompt")
    parser.add_argument("--num-seeds", type=int, default=5, help="records of a prompt")
    options = parser.parse_args()
    print(f"49 states of {MODELS[0].name} in float32, by arithmetic: {49 * prod(WAN) * 4:,}")
    print("model | six states in float32, padded embeddings with each call | accvideo | of it a prompt's | once saves")
    for model in MODELS:
        image = sum(2 * prod(shape) for shape in model.image)
        plain = 6 * prod(model.state) * 4 + 5 * (model.num_embeds * model.width * 2 + image)
        size, own = (
            written(sample(model, options.num_tokens)),
            model.num_rows(options.num_tokens) * model.width * 2 + image,
        )
        saved = own * (1 - 1 / options.num_seeds) / size
        print(f"{model.name} | {plain:,} | {size:,} = 1 / {plain / size:.1f} | {own:,} | {saved:.1%}")


if __name__ == "__main__":
    main()
