import os
import socket
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch._inductor import config as inductor

from accvideo.generate import ClipBatch, generate, sample_clips
from accvideo.inference.acceleration import (
    accelerate_pipeline,
    joined_processes,
    pipeline_quantization,
    quantization_config,
    share_tokens,
)
from accvideo.inference.config import Acceleration, ContextParallel, GenerateConfig, Offload, Quantization
from accvideo.inference.model import Model, load_model
from accvideo.types import UserError
from tests.tiny import TINY_CALL, tiny_hunyuan_pipeline, tiny_mochi_pipeline, tiny_wan_pipeline


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


# Switches of a loaded pipeline


def clips(pipeline: Any, num: int = 1, size: int = 32) -> ClipBatch:
    """What a pipeline makes in two steps, as all commands run it."""
    arguments = {**TINY_CALL, "height": size, "width": size}
    model = Model("tiny", pipeline, "0", 2, 3.0, 8, arguments)
    [batch] = sample_clips(model, ["red", "a blue dot"][:num], range(num), batch_size=num)
    return batch


def accelerated(device: str = "cpu", **switches: Any) -> Any:
    pipeline = tiny_wan_pipeline()
    accelerate_pipeline(pipeline, Acceleration(**switches), device)
    return pipeline


def test_slicing_changes_nothing():
    """Videos are decoded one by one instead of together: the same frames but for rounding."""
    pipeline, expected = accelerated(vae_slicing=True), clips(tiny_wan_pipeline(), 2)
    sizes, decode = [], pipeline.vae._decode
    pipeline.vae._decode = lambda latents, **kwargs: (sizes.append(len(latents)), decode(latents, **kwargs))[1]
    found = clips(pipeline, 2)
    assert sizes == [1, 1]
    assert torch.equal(found.latents, expected.latents)
    assert (found.frames.int() - expected.frames.int()).abs().max() <= 1


def test_tiling_blends_tiles():
    """Latents are the same and frames nearly so; tiles are decoded one by one."""
    pipeline, expected = accelerated(vae_tiling=True), clips(tiny_wan_pipeline(), size=64)
    vae = pipeline.vae
    vae.tile_sample_min_height = vae.tile_sample_min_width = 48
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 32
    found = clips(pipeline, size=64)
    assert torch.equal(found.latents, expected.latents)
    difference = (found.frames.float() - expected.frames.float()).abs()
    assert 0 < difference.mean() < 0.1 * expected.frames.float().std()


@pytest.mark.parametrize("kind", ["model", "group"])
def test_offloading_changes_nothing(kind: Offload):
    """The hooks that move weights leave every bit; here from main memory to main memory."""
    expected = clips(tiny_wan_pipeline())
    pipeline = accelerated(offload=kind)
    for _ in range(2):
        found = clips(pipeline)
        assert torch.equal(found.latents, expected.latents) and torch.equal(found.frames, expected.frames)
    hook = "_hf_hook" if kind == "model" else "_diffusers_hook"
    assert any(hasattr(module, hook) for module in pipeline.transformer.modules())


@pytest.fixture
def backend_restored() -> Iterator[None]:
    """For diffusers keeps the backend that was set last for all models to come."""
    yield
    tiny_wan_pipeline().transformer.reset_attention_backend()


@pytest.mark.usefixtures("backend_restored")
def test_attention_backend_computes_the_same():
    """Plain products and the fused kernel agree to rounding, and the choice reaches every attention."""
    expected = clips(tiny_wan_pipeline())
    pipeline = accelerated(attention_backend="_native_math")
    assert {block.attn1.processor._attention_backend.value for block in pipeline.transformer.blocks} == {"_native_math"}
    torch.testing.assert_close(clips(pipeline).latents, expected.latents, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same():
    """All blocks are compiled, all else is not."""
    expected = clips(tiny_wan_pipeline())
    pipeline = accelerated(compile=True)
    assert all(block._compiled_call_impl is not None for block in pipeline.transformer.blocks)
    assert pipeline.transformer._compiled_call_impl is None
    torch.testing.assert_close(clips(pipeline).latents, expected.latents, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("backend_restored")
def test_attention_backend_that_cannot_run_is_refused():
    """It shows in the first denoiser call only, here because the kernel is for another device."""
    with pytest.raises(UserError, match="WanPipeline refuses its arguments: No viable backend"):
        clips(accelerated(attention_backend="_native_cudnn"))


def test_what_a_machine_lacks_is_said_before_loading():
    """Loading would fail with another message: there is no such model."""
    for switches, message in (
        ({"attention_backend": "fast"}, "unknown attention backend 'fast'; diffusers .* has flash, .*native"),
        (
            {"offload": "group"},
            "--offload group moves weights between main memory and an accelerator; the device is cpu",
        ),
    ):
        with pytest.raises(UserError, match=message):
            load_model("nowhere", acceleration=Acceleration(**switches))


def test_a_missing_compiler_is_said_before_loading():
    message = "torch.compile does not work here .*\n.* C\\+\\+ compiler.* leave --compile out"
    with inductor.patch({"cpp.cxx": ("nowhere",)}), pytest.raises(UserError, match=message):
        load_model("nowhere", acceleration=Acceleration(compile=True))


def test_what_a_pipeline_lacks_is_said():
    for backend, library in (("flash", "flash-attn"), ("sage", "sageattention"), ("flash_hub", "kernels")):
        if find_spec(library.replace("-", "_")) is None:
            with pytest.raises(UserError, match=f"refuses --attention-backend {backend}: .*{library}"):
                accelerated(attention_backend=backend)
    mochi = tiny_mochi_pipeline()
    with pytest.raises(UserError, match="MochiTransformer3DModel refuses --compile: .*_repeated_blocks"):
        accelerate_pipeline(mochi, Acceleration(compile=True), "cpu")
    untiled: Any = tiny_wan_pipeline()
    del untiled.vae.use_slicing
    with pytest.raises(UserError, match="AutoencoderKLWan refuses --vae-slicing"):
        accelerate_pipeline(untiled, Acceleration(vae_slicing=True), "cpu")


def generate_in_process(rank: int, folder: Path, port: int) -> None:
    """One of two processes as torchrun starts them, with its own folder as the current one."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.accelerator.device_count = lambda: 1  # diffusers counts accelerators, and here is none
    generate(generation(folder, f"shared-{rank}", "ulysses"))


def generation(folder: Path, out: str, context_parallel: ContextParallel) -> GenerateConfig:
    return GenerateConfig(
        model=str(folder / "teacher"),
        prompt="red",
        out=folder / out,
        num_steps=2,
        num_videos=2,
        height=32,
        width=32,
        num_frames=5,
        pipeline_arg=("max_sequence_length=16",),
        context_parallel=context_parallel,
    )


@pytest.mark.slow
def test_two_processes_share_the_tokens(tmp_path: Path):
    """The videos are those of one process, and the first process alone writes them."""
    tiny_wan_pipeline().save_pretrained(tmp_path / "teacher")
    generate(generation(tmp_path, "alone", "none"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(generate_in_process, (tmp_path, port), nprocs=2)
    for name in ("000000.mp4", "000001.mp4"):
        assert (tmp_path / "shared-0" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert not list((tmp_path / "shared-1").iterdir())


def test_context_parallelism_says_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="torchrun --nproc-per-node"), joined_processes("ulysses"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    with pytest.raises(UserError, match="takes several accelerators, and none was found"), joined_processes("ring"):
        pass
    hunyuan = tiny_hunyuan_pipeline()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="HunyuanVideoTransformer3DModel has no plan for context parallelism"):
        share_tokens(hunyuan, "ulysses")
