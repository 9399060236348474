"""Tiny random-weight pipelines of the real diffusers classes: no download, tokenizer and text encoder included.

`tiny_wan_pipeline(...).save_pretrained(folder)` makes a teacher's folder. Clips are 32x32 pixels, 5 frames; pass
`**TINY_CALL` to any of the pipelines (`**TINY_HUNYUAN_CALL` to HunyuanVideo's).
"""

import string
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

TINY_CALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}
"""Arguments of a pipeline's call that every tiny pipeline takes."""

TINY_HUNYUAN_CALL: dict[str, Any] = {**TINY_CALL, "prompt_template": {"template": "{}", "crop_start": 0}}
"""For HunyuanVideo, whose own template is longer than all of a tiny prompt."""

LETTERS = string.ascii_letters + string.digits + string.punctuation
TEXT_WIDTH = 16

WAN_SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
}
"""Of a denoiser of Wan's kind: width 24, 2 blocks."""

HUNYUAN_SIZES: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT_WIDTH,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}
"""Of a denoiser of HunyuanVideo's kind: width 20, 1 double and 1 single block."""

LANGUAGE: dict[str, Any] = {"hidden_size": TEXT_WIDTH, "intermediate_size": 16, "num_attention_heads": 2}
"""Of a language model."""

VISION: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
"""Of an image encoder: 4 tokens an image."""

BLOCK_WIDTHS: Any = (8, 8, 8, 8)
"""Of a VAE."""


def clip_vision_config() -> CLIPVisionConfig:
    """Two layers."""
    return CLIPVisionConfig(projection_dim=16, num_hidden_layers=2, **VISION)


def clip_vision() -> dict[str, Any]:
    """An image encoder and the processor of its images, by the names of Wan's components."""
    encoder = CLIPVisionModelWithProjection(clip_vision_config()).eval()
    return {"image_encoder": encoder, "image_processor": CLIPImageProcessor(size=32, crop_size=32)}


def t5_tokenizer() -> T5TokenizerFast:
    """One token a character."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=64)


def clip_tokenizer() -> CLIPTokenizer:
    """One token a character."""
    letters = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(letters)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def llama_tokenizer(**special: str) -> LlamaTokenizerFast:
    """One token a character, and special ones by the names under which a processor asks for them."""
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "▁", *LETTERS])}
    return LlamaTokenizerFast(
        vocab=vocab, merges=[], pad_token="</s>", model_max_length=512, extra_special_tokens=special
    )


def flow_scheduler(name: str, shift: float = 5.0) -> Any:
    """The flow-matching scheduler called `name`: "euler", "unipc" (Wan's released folders) or "dpm" (playground)."""
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    if name == "unipc":
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=1
    )


def wan_vae() -> AutoencoderKLWan:
    """4x temporal and 8x spatial compression, 4 channels."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def wan_transformer(in_channels: int = 4, image_dim: int | None = None, num_layers: int = 3) -> WanTransformer3DModel:
    """Width 24, `num_layers` blocks, 4 output channels."""
    changes = {"in_channels": in_channels, "image_dim": image_dim, "num_layers": num_layers}
    return WanTransformer3DModel(**WAN_SIZES | changes).eval()


def umt5_encoder() -> UMT5EncoderModel:
    """One layer."""
    config = UMT5Config(
        vocab_size=len(LETTERS) + 4,
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        num_decoder_layers=1,
    )
    return UMT5EncoderModel(config).eval()


def t5_encoder() -> T5EncoderModel:
    """One layer."""
    config = T5Config(vocab_size=len(LETTERS) + 4, d_model=TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def tiny_wan_pipeline(scheduler: str = "euler", seed: int = 0, experts: int = 1) -> WanPipeline:
    """Wan 2.1 T2V, or Wan 2.2 with two denoisers (`experts=2`, boundary at timestep 900)."""
    torch.manual_seed(seed)
    pipeline = WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=wan_vae(),
        scheduler=flow_scheduler(scheduler),
        transformer=wan_transformer(),
        transformer_2=wan_transformer() if experts == 2 else None,
        boundary_ratio=0.9 if experts == 2 else None,
    )
    return quiet(pipeline)


def tiny_wan_i2v_pipeline(scheduler: str = "unipc", seed: int = 0) -> WanImageToVideoPipeline:
    """Wan 2.1 I2V with its CLIP image encoder; call it with `image=tiny_image()`."""
    torch.manual_seed(seed)
    pipeline = WanImageToVideoPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=wan_vae(),
        scheduler=flow_scheduler(scheduler),
        transformer=wan_transformer(in_channels=4 + 4 + 4, image_dim=16),
        **clip_vision(),
    )
    return quiet(pipeline)


def tiny_hunyuan_pipeline(seed: int = 0) -> HunyuanVideoPipeline:
    """HunyuanVideo T2V: embedded guidance, Llama and CLIP text encoders, 2 double and 2 single blocks."""
    torch.manual_seed(seed)
    transformer = HunyuanVideoTransformer3DModel(**HUNYUAN_SIZES | {"num_layers": 2, "num_single_layers": 2})
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    llama = LlamaConfig(vocab_size=len(LETTERS) + 4, num_hidden_layers=2, **LANGUAGE)
    clip = CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2,
        hidden_size=8,
        projection_dim=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=2 * len(LETTERS),
        eos_token_id=2 * len(LETTERS) + 1,
    )
    pipeline = HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama).eval(),
        tokenizer=llama_tokenizer(),
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel(clip).eval(),
        tokenizer_2=clip_tokenizer(),
    )
    return quiet(pipeline)


def tiny_ltx_pipeline(seed: int = 0) -> LTXPipeline:
    """LTX-Video T2V: packed state, doubled batch, shift that depends on the resolution."""
    torch.manual_seed(seed)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=3,
        caption_channels=TEXT_WIDTH,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=BLOCK_WIDTHS,
        decoder_block_out_channels=BLOCK_WIDTHS,
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=2,
    )
    pipeline = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
        vae=vae.eval(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=transformer.eval(),
    )
    return quiet(pipeline)


def tiny_mochi_pipeline(seed: int = 0) -> MochiPipeline:
    """Mochi: doubled batch, sigmas that rise from noise to video."""
    torch.manual_seed(seed)
    transformer = MochiTransformer3DModel(
        in_channels=12,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=16,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=8,
    )
    vae = AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    pipeline = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae.eval(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=transformer.eval(),
    )
    return quiet(pipeline)


def tiny_image(seed: int = 0) -> Image.Image:
    """Noise, 32x32 pixels."""
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def quiet(pipeline: Any) -> Any:
    """`pipeline` without its own progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


TINY_FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "wan-euler": (lambda: tiny_wan_pipeline("euler"), TINY_CALL),
    "wan-unipc": (lambda: tiny_wan_pipeline("unipc"), TINY_CALL),
    "wan-dpm": (lambda: tiny_wan_pipeline("dpm"), TINY_CALL),
    "wan-experts": (lambda: tiny_wan_pipeline("euler", experts=2), TINY_CALL),
    "wan-i2v": (tiny_wan_i2v_pipeline, {**TINY_CALL, "image": tiny_image()}),
    "hunyuan": (tiny_hunyuan_pipeline, TINY_HUNYUAN_CALL),
    "ltx": (tiny_ltx_pipeline, TINY_CALL),
    "mochi": (tiny_mochi_pipeline, TINY_CALL),
}
"""Name -> a function that makes the pipeline, and the arguments of its call."""
