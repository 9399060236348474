"""Padding of prompts takes no space where the denoiser looks away from it, and is kept where it does not."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import accvideo.record as stage
from accvideo.call import replay
from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.verify import problems
from accvideo.flow import euler_step
from accvideo.record import record
from accvideo.recording.config import RecordConfig
from accvideo.teacher import denoisers
from tests.families import FAMILIES

PROMPTS = ("red", "a circle", "two")


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "settings", "dropped"),
    [
        ("hunyuan", {"padding_side": "right"}, True),  # as released
        ("hunyuan", {"padding_side": "left"}, False),  # it takes as many of the first rows as the mask counts
        ("ltx", {}, True),
        ("mochi", {}, True),
        ("sana", {}, True),
        ("wan", {}, True),  # no mask: zeros already
    ],
)
def test_padding_is_dropped_where_no_bit_of_the_output_differs(family, settings, dropped, tmp_path, monkeypatch):
    """The recorded states are replayed bit for bit from what is stored, in batches of two as well."""
    pipeline, call = FAMILIES[family].make(), FAMILIES[family].arguments
    for name, value in settings.items():
        setattr(pipeline.tokenizer, name, value)
    monkeypatch.setattr(stage, "load_pipeline", lambda *_: pipeline)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = tuple(f"{name}={json.dumps(value)}" for name, value in call.items())
    for batch_size in (1, 2):
        folder = tmp_path / str(batch_size)
        config: dict[str, Any] = {"num_steps": 2, "num_student_steps": 2, "guidance_scale": 1.0}
        record(
            RecordConfig(
                teacher="t",
                prompts=tmp_path / "prompts.txt",
                out=folder,
                pipeline_arg=arguments,
                batch_size=batch_size,
                **config,
            )
        )
        assert problems(folder) == []
        data, network = TrajectoryFolder(folder), denoisers(pipeline)["transformer"]
        for index, prompt in enumerate(PROMPTS):
            trajectory = data[index]
            state = trajectory.states[:1]
            for k, recorded in enumerate(trajectory.calls):
                velocity = replay(network, recorded, state)
                state = euler_step(state, velocity, *data.manifest.key_sigmas[k : k + 2].tolist())
                tolerance = 0 if batch_size == 1 else 1e-5
                torch.testing.assert_close(state, trajectory.states[k + 1 : k + 2], rtol=0, atol=tolerance)
            rows, width = num_rows(folder, index)
            assert (rows < width) == dropped and (not dropped or rows <= len(prompt) + 3)


def num_rows(folder: Path, index: int) -> tuple[int, int]:
    """Rows of prompt embeddings in a file, and those that the denoiser is given."""
    stored = safetensors.torch.load((folder / f"{index:06d}.safetensors").read_bytes())["call.encoder_hidden_states"]
    return stored.shape[1], TrajectoryFolder(folder)[index].calls[0].tensors["encoder_hidden_states"].shape[1]
