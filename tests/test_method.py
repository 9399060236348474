import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "method.md"


@pytest.mark.slow
def test_the_program_of_the_page_is_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    source = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S))
    program = source.replace("num_iterations, batch_size = 64, 100, 16", "num_iterations, batch_size = 2, 30, 2")
    assert program != source
    names: dict[str, Any] = {}
    exec(compile(program, str(PAGE), "exec"), names)

    assert (tmp_path / "method.png").stat().st_size > 1000

    # The teacher followed by hand is the pipeline.
    few = names["shifted_sigmas"](3, shift=3.0)
    by_hand = names["teacher_states"](names["noise"], few, names["rows"])[:, -1]
    latents = names["pipeline"](
        prompt=names["prompts"], latents=names["noise"], num_inference_steps=3, guidance_scale=3.0, height=64, width=64,
        num_frames=17, max_sequence_length=32, output_type="latent",
    ).frames  # fmt: skip
    # Its scheduler rounds timesteps to whole numbers.
    assert (by_hand - latents).norm() < 0.02 * latents.norm()

    # The student has learned its steps.
    prompts = names["sample_prompts"](2, seed=0, split="train")
    names["texts"], _ = names["pipeline"].encode_prompt(prompts, max_sequence_length=32)

    @torch.no_grad()
    def losses() -> list[float]:
        return [float(names["secant_loss"](names["rows"], step)) for step in range(5)]

    after = losses()
    names["student"] = names["teacher"]
    before = losses()
    assert sum(after) < 0.8 * sum(before), (before, after)
