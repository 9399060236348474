"""Bytes of one recorded trajectory of Wan at 480x832x81 in accvideo's layout, against layouts of others.

    python benchmarks/record_bytes.py [--num-tokens 120]

The sample has the shapes and types that diffusers' WanPipeline has: latents 16x21x60x104 in float32, prompt embeddings
512x4096 in bfloat16 with zeros after the prompt's own tokens. Values are random; it is written by the recorder's own
code, and read back to the bit.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from accvideo.call import DenoiserCall
from accvideo.trajectory import Trajectory, read_trajectory, write_trajectory

STATE = (16, 21, 60, 104)
NUM_STUDENT_STEPS = 5


def sample(num_tokens: int, states: torch.dtype) -> Trajectory:
    """A trajectory whose states a pipeline kept in a type, and whose prompt has a number of tokens."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.zeros(1, 512, 4096, dtype=torch.bfloat16)
    embeds[:, :num_tokens] = torch.randn(1, num_tokens, 4096, generator=generator).bfloat16()
    calls = tuple(
        DenoiserCall(
            {"timestep": torch.tensor([999 - 100 * k]), "encoder_hidden_states": embeds},
            {"return_dict": False, "attention_kwargs": None},
            dtype=torch.bfloat16,
        )
        for k in range(NUM_STUDENT_STEPS)
    )
    latents = torch.randn(NUM_STUDENT_STEPS + 1, *STATE, generator=generator).to(states).float()
    return Trajectory(0, 0, "a prompt " * (num_tokens // 2), latents, calls, ("transformer",) * NUM_STUDENT_STEPS)


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
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tokens", type=int, default=120, help="of the prompt, out of 512")
    num_tokens = parser.parse_args().num_tokens
    state = torch.Size(STATE).numel()
    embeds = 512 * 4096 * 2
    rows = {
        "all 49 states in float32 (FastVideo's ODE preprocess), by arithmetic, without embeddings": 49 * state * 4,
        "six key states in float32, padded embeddings with each of five calls, by arithmetic": 6 * state * 4
        + 5 * embeds,
        "accvideo: six key states in float32, as WanPipeline keeps them": written(sample(num_tokens, torch.float32)),
        "accvideo: of a pipeline that keeps its latents in bfloat16": written(sample(num_tokens, torch.bfloat16)),
    }
    for name, size in rows.items():
        print(f"{size:>12,} bytes  {next(iter(rows.values())) / size:5.1f}x less  {name}")


if __name__ == "__main__":
    main()
