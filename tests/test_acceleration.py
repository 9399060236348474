import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from accvideo.acceleration import Quantization, pipeline_quantization, quantization_config
from accvideo.types import UserError
from tests.tiny import TINY_CALL, tiny_wan_pipeline


def latents(pipeline: Any) -> torch.Tensor:
    """The result of a short run from fixed noise."""
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        prompt="red", num_inference_steps=3, guidance_scale=1.0, generator=generator, output_type="latent", **TINY_CALL
    ).frames


@pytest.mark.parametrize(("name", "tolerance"), [("int8", 0.01), ("float8", 0.05)])
def test_quantized_denoiser_is_smaller_and_close(tmp_path: Path, name: Quantization, tolerance: float):
    """Linear weights take a byte each, the rest stays; the result moves by the rounding only, but it moves."""
    pytest.importorskip("torchao")
    tiny_wan_pipeline().save_pretrained(tmp_path)
    plain: Any = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    config = pipeline_quantization(name, torch.float32)
    quantized: Any = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=config)
    linear = quantized.transformer.blocks[0].ffn.net[2].weight
    assert linear.qdata.element_size() == 1
    assert torch.equal(quantized.transformer.patch_embedding.weight, plain.transformer.patch_embedding.weight)
    assert torch.equal(quantized.text_encoder.shared.weight, plain.text_encoder.shared.weight)
    expected = latents(plain)
    error = (latents(quantized) - expected).norm() / expected.norm()
    assert 0 < error < tolerance


def test_quantization_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    wrong: Any = "int3"
    with pytest.raises(UserError, match="unknown quantization 'int3'; known are int8, float8, nf4"):
        quantization_config(wrong)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match="pip install torchao"):
        quantization_config("int8")
